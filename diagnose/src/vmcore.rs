//! An ELF vmcore as a machine without abilities: memory from its PT_LOAD segments, registers from its
//! notes. Reads what QEMU's dump-guest-memory and kdump write; other formats are not known here.

use std::ops::Range;

use goblin::elf::Elf;
use goblin::elf::program_header::PT_LOAD;
use guest::{GuestPhys, Machine, MachineError, MemoryError, PhysMemory, Reg, Registers, Vcpu};
use thiserror::Error;

/// Size of `struct elf_prstatus` on x86-64 and where its registers start (Linux uapi, stable ABI).
const PRSTATUS_REGISTERS: usize = 112;
/// Order of `struct user_regs_struct` (Linux uapi `asm/user_64.h`).
const USER_REGISTERS: [Option<Reg>; 27] = [
    Some(Reg::R15),
    Some(Reg::R14),
    Some(Reg::R13),
    Some(Reg::R12),
    Some(Reg::Rbp),
    Some(Reg::Rbx),
    Some(Reg::R11),
    Some(Reg::R10),
    Some(Reg::R9),
    Some(Reg::R8),
    Some(Reg::Rax),
    Some(Reg::Rcx),
    Some(Reg::Rdx),
    Some(Reg::Rsi),
    Some(Reg::Rdi),
    None,
    Some(Reg::Rip),
    Some(Reg::Cs),
    Some(Reg::Rflags),
    Some(Reg::Rsp),
    Some(Reg::Ss),
    Some(Reg::FsBase),
    Some(Reg::GsBase),
    None,
    None,
    None,
    None,
];
/// Order of the 64-bit registers in QEMU's own note (`QEMUCPUState` in QEMU's target/i386/arch_dump.c),
/// after version and size (4 bytes each).
const QEMU_GENERAL: [Reg; 18] = [
    Reg::Rax,
    Reg::Rbx,
    Reg::Rcx,
    Reg::Rdx,
    Reg::Rsi,
    Reg::Rdi,
    Reg::Rsp,
    Reg::Rbp,
    Reg::R8,
    Reg::R9,
    Reg::R10,
    Reg::R11,
    Reg::R12,
    Reg::R13,
    Reg::R14,
    Reg::R15,
    Reg::Rip,
    Reg::Rflags,
];
/// A QEMU segment record: selector, limit, flags, padding (4 bytes each), base (8 bytes).
const QEMU_SEGMENT: usize = 24;
/// Segments in QEMU's note: cs ds es fs gs ss ldt tr gdt idt.
const QEMU_SEGMENTS: usize = 10;

/// Why a file is no usable vmcore.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmcoreError {
    /// Not an ELF file that can be read.
    #[error("not a readable ELF file: {0}")]
    Elf(#[from] goblin::error::Error),
    /// An ELF file of another kind.
    #[error("an ELF file, but no 64-bit little-endian core file")]
    NotACore,
    /// More segments than an ELF header's 16 bits can count; such files are not read yet.
    #[error("more than 65,534 segments: not supported")]
    TooManySegments,
    /// No memory in it.
    #[error("the core holds no memory")]
    NoMemory,
}

/// A vmcore: `bytes` is the whole file, most often a mapping of it.
pub struct Vmcore<B> {
    memory: CoreMemory<B>,
    vcpus: Vec<Registers>,
}

struct CoreMemory<B> {
    bytes: B,
    /// Guest-physical start, size in the file, offset in the file; ascending.
    segments: Vec<(GuestPhys, u64, u64)>,
}

