//! Registers of a stream's vCPUs, by the names that their section's description gives to the fields.

use guest::{Reg, Registers};

use super::description::{Span, State, number};
use crate::dump::CpuNote;
use crate::dump::storage::Storage;

/// Name of a vCPU's section, and of the field that makes it an x86 one (`vmstate_x86_cpu` in QEMU's
/// target/i386/machine.c).
pub(super) const SECTION: &str = "cpu";
const RIP: &str = "env.eip";
const GENERAL: &str = "env.regs";
const SEGMENTS: &str = "env.segs";
/// Fields that are a register each.
const FIELDS: [(&str, Reg); 12] = [
    (RIP, Reg::Rip),
    ("env.eflags", Reg::Rflags),
    ("env.cr[0]", Reg::Cr0),
    ("env.cr[2]", Reg::Cr2),
    ("env.cr[3]", Reg::Cr3),
    ("env.cr[4]", Reg::Cr4),
    ("env.efer", Reg::Efer),
    ("env.star", Reg::Star),
    ("env.lstar", Reg::Lstar),
    ("env.cstar", Reg::Cstar),
    ("env.fmask", Reg::Fmask),
    ("env.kernelgsbase", Reg::KernelGsBase),
];
/// Members of `SegmentCache`. Segments have their numbers in instructions (Intel SDM 2B 3.1.1.3, Sreg): ES, CS, SS, DS,
/// FS, GS.
const MEMBERS: [(&str, u64, &str, Reg); 7] = [
    (SEGMENTS, 1, "selector", Reg::Cs),
    (SEGMENTS, 2, "selector", Reg::Ss),
    (SEGMENTS, 4, "base", Reg::FsBase),
    (SEGMENTS, 5, "base", Reg::GsBase),
    ("env.tr", 0, "base", Reg::TrBase),
    ("env.gdt", 0, "base", Reg::GdtBase),
    ("env.idt", 0, "base", Reg::IdtBase),
];

/// Whether the section is that of an x86 vCPU.
pub(super) fn is_x86(section: &State<'_>) -> bool {
    section.element(RIP, 0).is_some()
}

/// The vCPU whose section's content begins at `at`.
pub(super) fn cpu<B: AsRef<[u8]>>(storage: &Storage<B>, section: &State<'_>, at: u64) -> CpuNote {
    let mut registers = Registers::unknown();
    let mut set = |reg: Reg, span: Option<Span>| {
        if let Some(value) = span.and_then(|span| number(storage, at, span)) {
            registers.set(reg, value);
        }
    };
    for (index, reg) in (0..).zip(Reg::GENERAL) {
        set(reg, section.element(GENERAL, index));
    }
    for (field, reg) in FIELDS {
        set(reg, section.element(field, 0));
    }
    for (field, index, member, reg) in MEMBERS {
        set(reg, section.member(field, index, member));
    }
    CpuNote { registers, pid: None }
}
