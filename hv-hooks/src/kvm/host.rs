//! What kind of KVM this host has: whether it runs a stock kernel's instructions on the processor.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest_ram::GuestRam;
use crate::Error;

/// What kind of KVM this host has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostKind {
    /// Guest code runs on the processor.
    Hardware {
        /// Width of guest-physical addresses that KVM offers.
        address_bits: u8,
    },
    /// KVM runs guest code in its emulator, about a thousand times slower, and does not know all instructions that a
    /// stock kernel uses. (`kvm_pvm` does so for guests that do not know of it.)
    Emulating {
        /// Width of guest-physical addresses that KVM offers.
        address_bits: u8,
    },
    /// There is no usable KVM.
    None {
        /// Why, and what to do.
        why: String,
    },
}

/// `popcnt eax, eax` (an instruction that KVM's emulator does not know), then `out 0xf4, al`.
const PROBE: [u8; 6] = [0xf3, 0x0f, 0xb8, 0xc0, 0xe6, 0xf4];
const PROBE_PORT: u16 = 0xf4;
const CODE: u64 = 0x4000;
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
const MEMORY: usize = 0x8000;
/// Present, writable (Intel SDM 3A 4.5).
const TABLE: u64 = 3;
/// The same, and a large page.
const LARGE_PAGE: u64 = 0x83;
/// Protected mode, paging and what 64-bit mode needs (Intel SDM 3A 2.5).
const CR0: u64 = 0x8000_0011;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 0x500;

impl HostKind {
    /// Looks, by running two instructions in a VM of its own: about a millisecond.
    #[must_use]
    pub fn detect() -> Self {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return Self::None { why: no_kvm(error) },
        };
        match probe(&kvm) {
            Ok(Some(true)) => Self::Hardware { address_bits: address_bits(&kvm) },
            Ok(Some(false)) => Self::Emulating { address_bits: address_bits(&kvm) },
            Ok(None) => Self::None { why: "KVM does not run a guest of two instructions".into() },
            Err(error) => Self::None { why: format!("no VM can be made: {error}") },
        }
    }

    /// Whether VMs can be run at all.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        !matches!(self, Self::None { .. })
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hardware { address_bits } => {
                write!(f, "KVM on the processor, {address_bits}-bit guest-physical addresses")
            }
            Self::Emulating { address_bits } => write!(
                f,
                "KVM that emulates guest code (no stock kernel), {address_bits}-bit guest-physical addresses"
            ),
            Self::None { why } => write!(f, "no KVM: {why}"),
        }
    }
}

/// What to do about a KVM that can't be opened.
fn no_kvm(error: kvm_ioctls::Error) -> String {
    let advice = match error.errno() {
        libc::ENOENT => {
            "load kvm_intel or kvm_amd, or enable nested virtualisation if this is a VM"
        }
        libc::EACCES | libc::EPERM => "add this user to the group that owns it (kvm, as a rule)",
        libc::ENODEV | libc::ENXIO => "the kvm module is there without one for this processor",
        libc::EBUSY => "another hypervisor uses the processor's virtualisation",
        _ => "see the kernel's log",
    };
    format!("/dev/kvm: {error}: {advice}")
}

fn address_bits(kvm: &Kvm) -> u8 {
    let leaves = kvm.get_supported_cpuid(super::MAX_CPUID_ENTRIES).ok();
    let leaf = leaves.as_ref().and_then(|leaves| {
        leaves.as_slice().iter().find(|leaf| leaf.function == super::ADDRESS_SIZES)
    });
    leaf.map_or(super::DEFAULT_BITS, |leaf| leaf.eax as u8)
}

/// Whether the processor ran the probe; `None` when something else happened.
fn probe(kvm: &Kvm) -> Result<Option<bool>, Error> {
    let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?);
    let no_memory = |_| Error::FreshUnavailable("the host gives no memory for a guest");
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(|_| Error::FreshUnavailable("the host gives no memory for a guest"))?;
    let [top, middle, bottom] = TABLES;
    for (at, entry) in [(top, middle | TABLE), (middle, bottom | TABLE), (bottom, LARGE_PAGE)] {
        memory.write_obj(entry, GuestAddress(at)).map_err(no_memory)?;
    }
    memory.write_slice(&PROBE, GuestAddress(CODE)).map_err(no_memory)?;
    let _ram = GuestRam::map(Arc::clone(&vm), memory, 0..1)?;
    run(&vm)
}

fn run(vm: &VmFd) -> Result<Option<bool>, Error> {
    let mut vcpu = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
    enter_long_mode(&vcpu)?;
    let regs = kvm_regs { rip: CODE, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))?;
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PROBE_PORT, _)) => Ok(Some(true)),
        Ok(VcpuExit::InternalError) => Ok(Some(false)),
        Ok(_) => Ok(None),
        Err(errno) => Err(Error::kvm("KVM_RUN")(errno)),
    }
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let [top, ..] = TABLES;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, top, CR4_PAE, EFER_LONG);
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    vcpu.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_cannot_be_opened_says_what_to_do() {
        let text = no_kvm(kvm_ioctls::Error::new(libc::EACCES));
        assert!(text.contains("/dev/kvm") && text.contains("group"), "{text}");
        assert!(no_kvm(kvm_ioctls::Error::new(libc::ENOENT)).contains("kvm_intel"));
    }
}
