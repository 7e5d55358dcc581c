//! All compilation units of one object, in parallel, gathered into one draft. What is taken from a single unit is in
//! `scopes.rs`, `lines.rs` and `types.rs`.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use gimli::{
    AttributeValue, DebugInfoOffset, Dwarf, Unit, UnitHeader, UnitOffset, constants as dw,
};
use rayon::prelude::*;

use super::lines::{Files, Stretch};
use super::scopes::{self, Scope};
use super::types::UnitTypes;
use super::{Slice, lines};
use crate::record::{LineRecord, ScopeRecord};
use crate::{Error, Prototype, base_name};

/// The DWARF data of one object.
pub(crate) struct Units<'d> {
    pub(crate) dwarf: Dwarf<Slice<'d>>,
    /// In the order of the section.
    pub(super) headers: Vec<UnitHeader<Slice<'d>>>,
}

fn dwarf_error(what: &'static str) -> impl Fn(gimli::Error) -> Error {
    move |source| Error::Dwarf { what, source }
}

impl<'d> Units<'d> {
    /// Reads the unit headers.
    pub(super) fn new(dwarf: Dwarf<Slice<'d>>) -> Result<Self, Error> {
        let mut headers = Vec::new();
        let mut units = dwarf.units();
        while let Some(header) = units.next().map_err(dwarf_error(".debug_info"))? {
            headers.push(header);
        }
        Ok(Self { dwarf, headers })
    }

    /// Without the unit headers: references from one unit into another lead nowhere then.
    pub(crate) fn alone(dwarf: Dwarf<Slice<'d>>) -> Self {
        Self { dwarf, headers: Vec::new() }
    }

    /// Text of a string attribute; `None` when it is damaged or not UTF-8.
    pub(crate) fn text(
        &self,
        unit: &Unit<Slice<'d>>,
        value: AttributeValue<Slice<'d>>,
    ) -> Option<&'d str> {
        std::str::from_utf8(self.dwarf.attr_string(unit, value).ok()?.slice()).ok()
    }

    /// Name of the entry that a reference leads to, through further origins.
    pub(crate) fn name_at(
        &self,
        unit: &Unit<Slice<'d>>,
        reference: AttributeValue<Slice<'d>>,
        depth: usize,
    ) -> Option<&'d str> {
        let depth = depth.checked_sub(1)?;
        match reference {
            AttributeValue::UnitRef(offset) => self.name_of(unit, offset, depth),
            // Another unit's: seen with link-time optimisation.
            AttributeValue::DebugInfoRef(offset) => {
                let (unit, offset) = self.unit_at(offset)?;
                self.name_of(&unit, offset, depth)
            }
            _ => None,
        }
    }

    fn unit_at(&self, at: DebugInfoOffset) -> Option<(Unit<Slice<'d>>, UnitOffset)> {
        let start =
            |header: &UnitHeader<Slice<'d>>| header.debug_info_offset().map(|start| start.0);
        let index = self.headers.partition_point(|header| start(header) <= Some(at.0));
        let header = *self.headers.get(index.checked_sub(1)?)?;
        let offset = UnitOffset(at.0.checked_sub(start(&header)?)?);
        Some((self.dwarf.unit(header).ok()?, offset))
    }

    fn name_of(&self, unit: &Unit<Slice<'d>>, at: UnitOffset, depth: usize) -> Option<&'d str> {
        let entry = unit.entry(at).ok()?;
        if let Some(name) = entry.attr_value(dw::DW_AT_name) {
            return self.text(unit, name);
        }
        let origin = entry.attr_value(dw::DW_AT_abstract_origin);
        self.name_at(unit, origin.or(entry.attr_value(dw::DW_AT_specification))?, depth)
    }
}

/// What one unit gives.
struct UnitOutput<'d> {
    functions: Vec<&'d str>,
    scopes: Vec<Scope>,
    /// File number by the line program's, plus one.
    call_files: Vec<u32>,
    paths: Vec<String>,
    stretches: Vec<Stretch>,
    prototypes: Vec<(&'d str, Prototype)>,
}

/// What all units give.
#[derive(Debug, Default)]
pub(super) struct Gathered<'d> {
    pub(super) functions: Vec<&'d str>,
    pub(super) files: Vec<String>,
    pub(super) scopes: Vec<ScopeRecord>,
    pub(super) lines: Vec<LineRecord>,
    pub(super) prototypes: HashMap<&'d str, Prototype>,
    /// Units that could not be read.
    pub(super) damaged: usize,
}

fn of_unit<'d>(
    units: &Units<'d>,
    header: UnitHeader<Slice<'d>>,
    text: &[Range<u64>],
    wanted: &(dyn Fn(&str) -> bool + Sync),
) -> gimli::Result<UnitOutput<'d>> {
    let unit = units.dwarf.unit(header)?;
    let found = scopes::of_unit(units, &unit, text)?;
    let changes = scopes::transitions(&found.covered);
    let mut files = Files::default();
    let stretches = lines::of_unit(units, &unit, &changes, text, &mut files)?;
    let program = unit.line_program.as_ref();
    let call_files = found.scopes.iter().map(|scope| match program {
        Some(program) if scope.parent != 0 => {
            files.number(units, &unit, program.header(), scope.call_file)
        }
        _ => 0,
    });
    let call_files = call_files.collect();
    let mut types = UnitTypes::new(units, &unit);
    let mut prototypes = Vec::new();
    for defined in &found.defined {
        let name = found.functions.get(defined.function as usize).copied().unwrap_or("");
        if wanted(name) {
            prototypes.extend(types.prototype(defined.entry).map(|own| (name, own)));
        }
    }
    Ok(UnitOutput {
        functions: found.functions,
        scopes: found.scopes,
        call_files,
        paths: files.paths,
        stretches,
        prototypes,
    })
}

