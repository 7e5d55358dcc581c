//! Damage to what a running kernel never writes: text, read-only data, IDT. Whether there is any, and
//! whether it explains the crash. Comparing is repair-image's; putting it back is not for this crate.

use std::ops::Range;

use guest::{GuestVirt, PhysMemory};
use repair_image::{Comparison, Damage, PageKind, compare, compare_within};

use crate::code::instruction_of;
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::{CrashClass, Frame};

/// Frames from the fault outward whose functions are looked at.
const FRAMES_MAX: usize = 32;
/// Pieces of damage that are told of.
const TOLD_MAX: usize = 16;
/// Bytes of the IDT (Intel SDM 3A 6.14.1: 256 gates of 16 bytes).
const IDT: u64 = 4096;

/// Exceptions that a damaged gate of the IDT leads to (Intel SDM 3A 6.14.1, 6.15).
const OF_THE_IDT: [&str; 5] = [
    "exc_segment_not_present",
    "exc_general_protection",
    "exc_double_fault",
    "exc_stack_segment",
    "exc_invalid_tss",
];

/// Damage that was found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// All of it, by address.
    pub(crate) damage: Vec<Damage>,
    /// The class, if damage explains the crash.
    pub(crate) class: Option<CrashClass>,
}

/// Looks for damage: around the frames always, everywhere when nothing else explains the crash.
pub(crate) fn find(
    kernel: &Kernel<'_>,
    phys: &dyn PhysMemory,
    fault: &Fault,
    class: Option<&CrashClass>,
    evidence: &mut Vec<String>,
) -> Found {
    if kernel.image.pristine.runs().is_empty() || !fault.found {
        return Found::default();
    }
    let functions = functions(kernel, fault);
    let looked = if is_explained(fault, class) {
        let mut near = functions.clone();
        near.extend(kernel.image.address_of("idt_table").map(|idt| idt..idt + IDT));
        compare_within(kernel.image, phys, &near)
    } else {
        compare(kernel.image, phys)
    };
    let Comparison { damage, overwhelmed, patched, .. } = looked;
    if overwhelmed {
        evidence.push("text differs all over from what it was: no conclusion is drawn".to_owned());
        return Found::default();
    }
    if damage.is_empty() {
        return Found::default();
    }
    let class = explaining(kernel, fault, &functions, &damage);
    evidence.extend(damage.iter().take(TOLD_MAX).map(Damage::words));
    if damage.len() > TOLD_MAX {
        evidence.push(format!("and {} more places", damage.len() - TOLD_MAX));
    }
    if !patched.is_empty() {
        evidence.push(format!(
            "{} bytes of text differ where the kernel itself rewrites it: no damage",
            patched.len()
        ));
    }
    if class.is_none() {
        evidence.push("the damage was not met by the frames: it may not be the cause".to_owned());
    }
    Found { damage, class }
}

/// Whether the crash is of a kind that healthy text leads to: a driver's NULL pointer, a check that failed.
fn is_explained(fault: &Fault, class: Option<&CrashClass>) -> bool {
    let in_module = fault.frames.get(fault.at).is_some_and(|frame| frame.module.is_some());
    match class {
        Some(CrashClass::NullDereference | CrashClass::Divide) => in_module,
        Some(
            CrashClass::WildPointer
            | CrashClass::WriteProtection
            | CrashClass::BadCall
            | CrashClass::UserAccess
            | CrashClass::GeneralProtection
            | CrashClass::InvalidOpcode
            | CrashClass::DoubleFault
            | CrashClass::Other { .. },
        )
        | None => false,
        Some(_) => true,
    }
}

/// The functions that the frames are in, with their parts elsewhere (`.cold`).
fn functions(kernel: &Kernel<'_>, fault: &Fault) -> Vec<Range<GuestVirt>> {
    let frames = fault.frames.get(fault.at..).unwrap_or_default();
    frames.iter().take(FRAMES_MAX).flat_map(|frame| parts(kernel, frame)).collect()
}

fn parts(kernel: &Kernel<'_>, frame: &Frame) -> Vec<Range<GuestVirt>> {
    let at = frame.pc.lookup();
    let Some(location) = kernel.image.locate(at) else { return Vec::new() };
    let start = location.start(at);
    let name = location.symbol.name;
    let other = match name.strip_suffix(".cold") {
        Some(hot) => hot.to_owned(),
        None => format!("{name}.cold"),
    };
    let other = kernel.image.sibling(at, &other).map(|(start, size)| start..start + size);
    std::iter::once(start..start + location.symbol.size).chain(other).collect()
}

