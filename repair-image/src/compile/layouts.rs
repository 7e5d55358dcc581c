//! Layouts of the structures of one compilation unit that its variables lead to. Which variables these are is in
//! `variables.rs`; layouts of the kernel are BTF's.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use gimli::{DebuggingInformationEntry, Unit, UnitOffset, constants as dw};

use super::Slice;
use super::types::{Entry, UnitTypes};
use super::units::Units;
use crate::TypeShape;
use crate::layout::{Layout, LayoutMember, Layouts, MAX_DEPTH};

/// Most members of one structure, and dimensions of an array.
const MAX_MEMBERS: usize = 4096;

/// Layouts of one unit.
pub(super) struct UnitLayouts<'a, 'd> {
    unit: &'a Unit<Slice<'d>>,
    pub(super) types: UnitTypes<'a, 'd>,
    known: HashMap<UnitOffset, Option<Arc<Layout>>>,
    /// Types that members of a structure point to.
    pointees: HashMap<UnitOffset, Vec<UnitOffset>>,
    out: Layouts,
}

/// Puts a layout with those of other units: of one name, all must be the same.
pub(super) fn merge(all: &mut Layouts, name: String, layout: Option<Arc<Layout>>) {
    match all.get_mut(&name) {
        Some(other) if *other != layout => *other = None,
        Some(_) => {}
        None => drop(all.insert(name, layout)),
    }
}

impl<'a, 'd> UnitLayouts<'a, 'd> {
    pub(super) fn new(units: &'a Units<'d>, unit: &'a Unit<Slice<'d>>) -> Self {
        let types = UnitTypes::new(units, unit);
        Self { unit, types, known: HashMap::new(), pointees: HashMap::new(), out: Layouts::new() }
    }

    pub(super) fn finish(self) -> Layouts {
        self.out
    }

    /// Notes the layouts that a variable of this type leads to: its own, what it points to, and what members of
    /// that point to in their turn. What lies further away can't be reached by the expressions that are made of it.
    pub(super) fn reach(&mut self, variable: UnitOffset) {
        let mut wanted = vec![variable];
        let mut seen = HashSet::new();
        for _ in 0..3 {
            let mut next = Vec::new();
            for at in wanted {
                if seen.insert(at) {
                    next.extend(self.note(at).unwrap_or_default());
                }
            }
            wanted = next;
        }
    }

    /// Notes one type, and says which types it points to.
    fn note(&mut self, at: UnitOffset) -> Option<Vec<UnitOffset>> {
        let (found, typedef) = self.types.resolve(Some(at))?;
        let (at, entry) = found?;
        if entry.tag() == dw::DW_TAG_pointer_type {
            return UnitTypes::type_of(&entry).map(|to| vec![to]);
        }
        let name = typedef.or_else(|| self.types.name(&entry))?;
        // Only declared here: the kernel may know more of it.
        if entry.has_attr(dw::DW_AT_declaration) {
            return None;
        }
        let layout = self.layout(at, &entry, MAX_DEPTH);
        merge(&mut self.out, name, layout);
        self.pointees.get(&at).cloned()
    }

    /// Layout of the type at an offset; `None` when it is no structure or union.
    fn layout(&mut self, at: UnitOffset, entry: &Entry<'d>, depth: usize) -> Option<Arc<Layout>> {
        if !matches!(entry.tag(), dw::DW_TAG_structure_type | dw::DW_TAG_union_type) {
            return None;
        }
        if let Some(known) = self.known.get(&at) {
            return known.clone();
        }
        let depth = depth.checked_sub(1)?;
        let mut pointees = Vec::new();
        let members = self.children(at, dw::DW_TAG_member)?;
        let members: Option<Vec<LayoutMember>> =
            members.iter().map(|member| self.member(member, depth, &mut pointees)).collect();
        let layout = members.map(|members| Arc::new(Layout { members }));
        self.known.insert(at, layout.clone());
        self.pointees.insert(at, pointees);
        layout
    }

