//! Functions and inlined calls of one compilation unit, with the addresses that each covers. The lines inside them are
//! in `lines.rs`.

use std::collections::HashMap;
use std::ops::Range;

use gimli::{
    AttributeSpecification, AttributeValue, EntriesRaw, Unit, UnitOffset, constants as dw,
};

use super::Slice;
use super::units::Units;

/// Longest chain of abstract origins that is followed.
const MAX_ORIGINS: usize = 8;

/// A function, or an inlined call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    /// Number in [`UnitScopes::functions`] plus one; 0 = nameless.
    pub(super) function: u32,
    /// Number of the scope it is inlined into, plus one; 0 = not inlined.
    pub(super) parent: u32,
    /// File number as in the unit's line program.
    pub(super) call_file: u64,
    pub(super) call_line: u32,
    pub(super) call_column: u32,
}

/// Addresses that a scope covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Covered {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Number of the scope.
    pub(super) scope: u32,
}

/// A function with code, for what else is wanted of it.
#[derive(Clone, Debug)]
pub(super) struct Defined {
    /// Number in [`UnitScopes::functions`].
    pub(super) function: u32,
    /// The entry with its name and type: the abstract one if there is one in this unit.
    pub(super) entry: UnitOffset,
}

/// What one unit has.
#[derive(Debug, Default)]
pub(super) struct UnitScopes<'d> {
    pub(super) functions: Vec<&'d str>,
    pub(super) scopes: Vec<Scope>,
    /// In the order of the tree: inner ones after outer ones.
    pub(super) covered: Vec<Covered>,
    pub(super) defined: Vec<Defined>,
}

/// Attributes of a subprogram or an inlined call.
#[derive(Default)]
struct Attributes<'d> {
    name: Option<AttributeValue<Slice<'d>>>,
    origin: Option<AttributeValue<Slice<'d>>>,
    low: Option<u64>,
    /// Absolute, or a length.
    high: Option<(u64, bool)>,
    ranges: Option<AttributeValue<Slice<'d>>>,
    call_file: u64,
    call_line: u32,
    call_column: u32,
    sibling: Option<UnitOffset>,
}

struct Walk<'a, 'd> {
    units: &'a Units<'d>,
    unit: &'a Unit<Slice<'d>>,
    /// Function number by the entry that names it.
    numbers: HashMap<UnitOffset, u32>,
    by_name: HashMap<&'d str, u32>,
    out: UnitScopes<'d>,
}

/// Walks one unit's tree. Addresses outside of `text` are left out.
pub(super) fn of_unit<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    text: &[Range<u64>],
) -> gimli::Result<UnitScopes<'d>> {
    let mut walk = Walk {
        units,
        unit,
        numbers: HashMap::new(),
        by_name: HashMap::new(),
        out: UnitScopes::default(),
    };
    walk.run(text)?;
    Ok(walk.out)
}

/// Goes on behind an entry's children, whose attributes have been read.
pub(crate) fn jump<'a, 'd>(
    unit: &'a Unit<Slice<'d>>,
    entries: &mut EntriesRaw<'a, Slice<'d>>,
    sibling: Option<UnitOffset>,
) -> gimli::Result<bool> {
    match sibling.filter(|&sibling| sibling >= entries.next_offset()) {
        Some(sibling) => {
            *entries = unit.entries_raw(Some(sibling))?;
            Ok(true)
        }
        None => Ok(false),
    }
}

/// Reads attributes up to `DW_AT_sibling`, which compilers put last.
pub(crate) fn skip_to_sibling<'d>(
    entries: &mut EntriesRaw<'_, Slice<'d>>,
    specs: &[AttributeSpecification],
) -> gimli::Result<Option<UnitOffset>> {
    let Some(at) = specs.iter().position(|spec| spec.name() == dw::DW_AT_sibling) else {
        entries.skip_attributes(specs)?;
        return Ok(None);
    };
    let (before, rest) = specs.split_at(at);
    entries.skip_attributes(before)?;
    let mut sibling = None;
    for spec in rest {
        let attribute = entries.read_attribute(*spec)?;
        if let (dw::DW_AT_sibling, AttributeValue::UnitRef(offset)) =
            (spec.name(), attribute.value())
        {
            sibling = Some(offset);
        }
    }
    Ok(sibling)
}

