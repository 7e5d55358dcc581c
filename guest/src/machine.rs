//! What can be attached to: a live VM, a dump, a fake. Memory and registers are always there; every
//! other ability is an `Option`, and a machine that lacks it answers `None` instead of failing.

use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

use crate::{GuestPhys, GuestVirt, MemoryError, PhysMemory, Registers};

/// Index of a vCPU, from 0, in the hypervisor's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Vcpu(pub usize);

/// Why a machine could not do what was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MachineError {
    /// Guest memory could not be accessed.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// There is no such vCPU.
    #[error("the machine has no vCPU {}", .0.0)]
    NoSuchVcpu(Vcpu),
    /// The guest did not get there in time.
    #[error("{what}: not done after {after:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The machine is gone: its process ended or closed the connection.
    #[error("the machine is gone")]
    Gone,
    /// A backend's own error.
    #[error("{backend}")]
    Backend {
        /// Name of the backend.
        backend: &'static str,
        /// What it says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A place in the kernel that is executed when it crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HookKind {
    /// `oops_begin()`: before any state of an oops exists.
    OopsBegin,
    /// `panic()`: explicit, or promoted by a sysctl.
    Panic,
    /// `exc_double_fault()`: a fault while an exception was delivered; stack overflow.
    DoubleFault,
    /// `handle_stack_overflow()`: guard page hit, on the double-fault stack.
    StackOverflow,
    /// A function of a driver whose present call is suspected of never returning: being called again by the same
    /// task shows that it has; or one that is suspected of serving page faults with nothing, and where it returns to.
    /// Armed only for as long as it is suspected.
    Watched,
    /// No place at all: a guard found out by itself that the vCPU makes no progress. Never armed.
    Stuck,
}

impl HookKind {
    /// The kinds that are armed all the time: as many as x86 has debug registers.
    pub const ALL: [HookKind; 4] =
        [Self::OopsBegin, Self::Panic, Self::DoubleFault, Self::StackOverflow];

    /// The function at whose entry the hook sits (same name in 6.1 and 6.12), or what it is if there is none.
    #[must_use]
    pub const fn function(self) -> &'static str {
        match self {
            Self::OopsBegin => "oops_begin",
            Self::Panic => "panic",
            Self::DoubleFault => "exc_double_fault",
            Self::StackOverflow => "handle_stack_overflow",
            Self::Watched => "entry of a watched function",
            Self::Stuck => "no progress",
        }
    }
}

/// A hook and where it sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Hook {
    /// Which one.
    pub kind: HookKind,
    /// First instruction of the function.
    pub at: GuestVirt,
}

/// Why the machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// A vCPU reached an armed hook.
    Hook(Hook),
    /// A vCPU reached the address that a call was to end at.
    CallEnd,
    /// Somebody else paused it, or it stopped for a reason that is not ours.
    Foreign,
    /// The guest was reset: everything known of its memory is void.
    Reset,
    /// The vCPU met a fault while it delivered a double fault: it is shut down (Intel SDM 3A 6.15). Memory
    /// is as the guest left it, registers may not be.
    TripleFault,
    /// The hypervisor can't run what the vCPU is to run next; the guest can't go on.
    Unrunnable,
    /// The guest told its hypervisor that it has crashed (pvpanic, a crash hypercall).
    Panicked,
    /// The guest powered off or the hypervisor ended.
    Gone,
}

/// A stop: all vCPUs stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// The vCPU that caused it.
    pub vcpu: Vcpu,
    /// Why.
    pub reason: StopReason,
    /// When the report of the stop was read, on the host's monotonic clock.
    pub at: std::time::Instant,
}

/// A machine: guest memory and registers, and abilities it may have.
pub trait Machine {
    /// Guest-physical memory.
    fn phys(&self) -> &dyn PhysMemory;

    /// Number of vCPUs.
    fn vcpu_count(&self) -> usize;

    /// Registers of a vCPU of a machine that stands.
    ///
    /// # Errors
    /// No such vCPU, or the backend fails.
    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError>;

    /// Stop, resume, wait, set registers.
    fn control(&mut self) -> Option<&mut dyn Control> {
        None
    }

    /// Write to guest memory.
    fn writer(&mut self) -> Option<&mut dyn WriteMemory> {
        None
    }

    /// Stop at places of the kernel.
    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        None
    }

    /// Guest RAM as another thread may read it, as it is now: memory that comes or goes later is not seen.
    fn second_view(&self) -> Option<Box<dyn PhysMemory + Send>> {
        None
    }

    /// Give the guest memory that it does not know of.
    fn fresh_memory(&mut self) -> Option<&mut dyn FreshMemory> {
        None
    }

    /// Run guest code under control.
    fn caller(&mut self) -> Option<&mut dyn Call> {
        None
    }
}

