//! Relocations of a module's sections (`ET_REL`), applied for where the sections lie at run time. Only the sections that
//! knowledge is made of, only the types that compilers use in them.

use std::collections::HashMap;
use std::convert::Infallible;

use gimli::{Dwarf, EndianSlice, SectionId};
use guest::GuestVirt;
use object::elf::{R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32};
use object::read::elf::ElfSection64;
use object::{
    LittleEndian, Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget,
    SectionIndex,
};

use super::Slice;
use super::elf::Elf;
use crate::Error;

/// Where a module's sections lie at run time; `None` for those that are not loaded.
pub(crate) type Places = HashMap<SectionIndex, u64>;

/// The places of sections that the guest tells by name.
pub(crate) fn places(elf: &Elf<'_>, sections: &[(String, GuestVirt)]) -> Places {
    let placed: HashMap<&str, u64> =
        sections.iter().map(|(name, at)| (name.as_str(), at.0)).collect();
    let place = |section: ElfSection64<'_, '_, LittleEndian, &[u8]>| {
        Some((section.index(), *placed.get(section.name().ok()?)?))
    };
    elf.sections().filter_map(place).collect()
}

/// The debug sections, relocated.
pub(crate) fn debug_sections(
    elf: &Elf<'_>,
    places: &Places,
) -> Result<HashMap<SectionId, Vec<u8>>, Error> {
    let mut loaded = HashMap::new();
    Dwarf::load(|id| {
        loaded.insert(id, data(elf, places, id.name())?);
        Ok::<_, Error>(())
    })?;
    Ok(loaded)
}

/// What [`debug_sections`] has relocated, to be read.
pub(crate) fn dwarf(loaded: &HashMap<SectionId, Vec<u8>>) -> Dwarf<Slice<'_>> {
    let section = |id: SectionId| {
        let data = loaded.get(&id).map_or(&[][..], Vec::as_slice);
        Ok::<_, Infallible>(EndianSlice::new(data, gimli::LittleEndian))
    };
    let Ok(dwarf) = Dwarf::load(section);
    dwarf
}

/// Value of a symbol at run time; 0 for what is not loaded or not defined here, as debug information has no use for it.
fn symbol_value(elf: &Elf<'_>, places: &Places, target: RelocationTarget) -> u64 {
    match target {
        RelocationTarget::Symbol(index) => {
            let Ok(symbol) = elf.symbol_by_index(index) else { return 0 };
            let base = symbol.section_index().map(|section| places.get(&section).copied());
            match base {
                Some(Some(base)) => base.wrapping_add(symbol.address()),
                // A section that is not loaded: offsets in debug sections, addresses in discarded code.
                Some(None) => symbol.address(),
                None => 0,
            }
        }
        RelocationTarget::Section(index) => places.get(&index).copied().unwrap_or(0),
        _ => 0,
    }
}

/// Data of a section, relocated; empty when there is none of that name. `at` is where it lies at run time.
pub(super) fn data(elf: &Elf<'_>, places: &Places, name: &'static str) -> Result<Vec<u8>, Error> {
    let Some(section) = elf.section_by_name(name) else { return Ok(Vec::new()) };
    let data = section.data().map_err(|source| Error::Elf { what: name, source })?;
    let mut data = data.to_vec();
    let own = places.get(&section.index()).copied().unwrap_or(0);
    for (offset, relocation) in section.relocations() {
        let kind = match relocation.flags() {
            RelocationFlags::Elf { r_type } => r_type,
            _ => object::elf::R_X86_64_NONE,
        };
        let value = symbol_value(elf, places, relocation.target());
        let value = value.wrapping_add_signed(relocation.addend());
        let relative = value.wrapping_sub(own.wrapping_add(offset));
        let bytes = match kind {
            R_X86_64_64 => value.to_le_bytes().to_vec(),
            R_X86_64_32 | R_X86_64_32S => (value as u32).to_le_bytes().to_vec(),
            R_X86_64_PC32 | R_X86_64_PLT32 => (relative as u32).to_le_bytes().to_vec(),
            object::elf::R_X86_64_NONE => continue,
            _ => {
                let section = name.to_owned();
                return Err(Error::Relocation { section, offset, kind: kind.0 });
            }
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let place = data.get_mut(start..start.saturating_add(bytes.len()));
        let section = || name.to_owned();
        place
            .ok_or_else(|| Error::Relocation { section: section(), offset, kind: kind.0 })?
            .copy_from_slice(&bytes);
    }
    Ok(data)
}
