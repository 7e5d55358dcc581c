//! What can go wrong while a VM is built or run. Every text names the file or the ioctl.

use std::path::PathBuf;

use thiserror::Error;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a VM could not be built or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// `/dev/kvm` is missing or not permitted: no VM can run on this host, or not by this user.
    #[error("/dev/kvm: {0}{hint}", hint = kvm_hint(.0))]
    NoKvm(#[source] kvm_ioctls::Error),
    /// An ioctl failed.
    #[error("{ioctl}: {source}")]
    Kvm {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// What the kernel says.
        source: kvm_ioctls::Error,
    },
    /// A file could not be opened, read or bound.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// The kernel's ELF file can't be loaded.
    #[error("{path}: {source}", path = .path.display())]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// What the loader says.
        source: linux_loader::loader::Error,
    },
    /// The kernel has no PVH entry point (ELF note Xen/18): `CONFIG_PVH` is off, or this is a bzImage.
    #[error("{path}: no PVH entry point (CONFIG_PVH); an uncompressed vmlinux is needed", path = .path.display())]
    NotPvh {
        /// Which file.
        path: PathBuf,
    },
    /// Something does not fit into its place in guest memory.
    #[error("{what} does not fit: {size} bytes, room for {room}")]
    DoesNotFit {
        /// What.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Guest RAM can't be had from the host.
    #[error("{mib} MiB of guest RAM: {source}")]
    Ram {
        /// Size asked for.
        mib: u64,
        /// What the host says.
        source: vm_memory::mmap::FromRangesError,
    },
    /// Boot data could not be written to guest memory.
    #[error("{what} in guest memory: {source}")]
    BootData {
        /// What was written.
        what: &'static str,
        /// Why not.
        source: vm_memory::GuestMemoryError,
    },
    /// The number of vCPUs is not one that this VMM can have.
    #[error("{0} vCPUs: from 1 to {max} are possible", max = crate::cpu::MAX_VCPUS)]
    VcpuCount(u8),
    /// A host resource: an event, a thread, a signal handler, the event loop.
    #[error("{what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// The machine can't be given to a guard.
    #[error("guard: {0}")]
    Hooks(#[from] hv_hooks::Error),
    /// A guard can only be had before the vCPUs run.
    #[error("the vCPUs run already")]
    Started,
    /// vCPU threads did not end when they were told to.
    #[error("vCPU {0} did not leave its thread in time")]
    VcpuStuck(usize),
}

impl Error {
    /// For `map_err` on a KVM ioctl.
    pub(crate) fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { ioctl, source }
    }

    /// For `map_err` on something that the host gives.
    pub(crate) fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }

    /// For `map_err` on a file.
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

fn kvm_hint(error: &kvm_ioctls::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT => "; is a KVM module loaded?",
        libc::EACCES | libc::EPERM => "; is this user in group kvm?",
        _ => "",
    }
}
