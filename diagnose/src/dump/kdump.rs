//! The kdump-compressed format: headers, and how files of a split dump go together. Pages are read in
//! `pages.rs`.
//!
//! Facts are from makedumpfile's diskdump_mod.h and IMPLEMENTATION, and from `create_header64()` in QEMU's
//! dump/dump.c. A file is: header (block 0), sub header with notes and VMCOREINFO (blocks from 1), bitmap
//! of RAM, bitmap of pages in the file, page descriptors, page data.

use std::ops::Range;

use super::bitmap::Bitmap;
use super::codec::PAGE;
use super::notes::Notes;
use super::pages::{Pages, Part};
use super::storage::Storage;
use super::{Error, Remark};

/// `KDUMP_SIGNATURE`
pub(super) const SIGNATURE: &[u8; 8] = b"KDUMP   ";
/// Offsets in `struct disk_dump_header` of a 64-bit machine.
const VERSION: u64 = 8;
/// `utsname.machine`: the fifth of six strings of 65 bytes.
const MACHINE: u64 = 12 + 4 * 65;
const STATUS: u64 = 424;
const BLOCK_SIZE: u64 = 428;
const SUB_HEADER_BLOCKS: u64 = 432;
const BITMAP_BLOCKS: u64 = 436;
const MAX_MAPNR: u64 = 440;
/// Where a 32-bit machine has its block size: `struct timeval` is shorter there.
const BLOCK_SIZE_32: u64 = 416;
/// `DUMP_DH_COMPRESSED_INCOMPLETE` in the header's status.
const INCOMPLETE: u32 = 0x8;
/// More than any version so far (6). Versions only add members at the end of the sub header.
const MAX_VERSION: u32 = 32;
/// 64 TiB, the most that x86-64 Linux knows with 4-level paging (`MAX_PHYSMEM_BITS`).
const MAX_PAGES: u64 = 1 << 34;

/// `struct kdump_sub_header`, as far as the version of the file has it; other members are zero.
struct SubHeader {
    dump_level: Option<u32>,
    split: bool,
    frames: Range<u64>,
    vmcoreinfo: (u64, u64),
    notes: (u64, u64),
    erased: bool,
    max_mapnr: u64,
}

/// A dump of one or more files.
pub(super) struct Kdump<B> {
    pub pages: Pages<B>,
    pub notes: Notes,
    /// `header_version` of the first file.
    pub version: u32,
    /// `-d` of makedumpfile, which kinds of pages were excluded; not in files of version 0.
    pub dump_level: Option<u32>,
}

/// What of a file all parts of a dump have in common.
#[derive(PartialEq, Eq)]
struct Common {
    version: u32,
    max_mapnr: u64,
    split: bool,
}

struct File<B> {
    part: Part<B>,
    common: Common,
    notes: Notes,
    dump_level: Option<u32>,
}

fn u32_of<B: AsRef<[u8]>>(storage: &Storage<B>, at: u64) -> Result<u32, Error> {
    let bytes = storage.array(at).ok_or(Error::Truncated { what: "header", at: 0 })?;
    Ok(u32::from_le_bytes(bytes))
}

/// Reads the headers of all files.
pub(super) fn open<B: AsRef<[u8]>>(
    storages: Vec<Storage<B>>,
    remarks: &mut Vec<Remark>,
) -> Result<Kdump<B>, Error> {
    let mut files = Vec::new();
    for storage in storages {
        files.push(file(storage, remarks)?);
    }
    same_dump(&files)?;
    files.sort_by_key(|file| (file.part.frames.start, file.part.frames.end));
    let mut notes = Notes::default();
    let (mut version, mut dump_level, mut frames) = (0, None, 0);
    let mut parts = Vec::new();
    for file in files {
        if notes.cpus.is_empty() {
            notes.cpus = file.notes.cpus;
        }
        notes.qemu |= file.notes.qemu;
        notes.cut |= file.notes.cut;
        notes.vmcoreinfo = notes.vmcoreinfo.or(file.notes.vmcoreinfo);
        (version, dump_level, frames) =
            (file.common.version, file.dump_level, file.common.max_mapnr);
        parts.push(file.part);
    }
    let pages = Pages::new(parts)?;
    remarks.extend(pages.missing(frames).into_iter().map(|range| Remark::MissingPart { range }));
    Ok(Kdump { pages, notes, version, dump_level })
}

