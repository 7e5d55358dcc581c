//! Which pages a guest has written to, as KVM tells: the log of a memslot, and the ring of a vCPU. What the VMM or the
//! guard writes to guest memory by itself is in neither.
#![allow(unsafe_code, reason = "an ioctl that kvm-ioctls does not have")]

use std::sync::atomic::Ordering;

use guest::GuestPhys;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO,
    kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

use super::guest_ram::RamSlot;
use crate::Error;
use crate::mapping::Mapping;

const PAGE: u64 = 4096;
/// An entry that KVM has filled in (include/uapi/linux/kvm.h).
const DIRTY: u32 = 1;
/// An entry that was read and may be used again.
const RESET: u32 = 2;
/// A page holds this many entries: the least a ring may have.
const ENTRY: usize = size_of::<kvm_dirty_gfn>();

/// `KVM_RESET_DIRTY_RINGS` is `_IO(KVMIO, 0xc7)` (include/uapi/linux/kvm.h).
const RESET_DIRTY_RINGS: u32 = 0xc7;

/// Pages of one memslot that were written to.
#[derive(Clone, Debug)]
pub struct DirtyPages {
    start: GuestPhys,
    /// A bit for each page.
    bitmap: Vec<u64>,
}

impl DirtyPages {
    /// The pages that were written to since this was last asked for. Their logging must be on
    /// ([`super::GuestRam::log_dirty`]). Costs a walk over the slot's bitmap and makes KVM protect those pages again.
    ///
    /// # Errors
    /// KVM refuses: logging is off, or the ring is used instead.
    pub fn take(vm: &VmFd, slot: &RamSlot) -> Result<Self, Error> {
        let size = usize::try_from(slot.range.end - slot.range.start).unwrap_or(usize::MAX);
        let bitmap =
            vm.get_dirty_log(slot.number, size).map_err(Error::kvm("KVM_GET_DIRTY_LOG"))?;
        Ok(Self { start: slot.range.start, bitmap })
    }

    /// The pages, ascending, each by its first byte.
    pub fn iter(&self) -> impl Iterator<Item = GuestPhys> + '_ {
        let words = self.bitmap.iter().enumerate();
        words.flat_map(move |(index, word)| {
            let bits = (0..64u64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| self.start + (index as u64 * 64 + bit) * PAGE)
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// The ring of one vCPU, into which KVM puts each page that the vCPU writes to for the first time.
///
/// When it is nearly full, `KVM_RUN` comes back with `KVM_EXIT_DIRTY_RING_FULL` until it was collected and
/// [`reset`] called.
pub struct DirtyRing {
    ring: Mapping,
    entries: u32,
    /// The next entry to be read; wraps.
    next: u32,
}

impl DirtyRing {
    /// Gives each vCPU that is made from now on a ring of that many entries. To be called before the first one.
    ///
    /// # Errors
    /// A number that is not possible, vCPUs exist already, or a KVM without rings.
    pub fn enable(vm: &VmFd, entries: u32) -> Result<(), Error> {
        // On x86 both are the same but for the promise in the name; the first is there since v5.11, the second v6.1.
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        let cap = caps.into_iter().map(|cap| (cap, vm.check_extension_raw(cap.into())));
        let (cap, most) =
            cap.into_iter().find(|(_, most)| *most > 0).ok_or(Error::NoCapability {
                capability: "KVM_CAP_DIRTY_LOG_RING",
                used_for: "a dirty ring",
            })?;
        let most = u32::try_from(most).unwrap_or(0) / ENTRY as u32;
        let bytes = entries.saturating_mul(ENTRY as u32);
        if !entries.is_power_of_two() || u64::from(bytes) < PAGE || entries > most {
            return Err(Error::DirtyRingSize(entries, most));
        }
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        if let Some(argument) = enable.args.first_mut() {
            *argument = bytes.into();
        }
        vm.enable_cap(&enable).map_err(Error::kvm("KVM_ENABLE_CAP(KVM_CAP_DIRTY_LOG_RING)"))
    }

    /// The ring of a vCPU, of as many entries as were given to [`DirtyRing::enable`].
    ///
    /// # Errors
    /// The rings have another size, or there are none.
    pub fn of(vcpu: &VcpuFd, entries: u32) -> Result<Self, Error> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE;
        let len = (entries as usize).saturating_mul(ENTRY);
        Ok(Self {
            ring: Mapping::of(vcpu, offset, len).map_err(Error::os("mmap of a vCPU"))?,
            entries,
            next: 0,
        })
    }

    /// Takes out what is in the ring; at most its size. KVM goes on to note pages meanwhile, and those that were taken
    /// out are only noted again after [`reset`]. Pages of slots that are not in `slots` are left out.
    pub fn collect(&mut self, slots: &[RamSlot]) -> Vec<GuestPhys> {
        let mut pages = Vec::new();
        for _ in 0..self.entries {
            let Some((slot, offset)) = self.take_next() else { break };
            // The upper half is the address space's number (0 but for SMM).
            let slot = slots.iter().find(|known| known.number == slot & 0xffff);
            let at = slot.and_then(|slot| slot.range.start.checked_add(offset.checked_mul(PAGE)?));
            pages.extend(at);
        }
        pages
    }

    fn take_next(&mut self) -> Option<(u32, u64)> {
        let at = (self.next % self.entries) as usize * ENTRY;
        let flags = self.ring.u32(at + std::mem::offset_of!(kvm_dirty_gfn, flags))?;
        // KVM writes the entry, then this flag (virt/kvm/dirty_ring.c, kvm_dirty_gfn_set_dirtied).
        if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        let slot = self.ring.u32(at + std::mem::offset_of!(kvm_dirty_gfn, slot))?;
        let offset = self.ring.u64(at + std::mem::offset_of!(kvm_dirty_gfn, offset))?;
        let entry = (slot.load(Ordering::Relaxed), offset.load(Ordering::Relaxed));
        // KVM reads this flag, then uses the entry again (kvm_dirty_gfn_harvested).
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(entry)
    }
}

/// Tells KVM that the entries that were collected may be used again, and has it note those pages anew. Returns how many
/// entries that were, of all vCPUs.
///
/// # Errors
/// The VM has no rings.
pub fn reset(vm: &VmFd) -> Result<u32, Error> {
    let request = ioctl_expr(_IOC_NONE, KVMIO, RESET_DIRTY_RINGS, 0);
    // SAFETY: the descriptor is a VM's, and the ioctl takes no argument.
    let count = unsafe { ioctl(vm, request) };
    u32::try_from(count).map_err(|_| Error::kvm("KVM_RESET_DIRTY_RINGS")(kvm_ioctls::Error::last()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_pages() {
        let pages = DirtyPages { start: GuestPhys(0x10_0000), bitmap: vec![0b101, 1 << 63] };
        let at: Vec<u64> = pages.iter().map(|page| page.0).collect();
        assert_eq!(at, [0x10_0000, 0x10_2000, 0x10_0000 + 127 * PAGE]);
        assert_eq!(pages.count(), 3);
    }
}
