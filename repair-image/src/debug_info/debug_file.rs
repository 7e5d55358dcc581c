//! The file that debug information is read from: a linked kernel's, in place, or a module's, whose debug sections are
//! relocated first. Which file belongs to which kernel is for others to say.

use std::collections::HashMap;
use std::path::Path;

use gimli::SectionId;
use guest::GuestVirt;

use super::DebugInfo;
use crate::compile::{elf, linked_dwarf, relocate};
use crate::{BuildId, Error, MappedFile};

/// A file with debug information.
#[derive(Debug)]
pub struct DebugFile(Bytes);

#[derive(Debug)]
enum Bytes {
    Linked(MappedFile),
    Relocated(HashMap<SectionId, Vec<u8>>),
}

impl DebugFile {
    /// Maps a kernel's vmlinux. Little of it is read.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Elf`]; [`Error::WrongBuild`] when it is another kernel's, [`Error::MissingSection`] when
    /// it has no debug information.
    pub fn vmlinux(path: &Path, expected: BuildId) -> Result<Self, Error> {
        let file = MappedFile::open(path)?;
        let elf = elf::parse(&file, "vmlinux")?;
        let found = elf::build_id(&elf).ok_or(Error::MissingSection { section: ".notes" })?;
        if found != expected {
            return Err(Error::WrongBuild { found, expected });
        }
        elf::needed(&elf, ".debug_info")?;
        Ok(Self(Bytes::Linked(file)))
    }

    /// Reads a module's file (unpacked), with its sections where the guest has them.
    ///
    /// # Errors
    /// [`Error::Elf`] or [`Error::Relocation`] when it is damaged or no module, [`Error::MissingSection`] when it has no
    /// debug information.
    pub fn module(ko: &[u8], sections: &[(String, GuestVirt)]) -> Result<Self, Error> {
        let elf = elf::parse(ko, "module")?;
        elf::needed(&elf, ".debug_info")?;
        let places = relocate::places(&elf, sections);
        Ok(Self(Bytes::Relocated(relocate::debug_sections(&elf, &places)?)))
    }

    /// What it says. Of a module at run-time addresses.
    ///
    /// # Errors
    /// [`Error::Elf`] when it is damaged.
    pub fn info(&self) -> Result<DebugInfo<'_>, Error> {
        Ok(DebugInfo::new(match &self.0 {
            Bytes::Linked(file) => linked_dwarf(&elf::parse(file, "vmlinux")?)?,
            Bytes::Relocated(sections) => relocate::dwarf(sections),
        }))
    }
}
