//! Memory as pieces of files: each a guest-physical range and where its bytes lie. What ELF dumps and
//! raw images come down to. Knows nothing of their headers.

use std::ops::Range;

use guest::{GuestPhys, MemoryError, PhysMemory};

use super::storage::Storage;

/// A piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest-physical start.
    pub at: GuestPhys,
    /// Bytes of it in the file.
    pub captured: u64,
    /// Bytes of RAM: what is more than `captured` was left out.
    pub size: u64,
    /// Where its bytes lie, offset in the unflattened file.
    pub offset: u64,
}

/// Memory in one file.
pub(super) struct Segments<B> {
    storage: Storage<B>,
    /// What is in the file: ascending, not empty, without overlap, none ends behind 2^64.
    captured: Vec<Segment>,
    /// RAM whose contents were left out; may overlap with what was captured.
    left_out: Vec<Range<GuestPhys>>,
}

impl<B: AsRef<[u8]>> Segments<B> {
    /// Memory from segments in any order. Where they overlap (QEMU with `paging` lists a page for
    /// each of its mappings, kdump lists the kernel's text twice), the lower one counts.
    pub(super) fn new(storage: Storage<B>, mut segments: Vec<Segment>) -> Self {
        segments.retain(|segment| {
            let size = segment.size.max(segment.captured);
            size > 0 && segment.at.checked_add(size).is_some()
        });
        let mut left_out: Vec<_> = segments
            .iter()
            .filter(|segment| segment.size > segment.captured)
            .map(|segment| segment.at + segment.captured..segment.at + segment.size)
            .collect();
        left_out.sort_unstable_by_key(|range| (range.start, range.end));
        merge(&mut left_out);
        let end = storage.len();
        for segment in &mut segments {
            // A cut file holds less than its headers say; a lying one may say 2^60 bytes.
            segment.captured = segment.captured.min(end.saturating_sub(segment.offset));
        }
        segments.retain(|segment| segment.captured > 0);
        segments.sort_unstable_by_key(|segment| (segment.at, u64::MAX - segment.captured));
        Self { storage, captured: without_overlap(segments), left_out }
    }

    /// Whether there is any memory.
    pub(super) fn is_empty(&self) -> bool {
        self.captured.is_empty()
    }

    /// Bytes of memory in the file.
    pub(super) fn captured(&self) -> u64 {
        self.captured.iter().fold(0, |sum, segment| sum.saturating_add(segment.captured))
    }

    /// Bytes that are claimed to be RAM and are not in the file.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out.iter().fold(0, |sum, range| sum.saturating_add(range.end - range.start))
    }

    fn segment_of(&self, at: GuestPhys) -> Option<&Segment> {
        let after = self.captured.partition_point(|segment| segment.at <= at);
        let segment = self.captured.get(after.checked_sub(1)?)?;
        (at - segment.at < segment.captured).then_some(segment)
    }

    fn is_left_out(&self, at: GuestPhys) -> bool {
        let after = self.left_out.partition_point(|range| range.start <= at);
        after
            .checked_sub(1)
            .and_then(|index| self.left_out.get(index))
            .is_some_and(|it| at < it.end)
    }
}

impl<B: AsRef<[u8]>> PhysMemory for Segments<B> {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len();
        let mut done = 0;
        while done < len {
            let here = at.checked_add(done as u64).ok_or(MemoryError::Wraps { at: at.0, len })?;
            let Some(segment) = self.segment_of(here) else {
                return Err(if self.is_left_out(here) {
                    MemoryError::NotCaptured { at: here }
                } else {
                    MemoryError::NotRam { at: here, len }
                });
            };
            let within = here - segment.at;
            let left = usize::try_from(segment.captured - within).unwrap_or(usize::MAX);
            let part = into
                .get_mut(done..)
                .and_then(|rest| {
                    let part = rest.len().min(left);
                    rest.get_mut(..part)
                })
                .unwrap_or_default();
            done += part.len();
            segment
                .offset
                .checked_add(within)
                .and_then(|offset| self.storage.read(offset, part))
                .ok_or(MemoryError::NotCaptured { at: here })?;
        }
        Ok(())
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        let mut ranges: Vec<_> =
            self.captured.iter().map(|segment| segment.at..segment.at + segment.captured).collect();
        merge(&mut ranges);
        ranges
    }

    fn slice(&self, range: Range<GuestPhys>) -> Option<&[u8]> {
        let segment = self.segment_of(range.start)?;
        let within = range.start - segment.at;
        let len = range.end.0.checked_sub(range.start.0)?;
        if len > segment.captured - within {
            return None;
        }
        self.storage.slice(segment.offset.checked_add(within)?, usize::try_from(len).ok()?)
    }
}

