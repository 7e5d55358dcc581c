//! BTF (Documentation/bpf/btf.rst of the kernel) as a source of [`Types`]: an index by name over the raw bytes,
//! which may come from guest memory. Only what layouts and prototypes need; no writing, no printing of C.
//!
//! Own reader because the crate `btfparse` reads no split BTF and copies every type into a map.

use std::sync::{Arc, OnceLock};

use xxhash_rust::xxh3::xxh3_64;

use crate::{Error, Member, Parameter, Prototype, TypeShape, Types, base_name};

const MAGIC: u16 = 0xeb9f;
/// Deepest nesting of anonymous members, typedefs and arrays that is followed.
const MAX_DEPTH: usize = 32;
/// Most members looked at for one question: a hostile graph of anonymous members would be exponential.
const MAX_WORK: usize = 1 << 20;
/// Most parameters of a function.
const MAX_PARAMETERS: usize = 64;

/// BTF kinds (include/uapi/linux/btf.h).
mod kind {
    pub(super) const INT: u8 = 1;
    pub(super) const PTR: u8 = 2;
    pub(super) const ARRAY: u8 = 3;
    pub(super) const STRUCT: u8 = 4;
    pub(super) const UNION: u8 = 5;
    pub(super) const ENUM: u8 = 6;
    pub(super) const FWD: u8 = 7;
    pub(super) const TYPEDEF: u8 = 8;
    pub(super) const VOLATILE: u8 = 9;
    pub(super) const CONST: u8 = 10;
    pub(super) const RESTRICT: u8 = 11;
    pub(super) const FUNC: u8 = 12;
    pub(super) const FUNC_PROTO: u8 = 13;
    pub(super) const VAR: u8 = 14;
    pub(super) const DATASEC: u8 = 15;
    /// Since v5.13.
    pub(super) const FLOAT: u8 = 16;
    /// Since v5.16.
    pub(super) const DECL_TAG: u8 = 17;
    /// Since v5.17.
    pub(super) const TYPE_TAG: u8 = 18;
    /// Since v6.0.
    pub(super) const ENUM64: u8 = 19;
}

/// One type record, without its trailing data.
#[derive(Clone, Copy, Debug)]
struct Record<'a> {
    name: u32,
    kind: u8,
    flag: bool,
    /// Number of members, parameters or enumerators.
    count: usize,
    /// Size in bytes, or id of the type referred to: depends on the kind.
    size_or_type: u32,
    /// Trailing data.
    data: &'a [u8],
}

/// Types of one kernel, or of one module on top of a kernel's.
#[derive(Debug)]
pub struct Btf {
    bytes: Arc<[u8]>,
    base: Option<Arc<Btf>>,
    /// Offset in `bytes` of the type with id `first_id + index`.
    types: Vec<u32>,
    first_id: u32,
    /// Offset in `bytes` of the string section, and its length.
    strings: (usize, usize),
    /// Offset that the first own string has in the name space shared with the base.
    first_string: u32,
    /// Whether enumerations say if they are signed.
    sign_flags: bool,
    names: OnceLock<Chains>,
    enumerators: OnceLock<Chains>,
}

/// Hash chains: items by the hash of their name, in the order of their numbers.
#[derive(Debug)]
struct Chains {
    heads: Vec<u32>,
    /// Next item + 1 of the same chain, 0 = end; the item's payload.
    items: Vec<(u32, u32)>,
}

impl Chains {
    fn new(hashes: impl DoubleEndedIterator<Item = (u64, u32)> + ExactSizeIterator) -> Self {
        let mask = hashes.len().next_power_of_two() - 1;
        let mut heads = vec![0u32; mask + 1];
        let mut items = Vec::with_capacity(hashes.len());
        // Pushed back to front, so that each chain is in ascending order.
        for (hash, payload) in hashes.rev() {
            let head = &mut heads[hash as usize & mask];
            items.push((*head, payload));
            *head = items.len() as u32;
        }
        Self { heads, items }
    }

