//! The one error type of the crate, and how it becomes a [`MachineError`].

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use guest::{FreshKind, GuestPhys, MachineError, Vcpu};
use thiserror::Error;

/// Why a hypervisor could not be attached to, or did not do what was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection to a socket.
    #[error("can't connect to {}", endpoint.display())]
    Connect {
        /// Socket path, or `tcp:HOST:PORT`.
        endpoint: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A system call failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else than a QMP greeting came first.
    #[error("not a QMP socket: its first line is {got:?}")]
    NotQmp {
        /// The start of what came.
        got: String,
    },
    /// The QMP socket took the connection but said nothing.
    #[error(
        "no QMP greeting within {after:?}: a QMP socket serves one client at a time and this one is taken"
    )]
    QmpBusy {
        /// How long was waited.
        after: Duration,
    },
    /// A QMP line that can't be understood.
    #[error("QMP line is {what}: {line:?}")]
    QmpSyntax {
        /// What is wrong with it.
        what: &'static str,
        /// The start of the line.
        line: String,
    },
    /// QEMU refused a QMP command.
    #[error("QMP {command}: {desc} ({class})")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// QEMU answered a command with something unexpected.
    #[error("unexpected answer to {command}: {said:?}")]
    Answer {
        /// The QMP or HMP command or the gdb packet.
        command: String,
        /// The start of the answer.
        said: String,
    },
    /// A gdb-remote packet that can't be understood.
    #[error("gdb packet: {0}")]
    Packet(#[from] crate::qemu::rsp::PacketError),
    /// A register that the stub does not offer.
    #[error("QEMU's gdb stub knows no register {0}")]
    NoRegister(&'static str),
    /// The stub and the monitor tell different values for a register.
    #[error(
        "QEMU's gdb stub and its monitor disagree about {0}: the register file is not understood"
    )]
    RegisterFile(&'static str),
    /// The peer closed the connection.
    #[error("QEMU closed the connection")]
    Gone,
    /// It did not happen in time.
    #[error("{what}: not done after {after:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The VM is not running, so it is not known whether it is healthy.
    #[error("the VM is not running but {status:?}; resume it first or take it over explicitly")]
    NotRunning {
        /// QEMU's run state.
        status: String,
    },
    /// The owner has switched on QEMU's gdb stub.
    #[error("QEMU's gdb stub is in use at {endpoint}; pass its socket with --gdb to take it over")]
    StubInUse {
        /// Where the stub listens, in QEMU's words.
        endpoint: String,
    },
    /// Another guard watches this VM.
    #[error("another guard is attached to this VM (QEMU is process {pid}; lock {})", lock.display())]
    AlreadyGuarded {
        /// Process id of QEMU.
        pid: u32,
        /// The lock that is held.
        lock: PathBuf,
    },
    /// The process behind the QMP socket is not the one that runs the vCPUs.
    #[error(
        "process {pid} behind the QMP socket does not run vCPU thread {thread}; give QEMU's process id"
    )]
    WrongProcess {
        /// Process id of the socket's peer.
        pid: u32,
        /// Thread id of vCPU 0 in QEMU's words.
        thread: u64,
    },
    /// No guest RAM was found in the memory map.
    #[error("QEMU's memory map shows no guest RAM")]
    NoRam,
    /// A range of guest RAM could not be found in QEMU's address space.
    #[error("guest RAM at {at:#x} is not where QEMU says in its address space ({why})")]
    RamNotFound {
        /// Start of the range.
        at: GuestPhys,
        /// What was looked for.
        why: &'static str,
    },
    /// There is no such vCPU.
    #[error("the VM has no vCPU {}", .0.0)]
    NoSuchVcpu(Vcpu),
    /// The machine runs, and what was asked for needs it to stand.
    #[error("{0}: the machine is running")]
    Running(&'static str),
    /// Access to guest memory failed.
    #[error("guest memory: {0}")]
    Memory(#[from] guest::MemoryError),
    /// No way to fresh memory worked.
    #[error("no fresh memory: {}", list(.0))]
    NoFreshMemory(
        /// Each way that was tried and why it failed.
        Vec<(FreshKind, Error)>,
    ),
    /// One way to fresh memory does not exist in this VM.
    #[error("{0}")]
    FreshUnavailable(&'static str),
    /// KVM refused something.
    #[error("{ioctl}: {errno}")]
    Kvm {
        /// The ioctl.
        ioctl: &'static str,
        /// Its error.
        errno: kvm_ioctls::Error,
    },
    /// KVM on this host can't do something that is needed.
    #[error("KVM of this host lacks {capability}, which {used_for} needs")]
    NoCapability {
        /// Name of the capability.
        capability: &'static str,
        /// What can't be done without it.
        used_for: &'static str,
    },
    /// What the VMM handed over is not enough.
    #[error("{0}")]
    Parts(&'static str),
    /// A vCPU did not stop when it was told to.
    #[error("vCPU {} did not stop within {after:?}: {why}", vcpu.0)]
    VcpuMissing {
        /// Which one.
        vcpu: Vcpu,
        /// How long was waited.
        after: Duration,
        /// What is known of its thread.
        why: &'static str,
    },
    /// A vCPU's thread stands but did not do what it was asked for.
    #[error("vCPU {} stands but did not answer within {after:?} ({what})", vcpu.0)]
    VcpuSilent {
        /// Which one.
        vcpu: Vcpu,
        /// What it was asked for.
        what: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// A vCPU's thread has ended, so nothing more can be asked of that vCPU.
    #[error("the thread of vCPU {} has ended", .0.0)]
    VcpuGone(Vcpu),
    /// The VMM said that the VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// More hooks than debug registers.
    #[error("{0} hooks, but a vCPU has four debug registers")]
    TooManyHooks(usize),
    /// Four hooks are armed and none of them can give way to the end of a call.
    #[error("no debug register is free for the end of a call")]
    NoDebugRegister,
    /// A call into the guest can't end any more.
    #[error("the call into the guest was cut short: {0:?}")]
    CallCut(guest::StopReason),
    /// A memory slot could not be made.
    #[error(
        "KVM_SET_USER_MEMORY_REGION: memslot {slot} at guest-physical {at:#x}, {size:#x} bytes: {errno}{}",
        hint(*errno)
    )]
    Memslot {
        /// Its number.
        slot: u32,
        /// Guest-physical start.
        at: GuestPhys,
        /// Bytes.
        size: u64,
        /// KVM's answer.
        errno: kvm_ioctls::Error,
    },
    /// More regions of RAM than memory slots.
    #[error("{regions} regions of RAM, but only {slots} memslots for them")]
    TooFewSlots {
        /// Regions.
        regions: usize,
        /// Slots.
        slots: usize,
    },
    /// No free place in the guest-physical address space.
    #[error(
        "no place for {size:#x} bytes in the guest-physical address space of {bits} bits ({})",
        tried(.refused)
    )]
    NoPlace {
        /// Bytes.
        size: u64,
        /// Width of guest-physical addresses (MAXPHYADDR).
        bits: u8,
        /// Places that KVM refused, and why.
        refused: Vec<Error>,
    },
    /// A dirty ring's size is not possible.
    #[error(
        "a dirty ring of {0} entries: it must be a power of two, 4 KiB or more, at most {1} entries"
    )]
    DirtyRingSize(u32, u32),
}

