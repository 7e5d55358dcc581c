//! Getting a vCPU out of `KVM_RUN`: `immediate_exit` in its run page, and a signal to its thread. When to do so is
//! decided in `shared.rs`.
//!
//! Either alone is not enough. The signal ends a `KVM_RUN` that is under way but is lost when it comes just before
//! one; `immediate_exit` ends the next `KVM_RUN` before it enters the guest but not one that is under way. It also
//! makes that `KVM_RUN` finish an I/O instruction that the VMM has just served, so that registers are whole
//! (Documentation/virt/kvm/api.rst, 5, `immediate_exit`).
#![allow(unsafe_code, reason = "sigaction, gettid and tgkill")]

use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::ptr;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::Error;
use crate::mapping::Mapping;

/// `immediate_exit` is in the first page of the run area.
const PAGE: usize = 4096;

/// A second mapping of a vCPU's run page, of which only `immediate_exit` is used.
pub(super) struct RunPage(Mapping);

impl RunPage {
    pub(super) fn of(vcpu: &VcpuFd) -> Result<Self, Error> {
        Ok(Self(Mapping::of(vcpu, 0, PAGE).map_err(Error::os("mmap of a vCPU"))?))
    }

    /// Whether the next `KVM_RUN` is to come back at once. Stores are made under the lock of `shared.rs`, which orders
    /// them among each other; the signal that follows is a system call, so the store is visible before it arrives.
    pub(super) fn set_immediate_exit(&self, on: bool) {
        if let Some(byte) = self.0.byte(offset_of!(kvm_run, immediate_exit)) {
            byte.store(u8::from(on), Ordering::Release);
        }
    }
}

/// A thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Thread(libc::pid_t);

impl Thread {
    /// The one that calls.
    pub(super) fn current() -> Self {
        // SAFETY: takes nothing, changes nothing.
        Self(unsafe { libc::gettid() })
    }

    /// Sends it a signal. A thread that has ended is no harm: the id is looked up inside this process only, where it
    /// is unknown (ESRCH), or a younger thread's, which runs a handler that does nothing. (`pthread_kill` would be
    /// undefined behaviour for one that was joined.)
    pub(super) fn signal(self, signal: libc::c_int) {
        // SAFETY: numbers only. A handler for the signal was installed when the VM was attached to.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal) };
    }
}

extern "C" fn nothing(_: libc::c_int) {}

/// Sees to it that the signal interrupts system calls and does nothing else. A handler that the VMM has installed
/// stays; without one the signal would end the process.
pub(super) fn install_handler(signal: libc::c_int) -> Result<(), Error> {
    let failed =
        || Error::io("sigaction for the signal that stops vCPUs")(io::Error::last_os_error());
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the action into memory of ours of the right type.
    if unsafe { libc::sigaction(signal, ptr::null(), old.as_mut_ptr()) } != 0 {
        return Err(failed());
    }
    // SAFETY: written by the call; all zeroes are a valid value, too.
    let mut action = unsafe { old.assume_init() };
    if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN {
        return Ok(());
    }
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // KVM_RUN returns EINTR with this flag as without; the VMM's reads and writes are spared.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler is async-signal-safe, as it does nothing, and lives as long as the process.
    if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
        return Err(failed());
    }
    Ok(())
}
