//! The lines of one report, and what is wrong with them. Not what they say.

use std::borrow::Cow;
use std::fmt;

use memchr::memmem;
use serde::Serialize;

use super::blame::{STACK_STARTS, stack_start};
use super::frame::{self, Printed};

/// A stack has a frame within this many lines, or none.
const FRAMES_WITHIN: usize = 15;

/// One line of a report.
#[derive(Clone, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) text: Cow<'a, [u8]>,
    /// Which kind of stack begins after it.
    pub(crate) starts: Option<usize>,
}

impl<'a> Entry<'a> {
    pub(crate) fn new(text: Cow<'a, [u8]>) -> Self {
        let starts = stack_start(&text);
        Entry { text, starts }
    }

    /// The frame that the line is, if it is one.
    pub(crate) fn frame(&self) -> Option<Printed<'_>> {
        frame::parse(&self.text)
    }
}

/// What is wrong with a report: its title may be, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Corruption {
    /// The report that this one follows is not in the log: its start is missing.
    HeadMissing,
    /// The head is there, the lines that its kind of report has are not.
    BodyMissing,
    /// There is no stack trace.
    NoStack,
    /// The log ends within a stack trace.
    StackCut,
    /// A stack trace has no frame.
    NoFrames,
    /// No frame could be blamed.
    NoFunction,
    /// The line of the instruction pointer is missing.
    NoPointer,
    /// Another report or stack stands among its lines.
    Interleaved,
    /// A time stamp stands in the middle of the title.
    TitleBroken,
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Corruption::HeadMissing => "the start of the report is missing",
            Corruption::BodyMissing => "the lines after the first are missing",
            Corruption::NoStack => "no stack trace",
            Corruption::StackCut => "the log ends within a stack trace",
            Corruption::NoFrames => "a stack trace without frames",
            Corruption::NoFunction => "no frame that could be blamed",
            Corruption::NoPointer => "no line of the instruction pointer",
            Corruption::Interleaved => "another report or stack stands among its lines",
            Corruption::TitleBroken => "another line starts within the title",
        })
    }
}

/// What is wrong with the stacks of a report that should have some.
pub(crate) fn stacks(lines: &[Entry<'_>]) -> Option<Corruption> {
    let mut seen = [false; STACK_STARTS];
    let mut any = false;
    for (index, entry) in lines.iter().enumerate() {
        let Some(kind) = entry.starts else { continue };
        let Some(first) = seen.get_mut(kind).filter(|seen| !**seen) else { continue };
        *first = true;
        let after = lines.get(index + 1..).unwrap_or_default();
        if after.len() < 3 && !after.iter().any(|line| line.frame().is_some()) {
            return Some(Corruption::StackCut);
        }
        let within = after.iter().take(FRAMES_WITHIN);
        let mut within = within.take_while(|line| line.starts.is_none());
        if !within.any(|line| line.frame().is_some() || unavailable(&line.text)) {
            return Some(Corruption::NoFrames);
        }
        any = true;
    }
    (!any).then_some(Corruption::NoStack)
}

/// KASAN has no stack for an object that was allocated before the stack depot was.
fn unavailable(text: &[u8]) -> bool {
    memmem::find(text, b"(stack is not available)").is_some()
}