/// Checks that files belong together.
fn same_dump<B>(files: &[File<B>]) -> Result<(), Error> {
    let Some(first) = files.first() else { return Err(Error::NoFile) };
    for (index, file) in files.iter().enumerate().skip(1) {
        let mut why = None;
        if !first.common.split || !file.common.split {
            why = Some("it is a whole dump");
        } else if file.common != first.common {
            why = Some("its header is another one");
        } else if let (Some(one), Some(other)) = (&first.notes.vmcoreinfo, &file.notes.vmcoreinfo)
            && one != other
        {
            why = Some("it is of another kernel or boot");
        }
        let overlaps = |other: &File<B>| {
            let (one, other) = (&file.part.frames, &other.part.frames);
            one.start.max(other.start) < one.end.min(other.end)
        };
        if files.iter().take(index).any(overlaps) {
            why = why.or(Some("it holds the same pages as another"));
        }
        if let Some(why) = why {
            return Err(Error::NotOneDump { index, why });
        }
    }
    Ok(())
}

fn file<B: AsRef<[u8]>>(storage: Storage<B>, remarks: &mut Vec<Remark>) -> Result<File<B>, Error> {
    check_machine(&storage)?;
    let version = u32_of(&storage, VERSION)?;
    if version > MAX_VERSION {
        return Err(Error::BadHeader { what: "header_version", found: version.into() });
    }
    if u32_of(&storage, STATUS)? & INCOMPLETE != 0 {
        remarks.push(Remark::Incomplete);
    }
    let max_mapnr = u64::from(u32_of(&storage, MAX_MAPNR)?);
    let sub = sub_header(&storage, version, max_mapnr)
        .ok_or(Error::Truncated { what: "sub header", at: PAGE as u64 })?;
    if sub.max_mapnr > MAX_PAGES {
        let found = sub.max_mapnr;
        return Err(Error::TooMany { what: "pages", found, limit: MAX_PAGES });
    }
    if sub.erased {
        remarks.push(Remark::Erased);
    }
    let sub_blocks = u64::from(u32_of(&storage, SUB_HEADER_BLOCKS)?);
    let bitmap_blocks = u64::from(u32_of(&storage, BITMAP_BLOCKS)?);
    // Both are below 2^32, so that nothing overflows here.
    let bitmaps = (1 + sub_blocks) * PAGE as u64;
    let descriptors = bitmaps + bitmap_blocks * PAGE as u64;
    let half = bitmap_blocks / 2 * PAGE as u64;
    // No bitmap is longer than its file.
    let bits = sub.max_mapnr.min(half.saturating_mul(8)).min(storage.stored().saturating_mul(8));
    if bits < sub.max_mapnr {
        remarks.push(Remark::Cut { what: "bitmaps" });
    }
    if storage.is_cut() {
        remarks.push(Remark::Cut { what: "pages" });
    }
    let mut notes = Notes::default();
    if let Some(text) = storage.bytes(sub.vmcoreinfo.0, sub.vmcoreinfo.1) {
        notes.vmcoreinfo = repair_image::Vmcoreinfo::parse(&text);
    }
    if let Some(bytes) = storage.bytes(sub.notes.0, sub.notes.1) {
        notes.add(&bytes);
    }
    let common = Common { version, max_mapnr: sub.max_mapnr, split: sub.split };
    let ram = Bitmap { offset: bitmaps, bits };
    let saved = Bitmap { offset: bitmaps + half, bits };
    let part = Part::new(storage, ram, saved, sub.frames, descriptors);
    Ok(File { part, common, notes, dump_level: sub.dump_level })
}

/// Refuses what is not of an x86-64 machine. QEMU leaves all of utsname but the machine blank, and some
/// writers leave that blank too.
fn check_machine<B: AsRef<[u8]>>(storage: &Storage<B>) -> Result<(), Error> {
    let mut machine = [0; 65];
    storage.read(MACHINE, &mut machine).ok_or(Error::Truncated { what: "header", at: 0 })?;
    let machine = machine.split(|&byte| byte == 0).next().unwrap_or_default();
    if !machine.is_empty() && machine != b"x86_64" {
        let found = String::from_utf8_lossy(machine).escape_default().to_string();
        return Err(Error::OtherArchitecture { found });
    }
    let block_size = u32_of(storage, BLOCK_SIZE)?;
    if block_size != PAGE as u32 {
        if u32_of(storage, BLOCK_SIZE_32)? == PAGE as u32 {
            return Err(Error::OtherArchitecture { found: "a 32-bit machine".to_owned() });
        }
        return Err(Error::BadHeader { what: "block_size", found: block_size.into() });
    }
    Ok(())
}

