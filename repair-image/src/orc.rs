//! ORC, the kernel's own unwind tables (`arch/x86/include/asm/orc_types.h`), turned into unwind rows. Only the
//! tables: finding them in a file is in `compile/`, in a guest in `module.rs`.

use guest::{LinkAddr, Reg};

use crate::{CfaRule, FrameKind, RowSource, SavedRule, Types, UnwindRow};

/// Bytes of one `struct orc_entry`, in every layout.
const ENTRY: usize = 6;
/// Index of rbp in [`Reg::CALLEE_SAVED`].
const RBP: usize = 1;

/// How `struct orc_entry` is laid out. The two 16-bit offsets and the two 4-bit registers are the same in
/// all; the bits behind them differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrcLayout {
    /// v4.14 to v6.2: `type:2, end:1`.
    V4_14,
    /// v6.3, since commit ffb1b4a41016 ("x86/unwind/orc: Add 'signal' field to ORC metadata"):
    /// `type:2, signal:1, end:1`.
    V6_3,
    /// Since commit fb799447ae29 ("x86,objtool: Split UNWIND_HINT_EMPTY in two", v6.4): `type:3, signal:1`, where
    /// types 0 and 1 are "undefined" and "end of stack".
    V6_4,
}

impl OrcLayout {
    /// The layout that a kernel's own types tell of; `None` when they hold no `struct orc_entry`.
    #[must_use]
    pub fn of(types: &(impl Types + ?Sized)) -> Option<Self> {
        types.member("orc_entry", "sp_offset")?;
        let has = |name| types.member("orc_entry", name).is_some();
        Some(match (has("signal"), has("end")) {
            (true, false) => Self::V6_4,
            (true, true) => Self::V6_3,
            (false, _) => Self::V4_14,
        })
    }

    /// The layout by the presence of a section `.orc_header` (since commit b9f174c811e3 ("x86/unwind/orc: Add ELF
    /// section with ORC version identifier", v6.4)). v6.3 cannot be told from older ones this way.
    #[must_use]
    pub fn by_header(present: bool) -> Self {
        if present { Self::V6_4 } else { Self::V4_14 }
    }

    /// The kind of frame in the flag bits, given whether `sp_reg` is "undefined"; `None` = no information.
    fn kind(self, flags: u8, sp_undefined: bool) -> Option<FrameKind> {
        let (kind, end) = match self {
            Self::V6_4 => {
                return match flags & 7 {
                    1 => Some(FrameKind::End),
                    2 => Some(FrameKind::Call),
                    3 => Some(FrameKind::Regs),
                    4 => Some(FrameKind::PartialRegs),
                    _ => None,
                };
            }
            Self::V6_3 => (flags & 3, flags & 8 != 0),
            Self::V4_14 => (flags & 3, flags & 4 != 0),
        };
        if sp_undefined {
            return end.then_some(FrameKind::End);
        }
        match kind {
            0 => Some(FrameKind::Call),
            1 => Some(FrameKind::Regs),
            2 => Some(FrameKind::PartialRegs),
            _ => None,
        }
    }
}

/// How the CFA follows from the two fields, as in `unwind_next_frame()` of `unwind_orc.c`.
fn cfa(register: u8, offset: i32) -> CfaRule {
    let plain = |reg, offset| CfaRule::Offset { reg, offset };
    match register {
        // These four hold the CFA itself; the offset is not looked at.
        2 => plain(Reg::Rdx, 0),
        3 => plain(Reg::Rdi, 0),
        6 => plain(Reg::R10, 0),
        7 => plain(Reg::R13, 0),
        4 => plain(Reg::Rbp, offset),
        5 => plain(Reg::Rsp, offset),
        // BP_INDIRECT adds the offset before the load, SP_INDIRECT after it.
        8 => CfaRule::Deref { reg: Reg::Rbp, inner: offset, outer: 0 },
        9 => CfaRule::Deref { reg: Reg::Rsp, inner: 0, outer: offset },
        _ => CfaRule::Unknown,
    }
}

/// Where the caller's rbp is.
fn saved_rbp(register: u8, offset: i32, cfa: CfaRule) -> SavedRule {
    match (register, cfa) {
        (0, _) => SavedRule::Same,
        (1, _) => SavedRule::AtCfa(offset),
        // Relative to rbp: the same place as relative to the CFA when that is relative to rbp too.
        (4, CfaRule::Offset { reg: Reg::Rbp, offset: from }) => SavedRule::AtCfa(offset - from),
        _ => SavedRule::Unknown,
    }
}

fn row(entry: [u8; ENTRY], layout: OrcLayout) -> Option<UnwindRow> {
    let [sp0, sp1, bp0, bp1, registers, flags] = entry;
    let sp_offset = i32::from(i16::from_le_bytes([sp0, sp1]));
    let bp_offset = i32::from(i16::from_le_bytes([bp0, bp1]));
    let (sp_reg, bp_reg) = (registers & 0xf, registers >> 4);
    let kind = layout.kind(flags, sp_reg == 0)?;
    let mut saved = [SavedRule::Unknown; 6];
    if kind == FrameKind::End {
        return Some(UnwindRow { kind, cfa: CfaRule::Unknown, saved, source: RowSource::Orc });
    }
    let cfa = cfa(sp_reg, sp_offset);
    if let Some(rbp) = saved.get_mut(RBP) {
        *rbp = saved_rbp(bp_reg, bp_offset, cfa);
    }
    Some(UnwindRow { kind, cfa, saved, source: RowSource::Orc })
}

