//! A module's file with debug information -> knowledge at the addresses where the module lies in the guest.

use guest::GuestVirt;
use object::read::elf::ElfSection64;
use object::{Object, ObjectSection};

use super::elf;
use super::relocate;
use super::units::{self, Units};
use super::unwind::Tables;
use super::variables;
use crate::draft::Draft;
use crate::orc::OrcLayout;
use crate::{Error, Knowledge};

/// Compiles a module's `.ko` (unpacked, with or without DWARF). `sections` tells where the guest has its sections, by
/// name; knowledge is about those only. `layout` is the kernel's ORC layout ([`OrcLayout::of`] its types); `None`: by the
/// presence of `.orc_header`.
///
/// # Errors
/// [`Error::Elf`], [`Error::Dwarf`] or [`Error::Relocation`] when the file is damaged or no module.
pub fn module(
    ko: &[u8],
    sections: &[(String, GuestVirt)],
    layout: Option<OrcLayout>,
) -> Result<Knowledge, Error> {
    let elf = elf::parse(ko, "module")?;
    let places = relocate::places(&elf, sections);
    let range = |section: &ElfSection64<'_, '_, object::LittleEndian, &[u8]>| {
        let at = *places.get(&section.index())?;
        Some(at..at.checked_add(section.size())?)
    };
    let ranges: Vec<_> = elf.sections().filter_map(|section| range(&section)).collect();
    let code = elf.sections().filter(|section| elf::is_code(section.flags()));
    let text: Vec<_> = code.filter_map(|section| range(&section)).collect();

    let loaded = relocate::debug_sections(&elf, &places)?;
    let units = Units::new(relocate::dwarf(&loaded))?;
    let gathered = units::gather(&units, &text, &|_| true);

    let orc_ip = relocate::data(&elf, &places, ".orc_unwind_ip")?;
    let orc_section = elf.section_by_name(".orc_unwind_ip").map(|section| section.index());
    let header = elf.section_by_name(".orc_header").is_some();
    let tables = Tables {
        orc_ip: &orc_ip,
        orc_ip_at: orc_section.and_then(|index| places.get(&index).copied()).unwrap_or(0),
        orc: elf::data(&elf, ".orc_unwind")?,
        layout: layout.unwrap_or(OrcLayout::by_header(header)),
        debug_frame: &relocate::data(&elf, &places, ".debug_frame")?,
    };
    let (unwind, _) = tables.joined()?;
    Knowledge::of_draft(Draft {
        symbols: elf::symbols(&elf, |section| places.get(&section).copied()),
        unwind,
        lines: gathered.lines,
        scopes: gathered.scopes,
        functions: gathered.functions,
        files: gathered.files.iter().map(String::as_str).collect(),
        prototypes: gathered.prototypes.iter().map(|(name, own)| (*name, own)).collect(),
        variables: variables::gather(&units, &text, &ranges),
    })
}
