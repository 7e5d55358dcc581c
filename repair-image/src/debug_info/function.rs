//! The functions of one compilation unit, and what is in force at one address of one of them: variables and parameters of
//! the scopes around the address, those of inlined calls among them, and calls. Everything else of the unit is passed over.

use std::ops::Range;
use std::rc::Rc;

use gimli::{
    AttributeValue, DebugInfoOffset, DebuggingInformationEntry, EntriesRaw, Expression, Operation,
    Unit, UnitOffset, constants as dw,
};
use guest::LinkAddr;

use super::evaluate::Argument;
use super::type_name::{self, ValueType};
use crate::cfi;
use crate::compile::Slice;
use crate::compile::scopes::{jump, skip_to_sibling};
use crate::compile::types::Entry;
use crate::compile::units::Units;
use crate::compile::variables::{FrameBase, declared, frame_base, single};

/// Longest chain of abstract origins that is followed.
pub(super) const MAX_ORIGINS: usize = 8;
/// Variables in force at one address at most.
const VARIABLES_MAX: usize = 512;
/// Ranges of one function that are looked at: it and its cold parts.
const RANGES_MAX: usize = 64;
/// Ranges of one location list.
const LOCATIONS_MAX: usize = 4096;
/// Functions of one unit, each of its ranges counted.
const FUNCTIONS_MAX: usize = 1 << 20;
/// Arguments of one call.
const PASSED_MAX: usize = 16;

/// A unit and where its functions lie.
pub(super) struct ReadUnit<'d> {
    pub(super) unit: Unit<Slice<'d>>,
    functions: Vec<(Range<u64>, UnitOffset)>,
}

impl<'d> ReadUnit<'d> {
    pub(super) fn read(units: &Units<'d>, at: DebugInfoOffset) -> gimli::Result<Self> {
        let header = units.dwarf.debug_info.header_from_offset(at)?;
        let mut unit = units.dwarf.unit(header)?;
        // Names of some hundred files, which nobody asks for here.
        unit.line_program = None;
        let mut read = Self { unit, functions: Vec::new() };
        // What comes before the damage is kept.
        let _ = read.list_functions(units);
        Ok(read)
    }

    fn list_functions(&mut self, units: &Units<'d>) -> gimli::Result<()> {
        let unit = &self.unit;
        let mut entries = unit.entries_raw(None)?;
        while !entries.is_empty() && self.functions.len() < FUNCTIONS_MAX {
            let offset = entries.next_offset();
            let Some(abbreviation) = entries.read_abbreviation()? else { continue };
            let specs = abbreviation.attributes();
            let tag = abbreviation.tag();
            if is_outermost(tag) {
                entries.skip_attributes(specs)?;
                continue;
            }
            let sibling = skip_to_sibling(&mut entries, specs)?;
            let placed = |spec: &gimli::AttributeSpecification| {
                matches!(spec.name(), dw::DW_AT_low_pc | dw::DW_AT_ranges)
            };
            if tag == dw::DW_TAG_subprogram && specs.iter().any(placed) {
                let entry = unit.entry(offset)?;
                let code = code_of(units, unit, &entry);
                self.functions.extend(code.into_iter().map(|range| (range, offset)));
            }
            // Without a sibling the children are passed one by one: none of them is a function.
            if abbreviation.has_children() {
                jump(unit, &mut entries, sibling)?;
            }
        }
        Ok(())
    }

    fn function_at(&self, at: u64) -> Option<UnitOffset> {
        self.functions.iter().find(|(code, _)| code.contains(&at)).map(|(_, offset)| *offset)
    }
}

fn is_outermost(tag: gimli::DwTag) -> bool {
    matches!(tag, dw::DW_TAG_compile_unit | dw::DW_TAG_partial_unit | dw::DW_TAG_namespace)
}