impl<B: AsRef<[u8]>> Vmcore<B> {
    /// Reads headers and notes.
    ///
    /// # Errors
    /// When the file is no ELF core of an x86-64 machine, or holds no memory.
    pub fn parse(bytes: B) -> Result<Self, VmcoreError> {
        let file = bytes.as_ref();
        let elf = Elf::parse(file)?;
        if !elf.is_64 || !elf.little_endian || elf.header.e_type != goblin::elf::header::ET_CORE {
            return Err(VmcoreError::NotACore);
        }
        if elf.header.e_phnum == u16::MAX {
            return Err(VmcoreError::TooManySegments);
        }
        let mut segments: Vec<_> = elf
            .program_headers
            .iter()
            .filter(|header| header.p_type == PT_LOAD && header.p_filesz > 0)
            .filter(|header| header.p_paddr.checked_add(header.p_filesz).is_some())
            .filter_map(|header| {
                // A truncated file holds less than its headers say; a lying one may say 2^60 bytes.
                let size = header.p_filesz.min((file.len() as u64).checked_sub(header.p_offset)?);
                (size > 0).then_some((GuestPhys(header.p_paddr), size, header.p_offset))
            })
            .collect();
        segments.sort_unstable();
        if segments.is_empty() {
            return Err(VmcoreError::NoMemory);
        }
        let vcpus = registers_of_notes(&elf, file);
        Ok(Self { memory: CoreMemory { bytes, segments }, vcpus })
    }
}

/// One entry per NT_PRSTATUS note, completed by QEMU's own note of the same index.
fn registers_of_notes(elf: &Elf<'_>, file: &[u8]) -> Vec<Registers> {
    let mut vcpus = Vec::new();
    let mut qemu = Vec::new();
    for note in elf.iter_note_headers(file).into_iter().flatten().map_while(Result::ok) {
        match note.name {
            "CORE" if note.n_type == goblin::elf::note::NT_PRSTATUS => {
                vcpus.push(prstatus(note.desc));
            }
            "QEMU" => qemu.push(qemu_state(note.desc)),
            _ => {}
        }
    }
    for (vcpu, state) in vcpus.iter_mut().zip(&qemu) {
        vcpu.overlay(state);
    }
    vcpus
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn prstatus(desc: &[u8]) -> Registers {
    let mut registers = Registers::unknown();
    for (index, reg) in USER_REGISTERS.iter().enumerate() {
        if let (Some(reg), Some(value)) = (reg, word(desc, PRSTATUS_REGISTERS + 8 * index)) {
            registers.set(*reg, value);
        }
    }
    registers
}

fn qemu_state(desc: &[u8]) -> Registers {
    let mut registers = Registers::unknown();
    for (index, reg) in QEMU_GENERAL.iter().enumerate() {
        if let Some(value) = word(desc, 8 + 8 * index) {
            registers.set(*reg, value);
        }
    }
    let segments = 8 + 8 * QEMU_GENERAL.len();
    let base_of = |segment: usize| word(desc, segments + QEMU_SEGMENT * segment + 16);
    let control = segments + QEMU_SEGMENT * QEMU_SEGMENTS;
    let values = [
        (Reg::FsBase, base_of(3)),
        (Reg::GsBase, base_of(4)),
        (Reg::Cr0, word(desc, control)),
        (Reg::Cr2, word(desc, control + 16)),
        (Reg::Cr3, word(desc, control + 24)),
        (Reg::Cr4, word(desc, control + 32)),
        (Reg::KernelGsBase, word(desc, control + 40)),
    ];
    for (reg, value) in values {
        if let Some(value) = value {
            registers.set(reg, value);
        }
    }
    registers
}

impl<B: AsRef<[u8]>> CoreMemory<B> {
    fn segment_of(&self, at: GuestPhys) -> Option<(GuestPhys, u64, u64)> {
        let after = self.segments.partition_point(|segment| segment.0 <= at);
        let segment = *self.segments.get(after.checked_sub(1)?)?;
        (at - segment.0 < segment.1).then_some(segment)
    }
}

impl<B: AsRef<[u8]>> PhysMemory for CoreMemory<B> {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        let missing = MemoryError::NotRam { at, len: into.len() };
        let (start, size, offset) = self.segment_of(at).ok_or(missing)?;
        let within = at - start;
        if (into.len() as u64) > size - within {
            return Err(missing);
        }
        let from = offset.checked_add(within).and_then(|from| usize::try_from(from).ok());
        let source = from
            .and_then(|from| self.bytes.as_ref().get(from..from.checked_add(into.len())?))
            .ok_or(MemoryError::NotCaptured { at })?;
        into.copy_from_slice(source);
        Ok(())
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        self.segments.iter().map(|&(start, size, _)| start..start + size).collect()
    }

    fn slice(&self, range: Range<GuestPhys>) -> Option<&[u8]> {
        let (start, size, offset) = self.segment_of(range.start)?;
        let len = range.end.0.checked_sub(range.start.0)?;
        if len > size - (range.start - start) {
            return None;
        }
        let from = usize::try_from(offset.checked_add(range.start - start)?).ok()?;
        self.bytes.as_ref().get(from..from.checked_add(usize::try_from(len).ok()?)?)
    }
}