    fn with_name(&self, name: &str) -> impl Iterator<Item = u32> + '_ {
        let hash = xxh3_64(name.as_bytes()) as usize;
        let mut next = self.heads.get(hash & (self.heads.len().wrapping_sub(1))).copied();
        std::iter::from_fn(move || {
            let (after, payload) = *self.items.get((next? as usize).checked_sub(1)?)?;
            next = Some(after);
            Some(payload)
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

/// Length of the data behind a type record; `None` for a kind that is not known.
fn data_len(kind: u8, count: usize) -> Option<usize> {
    Some(match kind {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
        kind::ENUM | kind::FUNC_PROTO => 8 * count,
        kind::PTR
        | kind::FWD
        | kind::TYPEDEF
        | kind::VOLATILE
        | kind::CONST
        | kind::RESTRICT
        | kind::FUNC
        | kind::FLOAT
        | kind::TYPE_TAG => 0,
        _ => return None,
    })
}

impl Btf {
    /// Reads BTF data as in a `.BTF` section or in `/sys/kernel/btf/vmlinux`.
    ///
    /// # Errors
    /// [`Error::Btf`] when the header or the type records are damaged. A record of a kind newer than those
    /// known here ends the reading: what is before it is kept.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Result<Self, Error> {
        Self::read(bytes.into(), None)
    }

    /// Reads a module's BTF data, which continues the type and string numbers of the kernel's.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn split(bytes: impl Into<Arc<[u8]>>, base: Arc<Btf>) -> Result<Self, Error> {
        Self::read(bytes.into(), Some(base))
    }

    fn read(bytes: Arc<[u8]>, base: Option<Arc<Btf>>) -> Result<Self, Error> {
        let damaged = |what, offset| Error::Btf { what, offset };
        let word = |at| u32_at(&bytes, at).ok_or(damaged("short header", at));
        if word(0)? & 0xffff != u32::from(MAGIC) {
            return Err(damaged("wrong magic number", 0));
        }
        let header = word(4)? as usize;
        let section = |offset: u32, len: u32, what| {
            let start = header.checked_add(offset as usize).ok_or(damaged(what, header))?;
            let end = start.checked_add(len as usize).ok_or(damaged(what, start))?;
            if end <= bytes.len() { Ok((start, end)) } else { Err(damaged(what, start)) }
        };
        let (types_start, types_end) = section(word(8)?, word(12)?, "type section out of bounds")?;
        let (strings_start, strings_end) =
            section(word(16)?, word(20)?, "string section out of bounds")?;
        if u32::try_from(bytes.len()).is_err() {
            return Err(damaged("larger than 4 GiB", bytes.len()));
        }
        let mut types = Vec::new();
        let mut sign_flags = base.as_ref().is_some_and(|base| base.sign_flags);
        let mut at = types_start;
        while at < types_end {
            let info = u32_at(&bytes, at + 4).ok_or(damaged("short type record", at))?;
            let len = data_len((info >> 24 & 0x1f) as u8, (info & 0xffff) as usize);
            let Some(len) = len else { break };
            let next = at + 12 + len;
            if next > types_end {
                return Err(damaged("type record out of bounds", at));
            }
            sign_flags |= info >> 24 == 0x80 | u32::from(kind::ENUM);
            types.push(at as u32);
            at = next;
        }
        types.shrink_to_fit();
        let (first_id, first_string) = base.as_ref().map_or((1, 0), |base| base.end());
        Ok(Self {
            strings: (strings_start, strings_end - strings_start),
            bytes,
            base,
            types,
            first_id,
            first_string,
            sign_flags,
            names: OnceLock::new(),
            enumerators: OnceLock::new(),
        })
    }

    /// First type id and first string offset of BTF on top of this one.
    fn end(&self) -> (u32, u32) {
        (
            self.first_id.saturating_add(self.types.len() as u32),
            self.first_string.saturating_add(self.strings.1 as u32),
        )
    }

    /// The raw bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of types of its own, without those of the base.
    #[must_use]
    pub fn type_count(&self) -> usize {
        self.types.len()
    }

    fn record_at(&self, at: usize) -> Option<Record<'_>> {
        let info = u32_at(&self.bytes, at.checked_add(4)?)?;
        let (kind, count) = ((info >> 24 & 0x1f) as u8, (info & 0xffff) as usize);
        let start = at.checked_add(12)?;
        Some(Record {
            name: u32_at(&self.bytes, at)?,
            kind,
            flag: info >> 31 == 1,
            count,
            size_or_type: u32_at(&self.bytes, at + 8)?,
            data: self.bytes.get(start..start.checked_add(data_len(kind, count)?)?)?,
        })
    }

