//! The records of a knowledge file and their columns. How chunks of them are packed is in `table.rs`, what they mean to
//! a caller in `knowledge.rs`.

use guest::Reg;

use crate::table::{Columns, Reader, Record};
use crate::{CfaRule, FrameKind, RowSource, SavedRule, SymbolKind, UnwindRow};

/// A string, and the symbols that have it as their name. Sorted by text.
#[derive(Clone, Debug, Default)]
pub(crate) struct NameRecord {
    pub(crate) text: Box<str>,
    pub(crate) symbols: Vec<u32>,
}

/// The first eight bytes of a string as a number that sorts as the string does.
pub(crate) fn name_key(text: &str) -> u64 {
    let mut first = [0; 8];
    for (to, from) in first.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    u64::from_be_bytes(first)
}

impl Record for NameRecord {
    const COLUMNS: usize = 5;
    const PER_CHUNK: usize = 512;

    fn key(&self, _number: usize) -> u64 {
        name_key(&self.text)
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        let mut before: &str = "";
        for NameRecord { text, symbols } in records {
            let same = before.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
            columns.push(0, same as u64);
            columns.push(1, (text.len() - same) as u64);
            columns.push_bytes(2, text.as_bytes().get(same..).unwrap_or(&[]));
            columns.push(3, symbols.len() as u64);
            for &symbol in symbols {
                columns.push(4, u64::from(symbol));
            }
            before = text;
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, _: u64, _: usize) -> Option<Vec<Self>> {
        let mut records = Vec::with_capacity(count);
        let mut bytes = Vec::new();
        for _ in 0..count {
            bytes.truncate(reader.next(0)? as usize);
            let more = reader.next(1)? as usize;
            bytes.extend_from_slice(reader.next_bytes(2, more)?);
            let mut symbols = Vec::new();
            for _ in 0..reader.next(3)? {
                symbols.push(reader.next_u32(4)?);
            }
            records.push(NameRecord { text: std::str::from_utf8(&bytes).ok()?.into(), symbols });
        }
        Some(records)
    }
}

/// A symbol. Sorted by address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SymbolRecord {
    pub(crate) at: u64,
    pub(crate) size: u64,
    pub(crate) kind: SymbolKind,
    /// Number of its name.
    pub(crate) name: u32,
}

impl Record for SymbolRecord {
    const COLUMNS: usize = 3;
    const PER_CHUNK: usize = 512;

    fn key(&self, _number: usize) -> u64 {
        self.at
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        let mut before = records.first().map_or(0, |record| record.at);
        for record in records {
            columns.push(0, record.at.wrapping_sub(before));
            columns.push(1, record.size);
            let object = u64::from(record.kind == SymbolKind::Object);
            columns.push(2, u64::from(record.name) << 1 | object);
            before = record.at;
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, key: u64, _: usize) -> Option<Vec<Self>> {
        let mut at = key;
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            at = at.wrapping_add(reader.next(0)?);
            let size = reader.next(1)?;
            let name = reader.next(2)?;
            let kind = if name & 1 == 1 { SymbolKind::Object } else { SymbolKind::Function };
            records.push(Self { at, size, kind, name: u32::try_from(name >> 1).ok()? });
        }
        Some(records)
    }
}

/// From which address on which unwind row holds. Sorted by address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnwindRecord {
    pub(crate) at: u64,
    /// Number of the row plus one; 0 = nothing is known from here on.
    pub(crate) row: u32,
}

impl Record for UnwindRecord {
    const COLUMNS: usize = 2;
    const PER_CHUNK: usize = 1024;

    fn key(&self, _number: usize) -> u64 {
        self.at
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        let mut before = records.first().map_or(0, |record| record.at);
        for record in records {
            columns.push(0, record.at.wrapping_sub(before));
            columns.push(1, u64::from(record.row));
            before = record.at;
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, key: u64, _: usize) -> Option<Vec<Self>> {
        let mut at = key;
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            at = at.wrapping_add(reader.next(0)?);
            records.push(Self { at, row: reader.next_u32(1)? });
        }
        Some(records)
    }
}

fn push_saved(columns: &mut Columns, rule: SavedRule) {
    match rule {
        SavedRule::Unknown => columns.push(2, 0),
        SavedRule::Same => columns.push(2, 1),
        SavedRule::AtCfa(offset) => {
            columns.push(2, 2);
            columns.push_signed(3, i64::from(offset));
        }
    }
}

