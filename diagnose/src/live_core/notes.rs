//! The notes of the core file: registers of the vCPUs, VMCOREINFO, and what defib says of the file.

use guest::{Reg, Registers};

use crate::core_notes::{PRSTATUS, PRSTATUS_PID, PRSTATUS_REGISTERS, QEMU_GENERAL, USER_REGISTERS};

/// Name and type of the note in which the file describes itself, as JSON.
pub const NOTE_NAME: &str = "DEFIB";
/// See [`NOTE_NAME`].
pub const NOTE_TYPE: u32 = 0xdef1b;

/// Size of `struct elf_prstatus` on x86-64 (Linux uapi, stable ABI).
const PRSTATUS_SIZE: usize = 336;
const QEMU_VERSION: u32 = 1;
/// Size of `QEMUCPUState`: version and size, 18 registers, 10 segments of 24 bytes, cr0 to cr4, GS base of
/// user mode.
const QEMU_SIZE: u32 = 8 + 18 * 8 + 10 * 24 + 5 * 8 + 8;

/// Appends a note.
pub(super) fn push(notes: &mut Vec<u8>, name: &str, kind: u32, data: &[u8]) {
    let lengths = [name.len() as u32 + 1, data.len() as u32, kind];
    lengths.iter().for_each(|length| notes.extend(length.to_le_bytes()));
    notes.extend(name.as_bytes());
    notes.push(0);
    notes.resize(notes.len().next_multiple_of(4), 0);
    notes.extend(data);
    notes.resize(notes.len().next_multiple_of(4), 0);
}

/// `NT_PRSTATUS` of a vCPU; registers that are not known are 0. `pid` is the task's, or where QEMU's note of
/// the vCPU goes with it the CPU's number plus 1: QEMU's way, by which drgn finds the registers of a CPU.
pub(super) fn push_prstatus(notes: &mut Vec<u8>, registers: &Registers, pid: i32) {
    let mut data = vec![0; PRSTATUS_PID];
    data.extend(pid.to_le_bytes());
    data.resize(PRSTATUS_REGISTERS, 0);
    for reg in USER_REGISTERS {
        // orig_rax = -1: not in a system call.
        let value = reg.map_or(u64::MAX, |reg| registers.get(reg).unwrap_or(0));
        data.extend(value.to_le_bytes());
    }
    data.resize(PRSTATUS_SIZE, 0);
    push(notes, "CORE", PRSTATUS, &data);
}

/// QEMU's note of a vCPU: the only established one that has control registers. `false` when a register that
/// makes it useful is not known: it can't say so.
pub(super) fn push_qemu(notes: &mut Vec<u8>, registers: &Registers) -> bool {
    let needed = [Reg::Rip, Reg::Rsp, Reg::Cr3, Reg::Cr4, Reg::GsBase];
    if needed.iter().any(|&reg| registers.get(reg).is_none()) {
        return false;
    }
    let value = |reg| registers.get(reg).unwrap_or(0);
    let mut data = Vec::with_capacity(QEMU_SIZE as usize);
    data.extend(QEMU_VERSION.to_le_bytes());
    data.extend(QEMU_SIZE.to_le_bytes());
    QEMU_GENERAL.iter().for_each(|&reg| data.extend(value(reg).to_le_bytes()));
    let bases = [
        (value(Reg::Cs), 0),
        (0, 0),
        (0, 0),
        (0, value(Reg::FsBase)),
        (0, value(Reg::GsBase)),
        (value(Reg::Ss), 0),
        (0, 0),
        (0, value(Reg::TrBase)),
        (0, value(Reg::GdtBase)),
        (0, value(Reg::IdtBase)),
    ];
    for (selector, base) in bases {
        data.extend((selector as u32).to_le_bytes());
        data.extend([0; 12]);
        data.extend(base.to_le_bytes());
    }
    for word in [
        value(Reg::Cr0),
        0,
        value(Reg::Cr2),
        value(Reg::Cr3),
        value(Reg::Cr4),
        value(Reg::KernelGsBase),
    ] {
        data.extend(word.to_le_bytes());
    }
    push(notes, "QEMU", 0, &data);
    true
}