impl<'a, 'd> Walk<'a, 'd> {
    fn run(&mut self, text: &[Range<u64>]) -> gimli::Result<()> {
        let unit = self.unit;
        let mut entries = unit.entries_raw(None)?;
        // Depth where `entries` was started: it counts from 0 again after each jump.
        let mut base = 0;
        // Open scopes: depth of the entry, number of the scope.
        let mut open: Vec<(isize, u32)> = Vec::new();
        let mut skipped: Option<isize> = None;
        while !entries.is_empty() {
            let (depth, offset) = (base + entries.next_depth(), entries.next_offset());
            let Some(abbreviation) = entries.read_abbreviation()? else { continue };
            open.truncate(open.partition_point(|scope| scope.0 < depth));
            let specs = abbreviation.attributes();
            if skipped.is_some_and(|outer| depth > outer) {
                entries.skip_attributes(specs)?;
                continue;
            }
            skipped = None;
            let tag = abbreviation.tag();
            let sibling = match tag {
                dw::DW_TAG_subprogram | dw::DW_TAG_inlined_subroutine => {
                    let attributes = self.attributes(&mut entries, specs)?;
                    let inlined = tag == dw::DW_TAG_inlined_subroutine;
                    let parent = open.last().filter(|_| inlined).map_or(0, |scope| scope.1 + 1);
                    if let Some(scope) = self.scope(offset, &attributes, parent, text)? {
                        open.push((depth, scope));
                        continue;
                    }
                    attributes.sibling
                }
                dw::DW_TAG_compile_unit
                | dw::DW_TAG_partial_unit
                | dw::DW_TAG_lexical_block
                | dw::DW_TAG_namespace => {
                    entries.skip_attributes(specs)?;
                    continue;
                }
                _ => skip_to_sibling(&mut entries, specs)?,
            };
            if !abbreviation.has_children() {
                continue;
            }
            if jump(unit, &mut entries, sibling)? {
                base = depth;
            } else {
                skipped = Some(depth);
            }
        }
        Ok(())
    }

