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
    let (way, rest) = rest(situation, policy)?;
    let mut actions: Vec<_> = damage.iter().map(restore).collect();
    actions.extend(rest.actions);
    Ok(Steps { actions, notes: rest.notes, way: Some(way) })
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use diagnose::{CrashClass, Diagnosis, Trust};
    use guest::{CodeAddress, Reg, VirtMemory};
    use proptest::prelude::*;
    use repair_image::Pristine;

    use super::*;
    use crate::testing::{MODULE_TEXT, Scene};

    /// `mov rbp, rsp` in `toy_write`, after a nop and a `push rbp`; three bytes.
    const FAULT: u64 = 6;

    /// The toy driver with its text kept, and a fault at `mov rbp, rsp`.
    fn scene() -> (Scene, Diagnosis) {
        let mut scene = Scene::new();
        let mut page = [0; 4096];
        scene.machine.space().read(MODULE_TEXT, &mut page).unwrap();
        let kept = Pristine::default().with(PageKind::ModuleText, MODULE_TEXT, &page);
        scene.image.pristine = Arc::new(kept);
        let mut diagnosis = scene.diagnosis();
        diagnosis.class = Some(CrashClass::TextCorruption);
        let frame = &mut diagnosis.frames[1];
        frame.pc = CodeAddress::Exact(MODULE_TEXT + FAULT);
        frame.trust = Trust::SavedRegisters;
        for (index, reg) in Reg::GENERAL.into_iter().enumerate() {
            if reg != Reg::Rsp {
                frame.registers.set(reg, 0x900 + index as u64);
            }
        }
        frame.registers.set(Reg::Rip, (MODULE_TEXT + FAULT).0);
        frame.registers.set(Reg::Rflags, 0x1_0246);
        (scene, diagnosis)
    }

    /// Damages bytes of the driver's text, in memory and in the diagnosis.
    fn damage(scene: &mut Scene, diagnosis: &mut Diagnosis, offset: u64, found: &[u8]) {
        let at = MODULE_TEXT + offset;
        let mut expected = vec![0; found.len()];
        scene.machine.space().read(at, &mut expected).unwrap();
        scene.machine.poke_virt(at, found);
        let symbol = scene.image.locate(at).map(|location| location.symbol.name.to_owned());
        diagnosis.damage.push(Damage {
            at,
            kind: PageKind::ModuleText,
            module: Some("toy".to_owned()),
            symbol,
            offset: offset % 0x40,
            found: found.to_vec(),
            expected,
        });
    }

    fn plan(scene: &Scene, diagnosis: &Diagnosis, vcpus: &[Registers]) -> Result<Steps, Reason> {
        let memory = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &memory, vcpus };
        steps(&situation, &Policy::default())
    }

    #[test]
    fn the_damaged_instruction_is_put_back_and_retried() {
        let (mut scene, mut diagnosis) = scene();
        damage(&mut scene, &mut diagnosis, FAULT, &[0x0f, 0x0b]);
        let planned = plan(&scene, &diagnosis, &[]).unwrap();
        let [Action::Restore { at, old, new, code, .. }, Action::SetRegisters { registers, .. }] =
            planned.actions.as_slice()
        else {
            panic!("{:?}", planned.actions)
        };
        assert_eq!((*at, *code), (MODULE_TEXT + FAULT, true));
        assert_eq!((&old[..], &new[..]), (&[0x0f, 0x0b][..], &[0x48, 0x89][..]));
        assert_eq!(registers.rip(), Some(MODULE_TEXT + FAULT));
        // The resume flag is the exception's, not the code's.
        assert_eq!(registers.get(Reg::Rflags), Some(0x246));
        assert_eq!(registers.get(Reg::Rbx), diagnosis.frames[1].registers.get(Reg::Rbx));
    }

    #[test]
    fn an_earlier_instruction_was_executed_so_the_call_fails_instead() {
        let (mut scene, mut diagnosis) = scene();
        damage(&mut scene, &mut diagnosis, 5, &[0x54]);
        let planned = plan(&scene, &diagnosis, &[]).unwrap();
        assert!(matches!(planned.actions[0], Action::Restore { .. }));
        assert!(planned.actions.len() > 1 && planned.notes[0].starts_with("not retried: "));
        assert!(planned.notes[0].contains("not the one that faulted"), "{}", planned.notes[0]);
        // Together with the faulting one it is no better.
        damage(&mut scene, &mut diagnosis, FAULT, &[0x0f]);
        let planned = plan(&scene, &diagnosis, &[]).unwrap();
        assert!(planned.notes[0].contains("may have been executed"), "{}", planned.notes[0]);
        let restored = |action: &&Action| matches!(action, Action::Restore { .. });
        assert_eq!(planned.actions.iter().filter(restored).count(), 2);
    }

    #[test]
    fn damage_in_functions_that_no_frame_is_in_is_put_back_too() {
        let (mut scene, mut diagnosis) = scene();
        damage(&mut scene, &mut diagnosis, FAULT, &[0x0f]);
        damage(&mut scene, &mut diagnosis, 0x45, &[0x54]);
        let planned = plan(&scene, &diagnosis, &[]).unwrap();
        assert_eq!(planned.actions.len(), 3);
        assert!(planned.notes.iter().any(|note| note.contains("no frame is in")));
    }

    #[test]
    fn what_is_not_the_repair_images_is_refused() {
        let (mut scene, mut diagnosis) = scene();
        assert!(matches!(plan(&scene, &diagnosis, &[]), Err(Reason::NoDamage)));
        damage(&mut scene, &mut diagnosis, FAULT, &[0x0f]);
        let mut lying = diagnosis.clone();
        lying.damage[0].expected = vec![0x90];
        assert!(matches!(plan(&scene, &lying, &[]), Err(Reason::Inconsistent { .. })));
        let mut unknown = diagnosis.clone();
        unknown.damage[0].at = MODULE_TEXT + 0x1000;
        assert!(matches!(plan(&scene, &unknown, &[]), Err(Reason::Inconsistent { .. })));
        let mut many = diagnosis.clone();
        many.damage = vec![diagnosis.damage[0].clone(); PIECES_MAX + 1];
        assert!(matches!(plan(&scene, &many, &[]), Err(Reason::TooMuchDamage { pieces: 65, .. })));
    }

    #[test]
    fn another_vcpu_amid_the_bytes_is_in_the_way() {
        let (mut scene, mut diagnosis) = scene();
        damage(&mut scene, &mut diagnosis, FAULT, &[0x0f, 0x0b]);
        let at = |offset: u64| Registers::unknown().with(Reg::Rip, (MODULE_TEXT + offset).0);
        // At the first byte nothing of it was fetched; vCPU 0 is the one that crashed.
        for vcpus in [[at(0), at(FAULT)], [at(FAULT + 1), at(0)], [at(0), at(FAULT + 2)]] {
            assert!(plan(&scene, &diagnosis, &vcpus).is_ok());
        }
        let amid = plan(&scene, &diagnosis, &[at(0), at(FAULT + 1)]);
        assert!(matches!(amid, Err(Reason::Occupied { who, .. }) if who == "vCPU 1"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn only_bytes_of_the_repair_image_are_ever_written(
            pieces in proptest::collection::vec(
                (0u64..0x2000, proptest::collection::vec(any::<u8>(), 1..8), any::<bool>()), 1..6),
        ) {
            let (mut scene, mut diagnosis) = scene();
            for (offset, found, honest) in pieces {
                if honest {
                    damage(&mut scene, &mut diagnosis, offset % 0xff0, &found);
                } else {
                    let at = MODULE_TEXT + offset;
                    let expected = found.clone();
                    diagnosis.damage.push(Damage {
                        at, kind: PageKind::Idt, module: None, symbol: None, offset, found, expected,
                    });
                }
            }
            let Ok(planned) = plan(&scene, &diagnosis, &[]) else { return Ok(()) };
            let kept = scene.image.pristine.runs()[0].bytes.clone();
            for action in &planned.actions {
                if let Action::Restore { at, new, .. } = action {
                    let start = (*at - MODULE_TEXT) as usize;
                    prop_assert_eq!(&new[..], &kept[start..start + new.len()]);
                }
            }
        }
    }
}