/// `max_mapnr` is the one of the main header, which is right where the sub header has none.
fn sub_header<B: AsRef<[u8]>>(
    storage: &Storage<B>,
    version: u32,
    max_mapnr: u64,
) -> Option<SubHeader> {
    let word = |since: u32, offset: u64| {
        if version < since {
            return Some(0);
        }
        storage.array(PAGE as u64 + offset).map(u64::from_le_bytes)
    };
    let short = |since: u32, offset: u64| {
        if version < since {
            return Some(0);
        }
        storage.array(PAGE as u64 + offset).map(u32::from_le_bytes)
    };
    let split = short(2, 12)? != 0;
    // 32 bits of them are valid in the first pair, says the header's comment; so it is on 32-bit machines.
    let (mut start, mut end) = (word(2, 16)?, word(2, 24)?);
    if version >= 6 && word(6, 88)? != 0 {
        (start, end) = (word(6, 80)?, word(6, 88)?);
    }
    let max_mapnr = match word(6, 96)? {
        0 => max_mapnr,
        long => long,
    };
    let frames = if split { start..end.min(max_mapnr) } else { 0..max_mapnr };
    Some(SubHeader {
        dump_level: (version >= 1).then_some(short(1, 8)?),
        split,
        frames,
        vmcoreinfo: (word(3, 32)?, word(3, 40)?),
        notes: (word(4, 48)?, word(4, 56)?),
        erased: word(5, 72)? != 0,
        max_mapnr,
    })
}

#[cfg(test)]
mod tests {
    use guest::{GuestPhys, Machine, MemoryError};
    use proptest::prelude::*;

    use crate::dump::testing::{KdumpFile, Packing, Ram, flatten};
    use crate::dump::{Dump, Error, Hints, Remark};

    const FRAMES: u64 = 9000;

    fn page() -> impl Strategy<Value = Option<Vec<u8>>> {
        prop_oneof![
            1 => Just(None),
            1 => Just(Some(vec![0; 4096])),
            1 => any::<u64>().prop_map(|seed| {
                let mut state = seed | 1;
                let noise = (0..512).flat_map(|_| {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    state.to_le_bytes()
                });
                Some(noise.collect())
            }),
            4 => (1u8.., 1usize..900, any::<u8>()).prop_map(|(byte, period, step)| {
                let unit: Vec<u8> =
                    (0..period).map(|at| byte.wrapping_add(((at / 7) as u8).wrapping_mul(step))).collect();
                Some(unit.into_iter().cycle().take(4096).collect())
            }),
        ]
    }

    fn ram() -> impl Strategy<Value = Ram> {
        (proptest::collection::btree_map(0..FRAMES, page(), 1..12), 0..FRAMES - 8, page()).prop_map(
            |(mut ram, start, page)| {
                // Neighbours, so that reads go from page to page.
                ram.extend((start..start + 4).map(|frame| (frame, page.clone())));
                ram
            },
        )
    }

    fn check(dump: &Dump<Vec<u8>>, ram: &Ram) -> Result<(), TestCaseError> {
        let phys = dump.phys();
        let mut bytes = [0; 4096];
        for frame in ram.keys().flat_map(|&frame| [frame, frame.saturating_sub(1), frame + 1]) {
            let at = GuestPhys(frame * 4096);
            let read = phys.read(at, &mut bytes);
            match ram.get(&frame) {
                Some(Some(page)) => {
                    prop_assert_eq!(read, Ok(()));
                    prop_assert_eq!(&bytes[..], &page[..]);
                    let mut part = [0; 100];
                    phys.read(at + 3000, &mut part).unwrap();
                    prop_assert_eq!(&part[..], &page[3000..3100], "from the cache");
                }
                Some(None) => prop_assert_eq!(read, Err(MemoryError::NotCaptured { at })),
                None => prop_assert_eq!(read, Err(MemoryError::NotRam { at, len: 4096 })),
            }
            if let (Some(Some(one)), Some(Some(two))) = (ram.get(&frame), ram.get(&(frame + 1))) {
                phys.read(at + 4000, &mut bytes[..200]).unwrap();
                prop_assert_eq!((&bytes[..96], &bytes[96..200]), (&one[4000..], &two[..104]));
            }
        }
        let coverage = dump.coverage();
        prop_assert_eq!(coverage.ram, ram.len() as u64 * 4096);
        prop_assert_eq!(coverage.captured, ram.values().flatten().count() as u64 * 4096);
        Ok(())
    }

