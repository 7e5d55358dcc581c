//! What the crashed call has in hand: the words in its registers and on its stack. What they mean is for others.

use std::collections::HashSet;

use guest::{GuestVirt, Reg};

use crate::plan::Situation;

/// Words of the stack that are looked at at most: a whole stack has 2048.
const WORDS_MAX: u64 = 4096;

/// All words in registers and on the stack of the crashed call, up to the core kernel's function that is gone on in.
pub(crate) fn words(situation: &Situation<'_>) -> HashSet<u64> {
    let boundary = situation.diagnosis.boundary.as_ref();
    let frames = situation.diagnosis.frames.len();
    words_before(situation, boundary.map_or(frames, |boundary| boundary.frame + 1))
}

/// Those in the frames from the fault's to the one before that index.
fn words_before(situation: &Situation<'_>, index: usize) -> HashSet<u64> {
    let diagnosis = situation.diagnosis;
    let frames = diagnosis.frames.get(diagnosis.fault_frame..index).unwrap_or_default();
    let registers = frames
        .iter()
        .flat_map(|frame| Reg::GENERAL.into_iter().filter_map(|reg| frame.registers.get(reg)));
    let start = frames.first().and_then(|frame| frame.registers.rsp());
    let end = frames.iter().rev().find_map(|frame| frame.cfa);
    let words = start.zip(end).map_or(0, |(start, end)| end.0.saturating_sub(start.0) / 8);
    let stack = (0..words.min(WORDS_MAX))
        .filter_map(|index| situation.memory.read_u64(start?.checked_add(index * 8)?).ok());
    registers.chain(stack).collect()
}

/// Those of them that are addresses of the kernel's, each once, in order.
pub(crate) fn addresses(situation: &Situation<'_>) -> Vec<GuestVirt> {
    addresses_of(words(situation))
}

/// The same of the frames from the fault's to the one before that index.
pub(crate) fn addresses_before(situation: &Situation<'_>, index: usize) -> Vec<GuestVirt> {
    addresses_of(words_before(situation, index))
}

fn addresses_of(words: HashSet<u64>) -> Vec<GuestVirt> {
    let words = words.into_iter().map(GuestVirt);
    let mut addresses: Vec<_> = words.filter(|word| word.is_kernel_half()).collect();
    addresses.sort_unstable();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{STACK, Scene};

    fn found(scene: &Scene, diagnosis: &diagnose::Diagnosis) -> HashSet<u64> {
        let memory = scene.machine.space();
        words(&Situation { diagnosis, image: &scene.image, memory: &memory, vcpus: &[] })
    }

    #[test]
    fn only_the_crashed_call_counts() {
        let mut scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        let (below, within, beyond) = (-72, -8 * 3, 8);
        for (at, word) in [(below, 0x701), (within, 0x702), (beyond, 0x703)] {
            scene.poke_word(scene.boundary_rsp.offset(at), word);
        }
        diagnosis.frames[0].registers.set(Reg::Rbx, 0x704);
        diagnosis.frames[1].registers.set(Reg::Rbx, 0x705);
        let words = found(&scene, &diagnosis);
        let [below, within, beyond, hook, own] =
            [0x701, 0x702, 0x703, 0x704, 0x705].map(|word| words.contains(&word));
        assert_eq!((below, within, beyond, hook, own), (false, true, false, false, true));
    }

    #[test]
    fn a_stack_without_end_is_left_after_a_while() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        diagnosis.frames[1].registers.set(Reg::Rsp, STACK.0);
        diagnosis.frames[1].cfa = Some(GuestVirt(u64::MAX));
        assert!(found(&scene, &diagnosis).len() as u64 <= WORDS_MAX + 64);
    }
}
