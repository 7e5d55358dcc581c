//! Pages of a kdump-compressed dump: which are there, where their data lies, and a bounded cache of
//! decompressed ones. Pages that were excluded are not captured.
//!
//! Of the two bitmaps, the first says what is RAM and the second what is in the file. A page of zeroes that
//! makedumpfile dropped (`-d 1`) is in the file all the same: its bit is set, and its descriptor leads to
//! one page of zeroes that all of them share (`pd_zero` in makedumpfile.c and in QEMU's dump/dump.c). So
//! zero pages are told from filtered ones by the second bitmap alone, at any dump level.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use guest::{GuestPhys, MemoryError, PhysMemory};

use super::Error;
use super::bitmap::{Bitmap, Ranks};
use super::by_page::by_page;
use super::codec::{self, Codecs, PAGE};
use super::storage::Storage;

/// Size of `struct page_desc`: offset (8 bytes), size, flags (4 each), page flags (8).
const DESCRIPTOR: u64 = 24;
/// Decompressed pages that are kept: 4 MiB.
const CACHED: usize = 1024;

/// One file of the dump.
pub(super) struct Part<B> {
    storage: Storage<B>,
    ram: Bitmap,
    saved: Ranks,
    /// Page frames it may hold.
    pub frames: Range<u64>,
    /// Number of saved pages in front of those.
    skipped: u64,
    /// Offset of the descriptors.
    descriptors: u64,
}

impl<B: AsRef<[u8]>> Part<B> {
    /// A file whose bitmaps, no longer than itself, are these.
    pub(super) fn new(
        storage: Storage<B>,
        ram: Bitmap,
        saved: Bitmap,
        frames: Range<u64>,
        descriptors: u64,
    ) -> Self {
        let saved = Ranks::new(&storage, saved);
        // Each part of a split dump has the bitmaps of the whole dump but descriptors of its own.
        let skipped = saved.rank(&storage, frames.start);
        Self { storage, ram, saved, frames, skipped, descriptors }
    }

    /// Number of pages in it.
    fn captured(&self) -> u64 {
        self.saved.rank(&self.storage, self.frames.end).saturating_sub(self.skipped)
    }

    fn descriptor(&self, frame: u64) -> Option<Descriptor> {
        let index = self.saved.position(&self.storage, frame)?.checked_sub(self.skipped)?;
        let at = index.checked_mul(DESCRIPTOR)?.checked_add(self.descriptors)?;
        let bytes: [u8; 16] = self.storage.array(at)?;
        let (offset, rest) = bytes.split_first_chunk::<8>()?;
        let (size, flags) = rest.split_first_chunk::<4>()?;
        let descriptor = Descriptor {
            offset: u64::from_le_bytes(*offset),
            size: u32::from_le_bytes(*size) as usize,
            flags: u32::from_le_bytes(flags.try_into().ok()?),
        };
        // An incomplete dump has zeroes where descriptors would have gone. No page is stored longer than
        // it is.
        let is_sound = descriptor.offset != 0 && (1..=PAGE).contains(&descriptor.size);
        is_sound.then_some(descriptor)
    }
}

/// Where the data of a page lies.
struct Descriptor {
    offset: u64,
    size: usize,
    flags: u32,
}

/// Decompressed pages, each in the one place that its frame number gives: neighbours never push each
/// other out, and a lookup costs nothing.
struct Cache {
    codecs: Codecs,
    slots: Vec<Option<(u64, Box<[u8; PAGE]>)>>,
}

/// All pages of a dump.
pub(super) struct Pages<B> {
    /// Ascending by frames, without overlap; at least one.
    parts: Vec<Part<B>>,
    ranges: Vec<Range<GuestPhys>>,
    cache: Mutex<Cache>,
}

impl<B: AsRef<[u8]>> Pages<B> {
    /// Pages of files in ascending order.
    pub(super) fn new(parts: Vec<Part<B>>) -> Result<Self, Error> {
        let first = parts.first().ok_or(Error::NoFile)?;
        // Frame numbers are below 2^34, so that no address overflows.
        let address = |frame: u64| GuestPhys(frame * PAGE as u64);
        let runs = first.ram.runs(&first.storage)?;
        let ranges: Vec<_> =
            runs.into_iter().map(|run| address(run.start)..address(run.end)).collect();
        if ranges.is_empty() {
            return Err(Error::NoMemory);
        }
        let cache = Cache { codecs: Codecs::new(), slots: (0..CACHED).map(|_| None).collect() };
        Ok(Self { parts, ranges, cache: Mutex::new(cache) })
    }