    fn record(&self, id: u32) -> Option<Record<'_>> {
        match id.checked_sub(self.first_id) {
            None => self.base.as_ref()?.record(id),
            Some(index) => self.record_at(*self.types.get(index as usize)? as usize),
        }
    }

    fn string(&self, offset: u32) -> Option<&str> {
        std::str::from_utf8(self.text(offset)?).ok()
    }

    fn text(&self, offset: u32) -> Option<&[u8]> {
        let Some(own) = offset.checked_sub(self.first_string) else {
            return self.base.as_ref()?.text(offset);
        };
        let (start, len) = self.strings;
        let rest = self.bytes.get(start..start.checked_add(len)?)?.get(own as usize..)?;
        rest.get(..memchr::memchr(0, rest)?)
    }

    fn hash(&self, name: u32) -> u64 {
        xxh3_64(self.text(name).unwrap_or_default())
    }

    fn names(&self) -> &Chains {
        self.names.get_or_init(|| {
            Chains::new(self.types.iter().enumerate().map(|(index, &at)| {
                let name = u32_at(&self.bytes, at as usize).unwrap_or(0);
                (self.hash(name), self.first_id.wrapping_add(index as u32))
            }))
        })
    }

    /// Index of enumerators. Payload: offset of the enumerator's record in `bytes`; its enumeration is the last
    /// type that starts before it.
    fn enumerators(&self) -> &Chains {
        self.enumerators.get_or_init(|| {
            let mut found = Vec::new();
            for &at in &self.types {
                let Some(record) = self.record_at(at as usize) else { continue };
                let size = match record.kind {
                    kind::ENUM => 8,
                    kind::ENUM64 => 12,
                    _ => continue,
                };
                for index in 0..record.count {
                    let item = at + 12 + (index * size) as u32;
                    let name = u32_at(&self.bytes, item as usize).unwrap_or(0);
                    found.push((self.hash(name), item));
                }
            }
            Chains::new(found.into_iter())
        })
    }

    /// Ids of the types of that exact name: own ones first, then the base's.
    fn ids<'a>(&'a self, name: &'a str) -> Box<dyn Iterator<Item = u32> + 'a> {
        let own = self.names().with_name(name).filter(move |&id| {
            self.record(id).is_some_and(|record| self.string(record.name) == Some(name))
        });
        match &self.base {
            Some(base) => Box::new(own.chain(base.ids(name))),
            None => Box::new(own),
        }
    }

    /// Structures and unions of that name, then typedefs of it.
    fn aggregates<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u32> + 'a {
        let plain = name.strip_prefix("struct ").or(name.strip_prefix("union ")).unwrap_or(name);
        let of_kind = move |wanted: fn(u8) -> bool| {
            let ids = self.ids(plain);
            ids.filter(move |&id| self.record(id).is_some_and(|record| wanted(record.kind)))
        };
        of_kind(|kind| matches!(kind, kind::STRUCT | kind::UNION))
            .chain(of_kind(|kind| !matches!(kind, kind::STRUCT | kind::UNION)))
    }

    /// Follows modifiers and typedefs; also tells the outermost typedef's name.
    fn resolve(&self, mut id: u32) -> Option<(u32, Option<Record<'_>>, Option<&str>)> {
        let mut typedef = None;
        for _ in 0..MAX_DEPTH {
            if id == 0 {
                return Some((0, None, typedef));
            }
            let record = self.record(id)?;
            match record.kind {
                kind::TYPEDEF => typedef = typedef.or(self.string(record.name)),
                kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {}
                _ => return Some((id, Some(record), typedef)),
            }
            id = record.size_or_type;
        }
        None
    }

    fn size(&self, id: u32) -> Option<u64> {
        let mut id = id;
        let mut factor = 1u64;
        for _ in 0..MAX_DEPTH {
            let record = self.resolve(id)?.1?;
            let own = match record.kind {
                kind::PTR => 8,
                kind::ARRAY => {
                    factor = factor.checked_mul(u64::from(u32_at(record.data, 8)?))?;
                    id = u32_at(record.data, 0)?;
                    continue;
                }
                kind::INT
                | kind::FLOAT
                | kind::ENUM
                | kind::ENUM64
                | kind::STRUCT
                | kind::UNION => u64::from(record.size_or_type),
                _ => return None,
            };
            return factor.checked_mul(own);
        }
        None
    }

    fn shape(&self, id: u32) -> TypeShape {
        let Some((_, record, typedef)) = self.resolve(id) else { return TypeShape::Other };
        let Some(record) = record else { return TypeShape::Void };
        let tag = || self.string(record.name).unwrap_or("").to_owned();
        let name = || typedef.map_or_else(tag, str::to_owned);
        let size = record.size_or_type;
        match record.kind {
            kind::INT => {
                let encoding = u32_at(record.data, 0).unwrap_or(0) >> 24 & 0xf;
                if encoding & 4 != 0 {
                    return TypeShape::Bool;
                }
                TypeShape::Int { name: name(), size: size as u8, signed: encoding & 1 != 0 }
            }
            kind::ENUM | kind::ENUM64 => {
                TypeShape::Enum { name: name(), tag: tag(), size: size as u8 }
            }
            kind::PTR => TypeShape::Pointer { to: self.pointee(size) },
            kind::STRUCT | kind::UNION => {
                TypeShape::Aggregate { name: name(), size: u64::from(size) }
            }
            _ => TypeShape::Other,
        }
    }

    /// Name of what a pointer points to, behind modifiers.
    fn pointee(&self, id: u32) -> Option<String> {
        let (_, record, typedef) = self.resolve(id)?;
        if let Some(typedef) = typedef {
            return Some(typedef.to_owned());
        }
        let record = record?;
        let named = matches!(
            record.kind,
            kind::INT
                | kind::FLOAT
                | kind::STRUCT
                | kind::UNION
                | kind::FWD
                | kind::ENUM
                | kind::ENUM64
        );
        let name = if named { self.string(record.name)? } else { "" };
        (!name.is_empty()).then(|| name.to_owned())
    }

    fn function(&self, proto: u32) -> Option<Prototype> {
        let record = self.record(proto).filter(|record| record.kind == kind::FUNC_PROTO)?;
        let parameters = record.data.chunks_exact(8).take(MAX_PARAMETERS);
        let parameters = parameters.filter_map(|parameter| {
            let (name, id) = (u32_at(parameter, 0)?, u32_at(parameter, 4)?);
            // A nameless parameter of type void stands for `...`.
            (id != 0).then(|| Parameter {
                name: self.string(name).unwrap_or("").to_owned(),
                shape: self.shape(id),
            })
        });
        Some(Prototype {
            parameters: parameters.collect(),
            returns: self.shape(record.size_or_type),
        })
    }

    fn place(&self, structure: &str, path: &str) -> Option<Place> {
        let mut work = MAX_WORK;
        self.aggregates(structure)
            .find_map(|id| self.descend(Place { id, bit: 0, bits: None }, path, &mut work))
    }

    /// Follows `a.b[1].c` from a place.
    fn descend(&self, from: Place, path: &str, work: &mut usize) -> Option<Place> {
        let mut place = from;
        for part in path.split('.') {
            let (name, indexes) =
                part.split_once('[').map_or((part, ""), |(name, rest)| (name, rest));
            place = self.member_of(place, name, MAX_DEPTH, work)?;
            for index in indexes.split('[').filter(|index| !index.is_empty()) {
                place = self.element(place, index.strip_suffix(']')?.parse().ok()?)?;
            }
        }
        Some(place)
    }

    fn element(&self, place: Place, index: u64) -> Option<Place> {
        let record = self.resolve(place.id)?.1.filter(|record| record.kind == kind::ARRAY)?;
        let id = u32_at(record.data, 0)?;
        let bit = index.checked_mul(self.size(id)?)?.checked_mul(8)?.checked_add(place.bit)?;
        Some(Place { id, bit, bits: None })
    }

    /// Members of a structure or union: name, type, bit offset, bits of a bit-field.
    fn members<'a>(
        &'a self,
        record: Record<'a>,
    ) -> impl Iterator<Item = (u32, u32, u64, Option<u8>)> + 'a {
        record.data.chunks_exact(12).filter_map(move |member| {
            let (name, id) = (u32_at(member, 0)?, u32_at(member, 4)?);
            let offset = u32_at(member, 8)?;
            if record.flag {
                let bits = Some((offset >> 24) as u8).filter(|&bits| bits != 0);
                return Some((name, id, u64::from(offset & 0xff_ffff), bits));
            }
            // Without the flag, a bit-field is an INT narrower than its storage.
            let int = self.resolve(id)?.1.filter(|record| record.kind == kind::INT);
            let narrow = int.and_then(|int| {
                let data = u32_at(int.data, 0)?;
                let (shift, bits) = (u64::from(data >> 16 & 0xff), data & 0xff);
                (u64::from(bits) < u64::from(int.size_or_type) * 8 && bits != 0)
                    .then_some((shift, bits as u8))
            });
            let (shift, bits) = narrow.map_or((0, None), |(shift, bits)| (shift, Some(bits)));
            Some((name, id, u64::from(offset) + shift, bits))
        })
    }

    fn member_of(&self, of: Place, name: &str, depth: usize, work: &mut usize) -> Option<Place> {
        let record = self.resolve(of.id)?.1?;
        if depth == 0 || !matches!(record.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        for (member, id, bit, bits) in self.members(record) {
            *work = work.checked_sub(1)?;
            let place = Place { id, bit: of.bit.checked_add(bit)?, bits };
            match self.string(member) {
                Some("") => {
                    if let Some(found) = self.member_of(place, name, depth - 1, work) {
                        return Some(found);
                    }
                }
                Some(found) if found == name => return Some(place),
                _ => {}
            }
        }
        None
    }

    /// Path of the innermost member of a structure at a byte offset (`"regs"`, `"queue.lock"`,
    /// `"ring[3].next"`), and the shape of that member. Of a union, the first member that fits.
    #[must_use]
    pub fn member_at(&self, structure: &str, offset: u64) -> Option<(String, TypeShape)> {
        self.aggregates(structure).find_map(|id| {
            let mut path = String::new();
            let mut work = MAX_WORK;
            let id = self.path_to(id, offset.checked_mul(8)?, &mut path, MAX_DEPTH, &mut work)?;
            (!path.is_empty()).then(|| (path, self.shape(id)))
        })
    }

    fn path_to(
        &self,
        id: u32,
        bit: u64,
        path: &mut String,
        depth: usize,
        work: &mut usize,
    ) -> Option<u32> {
        let record = self.resolve(id)?.1?;
        let depth = depth.checked_sub(1)?;
        if record.kind == kind::ARRAY {
            let element = u32_at(record.data, 0)?;
            let bits = self.size(element)?.checked_mul(8).filter(|&bits| bits > 0)?;
            path.push_str(&format!("[{}]", bit / bits));
            return self.path_to(element, bit % bits, path, depth, work);
        }
        if !matches!(record.kind, kind::STRUCT | kind::UNION) {
            return Some(id);
        }
        for (name, member, start, bits) in self.members(record) {
            *work = work.checked_sub(1)?;
            let bits = match bits {
                Some(bits) => u64::from(bits),
                None => self.size(member)?.checked_mul(8)?,
            };
            if bit < start || bit - start >= bits {
                continue;
            }
            let before = path.len();
            let name = self.string(name)?;
            if !name.is_empty() {
                path.push_str(if before == 0 { "" } else { "." });
                path.push_str(name);
            }
            if let Some(found) = self.path_to(member, bit - start, path, depth, work) {
                return Some(found);
            }
            path.truncate(before);
        }
        None
    }

    fn enumerator_value(&self, item: u32, name: &str) -> Option<i64> {
        let index = self.types.partition_point(|&at| at < item).checked_sub(1)?;
        let record = self.record_at(*self.types.get(index)? as usize)?;
        let item = item as usize;
        if self.string(u32_at(&self.bytes, item)?)? != name {
            return None;
        }
        let low = u32_at(&self.bytes, item + 4)?;
        if record.kind == kind::ENUM64 {
            return Some((u64::from(u32_at(&self.bytes, item + 8)?) << 32 | u64::from(low)) as i64);
        }
        // The flag says that values are signed, since v6.0 (with ENUM64). Where no enumeration has it, the
        // BTF was made before that, and values are signed 32-bit always.
        let signed = record.flag || !self.sign_flags;
        Some(if signed { i64::from(low as i32) } else { i64::from(low) })
    }
}