/// Compiles all units. `text` are the ranges of code; prototypes are made of functions whose name is `wanted`.
pub(super) fn gather<'d>(
    units: &Units<'d>,
    text: &[Range<u64>],
    wanted: &(dyn Fn(&str) -> bool + Sync),
) -> Gathered<'d> {
    // Big units first would be better balanced, but the order of the section reads the file sequentially.
    let outputs: Vec<_> =
        units.headers.par_iter().map(|header| of_unit(units, *header, text, wanted)).collect();
    let mut gather = Gatherer::default();
    let mut stretches = Vec::new();
    for output in outputs {
        match output {
            Ok(output) => stretches.extend(gather.unit(output)),
            Err(_) => gather.out.damaged += 1,
        }
    }
    gather.lines(stretches);
    gather.out
}

/// A unit's numbers, translated.
struct UnitNumbers {
    scopes: Vec<Scope>,
    call_files: Vec<u32>,
    functions: Vec<u32>,
    files: Vec<u32>,
    /// Number plus one of each scope that has been given one.
    given: Vec<u32>,
}

#[derive(Default)]
struct Gatherer<'d> {
    out: Gathered<'d>,
    functions: HashMap<&'d str, u32>,
    files: HashMap<String, u32>,
    units: Vec<UnitNumbers>,
    ambiguous: HashSet<&'d str>,
}

impl<'d> Gatherer<'d> {
    /// Takes in a unit; its stretches come back with the number of the unit.
    fn unit(&mut self, output: UnitOutput<'d>) -> impl Iterator<Item = (usize, Stretch)> + use<'d> {
        let functions = output.functions.iter().map(|name| {
            let next = self.out.functions.len() as u32;
            let number = *self.functions.entry(name).or_insert(next);
            if number == next {
                self.out.functions.push(name);
            }
            number
        });
        let functions = functions.collect();
        let files = output.paths.into_iter().map(|path| {
            let next = self.out.files.len() as u32;
            *self.files.entry(path).or_insert_with_key(|path| {
                self.out.files.push(path.clone());
                next
            })
        });
        let files = files.collect();
        for (name, prototype) in output.prototypes {
            self.prototype(base_name(name), prototype);
        }
        let given = vec![0; output.scopes.len()];
        let (scopes, call_files) = (output.scopes, output.call_files);
        self.units.push(UnitNumbers { scopes, call_files, functions, files, given });
        let unit = self.units.len() - 1;
        output.stretches.into_iter().map(move |stretch| (unit, stretch))
    }

    /// Static functions of one name with different prototypes: a lookup by name could not tell which.
    fn prototype(&mut self, name: &'d str, prototype: Prototype) {
        if self.ambiguous.contains(name) {
            return;
        }
        match self.out.prototypes.get(name) {
            Some(other) if *other != prototype => {
                self.out.prototypes.remove(name);
                self.ambiguous.insert(name);
            }
            _ => drop(self.out.prototypes.insert(name, prototype)),
        }
    }

    fn lines(&mut self, mut stretches: Vec<(usize, Stretch)>) {
        stretches.sort_by_key(|(_, stretch)| stretch.records.first().map(|record| record.at));
        let count = stretches.iter().map(|(_, stretch)| stretch.records.len()).sum();
        self.out.lines.reserve(count);
        for (unit, stretch) in stretches {
            for record in stretch.records {
                let record = self.placed(unit, record);
                match self.out.lines.last_mut() {
                    // The end of one stretch is where the next starts.
                    Some(last) if last.at == record.at => *last = record,
                    // Two units claim the same code: the first one in the file is kept.
                    Some(last) if last.at > record.at => {}
                    _ => self.out.lines.push(record),
                }
            }
        }
    }

    fn placed(&mut self, unit: usize, record: LineRecord) -> LineRecord {
        let Some(numbers) = self.units.get_mut(unit) else { return record };
        let file = numbers.file(record.file);
        let scope = numbers.scope(record.scope, &mut self.out.scopes);
        LineRecord { scope, file, ..record }
    }
}

impl UnitNumbers {
    fn file(&self, own: u32) -> u32 {
        let index = (own as usize).checked_sub(1);
        index.and_then(|index| self.files.get(index)).map_or(0, |file| file + 1)
    }

    /// Number plus one of a scope; one without a number gets the next, after those around it.
    fn scope(&mut self, own: u32, records: &mut Vec<ScopeRecord>) -> u32 {
        let mut missing = Vec::new();
        let mut next = own;
        let mut parent = 0;
        while let Some(index) = (next as usize).checked_sub(1) {
            match self.given.get(index) {
                Some(0) => missing.push(index),
                Some(&given) => {
                    parent = given;
                    break;
                }
                None => break,
            }
            // A scope's parent has a smaller number, so this ends.
            next = self.scopes.get(index).map_or(0, |scope| scope.parent).min(next - 1);
        }
        for index in missing.into_iter().rev() {
            let (Some(scope), Some(&call_file)) =
                (self.scopes.get(index), self.call_files.get(index))
            else {
                continue;
            };
            let function = (scope.function as usize).checked_sub(1);
            let function = function.and_then(|index| self.functions.get(index));
            let call_file = self.file(call_file);
            records.push(ScopeRecord {
                function: function.map_or(0, |function| function + 1),
                parent,
                call_file: if parent == 0 { 0 } else { call_file },
                call_line: if parent == 0 { 0 } else { scope.call_line },
                call_column: if parent == 0 { 0 } else { scope.call_column },
            });
            parent = records.len() as u32;
            if let Some(given) = self.given.get_mut(index) {
                *given = parent;
            }
        }
        parent
    }
}
