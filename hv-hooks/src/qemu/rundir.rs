//! Where a guard keeps what lives as long as it does: the lock on a VM and the socket of the gdb stub it
//! switched on. The path is a function of the QEMU process, so the next guard finds what a killed one left.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::process::Process;
use crate::Error;

/// The folder of one VM, locked.
pub(crate) struct RunDir {
    path: PathBuf,
    lock_path: PathBuf,
    /// Held by `flock` while it is open: the kernel lets go when a guard is killed.
    _lock: File,
}

/// `/run/defib` for root, else below the user's runtime folder or in `/tmp`.
fn base() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/defib");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) => PathBuf::from(dir).join("defib"),
        None => PathBuf::from(format!("/tmp/defib-{}", rustix::process::geteuid().as_raw())),
    }
}

impl RunDir {
    /// Locks a VM. QEMU runs as user `uid` and must be able to make a socket in the folder.
    pub(crate) fn lock(process: Process, uid: u32) -> Result<Self, Error> {
        Self::lock_below(&base(), process, uid)
    }

    fn lock_below(base: &Path, process: Process, uid: u32) -> Result<Self, Error> {
        make_dir(base, 0o711)?;
        let name = format!("qemu-{}-{}", process.pid, process.started);
        let lock_path = base.join(format!("{name}.lock"));
        let lock = take_lock(&lock_path)?;
        let lock = lock
            .ok_or_else(|| Error::AlreadyGuarded { pid: process.pid, lock: lock_path.clone() })?;
        let path = base.join(name);
        make_dir(&path, 0o700)?;
        if uid != rustix::process::geteuid().as_raw() {
            std::os::unix::fs::chown(&path, Some(uid), None)
                .map_err(Error::io("giving QEMU's user the folder of its gdb socket"))?;
        }
        Ok(Self { path, lock_path, _lock: lock })
    }

    /// Where the gdb stub that this crate switches on listens.
    pub(crate) fn gdb_socket(&self) -> PathBuf {
        self.path.join("gdb.sock")
    }
}

impl Drop for RunDir {
    /// Nothing to be done about failures: an empty folder stays.
    fn drop(&mut self) {
        let _ = fs::remove_file(self.gdb_socket());
        let _ = fs::remove_dir(&self.path);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Opens and locks a file; `None` when it is locked. A file that was removed between the two (by the guard that
/// held it) locks nobody out, so the lock only counts when the path still leads to it.
fn take_lock(path: &Path) -> Result<Option<File>, Error> {
    let failed = Error::io("locking the VM");
    for _ in 0..16 {
        let opened =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) => return Err(failed(error)),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(Error::os("locking the VM")(errno)),
        }
        let same = |meta: fs::Metadata| file.metadata().is_ok_and(|ours| ours.ino() == meta.ino());
        if fs::metadata(path).is_ok_and(same) {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// Makes a folder, or takes one that is ours already.
fn make_dir(path: &Path, mode: u32) -> Result<(), Error> {
    let what = "making a folder for the lock and the gdb socket";
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io(what)(error)),
    }
    // Not through a symbolic link, and not a folder that somebody else made in a public place.
    let meta = fs::symlink_metadata(path).map_err(Error::io(what))?;
    let me = rustix::process::geteuid().as_raw();
    if !meta.is_dir() || (meta.uid() != me && me != 0) {
        let source = io::Error::new(io::ErrorKind::PermissionDenied, path.display().to_string());
        return Err(Error::Io { what, source });
    }
    // The mode given above is cut by the umask.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_and_nothing_stays() {
        let base = tempfile::tempdir().unwrap();
        let process = Process { pid: 7, started: 99 };
        let me = rustix::process::geteuid().as_raw();
        let held = RunDir::lock_below(base.path(), process, me).unwrap();
        assert_eq!(held.gdb_socket(), base.path().join("qemu-7-99/gdb.sock"));
        let again = RunDir::lock_below(base.path(), process, me);
        assert!(matches!(again, Err(Error::AlreadyGuarded { pid: 7, .. })));
        drop(held);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
        assert!(RunDir::lock_below(base.path(), process, me).is_ok());
    }

    #[test]
    fn links_are_not_followed() {
        let base = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", base.path().join("link")).unwrap();
        assert!(make_dir(&base.path().join("link"), 0o700).is_err());
    }
}
