//! Debug information that leads in circles, lies about counts or is cut off, laid out by hand.

use std::collections::HashMap;

use gimli::SectionId;
use guest::{GuestPhys, GuestVirt, MemoryError, Reg, Registers, VirtMemory};
use proptest::prelude::*;

use super::*;
use crate::compile::relocate;

const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Offset of the first entry: the header of a DWARF 5 unit has 12 bytes.
const FIRST: u32 = 12;

/// Abbreviations: code, tag, children, then attributes with their forms.
#[rustfmt::skip]
const ABBREVIATIONS: &[&[u8]] = &[
    // compile_unit: low_pc addr, high_pc data8
    &[1, 0x11, 1, 0x11, 0x01, 0x12, 0x07, 0, 0],
    // subprogram: name string, low_pc addr, high_pc data8, frame_base exprloc
    &[2, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x07, 0x40, 0x18, 0, 0],
    // variable: name string, type ref4, location exprloc
    &[3, 0x34, 0, 0x03, 0x08, 0x49, 0x13, 0x02, 0x18, 0, 0],
    // variable: abstract_origin ref4
    &[4, 0x34, 0, 0x31, 0x13, 0, 0],
    // typedef: name string, type ref4
    &[5, 0x16, 0, 0x03, 0x08, 0x49, 0x13, 0, 0],
    // pointer_type: type ref4
    &[6, 0x0f, 0, 0x49, 0x13, 0, 0],
    // base_type: name string, encoding data1, byte_size data1
    &[7, 0x24, 0, 0x03, 0x08, 0x3e, 0x0b, 0x0b, 0x0b, 0, 0],
    // lexical_block: sibling ref4
    &[8, 0x0b, 1, 0x01, 0x13, 0, 0],
    // array_type: type ref4
    &[9, 0x01, 1, 0x49, 0x13, 0, 0],
    // subrange_type: upper_bound data8
    &[10, 0x21, 0, 0x2f, 0x07, 0, 0],
    // variable: name string, type ref4, const_value sdata
    &[11, 0x34, 0, 0x03, 0x08, 0x49, 0x13, 0x1c, 0x0d, 0, 0],
];

/// A unit with one function, while it is written.
struct Unit(Vec<u8>);

impl Unit {
    /// Types first, then the function `f`, of 0x100 bytes.
    fn new(types: impl FnOnce(&mut Self)) -> Self {
        let mut unit = Self(vec![1]);
        unit.word(TEXT).word(0x1000);
        types(&mut unit);
        unit.0.extend(b"\x02f\0");
        // The CFA.
        unit.word(TEXT).word(0x100).block(&[0x9c]);
        unit
    }

    fn word(&mut self, word: u64) -> &mut Self {
        self.0.extend(word.to_le_bytes());
        self
    }

    fn reference(&mut self, to: u32) -> &mut Self {
        self.0.extend(to.to_le_bytes());
        self
    }

    fn block(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.push(bytes.len() as u8);
        self.0.extend(bytes);
        self
    }

    /// Offset of what is written next.
    fn here(&self) -> u32 {
        FIRST + self.0.len() as u32
    }

    fn long(&mut self) -> u32 {
        let at = self.here();
        self.0.extend(b"\x07long\0\x05\x08");
        at
    }

    fn variable(&mut self, name: &str, type_at: u32, location: &[u8]) -> &mut Self {
        self.0.push(3);
        self.0.extend(name.bytes().chain([0]));
        self.reference(type_at).block(location)
    }

    /// The section.
    fn end(&self) -> Vec<u8> {
        let entries = [self.0.as_slice(), &[0, 0]].concat();
        let mut section = (entries.len() as u32 + 8).to_le_bytes().to_vec();
        section.extend([5, 0, 1, 8, 0, 0, 0, 0]);
        section.extend(entries);
        section
    }
}

/// Memory whose every word is its own address.
struct Echo;

impl VirtMemory for Echo {
    fn read(&self, at: GuestVirt, into: &mut [u8]) -> Result<(), MemoryError> {
        for (place, byte) in into.iter_mut().zip(at.0.to_le_bytes()) {
            *place = byte;
        }
        Ok(())
    }

    fn translate(&self, at: GuestVirt) -> Result<GuestPhys, MemoryError> {
        Ok(GuestPhys(at.0))
    }
}

/// What is said of the variables at an address of `f`: type and what it holds, by name.
fn look(info: Vec<u8>) -> Vec<(String, String, Result<Held, Absent>)> {
    let abbreviations = [ABBREVIATIONS.concat(), vec![0]].concat();
    let sections =
        HashMap::from([(SectionId::DebugInfo, info), (SectionId::DebugAbbrev, abbreviations)]);
    let debug = DebugInfo::new(relocate::dwarf(&sections));
    let Some(in_force) = debug.at(LinkAddr(TEXT + 0x10)) else { return Vec::new() };
    let registers = Registers::unknown().with(Reg::Rbx, 7);
    let state = FrameState {
        registers: &registers,
        cfa: Some(GuestVirt(0x1000)),
        memory: &Echo,
        slide: 0x100,
        passed: &|argument| (argument == Argument::In(Reg::Rdi)).then_some(0xd1),
    };
    let told = in_force.variables.iter().map(|variable| {
        let held = debug.held(&in_force, variable, &state);
        let _ = debug.enumerator(&in_force, variable, 1);
        (variable.name.to_owned(), variable.value_type.name.clone(), held)
    });
    told.collect()
}

