//! What is odd about a dump that can be used all the same: missing parts, things its writer gets wrong.

use std::fmt;
use std::ops::Range;

use guest::GuestPhys;

/// Something that whoever relies on the dump should know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remark {
    /// The file ends too early: what was behind its end is missing.
    Cut {
        /// What is incomplete.
        what: &'static str,
    },
    /// Its writer said that it did not finish (`DUMP_DH_COMPRESSED_INCOMPLETE`).
    Incomplete,
    /// RAM that belongs to parts of a split dump that were not given.
    MissingPart {
        /// Guest-physical range.
        range: Range<GuestPhys>,
    },
    /// Bytes were overwritten on purpose (`makedumpfile --eppic`, `--config`).
    Erased,
    /// The dump has no VMCOREINFO: it must be found in memory.
    NoVmcoreinfo,
    /// The dump has no registers.
    NoRegisters,
    /// RAM was left out of an ELF dump (`makedumpfile -E`). The format does not tell pages that were
    /// filtered from pages that were zero, so that all of them are missing.
    LeftOut,
    /// A `live.core` of defib's own: what the repair did not touch was read after it, while the guest ran.
    TwoMoments,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { what } => write!(f, "the file ends too early: its {what} are incomplete"),
            Self::Incomplete => f.write_str("its writer ran out of space: pages are missing"),
            Self::MissingPart { range } => {
                write!(f, "a part is missing: {:#x} to {:#x}", range.start, range.end)
            }
            Self::Erased => f.write_str("some data was erased on purpose when it was written"),
            Self::NoVmcoreinfo => f.write_str("no VMCOREINFO in its notes"),
            Self::NoRegisters => f.write_str("no registers in its notes"),
            Self::TwoMoments => f.write_str(
                "what the repair did not touch was read after it: a plan made of this file may refuse what the guard did",
            ),
            Self::LeftOut => {
                f.write_str("RAM was left out, filtered or zero: an ELF dump does not say")
            }
        }
    }
}
