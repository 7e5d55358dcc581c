//! Variables and parameters of all compilation units of one object, with the places they are kept in. Places that are no
//! register, no memory at a known offset (parts, computed values, values at entry) are left out. What their types have
//! inside is in `layouts.rs`.

use std::ops::Range;

use gimli::{
    AttributeValue, DebuggingInformationEntry, Expression, Operation, Unit, UnitHeader, UnitOffset,
    constants as dw,
};
use guest::{GuestVirt, Reg};
use rayon::prelude::*;

use super::Slice;
use super::layouts::{self, UnitLayouts};
use super::types::{Entry, UnitTypes};
use super::units::Units;
use crate::layout::Layouts;
use crate::variables::{Extent, Variables};
use crate::{Variable, VariableLocation, cfi};

/// Longest chain of abstract origins that is followed.
const MAX_ORIGINS: usize = 8;

/// What a function's offsets into its frame are relative to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FrameBase {
    Cfa,
    Register(Reg),
    Unknown,
}

/// A function, an inlined call or a block that is open.
struct Scope {
    depth: isize,
    code: Vec<Range<u64>>,
    base: FrameBase,
}

struct Walk<'a, 'd> {
    units: &'a Units<'d>,
    unit: &'a Unit<Slice<'d>>,
    text: &'a [Range<u64>],
    data: &'a [Range<u64>],
    layouts: UnitLayouts<'a, 'd>,
    extents: Vec<Extent>,
}

/// Collects from all units. `text` are the ranges of code, `data` all ranges that variables may lie in. A unit that is
/// damaged gives nothing.
pub(super) fn gather(units: &Units<'_>, text: &[Range<u64>], data: &[Range<u64>]) -> Variables {
    let outputs: Vec<_> = units
        .headers
        .par_iter()
        .filter_map(|header| of_unit(units, *header, text, data).ok())
        .collect();
    let mut out = Variables::default();
    for (extents, own) in outputs {
        out.extents.extend(extents);
        own.into_iter().for_each(|(name, layout)| layouts::merge(&mut out.layouts, name, layout));
    }
    let place = |extent: &Extent| {
        let Extent { code, depth, variable } = extent;
        (code.start, code.end, *depth, variable.location, variable.name.clone())
    };
    out.extents.sort_by_cached_key(place);
    out.extents.dedup();
    out
}

fn of_unit<'d>(
    units: &Units<'d>,
    header: UnitHeader<Slice<'d>>,
    text: &[Range<u64>],
    data: &[Range<u64>],
) -> gimli::Result<(Vec<Extent>, Layouts)> {
    let unit = units.dwarf.unit(header)?;
    let layouts = UnitLayouts::new(units, &unit);
    let mut walk = Walk { units, unit: &unit, text, data, layouts, extents: Vec::new() };
    walk.run()?;
    Ok((walk.extents, walk.layouts.finish()))
}

/// The parts of `range` that lie in one of `within`.
fn cut(range: &Range<u64>, within: &[Range<u64>]) -> Vec<Range<u64>> {
    let both = |other: &Range<u64>| range.start.max(other.start)..range.end.min(other.end);
    within.iter().map(both).filter(|both| !both.is_empty()).collect()
}

/// The only operation of an expression; `None` when there are several.
pub(crate) fn single<'d>(
    unit: &Unit<Slice<'d>>,
    expression: Expression<Slice<'d>>,
) -> Option<Operation<Slice<'d>>> {
    let mut operations = expression.operations(unit.encoding());
    let first = operations.next().ok()??;
    operations.next().ok()?.is_none().then_some(first)
}

pub(crate) fn frame_base<'d>(unit: &Unit<Slice<'d>>, entry: &Entry<'d>) -> Option<FrameBase> {
    let expression = entry.attr_value(dw::DW_AT_frame_base)?.exprloc_value()?;
    Some(match single(unit, expression)? {
        Operation::CallFrameCFA => FrameBase::Cfa,
        Operation::Register { register } => {
            cfi::register(register).map_or(FrameBase::Unknown, FrameBase::Register)
        }
        _ => FrameBase::Unknown,
    })
}

/// Name and type of a variable, where need be of the entry that it is an instance of.
pub(crate) fn declared<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    entry: &Entry<'d>,
) -> Option<(&'d str, UnitOffset)> {
    let mut entry = entry.clone();
    let (mut name, mut type_at) = (None, None);
    for _ in 0..MAX_ORIGINS {
        let own = entry.attr_value(dw::DW_AT_name);
        name = name.or_else(|| units.text(unit, own?));
        type_at = type_at.or_else(|| UnitTypes::type_of(&entry));
        if let (Some(name), Some(type_at)) = (name, type_at) {
            return Some((name, type_at));
        }
        let origin = entry.attr_value(dw::DW_AT_abstract_origin);
        match origin.or(entry.attr_value(dw::DW_AT_specification))? {
            AttributeValue::UnitRef(origin) => entry = unit.entry(origin).ok()?,
            // In another unit (link-time optimisation): its types have other offsets.
            _ => return None,
        }
    }
    None
}