fn bits(of: &Result<Held, Absent>) -> Result<Option<u64>, Absent> {
    of.as_ref().map(|held| held.bits).map_err(|why| *why)
}

#[test]
fn places_of_all_kinds() {
    let mut long = 0;
    let mut unit = Unit::new(|unit| long = unit.long());
    unit.variable("in_rbx", long, &[0x53]);
    unit.variable("in_rax", long, &[0x50]);
    // fbreg -16: at the CFA less 16.
    unit.variable("on_stack", long, &[0x91, 0x70]);
    // lit5, stack_value.
    unit.variable("five", long, &[0x35, 0x9f]);
    // entry_value(rdi), entry_value(rsi), both as values.
    unit.variable("was_rdi", long, &[0xa3, 1, 0x55, 0x9f]);
    unit.variable("was_rsi", long, &[0xa3, 1, 0x54, 0x9f]);
    unit.variable("nowhere", long, &[]);
    unit.0.extend(b"\x0bconstant\0");
    unit.reference(long).0.push(0x7e);
    // `static`: not the frame's.
    unit.variable("fixed", long, &[&[0x03], &TEXT.to_le_bytes()[..]].concat());
    let said = look(unit.end());
    let names: Vec<_> = said.iter().map(|(name, ..)| name.as_str()).collect();
    let wanted =
        ["in_rbx", "in_rax", "on_stack", "five", "was_rdi", "was_rsi", "nowhere", "constant"];
    assert_eq!(names, wanted);
    let said: Vec<_> = said.iter().map(|(.., held)| bits(held)).collect();
    let known = |bits| Ok(Some(bits));
    assert_eq!(said[..4], [known(7), Err(Absent::Overwritten), known(0xff0), known(5)]);
    assert_eq!(said[4..6], [known(0xd1), Err(Absent::Overwritten)]);
    assert_eq!(said[6..], [Err(Absent::OptimisedOut), known(-2i64 as u64)]);
}

#[test]
fn circles_end() {
    let (mut typedef, mut pointer) = (0, 0);
    let mut unit = Unit::new(|unit| {
        typedef = unit.here();
        unit.0.extend(b"\x05t\0");
        unit.reference(typedef);
        pointer = unit.here();
        unit.0.push(6);
        unit.reference(pointer);
    });
    unit.variable("of_itself", typedef, &[0x53]);
    unit.variable("to_itself", pointer, &[0x53]);
    let own = unit.here();
    unit.0.push(4);
    unit.reference(own);
    // skip -3: back to itself.
    unit.variable("endless", pointer, &[0x2f, 0xfd, 0xff]);
    let said = look(unit.end());
    assert_eq!(said.len(), 3, "{said:?}");
    assert_eq!((said[0].1.as_str(), said[1].1.len()), ("t", "void ".len() + 32));
    assert_eq!(said[2].2, Err(Absent::NotFollowed));
}

#[test]
fn a_sibling_that_leads_back_is_not_followed() {
    let mut long = 0;
    let mut unit = Unit::new(|unit| long = unit.long());
    unit.0.push(8);
    unit.reference(FIRST);
    unit.variable("inner", long, &[0x53]).0.push(0);
    unit.variable("outer", long, &[0x53]);
    let said = look(unit.end());
    // The block has no code: what it declares is in force nowhere.
    assert_eq!(said.iter().map(|it| it.0.as_str()).collect::<Vec<_>>(), ["outer"]);
}

#[test]
fn counts_are_not_believed() {
    let (mut long, mut array) = (0, 0);
    let mut unit = Unit::new(|unit| {
        long = unit.long();
        array = unit.here();
        unit.0.push(9);
        unit.reference(long).0.push(10);
        unit.word(u64::MAX).0.push(0);
    });
    for _ in 0..2000 {
        unit.variable("many", array, &[0x91, 0]);
    }
    let said = look(unit.end());
    assert_eq!(said.len(), 512);
    assert_eq!(said[0].1, "long[]");
    assert_eq!(said[0].2.as_ref().unwrap().at, Some(GuestVirt(0x1000)));
}

fn sample() -> Vec<u8> {
    let mut long = 0;
    let mut unit = Unit::new(|unit| long = unit.long());
    unit.variable("a", long, &[0x91, 0x70]).variable("b", long, &[0xa3, 1, 0x55, 0x9f]);
    unit.end()
}

#[test]
fn what_is_cut_off_is_survived() {
    let whole = sample();
    assert_eq!(look(whole.clone()).len(), 2);
    for end in 0..whole.len() {
        let _ = look(whole[..end].to_vec());
    }
}

proptest! {
    #[test]
    fn any_bytes_are_survived(changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
        let mut info = sample();
        for (at, byte) in changes {
            let at = usize::from(at) % info.len();
            info[at] = byte;
        }
        prop_assert!(look(info).len() <= 512);
    }
}
