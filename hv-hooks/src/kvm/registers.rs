//! Registers of a vCPU: between the ioctls that read and write them and [`guest::Registers`].

use guest::{Reg, Registers};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use crate::Error;

/// Model-specific registers that are told (Intel SDM 4, table 2-2).
const MSRS: [(Reg, u32); 5] = [
    (Reg::Star, 0xc000_0081),
    (Reg::Lstar, 0xc000_0082),
    (Reg::Cstar, 0xc000_0083),
    (Reg::Fmask, 0xc000_0084),
    (Reg::KernelGsBase, 0xc000_0102),
];

/// Every register that [`Reg`] has. A model-specific one that this KVM does not tell stays unknown.
pub(super) fn read(vcpu: &VcpuFd) -> Result<Registers, Error> {
    let mut all = Registers::unknown();
    let mut regs = general(vcpu)?;
    for reg in Reg::ALL {
        if let Some(value) = in_general(&mut regs, *reg) {
            all.set(*reg, *value);
        }
    }
    let mut sregs = special(vcpu)?;
    for reg in Reg::ALL {
        if let Some(value) = in_special(&mut sregs, *reg) {
            all.set(*reg, *value);
        }
    }
    all.set(Reg::Cs, u64::from(sregs.cs.selector));
    all.set(Reg::Ss, u64::from(sregs.ss.selector));
    for (reg, index) in MSRS {
        if let Some(value) = read_msr(vcpu, index)? {
            all.set(reg, value);
        }
    }
    Ok(all)
}

/// Sets the registers that are known. Those that have the value already are not touched: setting control registers
/// costs KVM its shadow of the page tables.
pub(super) fn write(vcpu: &VcpuFd, wanted: &Registers) -> Result<(), Error> {
    write_special(vcpu, wanted)?;
    for (reg, index) in MSRS {
        let Some(value) = wanted.get(reg) else { continue };
        if read_msr(vcpu, index)? != Some(value) {
            write_msr(vcpu, index, value)?;
        }
    }
    let before = general(vcpu)?;
    let mut after = before;
    for (reg, value) in wanted.iter() {
        if let Some(slot) = in_general(&mut after, reg) {
            *slot = value;
        }
    }
    if after != before {
        vcpu.set_regs(&after).map_err(Error::kvm("KVM_SET_REGS"))?;
    }
    if after.rip != before.rip { wake(vcpu) } else { Ok(()) }
}

/// A vCPU that sleeps in `hlt` would go on sleeping at its new place.
fn wake(vcpu: &VcpuFd) -> Result<(), Error> {
    let state = vcpu.get_mp_state().map_err(Error::kvm("KVM_GET_MP_STATE"))?;
    if state.mp_state != KVM_MP_STATE_HALTED {
        return Ok(());
    }
    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    vcpu.set_mp_state(runnable).map_err(Error::kvm("KVM_SET_MP_STATE"))
}

fn general(vcpu: &VcpuFd) -> Result<kvm_regs, Error> {
    vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))
}

fn special(vcpu: &VcpuFd) -> Result<kvm_sregs, Error> {
    vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))
}

/// Where `kvm_regs` has a register.
fn in_general(regs: &mut kvm_regs, reg: Reg) -> Option<&mut u64> {
    Some(match reg {
        Reg::Rax => &mut regs.rax,
        Reg::Rcx => &mut regs.rcx,
        Reg::Rdx => &mut regs.rdx,
        Reg::Rbx => &mut regs.rbx,
        Reg::Rsp => &mut regs.rsp,
        Reg::Rbp => &mut regs.rbp,
        Reg::Rsi => &mut regs.rsi,
        Reg::Rdi => &mut regs.rdi,
        Reg::R8 => &mut regs.r8,
        Reg::R9 => &mut regs.r9,
        Reg::R10 => &mut regs.r10,
        Reg::R11 => &mut regs.r11,
        Reg::R12 => &mut regs.r12,
        Reg::R13 => &mut regs.r13,
        Reg::R14 => &mut regs.r14,
        Reg::R15 => &mut regs.r15,
        Reg::Rip => &mut regs.rip,
        Reg::Rflags => &mut regs.rflags,
        _ => return None,
    })
}