/// The class that the damage gives the crash.
fn explaining(
    kernel: &Kernel<'_>,
    fault: &Fault,
    functions: &[Range<GuestVirt>],
    damage: &[Damage],
) -> Option<CrashClass> {
    let meets = |piece: &Damage, range: &Range<GuestVirt>| {
        piece.at < range.end && range.start < piece.range().end
    };
    let text = damage.iter().filter(|piece| piece.kind.is_text());
    if text.into_iter().any(|piece| functions.iter().any(|range| meets(piece, range))) {
        return Some(CrashClass::TextCorruption);
    }
    let exception = fault.exception.as_deref().unwrap_or_default();
    if OF_THE_IDT.contains(&exception) && damage.iter().any(|piece| piece.kind == PageKind::Idt) {
        return Some(CrashClass::IdtCorruption);
    }
    let data = |piece: &&Damage| {
        matches!(piece.kind, PageKind::ReadOnlyData | PageKind::ModuleReadOnlyData)
    };
    let frame = fault.frames.get(fault.at)?;
    damage
        .iter()
        .filter(data)
        .any(|piece| was_used(kernel, frame, piece))
        .then_some(CrashClass::ReadOnlyDataCorruption)
}

/// Whether the faulting frame executes at, holds or accesses what a damaged word of read-only data says.
fn was_used(kernel: &Kernel<'_>, frame: &Frame, piece: &Damage) -> bool {
    let slot = piece.at.align_down(8);
    let Ok(word) = kernel.memory.read_u64(slot) else { return false };
    let holds = guest::Reg::GENERAL.iter().any(|&reg| frame.registers.get(reg) == Some(word));
    let accesses = instruction_of(kernel.memory, frame.pc).is_some_and(|instruction| {
        instruction.accesses().any(|(_, memory)| {
            let at = memory.address(&frame.registers, instruction.next());
            at.is_some_and(|at| piece.range().contains(&at) || at == slot)
        })
    });
    frame.pc.ip() == GuestVirt(word) || holds && word != 0 || accesses
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use repair_image::Pristine;

    use super::*;
    use crate::UnwindEnd;
    use crate::testing::{Guest, TEXT, fault, frame, saved};

    /// A guest whose function `bad` at TEXT + 0x100 and whose `other` were `nop`s, and what is found in it.
    fn look(names: &[&str], pokes: &[(u64, u8)], class: CrashClass) -> (Found, Vec<String>) {
        let mut guest =
            Guest::new().function("bad", TEXT + 0x100, 0x40).function("other", TEXT + 0x200, 0x40);
        guest.poke(TEXT, &[0x90; 0x400]);
        for (at, byte) in pokes {
            guest.poke(*at, &[*byte]);
        }
        let mut image = guest.image();
        let was = [0x90; 4096];
        image.pristine =
            Arc::new(Pristine::default().with(PageKind::Text, GuestVirt(TEXT), &was[..0x400]));
        let mut frames: Vec<Frame> = names.iter().map(|name| frame(name, None)).collect();
        frames[0] = saved(frames[0].clone());
        frames[0].pc = guest::CodeAddress::Exact(GuestVirt(TEXT + 0x110));
        let fault = fault(frames, 0, UnwindEnd::Outermost);
        let space = guest.machine.space();
        let kernel = Kernel::of_memory(&image, &space);
        let mut evidence = Vec::new();
        let found = find(&kernel, space.physical(), &fault, Some(&class), &mut evidence);
        (found, evidence)
    }

    #[test]
    fn a_flipped_bit_in_the_faulting_function_is_text_corruption() {
        let (found, evidence) = look(&["bad"], &[(TEXT + 0x110, 0x91)], CrashClass::InvalidOpcode);
        assert_eq!(found.class, Some(CrashClass::TextCorruption));
        assert_eq!(found.damage[0].place(), "bad+0x10");
        assert!(evidence[0].contains("91 instead of 90, 1 bit flipped"), "{evidence:?}");
    }

    #[test]
    fn damage_elsewhere_is_told_but_gives_no_class() {
        let (found, evidence) = look(&["bad"], &[(TEXT + 0x210, 0x91)], CrashClass::InvalidOpcode);
        assert_eq!((found.class, found.damage.len()), (None, 1));
        assert!(evidence.last().unwrap().contains("may not be the cause"));
        // A crash that explains itself is not a reason to read all text.
        let (found, _) = look(&["bad"], &[(TEXT + 0x210, 0x91)], CrashClass::Bug);
        assert!(found.damage.is_empty());
    }

    #[test]
    fn breakpoints_are_no_damage() {
        let (found, _) = look(&["bad"], &[(TEXT + 0x110, 0xcc)], CrashClass::InvalidOpcode);
        assert!(found.class.is_none() && found.damage.is_empty());
    }
}