/// Code that a function, an inlined call or a block covers; empty where that is damaged.
fn code_of<'d>(units: &Units<'d>, unit: &Unit<Slice<'d>>, entry: &Entry<'d>) -> Vec<Range<u64>> {
    let mut code = Vec::new();
    let Ok(mut ranges) = units.dwarf.die_ranges(unit, entry) else { return code };
    while let Ok(Some(range)) = ranges.next() {
        if code.len() >= RANGES_MAX {
            break;
        }
        code.push(range.begin..range.end);
    }
    code
}

/// Where a variable is kept, or what it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'d> {
    /// As an expression tells.
    Told(Expression<Slice<'d>>),
    /// It is always this: the bits of a number.
    Constant(u64),
    /// Nowhere.
    Nowhere,
}

/// A variable or parameter that is in force at an address.
#[derive(Clone, Debug)]
pub struct FrameVariable<'d> {
    /// Its name.
    pub name: &'d str,
    /// Its type.
    pub value_type: ValueType,
    /// The inlined function whose it is; `None` for the function itself.
    pub inlined: Option<&'d str>,
    pub(super) place: Place<'d>,
    pub(super) base: FrameBase,
    type_at: UnitOffset,
}

impl FrameVariable<'_> {
    pub(super) fn type_at(&self) -> UnitOffset {
        self.type_at
    }
}

/// An argument of a call, and what its value is.
type Passed<'d> = (Argument<'d>, Expression<Slice<'d>>);

/// What is in force at one address of code.
pub struct InForce<'d> {
    /// The function, without compiler suffixes.
    pub function: Option<&'d str>,
    /// Its variables and parameters, innermost scope first.
    pub variables: Vec<FrameVariable<'d>>,
    /// Whether it ends somewhere by jumping into another function: who called that can't be told from the stack alone.
    pub jumps_on: bool,
    unit: Rc<ReadUnit<'d>>,
    at: UnitOffset,
    address: u64,
    base: FrameBase,
}

/// A function, a block or an inlined call around the address.
#[derive(Clone, Copy)]
struct Scope<'d> {
    depth: isize,
    inlined: Option<&'d str>,
    /// A block may be without code of its own and have inlined calls inside: what it declares is in force nowhere.
    without_code: bool,
}

impl<'d> InForce<'d> {
    /// Reads the function at an address; `None` when the unit has none there.
    pub(super) fn read(units: &Units<'d>, unit: &Rc<ReadUnit<'d>>, at: LinkAddr) -> Option<Self> {
        let offset = unit.function_at(at.0)?;
        let reference = AttributeValue::UnitRef(offset);
        let mut found = Self {
            function: units.name_at(&unit.unit, reference, MAX_ORIGINS),
            variables: Vec::new(),
            jumps_on: jumps_on(&unit.unit, offset).unwrap_or(true),
            base: FrameBase::Unknown,
            unit: unit.clone(),
            at: offset,
            address: at.0,
        };
        let mut variables = Vec::new();
        let mut base = FrameBase::Unknown;
        let walked = found.walk(units, |walk, entry, scope| {
            match entry.tag() {
                dw::DW_TAG_subprogram => {
                    base = frame_base(walk.unit(), entry).unwrap_or(FrameBase::Unknown);
                }
                dw::DW_TAG_variable | dw::DW_TAG_formal_parameter => {
                    let own = walk.variable(units, entry, scope, base);
                    variables.extend(own.map(|own| (scope.depth, own)));
                }
                _ => {}
            }
            variables.len() < VARIABLES_MAX
        });
        // What was read before the damage holds.
        let _ = walked;
        variables.sort_by_key(|(depth, _)| std::cmp::Reverse(*depth));
        found.variables = variables.into_iter().map(|(_, variable)| variable).collect();
        found.base = base;
        Some(found)
    }