/// Joins ascending ranges that touch or overlap.
fn merge(ranges: &mut Vec<Range<GuestPhys>>) {
    ranges.dedup_by(|next, last| {
        let touches = next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
}

/// From ascending segments, longest first where they start at the same place.
fn without_overlap(segments: Vec<Segment>) -> Vec<Segment> {
    let mut out: Vec<Segment> = Vec::with_capacity(segments.len());
    for mut segment in segments {
        if let Some(last) = out.last_mut() {
            let covered = last.at + last.captured;
            let hidden = covered.0.saturating_sub(segment.at.0);
            if hidden >= segment.captured {
                continue;
            }
            // No overflow: what is hidden lies inside of the segment, and its end in the file.
            segment.at = segment.at + hidden;
            segment.offset = segment.offset.saturating_add(hidden);
            segment.captured -= hidden;
            if covered == segment.at
                && last.offset.checked_add(last.captured) == Some(segment.offset)
            {
                last.captured += segment.captured;
                continue;
            }
        }
        out.push(segment);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn memory(segments: &[(u64, u64, u64, u64)]) -> Segments<Vec<u8>> {
        let file: Vec<u8> = (0..=255).collect();
        let segments = segments
            .iter()
            .map(|&(at, captured, size, offset)| Segment {
                at: GuestPhys(at),
                captured,
                size,
                offset,
            })
            .collect();
        Segments::new(Storage::new(file).unwrap(), segments)
    }

    #[test]
    fn reads_cross_pieces_and_say_what_is_missing() {
        let memory = memory(&[(0x1010, 0x10, 0x20, 0x40), (0x1000, 0x10, 0x10, 0x10)]);
        let mut bytes = [0; 4];
        memory.read(GuestPhys(0x100e), &mut bytes).unwrap();
        assert_eq!(bytes, [0x1e, 0x1f, 0x40, 0x41]);
        let missing = MemoryError::NotCaptured { at: GuestPhys(0x1020) };
        assert_eq!(memory.read(GuestPhys(0x101e), &mut bytes), Err(missing));
        let none = MemoryError::NotRam { at: GuestPhys(0x1030), len: 4 };
        assert_eq!(memory.read(GuestPhys(0x1030), &mut bytes), Err(none));
        assert_eq!(memory.ranges(), [GuestPhys(0x1000)..GuestPhys(0x1020)]);
        assert_eq!((memory.captured(), memory.left_out()), (0x20, 0x10));
    }

    #[test]
    fn the_same_bytes_listed_many_times_are_one_piece() {
        let memory = memory(&[(0, 64, 64, 0), (16, 16, 16, 16), (32, 64, 64, 32), (0, 8, 8, 0)]);
        assert_eq!(
            memory.captured,
            [Segment { at: GuestPhys(0), captured: 96, size: 64, offset: 0 }]
        );
        assert_eq!(memory.slice(GuestPhys(60)..GuestPhys(70)).map(|it| it[0]), Some(60));
    }

    proptest! {
        #[test]
        fn any_segments_are_survived(
            segments in proptest::collection::vec(
                prop_oneof![
                    (0u64..300, 0u64..300, 0u64..300, 0u64..300),
                    (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()),
                ], 0..12),
            at in 0u64..600,
        ) {
            let memory = memory(&segments);
            let ranges = memory.ranges();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            for range in &ranges {
                prop_assert!(range.start < range.end);
                prop_assert!(memory.read(range.start, &mut [0]).is_ok());
                prop_assert!(memory.read(GuestPhys(range.end.0 - 1), &mut [0]).is_ok());
            }
            // A byte is the one of some segment that has it.
            let mut byte = [0];
            let honest = |&(start, captured, _, offset): &(u64, u64, u64, u64)| {
                let within = at.checked_sub(start)?;
                let from = offset.checked_add(within)?;
                (within < captured && from < 256).then_some(from as u8)
            };
            if memory.read(GuestPhys(at), &mut byte).is_ok() {
                prop_assert!(segments.iter().filter_map(honest).any(|it| it == byte[0]));
            }
            let _ = memory.read(GuestPhys(u64::MAX - 3), &mut [0; 8]);
        }
    }
}
