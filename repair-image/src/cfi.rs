//! DWARF call-frame information turned into unwind rows, and joined with ORC. Only the tables: finding them in a file is
//! in `compile/`.

use gimli::{
    BaseAddresses, CieOrFde, DebugFrame, EndianSlice, LittleEndian, Register, RegisterRule,
    UnwindContext, UnwindSection, UnwindTableRow, X86_64,
};
use guest::{LinkAddr, Reg};

use crate::{CfaRule, Error, FrameKind, RowSource, SavedRule, UnwindRow};

/// DWARF numbers of the registers in [`Reg::CALLEE_SAVED`] (System V ABI, AMD64 supplement, figure 3.36).
const CALLEE_SAVED: [Register; 6] =
    [X86_64::RBX, X86_64::RBP, X86_64::R12, X86_64::R13, X86_64::R14, X86_64::R15];

pub(crate) fn register(register: Register) -> Option<Reg> {
    /// General registers in the order of their DWARF numbers.
    const DWARF: [Reg; 8] =
        [Reg::Rax, Reg::Rdx, Reg::Rcx, Reg::Rbx, Reg::Rsi, Reg::Rdi, Reg::Rbp, Reg::Rsp];
    let number = usize::from(register.0);
    DWARF.get(number).or_else(|| Reg::GENERAL.get(number).filter(|_| number < 16)).copied()
}

fn saved(rule: Option<RegisterRule<usize>>) -> SavedRule {
    match rule {
        // A callee-saved register that no rule names has not been changed.
        None | Some(RegisterRule::SameValue) => SavedRule::Same,
        Some(RegisterRule::Offset(offset)) => {
            i32::try_from(offset).map_or(SavedRule::Unknown, SavedRule::AtCfa)
        }
        Some(_) => SavedRule::Unknown,
    }
}

fn row(row: &UnwindTableRow<usize>) -> Option<UnwindRow> {
    let cfa = match row.cfa() {
        gimli::CfaRule::RegisterAndOffset { register: base, offset } => {
            match (register(*base), i32::try_from(*offset)) {
                (Some(reg), Ok(offset)) => CfaRule::Offset { reg, offset },
                _ => CfaRule::Unknown,
            }
        }
        gimli::CfaRule::Expression(_) => CfaRule::Unknown,
    };
    // A return address elsewhere than below the CFA is no ordinary call.
    if row.register(X86_64::RA) != Some(RegisterRule::Offset(-8)) {
        return None;
    }
    let saved = CALLEE_SAVED.map(|register| saved(row.register(register)));
    Some(UnwindRow { kind: FrameKind::Call, cfa, saved, source: RowSource::Cfi })
}

/// Rows by the address from which each holds; `None` = nothing is known from there on.
pub type Rows = Vec<(LinkAddr, Option<UnwindRow>)>;

/// The rows of a `.debug_frame` section, ascending by address; `None` from where a function ends. Damaged
/// entries are left out; how many there were is the second value.
///
/// # Errors
/// [`Error::Dwarf`] when the section cannot be walked at all.
pub fn rows(section: &[u8]) -> Result<(Rows, usize), Error> {
    let mut frames = DebugFrame::new(section, LittleEndian);
    frames.set_address_size(8);
    let bases = BaseAddresses::default();
    let mut context = UnwindContext::new();
    let mut rows = Vec::new();
    let mut damaged = 0;
    let mut entries = frames.entries(&bases);
    loop {
        let entry =
            entries.next().map_err(|source| Error::Dwarf { what: ".debug_frame", source })?;
        let fde = match entry {
            None => break,
            Some(CieOrFde::Cie(_)) => continue,
            Some(CieOrFde::Fde(partial)) => partial.parse(DebugFrame::cie_from_offset),
        };
        let walked = fde.and_then(|fde| walk(&frames, &bases, &mut context, &fde, &mut rows));
        damaged += usize::from(walked.is_err());
    }
    // Where one function ends and the next starts, the start is in force.
    rows.sort_by_key(|(at, row)| (*at, row.is_some()));
    Ok((rows, damaged))
}

fn walk<'a>(
    frames: &DebugFrame<EndianSlice<'a, LittleEndian>>,
    bases: &BaseAddresses,
    context: &mut UnwindContext<usize>,
    fde: &gimli::FrameDescriptionEntry<EndianSlice<'a, LittleEndian>>,
    rows: &mut Rows,
) -> gimli::Result<()> {
    if fde.len() == 0 {
        return Ok(());
    }
    let mut table = fde.rows(frames, bases, context)?;
    while let Some(found) = table.next_row()? {
        rows.push((LinkAddr(found.start_address()), row(found)));
    }
    rows.push((LinkAddr(fde.end_address()), None));
    Ok(())
}

