//! The signature of a report: the same that a dump of the crash gets, so that both land in one bucket. Only
//! the frames are made to look alike here; the hash is [`crate::signature`]'s.

use guest::{CodeAddress, GuestVirt, Registers};
use memchr::memmem;

use super::blame::{is_call_trace, pointer};
use super::body::Entry;
use super::frame::Frame;
use super::skip;
use crate::fault::Fault;
use crate::names::is_reporting;
use crate::{CrashClass, Trust, UnwindEnd, signature};

/// Frames of a report that are kept.
const FRAMES_MAX: usize = 256;

/// The stack of a report: where the instruction pointer was, if the report says so, and its first call trace.
pub(crate) fn frames(lines: &[Entry<'_>]) -> Vec<Frame> {
    let trace = lines.iter().position(|line| is_call_trace(&line.text));
    let before = lines.get(..trace.unwrap_or(lines.len())).unwrap_or_default();
    let mut frames = Vec::new();
    if let Some(found) = before.iter().find_map(|line| pointer(&line.text)) {
        frames.push(found.map_or_else(nowhere, |printed| printed.owned()));
    }
    let after = trace.and_then(|at| lines.get(at + 1..)).unwrap_or_default();
    for line in after.iter().take_while(|line| !ends(line)).take(FRAMES_MAX) {
        frames.extend(line.frame().map(|printed| printed.owned()));
    }
    frames
}

/// A stack ends where another starts, and before the registers of user mode.
fn ends(line: &Entry<'_>) -> bool {
    let text = &line.text;
    line.starts.is_some()
        || text.starts_with(b"RIP: 0033:")
        || text.starts_with(b"Modules linked in:")
        || text.starts_with(b"---[ end ")
}

/// The instruction pointer was no function's.
fn nowhere() -> Frame {
    Frame {
        function: String::new(),
        offset: None,
        size: None,
        module: None,
        source: None,
        inline: false,
        trusted: true,
    }
}

/// The signature of a class and a stack.
pub(crate) fn signature(class: Option<&CrashClass>, frames: &[Frame]) -> String {
    let physical = frames.iter().filter(|frame| frame.trusted && !frame.inline);
    let frames: Vec<_> = physical.map(like_a_dump).collect();
    let reports = |frame: &&crate::Frame| {
        let name = frame.function.as_deref().unwrap_or_default();
        is_reporting(frame) || (frame.module.is_none() && prints(name))
    };
    let at = frames.iter().take_while(reports).count();
    let at = if at < frames.len() { at } else { 0 };
    let fault = Fault {
        frames,
        end: UnwindEnd::Outermost,
        at,
        regs_at: None,
        exception: None,
        detector: None,
        found: true,
    };
    signature::id(class, &fault)
}

/// What a call trace begins with when the report was printed by a function call, not by a trap.
fn prints(name: &str) -> bool {
    matches!(skip::reason(name.as_bytes()), Some("it reports the crash" | "a sanitizer's own code"))
}

fn like_a_dump(frame: &Frame) -> crate::Frame {
    crate::Frame {
        pc: CodeAddress::Return(GuestVirt(0)),
        cfa: None,
        registers: Registers::unknown(),
        trust: Trust::Orc,
        module: frame.module.clone(),
        function: (!frame.function.is_empty()).then(|| frame.function.clone()),
        function_start: None,
        source: Vec::new(),
        saved_at: None,
    }
}

/// The class that the lines after the head make of it: which access failed, and which check.
pub(crate) fn class(
    of_head: Option<CrashClass>,
    lines: &[Entry<'_>],
    frames: &[Frame],
) -> Option<CrashClass> {
    let says = |words: &str| {
        lines.iter().take(16).any(|line| memmem::find(&line.text, words.as_bytes()).is_some())
    };
    let fetch = || says("#PF: supervisor instruction fetch in kernel mode");
    let at = || frames.first().map(|frame| frame.function.as_str()).unwrap_or_default();
    match of_head? {
        CrashClass::NullDereference if fetch() => Some(CrashClass::BadCall),
        CrashClass::WildPointer if says("SMEP") || says("SMAP") || user_page(lines) => {
            Some(CrashClass::UserAccess)
        }
        CrashClass::WildPointer if fetch() => Some(CrashClass::BadCall),
        CrashClass::WildPointer
            if says("permissions violation") && says("#PF: supervisor write access") =>
        {
            Some(CrashClass::WriteProtection)
        }
        CrashClass::Bug if matches!(at(), "fortify_panic" | "__fortify_panic") => {
            Some(CrashClass::Fortify)
        }
        class => Some(class),
    }
}

/// A page that is mapped, in the lower half of the address space.
fn user_page(lines: &[Entry<'_>]) -> bool {
    let address = |line: &Entry<'_>| {
        let at = memmem::find(&line.text, b"for address: ")?;
        let (address, _) = super::frame::hex(line.text.get(at + 13..)?)?;
        Some(address >> 63 == 0)
    };
    let violates = |line: &Entry<'_>| memmem::find(&line.text, b"permissions violation").is_some();
    lines.first().and_then(address) == Some(true) && lines.iter().take(16).any(violates)
}
