//! Which compilation unit an address of code belongs to. Reading the whole of .debug_info for that would cost more than
//! all the rest: .debug_aranges tells, and only where a compiler has not written it (clang does not) the units do.

use gimli::{DebugInfoOffset, Dwarf, Unit, UnitHeader};

use crate::compile::Slice;

/// Ranges of one object at most: a vmlinux has some 7 000.
const RANGES_MAX: usize = 1 << 20;

/// A range of code, and where the unit that it belongs to starts.
struct Owned {
    start: u64,
    end: u64,
    unit: DebugInfoOffset,
}

/// The ranges of all units, by address.
pub(super) struct UnitRanges(Vec<Owned>);

impl UnitRanges {
    /// Those of an object. What is damaged is left out.
    pub(super) fn of(dwarf: &Dwarf<Slice<'_>>) -> Self {
        let mut ranges = Vec::new();
        // A damaged header takes all behind it with it.
        let _ = of_table(dwarf, &mut ranges);
        if ranges.is_empty() {
            let _ = of_units(dwarf, &mut ranges);
        }
        ranges.sort_by_key(|range| (range.start, range.end));
        Self(ranges)
    }

    /// Start of the unit at an address.
    pub(super) fn at(&self, at: u64) -> Option<DebugInfoOffset> {
        let behind = self.0.partition_point(|range| range.start <= at);
        let range = self.0.get(behind.checked_sub(1)?)?;
        (at < range.end).then_some(range.unit)
    }
}

fn of_table(dwarf: &Dwarf<Slice<'_>>, ranges: &mut Vec<Owned>) -> gimli::Result<()> {
    let mut headers = dwarf.debug_aranges.headers();
    while let Some(header) = headers.next()? {
        let unit = header.debug_info_offset();
        let mut entries = header.entries();
        while let Some(entry) = entries.next()? {
            push(ranges, entry.range(), unit);
        }
    }
    Ok(())
}

fn of_units(dwarf: &Dwarf<Slice<'_>>, ranges: &mut Vec<Owned>) -> gimli::Result<()> {
    let mut headers = dwarf.units();
    while let Some(header) = headers.next()? {
        // One damaged unit takes nothing from the others.
        let _ = of_unit(dwarf, header, ranges);
    }
    Ok(())
}

fn of_unit<'d>(
    dwarf: &Dwarf<Slice<'d>>,
    header: UnitHeader<Slice<'d>>,
    ranges: &mut Vec<Owned>,
) -> gimli::Result<()> {
    let Some(start) = header.debug_info_offset() else { return Ok(()) };
    let unit: Unit<Slice<'d>> = dwarf.unit(header)?;
    let mut own = dwarf.unit_ranges(&unit)?;
    while let Some(range) = own.next()? {
        push(ranges, range, start);
    }
    Ok(())
}

fn push(ranges: &mut Vec<Owned>, range: gimli::Range, unit: DebugInfoOffset) {
    if range.begin < range.end && ranges.len() < RANGES_MAX {
        ranges.push(Owned { start: range.begin, end: range.end, unit });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_between_units_is_of_none() {
        let owned = |start, end, unit| Owned { start, end, unit: DebugInfoOffset(unit) };
        let ranges = UnitRanges(vec![owned(10, 20, 1), owned(20, 30, 2), owned(40, 50, 1)]);
        let at = |at| ranges.at(at).map(|unit| unit.0);
        assert_eq!([at(9), at(10), at(20), at(29)], [None, Some(1), Some(2), Some(2)]);
        assert_eq!([at(30), at(45), at(50)], [None, Some(1), None]);
    }
}
