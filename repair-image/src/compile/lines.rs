//! The line program of one compilation unit joined with its scopes. Which scopes there are is in `scopes.rs`.

use std::collections::HashMap;
use std::ops::Range;

use gimli::{AttributeValue, ColumnType, LineProgramHeader, Unit};

use super::Slice;
use super::units::Units;
use crate::record::LineRecord;

/// Lines of one stretch of code without gaps; the last record has file 0 and marks the end. Scopes and files are
/// numbered as in the unit, plus one.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) records: Vec<LineRecord>,
}

/// File numbers of a unit's line program, as far as they are used.
#[derive(Debug, Default)]
pub(super) struct Files {
    numbers: HashMap<u64, u32>,
    pub(super) paths: Vec<String>,
}

impl Files {
    /// Number plus one of a file of the line program; 0 when the program has no such file.
    pub(super) fn number(
        &mut self,
        units: &Units<'_>,
        unit: &Unit<Slice<'_>>,
        header: &LineProgramHeader<Slice<'_>>,
        index: u64,
    ) -> u32 {
        if let Some(&number) = self.numbers.get(&index) {
            return number;
        }
        let number = path(units, unit, header, index).map_or(0, |path| {
            self.paths.push(path);
            self.paths.len() as u32
        });
        self.numbers.insert(index, number);
        number
    }
}

/// Path of a file, relative to the source or build tree where it lies in it.
fn path(
    units: &Units<'_>,
    unit: &Unit<Slice<'_>>,
    header: &LineProgramHeader<Slice<'_>>,
    index: u64,
) -> Option<String> {
    let file = header.file(index)?;
    let text = |value: AttributeValue<Slice<'_>>| {
        Some(units.dwarf.attr_string(unit, value).ok()?.to_string_lossy().into_owned())
    };
    let name = text(file.path_name())?;
    let directory = match file.directory_index() {
        // The directory of the compilation itself, in DWARF 4 and 5.
        0 => String::new(),
        _ => file.directory(header).and_then(text).unwrap_or_default(),
    };
    let build = unit.comp_dir.map(|directory| directory.to_string_lossy().into_owned());
    let whole = if name.starts_with('/') || directory.is_empty() {
        name
    } else {
        format!("{directory}/{name}")
    };
    Some(shorten(&whole, &build.unwrap_or_default()))
}

/// Takes off the part of a path that only tells where the build took place: the directory of the compilation, or, for
/// a build outside of the source tree, the directory that both have in common.
fn shorten(path: &str, build: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "." | "" => {}
            ".." if !parts.is_empty() => drop(parts.pop()),
            // Above the build directory: the source tree of an out-of-tree build.
            ".." => {}
            part => parts.push(part),
        }
    }
    if !path.starts_with('/') {
        return parts.join("/");
    }
    let build = build.split('/').filter(|part| !part.is_empty());
    let common = parts.iter().zip(build).take_while(|(own, other)| *own == other).count();
    match parts.get(common..) {
        // One common directory is /usr, /home or the like and no source tree.
        Some(rest) if common >= 2 && !rest.is_empty() => rest.join("/"),
        _ => format!("/{}", parts.join("/")),
    }
}

/// Lines of one unit's code inside of `text`. `changes` tells from which address on which scope is innermost.
pub(super) fn of_unit(
    units: &Units<'_>,
    unit: &Unit<Slice<'_>>,
    changes: &[(u64, u32)],
    text: &[Range<u64>],
    files: &mut Files,
) -> gimli::Result<Vec<Stretch>> {
    let Some(program) = unit.line_program.clone() else { return Ok(Vec::new()) };
    let mut stretches = Vec::new();
    let mut rows = program.rows();
    let mut records: Vec<LineRecord> = Vec::new();
    while let Some((header, row)) = rows.next_row()? {
        let mut record = LineRecord { at: row.address(), ..LineRecord::default() };
        if !row.end_sequence() {
            record.file = files.number(units, unit, header, row.file_index());
            record.line = row.line().map_or(0, |line| line.get() as u32);
            record.column = match row.column() {
                ColumnType::LeftEdge => 0,
                ColumnType::Column(column) => column.get() as u32,
            };
        }
        match records.last_mut() {
            // Of several lines at one address, the last is in force.
            Some(last) if last.at == record.at => *last = record,
            _ => records.push(record),
        }
        if row.end_sequence() {
            let start = records.first().map_or(0, |record| record.at);
            if text.iter().any(|range| range.contains(&start)) && records.len() > 1 {
                stretches.push(Stretch { records: with_scopes(&records, changes) });
            }
            records.clear();
        }
    }
    Ok(stretches)
}

/// Puts scopes on the lines, with further records where only the scope changes.
fn with_scopes(lines: &[LineRecord], changes: &[(u64, u32)]) -> Vec<LineRecord> {
    let mut out: Vec<LineRecord> = Vec::with_capacity(lines.len());
    let mut push = |record: LineRecord| match out.last_mut() {
        Some(last) if last.at == record.at => *last = record,
        Some(last) if (LineRecord { at: record.at, ..*last }) == record => {}
        _ => out.push(record),
    };
    let start = lines.first().map_or(0, |line| line.at);
    let mut next = changes.partition_point(|change| change.0 <= start);
    let mut scope = next.checked_sub(1).and_then(|index| changes.get(index)).map_or(0, |c| c.1);
    let mut before: Option<LineRecord> = None;
    for &line in lines {
        while let Some(&(at, new)) = changes.get(next).filter(|change| change.0 < line.at) {
            scope = new;
            next += 1;
            if let Some(before) = before {
                push(LineRecord { at, scope, ..before });
            }
        }
        while let Some(&(_, new)) = changes.get(next).filter(|change| change.0 == line.at) {
            scope = new;
            next += 1;
        }
        // The end of the stretch has neither line nor scope.
        push(if line.file == 0 { line } else { LineRecord { scope, ..line } });
        before = Some(line);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lose_the_build_directory() {
        let build = "/build/reproducible-path/linux-6.1/debian/build/amd64";
        assert_eq!(shorten("kernel/./fork.c", build), "kernel/fork.c");
        assert_eq!(shorten("../../../fs/open.c", build), "fs/open.c");
        assert_eq!(
            shorten("/build/reproducible-path/linux-6.1/arch/x86/entry/entry_64.S", build),
            "arch/x86/entry/entry_64.S"
        );
        assert_eq!(shorten("/root/driver/main.c", "/usr/src/linux"), "/root/driver/main.c");
    }

    #[test]
    fn scope_changes_between_lines_get_records_of_their_own() {
        let line = |at, scope, file, line| LineRecord { at, scope, file, line, column: 0 };
        let lines = [line(0, 0, 1, 10), line(8, 0, 1, 11), line(16, 0, 0, 0)];
        let merged = with_scopes(&lines, &[(0, 1), (4, 2), (8, 1), (16, 0)]);
        let expected = [line(0, 1, 1, 10), line(4, 2, 1, 10), line(8, 1, 1, 11), line(16, 0, 0, 0)];
        assert_eq!(merged, expected);
    }
}
