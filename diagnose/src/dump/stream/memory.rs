//! Guest-physical memory of a stream: pieces of RAM on one side, pages of the file on the other.

use std::ops::Range;

use guest::{GuestPhys, MemoryError, PhysMemory};

use super::board::Piece;
use super::runs::{PAGE, Place, Runs};
use crate::dump::by_page::by_page;
use crate::dump::storage::Storage;

/// Memory in a stream. Pages that were not sent are not captured.
pub(in crate::dump) struct Memory<B> {
    storage: Storage<B>,
    runs: Runs,
    /// Ascending, without overlap.
    pieces: Vec<Piece>,
    /// What of them is in the file.
    ranges: Vec<Range<GuestPhys>>,
}

impl<B: AsRef<[u8]>> Memory<B> {
    pub(super) fn new(storage: Storage<B>, runs: Runs, pieces: Vec<Piece>) -> Self {
        let mut ranges: Vec<Range<GuestPhys>> = Vec::new();
        for piece in &pieces {
            let address = |page: u32| piece.at + u64::from(page - piece.first) * PAGE;
            let end = piece.first.saturating_add(piece.pages);
            for (from, to) in runs.within(piece.first, end) {
                match ranges.last_mut() {
                    Some(last) if last.end == address(from) => last.end = address(to),
                    _ => ranges.push(address(from)..address(to)),
                }
            }
        }
        Self { storage, runs, pieces, ranges }
    }

    /// Bytes of RAM.
    pub(in crate::dump) fn ram(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.size()).sum()
    }

    /// Bytes of RAM in the file.
    pub(in crate::dump) fn captured(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Whether the file is in makedumpfile's flattened form.
    pub(in crate::dump) fn is_flattened(&self) -> bool {
        self.storage.is_flattened()
    }

    /// The stream's number of the page at an address; `None` where no RAM is.
    fn page(&self, at: GuestPhys) -> Option<u32> {
        let after = self.pieces.partition_point(|piece| piece.at <= at);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        let page = u32::try_from((at - piece.at) / PAGE).ok()?;
        (page < piece.pages).then(|| piece.first.saturating_add(page))
    }

    fn read_in_page(&self, at: GuestPhys, into: &mut [u8], len: usize) -> Result<(), MemoryError> {
        let page = self.page(at).ok_or(MemoryError::NotRam { at, len })?;
        let missing = MemoryError::NotCaptured { at };
        match self.runs.find(page).ok_or(missing)? {
            Place::At(offset) => self.storage.read(offset + at.0 % PAGE, into).ok_or(missing),
            Place::Filled(byte) => {
                into.fill(byte);
                Ok(())
            }
            Place::Unread => Err(missing),
        }
    }
}

impl<B: AsRef<[u8]>> PhysMemory for Memory<B> {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        by_page(PAGE, at, into, |at, part, len| self.read_in_page(at, part, len))
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        self.ranges.clone()
    }
}