impl<'d> Walk<'_, 'd> {
    fn run(&mut self) -> gimli::Result<()> {
        let mut entries = self.unit.entries_raw(None)?;
        let mut entry = DebuggingInformationEntry::null();
        let mut open: Vec<Scope> = Vec::new();
        // Below this depth nothing is wanted.
        let mut skipped: Option<isize> = None;
        while !entries.is_empty() {
            let depth = entries.next_depth();
            if !entries.read_entry(&mut entry)? || skipped.is_some_and(|outer| depth > outer) {
                continue;
            }
            skipped = None;
            open.truncate(open.partition_point(|scope| scope.depth < depth));
            match entry.tag() {
                dw::DW_TAG_compile_unit | dw::DW_TAG_partial_unit | dw::DW_TAG_namespace => {}
                dw::DW_TAG_subprogram
                | dw::DW_TAG_inlined_subroutine
                | dw::DW_TAG_lexical_block => {
                    let code = self.code(&entry)?;
                    // A block without code of its own may have inlined calls inside.
                    if code.is_empty() && entry.tag() != dw::DW_TAG_lexical_block {
                        skipped = Some(depth);
                        continue;
                    }
                    let outer = open.last().map_or(FrameBase::Unknown, |scope| scope.base);
                    let base = frame_base(self.unit, &entry).unwrap_or(outer);
                    open.push(Scope { depth, code, base });
                }
                dw::DW_TAG_variable | dw::DW_TAG_formal_parameter => {
                    // A damaged variable takes nothing from the others.
                    let _ = self.variable(&entry, open.last());
                    skipped = Some(depth);
                }
                _ => skipped = Some(depth),
            }
        }
        Ok(())
    }

    /// Code that a scope covers.
    fn code(&self, entry: &Entry<'d>) -> gimli::Result<Vec<Range<u64>>> {
        let mut code = Vec::new();
        let mut ranges = self.units.dwarf.die_ranges(self.unit, entry)?;
        while let Some(range) = ranges.next()? {
            code.extend(cut(&(range.begin..range.end), self.text));
        }
        Ok(code)
    }

    fn variable(&mut self, entry: &Entry<'d>, scope: Option<&Scope>) -> Option<()> {
        let location = entry.attr_value(dw::DW_AT_location)?;
        let (name, type_at) = declared(self.units, self.unit, entry)?;
        let shape = self.layouts.types.shape(Some(type_at));
        if !layouts::leads_on(&shape) {
            return None;
        }
        let everywhere = 0..u64::MAX;
        let code = scope.map_or(std::slice::from_ref(&everywhere), |scope| &scope.code);
        let base = scope.map_or(FrameBase::Unknown, |scope| scope.base);
        let mut places = Vec::new();
        if let Some(expression) = location.exprloc_value() {
            let place = self.place(expression, base);
            places.extend(code.iter().cloned().zip(std::iter::repeat(place)));
        } else {
            let mut list = self.units.dwarf.attr_locations(self.unit, location).ok()??;
            while let Some(item) = list.next().ok()? {
                let range = item.range.begin..item.range.end;
                let place = self.place(item.data, base);
                places.extend(cut(&range, code).into_iter().zip(std::iter::repeat(place)));
            }
        }
        let depth = scope.map_or(0, |scope| u32::try_from(scope.depth).unwrap_or(u32::MAX));
        let before = self.extents.len();
        self.extents.extend(places.into_iter().filter_map(|(code, location)| {
            let variable =
                Variable { name: name.to_owned(), shape: shape.clone(), location: location? };
            Some(Extent { code, depth, variable })
        }));
        if self.extents.len() > before {
            self.layouts.reach(type_at);
        }
        Some(())
    }

    fn place(
        &self,
        expression: Expression<Slice<'d>>,
        base: FrameBase,
    ) -> Option<VariableLocation> {
        match single(self.unit, expression)? {
            Operation::Register { register } => {
                cfi::register(register).map(VariableLocation::Register)
            }
            Operation::RegisterOffset { register, offset, base_type: UnitOffset(0) } => {
                let (reg, offset) = (cfi::register(register)?, i32::try_from(offset).ok()?);
                Some(VariableLocation::AtRegister(reg, offset))
            }
            Operation::FrameOffset { offset } => {
                let offset = i32::try_from(offset).ok()?;
                match base {
                    FrameBase::Cfa => Some(VariableLocation::AtCfa(offset)),
                    FrameBase::Register(reg) => Some(VariableLocation::AtRegister(reg, offset)),
                    FrameBase::Unknown => None,
                }
            }
            // What lies in a section that is not loaded has no address.
            Operation::Address { address } => {
                let loaded = self.data.iter().any(|range| range.contains(&address));
                loaded.then_some(VariableLocation::Address(GuestVirt(address)))
            }
            _ => None,
        }
    }
}
