//! A bitmap of page frames in a file, one bit a page, and how many bits are set before a given one.
//! Knows nothing of what the bits stand for.

use std::ops::Range;

use super::Error;
use super::storage::Storage;

/// Bits per count that is kept: 8 bytes of memory for 16 MiB of RAM.
const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = (BLOCK / 8) as usize;
/// More ranges of RAM than any memory map has.
const MAX_RANGES: usize = 1 << 20;

/// Where a bitmap lies.
#[derive(Clone, Copy)]
pub(super) struct Bitmap {
    /// Offset in the unflattened file.
    pub offset: u64,
    /// Number of bits.
    pub bits: u64,
}

impl Bitmap {
    /// The bits of block `index`, those behind the end cleared.
    fn block<B: AsRef<[u8]>>(self, storage: &Storage<B>, index: u64) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        let start = index.saturating_mul(BLOCK);
        storage.read_sparse(self.offset.saturating_add(start / 8), &mut bytes);
        let valid = self.bits.saturating_sub(start).min(BLOCK);
        if valid < BLOCK {
            let (whole, rest) = ((valid / 8) as usize, (valid % 8) as u8);
            for byte in bytes.iter_mut().skip(whole + 1) {
                *byte = 0;
            }
            if let Some(byte) = bytes.get_mut(whole) {
                *byte &= (1 << rest) - 1;
            }
        }
        bytes
    }

    fn blocks(self) -> u64 {
        self.bits.div_ceil(BLOCK)
    }

    /// The runs of set bits, ascending.
    pub(super) fn runs<B: AsRef<[u8]>>(
        self,
        storage: &Storage<B>,
    ) -> Result<Vec<Range<u64>>, Error> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for index in 0..self.blocks() {
            let bytes = self.block(storage, index);
            for (word, bytes) in bytes.chunks_exact(8).enumerate() {
                let mut bits = bytes.try_into().map_or(0, u64::from_le_bytes);
                let mut base = index * BLOCK + word as u64 * 64;
                while bits != 0 {
                    let skip = bits.trailing_zeros();
                    bits >>= skip;
                    base += u64::from(skip);
                    let run = u64::from(bits.trailing_ones());
                    match runs.last_mut() {
                        Some(last) if last.end == base => last.end += run,
                        _ => runs.push(base..base + run),
                    }
                    base += run;
                    bits = if run == 64 { 0 } else { bits >> run };
                }
            }
            if runs.len() > MAX_RANGES {
                let (found, limit) = (runs.len() as u64, MAX_RANGES as u64);
                return Err(Error::TooMany { what: "ranges of RAM", found, limit });
            }
        }
        Ok(runs)
    }
}

/// Number of set bits before each block.
pub(super) struct Ranks {
    bitmap: Bitmap,
    before: Vec<u64>,
    total: u64,
}

impl Ranks {
    /// Counts. The caller has checked that the bitmap is no longer than the file.
    pub(super) fn new<B: AsRef<[u8]>>(storage: &Storage<B>, bitmap: Bitmap) -> Self {
        let mut before = Vec::new();
        let mut total = 0;
        for index in 0..bitmap.blocks() {
            before.push(total);
            total += ones(&bitmap.block(storage, index));
        }
        Self { bitmap, before, total }
    }

    /// Number of set bits before `bit`, when it is set itself.
    pub(super) fn position<B: AsRef<[u8]>>(&self, storage: &Storage<B>, bit: u64) -> Option<u64> {
        let (whole, rest) = place(bit);
        let bytes = self.bitmap.block(storage, bit / BLOCK);
        let is_set = bytes.get(whole).is_some_and(|byte| byte >> rest & 1 == 1);
        (is_set && bit < self.bitmap.bits).then(|| self.count(&bytes, bit))
    }

    /// Number of set bits before `bit`.
    pub(super) fn rank<B: AsRef<[u8]>>(&self, storage: &Storage<B>, bit: u64) -> u64 {
        if bit >= self.bitmap.bits {
            return self.total;
        }
        self.count(&self.bitmap.block(storage, bit / BLOCK), bit)
    }

    fn count(&self, block: &[u8; BLOCK_BYTES], bit: u64) -> u64 {
        let (whole, rest) = place(bit);
        let index = usize::try_from(bit / BLOCK).ok();
        let before = index.and_then(|index| self.before.get(index)).copied().unwrap_or(self.total);
        let last = block.get(whole).map_or(0, |byte| byte & ((1 << rest) - 1));
        before + ones(block.get(..whole).unwrap_or_default()) + u64::from(last.count_ones())
    }
}

/// Byte in its block, and bit in that byte.
fn place(bit: u64) -> (usize, u8) {
    ((bit % BLOCK / 8) as usize, (bit % 8) as u8)
}

fn ones(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8);
    let rest: u32 = words.remainder().iter().map(|byte| byte.count_ones()).sum();
    let whole = words.map(|word| word.try_into().map_or(0, u64::from_le_bytes).count_ones());
    u64::from(whole.sum::<u32>() + rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranks_and_runs_agree_with_single_bits(
            runs in proptest::collection::vec((0usize..2000, 1usize..900), 0..12),
            offset in 0u64..20,
            bits in 0u64..13_000,
        ) {
            let mut file = vec![0xff; offset as usize];
            let mut model = vec![false; 16_384];
            let mut at = 0;
            for (gap, len) in runs {
                at += gap;
                let end = (at + len).min(model.len());
                if at < end {
                    model[at..end].fill(true);
                }
                at += len;
            }
            file.extend(model.chunks(8).map(|bits| {
                bits.iter().enumerate().fold(0u8, |byte, (at, bit)| byte | u8::from(*bit) << at)
            }));
            model[bits as usize..].fill(false);
            let storage = Storage::new(file).unwrap();
            let bitmap = Bitmap { offset, bits };
            let ranks = Ranks::new(&storage, bitmap);
            let mut before = 0;
            for (bit, set) in model.iter().enumerate() {
                prop_assert_eq!(ranks.rank(&storage, bit as u64), before);
                prop_assert_eq!(ranks.position(&storage, bit as u64), set.then_some(before));
                before += u64::from(*set);
            }
            prop_assert_eq!(ranks.rank(&storage, u64::MAX), before);
            let runs = bitmap.runs(&storage).unwrap();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let mut again = vec![false; model.len()];
            for run in runs {
                again[run.start as usize..run.end as usize].fill(true);
            }
            prop_assert_eq!(again, model);
        }
    }
}
