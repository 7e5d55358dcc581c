//! What is taken from the ELF file itself: sections, symbols, build id. Nothing of DWARF.

use std::ops::Range;

use guest::LinkAddr;
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, SectionFlags, SymbolIndex};

use crate::draft::DraftSymbol;
use crate::{BuildId, Error, SymbolKind};

pub(crate) type Elf<'d> = ElfFile64<'d, LittleEndian, &'d [u8]>;

pub(crate) fn parse<'d>(bytes: &'d [u8], what: &'static str) -> Result<Elf<'d>, Error> {
    ElfFile64::parse(bytes).map_err(|source| Error::Elf { what, source })
}

/// Data of a section as it lies in the file; empty when there is none of that name.
pub(super) fn data<'d>(elf: &Elf<'d>, name: &'static str) -> Result<&'d [u8], Error> {
    let Some(section) = elf.section_by_name(name) else { return Ok(&[]) };
    section.data().map_err(|source| Error::Elf { what: name, source })
}

/// Data and link address of a section that must be there.
pub(crate) fn needed<'d>(elf: &Elf<'d>, name: &'static str) -> Result<(&'d [u8], u64), Error> {
    let section = elf.section_by_name(name).ok_or(Error::MissingSection { section: name })?;
    let data = section.data().map_err(|source| Error::Elf { what: name, source })?;
    Ok((data, section.address()))
}

pub(super) fn is_code(flags: SectionFlags) -> bool {
    let SectionFlags::Elf { sh_flags, .. } = flags else { return false };
    sh_flags.contains(object::elf::SHF_EXECINSTR)
}

/// Address ranges of the sections with code.
pub(super) fn code_ranges(elf: &Elf<'_>) -> Vec<Range<u64>> {
    let sections = elf.sections().filter(|section| is_code(section.flags()));
    sections.map(|section| section.address()..section.address() + section.size()).collect()
}

/// The build id in the notes of the file.
pub(crate) fn build_id(elf: &Elf<'_>) -> Option<BuildId> {
    BuildId::new(elf.build_id().ok()??)
}

/// Symbols that mark a place for the linker script rather than name something.
fn is_mark(name: &str) -> bool {
    ["_start", "_end", "_begin", "_text", "_etext", "_sinittext", "_einittext"]
        .iter()
        .any(|mark| name.ends_with(mark))
}

/// Names that no diagnosis shows: padding before functions (`objtool --prefix`, since v6.2),
/// export tables, string literals.
fn is_noise(name: &str) -> bool {
    const PREFIXES: [&str; 12] = [
        "__pfx_",
        "__cfi_",
        "__ksymtab_",
        "__kstrtab",
        "__crc_",
        "__UNIQUE_ID_",
        "__func__.",
        "__already_done.",
        "__addressable_",
        "_entry_ptr.",
        "_entry.",
        ".L",
    ];
    name.is_empty() || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// How well a name stands for its address among others: sized, then global, then without underscores.
fn rank(name: &str, size: u64, global: bool) -> u8 {
    let plain = !name.starts_with('_');
    u8::from(size > 0) << 2 | u8::from(global) << 1 | u8::from(plain)
}

/// The symbols that have an address and are worth keeping. `place` gives a section's address at run time, `None`
/// when it is not loaded.
pub(super) fn symbols<'d>(
    elf: &Elf<'d>,
    place: impl Fn(object::SectionIndex) -> Option<u64>,
) -> Vec<DraftSymbol<'d>> {
    let mut code = Vec::new();
    for section in elf.sections() {
        let index = section.index().0;
        code.resize(code.len().max(index + 1), false);
        code[index] = is_code(section.flags());
    }
    let mut symbols = Vec::new();
    for symbol in elf.symbols() {
        let kind = match symbol.kind() {
            object::SymbolKind::Section | object::SymbolKind::File => continue,
            kind => kind,
        };
        let Ok(name) = symbol.name() else { continue };
        if symbol.index() == SymbolIndex(0) || is_noise(name) || symbol.is_undefined() {
            continue;
        }
        let section = symbol.section_index();
        let base = match section {
            Some(index) => place(index),
            None => Some(0),
        };
        let Some(base) = base else { continue };
        let in_code = section.is_some_and(|index| code.get(index.0) == Some(&true));
        // Entry code in assembly has symbols without a type (SYM_CODE_START, SYM_INNER_LABEL).
        let untyped = kind == object::SymbolKind::Unknown || kind == object::SymbolKind::Label;
        let function =
            kind == object::SymbolKind::Text && in_code || untyped && in_code && !is_mark(name);
        symbols.push(DraftSymbol {
            name,
            at: LinkAddr(base.wrapping_add(symbol.address())),
            size: symbol.size(),
            kind: if function { SymbolKind::Function } else { SymbolKind::Object },
            rank: rank(name, symbol.size(), symbol.is_global()),
        });
    }
    symbols
}