/// What the two usual refusals of a memory slot mean (Documentation/virt/kvm/api.rst, 4.35).
fn hint(errno: kvm_ioctls::Error) -> &'static str {
    match errno.errno() {
        libc::EEXIST => " (it overlaps another memslot)",
        libc::EINVAL => {
            " (the number is in use or too high, or the address is past what KVM can map)"
        }
        _ => "",
    }
}

/// "KVM refused: why; why".
fn tried(refused: &[Error]) -> String {
    if refused.is_empty() {
        return "RAM and reserved windows leave none".to_owned();
    }
    let texts: Vec<String> = refused.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// "hot_added: why; firmware_tail: why".
fn list(reasons: &[(FreshKind, Error)]) -> String {
    let texts: Vec<String> =
        reasons.iter().map(|(kind, error)| format!("{kind:?}: {error}")).collect();
    texts.join("; ")
}

impl Error {
    /// An [`Error::Io`] from a `rustix` error.
    pub(crate) fn os(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Io { what, source: errno.into() }
    }

    /// An [`Error::Io`] from a standard error.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// An [`Error::Kvm`] from an ioctl's error.
    pub(crate) fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Kvm { ioctl, errno }
    }

    /// The error of a machine whose backend has this name.
    pub(crate) fn of(self, backend: &'static str) -> MachineError {
        match self {
            Self::Gone | Self::Ended => MachineError::Gone,
            Self::Timeout { what, after } => MachineError::Timeout { what, after },
            Self::NoSuchVcpu(vcpu) => MachineError::NoSuchVcpu(vcpu),
            Self::Memory(source) => MachineError::Memory(source),
            other => MachineError::Backend { backend, source: Box::new(other) },
        }
    }

    /// An [`Error::Answer`] with a bounded excerpt of the answer.
    pub(crate) fn answer(command: impl Into<String>, said: impl AsRef<[u8]>) -> Self {
        Self::Answer { command: command.into(), said: excerpt(said.as_ref()) }
    }
}

/// The first 200 bytes, lossily decoded: answers come from outside and may be long.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.get(..200).unwrap_or(bytes)).trim_end().to_owned()
}

/// QEMU's backend; the other names itself.
impl From<Error> for MachineError {
    fn from(error: Error) -> Self {
        error.of("qemu")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_errors_keep_their_kind() {
        assert!(matches!(MachineError::from(Error::Gone), MachineError::Gone));
        let timeout = Error::Timeout { what: "stop", after: Duration::from_secs(1) };
        assert!(matches!(MachineError::from(timeout), MachineError::Timeout { what: "stop", .. }));
        assert!(matches!(MachineError::from(Error::NoRam), MachineError::Backend { .. }));
    }

    #[test]
    fn excerpts_are_bounded() {
        assert_eq!(excerpt(&[b'x'; 1000]).len(), 200);
        assert_eq!(excerpt(b"no\r\n"), "no");
    }
}
