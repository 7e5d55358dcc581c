//! One vocabulary for unwinding: ORC and DWARF call-frame information both turn into `UnwindRow`.
//! The rules only; reading ORC and CFI is in `orc.rs` and `cfi.rs`, applying rows is `diagnose`'s.

use guest::Reg;

/// What lies at the CFA of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// An ordinary call: the return address is the word below the CFA.
    Call,
    /// A whole `struct pt_regs` starts at the CFA: an exception or system-call entry.
    Regs,
    /// Only the hardware part of `pt_regs` (rip, cs, rflags, rsp, ss) is there; the CFA is the address
    /// where the hardware part starts.
    PartialRegs,
    /// Outermost frame: nothing above.
    End,
}

/// How the CFA (value of rsp before the call that made the frame) is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CfaRule {
    /// `cfa = reg + offset`
    Offset {
        /// Base register.
        reg: Reg,
        /// Signed bytes.
        offset: i32,
    },
    /// `cfa = *(reg + inner) + outer`
    Deref {
        /// Base register.
        reg: Reg,
        /// Signed bytes added before the load.
        inner: i32,
        /// Signed bytes added after the load.
        outer: i32,
    },
    /// Not known for this address.
    Unknown,
}

/// Where a callee-saved register of the caller is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SavedRule {
    /// The tables do not tell. (ORC says nothing of rbx, r12 to r15.)
    #[default]
    Unknown,
    /// The frame has not changed it.
    Same,
    /// `*(cfa + offset)`
    AtCfa(i32),
}

/// Which table a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowSource {
    /// ORC only: CFA and rbp.
    Orc,
    /// DWARF call-frame information (agreeing with ORC where both exist).
    Cfi,
}

/// How to go from one frame to its caller at one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnwindRow {
    /// What lies at the CFA.
    pub kind: FrameKind,
    /// How the CFA is computed.
    pub cfa: CfaRule,
    /// Rules for rbx, rbp, r12, r13, r14, r15, in the order of [`Reg::CALLEE_SAVED`].
    pub saved: [SavedRule; 6],
    /// Which table says so.
    pub source: RowSource,
}
