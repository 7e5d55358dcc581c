//! The container of a knowledge file: an ELF64 file of named sections with a checksum (`readelf -S` lists them).
//! What the sections hold is in `encode.rs` and `knowledge.rs`.

use std::fs;
use std::io::Write;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use object::read::elf::ElfFile64;
use object::write::Object;
use object::{
    Architecture, BinaryFormat, Endianness, LittleEndian, Object as _, ObjectSection, SectionKind,
};
use xxhash_rust::xxh3::Xxh3;

use crate::Error;
use crate::mmap::MappedFile;

/// First bytes of the header section.
const MAGIC: u64 = u64::from_le_bytes(*b"DEFIBKNW");
/// Version of the format; any change of an encoding raises it.
pub(crate) const FORMAT: u64 = 1;
/// Name of the header section: magic number, format version, checksum of the other sections.
pub(crate) const HEADER: &str = ".defib.header";

/// Bytes that several owners share: of a mapped file or in memory.
#[derive(Clone, Debug)]
enum Shared {
    Mapped(Arc<MappedFile>),
    Memory(Arc<[u8]>),
}

/// Part of shared bytes.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    bytes: Shared,
    range: Range<usize>,
}

impl Default for Span {
    fn default() -> Self {
        Self { bytes: Shared::Memory(Arc::from([])), range: 0..0 }
    }
}

impl Deref for Span {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let bytes: &[u8] = match &self.bytes {
            Shared::Mapped(map) => map,
            Shared::Memory(bytes) => bytes,
        };
        bytes.get(self.range.clone()).unwrap_or(&[])
    }
}

/// An open knowledge file, or one that exists in memory only.
#[derive(Clone, Debug, Default)]
pub(crate) struct KnowledgeFile {
    sections: Vec<(String, Span)>,
}

fn checksum<'a>(sections: impl Iterator<Item = (&'a str, &'a [u8])>) -> u64 {
    let mut hash = Xxh3::new();
    for (name, data) in sections {
        hash.update(name.as_bytes());
        hash.update(&(data.len() as u64).to_le_bytes());
        hash.update(data);
    }
    hash.digest()
}

/// The ELF file that holds these sections.
pub(crate) fn pack<N: AsRef<str>>(sections: &[(N, Vec<u8>)]) -> Result<Vec<u8>, Error> {
    let sum = checksum(sections.iter().map(|(name, data)| (name.as_ref(), data.as_slice())));
    let header: Vec<u8> = [MAGIC, FORMAT, sum].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut object = Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
    let all = std::iter::once((HEADER, header.as_slice()))
        .chain(sections.iter().map(|(name, data)| (name.as_ref(), data.as_slice())));
    for (name, data) in all {
        let id = object.add_section(Vec::new(), name.as_bytes().to_vec(), SectionKind::Other);
        object.set_section_data(id, data, 8);
    }
    object
        .write()
        .map_err(|error| Error::Write { what: "knowledge file", reason: error.to_string() })
}

impl KnowledgeFile {
    /// Maps and checks a file.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        Self::read(Shared::Mapped(Arc::new(MappedFile::open(path)?)))
    }

    /// Checks a file in memory.
    pub(crate) fn of_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::read(Shared::Memory(bytes.into()))
    }

    fn read(bytes: Shared) -> Result<Self, Error> {
        let whole = Span { range: 0..usize::MAX, bytes: bytes.clone() };
        let len = match &bytes {
            Shared::Mapped(map) => map.len(),
            Shared::Memory(bytes) => bytes.len(),
        };
        let whole = Span { range: 0..len, ..whole };
        let elf = ElfFile64::<LittleEndian, _>::parse(&*whole)
            .map_err(|source| Error::Elf { what: "knowledge file", source })?;
        let mut sections = Vec::new();
        for section in elf.sections() {
            let name = section.name().unwrap_or("");
            let Some((start, size)) = section.file_range().filter(|_| name.starts_with(".defib."))
            else {
                continue;
            };
            let end = start.checked_add(size).filter(|&end| end <= len as u64);
            let end =
                end.ok_or(Error::damaged("section end", start.wrapping_add(size), len as u64))?;
            let span = Span { bytes: bytes.clone(), range: start as usize..end as usize };
            sections.push((name.to_owned(), span));
        }
        let file = Self { sections };
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> Result<(), Error> {
        let header = self.section(HEADER);
        let word = |index: usize| {
            let bytes = header.get(8 * index..8 * index + 8).and_then(|word| word.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let expect = |what, found, expected| {
            if found == expected { Ok(()) } else { Err(Error::damaged(what, found, expected)) }
        };
        expect("magic number", word(0), MAGIC)?;
        expect("format version", word(1), FORMAT)?;
        let others = self.sections.iter().filter(|(name, _)| name != HEADER);
        expect("checksum", checksum(others.map(|(name, data)| (name.as_str(), &**data))), word(2))
    }

    /// The section of that name; empty when there is none.
    pub(crate) fn section(&self, name: &str) -> Span {
        let found = self.sections.iter().find(|(own, _)| own == name);
        found.map(|(_, span)| span.clone()).unwrap_or_default()
    }

    /// Names and sizes in bytes of all sections.
    pub(crate) fn sections(&self) -> impl Iterator<Item = (&str, usize)> {
        self.sections.iter().map(|(name, span)| (name.as_str(), span.len()))
    }
}

/// Writes a file under a temporary name and renames it into place, so that no reader ever sees half of it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_data()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // Best effort: the error that matters is the one above.
        let _ = fs::remove_file(&temporary);
        Error::io(path, source)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<u8> {
        pack(&[(".defib.a", vec![1, 2, 3]), (".defib.b", vec![9; 100])]).unwrap()
    }

    #[test]
    fn sections_come_back() {
        let file = KnowledgeFile::of_bytes(sample()).unwrap();
        assert_eq!(&*file.section(".defib.a"), [1, 2, 3]);
        assert_eq!(file.section(".defib.b").len(), 100);
        assert!(file.section(".defib.c").is_empty());
    }

    #[test]
    fn truncated_files_are_refused() {
        let bytes = sample();
        for len in 0..bytes.len() {
            assert!(KnowledgeFile::of_bytes(bytes[..len].to_vec()).is_err(), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn a_changed_section_byte_is_refused(at in 0usize..100, bit in 0u32..8) {
            let mut bytes = sample();
            let start = bytes.windows(100).position(|window| window == [9; 100]).unwrap();
            bytes[start + at] ^= 1 << bit;
            prop_assert!(KnowledgeFile::of_bytes(bytes).is_err());
        }

        #[test]
        fn any_bytes_are_survived(at in 0usize..600, byte in any::<u8>()) {
            let mut bytes = sample();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = KnowledgeFile::of_bytes(bytes);
        }
    }
}
