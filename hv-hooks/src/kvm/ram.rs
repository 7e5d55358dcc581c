//! Guest-physical memory as the guard sees it: the VMM's RAM, and fresh memory while it is there.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest::{FreshKind, FreshRegion, GuestPhys, MemoryError, PhysMemory};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::guest_ram::GuestRam;
use crate::Error;

/// RAM of the VMM's and of ours.
pub(super) struct Ram<M: GuestMemoryBackend> {
    memory: Arc<M>,
    fresh: Vec<(FreshRegion, GuestRam<GuestMemoryMmap>)>,
}

impl<M: GuestMemoryBackend> Ram<M> {
    pub(super) fn new(memory: M) -> Self {
        Self { memory: Arc::new(memory), fresh: Vec::new() }
    }

    /// The VMM's part only: fresh memory can go at any time.
    pub(super) fn without_fresh(&self) -> Self {
        Self { memory: Arc::clone(&self.memory), fresh: Vec::new() }
    }

    /// A region was added; it is in the VM already.
    pub(super) fn add(
        &mut self,
        at: GuestPhys,
        size: u64,
        ram: GuestRam<GuestMemoryMmap>,
    ) -> FreshRegion {
        let region = FreshRegion { at, size, kind: FreshKind::Memslot };
        self.fresh.push((region, ram));
        region
    }

    /// Takes a region out of the VM.
    pub(super) fn remove(&mut self, region: FreshRegion) -> Result<(), Error> {
        let index = self.fresh.iter().position(|(given, _)| *given == region);
        let index = index.ok_or(Error::FreshUnavailable("no such region was given out"))?;
        self.fresh.swap_remove(index).1.unmap()
    }

    /// Takes all fresh memory out of the VM.
    pub(super) fn remove_all(&mut self) -> Result<(), Error> {
        self.fresh.drain(..).map(|(_, ram)| ram.unmap()).fold(Ok(()), Result::and)
    }

    /// The memslots that fresh memory is in.
    pub(super) fn fresh_slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.fresh.iter().flat_map(|(_, ram)| ram.slots()).map(|slot| slot.number)
    }

    /// The VMM's regions and ours, in no order.
    fn all(&self) -> impl Iterator<Item = Range<GuestPhys>> + '_ {
        let theirs = self.memory.iter().map(|region| {
            let start = GuestPhys(region.start_addr().raw_value());
            start..start + region.len()
        });
        theirs.chain(self.fresh.iter().map(|(region, _)| region.at..region.at + region.size))
    }

    /// Whether all bytes are RAM; the first that is not.
    fn check(&self, at: GuestPhys, len: usize) -> Result<(), MemoryError> {
        let end = at.checked_add(len as u64).ok_or(MemoryError::Wraps { at: at.0, len })?;
        let ranges = self.ranges();
        let holding = ranges.iter().find(|range| range.contains(&at));
        match holding {
            Some(range) if range.end >= end => Ok(()),
            Some(range) => Err(MemoryError::NotRam { at: range.end, len }),
            None if len == 0 => Ok(()),
            None => Err(MemoryError::NotRam { at, len }),
        }
    }

    pub(super) fn write(&self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError> {
        self.check(at, bytes.len())?;
        let to = GuestAddress(at.0);
        let done = match self.fresh_at(at) {
            Some(fresh) => write(fresh, to, bytes),
            None => write(&*self.memory, to, bytes),
        };
        done.ok_or(MemoryError::NotRam { at, len: bytes.len() })
    }

    /// Fresh memory lies apart from all RAM, so an access is inside one or the other.
    fn fresh_at(&self, at: GuestPhys) -> Option<&GuestMemoryMmap> {
        let holds = |region: &FreshRegion| at - region.at < region.size;
        self.fresh.iter().find(|(region, _)| holds(region)).map(|(_, ram)| ram.memory())
    }
}