/// How ORC and CFI agreed when they were joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Addresses of change where both gave the same CFA.
    pub same: usize,
    /// Where both gave a CFA, and not the same: ORC was taken.
    pub different: usize,
    /// Where only ORC could say.
    pub orc_only: usize,
    /// Where only CFI could say.
    pub cfi_only: usize,
}

/// One row of the two tables' rows at the same address. ORC decides on the CFA: it is what the kernel itself trusts,
/// and it knows entry code; CFI adds the registers that ORC is silent about.
fn join_rows(
    orc: Option<UnwindRow>,
    cfi: Option<UnwindRow>,
    agreement: &mut Agreement,
) -> Option<UnwindRow> {
    let (orc, cfi) = match (orc, cfi) {
        (Some(orc), Some(cfi)) => (orc, cfi),
        (Some(orc), None) => {
            agreement.orc_only += 1;
            return Some(orc);
        }
        (None, cfi) => {
            agreement.cfi_only += usize::from(cfi.is_some());
            return cfi;
        }
    };
    if orc.kind != FrameKind::Call || cfi.cfa == CfaRule::Unknown {
        agreement.orc_only += 1;
        return Some(orc);
    }
    if orc.cfa != cfi.cfa {
        agreement.different += 1;
        return Some(orc);
    }
    agreement.same += 1;
    let mut row = cfi;
    for (rule, other) in row.saved.iter_mut().zip(orc.saved) {
        if *rule == SavedRule::Unknown {
            *rule = other;
        }
    }
    Some(row)
}

/// Joins ORC and CFI rows, both ascending by address.
#[must_use]
pub fn join(
    orc: &[(LinkAddr, Option<UnwindRow>)],
    cfi: &[(LinkAddr, Option<UnwindRow>)],
) -> (Rows, Agreement) {
    let mut agreement = Agreement::default();
    let mut joined = Vec::with_capacity(orc.len() + cfi.len() / 4);
    let (mut orc, mut cfi) = (orc.iter().peekable(), cfi.iter().peekable());
    let (mut orc_row, mut cfi_row) = (None, None);
    while let Some(at) = [orc.peek(), cfi.peek()].into_iter().flatten().map(|next| next.0).min() {
        while let Some((_, row)) = orc.next_if(|next| next.0 == at) {
            orc_row = *row;
        }
        while let Some((_, row)) = cfi.next_if(|next| next.0 == at) {
            cfi_row = *row;
        }
        joined.push((at, join_rows(orc_row, cfi_row, &mut agreement)));
    }
    (joined, agreement)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn call(offset: i32, rbx: SavedRule, source: RowSource) -> Option<UnwindRow> {
        let mut saved = [SavedRule::Unknown; 6];
        saved[0] = rbx;
        let cfa = CfaRule::Offset { reg: Reg::Rsp, offset };
        Some(UnwindRow { kind: FrameKind::Call, cfa, saved, source })
    }

    #[test]
    fn registers_come_from_cfi_where_the_cfa_agrees() {
        let orc = [
            (LinkAddr(0), call(8, SavedRule::Unknown, RowSource::Orc)),
            (LinkAddr(4), call(16, SavedRule::Unknown, RowSource::Orc)),
            (LinkAddr(8), None),
        ];
        let cfi = [
            (LinkAddr(0), call(8, SavedRule::Same, RowSource::Cfi)),
            (LinkAddr(4), call(24, SavedRule::AtCfa(-16), RowSource::Cfi)),
            (LinkAddr(8), None),
        ];
        let (rows, agreement) = join(&orc, &cfi);
        assert_eq!(rows[0], cfi[0]);
        assert_eq!(rows[1], orc[1]);
        assert_eq!(rows[2], (LinkAddr(8), None));
        assert_eq!((agreement.same, agreement.different), (1, 1));
    }

    #[test]
    fn dwarf_register_numbers() {
        assert_eq!(register(X86_64::RBX), Some(Reg::Rbx));
        assert_eq!(register(X86_64::RDI), Some(Reg::Rdi));
        assert_eq!(register(X86_64::R10), Some(Reg::R10));
        assert_eq!(register(X86_64::RA), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = rows(&bytes);
        }
    }
}