    pub(super) fn unit(&self) -> &Unit<Slice<'d>> {
        &self.unit.unit
    }

    pub(super) fn base(&self) -> FrameBase {
        self.base
    }

    /// Visits the function's entry and every entry right inside a scope around the address, until told to stop.
    fn walk(
        &self,
        units: &Units<'d>,
        mut visit: impl FnMut(&Self, &Entry<'d>, &Scope<'d>) -> bool,
    ) -> gimli::Result<()> {
        let unit = self.unit();
        let mut entries = unit.entries_raw(Some(self.at))?;
        let mut entry = DebuggingInformationEntry::null();
        entries.read_entry(&mut entry)?;
        let whole = Scope { depth: 0, inlined: None, without_code: false };
        let mut open = vec![whole];
        visit(self, &entry, &whole);
        // Depth where `entries` was started: it counts from 0 again after each jump.
        let mut base = 0;
        let mut skipped: Option<isize> = None;
        while !entries.is_empty() {
            let depth = base + entries.next_depth();
            if depth <= 0 {
                break;
            }
            if !entries.read_entry(&mut entry)? || skipped.is_some_and(|outer| depth > outer) {
                continue;
            }
            skipped = None;
            open.truncate(open.partition_point(|scope| scope.depth < depth).max(1));
            let Some(outer) = open.last() else { break };
            if let Some(scope) = self.inside(units, &entry, outer, depth) {
                open.push(scope);
                continue;
            }
            if !visit(self, &entry, outer) {
                break;
            }
            if entry.has_children() && !pass(unit, &mut entries, &entry)? {
                skipped = Some(depth);
            } else if entry.has_children() {
                base = depth;
            }
        }
        Ok(())
    }

    /// The scope that an entry opens around the address; `None` when it opens none there.
    fn inside(
        &self,
        units: &Units<'d>,
        entry: &Entry<'d>,
        outer: &Scope<'d>,
        depth: isize,
    ) -> Option<Scope<'d>> {
        let call = match entry.tag() {
            dw::DW_TAG_inlined_subroutine => true,
            dw::DW_TAG_lexical_block => false,
            _ => return None,
        };
        let code = code_of(units, self.unit(), entry);
        let without_code = code.is_empty();
        let around = code.iter().any(|range| range.contains(&self.address));
        if !entry.has_children() || !around && (call || !without_code) {
            return None;
        }
        let name = || {
            let origin = entry.attr_value(dw::DW_AT_abstract_origin)?;
            units.name_at(self.unit(), origin, MAX_ORIGINS)
        };
        let inlined = if call { name() } else { outer.inlined };
        Some(Scope { depth, inlined, without_code })
    }

    fn variable(
        &self,
        units: &Units<'d>,
        entry: &Entry<'d>,
        scope: &Scope<'d>,
        base: FrameBase,
    ) -> Option<FrameVariable<'d>> {
        // Declared here, kept elsewhere.
        if entry.has_attr(dw::DW_AT_declaration) || scope.without_code {
            return None;
        }
        let (name, type_at) = declared(units, self.unit(), entry)?;
        let value_type = type_name::of(units, self.unit(), type_at);
        let place = self.place(units, entry).unwrap_or(Place::Nowhere);
        if let Place::Told(expression) = place
            && let Some(Operation::Address { .. }) = single(self.unit(), expression)
        {
            // `static`: there at all times, not the frame's.
            return None;
        }
        Some(FrameVariable { name, value_type, inlined: scope.inlined, place, base, type_at })
    }

    fn place(&self, units: &Units<'d>, entry: &Entry<'d>) -> Option<Place<'d>> {
        if let Some(constant) = entry.attr_value(dw::DW_AT_const_value) {
            let number = constant.sdata_value().map(|value| value as u64);
            return number.or_else(|| constant.udata_value()).map(Place::Constant);
        }
        let location = entry.attr_value(dw::DW_AT_location)?;
        if let Some(expression) = location.exprloc_value() {
            return Some(Place::Told(expression));
        }
        let mut list = units.dwarf.attr_locations(self.unit(), location).ok()??;
        for _ in 0..LOCATIONS_MAX {
            let item = list.next().ok()??;
            if (item.range.begin..item.range.end).contains(&self.address) {
                return Some(Place::Told(item.data));
            }
        }
        None
    }

    /// What the call which returns to `returns_to` passes, if it is to `callee`.
    pub(super) fn call_to(
        &self,
        units: &Units<'d>,
        returns_to: LinkAddr,
        callee: &str,
    ) -> Option<Vec<Passed<'d>>> {
        let mut found = None;
        let walked = self.walk(units, |walk, entry, _| {
            let is_it = entry.tag() == dw::DW_TAG_call_site
                && walk.address_of(units, entry, dw::DW_AT_call_return_pc) == Some(returns_to.0);
            if is_it {
                found = walk.passed(units, entry, callee);
            }
            !is_it
        });
        walked.ok()?;
        found
    }

    fn address_of(&self, units: &Units<'d>, entry: &Entry<'d>, name: gimli::DwAt) -> Option<u64> {
        units.dwarf.attr_address(self.unit(), entry.attr_value(name)?).ok()?
    }

    fn passed(&self, units: &Units<'d>, call: &Entry<'d>, callee: &str) -> Option<Vec<Passed<'d>>> {
        // A call through a pointer has no origin: it may be to a function that has jumped on to the callee.
        let origin = call.attr_value(dw::DW_AT_call_origin)?;
        if units.name_at(self.unit(), origin, MAX_ORIGINS) != Some(callee) || !call.has_children() {
            return None;
        }
        let mut entries = self.unit().entries_raw(Some(call.offset())).ok()?;
        let mut entry = DebuggingInformationEntry::null();
        entries.read_entry(&mut entry).ok()?;
        let mut passed = Vec::new();
        while passed.len() < PASSED_MAX
            && !entries.is_empty()
            && entries.read_entry(&mut entry).ok()?
        {
            if entry.tag() == dw::DW_TAG_call_site_parameter {
                passed.extend(self.argument(units, &entry));
            }
        }
        Some(passed)
    }

    fn argument(&self, units: &Units<'d>, entry: &Entry<'d>) -> Option<Passed<'d>> {
        let value = entry.attr_value(dw::DW_AT_call_value)?.exprloc_value()?;
        if let Some(parameter) = entry.attr_value(dw::DW_AT_call_parameter) {
            let name = units.name_at(self.unit(), parameter, MAX_ORIGINS)?;
            return Some((Argument::Named(name), value));
        }
        let place = entry.attr_value(dw::DW_AT_location)?.exprloc_value()?;
        match single(self.unit(), place)? {
            Operation::Register { register } => {
                Some((Argument::In(cfi::register(register)?), value))
            }
            _ => None,
        }
    }
}

/// Goes on behind an entry's children; `false` when its sibling is not known.
fn pass<'a, 'd>(
    unit: &'a Unit<Slice<'d>>,
    entries: &mut EntriesRaw<'a, Slice<'d>>,
    entry: &Entry<'d>,
) -> gimli::Result<bool> {
    let sibling = match entry.attr_value(dw::DW_AT_sibling) {
        Some(AttributeValue::UnitRef(sibling)) => Some(sibling),
        _ => None,
    };
    jump(unit, entries, sibling)
}

/// Whether a function has a call that is its end (`DW_AT_call_tail_call`).
fn jumps_on(unit: &Unit<Slice<'_>>, function: UnitOffset) -> gimli::Result<bool> {
    let mut entries = unit.entries_raw(Some(function))?;
    let mut first = true;
    while !entries.is_empty() && (first || entries.next_depth() > 0) {
        first = false;
        let Some(abbreviation) = entries.read_abbreviation()? else { continue };
        let specs = abbreviation.attributes();
        if specs.iter().any(|spec| spec.name() == dw::DW_AT_call_tail_call) {
            return Ok(true);
        }
        entries.skip_attributes(specs)?;
    }
    Ok(false)
}
