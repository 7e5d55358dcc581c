//! Types of variables: their names as C programmers read them (without `struct`, qualifiers left out), and how a value of
//! them is to be read. Layouts are not followed.

use gimli::{AttributeValue, DebuggingInformationEntry, Unit, UnitOffset, constants as dw};

use crate::compile::Slice;
use crate::compile::types::{Entry, UnitTypes};
use crate::compile::units::Units;

/// Longest chain of pointers, typedefs, arrays and qualifiers that is followed.
const MAX_CHAIN: usize = 32;
/// Enumerators of one type that are looked at.
const MAX_ENUMERATORS: usize = 4096;
/// Bytes of a pointer.
const POINTER: u64 = 8;

/// How a value is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ValueKind {
    /// An address.
    Pointer,
    /// An address of a character, perhaps of a string.
    Text,
    /// A signed number.
    Signed,
    /// An unsigned number.
    Unsigned,
    /// `bool`
    Bool,
    /// One of an enumeration.
    Enumeration,
    /// A structure, a union, an array: it has an address and no value.
    Whole,
    /// Anything else.
    Other,
}

/// A type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueType {
    /// Its name: `file *`, `unsigned int`, `char[16]`.
    pub name: String,
    /// Bytes of a value; 0 = not known.
    pub size: u64,
    /// How a value is read.
    pub kind: ValueKind,
}

/// The type at an offset of a unit.
pub(super) fn of<'d>(units: &Units<'d>, unit: &Unit<Slice<'d>>, at: UnitOffset) -> ValueType {
    let mut spelling = Spelling::default();
    let (mut size, mut kind) = (None, None);
    let mut next = Some(at);
    for _ in 0..MAX_CHAIN {
        let Some(Ok(entry)) = next.map(|at| unit.entry(at)) else { break };
        if kind.is_none() && !passes_on(&entry) {
            (kind, size) = (Some(kind_of(&entry)), size_of(&entry));
        }
        spelling.read(units, unit, &entry);
        if spelling.name.is_some() && kind.is_some() {
            break;
        }
        next = UnitTypes::type_of(&entry);
    }
    let kind = match kind {
        Some(ValueKind::Pointer) if spelling.is_text() => ValueKind::Text,
        kind => kind.unwrap_or(ValueKind::Other),
    };
    ValueType { name: spelling.written(), size: size.unwrap_or(0), kind }
}

/// A type's name while it is put together.
#[derive(Default)]
struct Spelling<'d> {
    /// What stands in front; `None` at the end = `void`.
    name: Option<&'d str>,
    /// Pointers and arrays.
    behind: String,
}

impl<'d> Spelling<'d> {
    fn read(&mut self, units: &Units<'d>, unit: &Unit<Slice<'d>>, entry: &Entry<'d>) {
        if self.name.is_some() {
            return;
        }
        let own = entry.attr_value(dw::DW_AT_name).and_then(|own| units.text(unit, own));
        self.name = match entry.tag() {
            dw::DW_TAG_pointer_type => {
                self.behind.insert(0, '*');
                None
            }
            dw::DW_TAG_array_type => {
                self.behind.push_str(&extent(unit, entry));
                None
            }
            dw::DW_TAG_subroutine_type => Some("function"),
            dw::DW_TAG_structure_type => own.or(Some("struct")),
            dw::DW_TAG_union_type => own.or(Some("union")),
            dw::DW_TAG_enumeration_type => own.or(Some("enum")),
            dw::DW_TAG_typedef | dw::DW_TAG_base_type => own,
            _ => None,
        };
    }

    fn is_text(&self) -> bool {
        self.name == Some("char") && self.behind == "*"
    }

    fn written(&self) -> String {
        let gap = if self.behind.starts_with('*') { " " } else { "" };
        format!("{}{gap}{}", self.name.unwrap_or("void"), self.behind)
    }
}

/// Whether a type is the next one under another name.
fn passes_on(entry: &Entry<'_>) -> bool {
    matches!(
        entry.tag(),
        dw::DW_TAG_typedef
            | dw::DW_TAG_const_type
            | dw::DW_TAG_volatile_type
            | dw::DW_TAG_restrict_type
            | dw::DW_TAG_atomic_type
    )
}

fn kind_of(entry: &Entry<'_>) -> ValueKind {
    match entry.tag() {
        dw::DW_TAG_pointer_type => ValueKind::Pointer,
        dw::DW_TAG_enumeration_type => ValueKind::Enumeration,
        dw::DW_TAG_structure_type | dw::DW_TAG_union_type | dw::DW_TAG_array_type => {
            ValueKind::Whole
        }
        dw::DW_TAG_base_type => match entry.attr_value(dw::DW_AT_encoding) {
            Some(AttributeValue::Encoding(encoding)) => kind_of_base(encoding),
            _ => ValueKind::Other,
        },
        _ => ValueKind::Other,
    }
}

fn kind_of_base(encoding: gimli::DwAte) -> ValueKind {
    match encoding {
        dw::DW_ATE_boolean => ValueKind::Bool,
        dw::DW_ATE_signed | dw::DW_ATE_signed_char => ValueKind::Signed,
        dw::DW_ATE_unsigned | dw::DW_ATE_unsigned_char => ValueKind::Unsigned,
        _ => ValueKind::Other,
    }
}

fn size_of(entry: &Entry<'_>) -> Option<u64> {
    let size = entry.attr_value(dw::DW_AT_byte_size).and_then(|size| size.udata_value());
    size.or((entry.tag() == dw::DW_TAG_pointer_type).then_some(POINTER))
}

/// `[16]`, or `[]` where the number of elements is not said.
fn extent(unit: &Unit<Slice<'_>>, array: &Entry<'_>) -> String {
    let count = || {
        let mut entries = unit.entries_raw(Some(array.offset())).ok()?;
        let mut entry = DebuggingInformationEntry::null();
        entries.read_entry(&mut entry).ok()?;
        entries.read_entry(&mut entry).ok()?.then_some(())?;
        let bound = entry.attr_value(dw::DW_AT_upper_bound)?.udata_value()?;
        bound.checked_add(1)
    };
    let count = if array.has_children() { count() } else { None };
    count.map_or_else(|| "[]".to_owned(), |count| format!("[{count}]"))
}

/// Name of the enumerator with a value in the enumeration behind the type at an offset.
pub(super) fn enumerator<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    at: UnitOffset,
    value: i64,
) -> Option<&'d str> {
    let mut next = at;
    for _ in 0..MAX_CHAIN {
        let entry = unit.entry(next).ok()?;
        if entry.tag() == dw::DW_TAG_enumeration_type && entry.has_children() {
            return enumerator_in(units, unit, next, value);
        }
        next = UnitTypes::type_of(&entry)?;
    }
    None
}

fn enumerator_in<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    at: UnitOffset,
    value: i64,
) -> Option<&'d str> {
    let mut entries = unit.entries_raw(Some(at)).ok()?;
    let mut entry = DebuggingInformationEntry::null();
    entries.read_entry(&mut entry).ok()?;
    for _ in 0..MAX_ENUMERATORS {
        // The end of the list.
        if entries.is_empty() || !entries.read_entry(&mut entry).ok()? {
            return None;
        }
        if entry.tag() != dw::DW_TAG_enumerator {
            continue;
        }
        let own = entry.attr_value(dw::DW_AT_const_value)?;
        if own.sdata_value() == Some(value) || own.udata_value() == Some(value as u64) {
            return units.text(unit, entry.attr_value(dw::DW_AT_name)?);
        }
    }
    None
}
