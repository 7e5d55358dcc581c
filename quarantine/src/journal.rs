//! What was done to a guest, in order: every write with old and new bytes, every register set,
//! every call. Enough to take writes back, last first, and to show them in an incident report.

use std::time::Instant;

use guest::{FreshRegion, GuestPhys, GuestVirt, Registers, Vcpu};
use serde::Serialize;

use crate::action::hex_bytes;

/// One thing done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum Deed {
    /// Bytes were written.
    Write {
        /// Guest-physical address.
        phys: GuestPhys,
        /// Guest-virtual address in the kernel's address space, where it was written by one.
        virt: Option<GuestVirt>,
        /// Bytes before.
        #[serde(serialize_with = "hex_bytes")]
        old: Vec<u8>,
        /// Bytes after.
        #[serde(serialize_with = "hex_bytes")]
        new: Vec<u8>,
        /// Whether it is code, that may have been translated.
        code: bool,
    },
    /// Registers were set.
    Registers {
        /// The vCPU.
        vcpu: Vcpu,
        /// Its registers before.
        old: Box<Registers>,
        /// The registers that were set.
        new: Box<Registers>,
    },
    /// Fresh memory was added.
    FreshAdded {
        /// The region.
        region: FreshRegion,
    },
    /// Fresh memory was removed.
    FreshRemoved {
        /// The region.
        region: FreshRegion,
    },
    /// Bytes were loaded into fresh memory; they vanish with it.
    Loaded {
        /// Guest-physical address.
        phys: GuestPhys,
        /// Number of bytes.
        bytes: usize,
    },
    /// A function of the guest's kernel was called, and returned.
    Called {
        /// The function.
        function: String,
        /// Its return value (rax), hex.
        result: String,
    },
    /// Something was taken back after a failure.
    RolledBack {
        /// Number of deeds taken back.
        deeds: usize,
    },
}

/// A deed, when and why.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Microseconds since the journal was opened.
    pub at_us: u64,
    /// What.
    pub deed: Deed,
    /// Why.
    pub why: String,
}

/// The journal of one repair.
#[derive(Clone, Debug, Serialize)]
pub struct Journal {
    #[serde(skip)]
    opened: Instant,
    entries: Vec<Entry>,
}

impl Default for Journal {
    fn default() -> Self {
        Self::open()
    }
}

impl Journal {
    /// An empty journal whose clock starts now.
    #[must_use]
    pub fn open() -> Self {
        Self { opened: Instant::now(), entries: Vec::new() }
    }

    /// What was done, in order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(crate) fn push(&mut self, deed: Deed, why: &str) {
        let at_us = u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.entries.push(Entry { at_us, deed, why: why.to_owned() });
    }

    /// Deeds from entry `from` on, last first: the order in which they are taken back.
    pub fn undo_order(&self, from: usize) -> impl Iterator<Item = &Entry> {
        self.entries.get(from..).unwrap_or(&[]).iter().rev()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_deed_is_taken_back_first() {
        let mut journal = Journal::open();
        for byte in 0..3 {
            let deed = Deed::Write {
                phys: GuestPhys(byte),
                virt: None,
                old: vec![0],
                new: vec![byte as u8],
                code: false,
            };
            journal.push(deed, "test");
        }
        let order: Vec<_> = journal
            .undo_order(1)
            .map(|entry| match &entry.deed {
                Deed::Write { phys, .. } => phys.0,
                _ => 99,
            })
            .collect();
        assert_eq!(order, [2, 1]);
        assert!(serde_json::to_string(&journal).unwrap().contains("\"new\":\"02\""));
    }
}