fn next_saved(reader: &mut Reader<'_>) -> Option<SavedRule> {
    Some(match reader.next(2)? {
        0 => SavedRule::Unknown,
        1 => SavedRule::Same,
        2 => SavedRule::AtCfa(i32::try_from(reader.next_signed(3)?).ok()?),
        _ => return None,
    })
}

fn next_cfa(reader: &mut Reader<'_>) -> Option<CfaRule> {
    let kind = reader.next(1)?;
    if kind == 0 {
        return Some(CfaRule::Unknown);
    }
    let reg = *Reg::ALL.get(usize::try_from(reader.next(1)?).ok()?)?;
    let inner = i32::try_from(reader.next_signed(3)?).ok()?;
    Some(match kind {
        1 => CfaRule::Offset { reg, offset: inner },
        2 => {
            let outer = i32::try_from(reader.next_signed(3)?).ok()?;
            CfaRule::Deref { reg, inner, outer }
        }
        _ => return None,
    })
}

/// Columns: kind and source, CFA, kinds of saved rules, offsets.
impl Record for UnwindRow {
    const COLUMNS: usize = 4;
    const PER_CHUNK: usize = 4096;

    fn key(&self, number: usize) -> u64 {
        number as u64
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        for row in records {
            let kind = match row.kind {
                FrameKind::Call => 0,
                FrameKind::Regs => 1,
                FrameKind::PartialRegs => 2,
                FrameKind::End => 3,
            };
            columns.push(0, kind << 1 | u64::from(row.source == RowSource::Cfi));
            match row.cfa {
                CfaRule::Unknown => columns.push(1, 0),
                CfaRule::Offset { reg, offset } => {
                    columns.push(1, 1);
                    columns.push(1, reg as u64);
                    columns.push_signed(3, i64::from(offset));
                }
                CfaRule::Deref { reg, inner, outer } => {
                    columns.push(1, 2);
                    columns.push(1, reg as u64);
                    columns.push_signed(3, i64::from(inner));
                    columns.push_signed(3, i64::from(outer));
                }
            }
            row.saved.iter().for_each(|&rule| push_saved(columns, rule));
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, _: u64, _: usize) -> Option<Vec<Self>> {
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            let flags = reader.next(0)?;
            let kind = match flags >> 1 {
                0 => FrameKind::Call,
                1 => FrameKind::Regs,
                2 => FrameKind::PartialRegs,
                3 => FrameKind::End,
                _ => return None,
            };
            let source = if flags & 1 == 1 { RowSource::Cfi } else { RowSource::Orc };
            let cfa = next_cfa(reader)?;
            let mut saved = [SavedRule::Unknown; 6];
            for rule in &mut saved {
                *rule = next_saved(reader)?;
            }
            records.push(Self { kind, cfa, saved, source });
        }
        Some(records)
    }
}

/// From which address on which line and scope hold. Sorted by address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LineRecord {
    pub(crate) at: u64,
    /// Number of the innermost scope plus one; 0 = none.
    pub(crate) scope: u32,
    /// Number of the file plus one; 0 = no line is known from here on.
    pub(crate) file: u32,
    pub(crate) line: u32,
    pub(crate) column: u32,
}

/// The line last seen in each file of a chunk: code jumps back and forth between a function and what is inlined.
#[derive(Debug, Default)]
struct LastLines(Vec<(u32, u32)>);

impl LastLines {
    fn of(&mut self, file: u32) -> &mut u32 {
        let index = self.0.iter().position(|&(own, _)| own == file);
        let index = index.unwrap_or_else(|| {
            self.0.push((file, 0));
            self.0.len() - 1
        });
        &mut self.0[index].1
    }
}

impl Record for LineRecord {
    const COLUMNS: usize = 5;
    const PER_CHUNK: usize = 1024;

