//! The flattened format: records of (offset, size, data) in the order they were written, which is not
//! ascending, a later record taking the place of an earlier one. Makes the index only; what is in the
//! file that results is not known here.
//!
//! Written by `makedumpfile -F` and by QEMU's `dump-guest-memory` for every kdump format
//! (`struct makedumpfile_header` in makedumpfile.h; `write_start_flat_header()` in QEMU's dump/dump.c).

use std::collections::BTreeMap;

use super::Error;
use super::storage::Extent;

/// `MAKEDUMPFILE_SIGNATURE`, 16 bytes with its padding.
const SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";
/// `TYPE_FLAT_HEADER`, big-endian like all numbers of this format.
const TYPE: u64 = 1;
/// The header fills this many bytes (`MAX_SIZE_MDF_HEADER`).
const HEADER: usize = 4096;
/// Offset and size of a record (`struct makedumpfile_data_header`).
const RECORD: usize = 16;
/// `END_FLAG_FLAT_HEADER`: -1 as offset and size.
const END: u64 = u64::MAX;

/// Whether a file is in the flattened format.
pub(super) fn is_flattened(file: &[u8]) -> bool {
    file.starts_with(SIGNATURE)
}

/// The extents of the unflattened file, ascending and without overlap, and whether the stream has its
/// end mark. A record that runs behind the end of the file counts for what is there.
pub(super) fn extents(file: &[u8]) -> Result<(Vec<Extent>, bool), Error> {
    let kind = word(file, 16).ok_or(Error::Truncated { what: "flattened header", at: 0 })?;
    if kind != TYPE {
        return Err(Error::BadHeader { what: "type of the flattened format", found: kind });
    }
    let mut records = Vec::new();
    let mut pos = HEADER;
    let mut ended = false;
    while let (Some(at), Some(size)) = (word(file, pos), word(file, pos.saturating_add(8))) {
        if at == END {
            ended = true;
            break;
        }
        let from = pos.saturating_add(RECORD);
        let len = size.min(file.len().saturating_sub(from) as u64);
        // Offsets are signed 64-bit numbers; a record that wraps is damage.
        if len > 0 && i64::try_from(at).is_ok() {
            records.push(Extent { at, from: from as u64, len });
        }
        let Some(next) = usize::try_from(size).ok().and_then(|size| from.checked_add(size)) else {
            break;
        };
        pos = next;
    }
    Ok((without_overlap(records), ended))
}

fn word(file: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(file.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Later records win. Records of real files hardly ever overlap (makedumpfile writes the main header
/// twice), so that sorting mostly is all there is to do.
fn without_overlap(records: Vec<Extent>) -> Vec<Extent> {
    let mut sorted = records.clone();
    sorted.sort_by_key(|record| record.at);
    let overlaps = sorted.windows(2).any(|pair| match pair {
        [a, b] => a.at.saturating_add(a.len) > b.at,
        _ => false,
    });
    if !overlaps {
        return joined(sorted);
    }
    let mut map = BTreeMap::new();
    for record in records {
        insert(&mut map, record);
    }
    joined(map.into_values().collect())
}

/// Puts `new` over what is there. Each record is cut in at most two places, so that the work is bounded
/// by the number of records.
fn insert(map: &mut BTreeMap<u64, Extent>, new: Extent) {
    let end = new.at.saturating_add(new.len);
    while let Some(old) = map.range(..end).next_back().map(|(_, old)| *old) {
        let old_end = old.at.saturating_add(old.len);
        if old_end <= new.at {
            break;
        }
        map.remove(&old.at);
        if old_end > end {
            let cut = end - old.at;
            let rest = Extent { at: end, from: old.from.saturating_add(cut), len: old_end - end };
            map.insert(rest.at, rest);
        }
        if old.at < new.at {
            map.insert(old.at, Extent { len: new.at - old.at, ..old });
        }
    }
    map.insert(new.at, new);
}

/// Joins extents that follow each other in both files.
fn joined(extents: Vec<Extent>) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match out.last_mut() {
            Some(last)
                if last.at.checked_add(last.len) == Some(extent.at)
                    && last.from.checked_add(last.len) == Some(extent.from) =>
            {
                last.len += extent.len;
            }
            _ => out.push(extent),
        }
    }
    out
}

/// Writing flattened files, with numbers of its own.
#[cfg(test)]
pub(super) mod testing {
    /// The header.
    pub(in crate::dump) fn start() -> Vec<u8> {
        let mut file = b"makedumpfile".to_vec();
        file.resize(16, 0);
        file.extend([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        file.resize(0x1000, 0);
        file
    }

    /// One record.
    pub(in crate::dump) fn record(file: &mut Vec<u8>, at: u64, data: &[u8]) {
        file.extend(at.to_be_bytes());
        file.extend((data.len() as u64).to_be_bytes());
        file.extend(data);
    }

    /// The end mark.
    pub(in crate::dump) fn end(file: &mut Vec<u8>) {
        file.extend([0xff; 16]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing;
    use crate::dump::storage::Storage;

    proptest! {
        #[test]
        fn the_last_writer_of_a_byte_wins(
            records in proptest::collection::vec(
                (0u64..200, proptest::collection::vec(1u8.., 0..40)), 0..20),
            cut in proptest::option::of(0usize..2000),
        ) {
            let mut file = testing::start();
            let mut model = vec![None; 256];
            for (at, data) in &records {
                testing::record(&mut file, *at, data);
                for (offset, byte) in data.iter().enumerate() {
                    model[*at as usize + offset] = Some(*byte);
                }
            }
            testing::end(&mut file);
            let whole = Storage::new(file.clone()).unwrap();
            prop_assert!(!whole.is_cut());
            for (at, byte) in model.iter().enumerate() {
                prop_assert_eq!(whole.array::<1>(at as u64).map(|[byte]| byte), *byte);
            }
            let mut all = vec![9; 256];
            whole.read_sparse(0, &mut all);
            let zeroed: Vec<u8> = model.iter().map(|byte| byte.unwrap_or(0)).collect();
            prop_assert_eq!(all, zeroed);
            if let Some(cut) = cut {
                file.truncate(4096 + cut);
                let part = Storage::new(file).unwrap();
                prop_assert!(part.len() <= whole.len());
            }
        }

        #[test]
        fn any_bytes_are_survived(tail in proptest::collection::vec(any::<u8>(), 0..200), at: u64) {
            let mut file = testing::start();
            file.extend(tail);
            let storage = Storage::new(file).unwrap();
            let _ = (storage.read(at, &mut [0; 40]), storage.len());
            storage.read_sparse(at, &mut [0; 40]);
        }
    }
}
