//! What a vCPU is before its first instruction: CPUID of the host's KVM with a topology of our own, and for
//! vCPU 0 the state that the PVH protocol asks for. The others wait in reset for the guest's INIT and SIPI.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_regs,
    kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::memory;
use crate::{Error, Result};

/// Most vCPUs that a VM can have: APIC ids of 8 bits, 255 is the broadcast.
pub const MAX_VCPUS: u8 = 254;

/// CPUID leaf 1, ECX: the guest sees that it has a hypervisor, and a timer that KVM leaves to us to tell of.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// CPUID leaf 1, EDX: more than one logical CPU in the package.
const EDX_HTT: u32 = 1 << 28;
/// CR0 with protection on and paging off; ET is fixed to 1.
const CR0_PROTECTED: u64 = 0x11;
/// RFLAGS has one bit that is always set.
const RFLAGS_FIXED: u64 = 2;

/// What KVM can show to a guest, once for all vCPUs.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    // Not in the supported set since it is the VMM that decides on the in-kernel APIC (KVM API, 4.46).
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
            entry.ecx |= ECX_TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// Sets the CPUID of vCPU `id` of `count`: one package, a core for each vCPU, no hyperthreads.
pub fn set_cpuid(vcpu: &VcpuFd, supported: &CpuId, id: u8, count: u8) -> Result<()> {
    let id_bits = u32::from(count).next_power_of_two().trailing_zeros();
    let (id, count) = (u32::from(id), u32::from(count));
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
                entry.ecx |= ECX_HYPERVISOR;
                entry.edx = entry.edx & !EDX_HTT | if count > 1 { EDX_HTT } else { 0 };
            }
            // Intel: cores in the package, CPUs that share the cache.
            4 => entry.eax = entry.eax & 0x3fff | (count - 1) << 26,
            // AMD: cores in the package and the width of their numbers; the core's own number.
            0x8000_0008 => entry.ecx = (count - 1) | id_bits << 12,
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    let level = |index, shift, cpus, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: cpus,
        ecx: index | kind << 8,
        edx: id,
        ..Default::default()
    };
    entries.extend([level(0, 0, 1, 1), level(1, id_bits, count, 2)]);
    let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Kvm {
        ioctl: "KVM_SET_CPUID2",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("KVM_SET_CPUID2"))
}

/// 32-bit protected mode without paging, flat segments, EBX = `hvm_start_info`
/// (Xen's docs/misc/pvh.pandoc, "x86/HVM direct boot ABI").
pub fn set_pvh_entry(vcpu: &VcpuFd, entry: u32) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let (code, data) = (flat(0x8, 0xb), flat(0x10, 0x3));
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, g: 0, db: 0, s: 0, ..flat(0x18, 0xb) };
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: u64::from(entry),
        rbx: memory::START_INFO.0,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))
}