    fn key(&self, _number: usize) -> u64 {
        self.at
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        let mut before =
            Self { at: records.first().map_or(0, |record| record.at), ..Self::default() };
        let mut lines = LastLines::default();
        for record in records {
            columns.push(0, record.at.wrapping_sub(before.at));
            columns.push_signed(1, i64::from(record.scope) - i64::from(before.scope));
            columns.push(2, u64::from(record.file));
            let line = lines.of(record.file);
            columns.push_signed(3, i64::from(record.line) - i64::from(*line));
            *line = record.line;
            columns.push(4, u64::from(record.column));
            before = *record;
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, key: u64, _: usize) -> Option<Vec<Self>> {
        let mut record = Self { at: key, ..Self::default() };
        let mut lines = LastLines::default();
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            record.at = record.at.wrapping_add(reader.next(0)?);
            let scope = i64::from(record.scope).checked_add(reader.next_signed(1)?)?;
            record.scope = u32::try_from(scope).ok()?;
            record.file = reader.next_u32(2)?;
            let line = lines.of(record.file);
            *line = u32::try_from(i64::from(*line).checked_add(reader.next_signed(3)?)?).ok()?;
            record.line = *line;
            record.column = reader.next_u32(4)?;
            records.push(record);
        }
        Some(records)
    }
}

/// A function, or one inlined call of it. A parent comes before its children.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ScopeRecord {
    /// Number of the function plus one; 0 = not known.
    pub(crate) function: u32,
    /// Number of the scope that it is inlined into, plus one; 0 = not inlined.
    pub(crate) parent: u32,
    /// Number of the file of the call plus one; 0 = not known.
    pub(crate) call_file: u32,
    pub(crate) call_line: u32,
    pub(crate) call_column: u32,
}

impl Record for ScopeRecord {
    const COLUMNS: usize = 5;
    const PER_CHUNK: usize = 1024;

    fn key(&self, number: usize) -> u64 {
        number as u64
    }

    fn encode(records: &[Self], first: usize, columns: &mut Columns) {
        let mut lines = LastLines::default();
        for (number, record) in records.iter().enumerate() {
            columns.push(0, u64::from(record.function));
            // Distance back to the parent; 0 = none, as no scope is its own parent.
            let own = (first + number) as u64 + 1;
            columns.push(1, if record.parent == 0 { 0 } else { own - u64::from(record.parent) });
            if record.parent == 0 {
                continue;
            }
            columns.push(2, u64::from(record.call_file));
            let line = lines.of(record.call_file);
            columns.push_signed(3, i64::from(record.call_line) - i64::from(*line));
            *line = record.call_line;
            columns.push(4, u64::from(record.call_column));
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, _: u64, first: usize) -> Option<Vec<Self>> {
        let mut lines = LastLines::default();
        let mut records = Vec::with_capacity(count);
        for number in 0..count {
            let mut record = Self { function: reader.next_u32(0)?, ..Self::default() };
            let back = reader.next(1)?;
            if back != 0 {
                let parent = (first as u64 + number as u64 + 1).checked_sub(back)?;
                record.parent = u32::try_from(parent).ok()?;
                record.call_file = reader.next_u32(2)?;
                let line = lines.of(record.call_file);
                *line =
                    u32::try_from(i64::from(*line).checked_add(reader.next_signed(3)?)?).ok()?;
                record.call_line = *line;
                record.call_column = reader.next_u32(4)?;
            }
            records.push(record);
        }
        Some(records)
    }
}

/// Number of a function's name; functions are numbered by how often they are inlined.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FunctionRecord(pub(crate) u32);

impl Record for FunctionRecord {
    const COLUMNS: usize = 1;
    const PER_CHUNK: usize = 4096;

    fn key(&self, number: usize) -> u64 {
        number as u64
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        records.iter().for_each(|record| columns.push(0, u64::from(record.0)));
    }

    fn decode(reader: &mut Reader<'_>, count: usize, _: u64, _: usize) -> Option<Vec<Self>> {
        (0..count).map(|_| reader.next_u32(0).map(Self)).collect()
    }
}

/// Path of a source file; files are numbered by how often lines name them.
#[derive(Clone, Debug)]
pub(crate) struct FileRecord(pub(crate) Box<str>);

impl Record for FileRecord {
    const COLUMNS: usize = 2;
    const PER_CHUNK: usize = 512;

    fn key(&self, number: usize) -> u64 {
        number as u64
    }

    fn encode(records: &[Self], _first: usize, columns: &mut Columns) {
        for FileRecord(path) in records {
            columns.push(0, path.len() as u64);
            columns.push_bytes(1, path.as_bytes());
        }
    }

    fn decode(reader: &mut Reader<'_>, count: usize, _: u64, _: usize) -> Option<Vec<Self>> {
        let one = |_| {
            let len = reader.next(0)? as usize;
            Some(Self(std::str::from_utf8(reader.next_bytes(1, len)?).ok()?.into()))
        };
        (0..count).map(one).collect()
    }
}
