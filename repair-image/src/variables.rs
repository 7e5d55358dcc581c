//! The variables of one object with the addresses they hold at and the layouts they need, and their packed form in a
//! knowledge file. Finding them in debug information is in `compile/variables.rs`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use guest::{GuestVirt, Reg};

use crate::layout::{Layout, LayoutMember, Layouts, MAX_DEPTH};
use crate::table::{self, Columns, Reader};
use crate::{TypeShape, Variable, VariableLocation};

/// Largest unpacked section that is believed, bytes.
const MAX_UNPACKED: usize = 64 << 20;
/// Most members of all layouts that are believed: nested ones are repeated.
const MAX_MEMBERS: usize = 1 << 20;
/// Most variables in one place each that are believed.
const MAX_EXTENTS: u64 = 1 << 20;
/// Columns: texts, numbers of names and types, numbers of places.
const COLUMNS: usize = 4;
const TEXT: usize = 0;
const LENGTH: usize = 1;
const TYPE: usize = 2;
const PLACE: usize = 3;

/// A variable in one place of one scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Addresses of code at which it is there.
    pub(crate) code: Range<u64>,
    /// Depth of its scope; the innermost has the largest.
    pub(crate) depth: u32,
    pub(crate) variable: Variable,
}

/// All variables of one object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variables {
    pub(crate) extents: Vec<Extent>,
    pub(crate) layouts: Layouts,
}

impl Variables {
    /// The variables that are there when control is at `at`, innermost scope first.
    pub(crate) fn at(&self, at: u64) -> Vec<Variable> {
        let mut found: Vec<&Extent> =
            self.extents.iter().filter(|extent| extent.code.contains(&at)).collect();
        found.sort_by_key(|extent| std::cmp::Reverse(extent.depth));
        found.into_iter().map(|extent| extent.variable.clone()).collect()
    }

    /// The packed form; empty when there is nothing.
    pub(crate) fn encode(&self) -> Vec<u8> {
        if self.extents.is_empty() && self.layouts.is_empty() {
            return Vec::new();
        }
        let mut body = Writer { out: Columns::new(COLUMNS), texts: HashMap::new() };
        body.out.push(PLACE, self.extents.len() as u64);
        let mut before = 0;
        for extent in &self.extents {
            body.extent(extent, before);
            before = extent.code.start;
        }
        let mut layouts: Vec<_> = self.layouts.iter().collect();
        layouts.sort_by_key(|(name, _)| *name);
        body.out.push(TYPE, layouts.len() as u64);
        for (name, layout) in layouts {
            body.text(name);
            body.layout(layout.as_deref());
        }
        table::compress_hard(&body.out.finish())
    }

    /// Reads the packed form; `None` when it is damaged.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return Some(Self::default());
        }
        let bytes = table::unpack(bytes, MAX_UNPACKED)?;
        let columns = Reader::new(&bytes, COLUMNS)?;
        let mut body = Parser { columns, texts: Vec::new(), members: MAX_MEMBERS };
        let mut out = Self::default();
        let mut before = 0;
        for _ in 0..body.columns.next(PLACE).filter(|&count| count <= MAX_EXTENTS)? {
            let extent = body.extent(before)?;
            before = extent.code.start;
            out.extents.push(extent);
        }
        for _ in 0..body.columns.next(TYPE)? {
            let name = body.text()?;
            let layout = body.layout(MAX_DEPTH)?;
            out.layouts.insert(name, layout.map(Arc::new));
        }
        Some(out)
    }
}

struct Writer<'a> {
    out: Columns,
    texts: HashMap<&'a str, u64>,
}

impl<'a> Writer<'a> {
    /// A text by its number; a number that is new has its bytes in another column.
    fn text(&mut self, text: &'a str) {
        let next = self.texts.len() as u64;
        let number = *self.texts.entry(text).or_insert(next);
        self.out.push(TYPE, number);
        if number == next {
            self.out.push(LENGTH, text.len() as u64);
            self.out.push_bytes(TEXT, text.as_bytes());
        }
    }

