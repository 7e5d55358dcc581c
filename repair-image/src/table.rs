//! Sorted tables of records in compressed chunks: a sparse index over columns of varints, each chunk unpacked at
//! its first use and kept. Which records there are is in `record.rs`.

use std::sync::OnceLock;

use rayon::prelude::*;

use crate::file::Span;

/// Bytes of one index entry: key (u64), offset of the chunk (u32), number of its first record (u32).
const INDEX_ENTRY: usize = 16;
/// Largest unpacked chunk that is believed, bytes.
const MAX_CHUNK: usize = 8 << 20;
/// Compression level of chunks: above it, time doubles for 2 % of size.
const LEVEL: i32 = 9;
/// Compression level of whole sections.
const LEVEL_HARD: i32 = 13;

/// Columns of unsigned and signed numbers, written as varints (LEB128, zigzag).
#[derive(Debug)]
pub(crate) struct Columns(Vec<Vec<u8>>);

impl Columns {
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![Vec::new(); count])
    }

    pub(crate) fn push(&mut self, column: usize, mut value: u64) {
        let Some(out) = self.0.get_mut(column) else { return };
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    pub(crate) fn push_signed(&mut self, column: usize, value: i64) {
        self.push(column, (value << 1 ^ value >> 63) as u64);
    }

    pub(crate) fn push_bytes(&mut self, column: usize, bytes: &[u8]) {
        if let Some(out) = self.0.get_mut(column) {
            out.extend_from_slice(bytes);
        }
    }

    /// The columns one after the other, each with its length before it.
    pub(crate) fn finish(self) -> Vec<u8> {
        let mut out = Vec::new();
        for column in self.0 {
            out.extend((column.len() as u32).to_le_bytes());
            out.extend(column);
        }
        out
    }
}

/// Reads [`Columns`] back. `None` at the end of a column.
#[derive(Debug)]
pub(crate) struct Reader<'a>(Vec<&'a [u8]>);

