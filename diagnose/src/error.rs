//! The one error type of this crate: what a diagnosis can't do without and did not get. Facts that are
//! merely not determined are `None` in the `Diagnosis`, not errors.

use guest::{GuestVirt, MemoryError, Reg};

/// Why there is no diagnosis.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A register without which nothing can be unwound is not known.
    #[error("register {} of the crashed vCPU is not known", .0.name())]
    UnknownRegister(Reg),
    /// Guest memory could not be read.
    #[error("cannot read {what} at {at}")]
    Guest {
        /// What was being read.
        what: &'static str,
        /// Where, guest-virtual.
        at: GuestVirt,
        /// What the memory said.
        #[source]
        source: MemoryError,
    },
    /// The kernel has no such symbol.
    #[error("the kernel has no symbol {0}")]
    MissingSymbol(&'static str),
    /// The kernel has no such structure member, or it is no number.
    #[error("the kernel has no readable member {structure}.{path}")]
    MissingMember {
        /// The structure.
        structure: &'static str,
        /// Path of the member.
        path: &'static str,
    },
    /// A list in guest memory is damaged.
    #[error("the list of {what} is damaged at {at}, after {entries} entries")]
    DamagedList {
        /// What the list holds.
        what: &'static str,
        /// List node that can't be followed or was met before, guest-virtual.
        at: GuestVirt,
        /// Entries read before it.
        entries: usize,
    },
}
