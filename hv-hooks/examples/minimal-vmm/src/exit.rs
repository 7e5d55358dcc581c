//! How a VM ends, and the one place where its threads learn of it.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Error, Result};

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset, which this VMM answers by its end.
    Reset,
    /// The guest wrote this byte to the exit port.
    Code(u8),
    /// A vCPU met a triple fault.
    TripleFault,
    /// KVM can't run what comes next; in words.
    Unrunnable(String),
    /// [`crate::Vmm::stop`] was called.
    Stopped,
}

impl fmt::Display for Exit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => out.write_str("the guest switched itself off"),
            Self::Reset => out.write_str("the guest reset itself"),
            Self::Code(code) => write!(out, "the guest ended with code {code}"),
            Self::TripleFault => out.write_str("triple fault"),
            Self::Unrunnable(why) => write!(out, "KVM can't run the guest: {why}"),
            Self::Stopped => out.write_str("stopped"),
        }
    }
}

/// The VM's end, shared by all its threads. The first reason counts.
#[derive(Debug)]
pub struct Ending {
    exit: Mutex<Option<Exit>>,
    /// Readable from the end on.
    pub event: EventFd,
}

impl Ending {
    pub fn new() -> Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::host("eventfd"))?;
        Ok(Self { exit: Mutex::new(None), event })
    }

    /// Ends the VM.
    pub fn end(&self, exit: Exit) {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exit);
        // Fails only when the counter is at its limit, and then it is readable too.
        let _ = self.event.write(1);
    }

    /// Why the VM ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn is_over(&self) -> bool {
        self.exit().is_some()
    }
}