/// Where `kvm_sregs` has a register of 64 bits.
fn in_special(sregs: &mut kvm_sregs, reg: Reg) -> Option<&mut u64> {
    Some(match reg {
        Reg::FsBase => &mut sregs.fs.base,
        Reg::GsBase => &mut sregs.gs.base,
        Reg::Cr0 => &mut sregs.cr0,
        Reg::Cr2 => &mut sregs.cr2,
        Reg::Cr3 => &mut sregs.cr3,
        Reg::Cr4 => &mut sregs.cr4,
        Reg::Efer => &mut sregs.efer,
        Reg::IdtBase => &mut sregs.idt.base,
        Reg::GdtBase => &mut sregs.gdt.base,
        Reg::TrBase => &mut sregs.tr.base,
        _ => return None,
    })
}

fn write_special(vcpu: &VcpuFd, wanted: &Registers) -> Result<(), Error> {
    let before = special(vcpu)?;
    let mut after = before;
    for (reg, value) in wanted.iter() {
        if let Some(slot) = in_special(&mut after, reg) {
            *slot = value;
        }
    }
    if let Some(selector) = wanted.get(Reg::Cs) {
        load_flat(&mut after.cs, selector, true);
    }
    if let Some(selector) = wanted.get(Reg::Ss) {
        load_flat(&mut after.ss, selector, false);
    }
    if after == before {
        return Ok(());
    }
    vcpu.set_sregs(&after).map_err(Error::kvm("KVM_SET_SREGS"))
}

/// Gives a code or stack segment another selector. Its descriptor becomes what every 64-bit kernel has for one of that
/// privilege: flat, the code 64-bit; the one it had belongs to the old selector.
fn load_flat(segment: &mut kvm_segment, selector: u64, code: bool) {
    // Selectors have 16 bits; the registers' other bits mean nothing.
    let selector = selector as u16;
    if segment.selector == selector {
        return;
    }
    *segment = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        // Execute and read, or read and write; accessed (Intel SDM 3A 3.4.5.1).
        type_: if code { 11 } else { 3 },
        present: 1,
        dpl: (selector & 3) as u8,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        // A stack segment may be null in 64-bit mode.
        unusable: u8::from(selector & !3 == 0),
        padding: 0,
    };
}

/// `None` when this KVM does not tell it.
fn read_msr(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, Error> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let Ok(mut list) = Msrs::from_entries(&[entry]) else { return Ok(None) };
    let read = vcpu.get_msrs(&mut list).map_err(Error::kvm("KVM_GET_MSRS"))?;
    Ok(list.as_slice().first().filter(|_| read == 1).map(|entry| entry.data))
}

fn write_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<(), Error> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let refused = || Error::kvm("KVM_SET_MSRS")(kvm_ioctls::Error::new(libc::EINVAL));
    let list = Msrs::from_entries(&[entry]).map_err(|_| refused())?;
    match vcpu.set_msrs(&list).map_err(Error::kvm("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(refused()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_is_somewhere() {
        let (mut regs, mut sregs) = (kvm_regs::default(), kvm_sregs::default());
        for reg in Reg::ALL {
            let places = usize::from(in_general(&mut regs, *reg).is_some())
                + usize::from(in_special(&mut sregs, *reg).is_some())
                + usize::from(MSRS.iter().any(|(other, _)| other == reg))
                + usize::from(matches!(reg, Reg::Cs | Reg::Ss));
            assert_eq!(places, 1, "{}", reg.name());
        }
    }

    #[test]
    fn a_segment_of_the_same_selector_is_left_alone() {
        let mut segment = kvm_segment { selector: 0x10, limit: 7, ..Default::default() };
        load_flat(&mut segment, 0x10, true);
        assert_eq!(segment.limit, 7);
        load_flat(&mut segment, 0x33, true);
        assert_eq!((segment.dpl, segment.l, segment.db, segment.unusable), (3, 1, 0, 0));
        load_flat(&mut segment, 0, false);
        assert_eq!((segment.dpl, segment.l, segment.unusable), (0, 0, 1));
    }
}