impl<M: GuestMemoryBackend> PhysMemory for Ram<M> {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        let (from, len) = (GuestAddress(at.0), into.len());
        let done = match self.fresh_at(at) {
            Some(fresh) => read(fresh, from, into),
            None => read(&*self.memory, from, into),
        };
        // Which byte is at fault is only looked up when one is.
        match done {
            Some(()) => Ok(()),
            None => self.check(at, len).and(Err(MemoryError::NotRam { at, len })),
        }
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        let mut ranges: Vec<_> = self.all().collect();
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, range| {
            let touches = next.start == range.end;
            if touches {
                range.end = next.end;
            }
            touches
        });
        ranges
    }
}

/// Copies out. Aligned words are read in one go, so that a page-table entry is never half old.
fn read(memory: &impl GuestMemoryBackend, from: GuestAddress, into: &mut [u8]) -> Option<()> {
    match into.len() {
        8 if from.0.is_multiple_of(8) => {
            let word: u64 = memory.load(from, Ordering::Relaxed).ok()?;
            into.copy_from_slice(&word.to_ne_bytes());
            Some(())
        }
        4 if from.0.is_multiple_of(4) => {
            let word: u32 = memory.load(from, Ordering::Relaxed).ok()?;
            into.copy_from_slice(&word.to_ne_bytes());
            Some(())
        }
        _ => memory.read_slice(into, from).ok(),
    }
}

/// Copies in, with the same rule for words.
fn write(memory: &impl GuestMemoryBackend, to: GuestAddress, bytes: &[u8]) -> Option<()> {
    match *bytes {
        [a, b, c, d, e, f, g, h] if to.0.is_multiple_of(8) => {
            memory.store(u64::from_ne_bytes([a, b, c, d, e, f, g, h]), to, Ordering::Relaxed).ok()
        }
        [a, b, c, d] if to.0.is_multiple_of(4) => {
            memory.store(u32::from_ne_bytes([a, b, c, d]), to, Ordering::Relaxed).ok()
        }
        _ => memory.write_slice(bytes, to).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> Ram<GuestMemoryMmap> {
        let regions = [(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000)];
        let far = (GuestAddress(0x1_0000), 0x1000);
        Ram::new(GuestMemoryMmap::from_ranges(&[regions[0], regions[1], far]).unwrap())
    }

    #[test]
    fn neighbours_are_one_range() {
        let ranges = two_regions().ranges();
        let range = |start, end| GuestPhys(start)..GuestPhys(end);
        assert_eq!(ranges, [range(0, 0x3000), range(0x1_0000, 0x1_1000)]);
    }

    #[test]
    fn accesses_are_all_or_nothing() {
        let ram = two_regions();
        ram.write(GuestPhys(0x1ffc), &[7; 8]).unwrap();
        let mut got = [0; 8];
        ram.read(GuestPhys(0x1ffc), &mut got).unwrap();
        assert_eq!(got, [7; 8]);
        let error = ram.write(GuestPhys(0x2ffc), &[9; 8]).unwrap_err();
        assert_eq!(error, MemoryError::NotRam { at: GuestPhys(0x3000), len: 8 });
        ram.read(GuestPhys(0x2ff8), &mut got).unwrap();
        assert_eq!(got, [0; 8]);
        assert!(ram.read(GuestPhys(u64::MAX - 3), &mut got).is_err());
        assert!(ram.read(GuestPhys(0x3000), &mut got).is_err());
    }

    #[test]
    fn words_round_trip() {
        let ram = two_regions();
        ram.write(GuestPhys(8), &0x0123_4567_89ab_cdef_u64.to_le_bytes()).unwrap();
        assert_eq!(ram.read_u64(GuestPhys(8)).unwrap(), 0x0123_4567_89ab_cdef);
        ram.write(GuestPhys(12), &[1, 2, 3, 4]).unwrap();
        assert_eq!(ram.read_u64(GuestPhys(8)).unwrap(), 0x0403_0201_89ab_cdef);
    }
}
