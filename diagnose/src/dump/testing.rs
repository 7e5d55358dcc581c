//! Writes kdump-compressed files and ELF cores for tests, with offsets of its own: the readers' constants
//! are not used, so that a wrong one shows.

use std::collections::BTreeMap;
use std::ops::Range;

use super::flat;

/// A page of RAM: its bytes, or `None` when it is left out of the dump.
pub(super) type Ram = BTreeMap<u64, Option<Vec<u8>>>;

/// How pages are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Stored,
    Zlib,
    Lzo,
    Snappy,
    Zstd,
}

impl Packing {
    pub(super) const ALL: [Packing; 5] =
        [Self::Stored, Self::Zlib, Self::Lzo, Self::Snappy, Self::Zstd];

    /// Flags and data of a page; stored when packing makes it longer.
    fn pack(self, page: &[u8]) -> (u32, Vec<u8>) {
        use std::io::Write;
        let (flag, data) = match self {
            Self::Stored => (0, page.to_vec()),
            Self::Zlib => {
                let mut to =
                    flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
                to.write_all(page).unwrap();
                (1, to.finish().unwrap())
            }
            Self::Lzo => (2, lzokay_native::compress(page).unwrap()),
            Self::Snappy => (4, snap::raw::Encoder::new().compress_vec(page).unwrap()),
            Self::Zstd => (0x20, zstd::bulk::compress(page, 1).unwrap()),
        };
        if data.len() < page.len() { (flag, data) } else { (0, page.to_vec()) }
    }
}

/// A kdump-compressed file to be written.
#[derive(Clone, Debug)]
pub(super) struct KdumpFile {
    pub version: u32,
    pub packing: Packing,
    /// Frames of this part of a split dump.
    pub split: Option<Range<u64>>,
    pub notes: Vec<u8>,
    pub vmcoreinfo: Vec<u8>,
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

impl KdumpFile {
    pub(super) fn new(version: u32, packing: Packing) -> Self {
        Self { version, packing, split: None, notes: Vec::new(), vmcoreinfo: Vec::new() }
    }

    /// The file, not flattened.
    pub(super) fn write(&self, ram: &Ram, frames: u64) -> Vec<u8> {
        let mut file = vec![0; 0x1000];
        put(&mut file, 0, b"KDUMP   ");
        put(&mut file, 8, &self.version.to_le_bytes());
        // The machine's name lies behind signature, version and four names of 65 bytes.
        put(&mut file, 272, b"x86_64");
        let bitmap = (frames.div_ceil(8) as usize).next_multiple_of(0x1000);
        let sub =
            0x1000 + (104 + self.notes.len() + self.vmcoreinfo.len()).next_multiple_of(0x1000);
        for (at, value) in [
            (428, 0x1000),
            (432, (sub - 0x1000) as u32 / 0x1000),
            (436, 2 * bitmap as u32 / 0x1000),
            (440, frames as u32),
        ] {
            put(&mut file, at, &value.to_le_bytes());
        }
        self.write_sub_header(&mut file, frames);
        file.resize(sub + 2 * bitmap, 0);
        let held = |frame: &u64| self.split.as_ref().is_none_or(|split| split.contains(frame));
        for (frame, page) in ram {
            let (byte, bit) = (*frame as usize / 8, 1 << (frame % 8));
            file[sub + byte] |= bit;
            file[sub + bitmap + byte] |= if page.is_some() { bit } else { 0 };
        }
        let pages: Vec<_> =
            ram.iter().filter(|(frame, _)| held(frame)).filter_map(|(_, it)| it.as_ref()).collect();
        let descriptors = file.len();
        file.resize(descriptors + 24 * pages.len(), 0);
        let zeroes = file.len();
        file.resize(zeroes + 0x1000, 0);
        for (index, page) in pages.into_iter().enumerate() {
            let (at, (flags, data)) = if page.iter().all(|&byte| byte == 0) {
                (zeroes, (0, page.clone()))
            } else {
                let (flags, data) = self.packing.pack(page);
                let at = file.len();
                file.extend(&data);
                (at, (flags, data))
            };
            let descriptor = descriptors + 24 * index;
            put(&mut file, descriptor, &(at as u64).to_le_bytes());
            put(&mut file, descriptor + 8, &(data.len() as u32).to_le_bytes());
            put(&mut file, descriptor + 12, &flags.to_le_bytes());
        }
        file
    }

