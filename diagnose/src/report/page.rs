//! What a page about one incident shows, as plain data: filled by whoever knows the plan, the journal and
//! the time. Texts are as they are, guest text included; escaping is the writer's business.

use std::time::Duration;

use guest::GuestVirt;

/// How it ended: decides colour and word beside the title.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Repaired, and the guest runs.
    Repaired,
    /// Repaired, and something was given up (a process, a driver).
    RepairedWithLoss,
    /// Nothing was done: the crash took its course.
    LetGo,
    /// The crash of a dump: nothing could be done.
    Diagnosed,
}

/// One incident.
#[derive(Clone, Debug)]
pub struct Page<'a> {
    /// The diagnosis, if there is one.
    pub diagnosis: Option<&'a crate::Diagnosis>,
    /// Title where there is no diagnosis.
    pub title: String,
    /// How it ended.
    pub verdict: Verdict,
    /// One or two sentences: what happened and what became of it.
    pub summary: String,
    /// Facts of the incident by name: guest, kernel, when, downtime.
    pub facts: Vec<(String, String)>,
    /// Moments, ascending.
    pub timeline: Vec<Moment>,
    /// Lines of source around frames of the diagnosis.
    pub sources: Vec<Source>,
    /// Instructions around the fault, ascending.
    pub disassembly: Vec<InstructionLine>,
    /// The plan.
    pub plan: Vec<Step>,
    /// Why rungs were refused or handed over, in the order of the ladder.
    pub refusals: Vec<(String, String)>,
    /// Everything that was written to the guest, in order.
    pub writes: Vec<Write>,
    /// Further texts (journal, console) by title, shown as they are.
    pub texts: Vec<(String, String)>,
}

impl Page<'_> {
    /// A page with nothing on it but a title.
    #[must_use]
    pub fn new(title: &str, verdict: Verdict) -> Self {
        Self {
            diagnosis: None,
            title: title.to_owned(),
            verdict,
            summary: String::new(),
            facts: Vec::new(),
            timeline: Vec::new(),
            sources: Vec::new(),
            disassembly: Vec::new(),
            plan: Vec::new(),
            refusals: Vec::new(),
            writes: Vec::new(),
            texts: Vec::new(),
        }
    }
}

/// A moment of the incident.
#[derive(Clone, Debug)]
pub struct Moment {
    /// Since the stop was reported.
    pub at: Duration,
    /// What was done by then.
    pub label: String,
    /// Whether the guest stood up to this moment.
    pub standing: bool,
}

/// Lines of a source file around a place in a frame.
#[derive(Clone, Debug)]
pub struct Source {
    /// Index of the frame in the diagnosis.
    pub frame: usize,
    /// File as the debug information names it.
    pub file: String,
    /// Number of the first line in `lines`.
    pub first: u32,
    /// Line that the frame is at.
    pub at: u32,
    /// Lines without their ends.
    pub lines: Vec<String>,
}

/// One instruction.
#[derive(Clone, Debug)]
pub struct InstructionLine {
    /// Where.
    pub at: GuestVirt,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its text, Intel syntax.
    pub text: String,
    /// Whether it is the one that faulted.
    pub faulted: bool,
}

/// One step of a plan.
#[derive(Clone, Debug)]
pub struct Step {
    /// What is done.
    pub what: String,
    /// Why.
    pub why: String,
    /// What must hold before.
    pub preconditions: Vec<String>,
    /// Whether it was carried out; `None` = it was not tried.
    pub done: Option<bool>,
}

/// One write to guest memory.
#[derive(Clone, Debug)]
pub struct Write {
    /// Guest-virtual, where it was written by that.
    pub at: Option<GuestVirt>,
    /// Guest-physical.
    pub phys: guest::GuestPhys,
    /// Bytes before.
    pub old: Vec<u8>,
    /// Bytes after.
    pub new: Vec<u8>,
    /// Name or reason.
    pub what: String,
    /// Since the stop was reported.
    pub when: Option<Duration>,
}
