//! The description of a stream's device sections that QEMU writes behind them (`QEMU_VM_VMDESCRIPTION`, since 2.3):
//! JSON with name and size of each field, in their order. With it sections of any device can be passed over, and
//! fields be found by their names in whatever version of QEMU wrote them. Knows no device.

use std::borrow::Cow;

use serde::Deserialize;

use super::cursor::{Cursor, Stop};
use crate::dump::storage::Storage;

/// `QEMU_VM_VMDESCRIPTION`
const SECTION: u8 = 0x06;
/// Longer than any: that of a lab guest has 106 KB. It is looked for at the file's end in pieces of these sizes.
const TAILS: [u64; 4] = [256 << 10, 1 << 20, 4 << 20, 16 << 20];

/// All device sections, in their order.
#[derive(Debug, Deserialize)]
pub(super) struct Description<'a> {
    #[serde(borrow)]
    pub devices: Vec<State<'a>>,
}

/// One section; or a subsection of it or a structure in it, which have no name and no number.
#[derive(Debug, Deserialize)]
pub(super) struct State<'a> {
    #[serde(default, borrow)]
    pub name: Cow<'a, str>,
    #[serde(default)]
    pub instance_id: u64,
    #[serde(default, borrow)]
    vmsd_name: Cow<'a, str>,
    #[serde(borrow)]
    fields: Vec<Field<'a>>,
    /// What is sent behind the fields when there is need.
    #[serde(default, borrow)]
    subsections: Vec<State<'a>>,
}

/// A field, or one element of an array.
#[derive(Debug, Deserialize)]
struct Field<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    /// Of each element.
    size: u64,
    /// Elements that are alike and stand here together.
    array_len: Option<u64>,
    /// Which element of the array this is, when they are not alike.
    index: Option<u64>,
    #[serde(rename = "struct", borrow)]
    inner: Option<State<'a>>,
}

/// Where bytes lie in a section, behind its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub offset: u64,
    pub size: u64,
}

impl<'a> Description<'a> {
    pub(super) fn parse(json: &'a [u8]) -> Option<Self> {
        // serde_json's own limit of depth holds.
        serde_json::from_slice(json).ok()
    }
}

/// The JSON of a file. It is the last thing in it, but for zeroes that fill a block, and the only text without control
/// characters that long. What stands first in it depends on QEMU's version.
pub(super) fn find<B: AsRef<[u8]>>(storage: &Storage<B>) -> Option<Cow<'_, [u8]>> {
    let end = storage.len();
    TAILS.iter().find_map(|&tail| {
        let from = end.saturating_sub(tail);
        let (start, len) = last_text(&storage.bytes(from, end - from)?)?;
        storage.bytes(from.checked_add(start)?, len)
    })
}

/// Where the JSON starts that these bytes end with, and its length.
fn last_text(bytes: &[u8]) -> Option<(u64, u64)> {
    let end = bytes.iter().rposition(|byte| *byte != 0)? + 1;
    // The first byte of its length is one, the others may be.
    let control = bytes.get(..end)?.iter().rposition(|byte| *byte < b' ')?;
    (control + 1..=control + 4).find_map(|start| {
        let [section, len @ ..]: [u8; 5] =
            bytes.get(start.checked_sub(5)?..start)?.try_into().ok()?;
        let len = u64::from(u32::from_be_bytes(len));
        (section == SECTION && len == (end.checked_sub(start)?) as u64)
            .then_some((start as u64, len))
    })
}

impl State<'_> {
    /// Bytes of the section behind its header; `None` when no file can be so long.
    pub(super) fn size(&self) -> Option<u64> {
        let mut size = 0u64;
        for field in &self.fields {
            size = size.checked_add(field.bytes()?)?;
        }
        for subsection in &self.subsections {
            // `QEMU_VM_SUBSECTION`, the name behind its length, a version.
            let header = 1 + 1 + subsection.vmsd_name.len() as u64 + 4;
            size = size.checked_add(header)?.checked_add(subsection.size()?)?;
        }
        Some(size)
    }

    /// Where a field is, or one element of it.
    pub(super) fn element(&self, name: &str, index: u64) -> Option<Span> {
        self.find(name, index).map(|(span, _)| span)
    }

    /// Where a member of a structure is that is a field, or one element of it.
    pub(super) fn member(&self, name: &str, index: u64, member: &str) -> Option<Span> {
        let (outer, field) = self.find(name, index)?;
        let inner = field.inner.as_ref()?.element(member, 0)?;
        Some(Span { offset: outer.offset.checked_add(inner.offset)?, size: inner.size })
    }

    fn find(&self, name: &str, index: u64) -> Option<(Span, &Field<'_>)> {
        let mut offset = 0u64;
        for field in &self.fields {
            let first = field.index.unwrap_or(0);
            let there = first..first.saturating_add(field.array_len.unwrap_or(1));
            if field.name == name && there.contains(&index) {
                let within = (index - first).checked_mul(field.size)?;
                let span = Span { offset: offset.checked_add(within)?, size: field.size };
                return Some((span, field));
            }
            offset = offset.checked_add(field.bytes()?)?;
        }
        None
    }
}

