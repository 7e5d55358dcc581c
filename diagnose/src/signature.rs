//! Bucketing: a stable id of a crash and its title in the style of kernel developers. Neither holds an
//! address or an offset.

use xxhash_rust::xxh3::xxh3_64;

use crate::fault::Fault;
use crate::names::{display, function};
use crate::offender::segment;
use crate::{CrashClass, Frame, Offender};

/// Frames that go into a signature, from the fault outward.
const FRAMES: usize = 5;

/// The signature: the first 12 hex digits of XXH3-64 over the class and the functions of the innermost
/// frames from the fault outward, one a line, without compiler suffixes, inlined functions and addresses.
/// Repeated frames (recursion) count once.
pub(crate) fn id(class: Option<&CrashClass>, fault: &Fault) -> String {
    let mut text = class_name(class);
    let mut names: Vec<String> =
        fault.frames.get(segment(fault)).unwrap_or_default().iter().map(stable_name).collect();
    names.dedup();
    for name in names.iter().take(FRAMES) {
        text.push('\n');
        text.push_str(name);
    }
    let digest = format!("{:016x}", xxh3_64(text.as_bytes()));
    digest.chars().take(12).collect()
}

/// Like [`display`], but a frame in no function has no stable name.
fn stable_name(frame: &Frame) -> String {
    if function(frame).is_empty() { "?".to_owned() } else { display(frame) }
}

/// The class in one word, as in JSON.
fn class_name(class: Option<&CrashClass>) -> String {
    match class {
        None => "unknown".to_owned(),
        Some(CrashClass::Other { reporter }) => format!("other {reporter}"),
        // Variant names are part of the JSON contract, so their Debug form is as stable as that.
        Some(class) => format!("{class:?}"),
    }
}

/// The title.
pub(crate) fn title(
    class: Option<&CrashClass>,
    fault: &Fault,
    offender: Option<&Offender>,
    message: Option<&str>,
) -> String {
    let place = place(fault, offender);
    let said = message.map(|text| text.trim_end_matches('!'));
    match class {
        None => format!("kernel crash in {place}"),
        Some(CrashClass::Bug) => match said {
            Some(text) => format!("{text} in {place}"),
            None => format!("kernel BUG in {place}"),
        },
        Some(CrashClass::Panic) => match said {
            Some(text) => format!("kernel panic: {text}"),
            None => format!("kernel panic in {place}"),
        },
        Some(class) => format!("{} in {place}", phrase(class)),
    }
}

fn phrase(class: &CrashClass) -> &str {
    match class {
        CrashClass::NullDereference => "BUG: unable to handle kernel NULL pointer dereference",
        CrashClass::WildPointer => "BUG: unable to handle kernel paging request",
        CrashClass::WriteProtection => "BUG: write to read-only memory",
        CrashClass::BadCall => "BUG: unable to execute bad function pointer",
        CrashClass::UserAccess => "BUG: unintended access to user memory",
        CrashClass::GeneralProtection => "general protection fault",
        CrashClass::Bug => "kernel BUG",
        CrashClass::Divide => "divide error",
        CrashClass::InvalidOpcode => "invalid opcode",
        CrashClass::TextCorruption => "BUG: corrupted text",
        CrashClass::ReadOnlyDataCorruption => "BUG: corrupted read-only data",
        CrashClass::IdtCorruption => "BUG: corrupted IDT",
        CrashClass::ListCorruption => "BUG: corrupted list",
        CrashClass::Usercopy => "BUG: bad usercopy",
        CrashClass::Fortify => "detected buffer overflow",
        CrashClass::DoubleFree => "BUG: double free",
        CrashClass::SlabCorruption => "BUG: corrupted slab free list",
        CrashClass::StackProtector => "stack-protector: kernel stack is corrupted",
        CrashClass::Warning => "WARNING",
        CrashClass::StackOverflow => "BUG: stack guard page was hit",
        CrashClass::DoubleFault => "double fault",
        CrashClass::Panic => "kernel panic",
        CrashClass::SoftLockup => "BUG: soft lockup",
        CrashClass::HardLockup => "hard lockup",
        CrashClass::HungTask => "INFO: task hung",
        CrashClass::RcuStall => "INFO: rcu detected stall",
        CrashClass::EndlessLoop => "endless loop",
        CrashClass::EndlessLoopIrqsOff => "endless loop with interrupts off",
        CrashClass::SpinlockSelfDeadlock => "spinlock taken twice",
        CrashClass::SpinlockCycle => "spinlocks taken in opposite orders",
        CrashClass::LockSelfDeadlock => "lock taken twice by one task",
        CrashClass::LockCycle => "locks taken in opposite orders",
        CrashClass::EndlessSleep => "endless sleep",
        CrashClass::FaultLoop => "page fault loop",
        CrashClass::Other { reporter } => reporter,
    }
}

/// The function that people look for: the offender's, else the faulting one.
fn place(fault: &Fault, offender: Option<&Offender>) -> String {
    match offender {
        Some(Offender::Driver { module, function, .. }) => format!("{function} [{module}]"),
        Some(Offender::Process { function, .. } | Offender::Kernel { function, .. }) => {
            function.clone()
        }
        None => fault.frames.get(fault.at).map(stable_name).unwrap_or_else(|| "?".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UnwindEnd;
    use crate::testing::{fault, frame};

    fn of(names: &[&str], class: CrashClass) -> String {
        let frames = names.iter().map(|name| frame(name, None)).collect();
        id(Some(&class), &fault(frames, 0, UnwindEnd::UserMode))
    }

    #[test]
    fn compiler_suffixes_recursion_and_distant_callers_do_not_matter() {
        let one = of(&["a", "b", "b", "c", "d", "e", "x"], CrashClass::Bug);
        let other = of(&["a.isra.0", "b.cold", "c", "d", "e", "y"], CrashClass::Bug);
        assert_eq!(one, other);
        assert_eq!(one.len(), 12);
        assert_ne!(one, of(&["a", "b", "b", "c", "d", "e"], CrashClass::Divide));
        assert_ne!(one, of(&["a", "b", "c", "d", "f"], CrashClass::Bug));
    }

    #[test]
    fn signatures_do_not_change_between_releases() {
        assert_eq!(of(&["bw", "vfs_write"], CrashClass::NullDereference), "05b6a7075f46");
    }

    #[test]
    fn titles() {
        let fault = fault(vec![frame("bw.cold", None)], 0, UnwindEnd::UserMode);
        let of = |class, message| title(Some(&class), &fault, None, message);
        assert_eq!(of(CrashClass::Divide, None), "divide error in bw");
        assert_eq!(
            of(CrashClass::Bug, Some("kernel BUG at mm/slub.c:435!")),
            "kernel BUG at mm/slub.c:435 in bw"
        );
        assert_eq!(of(CrashClass::Panic, Some("VFS: no root")), "kernel panic: VFS: no root");
        assert_eq!(
            of(CrashClass::NullDereference, None),
            "BUG: unable to handle kernel NULL pointer dereference in bw"
        );
    }
}