/// The rows of an ORC table, ascending by address; of several rows at one address the last is in force.
/// `ip_table` holds 32-bit distances from each of its own entries to the code address; `ip_table_at` is where
/// it lies, in the address space that the rows shall be in. Whatever of the two tables has no counterpart in the
/// other is left out.
#[must_use]
pub fn rows(
    ip_table: &[u8],
    ip_table_at: u64,
    entries: &[u8],
    layout: OrcLayout,
) -> Vec<(LinkAddr, Option<UnwindRow>)> {
    let distances = ip_table.as_chunks::<4>().0.iter();
    let entries = entries.as_chunks::<ENTRY>().0.iter();
    let mut rows: Vec<_> = (0u64..)
        .zip(distances.zip(entries))
        .map(|(index, (&distance, &entry))| {
            let own = ip_table_at.wrapping_add(4 * index);
            let at = own.wrapping_add_signed(i64::from(i32::from_le_bytes(distance)));
            (LinkAddr(at), row(entry, layout))
        })
        .collect();
    // Terminators first, as orc_sort_cmp() of the kernel prefers other entries of the same address.
    rows.sort_by_key(|(at, row)| (*at, row.is_some()));
    rows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(entry: [u8; 6], layout: OrcLayout) -> Option<UnwindRow> {
        let rows = rows(&0x100i32.to_le_bytes(), 0x1000, &entry, layout);
        assert_eq!(rows[0].0, LinkAddr(0x1100));
        rows[0].1
    }

    #[test]
    fn call_frame_of_old_and_new_layout() {
        // sp = rsp + 0x18, bp at cfa - 16
        let row = one([0x18, 0, 0xf0, 0xff, 0x15, 0], OrcLayout::V4_14).unwrap();
        assert_eq!(row.cfa, CfaRule::Offset { reg: Reg::Rsp, offset: 0x18 });
        assert_eq!(row.saved[RBP], SavedRule::AtCfa(-16));
        assert_eq!(row.kind, FrameKind::Call);
        assert_eq!(one([0x18, 0, 0xf0, 0xff, 0x15, 2], OrcLayout::V6_4), Some(row));
        assert_eq!(one([0x18, 0, 0xf0, 0xff, 0x15, 0], OrcLayout::V6_4), None);
    }

    #[test]
    fn indirect_registers_add_the_offset_on_different_sides() {
        let sp = one([8, 0, 0, 0, 0x09, 0], OrcLayout::V6_3).unwrap();
        assert_eq!(sp.cfa, CfaRule::Deref { reg: Reg::Rsp, inner: 0, outer: 8 });
        let bp = one([8, 0, 0, 0, 0x08, 0], OrcLayout::V6_3).unwrap();
        assert_eq!(bp.cfa, CfaRule::Deref { reg: Reg::Rbp, inner: 8, outer: 0 });
    }

    #[test]
    fn end_of_stack_and_regs() {
        let end = |flags, layout| one([0, 0, 0, 0, 0, flags], layout).map(|row| row.kind);
        assert_eq!(end(4, OrcLayout::V4_14), Some(FrameKind::End));
        assert_eq!(end(8, OrcLayout::V6_3), Some(FrameKind::End));
        assert_eq!(end(4, OrcLayout::V6_3), None);
        assert_eq!(end(1, OrcLayout::V6_4), Some(FrameKind::End));
        let kind = |flags, layout| one([0, 0, 0, 0, 5, flags], layout).map(|row| row.kind);
        assert_eq!(kind(1, OrcLayout::V4_14), Some(FrameKind::Regs));
        assert_eq!(kind(3, OrcLayout::V6_4), Some(FrameKind::Regs));
        assert_eq!(kind(4, OrcLayout::V6_4), Some(FrameKind::PartialRegs));
    }

    #[test]
    fn rows_are_sorted_and_terminators_lose() {
        let ips: Vec<u8> = [8i32, 4, 0].iter().flat_map(|ip| ip.to_le_bytes()).collect();
        let entries = [[8, 0, 0, 0, 5, 0], [0; 6], [16, 0, 0, 0, 5, 0]].concat();
        let rows = rows(&ips, 0, &entries, OrcLayout::V4_14);
        assert!(rows.iter().all(|row| row.0 == LinkAddr(8)));
        assert!(rows[0].1.is_none() && rows[2].1.is_some());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(
            ip in proptest::collection::vec(any::<u8>(), 0..64),
            entries in proptest::collection::vec(any::<u8>(), 0..96),
            at in any::<u64>(),
        ) {
            for layout in [OrcLayout::V4_14, OrcLayout::V6_3, OrcLayout::V6_4] {
                let rows = rows(&ip, at, &entries, layout);
                prop_assert_eq!(rows.len(), (ip.len() / 4).min(entries.len() / 6));
            }
        }
    }
}