/// A place inside a structure.
#[derive(Clone, Copy, Debug)]
struct Place {
    id: u32,
    /// Bits from the start of the outermost structure.
    bit: u64,
    /// Width of a bit-field.
    bits: Option<u8>,
}

impl Types for Btf {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let place = self.place(structure, path)?;
        let shape = self.shape(place.id);
        let offset = place.bit / 8;
        let Some(bits) = place.bits else {
            return Some(Member { offset, size: self.size(place.id)?, bits: None, shape });
        };
        let first = (place.bit % 8) as u8;
        let size = (u64::from(first) + u64::from(bits)).div_ceil(8);
        Some(Member { offset, size, bits: Some((first, bits)), shape })
    }

    fn size_of(&self, name: &str) -> Option<u64> {
        self.aggregates(name).find_map(|id| self.size(id))
    }

    fn enumerator(&self, name: &str) -> Option<i64> {
        let mut own = self.enumerators().with_name(name);
        own.find_map(|item| self.enumerator_value(item, name))
            .or_else(|| self.base.as_ref()?.enumerator(name))
    }

    fn prototype(&self, function: &str) -> Option<Prototype> {
        self.ids(base_name(function)).find_map(|id| {
            let record = self.record(id).filter(|record| record.kind == kind::FUNC)?;
            self.function(record.size_or_type)
        })
    }

    fn member_at(&self, structure: &str, offset: u64) -> Option<(String, TypeShape)> {
        Btf::member_at(self, structure, offset)
    }

    fn member_prototype(&self, structure: &str, path: &str) -> Option<Prototype> {
        let pointer = self.resolve(self.place(structure, path)?.id)?.1;
        let pointer = pointer.filter(|record| record.kind == kind::PTR)?;
        self.function(self.resolve(pointer.size_or_type)?.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes BTF with a layout of its own.
    #[derive(Default)]
    struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Builder {
        fn new() -> Self {
            Self { strings: vec![0], ..Self::default() }
        }

        fn text(&mut self, text: &str) -> u32 {
            if text.is_empty() {
                return 0;
            }
            let at = self.strings.len() as u32;
            self.strings.extend(text.bytes());
            self.strings.push(0);
            at
        }

        /// Adds a type; `info` is kind << 24 | count, `data` its trailing words.
        fn add(&mut self, name: &str, info: u32, size_or_type: u32, data: &[u32]) -> u32 {
            let name = self.text(name);
            for word in [&[name, info, size_or_type], data].concat() {
                self.types.extend(word.to_le_bytes());
            }
            self.count += 1;
            self.count
        }

        fn finish(self) -> Vec<u8> {
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            let mut out = vec![0x9f, 0xeb, 1, 0];
            for word in [24, 0, types, types, strings] {
                out.extend(word.to_le_bytes());
            }
            [out, self.types, self.strings].concat()
        }
    }

    fn sample() -> Vec<u8> {
        let mut b = Builder::new();
        let long = b.add("long", 1 << 24, 8, &[1 << 24 | 64]);
        let ssize = b.add("ssize_t", 8 << 24, long, &[]);
        let (inner_a, inner_b) = (b.text("sp"), b.text("flag"));
        // struct { ssize_t sp; long flag : 3 at bit 69; }
        let inner =
            b.add("", 1 << 31 | 4 << 24 | 2, 16, &[inner_a, ssize, 0, inner_b, long, 3 << 24 | 69]);
        let array = b.add("", 3 << 24, 0, &[inner, long, 4]);
        let (list, anonymous) = (b.text("list"), 0u32);
        let pointer_name = b.text("call");
        let parameter = b.text("to");
        // A pointer to the structure below, which gets number 8.
        let to_self = b.add("", 2 << 24, 8, &[]);
        let proto = b.add("", 13 << 24 | 2, ssize, &[parameter, to_self, 0, 0]);
        let pointer = b.add("", 2 << 24, proto, &[]);
        // struct outer { struct {..}; struct {..} list[4]; ssize_t (*call)(struct outer *to, ...); }
        let members = [anonymous, inner, 0, list, array, 128, pointer_name, pointer, 128 + 4 * 128];
        let outer = b.add("outer", 4 << 24 | 3, 88, &members);
        assert_eq!(outer, 8);
        b.add("do_it", 12 << 24, proto, &[]);
        let (minus, big) = (b.text("MINUS"), b.text("BIG"));
        b.add("signs", 1 << 31 | 6 << 24 | 1, 4, &[minus, u32::MAX]);
        b.add("wide", 19 << 24 | 1, 8, &[big, 1, 2]);
        b.add("gone", 30 << 24, 0, &[]);
        b.finish()
    }

    #[test]
    fn members_through_anonymous_ones_and_arrays() {
        let btf = Btf::new(sample()).unwrap();
        let member = btf.member("outer", "sp").unwrap();
        assert_eq!((member.offset, member.size, member.bits), (0, 8, None));
        assert!(
            matches!(&member.shape, TypeShape::Int { name, signed: true, .. } if name == "ssize_t")
        );
        let flag = btf.member("struct outer", "list[2].flag").unwrap();
        assert_eq!((flag.offset, flag.size, flag.bits), (16 + 32 + 8, 1, Some((5, 3))));
        assert_eq!(btf.member("outer", "list").unwrap().size, 64);
        assert_eq!(btf.member("outer", "nothing"), None);
        assert_eq!(btf.size_of("outer"), Some(88));
        assert_eq!(btf.size_of("ssize_t"), Some(8));
        assert_eq!(btf.member_at("outer", 48).unwrap().0, "list[2].sp");
        assert_eq!(btf.member_at("outer", 80).unwrap().0, "call");
    }

    #[test]
    fn prototypes_and_enumerators() {
        let btf = Btf::new(sample()).unwrap();
        let own = btf.prototype("do_it.constprop.0").unwrap();
        assert_eq!(own.parameters.len(), 1, "the dots are no parameter");
        assert_eq!(btf.member_prototype("outer", "call"), Some(own));
        assert_eq!(btf.enumerator("MINUS"), Some(-1));
        assert_eq!(btf.enumerator("BIG"), Some(0x2_0000_0001));
        assert_eq!(btf.enumerator("NONE"), None);
        assert_eq!(btf.type_count(), 11, "an unknown kind ends the reading");
    }

    #[test]
    fn split_types_refer_to_the_base() {
        let base = Arc::new(Btf::new(sample()).unwrap());
        let mut b = Builder { strings: Vec::new(), ..Builder::new() };
        let first_string = base.end().1;
        let words = [first_string, 4 << 24 | 1, 88, first_string + 5, 8, 0];
        b.types.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        b.strings = b"outer2\0".to_vec();
        // "outer2" for the structure, its tail "2" for the member.
        let btf = Btf::split(b.finish(), base).unwrap();
        assert_eq!(btf.member("outer2", "2.call").unwrap().offset, 80);
        assert_eq!(btf.member_at("outer2", 80).unwrap().0, "2.call");
        assert_eq!(btf.size_of("outer"), Some(88));
    }

    #[test]
    fn a_structure_inside_itself_ends() {
        let mut b = Builder::new();
        b.add("loop", 4 << 24 | 3, 8, &[0, 1, 0, 0, 1, 0, 0, 1, 0]);
        b.add("chain", 8 << 24, 2, &[]);
        let btf = Btf::new(b.finish()).unwrap();
        assert_eq!(btf.member("loop", "x"), None);
        assert_eq!(btf.size_of("chain"), None);
        assert_eq!(btf.member_at("loop", 0), None);
    }

    proptest! {
        #[test]
        fn damaged_data_is_survived(changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..8)) {
            let mut bytes = sample();
            for (at, byte) in changes {
                let at = usize::from(at) % bytes.len();
                bytes[at] = byte;
            }
            let Ok(btf) = Btf::new(bytes) else { return Ok(()) };
            for path in ["sp", "list[3].flag", "call", "x"] {
                let _ = btf.member("outer", path);
                let _ = btf.member_prototype("outer", path);
            }
            let _ = (btf.prototype("do_it"), btf.enumerator("BIG"), btf.size_of("ssize_t"));
            for offset in 0..100 {
                let _ = btf.member_at("outer", offset);
            }
        }
    }
}