impl Field<'_> {
    fn bytes(&self) -> Option<u64> {
        self.size.checked_mul(self.array_len.unwrap_or(1))
    }
}

/// A number of a section that begins at `at`.
pub(super) fn number<B: AsRef<[u8]>>(storage: &Storage<B>, at: u64, span: Span) -> Option<u64> {
    let mut cursor = Cursor::new(storage, at.checked_add(span.offset)?);
    let number: Result<u64, Stop> = match span.size {
        8 => cursor.u64(),
        4 => cursor.u32().map(u64::from),
        2 => cursor.u16().map(u64::from),
        1 => cursor.u8().map(u64::from),
        _ => return None,
    };
    number.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_elements_are_where_those_before_them_end() {
        let json = br#"{"page_size": 4096, "devices": [{"name": "d", "instance_id": 3, "vmsd_name": "d", "fields": [
            {"name": "a", "type": "uint16", "size": 2},
            {"name": "b", "array_len": 3, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [
                {"name": "x", "size": 4}, {"name": "y", "size": 8}]}, "size": 12},
            {"name": "c", "index": 0, "size": 5}, {"name": "c", "index": 1, "size": 7}],
            "subsections": [{"vmsd_name": "d/late", "version": 1, "fields": [{"name": "z", "size": 1}]}]}]}"#;
        let description = Description::parse(json).unwrap();
        let device = &description.devices[0];
        assert_eq!((device.name.as_ref(), device.instance_id), ("d", 3));
        let span = |offset, size| Some(Span { offset, size });
        assert_eq!(device.element("b", 2), span(2 + 24, 12));
        assert_eq!(device.member("b", 2, "y"), span(2 + 24 + 4, 8));
        assert_eq!(device.element("c", 1), span(2 + 36 + 5, 7));
        assert_eq!((device.element("b", 3), device.member("a", 0, "x")), (None, None));
        assert_eq!(device.size(), Some(2 + 36 + 12 + (2 + 6 + 4 + 1)));
    }

    #[test]
    fn it_is_the_last_text_whatever_it_begins_with() {
        for json in [
            r#"{"page_size": 4096, "devices": []}"#,
            r#"{ "page_size": 4096, "devices": [ ]}"#,
            r#"{"configuration": {"fields": [{"name": "page_size", "size": 4}]}, "devices": []}"#,
        ] {
            for padding in [0, 1, 4096] {
                let file = |len: usize| {
                    let mut file = b"{\"page_size\"\0\x06".to_vec();
                    file.extend((len as u32).to_be_bytes());
                    file.extend(json.as_bytes());
                    file.resize(file.len() + padding, 0);
                    Storage::new(file).unwrap()
                };
                assert_eq!(find(&file(json.len())).as_deref(), Some(json.as_bytes()));
                assert_eq!(find(&file(json.len() + 1)), None);
                assert!(Description::parse(json.as_bytes()).is_some());
            }
        }
        for nothing in [&b""[..], b"\0\0", b"{}", b"\x06\0\0\0\x02{"] {
            assert_eq!(find(&Storage::new(nothing.to_vec()).unwrap()), None);
        }
    }

    #[test]
    fn sizes_of_no_file_are_none() {
        let json = br#"{"devices": [{"name": "d", "instance_id": 0, "fields": [
            {"name": "a", "array_len": 18446744073709551615, "size": 18446744073709551615},
            {"name": "b", "size": 1}]}]}"#;
        let description = Description::parse(json).unwrap();
        assert_eq!(description.devices[0].size(), None);
        assert_eq!(description.devices[0].element("b", 0), None);
        assert_eq!(description.devices[0].element("a", u64::MAX - 1), None);
        let deep = [b"{\"devices\":".to_vec(), vec![b'['; 100_000]].concat();
        assert!(Description::parse(&deep).is_none());
    }
}
