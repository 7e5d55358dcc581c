//! A module's file with debug information -> knowledge at the addresses where the module lies in the guest.

use std::collections::HashMap;

use gimli::{Dwarf, EndianSlice, LittleEndian, SectionId};
use guest::GuestVirt;
use object::read::elf::ElfSection64;
use object::{Object, ObjectSection};

use super::elf;
use super::relocate::{self, Places};
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
    let placed: HashMap<&str, u64> =
        sections.iter().map(|(name, at)| (name.as_str(), at.0)).collect();
    let places: Places = elf
        .sections()
        .filter_map(|section| Some((section.index(), *placed.get(section.name().ok()?)?)))
        .collect();
    let range = |section: &ElfSection64<'_, '_, object::LittleEndian, &[u8]>| {
        let at = *places.get(&section.index())?;
        Some(at..at.checked_add(section.size())?)
    };
    let ranges: Vec<_> = elf.sections().filter_map(|section| range(&section)).collect();
    let code = elf.sections().filter(|section| elf::is_code(section.flags()));
    let text: Vec<_> = code.filter_map(|section| range(&section)).collect();

    let mut loaded: HashMap<SectionId, Vec<u8>> = HashMap::new();
    Dwarf::load(|id| {
        loaded.insert(id, relocate::data(&elf, &places, id.name())?);
        Ok::<_, Error>(())
    })?;
    let dwarf = Dwarf::load(|id| {
        let data = loaded.get(&id).map_or(&[][..], Vec::as_slice);
        Ok::<_, Error>(EndianSlice::new(data, LittleEndian))
    })?;
    let units = Units::new(dwarf)?;
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
