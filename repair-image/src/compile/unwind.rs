//! Finds an object's ORC and call-frame tables and joins them. What they mean is in `orc.rs` and `cfi.rs`.

use guest::LinkAddr;

use crate::cfi::{self, Agreement};
use crate::orc::{self, OrcLayout};
use crate::{Error, UnwindRow};

/// An object's raw unwind tables; each may be empty.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables<'a> {
    pub(super) orc_ip: &'a [u8],
    /// Run-time or link address of `orc_ip`.
    pub(super) orc_ip_at: u64,
    pub(super) orc: &'a [u8],
    pub(super) layout: OrcLayout,
    pub(super) debug_frame: &'a [u8],
}

/// Rows, ascending by address, and how the two tables agreed.
pub(super) type Joined = (Vec<(LinkAddr, Option<UnwindRow>)>, Agreement);

impl Tables<'_> {
    pub(super) fn joined(&self) -> Result<Joined, Error> {
        let orc = || orc::rows(self.orc_ip, self.orc_ip_at, self.orc, self.layout);
        let (orc, cfi) = rayon::join(orc, || cfi::rows(self.debug_frame));
        Ok(cfi::join(&orc, &cfi?.0))
    }
}