    proptest! {
        #[test]
        fn every_packing_gives_back_the_same_pages(
            ram in ram(), version in 1u32..=6, packing in prop::sample::select(&Packing::ALL[..]),
            flat in proptest::option::of(0usize..500),
        ) {
            let mut file = KdumpFile::new(version, packing).write(&ram, FRAMES);
            if let Some(seed) = flat {
                file = flatten(&file, seed);
            }
            let dump = Dump::parse(file).unwrap();
            prop_assert_eq!(dump.format().flattened, flat.is_some());
            check(&dump, &ram)?;
        }

        #[test]
        fn parts_in_any_order_are_one_dump(
            ram in ram(), version in 2u32..=6, mut cuts in proptest::collection::vec(1..FRAMES, 1..4),
            turn in 0usize..4, drop_last: bool,
        ) {
            cuts.sort_unstable();
            cuts.dedup();
            let starts = [&[0], &cuts[..]].concat();
            let mut files = Vec::new();
            for (index, &start) in starts.iter().enumerate() {
                let end = starts.get(index + 1).copied().unwrap_or(FRAMES);
                let mut file = KdumpFile::new(version, Packing::Zlib);
                file.split = Some(start..end);
                files.push(file.write(&ram, FRAMES));
            }
            let last = starts[starts.len() - 1];
            let mut left = ram.clone();
            if drop_last {
                files.pop();
                for (_, page) in left.range_mut(last..) {
                    *page = None;
                }
            }
            let turn = turn % files.len();
            files.rotate_left(turn);
            let dump = Dump::parse_parts(files, &Hints::default()).unwrap();
            check(&dump, &left)?;
            let is_missing = |remark: &Remark| matches!(remark, Remark::MissingPart { .. });
            let lacks_ram = drop_last && ram.range(last..).next().is_some();
            prop_assert_eq!(dump.remarks().iter().any(is_missing), lacks_ram);
        }
    }

    #[test]
    fn files_of_different_dumps_are_refused() {
        let ram: Ram = [(1, Some(vec![1; 4096]))].into();
        let whole = KdumpFile::new(6, Packing::Zlib).write(&ram, 64);
        let both = Dump::parse_parts(vec![whole.clone(), whole], &Hints::default());
        assert!(matches!(both, Err(Error::NotOneDump { index: 1, .. })));
        let part = |text: &[u8], frames| {
            let mut file = KdumpFile::new(6, Packing::Zlib);
            (file.split, file.vmcoreinfo) = (Some(frames), text.to_vec());
            file.write(&ram, 64)
        };
        let parts = |text, frames| {
            let files = vec![part(b"OSRELEASE=1\n", 0..32), part(text, frames)];
            Dump::parse_parts(files, &Hints::default())
        };
        assert!(parts(b"OSRELEASE=1\n", 32..64).is_ok());
        assert!(matches!(parts(b"OSRELEASE=2\n", 32..64), Err(Error::NotOneDump { .. })));
        assert!(matches!(parts(b"OSRELEASE=1\n", 31..64), Err(Error::NotOneDump { .. })));
    }

    #[test]
    fn a_file_cut_short_lacks_its_last_pages() {
        let ram: Ram = (0..40).map(|frame| (frame, Some(vec![frame as u8 + 1; 4096]))).collect();
        let mut file = KdumpFile::new(6, Packing::Stored).write(&ram, 64);
        file.truncate(file.len() - 4096 * 10);
        let dump = Dump::parse(file).unwrap();
        assert!(dump.phys().read_u64(GuestPhys(29 * 4096)).is_ok());
        let at = GuestPhys(30 * 4096);
        assert_eq!(dump.phys().read_u64(at), Err(MemoryError::NotCaptured { at }));
    }
}
