//! What a report of a console log says. Data only: `None` means that the log does not say it.

use std::time::Duration;

use serde::Serialize;

use super::body::Corruption;
use super::frame::Frame;
use super::line::Caller;
use crate::CrashClass;

/// One crash, warning or stall that a log reports.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Title, as kernel fuzzing dashboards print it for the same text.
    pub title: String,
    /// Function in the title, without compiler suffixes.
    pub function: Option<String>,
    /// Module of that function, `None` for the kernel proper.
    pub module: Option<String>,
    /// Guilty file: the first that is not passed over. Needs a symbolised log.
    pub file: Option<String>,
    /// Class, where there is one for it: sanitizers, lockdep and warnings have none.
    pub class: Option<CrashClass>,
    /// Id for bucketing; that of a dump of the same crash.
    pub signature: String,
    /// Whether an earlier report of the log has to be read first: it is the cause as likely as not.
    pub follower: bool,
    /// Why title and the rest may be wrong.
    pub corrupted: Option<Corruption>,
    /// Frames, innermost first: the instruction pointer's, if printed, and the first call trace.
    pub frames: Vec<Frame>,
    /// Text of the panic that it ended in.
    pub panic: Option<String>,
    /// Time since boot.
    pub uptime: Option<Duration>,
    /// Wall-clock time as the log has it.
    pub wall_clock: Option<String>,
    /// Who printed it.
    pub caller: Option<Caller>,
    /// CPU number.
    pub cpu: Option<u32>,
    /// Thread id.
    pub pid: Option<u32>,
    /// Task's name.
    pub comm: Option<String>,
    /// Taint flags, letters only.
    pub taint: Option<String>,
    /// Kernel release.
    pub release: Option<String>,
    /// Machine and firmware.
    pub hardware: Option<String>,
    /// Modules that were loaded.
    pub modules: Vec<String>,
    /// Registers of the kernel at the fault, in the order of the log.
    pub registers: Vec<(String, u64)>,
    /// Code bytes around the fault as printed.
    pub code: Option<String>,
    /// Number of its first line in the log, from 1.
    pub first_line: usize,
    /// Lines of the log that belong to it.
    pub lines: usize,
}

impl Report {
    /// Who is at fault in one word: `function [module]`.
    #[must_use]
    pub fn offender(&self) -> Option<String> {
        let function = self.function.as_deref()?;
        Some(match &self.module {
            Some(module) => format!("{function} [{module}]"),
            None => function.to_owned(),
        })
    }
}
