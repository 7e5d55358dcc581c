//! Memory that is in memslots of a VM: put there, logged, taken out again. The one place that hands host memory to
//! KVM.
#![allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION gives host memory to the guest")]

use std::ops::Range;
use std::sync::Arc;

use guest::GuestPhys;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::Error;

/// A memslot and the range it covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamSlot {
    /// Its number.
    pub number: u32,
    /// Guest-physical range.
    pub range: Range<GuestPhys>,
}

/// Guest memory and the memslots it is in. The slots are removed when this is dropped, so that KVM never has memory
/// that is gone.
pub struct GuestRam<M: GuestMemoryBackend> {
    vm: Arc<VmFd>,
    slots: Vec<(RamSlot, kvm_userspace_memory_region)>,
    /// Behind a pointer of its own: it must not move while KVM has it.
    memory: Arc<M>,
}

impl<M: GuestMemoryBackend> GuestRam<M> {
    /// Puts each region of `memory` in a memslot of its own, with the numbers from `slots` in order.
    ///
    /// # Errors
    /// There are more regions than slots, or KVM refuses one; then none is left in the VM.
    pub fn map(vm: Arc<VmFd>, memory: M, slots: Range<u32>) -> Result<Self, Error> {
        let regions = memory.num_regions();
        if regions > slots.len() {
            return Err(Error::TooFewSlots { regions, slots: slots.len() });
        }
        let memory = Arc::new(memory);
        let mut ram = Self { vm, slots: Vec::new(), memory: Arc::clone(&memory) };
        for (number, region) in slots.zip(memory.iter()) {
            let host = region
                .as_volatile_slice()
                .map_err(|_| Error::Parts("a region of RAM has no host memory"))?;
            let slot = kvm_userspace_memory_region {
                slot: number,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host.ptr_guard_mut().as_ptr().addr() as u64,
            };
            set(&ram.vm, slot)?;
            let start = GuestPhys(slot.guest_phys_addr);
            let range = start..start + slot.memory_size;
            ram.slots.push((RamSlot { number, range }, slot));
        }
        Ok(ram)
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// The memslots, in the order of the regions.
    #[must_use]
    pub fn slots(&self) -> Vec<RamSlot> {
        self.slots.iter().map(|(slot, _)| slot.clone()).collect()
    }

    /// Has KVM keep a log of the pages that the guest writes to, or stops that.
    ///
    /// # Errors
    /// KVM refuses it for a slot; those before it are changed.
    pub fn log_dirty(&mut self, on: bool) -> Result<(), Error> {
        for (_, slot) in &mut self.slots {
            let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let changed = kvm_userspace_memory_region { flags, ..*slot };
            set(&self.vm, changed)?;
            *slot = changed;
        }
        Ok(())
    }

    /// Takes the slots out of the VM.
    ///
    /// # Errors
    /// KVM refuses it for a slot; the memory is then kept for as long as the process lives.
    pub fn unmap(mut self) -> Result<(), Error> {
        self.clear()
    }

    fn clear(&mut self) -> Result<(), Error> {
        let mut done = Ok(());
        for (_, slot) in self.slots.drain(..) {
            let gone = kvm_userspace_memory_region { memory_size: 0, flags: 0, ..slot };
            done = done.and(set(&self.vm, gone));
        }
        if done.is_err() {
            // KVM may still have it: one owner too many keeps it for ever.
            std::mem::forget(Arc::clone(&self.memory));
        }
        done
    }
}

impl<M: GuestMemoryBackend> Drop for GuestRam<M> {
    fn drop(&mut self) {
        // On failure the memory is kept; there is nobody to tell.
        let _ = self.clear();
    }
}

/// Makes, changes or (with size 0) removes a slot. A slot of somebody else's is never changed by making one: KVM refuses
/// a slot that exists at another host address (virt/kvm/kvm_main.c, `kvm_set_memory_region`), and ours is new.
fn set(vm: &VmFd, slot: kvm_userspace_memory_region) -> Result<(), Error> {
    // SAFETY: the host range is all of a region that its memory's own safe accessor gave out. `GuestRam` keeps that
    // memory, unmoved and untouched, until the slot is removed; guest memory is only accessed as volatile.
    let done = unsafe { vm.set_user_memory_region(slot) };
    done.map_err(|errno| Error::Memslot {
        slot: slot.slot,
        at: GuestPhys(slot.guest_phys_addr),
        size: slot.memory_size,
        errno,
    })
}