    fn write_sub_header(&self, file: &mut Vec<u8>, frames: u64) {
        let split = self.split.clone();
        let range = split.clone().unwrap_or_default();
        let notes = 0x1000 + 104;
        let text = notes + self.notes.len();
        let since = [
            (1, 8, 31),
            (2, 12, u64::from(split.is_some())),
            (2, 16, range.start),
            (2, 24, range.end),
            (3, 32, text as u64),
            (3, 40, self.vmcoreinfo.len() as u64),
            (4, 48, notes as u64),
            (4, 56, self.notes.len() as u64),
            (6, 80, range.start),
            (6, 88, range.end),
            (6, 96, frames),
        ];
        put(file, 0x1000, &[0; 104]);
        for (version, at, value) in since {
            // What a version does not have may hold anything.
            let value = if version <= self.version { value } else { u64::MAX };
            let bytes = value.to_le_bytes();
            let width = if at == 8 || at == 12 { 4 } else { 8 };
            put(file, 0x1000 + at, &bytes[..width]);
        }
        put(file, notes, &self.notes);
        put(file, text, &self.vmcoreinfo);
    }
}

/// Cuts a file into records and writes them in an order that `seed` gives. Zeroes between the headers are
/// left out, as QEMU does.
pub(super) fn flatten(file: &[u8], seed: usize) -> Vec<u8> {
    let mut pieces: Vec<_> =
        file.chunks(900).enumerate().map(|(index, data)| (index * 900, data)).collect();
    pieces.retain(|(at, data)| *at > 0x1000 - 900 || data.iter().any(|&byte| byte != 0));
    let len = pieces.len().max(1);
    pieces.rotate_left(seed % len);
    if seed.is_multiple_of(3) {
        pieces.reverse();
    }
    let mut out = flat::testing::start();
    for (at, data) in pieces {
        flat::testing::record(&mut out, at as u64, data);
    }
    flat::testing::end(&mut out);
    out
}

/// A note.
pub(super) fn note(name: &str, kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for word in [name.len() as u32 + 1, desc.len() as u32, kind] {
        out.extend(word.to_le_bytes());
    }
    for part in [&[name.as_bytes(), b"\0"].concat()[..], desc] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// An ELF core: one segment of notes, then segments of (guest-physical, size in RAM, data).
/// `extended` counts them in section header 0, at the front as QEMU does.
pub(super) fn core(notes: &[u8], segments: &[(u64, u64, &[u8])], extended: bool) -> Vec<u8> {
    let count = segments.len() + 1;
    let table = 64 + 64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    put(&mut file, 16, &[4, 0, 62, 0, 1]);
    put(&mut file, 32, &(table as u64).to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &if extended { 0xffff } else { count as u16 }.to_le_bytes());
    if extended {
        put(&mut file, 40, &64u64.to_le_bytes());
        put(&mut file, 64 + 44, &(count as u32).to_le_bytes());
    }
    let mut data = table + 56 * count;
    file.resize(data, 0);
    let mut header =
        |file: &mut Vec<u8>, index: usize, kind: u32, at: u64, size: u64, bytes: &[u8]| {
            let header = table + 56 * index;
            put(file, header, &kind.to_le_bytes());
            for (offset, value) in
                [(8, data as u64), (16, !at), (24, at), (32, bytes.len() as u64), (40, size)]
            {
                put(file, header + offset, &value.to_le_bytes());
            }
            file.extend(bytes);
            data += bytes.len();
        };
    header(&mut file, 0, 4, 0, notes.len() as u64, notes);
    for (index, (at, size, bytes)) in segments.iter().enumerate() {
        header(&mut file, index + 1, 1, *at, *size, bytes);
    }
    file
}
