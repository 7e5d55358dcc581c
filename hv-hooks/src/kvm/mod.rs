//! A VMM that owns its KVM file descriptors as a machine. The VMM keeps its VM, its vCPU threads and its event loop;
//! here: what it hands over, the machine, and the abilities that are calls into one part each.
//!
//! ```text
//! let (machine, ports) = kvm::attach(parts)?;      // before the vCPU threads start
//!
//! // each vCPU's thread, with one of the ports
//! port.enter();
//! while !ending {
//!     let outcome = vcpu.run();
//!     if let Some(event) = VcpuEvent::of(&outcome) {
//!         match port.take(&mut vcpu, event)? {
//!             Next::Run => continue,
//!             Next::Yours => { /* flags of your own, a reset, an exit */ }
//!         }
//!     }
//!     /* I/O and the rest, as ever */
//! }
//!
//! // the guard's thread has `machine`; devices have machine.reporter()
//! ```
//!
//! A guest that is guarded makes no exit more than one that is not.

use std::ops::Range;
use std::sync::Arc;

use guest::{
    Call, Control, FreshMemory, FreshRegion, GuestPhys, Hooks, Machine, MachineError, MemoryError,
    PhysMemory, Registers, Vcpu, WriteMemory,
};
use kvm_bindings::{KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vm_memory::GuestMemoryBackend;

mod control;
mod debug;
pub mod dirty;
mod event;
mod fresh;
mod guest_ram;
mod host;
mod kick;
mod port;
mod ram;
mod registers;
mod reporter;
mod shared;

pub use event::VcpuEvent;
pub use guest_ram::{GuestRam, RamSlot};
pub use host::HostKind;
pub use port::{Next, VcpuPort};
pub use reporter::Reporter;

use crate::Error;
use fresh::Fresh;
use kick::RunPage;
use ram::Ram;
use shared::Shared;

/// Width of guest-physical addresses where CPUID does not tell (Intel SDM 3A 4.1.4).
const DEFAULT_BITS: u8 = 36;
/// The leaf that tells.
const ADDRESS_SIZES: u32 = 0x8000_0008;
/// `KVM_MAX_CPUID_ENTRIES` (arch/x86/include/asm/kvm_host.h).
const MAX_CPUID_ENTRIES: usize = 256;

/// What a VMM hands over, before its vCPU threads start.
pub struct Parts<'a, M> {
    /// The VM.
    pub vm: Arc<VmFd>,
    /// Its RAM, all of it that the guest's kernel may use. Memory that is plugged in later is not seen.
    pub memory: M,
    /// All vCPUs, in the order of their ports. They are only looked at here, and their CPUID is set already.
    pub vcpus: &'a [VcpuFd],
    /// Interrupts `KVM_RUN`; best one of the real-time signals. The VMM may use it for its own purposes too, and a
    /// handler that it has installed stays. vCPU threads must not block it.
    pub signal: libc::c_int,
    /// Memslot numbers that the VMM leaves to us; two are enough.
    pub slots: Range<u32>,
    /// Guest-physical windows that are never to be used for fresh memory: devices, PCI, room for memory hot-plug.
    pub reserved: Vec<Range<GuestPhys>>,
}

