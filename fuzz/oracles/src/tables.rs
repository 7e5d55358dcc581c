//! What must hold of tables: BTF types, ORC and DWARF unwind rows, ELF notes.

use std::sync::Arc;

use guest::LinkAddr;
use repair_image::{
    Btf, BuildId, Error, Member, OrcLayout, Prototype, TypeShape, Types, UnwindRow, cfi, orc,
};

use crate::input::Input;

/// Names looked up at most in one table.
const MAX_NAMES: usize = 24;

/// BTF, alone and on top of itself: bit-fields fit, members of a plain structure lie inside it, and what
/// lies at a member's offset is found.
///
/// # Panics
/// When that does not hold.
pub fn btf(data: &[u8]) {
    match Btf::new(data) {
        Ok(base) => {
            assert!(base.type_count() <= data.len() / 12 && base.bytes() == data);
            lookups(&base);
            let base = Arc::new(base);
            if let Ok(split) = Btf::split(data, Arc::clone(&base)) {
                assert_eq!(split.type_count(), base.type_count());
                lookups(&split);
            }
        }
        Err(Error::Btf { .. }) => {}
        Err(other) => panic!("{other}"),
    }
}

/// Every name in the data, in every role.
fn lookups(btf: &Btf) {
    let words = btf.bytes().split(|&byte| byte == 0);
    let names: Vec<&str> = words
        .filter_map(|word| std::str::from_utf8(word).ok())
        .filter(|word| !word.is_empty() && word.len() < 64)
        .take(MAX_NAMES)
        .collect();
    for name in &names {
        let size = btf.size_of(name);
        btf.enumerator(name);
        btf.prototype(name).inspect(prototype);
        for path in &names {
            btf.member_prototype(name, path).inspect(prototype);
            btf.member(name, path).inspect(member);
            btf.member(name, &format!("{path}[1].{name}"));
        }
        for offset in [0, 4, 8, 64, size.unwrap_or(u64::MAX).wrapping_sub(1)] {
            if let Some((path, shape)) = btf.member_at(name, offset) {
                within(btf, name, &path, offset, &shape);
            }
        }
    }
}

fn prototype(found: &Prototype) {
    assert!(found.parameters.len() <= 64);
}

fn member(found: &Member) {
    if let Some((first, bits)) = found.bits {
        assert!(
            first < 8 && bits > 0 && found.size == (u64::from(first) + u64::from(bits)).div_ceil(8)
        );
    }
}

/// The member that `member_at` names covers the offset that was asked for, if it is the only one of its name.
fn within(btf: &Btf, structure: &str, path: &str, offset: u64, shape: &TypeShape) {
    let Some(found) = btf.member(structure, path) else { return };
    if found.shape != *shape || btf.member_at(structure, found.offset).is_none() {
        return;
    }
    let end = found.offset.checked_add(found.size);
    let covers = found.offset <= offset && end.is_none_or(|end| offset < end);
    let again = btf.member_at(structure, found.offset);
    let same = again.is_some_and(|(other, _)| other == path);
    assert!(covers || !same, "{structure}.{path} does not cover {offset:#x}: {found:?}");
}

fn sorted(rows: &[(LinkAddr, Option<UnwindRow>)]) {
    assert!(rows.is_sorted_by_key(|row| row.0));
}

/// ORC tables in every layout, and `.debug_frame`, and both joined: rows ascend and none is invented.
///
/// # Panics
/// When that does not hold.
pub fn unwind_tables(data: &[u8]) {
    let mut input = Input::new(data);
    let at = input.u64();
    let (ips, entries) = (input.part(), input.part());
    let frames = input.rest();
    let cfi = match cfi::rows(frames) {
        Ok((rows, damaged)) => {
            sorted(&rows);
            assert!(damaged <= frames.len());
            rows
        }
        Err(_) => Vec::new(),
    };
    for layout in [OrcLayout::V4_14, OrcLayout::V6_3, OrcLayout::V6_4] {
        let orc = orc::rows(ips, at, entries, layout);
        assert_eq!(orc.len(), (ips.len() / 4).min(entries.len() / 6));
        sorted(&orc);
        let (joined, agreement) = cfi::join(&orc, &cfi);
        assert!(joined.is_sorted_by(|one, next| one.0 < next.0), "an address twice");
        assert!(joined.len() <= orc.len() + cfi.len());
        let counted =
            agreement.same + agreement.different + agreement.orc_only + agreement.cfi_only;
        assert!(counted <= joined.len());
        let addresses = |at: &LinkAddr| orc.iter().chain(&cfi).any(|row| row.0 == *at);
        assert!(joined.iter().take(64).all(|row| addresses(&row.0)), "an invented address");
    }
}

/// ELF notes: a build id is in the notes, and is the same when written and read as text.
///
/// # Panics
/// When that does not hold.
pub fn notes(data: &[u8]) {
    let Some(id) = BuildId::from_notes(data) else { return };
    let bytes = id.as_bytes();
    assert!(!bytes.is_empty() && data.windows(bytes.len()).any(|window| window == bytes));
    assert_eq!(id.to_string().parse(), Ok(id));
}
