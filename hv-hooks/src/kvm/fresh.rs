//! Where fresh memory goes: a memslot of ours, at a guest-physical place that nobody uses.

use std::ops::Range;
use std::sync::Arc;

use guest::{FreshRegion, GuestPhys, PhysMemory};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::guest_ram::GuestRam;
use super::ram::Ram;
use crate::Error;

/// Below are windows of devices and firmware.
const FOUR_GIB: u64 = 1 << 32;
/// Alignment of a place: a large page.
const ALIGN: u64 = 2 << 20;
const PAGE: u64 = 4096;
/// Distance from a place that KVM refused to the next one; doubled each time.
const FIRST_LEAP: u64 = 1 << 30;
/// Places that are tried.
const MAX_TRIES: usize = 8;

/// What the VMM leaves to us.
pub(super) struct Fresh {
    vm: Arc<VmFd>,
    slots: Range<u32>,
    reserved: Vec<Range<GuestPhys>>,
    /// Width of guest-physical addresses (MAXPHYADDR).
    bits: u8,
}

impl Fresh {
    pub(super) fn new(
        vm: Arc<VmFd>,
        slots: Range<u32>,
        reserved: Vec<Range<GuestPhys>>,
        bits: u8,
    ) -> Self {
        Self { vm, slots, reserved, bits }
    }

    /// Adds a region of at least `size` bytes to the VM.
    pub(super) fn add<M: GuestMemoryBackend>(
        &self,
        ram: &mut Ram<M>,
        size: u64,
    ) -> Result<FreshRegion, Error> {
        let size = size.max(1).checked_next_multiple_of(PAGE);
        let bytes = size.and_then(|size| usize::try_from(size).ok());
        let (Some(size), Some(bytes)) = (size, bytes) else {
            return Err(Error::FreshUnavailable("the size asked for is not possible"));
        };
        let used: Vec<u32> = ram.fresh_slots().collect();
        let mut slots = self.slots.clone().filter(|slot| !used.contains(slot));
        let mut slot = slots
            .next()
            .ok_or(Error::FreshUnavailable("all memslots left to the guard are in use"))?;
        let mut occupied = ram.ranges();
        occupied.extend(self.reserved.iter().cloned());
        let mut refused = Vec::new();
        let mut from = GuestPhys(FOUR_GIB).max(ram.ranges().last().map_or(GuestPhys(0), |r| r.end));
        let mut leap = FIRST_LEAP;
        for _ in 0..MAX_TRIES {
            let Some(at) = free_place(&occupied, from, size, self.bits) else { break };
            let error = match self.map(slot, at, bytes) {
                Ok(given) => return Ok(ram.add(at, size, given)),
                Err(error) => error,
            };
            // Overlap is the place's fault; anything else is laid to the slot's number, as long as there are more.
            let overlaps =
                matches!(&error, Error::Memslot { errno, .. } if errno.errno() == libc::EEXIST);
            refused.push(error);
            if overlaps {
                from = at.wrapping_add(leap);
                leap = leap.saturating_mul(2);
            } else if let Some(next) = slots.next() {
                slot = next;
            } else {
                break;
            }
        }
        Err(Error::NoPlace { size, bits: self.bits, refused })
    }

    fn map(
        &self,
        slot: u32,
        at: GuestPhys,
        bytes: usize,
    ) -> Result<GuestRam<GuestMemoryMmap>, Error> {
        // Anonymous, and thus zeroed.
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(at.0), bytes)])
            .map_err(|_| Error::FreshUnavailable("the host gives no memory for a memslot"))?;
        GuestRam::map(Arc::clone(&self.vm), memory, slot..slot.saturating_add(1))
    }
}

/// The lowest aligned place from `from` on where `size` bytes meet nothing occupied and stay within `bits` bits.
fn free_place(
    occupied: &[Range<GuestPhys>],
    from: GuestPhys,
    size: u64,
    bits: u8,
) -> Option<GuestPhys> {
    let limit = 1u64.checked_shl(bits.into()).unwrap_or(u64::MAX);
    let mut at = from.0.checked_next_multiple_of(ALIGN)?;
    // Each round leaves at least one occupied range behind.
    for _ in 0..=occupied.len() {
        let end = at.checked_add(size).filter(|end| *end <= limit)?;
        let meets = |range: &&Range<GuestPhys>| range.start.0 < end && range.end.0 > at;
        match occupied.iter().find(meets) {
            Some(range) => at = range.end.0.checked_next_multiple_of(ALIGN)?,
            None => return Some(GuestPhys(at)),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_avoid_what_is_occupied() {
        let range = |start, end| GuestPhys(start)..GuestPhys(end);
        let from = GuestPhys(FOUR_GIB);
        assert_eq!(free_place(&[], from, PAGE, 36), Some(from));
        let window = range(FOUR_GIB + ALIGN, FOUR_GIB + ALIGN + PAGE);
        let occupied = [range(0, FOUR_GIB + PAGE), window];
        assert_eq!(free_place(&occupied, from, PAGE, 36), Some(GuestPhys(FOUR_GIB + 2 * ALIGN)));
        assert_eq!(
            free_place(&occupied, GuestPhys(FOUR_GIB + PAGE), ALIGN, 36).map(|at| at.0 % ALIGN),
            Some(0)
        );
    }

    #[test]
    fn places_stay_within_the_address_width() {
        let from = GuestPhys(FOUR_GIB);
        assert_eq!(free_place(&[], from, PAGE, 32), None);
        assert_eq!(free_place(&[], from, FOUR_GIB, 33), Some(from));
        assert_eq!(free_place(&[], from, FOUR_GIB + 1, 33), None);
        assert_eq!(free_place(&[], GuestPhys(u64::MAX - 5), PAGE, 52), None);
    }
}
