//! With which preempt count a network driver's transmit function was called, found out from its device. Which
//! callers this is for is in `callbacks.rs`.

use diagnose::{Boundary, Frame};
use guest::{GuestVirt, Reg};
use repair_image::base_name;

use crate::guest_struct::Structures;
use crate::plan::Situation;

/// `SOFTIRQ_DISABLE_OFFSET`, include/linux/preempt.h: bottom halves are off.
const BOTTOM_HALVES: i64 = 0x200;
/// Words of the caller's frame that are looked at, at most: real frames have some twenty.
const WORDS_MAX: u64 = 64;

/// The count with which the driver was called; `None` when its device is not found or does not say.
///
/// `HARD_TX_LOCK()` (include/linux/netdevice.h) takes the queue's lock unless the device does its own locking.
pub(crate) fn preempt_count(situation: &Situation<'_>, boundary: &Boundary) -> Option<i64> {
    let frames = &situation.diagnosis.frames;
    let (caller, entry) = (frames.get(boundary.frame)?, frames.get(boundary.entry)?);
    let structures = Structures { image: situation.image, memory: situation.memory };
    let mut answers = candidates(&structures, caller)
        .filter(|&at| sends_by(&structures, at, entry))
        .map(|at| locks_itself(&structures, at));
    let own = answers.next()??;
    // A word left over from another call may name another device of the same driver.
    answers.all(|other| other == Some(own)).then_some(BOTTOM_HALVES + i64::from(!own))
}

/// What the caller has in its registers and its frame, where it may keep the device.
fn candidates<'a>(
    structures: &'a Structures<'_>,
    caller: &'a Frame,
) -> impl Iterator<Item = GuestVirt> + 'a {
    let registers = Reg::CALLEE_SAVED.into_iter().filter_map(|reg| caller.registers.get(reg));
    let start = caller.registers.rsp();
    let words = start.zip(caller.cfa).map_or(0, |(start, end)| end.0.saturating_sub(start.0) / 8);
    let slots = (0..words.min(WORDS_MAX))
        .filter_map(move |index| structures.memory.read_u64(start?.checked_add(index * 8)?).ok());
    registers.chain(slots).map(GuestVirt).filter(|at| at.is_kernel_half() && at.0 % 8 == 0)
}

/// Whether this is a device that sends by the function that was entered.
fn sends_by(structures: &Structures<'_>, device: GuestVirt, entry: &Frame) -> bool {
    let pointer = |at: GuestVirt, structure: &str, path: &str| {
        structures.number(at, structure, path).ok().flatten().map(GuestVirt)
    };
    let send = pointer(device, "net_device", "netdev_ops")
        .filter(|ops| ops.is_kernel_half())
        .and_then(|ops| pointer(ops, "net_device_ops", "ndo_start_xmit"));
    let location = send.and_then(|send| Some((send, structures.image.locate(send)?)));
    location.is_some_and(|(send, location)| {
        location.start(send) == send
            && location.module.map(|module| module.name.as_str()) == entry.module.as_deref()
            // The fault may be in the function's cold part, which is elsewhere.
            && Some(base_name(location.symbol.name)) == entry.function.as_deref().map(base_name)
    })
}

/// Whether the device does its own locking: `net_device.lltx` since commit 00d066a4d4ed ("netdev_features:
/// convert NETIF_F_LLTX to dev->lltx", v6.12), before that a bit of its features.
fn locks_itself(structures: &Structures<'_>, device: GuestVirt) -> Option<bool> {
    let number = |path: &str| structures.number(device, "net_device", path).ok().flatten();
    if let Some(lockless) = number("lltx") {
        return Some(lockless != 0);
    }
    let bit = structures.image.types.enumerator("NETIF_F_LLTX_BIT")?;
    let bit = u32::try_from(bit).ok().filter(|&bit| bit < u64::BITS)?;
    Some(number("features")? >> bit & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    fn count(scene: &Scene, diagnosis: &diagnose::Diagnosis) -> Option<i64> {
        let space = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        preempt_count(&situation, diagnosis.boundary.as_ref()?)
    }

    #[test]
    fn the_device_tells_whether_a_lock_is_held() {
        for (features, expected) in [(0, 0x201), (1, 0x200)] {
            let mut scene = Scene::new();
            let mut diagnosis = scene.diagnosis();
            scene.sends_packets(&mut diagnosis, features);
            assert_eq!(count(&scene, &diagnosis), Some(expected));
        }
    }

    #[test]
    fn a_device_in_the_callers_frame_counts_too() {
        let mut scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        let device = scene.sends_packets(&mut diagnosis, 1);
        let frame = diagnosis.boundary.as_ref().unwrap().frame;
        diagnosis.frames[frame].registers.set(Reg::Rbx, 0x10);
        assert_eq!(count(&scene, &diagnosis), None);
        let rsp = diagnosis.frames[frame].registers.rsp().unwrap();
        diagnosis.frames[frame].cfa = Some(rsp + 32);
        scene.poke_word(rsp + 24, device.0);
        assert_eq!(count(&scene, &diagnosis), Some(0x200));
    }

    #[test]
    fn another_drivers_device_says_nothing() {
        let mut scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        scene.sends_packets(&mut diagnosis, 0);
        let entry = diagnosis.boundary.as_ref().unwrap().entry;
        diagnosis.frames[entry].function = Some("toy_read".to_owned());
        assert_eq!(count(&scene, &diagnosis), None);
    }
}
