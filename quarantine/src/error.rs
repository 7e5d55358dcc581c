//! The one error type of this crate: what could not be read or carried out, and what state the
//! guest is left in.

use guest::{GuestPhys, GuestVirt, MachineError, MemoryError};
use thiserror::Error;

/// Why a policy can't be used or a plan could not be applied.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The policy is no TOML, has unknown keys or wrong types.
    #[error("the policy cannot be used")]
    Policy(#[source] Box<toml::de::Error>),
    /// A value of the policy is out of range.
    #[error("the policy's {key} is {value}, but must be at least {least}")]
    PolicyValue {
        /// The key.
        key: &'static str,
        /// Its value.
        value: u64,
        /// The least value allowed.
        least: u64,
    },
    /// The plan was carried out, but the guest is not sound enough to go on.
    #[error("the guest must not go on after the repair")]
    Unsound(#[source] crate::Reason),
    /// What another CPU was changing when it crashed stays half changed.
    #[error("another CPU crashed with {lock} taken")]
    OtherCrash {
        /// The lock, in words.
        lock: &'static str,
    },
    /// The plan takes no rung.
    #[error("the plan has nothing to apply: every rung was refused")]
    NothingToDo,
    /// The machine lacks an ability that the plan needs.
    #[error("the machine cannot {ability}")]
    NoAbility {
        /// What it can't do.
        ability: &'static str,
    },
    /// Guest memory is not as it was when the plan was made. Nothing was changed.
    #[error("{what} at {at:#x} holds {found:#x}, but held {expected:#x} when the plan was made")]
    Changed {
        /// What was looked at.
        what: String,
        /// Where, guest-virtual.
        at: GuestVirt,
        /// What is there.
        found: u64,
        /// What was there.
        expected: u64,
    },
    /// Guest memory can't be accessed.
    #[error("{what} cannot be accessed")]
    Memory {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// The machine could not do what was asked.
    #[error("{what} failed")]
    Machine {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: MachineError,
    },
    /// The payload could not be made or placed.
    #[error("the payload cannot be placed")]
    Payload(#[source] Box<repair_image::Error>),
    /// The machine gave less fresh memory than was asked for.
    #[error("{found} bytes of fresh memory instead of {needed}")]
    FreshTooSmall {
        /// Bytes that were given.
        found: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// The kernel's own map of memory does not say that the firmware's memory is reserved.
    #[error(
        "{size} bytes at guest-physical {at:#x} are not reserved in the kernel's own map of memory"
    )]
    NotReserved {
        /// Guest-physical start.
        at: GuestPhys,
        /// Bytes.
        size: u64,
    },
    /// An entry of the kernel's page tables is not as it was.
    #[error(
        "the page-table entry at guest-physical {at:#x} is {found:#x} instead of {expected:#x}"
    )]
    TableChanged {
        /// Guest-physical address of the entry.
        at: GuestPhys,
        /// What is there.
        found: u64,
        /// What should be there.
        expected: u64,
    },
    /// The guest wrote over the mailbox: it is not known what was called.
    #[error("the payload's mailbox is damaged")]
    MailboxDamaged,
    /// A function of the guest that was called crashed.
    #[error("{function} crashed when it was called")]
    CalleeCrashed {
        /// The function.
        function: String,
    },
    /// The calls did not all return.
    #[error("only {done} of {wanted} calls into the guest returned")]
    CallsUnfinished {
        /// Calls that returned.
        done: usize,
        /// Calls that were wanted.
        wanted: usize,
    },
    /// Applying failed after something had been done that can't be taken back (a lock was
    /// released). All that could be taken back was.
    #[error("the repair failed half-way, after {} had been called", .done.join(", "))]
    HalfDone {
        /// Functions of the guest that had been called.
        done: Vec<String>,
        /// Why it failed.
        #[source]
        cause: Box<Error>,
    },
    /// Applying failed, and taking it back failed too.
    #[error("the repair failed ({cause}), and it could not be taken back")]
    RollbackFailed {
        /// Why it failed.
        cause: Box<Error>,
        /// Why it could not be taken back.
        #[source]
        source: Box<Error>,
    },
}

impl Error {
    pub(crate) fn memory(what: &str, source: MemoryError) -> Self {
        Self::Memory { what: what.to_owned(), source }
    }

    pub(crate) fn payload(source: repair_image::Error) -> Self {
        Self::Payload(Box::new(source))
    }

    pub(crate) fn machine(what: &'static str) -> impl FnOnce(MachineError) -> Self {
        move |source| Self::Machine { what, source }
    }
}