    fn attributes(
        &self,
        entries: &mut EntriesRaw<'_, Slice<'d>>,
        specs: &[AttributeSpecification],
    ) -> gimli::Result<Attributes<'d>> {
        let mut out = Attributes::default();
        for spec in specs {
            let attribute = entries.read_attribute(*spec)?;
            let value = attribute.value();
            let number = || attribute.udata_value().unwrap_or(0);
            match spec.name() {
                dw::DW_AT_name => out.name = Some(value),
                dw::DW_AT_abstract_origin | dw::DW_AT_specification => out.origin = Some(value),
                dw::DW_AT_low_pc => out.low = self.units.dwarf.attr_address(self.unit, value)?,
                dw::DW_AT_high_pc => {
                    out.high = match attribute.udata_value() {
                        Some(length) => Some((length, false)),
                        None => {
                            let end = self.units.dwarf.attr_address(self.unit, value)?;
                            end.map(|end| (end, true))
                        }
                    };
                }
                dw::DW_AT_ranges => out.ranges = Some(value),
                dw::DW_AT_call_file => {
                    out.call_file = match value {
                        AttributeValue::FileIndex(file) => file,
                        _ => number(),
                    };
                }
                dw::DW_AT_call_line => out.call_line = number() as u32,
                dw::DW_AT_call_column => out.call_column = number() as u32,
                dw::DW_AT_sibling => {
                    if let AttributeValue::UnitRef(offset) = value {
                        out.sibling = Some(offset);
                    }
                }
                _ => {}
            }
        }
        Ok(out)
    }

    /// Notes a scope; `None` when it has no code.
    fn scope(
        &mut self,
        entry: UnitOffset,
        attributes: &Attributes<'d>,
        parent: u32,
        text: &[Range<u64>],
    ) -> gimli::Result<Option<u32>> {
        let number = self.out.scopes.len() as u32;
        let before = self.out.covered.len();
        let mut cover = |start: u64, end: u64| {
            if start < end && text.iter().any(|range| range.start <= start && end <= range.end) {
                self.out.covered.push(Covered { start, end, scope: number });
            }
        };
        if let Some(ranges) = attributes.ranges {
            if let Some(mut ranges) = self.units.dwarf.attr_ranges(self.unit, ranges)? {
                while let Some(range) = ranges.next()? {
                    cover(range.begin, range.end);
                }
            }
        } else if let (Some(low), Some((high, absolute))) = (attributes.low, attributes.high) {
            cover(low, if absolute { high } else { low.wrapping_add(high) });
        }
        if self.out.covered.len() == before {
            return Ok(None);
        }
        let (function, named_by) = self.function(entry, attributes);
        self.out.scopes.push(Scope {
            function: function.map_or(0, |function| function + 1),
            parent,
            call_file: attributes.call_file,
            call_line: attributes.call_line,
            call_column: attributes.call_column,
        });
        if let (Some(function), 0) = (function, parent) {
            self.out.defined.push(Defined { function, entry: named_by });
        }
        Ok(Some(number))
    }

    /// Number of the function that an entry is of, and the entry of this unit that says most of it.
    fn function(
        &mut self,
        entry: UnitOffset,
        attributes: &Attributes<'d>,
    ) -> (Option<u32>, UnitOffset) {
        let named_by = match attributes.origin {
            Some(AttributeValue::UnitRef(origin)) => origin,
            _ => entry,
        };
        if let Some(&number) = self.numbers.get(&named_by) {
            return (Some(number), named_by);
        }
        let name = match (attributes.name, attributes.origin) {
            (Some(name), _) => self.units.text(self.unit, name),
            (None, Some(origin)) => self.units.name_at(self.unit, origin, MAX_ORIGINS),
            (None, None) => None,
        };
        let Some(name) = name else { return (None, named_by) };
        let next = self.out.functions.len() as u32;
        let number = *self.by_name.entry(name).or_insert(next);
        if number == next {
            self.out.functions.push(name);
        }
        self.numbers.insert(named_by, number);
        (Some(number), named_by)
    }
}

/// From which address on which scope is the innermost: number plus one, 0 = none.
pub(super) fn transitions(covered: &[Covered]) -> Vec<(u64, u32)> {
    let mut order: Vec<(usize, &Covered)> = covered.iter().enumerate().collect();
    // Outer ranges first: they start earlier, or end later, or come first in the tree.
    order
        .sort_unstable_by_key(|(index, range)| (range.start, std::cmp::Reverse(range.end), *index));
    let mut changes: Vec<(u64, u32)> = Vec::with_capacity(2 * order.len());
    let mut open: Vec<(u64, u32)> = Vec::new();
    let close = |open: &mut Vec<(u64, u32)>, changes: &mut Vec<(u64, u32)>, until: u64| {
        while let Some(&(end, _)) = open.last().filter(|(end, _)| *end <= until) {
            open.pop();
            // Ranges that overlap without nesting: what ends earlier is not in force any more.
            while open.last().is_some_and(|outer| outer.0 <= end) {
                open.pop();
            }
            changes.push((end, open.last().map_or(0, |outer| outer.1)));
        }
    };
    for (_, range) in order {
        close(&mut open, &mut changes, range.start);
        changes.push((range.start, range.scope + 1));
        open.push((range.end, range.scope + 1));
    }
    close(&mut open, &mut changes, u64::MAX);
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_scopes_win_and_outer_ones_return() {
        let covered = |start, end, scope| Covered { start, end, scope };
        let ranges =
            [covered(0, 100, 0), covered(10, 30, 1), covered(10, 20, 2), covered(50, 100, 3)];
        let changes = transitions(&ranges);
        let at =
            |address| changes.iter().rfind(|change| change.0 <= address).map(|change| change.1);
        assert_eq!(at(5), Some(1));
        assert_eq!(at(10), Some(3));
        assert_eq!(at(25), Some(2));
        assert_eq!(at(30), Some(1));
        assert_eq!(at(60), Some(4));
        assert_eq!(at(100), Some(0));
        assert!(changes.is_sorted_by_key(|change| change.0));
    }
}