impl<B: AsRef<[u8]>> Machine for Vmcore<B> {
    fn phys(&self) -> &dyn PhysMemory {
        &self.memory
    }

    fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        self.vcpus.get(vcpu.0).copied().ok_or(MachineError::NoSuchVcpu(vcpu))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A core of two segments and one PRSTATUS note, laid out by hand.
    fn small_core() -> Vec<u8> {
        let mut file = vec![0; 0x1000];
        file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file[16..20].copy_from_slice(&[4, 0, 62, 0]);
        file[20] = 1;
        file[32] = 64;
        file[52] = 64;
        file[54] = 56;
        file[56] = 3;
        let header = |kind: u32, offset: u64, phys: u64, size: u64| {
            let mut bytes = vec![0; 56];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&offset.to_le_bytes());
            bytes[24..32].copy_from_slice(&phys.to_le_bytes());
            bytes[32..40].copy_from_slice(&size.to_le_bytes());
            bytes[48..56].copy_from_slice(&1u64.to_le_bytes());
            bytes
        };
        file[64..120].copy_from_slice(&header(4, 0x200, 0, 20 + 336));
        file[120..176].copy_from_slice(&header(1, 0x800, 0x1000, 0x100));
        file[176..232].copy_from_slice(&header(1, 0x900, 0x10_0000, 0x100));
        file[0x200..0x204].copy_from_slice(&5u32.to_le_bytes());
        file[0x204..0x208].copy_from_slice(&336u32.to_le_bytes());
        file[0x208..0x20c].copy_from_slice(&1u32.to_le_bytes());
        file[0x20c..0x211].copy_from_slice(b"CORE\0");
        let rip = 0x214 + 112 + 16 * 8;
        file[rip..rip + 8].copy_from_slice(&0xffff_ffff_8123_4567_u64.to_le_bytes());
        file[0x900] = 42;
        file
    }

    #[test]
    fn memory_and_registers_are_found() {
        let mut core = Vmcore::parse(small_core()).unwrap();
        let mut byte = [0];
        core.phys().read(GuestPhys(0x10_0000), &mut byte).unwrap();
        assert_eq!(byte, [42]);
        assert!(core.phys().read(GuestPhys(0x10_00ff), &mut [0; 2]).is_err());
        assert_eq!(core.vcpu_count(), 1);
        let registers = core.registers(Vcpu(0)).unwrap();
        assert_eq!(registers.get(Reg::Rip), Some(0xffff_ffff_8123_4567));
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(changes in proptest::collection::vec((0usize..0x400, any::<u8>()), 0..40),
                                     at: u64) {
            let mut file = small_core();
            for (offset, value) in changes {
                file[offset] = value;
            }
            if let Ok(core) = Vmcore::parse(file) {
                let _ = core.phys().read(GuestPhys(at), &mut [0; 64]);
                let _ = core.phys().ranges();
                let _ = core.phys().slice(GuestPhys(at)..GuestPhys(at.wrapping_add(64)));
            }
        }
    }
}