    fn extent(&mut self, extent: &'a Extent, before: u64) {
        self.out.push(PLACE, extent.code.start.wrapping_sub(before));
        self.out.push(PLACE, extent.code.end.wrapping_sub(extent.code.start));
        self.out.push(PLACE, u64::from(extent.depth));
        self.text(&extent.variable.name);
        self.shape(&extent.variable.shape);
        let (kind, reg, number) = match extent.variable.location {
            VariableLocation::Register(reg) => (0, Some(reg), 0),
            VariableLocation::AtRegister(reg, offset) => (1, Some(reg), i64::from(offset)),
            VariableLocation::AtCfa(offset) => (2, None, i64::from(offset)),
            VariableLocation::Address(at) => (3, None, at.0.cast_signed()),
        };
        self.out.push(PLACE, kind);
        if let Some(reg) = reg {
            self.out.push(PLACE, reg as u64);
        }
        if kind != 0 {
            self.out.push_signed(PLACE, number);
        }
    }

    fn shape(&mut self, shape: &'a TypeShape) {
        match shape {
            TypeShape::Void => self.out.push(TYPE, 0),
            TypeShape::Int { name, size, signed } => {
                self.out.push(TYPE, 1 + u64::from(*signed));
                self.text(name);
                self.out.push(TYPE, u64::from(*size));
            }
            TypeShape::Bool => self.out.push(TYPE, 3),
            TypeShape::Enum { name, tag, size } => {
                self.out.push(TYPE, 4);
                self.text(name);
                self.text(tag);
                self.out.push(TYPE, u64::from(*size));
            }
            TypeShape::Pointer { to: None } => self.out.push(TYPE, 5),
            TypeShape::Pointer { to: Some(to) } => {
                self.out.push(TYPE, 6);
                self.text(to);
            }
            TypeShape::Aggregate { name, size } => {
                self.out.push(TYPE, 7);
                self.text(name);
                self.out.push(TYPE, *size);
            }
            TypeShape::Other => self.out.push(TYPE, 8),
        }
    }

    /// Number of members plus one, then these; 0 = no layout.
    fn layout(&mut self, layout: Option<&'a Layout>) {
        let Some(layout) = layout else { return self.out.push(TYPE, 0) };
        self.out.push(TYPE, layout.members.len() as u64 + 1);
        for member in &layout.members {
            self.text(&member.name);
            self.out.push(TYPE, member.offset);
            self.out.push(TYPE, member.size);
            self.out.push(TYPE, member.count.map_or(0, |count| count.saturating_add(1)));
            self.shape(&member.shape);
            self.layout(member.inner.as_deref());
        }
    }
}

struct Parser<'a> {
    columns: Reader<'a>,
    texts: Vec<&'a str>,
    /// Members that may still be read.
    members: usize,
}

