//! Types of one compilation unit as shapes, and prototypes of its functions. Layouts of structures are BTF's.

use std::collections::HashMap;

use gimli::{AttributeValue, DebuggingInformationEntry, Unit, UnitOffset, constants as dw};

use super::Slice;
use super::units::Units;
use crate::{Parameter, Prototype, TypeShape};

/// Longest chain of typedefs and modifiers that is followed.
const MAX_CHAIN: usize = 32;
/// Most parameters of a function.
const MAX_PARAMETERS: usize = 64;

pub(crate) type Entry<'d> = DebuggingInformationEntry<Slice<'d>>;

/// Types of one unit.
pub(crate) struct UnitTypes<'a, 'd> {
    units: &'a Units<'d>,
    unit: &'a Unit<Slice<'d>>,
    known: HashMap<UnitOffset, TypeShape>,
}

impl<'a, 'd> UnitTypes<'a, 'd> {
    pub(super) fn new(units: &'a Units<'d>, unit: &'a Unit<Slice<'d>>) -> Self {
        Self { units, unit, known: HashMap::new() }
    }

    pub(super) fn name(&self, entry: &Entry<'d>) -> Option<String> {
        let name = self.units.text(self.unit, entry.attr_value(dw::DW_AT_name)?)?;
        Some(name.to_owned())
    }

    pub(crate) fn type_of(entry: &Entry<'d>) -> Option<UnitOffset> {
        match entry.attr_value(dw::DW_AT_type)? {
            AttributeValue::UnitRef(offset) => Some(offset),
            _ => None,
        }
    }

    /// Follows modifiers and typedefs; `None` inside = void.
    #[expect(clippy::type_complexity, reason = "a type of its own would be used here only")]
    pub(super) fn resolve(
        &self,
        mut offset: Option<UnitOffset>,
    ) -> Option<(Option<(UnitOffset, Entry<'d>)>, Option<String>)> {
        let mut typedef = None;
        for _ in 0..MAX_CHAIN {
            let Some(at) = offset else { return Some((None, typedef)) };
            let entry = self.unit.entry(at).ok()?;
            match entry.tag() {
                dw::DW_TAG_typedef => typedef = typedef.or_else(|| self.name(&entry)),
                dw::DW_TAG_const_type
                | dw::DW_TAG_volatile_type
                | dw::DW_TAG_restrict_type
                | dw::DW_TAG_atomic_type => {}
                _ => return Some((Some((at, entry)), typedef)),
            }
            if entry.has_attr(dw::DW_AT_type) && Self::type_of(&entry).is_none() {
                // In another unit: not looked up.
                return None;
            }
            offset = Self::type_of(&entry);
        }
        None
    }

    /// Shape of the type at this offset; `None` = void.
    pub(super) fn shape(&mut self, offset: Option<UnitOffset>) -> TypeShape {
        let Some(at) = offset else { return TypeShape::Void };
        if let Some(known) = self.known.get(&at) {
            return known.clone();
        }
        let shape = self.new_shape(at).unwrap_or(TypeShape::Other);
        self.known.insert(at, shape.clone());
        shape
    }

    fn new_shape(&self, at: UnitOffset) -> Option<TypeShape> {
        let (found, typedef) = self.resolve(Some(at))?;
        let Some((_, entry)) = found else { return Some(TypeShape::Void) };
        let tag = self.name(&entry).unwrap_or_default();
        let name = typedef.unwrap_or_else(|| tag.clone());
        let size = entry.attr_value(dw::DW_AT_byte_size).and_then(|size| size.udata_value());
        let size = size.unwrap_or(0);
        Some(match entry.tag() {
            dw::DW_TAG_base_type => {
                let encoding = match entry.attr_value(dw::DW_AT_encoding)? {
                    AttributeValue::Encoding(encoding) => encoding,
                    _ => return None,
                };
                let signed = match encoding {
                    dw::DW_ATE_boolean => return Some(TypeShape::Bool),
                    dw::DW_ATE_signed | dw::DW_ATE_signed_char => true,
                    dw::DW_ATE_unsigned | dw::DW_ATE_unsigned_char => false,
                    _ => return None,
                };
                TypeShape::Int { name, size: size as u8, signed }
            }
            dw::DW_TAG_enumeration_type => TypeShape::Enum { name, tag, size: size as u8 },
            dw::DW_TAG_structure_type | dw::DW_TAG_union_type => {
                TypeShape::Aggregate { name, size }
            }
            dw::DW_TAG_pointer_type => TypeShape::Pointer { to: self.pointee(&entry) },
            _ => return None,
        })
    }

    fn pointee(&self, pointer: &Entry<'d>) -> Option<String> {
        let (found, typedef) = self.resolve(Self::type_of(pointer))?;
        typedef.or_else(|| {
            let (_, entry) = found?;
            match entry.tag() {
                dw::DW_TAG_base_type
                | dw::DW_TAG_structure_type
                | dw::DW_TAG_union_type
                | dw::DW_TAG_enumeration_type => self.name(&entry),
                _ => None,
            }
        })
    }

    /// Prototype of the function that this entry describes.
    pub(super) fn prototype(&mut self, at: UnitOffset) -> Option<Prototype> {
        let function = self.unit.entry(at).ok()?;
        if function.has_attr(dw::DW_AT_type) && Self::type_of(&function).is_none() {
            return None;
        }
        // Assembly gives functions an unspecified type: that says nothing.
        let returns = Self::type_of(&function);
        if let Some((Some((_, entry)), _)) = returns.and_then(|at| self.resolve(Some(at)))
            && entry.tag() == dw::DW_TAG_unspecified_type
        {
            return None;
        }
        let returns = self.shape(returns);
        let mut parameters = Vec::new();
        if !function.has_children() {
            return Some(Prototype { returns, parameters });
        }
        let mut entries = self.unit.entries_raw(Some(at)).ok()?;
        let mut entry = DebuggingInformationEntry::null();
        entries.read_entry(&mut entry).ok()?;
        // Compilers put the parameters first.
        while parameters.len() < MAX_PARAMETERS && entries.read_entry(&mut entry).ok()? {
            if entry.tag() != dw::DW_TAG_formal_parameter {
                break;
            }
            let name = self.name(&entry).unwrap_or_default();
            let shape = match (entry.has_attr(dw::DW_AT_type), Self::type_of(&entry)) {
                (true, None) => TypeShape::Other,
                (_, offset) => self.shape(offset),
            };
            parameters.push(Parameter { name, shape });
        }
        Some(Prototype { returns, parameters })
    }
}
