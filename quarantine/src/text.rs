//! Rung 4: put damaged text, read-only data and IDT gates back from the repair image, then let the fault
//! be retried where nothing wrong was executed before it, else leave the call or end the process as the
//! lower rungs do. How a retry is proven harmless is `text_retry.rs`'s.
//!
//! Bytes go to guest-physical memory, so that no page table has to be made writable. The kernel's other
//! mappings of the page (direct map, cpu_entry_area for the IDT) show the same page. No TLB entry changes,
//! for no mapping does. Instruction fetch sees the bytes: on KVM guest and host share coherent caches, and
//! entering the guest serialises the processor (Intel SDM 3A 9.1.3, 11.6); QEMU's TCG is told to drop
//! what it translated (`WriteMemory::write_code`).

use diagnose::Offender;
use guest::{GuestVirt, Registers};
use repair_image::{Damage, PageKind};

use crate::plan::{Situation, Steps};
use crate::{Action, Policy, Reason, error_return, process, text_retry};

/// Pieces of damage, and bytes of it, that are put back at most. More is no bit flip: something writes to
/// text that is not known here.
const PIECES_MAX: usize = 64;
const BYTES_MAX: usize = 4096;

/// How the guest goes on after the bytes were put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// The fault is retried: nothing is lost.
    Retry,
    /// The call that met the damage is left with an error.
    ErrorReturn,
    /// The process that met the damage ends.
    EndProcess,
}

impl Way {
    /// How the guest would go on; `None` when it can't.
    pub(crate) fn of(situation: &Situation<'_>, policy: &Policy) -> Option<Self> {
        rest(situation, policy).ok().map(|(way, _)| way)
    }
}

/// The steps of the repair.
pub(crate) fn steps(situation: &Situation<'_>, policy: &Policy) -> Result<Steps, Reason> {
    let damage = &situation.diagnosis.damage;
    let bytes: usize = damage.iter().map(|piece| piece.expected.len()).sum();
    if damage.is_empty() {
        return Err(Reason::NoDamage);
    }
    if damage.len() > PIECES_MAX || bytes > BYTES_MAX {
        return Err(Reason::TooMuchDamage { pieces: damage.len(), bytes });
    }
    for piece in damage {
        check(situation, piece)?;
    }
    let (_, rest) = rest(situation, policy)?;
    let mut steps = Steps { actions: damage.iter().map(restore).collect(), notes: Vec::new() };
    steps.actions.extend(rest.actions);
    steps.notes.extend(rest.notes);
    Ok(steps)
}

fn restore(piece: &Damage) -> Action {
    Action::Restore {
        name: piece.place(),
        at: piece.at,
        old: piece.found.clone(),
        new: piece.expected.clone(),
        code: piece.kind.is_text(),
        why: match piece.kind {
            PageKind::Text | PageKind::ModuleText => "text as it was in the healthy guest",
            PageKind::Idt => "the gate as it was in the healthy guest",
            PageKind::ReadOnlyData | PageKind::ModuleReadOnlyData => {
                "read-only data as it was in the healthy guest"
            }
        }
        .to_owned(),
    }
}

/// A piece is put back only if the bytes are the repair image's, and no other vCPU stands among them: it
/// may have fetched a part of the damaged instruction.
fn check(situation: &Situation<'_>, piece: &Damage) -> Result<(), Reason> {
    let mut pristine = vec![0; piece.expected.len()];
    let known = situation.image.pristine.run_at(piece.at).is_some();
    let view = situation.image.pristine.over(situation.memory);
    let read = guest::VirtMemory::read(&view, piece.at, &mut pristine);
    if !known || read.is_err() || pristine != piece.expected {
        return Err(Reason::Inconsistent {
            what: format!("{} is not what the repair image holds", piece.place()),
        });
    }
    let inside = |registers: &Registers| {
        let rip = registers.rip().unwrap_or(GuestVirt(0));
        piece.at < rip && rip < piece.range().end
    };
    let others = situation.vcpus.iter().enumerate();
    let mut others = others.filter(|(vcpu, _)| *vcpu != situation.diagnosis.vcpu.0);
    match others.find(|(_, registers)| inside(registers)) {
        Some((vcpu, _)) => {
            Err(Reason::Occupied { who: format!("vCPU {vcpu}"), function: piece.place() })
        }
        None => Ok(()),
    }
}

/// What follows the restoring.
fn rest(situation: &Situation<'_>, policy: &Policy) -> Result<(Way, Steps), Reason> {
    let why_not = match text_retry::steps(situation) {
        Ok(steps) => return Ok((Way::Retry, steps)),
        Err(reason) => reason,
    };
    let (way, steps) = match situation.diagnosis.offender {
        Some(Offender::Driver { .. }) => match error_return::steps(situation, policy) {
            Ok(steps) => (Way::ErrorReturn, Ok(steps)),
            Err(_) => (Way::EndProcess, process::steps(situation, policy)),
        },
        Some(Offender::Process { .. }) => (Way::EndProcess, process::steps(situation, policy)),
        _ => return Err(why_not),
    };
    let mut steps = steps?;
    steps.notes.insert(0, format!("not retried: {why_not}"));
    Ok((way, steps))
}
