//! The ends of a `KVM_RUN` that a guard cares for.

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, kvm_debug_exit_arch};
use kvm_ioctls::VcpuExit;

use guest::StopReason;

/// Why `KVM_RUN` came back, as far as it may concern a guard.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum VcpuEvent {
    /// A breakpoint or a step (`KVM_EXIT_DEBUG`).
    Debug(kvm_debug_exit_arch),
    /// A signal or `immediate_exit` (`EINTR`, `KVM_EXIT_INTR`).
    Interrupted,
    /// Triple fault (`KVM_EXIT_SHUTDOWN`).
    Shutdown,
    /// `KVM_EXIT_SYSTEM_EVENT`, with its type.
    SystemEvent(u32),
    /// `KVM_EXIT_INTERNAL_ERROR`: above all an instruction that KVM would have to emulate and can't.
    InternalError,
    /// `KVM_EXIT_FAIL_ENTRY`, with the hardware's reason.
    FailEntry(u64),
}

impl VcpuEvent {
    /// The event behind what [`kvm_ioctls::VcpuFd::run`] returned. `None` for what is the VMM's own, above all I/O.
    #[must_use]
    pub fn of(outcome: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<Self> {
        match outcome {
            Ok(VcpuExit::Debug(arch)) => Some(Self::Debug(*arch)),
            Ok(VcpuExit::Intr) => Some(Self::Interrupted),
            Err(error) if error.errno() == libc::EINTR => Some(Self::Interrupted),
            Ok(VcpuExit::Shutdown) => Some(Self::Shutdown),
            Ok(VcpuExit::SystemEvent(kind, _)) => Some(Self::SystemEvent(*kind)),
            Ok(VcpuExit::InternalError) => Some(Self::InternalError),
            Ok(VcpuExit::FailEntry(reason, _)) => Some(Self::FailEntry(*reason)),
            _ => None,
        }
    }

    /// The stop that this is for a guard, if the guest itself ended its run.
    pub(super) fn death(self) -> Option<StopReason> {
        match self {
            Self::Shutdown => Some(StopReason::TripleFault),
            Self::InternalError | Self::FailEntry(_) => Some(StopReason::Unrunnable),
            Self::SystemEvent(KVM_SYSTEM_EVENT_CRASH) => Some(StopReason::Panicked),
            Self::SystemEvent(_) | Self::Debug(_) | Self::Interrupted => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_concerns_a_guard_is_an_event() {
        assert!(VcpuEvent::of(&Ok(VcpuExit::Hlt)).is_none());
        assert!(VcpuEvent::of(&Ok(VcpuExit::IoOut(0x3f8, &[0]))).is_none());
        let interrupted = Err(kvm_ioctls::Error::new(libc::EINTR));
        assert!(matches!(VcpuEvent::of(&interrupted), Some(VcpuEvent::Interrupted)));
        assert!(VcpuEvent::of(&Err(kvm_ioctls::Error::new(libc::EAGAIN))).is_none());
    }

    #[test]
    fn a_reset_or_a_shutdown_of_the_guests_is_the_vmms() {
        assert_eq!(VcpuEvent::SystemEvent(1).death(), None);
        assert_eq!(VcpuEvent::SystemEvent(3).death(), Some(StopReason::Panicked));
    }
}