impl<'a> Reader<'a> {
    pub(crate) fn new(mut bytes: &'a [u8], count: usize) -> Option<Self> {
        let mut columns = Vec::with_capacity(count);
        for _ in 0..count {
            let (len, rest) = bytes.split_first_chunk::<4>()?;
            let (column, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            columns.push(column);
            bytes = rest;
        }
        Some(Self(columns))
    }

    pub(crate) fn next(&mut self, column: usize) -> Option<u64> {
        let bytes = self.0.get_mut(column)?;
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    pub(crate) fn next_u32(&mut self, column: usize) -> Option<u32> {
        u32::try_from(self.next(column)?).ok()
    }

    pub(crate) fn next_signed(&mut self, column: usize) -> Option<i64> {
        let value = self.next(column)?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    pub(crate) fn next_bytes(&mut self, column: usize, len: usize) -> Option<&'a [u8]> {
        let bytes = self.0.get_mut(column)?;
        let (taken, rest) = bytes.split_at_checked(len)?;
        *bytes = rest;
        Some(taken)
    }
}

/// A record of a table.
pub(crate) trait Record: Sized + Send + Sync {
    /// Number of columns.
    const COLUMNS: usize;
    /// Records of one chunk.
    const PER_CHUNK: usize;

    /// What the table is sorted by; `number` is the record's place in the table.
    fn key(&self, number: usize) -> u64;

    /// Writes the records of one chunk, whose first has this number.
    fn encode(records: &[Self], first: usize, columns: &mut Columns);

    /// Reads `count` records of one chunk, whose first has this key and number.
    fn decode(reader: &mut Reader<'_>, count: usize, key: u64, first: usize) -> Option<Vec<Self>>;
}

/// The bytes of a table of these records, which are sorted by key.
pub(crate) fn encode<R: Record>(records: &[R]) -> Vec<u8> {
    let chunks: Vec<(u64, Vec<u8>)> = records
        .par_chunks(R::PER_CHUNK)
        .enumerate()
        .map(|(index, chunk)| {
            let first = index * R::PER_CHUNK;
            let mut columns = Columns::new(R::COLUMNS);
            R::encode(chunk, first, &mut columns);
            (chunk.first().map_or(0, |record| record.key(first)), compress(&columns.finish()))
        })
        .collect();
    let mut out = Vec::new();
    out.extend((chunks.len() as u32).to_le_bytes());
    out.extend((records.len() as u32).to_le_bytes());
    let mut offset = 0u32;
    for (index, (key, data)) in chunks.iter().enumerate() {
        out.extend(key.to_le_bytes());
        out.extend(offset.to_le_bytes());
        out.extend(((index * R::PER_CHUNK) as u32).to_le_bytes());
        offset += data.len() as u32;
    }
    out.extend(chunks.into_iter().flat_map(|(_, data)| data));
    out
}

/// Compresses; the unpacked length stands before the data.
pub(crate) fn compress(bytes: &[u8]) -> Vec<u8> {
    compress_at(LEVEL, bytes)
}

/// Compresses one large piece that is unpacked rarely, as well as a second allows.
pub(crate) fn compress_hard(bytes: &[u8]) -> Vec<u8> {
    compress_at(LEVEL_HARD, bytes)
}

fn compress_at(level: i32, bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u32).to_le_bytes().to_vec();
    // Compressing to memory fails only when memory runs out; then the data is kept as it is, which
    // `unpack` tells apart by the length.
    match zstd::bulk::compress(bytes, level) {
        Ok(packed) if packed.len() < bytes.len() => out.extend(packed),
        _ => out.extend(bytes),
    }
    out
}

/// Reverses [`compress`]; `None` when the data is damaged or larger than `max` bytes.
pub(crate) fn unpack(bytes: &[u8], max: usize) -> Option<Vec<u8>> {
    let (len, packed) = bytes.split_first_chunk::<4>()?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > max {
        return None;
    }
    if packed.len() == len {
        return Some(packed.to_vec());
    }
    zstd::bulk::decompress(packed, len).ok().filter(|bytes| bytes.len() == len)
}

/// A table in a knowledge file. A damaged chunk reads as empty: the file's checksum was right, so it was made so.
#[derive(Debug)]
pub(crate) struct Table<R> {
    bytes: Span,
    chunks: Vec<OnceLock<Vec<R>>>,
    len: usize,
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self { bytes: Span::default(), chunks: Vec::new(), len: 0 }
    }
}

impl<R: Record> Table<R> {
    /// The table in a section; an empty section is an empty table.
    pub(crate) fn new(bytes: Span) -> Option<Self> {
        if bytes.is_empty() {
            return Some(Self::default());
        }
        let word =
            |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk::<4>()?) as usize);
        let (count, len) = (word(0)?, word(4)?);
        if count.checked_mul(INDEX_ENTRY)? > bytes.len() || len > count.checked_mul(R::PER_CHUNK)? {
            return None;
        }
        let chunks = std::iter::repeat_with(OnceLock::new).take(count).collect();
        Some(Self { bytes, chunks, len })
    }

    /// Number of records.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn index(&self, chunk: usize) -> Option<(u64, usize, usize)> {
        let entry = self.bytes.get(8 + chunk * INDEX_ENTRY..)?.first_chunk::<INDEX_ENTRY>()?;
        let (key, rest) = entry.split_first_chunk::<8>()?;
        let (offset, first) = rest.split_first_chunk::<4>()?;
        let first = u32::from_le_bytes(first.try_into().ok()?) as usize;
        Some((u64::from_le_bytes(*key), u32::from_le_bytes(*offset) as usize, first))
    }

    fn unpacked(&self, chunk: usize) -> Option<Vec<R>> {
        let (key, offset, first) = self.index(chunk)?;
        let data = self.bytes.get(8 + self.chunks.len() * INDEX_ENTRY..)?;
        let end = self.index(chunk + 1).filter(|_| chunk + 1 < self.chunks.len());
        let data = data.get(offset..end.map_or(data.len(), |end| end.1))?;
        let bytes = unpack(data, MAX_CHUNK)?;
        let count = self.len.checked_sub(chunk * R::PER_CHUNK)?.min(R::PER_CHUNK);
        R::decode(&mut Reader::new(&bytes, R::COLUMNS)?, count, key, first)
    }

    fn chunk(&self, chunk: usize) -> &[R] {
        let Some(cell) = self.chunks.get(chunk) else { return &[] };
        cell.get_or_init(|| self.unpacked(chunk).unwrap_or_default())
    }

    /// The record of that number.
    pub(crate) fn get(&self, number: usize) -> Option<&R> {
        self.chunk(number / R::PER_CHUNK).get(number % R::PER_CHUNK)
    }

    /// Number of chunks whose first key fulfils `before`, which holds for a prefix of the keys.
    fn chunks_before(&self, before: impl Fn(u64) -> bool) -> usize {
        let (mut low, mut high) = (0, self.chunks.len());
        while low < high {
            let middle = low.midpoint(high);
            match self.index(middle) {
                Some((key, _, _)) if before(key) => low = middle + 1,
                _ => high = middle,
            }
        }
        low
    }

    /// Number of the first record that does not fulfil `before`. `before` must hold for a prefix of the table, and
    /// `key_before` must be the same question, asked of a key alone, answered true in doubt.
    pub(crate) fn partition_point(
        &self,
        key_before: impl Fn(u64) -> bool,
        before: impl Fn(&R) -> bool,
    ) -> usize {
        let mut after = self.chunks_before(key_before);
        while let Some(chunk) = after.checked_sub(1) {
            let inside = self.chunk(chunk).partition_point(&before);
            if inside > 0 {
                return chunk * R::PER_CHUNK + inside;
            }
            after = chunk;
        }
        0
    }

    /// The last record whose key is not above `key`, with its number.
    pub(crate) fn last_up_to(&self, key: u64) -> Option<(usize, &R)> {
        let chunk = self.chunks_before(|first| first <= key).checked_sub(1)?;
        let records = self.chunk(chunk);
        let base = chunk * R::PER_CHUNK;
        let (mut low, mut high) = (0, records.len());
        while low < high {
            let middle = low.midpoint(high);
            match records.get(middle) {
                Some(record) if record.key(base + middle) <= key => low = middle + 1,
                _ => high = middle,
            }
        }
        let inside = low.checked_sub(1)?;
        Some((base + inside, records.get(inside)?))
    }

    /// All records, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &R> {
        (0..self.chunks.len()).flat_map(|chunk| self.chunk(chunk))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::UnwindRow;
    use crate::record::{
        FileRecord, FunctionRecord, LineRecord, NameRecord, ScopeRecord, SymbolRecord, UnwindRecord,
    };

    fn decode_all<R: Record>(bytes: &[u8]) {
        if let Some(mut reader) = Reader::new(bytes, R::COLUMNS) {
            let _ = R::decode(&mut reader, 16, 0, 0);
        }
    }

    proptest! {
        #[test]
        fn varints_come_back(values in proptest::collection::vec(any::<i64>(), 0..50)) {
            let mut columns = Columns::new(2);
            for &value in &values {
                columns.push_signed(1, value);
                columns.push(0, value as u64);
            }
            let bytes = columns.finish();
            let mut reader = Reader::new(&bytes, 2).unwrap();
            for &value in &values {
                prop_assert_eq!(reader.next_signed(1), Some(value));
                prop_assert_eq!(reader.next(0), Some(value as u64));
            }
            prop_assert_eq!(reader.next(0), None);
        }

        #[test]
        fn lines_come_back(raw in proptest::collection::vec(any::<(u8, u16, u8, u32, u8)>(), 0..3000)) {
            let mut at = 0xffff_ffff_8100_0000;
            let records: Vec<LineRecord> = raw
                .iter()
                .map(|&(step, scope, file, line, column)| {
                    at += u64::from(step) + 1;
                    let (scope, file, column) = (scope.into(), file.into(), column.into());
                    LineRecord { at, scope, file, line, column }
                })
                .collect();
            let bytes = crate::file::pack(&[(".defib.t", encode(&records))]).unwrap();
            let file = crate::file::KnowledgeFile::of_bytes(bytes).unwrap();
            let table: Table<LineRecord> = Table::new(file.section(".defib.t")).unwrap();
            prop_assert!(table.iter().eq(&records));
            for (number, record) in records.iter().enumerate() {
                prop_assert_eq!(table.last_up_to(record.at), Some((number, record)));
            }
        }

        #[test]
        fn any_chunk_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            decode_all::<NameRecord>(&bytes);
            decode_all::<SymbolRecord>(&bytes);
            decode_all::<UnwindRecord>(&bytes);
            decode_all::<UnwindRow>(&bytes);
            decode_all::<LineRecord>(&bytes);
            decode_all::<ScopeRecord>(&bytes);
            decode_all::<FunctionRecord>(&bytes);
            decode_all::<FileRecord>(&bytes);
            let _ = unpack(&bytes, 1 << 16);
        }
    }
}
