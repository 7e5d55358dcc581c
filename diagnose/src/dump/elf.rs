//! ELF cores of a whole machine: header and program headers, as written by a kdump kernel
//! (fs/proc/vmcore.c), QEMU's dump-guest-memory, makedumpfile -E and defib itself. Gives segments and
//! the places of notes; what notes say is in `notes.rs`.

use goblin::container::{Container, Ctx, Endian};
use goblin::elf::header::{EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_CORE, Header};
use goblin::elf::program_header::{PT_LOAD, PT_NOTE, ProgramHeader};
use goblin::elf64::header::SIZEOF_EHDR;
use goblin::elf64::program_header::SIZEOF_PHDR;
use guest::GuestPhys;

use super::segments::Segment;
use super::storage::Storage;
use super::{Error, Remark};

/// `\x7fELF`
pub(super) const MAGIC: &[u8; 4] = goblin::elf::header::ELFMAG;
/// `PN_XNUM`: the number of program headers is `sh_info` of section header 0 (System V gABI;
/// `write_elf64_header()` in QEMU's dump/dump.c). goblin's own reader of whole files does not know that.
const EXTENDED: u16 = 0xffff;
/// Offset of `sh_info` in `Elf64_Shdr`.
const SECTION_INFO: u64 = 44;
/// More segments than a QEMU dump with `paging` of a guest with 16 GiB mapped in single pages.
const MAX_SEGMENTS: u64 = 1 << 22;

/// What the headers say.
pub(super) struct Headers {
    /// The PT_LOADs.
    pub segments: Vec<Segment>,
    /// Offset and size in the file of each PT_NOTE.
    pub notes: Vec<(u64, u64)>,
}

/// Reads the headers. QEMU 7.2 writes 8 as `e_ehsize`, so that member is not used.
pub(super) fn headers<B: AsRef<[u8]>>(
    storage: &Storage<B>,
    remarks: &mut Vec<Remark>,
) -> Result<Headers, Error> {
    let bytes: [u8; SIZEOF_EHDR] =
        storage.array(0).ok_or(Error::Truncated { what: "ELF header", at: 0 })?;
    let (class, data) = (bytes[EI_CLASS], bytes[EI_DATA]);
    let header = goblin::elf::Elf::parse_header(&bytes).ok();
    let kind = header.map_or(0, |header| header.e_type);
    let is_core = class == ELFCLASS64 && data == ELFDATA2LSB && kind == ET_CORE;
    let header = header.filter(|_| is_core).ok_or(Error::NotACore { class, data, kind })?;
    let machine = header.e_machine;
    if machine != EM_X86_64 {
        return Err(Error::OtherArchitecture { found: format!("ELF machine {machine}") });
    }
    if usize::from(header.e_phentsize) != SIZEOF_PHDR {
        let found = header.e_phentsize.into();
        return Err(Error::BadHeader { what: "e_phentsize", found });
    }
    let claimed = count(storage, &header)?;
    let there = storage.len().saturating_sub(header.e_phoff) / SIZEOF_PHDR as u64;
    if claimed > there {
        remarks.push(Remark::Cut { what: "program headers" });
    }
    Ok(read(storage, header.e_phoff, claimed.min(there)))
}

/// Number of program headers.
fn count<B: AsRef<[u8]>>(storage: &Storage<B>, header: &Header) -> Result<u64, Error> {
    let sections = header.e_shoff;
    if header.e_phnum != EXTENDED || sections == 0 {
        return Ok(header.e_phnum.into());
    }
    let count = sections
        .checked_add(SECTION_INFO)
        .and_then(|at| storage.array(at))
        .map(|bytes| u64::from(u32::from_le_bytes(bytes)))
        .ok_or(Error::Truncated { what: "section header 0", at: sections })?;
    if count > MAX_SEGMENTS {
        let limit = MAX_SEGMENTS;
        return Err(Error::TooMany { what: "program headers", found: count, limit });
    }
    Ok(count)
}

fn read<B: AsRef<[u8]>>(storage: &Storage<B>, table: u64, count: u64) -> Headers {
    let mut out = Headers { segments: Vec::new(), notes: Vec::new() };
    let context = Ctx::new(Container::Big, Endian::Little);
    for index in 0..count {
        let bytes = index
            .checked_mul(SIZEOF_PHDR as u64)
            .and_then(|offset| table.checked_add(offset))
            .and_then(|at| storage.array::<SIZEOF_PHDR>(at));
        let Some(bytes) = bytes else { break };
        let Ok(parsed) = ProgramHeader::parse(&bytes, 0, 1, context) else { break };
        for header in parsed {
            match header.p_type {
                PT_NOTE => out.notes.push((header.p_offset, header.p_filesz)),
                PT_LOAD => out.segments.push(Segment {
                    at: GuestPhys(header.p_paddr),
                    captured: header.p_filesz,
                    size: header.p_memsz,
                    offset: header.p_offset,
                }),
                _ => {}
            }
        }
    }
    out
}