/// Stopping and resuming.
pub trait Control {
    /// Whether the vCPUs run, as far as is known without waiting: a stop of the guest's own making may not
    /// have been reported yet.
    fn is_running(&self) -> bool;

    /// Stops every vCPU. No effect on a machine that stands.
    ///
    /// # Errors
    /// When the backend fails.
    fn stop(&mut self) -> Result<(), MachineError>;

    /// Lets every vCPU run. A vCPU that stands on a hook passes it.
    ///
    /// # Errors
    /// When the backend fails.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Waits for a stop at most `limit`; `None` when the guest still runs.
    ///
    /// # Errors
    /// When the backend fails.
    fn wait(&mut self, limit: Duration) -> Result<Option<Stop>, MachineError>;

    /// Sets the registers that `regs` knows; the others keep their values.
    ///
    /// # Errors
    /// No such vCPU, or the backend fails.
    fn set_registers(&mut self, vcpu: Vcpu, regs: &Registers) -> Result<(), MachineError>;
}

/// Writing to guest memory. Only an applied plan and the payload's loader may call this.
pub trait WriteMemory {
    /// Writes data. All or nothing.
    ///
    /// # Errors
    /// When a byte of the range is not RAM or can't be had.
    fn write(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError>;

    /// Writes bytes that may have been executed before: a backend that translates code (QEMU's TCG)
    /// drops what it has translated from them.
    ///
    /// # Errors
    /// When a byte of the range is not RAM or can't be had.
    fn write_code(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MachineError>;
}

/// Hooks at kernel functions. The machine must stand.
pub trait Hooks {
    /// Arms these hooks, instead of those armed before.
    ///
    /// # Errors
    /// When the backend can't place them all; then none is armed.
    fn arm(&mut self, hooks: &[Hook]) -> Result<(), MachineError>;

    /// Takes all hooks away.
    ///
    /// # Errors
    /// When the backend fails.
    fn disarm(&mut self) -> Result<(), MachineError>;
}

/// How fresh memory came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FreshKind {
    /// A memory module plugged in at crash time and hidden from the guest's ACPI driver.
    HotAdded,
    /// The tail of RAM that the firmware reserved and no longer uses; saved and put back.
    FirmwareTail,
    /// A memory slot of its own (VMMs that own their KVM file descriptors).
    Memslot,
}

/// Memory that the guest does not know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FreshRegion {
    /// Guest-physical start, 4 KiB aligned.
    pub at: GuestPhys,
    /// Size in bytes.
    pub size: u64,
    /// How it came to be.
    pub kind: FreshKind,
}

/// Adding and removing fresh memory. The machine must stand.
pub trait FreshMemory {
    /// Adds at least `size` bytes, zeroed.
    ///
    /// # Errors
    /// When the machine has no way to do so; the error says why each way failed.
    fn add(&mut self, size: u64) -> Result<FreshRegion, MachineError>;

    /// Removes a region again.
    ///
    /// # Errors
    /// When the backend fails; the region may then still be there.
    fn remove(&mut self, region: FreshRegion) -> Result<(), MachineError>;
}

/// Running guest code under control.
pub trait Call {
    /// Sets `regs` on `vcpu`, lets the machine run until that vCPU reaches `end`, and returns its
    /// registers there. A crash on any vCPU meanwhile ends the wait: the stop is returned as
    /// [`CallOutcome::Crashed`] if it is on `vcpu`; one on another vCPU is kept for
    /// [`Control::wait`], and that vCPU stands until then.
    ///
    /// # Errors
    /// A timeout leaves the machine standing.
    fn run_until(
        &mut self,
        vcpu: Vcpu,
        regs: &Registers,
        end: GuestVirt,
        limit: Duration,
    ) -> Result<CallOutcome, MachineError>;

    /// Lets the other vCPUs run for `limit` while `vcpu` stands, for them to give back what they hold.
    /// `true` when one of them has met something instead: that ends it early, is kept for
    /// [`Control::wait`], and that vCPU stands until then.
    ///
    /// # Errors
    /// When the backend fails. The machine stands again where it can be made to.
    fn run_others(&mut self, vcpu: Vcpu, limit: Duration) -> Result<bool, MachineError>;
}

/// How a run under control ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "one lives at a time, on the stack of the caller")]
pub enum CallOutcome {
    /// At the address asked for.
    Reached(Registers),
    /// At a hook: what was called crashed.
    Crashed(Hook),
}
