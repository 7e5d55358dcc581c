//! Debug information that is read where it is asked for, one function at a time: the variables in force at an address of
//! code, and what they hold in a frame. For dumps: while a guest is down nothing reads DWARF. What is kept of DWARF for
//! that is `compile/`'s.

mod address_ranges;
mod debug_file;
mod evaluate;
mod function;
#[cfg(test)]
mod hostile_tests;
mod type_name;

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use gimli::{DebugInfoOffset, Dwarf};
use guest::LinkAddr;

use crate::compile::Slice;
use crate::compile::units::Units;
use address_ranges::UnitRanges;
pub use debug_file::DebugFile;
pub use evaluate::{Absent, Argument, FrameState, Held};
use function::ReadUnit;
pub use function::{FrameVariable, InForce};
pub use type_name::{ValueKind, ValueType};

/// Units that are kept read; a backtrace touches some twenty.
const UNITS_MAX: usize = 256;
/// Addresses whose variables are kept.
const ADDRESSES_MAX: usize = 4096;

/// The debug information of one object.
pub struct DebugInfo<'d> {
    units: Units<'d>,
    ranges: OnceCell<UnitRanges>,
    read: RefCell<HashMap<DebugInfoOffset, Option<Rc<ReadUnit<'d>>>>>,
    in_force: RefCell<HashMap<LinkAddr, Option<Rc<InForce<'d>>>>>,
}

impl<'d> DebugInfo<'d> {
    fn new(dwarf: Dwarf<Slice<'d>>) -> Self {
        Self {
            units: Units::alone(dwarf),
            ranges: OnceCell::new(),
            read: RefCell::default(),
            in_force: RefCell::default(),
        }
    }

    /// The function at an address of code and its variables there, innermost scope first; `None` when nothing is said of
    /// the address. `at` is the address that is looked up: of a call, one before the address that it returns to.
    #[must_use]
    pub fn at(&self, at: LinkAddr) -> Option<Rc<InForce<'d>>> {
        if let Some(known) = self.in_force.borrow().get(&at) {
            return known.clone();
        }
        let found = self.unit_of(at).and_then(|unit| InForce::read(&self.units, &unit, at));
        let found = found.map(Rc::new);
        let mut kept = self.in_force.borrow_mut();
        if kept.len() >= ADDRESSES_MAX {
            kept.clear();
        }
        kept.insert(at, found.clone());
        found
    }

    /// How many units are read and kept: some 0.4 MiB of the file are looked at for each.
    #[must_use]
    pub fn units_read(&self) -> usize {
        self.read.borrow().len()
    }

    fn unit_of(&self, at: LinkAddr) -> Option<Rc<ReadUnit<'d>>> {
        let ranges = self.ranges.get_or_init(|| UnitRanges::of(&self.units.dwarf));
        let offset = ranges.at(at.0)?;
        if let Some(known) = self.read.borrow().get(&offset) {
            return known.clone();
        }
        let unit = ReadUnit::read(&self.units, offset).ok().map(Rc::new);
        let mut kept = self.read.borrow_mut();
        if kept.len() >= UNITS_MAX {
            kept.clear();
        }
        kept.insert(offset, unit.clone());
        unit
    }

    /// What the variable holds in a frame that stands where it is in force.
    ///
    /// # Errors
    /// Why that is not known.
    pub fn held(
        &self,
        in_force: &InForce<'d>,
        variable: &FrameVariable<'d>,
        state: &FrameState<'_>,
    ) -> Result<Held, Absent> {
        evaluate::variable(&self.units, in_force.unit(), variable, state)
    }

    /// What a function was called with, as the calling frame tells. `returns_to` is the address of code behind the call, `state` is that of the calling frame; `None` when it can't be told, and
    /// when another function than `callee` is called there.
    #[must_use]
    pub fn passed(
        &self,
        returns_to: LinkAddr,
        callee: &str,
        argument: Argument<'_>,
        state: &FrameState<'_>,
    ) -> Option<u64> {
        let in_force = self.at(LinkAddr(returns_to.0.wrapping_sub(1)))?;
        let call = in_force.call_to(&self.units, returns_to, callee)?;
        let (_, value) = call.into_iter().find(|(own, _)| *own == argument)?;
        evaluate::number(&self.units, in_force.unit(), value, in_force.base(), state)
    }

    /// Name of the enumerator with a value in the type of a variable.
    #[must_use]
    pub fn enumerator(
        &self,
        in_force: &InForce<'d>,
        variable: &FrameVariable<'d>,
        value: i64,
    ) -> Option<&'d str> {
        type_name::enumerator(&self.units, in_force.unit(), variable.type_at(), value)
    }
}