    /// RAM that no part holds, of a machine with that many page frames.
    pub(super) fn missing(&self, frames: u64) -> Vec<Range<GuestPhys>> {
        let address = |frame: u64| GuestPhys(frame * PAGE as u64);
        let mut missing = Vec::new();
        let mut covered = 0;
        for part in &self.parts {
            if part.frames.start > covered {
                missing.push(address(covered)..address(part.frames.start.min(frames)));
            }
            covered = covered.max(part.frames.end);
        }
        if covered < frames {
            missing.push(address(covered)..address(frames));
        }
        missing.retain(|range| {
            self.ranges.iter().any(|ram| ram.start.max(range.start) < ram.end.min(range.end))
        });
        missing
    }

    /// Bytes in the files.
    pub(super) fn captured(&self) -> u64 {
        let pages = self.parts.iter().fold(0, |sum: u64, part| sum.saturating_add(part.captured()));
        pages.saturating_mul(PAGE as u64)
    }

    /// Bytes of RAM, captured or not.
    pub(super) fn ram(&self) -> u64 {
        self.ranges.iter().fold(0, |sum, range| sum + (range.end - range.start))
    }

    /// Whether a file is flattened.
    pub(super) fn is_flattened(&self) -> bool {
        self.parts.iter().any(|part| part.storage.is_flattened())
    }

    /// Number of files.
    pub(super) fn parts(&self) -> usize {
        self.parts.len()
    }

    fn read_in_page(&self, at: GuestPhys, into: &mut [u8], len: usize) -> Result<(), MemoryError> {
        let frame = at.0 / PAGE as u64;
        let within = (at.0 % PAGE as u64) as usize;
        let mut cache = self.cache();
        let slot = (frame % CACHED as u64) as usize;
        if let Some(Some((cached, page))) = cache.slots.get(slot)
            && *cached == frame
            && let Some(source) = page.get(within..within + into.len())
        {
            into.copy_from_slice(source);
            return Ok(());
        }
        let missing = MemoryError::NotCaptured { at };
        let Some((part, descriptor)) = self.find(frame) else {
            return Err(if self.is_ram(at) { missing } else { MemoryError::NotRam { at, len } });
        };
        if codec::is_stored(descriptor.flags) {
            if descriptor.size != PAGE {
                return Err(missing);
            }
            let from = descriptor.offset.checked_add(within as u64).ok_or(missing)?;
            return part.storage.read(from, into).ok_or(missing);
        }
        let data = part.storage.bytes(descriptor.offset, descriptor.size as u64).ok_or(missing)?;
        let mut page = match cache.slots.get_mut(slot).and_then(Option::take) {
            Some((_, page)) => page,
            None => Box::new([0; PAGE]),
        };
        cache.codecs.page(descriptor.flags, &data, &mut page).ok_or(missing)?;
        into.copy_from_slice(page.get(within..within + into.len()).ok_or(missing)?);
        if let Some(slot) = cache.slots.get_mut(slot) {
            *slot = Some((frame, page));
        }
        Ok(())
    }

    /// A panic elsewhere leaves nothing half done in the cache: a slot is taken out while it is written.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, frame: u64) -> Option<(&Part<B>, Descriptor)> {
        let after = self.parts.partition_point(|part| part.frames.start <= frame);
        let part = self.parts.get(after.checked_sub(1)?)?;
        let descriptor = part.frames.contains(&frame).then(|| part.descriptor(frame)).flatten()?;
        Some((part, descriptor))
    }

    fn is_ram(&self, at: GuestPhys) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= at);
        after.checked_sub(1).and_then(|index| self.ranges.get(index)).is_some_and(|it| at < it.end)
    }
}

impl<B: AsRef<[u8]>> PhysMemory for Pages<B> {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        by_page(PAGE as u64, at, into, |at, part, len| self.read_in_page(at, part, len))
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        self.ranges.clone()
    }
}
