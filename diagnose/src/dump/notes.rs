//! What the notes of a dump say: registers of each CPU, VMCOREINFO. The same in ELF dumps and in
//! kdump-compressed ones. Notes are matched by name and type.

use guest::{Reg, Registers};
use repair_image::Vmcoreinfo;

use crate::core_notes::{PRSTATUS, PRSTATUS_PID, PRSTATUS_REGISTERS, QEMU_GENERAL, USER_REGISTERS};
use crate::live_core::{NOTE_NAME, NOTE_TYPE};

/// More CPUs than `CONFIG_NR_CPUS` allows (8192).
pub(super) const MAX_CPUS: usize = 8192;
/// Name size, descriptor size, type.
const HEADER: usize = 12;
/// Index of `gs_base` in [`USER_REGISTERS`]: see [`prstatus`].
const USER_GS_BASE: usize = 22;
/// A QEMU segment record: selector, limit, flags, padding (4 bytes each), base (8 bytes).
const QEMU_SEGMENT: usize = 24;
/// Segments in QEMU's note, in their order.
const QEMU_SEGMENTS: [Option<Reg>; 10] = [
    None,              // cs
    None,              // ds
    None,              // es
    Some(Reg::FsBase), // fs
    Some(Reg::GsBase), // gs
    None,              // ss
    None,              // ldt
    Some(Reg::TrBase),
    Some(Reg::GdtBase),
    Some(Reg::IdtBase),
];

/// One CPU as its notes describe it.
#[derive(Clone, Copy, Debug)]
pub struct CpuNote {
    /// What is known of its registers. A kdump kernel's are those of the crash on the CPU that crashed,
    /// and of the stopping interrupt on the others; QEMU's are those of the time of the dump.
    pub registers: Registers,
    /// `pr_pid`: in a kdump kernel's note the process that ran there; QEMU puts the CPU's number plus
    /// one here, and this is `None`.
    pub pid: Option<u32>,
}

/// All that the notes say.
#[derive(Default)]
pub(super) struct Notes {
    pub cpus: Vec<CpuNote>,
    pub vmcoreinfo: Option<Vmcoreinfo>,
    /// Whether QEMU's own notes are among them.
    pub qemu: bool,
    /// Whether the file is a `live.core` of defib's own.
    pub live: bool,
    /// Whether a note runs behind the end.
    pub cut: bool,
}

/// A note: name without its NUL, type, descriptor.
struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    desc: &'a [u8],
}

/// Walks notes one by one, each with its parts padded to 4 bytes.
struct Walk<'a> {
    bytes: &'a [u8],
    cut: bool,
}

impl<'a> Iterator for Walk<'a> {
    type Item = Note<'a>;

    fn next(&mut self) -> Option<Note<'a>> {
        // Room left by CPUs that wrote no note: zeroes.
        while self.bytes.get(..4)? == [0; 4] && self.bytes.get(4..8)? == [0; 4] {
            self.bytes = self.bytes.get(4..)?;
        }
        let number = |at: usize| {
            let bytes = self.bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (name_size, desc_size) = (number(0)? as usize, number(4)? as usize);
        let kind = number(8)?;
        let rest = self.bytes.get(HEADER..)?;
        let Some(name) = rest.get(..name_size) else {
            self.cut = true;
            self.bytes = &[];
            return None;
        };
        let rest = rest.get(name_size.checked_next_multiple_of(4)?..).unwrap_or_default();
        // The last note of a cut file counts for what is there.
        self.cut |= rest.len() < desc_size;
        let desc = rest.get(..desc_size).unwrap_or(rest);
        let next = desc_size.checked_next_multiple_of(4).and_then(|padded| rest.get(padded..));
        self.bytes = next.unwrap_or_default();
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        Some(Note { name, kind, desc })
    }
}

impl Notes {
    /// Takes in the notes of one segment.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let mut states = Vec::new();
        let first = self.cpus.len();
        let mut walk = Walk { bytes, cut: false };
        for note in walk.by_ref() {
            match (note.name, note.kind) {
                (b"CORE", PRSTATUS) if self.cpus.len() < MAX_CPUS => {
                    self.cpus.push(prstatus(note.desc));
                }
                (b"QEMU", 0) if states.len() < MAX_CPUS => states.push(qemu_state(note.desc)),
                (b"VMCOREINFO", 0) if self.vmcoreinfo.is_none() => {
                    self.vmcoreinfo = Vmcoreinfo::parse(note.desc);
                }
                (name, NOTE_TYPE) if name == NOTE_NAME.as_bytes() => self.live = true,
                _ => {}
            }
        }
        self.cut |= walk.cut;
        self.qemu |= !states.is_empty();
        let cpus = self.cpus.iter_mut().skip(first);
        for (cpu, state) in cpus.zip(&states) {
            cpu.registers.overlay(state);
            cpu.pid = None;
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// A kernel writes `x86_gsbase_read_cpu_inactive()` as `gs_base` (`ELF_CORE_COPY_REGS` in
/// arch/x86/include/asm/elf.h, v6.1), which in kernel mode is user space's and belongs into the other
/// register.
fn prstatus(desc: &[u8]) -> CpuNote {
    let mut registers = Registers::unknown();
    for (index, reg) in USER_REGISTERS.iter().enumerate().take(USER_GS_BASE) {
        if let (Some(reg), Some(value)) = (reg, word(desc, PRSTATUS_REGISTERS + 8 * index)) {
            registers.set(*reg, value);
        }
    }
    let in_user_mode = registers.get(Reg::Cs).is_some_and(|cs| cs & 3 == 3);
    if let Some(value) = word(desc, PRSTATUS_REGISTERS + 8 * USER_GS_BASE) {
        registers.set(if in_user_mode { Reg::GsBase } else { Reg::KernelGsBase }, value);
    }
    let pid = desc.get(PRSTATUS_PID..PRSTATUS_PID + 4).and_then(|it| it.try_into().ok());
    CpuNote { registers, pid: pid.map(u32::from_le_bytes) }
}

fn qemu_state(desc: &[u8]) -> Registers {
    let mut registers = Registers::unknown();
    let mut set = |reg, at| {
        if let Some(value) = word(desc, at) {
            registers.set(reg, value);
        }
    };
    for (index, reg) in QEMU_GENERAL.iter().enumerate() {
        set(*reg, 8 + 8 * index);
    }
    let segments = 8 + 8 * QEMU_GENERAL.len();
    for (index, reg) in QEMU_SEGMENTS.iter().enumerate() {
        if let Some(reg) = reg {
            set(*reg, segments + QEMU_SEGMENT * index + 16);
        }
    }
    let control = segments + QEMU_SEGMENT * QEMU_SEGMENTS.len();
    // cr0 to cr4; cr1 is not used by any CPU.
    set(Reg::Cr0, control);
    set(Reg::Cr2, control + 16);
    set(Reg::Cr3, control + 24);
    set(Reg::Cr4, control + 32);
    // Newer than the rest: older notes end before it.
    set(Reg::KernelGsBase, control + 40);
    registers
}