impl Parser<'_> {
    fn text(&mut self) -> Option<String> {
        let number = usize::try_from(self.columns.next(TYPE)?).ok()?;
        if number == self.texts.len() {
            let len = usize::try_from(self.columns.next(LENGTH)?).ok()?;
            self.texts.push(std::str::from_utf8(self.columns.next_bytes(TEXT, len)?).ok()?);
        }
        self.texts.get(number).map(|text| (*text).to_owned())
    }

    fn extent(&mut self, before: u64) -> Option<Extent> {
        let start = before.wrapping_add(self.columns.next(PLACE)?);
        let end = start.wrapping_add(self.columns.next(PLACE)?);
        let depth = self.columns.next_u32(PLACE)?;
        let (name, shape) = (self.text()?, self.shape()?);
        let offset = |columns: &mut Reader<'_>| i32::try_from(columns.next_signed(PLACE)?).ok();
        let reg = |columns: &mut Reader<'_>| {
            Reg::ALL.get(usize::try_from(columns.next(PLACE)?).ok()?).copied()
        };
        let columns = &mut self.columns;
        let location = match columns.next(PLACE)? {
            0 => VariableLocation::Register(reg(columns)?),
            1 => VariableLocation::AtRegister(reg(columns)?, offset(columns)?),
            2 => VariableLocation::AtCfa(offset(columns)?),
            3 => {
                let at = columns.next_signed(PLACE)?;
                VariableLocation::Address(GuestVirt(at.cast_unsigned()))
            }
            _ => return None,
        };
        Some(Extent { code: start..end, depth, variable: Variable { name, shape, location } })
    }

    fn shape(&mut self) -> Option<TypeShape> {
        let size = |columns: &mut Reader<'_>| u8::try_from(columns.next(TYPE)?).ok();
        Some(match self.columns.next(TYPE)? {
            0 => TypeShape::Void,
            kind @ (1 | 2) => {
                let name = self.text()?;
                TypeShape::Int { name, size: size(&mut self.columns)?, signed: kind == 2 }
            }
            3 => TypeShape::Bool,
            4 => {
                let (name, tag) = (self.text()?, self.text()?);
                TypeShape::Enum { name, tag, size: size(&mut self.columns)? }
            }
            5 => TypeShape::Pointer { to: None },
            6 => TypeShape::Pointer { to: Some(self.text()?) },
            7 => TypeShape::Aggregate { name: self.text()?, size: self.columns.next(TYPE)? },
            8 => TypeShape::Other,
            _ => return None,
        })
    }

    /// `Some(None)` for a name without layout.
    #[expect(clippy::option_option, reason = "the outer one is damage, the inner one is an answer")]
    fn layout(&mut self, depth: usize) -> Option<Option<Layout>> {
        let Some(count) = self.columns.next(TYPE)?.checked_sub(1) else { return Some(None) };
        let depth = depth.checked_sub(1)?;
        let mut members = Vec::new();
        for _ in 0..count {
            self.members = self.members.checked_sub(1)?;
            let name = self.text()?;
            let (offset, size) = (self.columns.next(TYPE)?, self.columns.next(TYPE)?);
            let count = self.columns.next(TYPE)?.checked_sub(1);
            let shape = self.shape()?;
            let inner = self.layout(depth)?.map(Arc::new);
            members.push(LayoutMember { name, offset, size, count, shape, inner });
        }
        Some(Some(Layout { members }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(name: &str, code: Range<u64>, depth: u32, location: VariableLocation) -> Extent {
        let shape = TypeShape::Pointer { to: Some("gauge".to_owned()) };
        Extent { code, depth, variable: Variable { name: name.to_owned(), shape, location } }
    }

    fn sample() -> Variables {
        let int = TypeShape::Int { name: "int".to_owned(), size: 4, signed: true };
        let member = |name: &str, count, shape: &TypeShape, inner| LayoutMember {
            name: name.to_owned(),
            offset: 8,
            size: 4,
            count,
            shape: shape.clone(),
            inner,
        };
        let inner = Layout { members: vec![member("gain", None, &int, None)] };
        let shape = TypeShape::Aggregate { name: "calibration".to_owned(), size: 16 };
        let members = vec![
            member("samples", Some(0), &int, None),
            member("calibration", None, &shape, Some(Arc::new(inner))),
        ];
        let layouts = HashMap::from([
            ("gauge".to_owned(), Some(Arc::new(Layout { members }))),
            ("int".to_owned(), None),
        ]);
        let start = 0xffff_ffff_c000_0010;
        let extents = vec![
            extent("all", 0..u64::MAX, 0, VariableLocation::Address(GuestVirt(start + 0x900))),
            extent("outer", start..start + 32, 1, VariableLocation::Register(Reg::R15)),
            extent("spilled", start + 4..start + 8, 1, VariableLocation::AtCfa(-72)),
            extent("inner", start + 4..start + 8, 3, VariableLocation::AtRegister(Reg::Rbp, -8)),
        ];
        Variables { extents, layouts }
    }

    #[test]
    fn what_is_packed_comes_out() {
        let variables = sample();
        assert_eq!(Variables::decode(&variables.encode()), Some(variables));
        assert!(Variables::default().encode().is_empty());
        assert_eq!(Variables::decode(&[]), Some(Variables::default()));
    }

    #[test]
    fn the_innermost_scope_comes_first() {
        let names = |at| {
            let found = sample().at(at);
            found.into_iter().map(|variable| variable.name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(0xffff_ffff_c000_0014), "inner outer spilled all");
        assert_eq!(names(0xffff_ffff_c000_0018), "outer all");
    }

    proptest! {
        #[test]
        fn any_change_is_survived(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut columns = table::unpack(&sample().encode(), MAX_UNPACKED).unwrap();
            let at = at.index(columns.len());
            columns[at] = byte;
            let _ = Variables::decode(&table::compress(&columns));
        }
    }
}