    /// Children of an entry that have this tag.
    fn children(&self, at: UnitOffset, tag: gimli::DwTag) -> Option<Vec<Entry<'d>>> {
        let mut entries = self.unit.entries_raw(Some(at)).ok()?;
        let mut entry = DebuggingInformationEntry::null();
        entries.read_entry(&mut entry).ok()?;
        let mut children = Vec::new();
        while entry.has_children() && !entries.is_empty() && children.len() < MAX_MEMBERS {
            let mut child = DebuggingInformationEntry::null();
            let depth = entries.next_depth();
            let real = entries.read_entry(&mut child).ok()?;
            if depth == 1 && !real {
                break;
            }
            if depth == 1 && child.tag() == tag {
                children.push(child);
            }
        }
        Some(children)
    }

    fn member(
        &mut self,
        member: &Entry<'d>,
        depth: usize,
        pointees: &mut Vec<UnitOffset>,
    ) -> Option<LayoutMember> {
        let number = |name| member.attr_value(name).and_then(|value| value.udata_value());
        let name = self.types.name(member).unwrap_or_default();
        let own = UnitTypes::type_of(member)?;
        let (own, count) = self.element(own)?;
        let (found, _) = self.types.resolve(Some(own))?;
        let (at, entry) = found?;
        let size = self.size(at, &entry)?;
        let mut offset = number(dw::DW_AT_data_member_location).unwrap_or(0);
        let mut bytes = size;
        // Of a bit-field of DWARF 4 the whole unit that it lies in is meant: less is known, nothing wrong.
        if let Some(bit) = number(dw::DW_AT_data_bit_offset) {
            let end = bit.checked_add(number(dw::DW_AT_bit_size).unwrap_or(1))?;
            (offset, bytes) = (bit / 8, end.div_ceil(8).checked_sub(bit / 8)?);
        }
        let inner = self.layout(at, &entry, depth);
        match entry.tag() {
            dw::DW_TAG_pointer_type => pointees.extend(UnitTypes::type_of(&entry)),
            _ => pointees.extend(self.pointees.get(&at).into_iter().flatten()),
        }
        let shape = self.types.shape(Some(own));
        Some(LayoutMember { name, offset, size: bytes, count, shape, inner })
    }

    /// Type of the elements and their number, of an array in one dimension.
    fn element(&self, at: UnitOffset) -> Option<(UnitOffset, Option<u64>)> {
        let (found, _) = self.types.resolve(Some(at))?;
        let Some((array, entry)) = found.filter(|(_, entry)| entry.tag() == dw::DW_TAG_array_type)
        else {
            return Some((at, None));
        };
        match self.dimensions(array)?.as_slice() {
            [count] => Some((UnitTypes::type_of(&entry)?, Some(*count))),
            _ => Some((at, None)),
        }
    }

    /// Numbers of elements of an array; 0 for a flexible one.
    fn dimensions(&self, array: UnitOffset) -> Option<Vec<u64>> {
        let ranges = self.children(array, dw::DW_TAG_subrange_type)?;
        let count = |range: &Entry<'d>| {
            let number = |name| range.attr_value(name).and_then(|value| value.udata_value());
            let last = number(dw::DW_AT_upper_bound).map(|last| last.wrapping_add(1));
            number(dw::DW_AT_count).or(last).unwrap_or(0)
        };
        Some(ranges.iter().map(count).collect())
    }

    /// Size in bytes of a resolved type.
    fn size(&self, at: UnitOffset, entry: &Entry<'d>) -> Option<u64> {
        if entry.tag() != dw::DW_TAG_array_type {
            return entry.attr_value(dw::DW_AT_byte_size)?.udata_value();
        }
        let element = self.types.resolve(UnitTypes::type_of(entry))?.0?;
        if element.1.tag() == dw::DW_TAG_array_type {
            return None;
        }
        let size = self.size(element.0, &element.1)?;
        let counts = self.dimensions(at)?;
        counts.iter().try_fold(size, |size, &count| size.checked_mul(count))
    }
}

/// Whether values of this type lead to members: nothing can be said of the others.
pub(super) fn leads_on(shape: &TypeShape) -> bool {
    matches!(shape, TypeShape::Pointer { .. } | TypeShape::Aggregate { .. })
}