/// Makes a machine of a VMM's parts, and a port for each of its vCPUs. The guest runs, without hooks.
///
/// # Errors
/// No vCPU, no memslot, a KVM without what hooks need, a signal that can't have a handler.
pub fn attach<M: GuestMemoryBackend>(
    parts: Parts<'_, M>,
) -> Result<(KvmMachine<M>, Vec<VcpuPort>), Error> {
    let Parts { vm, memory, vcpus, signal, slots, reserved } = parts;
    let first = vcpus.first().ok_or(Error::Parts("a VM without vCPUs can't be guarded"))?;
    if slots.is_empty() {
        return Err(Error::Parts("no memslot is left to the guard"));
    }
    let needed = [
        (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG", "hooking"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "stopping vCPUs"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "fresh memory"),
    ];
    for (cap, capability, used_for) in needed {
        if !vm.check_extension(cap) {
            return Err(Error::NoCapability { capability, used_for });
        }
    }
    kick::install_handler(signal)?;
    let run_pages = vcpus.iter().map(RunPage::of).collect::<Result<Vec<_>, _>>()?;
    let shared = Arc::new(Shared::new(run_pages, signal));
    // The flags that KVM_SET_GUEST_DEBUG takes; 0 before v5.13.
    let flags = vm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
    let block_interrupts = flags > 0 && flags & KVM_GUESTDBG_BLOCKIRQ as i32 != 0;
    let port = |index| VcpuPort::new(Arc::clone(&shared), Vcpu(index), block_interrupts);
    let ports = (0..vcpus.len()).map(port).collect();
    let fresh = Fresh::new(vm, slots, reserved, address_bits(first));
    Ok((KvmMachine { shared, ram: Ram::new(memory), fresh, attached: true }, ports))
}

/// Width of guest-physical addresses (MAXPHYADDR) of a vCPU.
fn address_bits(vcpu: &VcpuFd) -> u8 {
    let leaf = vcpu.get_cpuid2(MAX_CPUID_ENTRIES).ok().and_then(|leaves| {
        leaves.as_slice().iter().find(|leaf| leaf.function == ADDRESS_SIZES).map(|leaf| leaf.eax)
    });
    leaf.map(|eax| eax as u8).filter(|bits| *bits > 0).unwrap_or(DEFAULT_BITS)
}

/// An error of this backend's machine.
fn of_kvm(error: Error) -> MachineError {
    error.of("kvm")
}

/// A VM of the process that this is part of. All methods are called from one thread, the guard's.
///
/// Detaches when it is dropped: hooks and fresh memory are removed, and the vCPUs run.
pub struct KvmMachine<M: GuestMemoryBackend> {
    shared: Arc<Shared>,
    ram: Ram<M>,
    fresh: Fresh,
    attached: bool,
}

impl<M: GuestMemoryBackend> KvmMachine<M> {
    /// What the VMM tells the guard by.
    #[must_use]
    pub fn reporter(&self) -> Reporter {
        Reporter::new(Arc::clone(&self.shared))
    }

    /// Takes hooks and fresh memory away and lets the vCPUs run. Ports stay usable; they leave all to the VMM.
    ///
    /// # Errors
    /// When something of ours could not be removed; the rest has been tried, and the vCPUs run in any case. A VM that
    /// has ended is no error.
    pub fn detach(mut self) -> Result<(), Error> {
        self.leave()
    }

    fn leave(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.attached) {
            return Ok(());
        }
        // A vCPU that does not come now takes its hooks off by itself when it does.
        let stopped = self.halt();
        let disarmed = self.take_hooks_off();
        let removed = self.ram.remove_all();
        self.shared.abandon();
        match stopped.and(disarmed).and(removed) {
            Err(Error::Ended) => Ok(()),
            other => other,
        }
    }
}

impl<M: GuestMemoryBackend> Drop for KvmMachine<M> {
    fn drop(&mut self) {
        // Any failure was the last try.
        let _ = self.leave();
    }
}

impl<M: GuestMemoryBackend + Send + Sync + 'static> Machine for KvmMachine<M> {
    fn phys(&self) -> &dyn PhysMemory {
        &self.ram
    }

    fn vcpu_count(&self) -> usize {
        self.shared.vcpu_count()
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        self.read_registers(vcpu).map_err(of_kvm)
    }

    fn control(&mut self) -> Option<&mut dyn Control> {
        Some(self)
    }

    fn writer(&mut self) -> Option<&mut dyn WriteMemory> {
        Some(self)
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }

    fn fresh_memory(&mut self) -> Option<&mut dyn FreshMemory> {
        Some(self)
    }

    fn second_view(&self) -> Option<Box<dyn PhysMemory + Send>> {
        Some(Box::new(self.ram.without_fresh()))
    }

    fn caller(&mut self) -> Option<&mut dyn Call> {
        Some(self)
    }
}

impl<M: GuestMemoryBackend> WriteMemory for KvmMachine<M> {
    fn write(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError> {
        self.ram.write(at, bytes)
    }

    /// The same as data: x86 keeps instruction fetches coherent, and KVM translates nothing.
    fn write_code(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.ram.write(at, bytes)?)
    }
}

impl<M: GuestMemoryBackend> FreshMemory for KvmMachine<M> {
    fn add(&mut self, size: u64) -> Result<FreshRegion, MachineError> {
        self.must_stand("adding fresh memory").map_err(of_kvm)?;
        self.fresh.add(&mut self.ram, size).map_err(of_kvm)
    }

    fn remove(&mut self, region: FreshRegion) -> Result<(), MachineError> {
        self.must_stand("removing fresh memory").map_err(of_kvm)?;
        self.ram.remove(region).map_err(of_kvm)
    }
}
