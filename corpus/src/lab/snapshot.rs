//! A booted guest kept on disk, and guests made from it: QEMU's migration stream without the memory
//! (capability `x-ignore-shared`, QEMU 4.0), the memory as a sparse file, the disk image.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use rustix::fs::SeekFrom;
use serde_json::json;

use super::build;
use super::cache;
use super::initramfs;
use super::qmp::Qmp;
use super::vm::Backend;
use super::vm::Run;
use super::vm::Vm;
use super::vm::VmConfig;
use crate::Error;
use crate::Result;

/// How long saving or loading a VM's state may take.
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
/// How long a restored guest may take to answer.
const WAKE_LIMIT: Duration = Duration::from_secs(30);
/// How many snapshots (100 MB each) stay in the cache however old they are.
const KEPT: usize = 12;
/// Below this age a snapshot stays, whatever their number: it may be in use.
const KEPT_FOR: Duration = Duration::from_secs(6 * 3600);
/// Granularity at which zeroes are left out of copies, in bytes.
const CHUNK: usize = 64 << 10;

/// A saved guest. Any number of VMs may run from it at the same time, each with its own copy of memory
/// and disk; they all have the KASLR base of the one that was saved.
#[derive(Clone, Debug)]
pub struct Snapshot {
    dir: PathBuf,
    config: VmConfig,
}

impl Snapshot {
    /// The snapshot of a freshly booted guest, from the cache, or made now.
    ///
    /// # Errors
    /// As [`Vm::boot`], and [`Error::Qmp`] when QEMU cannot save it.
    pub fn cached(config: &VmConfig) -> Result<Self> {
        let qemu = build::run(Command::new(&config.qemu).arg("--version"))?;
        let key = cache::Key::default()
            .add("snapshot 1")
            .add(qemu)
            .add(format!("{config:?}"))
            .add_stat(&config.kernel.vmlinuz())?
            .add_stat(&initramfs::path(&config.kernel)?)?;
        let make = |dir: &Path| {
            // A new one means that something changed: some of the others are of no use any more.
            cache::prune("snapshots", KEPT, KEPT_FOR)?;
            save(Vm::boot(config)?, dir)
        };
        let dir = cache::folder("snapshots", &key.name(), make)?;
        Ok(Self { dir, config: config.clone() })
    }

    /// Saves a running guest into a folder; the guest ends.
    ///
    /// # Errors
    /// [`Error::Qmp`] when QEMU cannot save it, [`Error::File`] for the folder.
    pub fn take(vm: Vm, dir: &Path) -> Result<Self> {
        let config = vm.config().clone();
        save(vm, dir)?;
        Ok(Self { dir: dir.to_owned(), config })
    }

    /// A new guest that goes on from where the saved one stood.
    ///
    /// # Errors
    /// [`Error::Qmp`] when QEMU does not take the state, [`Error::Timeout`] when the guest does not
    /// answer.
    pub fn restore(&self) -> Result<Vm> {
        let begin = Instant::now();
        let mut vm = self.restore_standing()?;
        vm.go_on()?;
        vm.wait_for_agent(WAKE_LIMIT)?;
        vm.set_took(begin.elapsed());
        Ok(vm)
    }

    /// The same, before its first instruction: what is changed in it now it never knew otherwise.
    /// [`Vm::go_on`] lets it run.
    ///
    /// # Errors
    /// [`Error::Qmp`] when QEMU does not take the state.
    pub fn restore_standing(&self) -> Result<Vm> {
        let run = Run::new()?;
        let files = run.files();
        copy_sparse(&self.dir.join("disk.img"), &files.disk())?;
        if self.config.backend == Backend::SharedFile {
            copy_sparse(&self.dir.join("ram"), &files.ram())?;
        }
        let mut vm = Vm::start(&self.config, run, &["-S", "-incoming", "defer"])?;
        let state = self.dir.join("state");
        let control = vm.control();
        prepare(control, self.config.backend)?;
        let uri = format!("exec:cat {}", quoted(&state));
        control.command("migrate-incoming", json!({ "uri": uri }))?;
        wait_for_migration(control)?;
        Ok(vm)
    }

    /// The snapshot in a folder that [`Snapshot::take`] filled.
    pub(crate) fn in_folder(dir: PathBuf, config: VmConfig) -> Self {
        Self { dir, config }
    }
}

fn save(mut vm: Vm, dir: &Path) -> Result<()> {
    let backend = vm.config().backend;
    let files = vm.files().clone();
    let control = vm.control();
    control.command("stop", json!({}))?;
    prepare(control, backend)?;
    let uri = format!("exec:cat >{}", quoted(&dir.join("state")));
    control.command("migrate", json!({ "uri": uri }))?;
    wait_for_migration(control)?;
    if backend == Backend::SharedFile {
        copy_sparse(&files.ram(), &dir.join("ram"))?;
    }
    copy_sparse(&files.disk(), &dir.join("disk.img"))
}

/// A path as one word of the shell that QEMU's `exec:` starts.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

/// Shared memory stays out of the stream; without sharing the stream has to carry it, at full speed.
fn prepare(control: &mut Qmp, backend: Backend) -> Result<()> {
    let shared = backend == Backend::SharedFile;
    let capability = json!([{ "capability": "x-ignore-shared", "state": shared }]);
    control.command("migrate-set-capabilities", json!({ "capabilities": capability }))?;
    control.command("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
    Ok(())
}

fn wait_for_migration(control: &mut Qmp) -> Result<()> {
    let end = Instant::now() + MIGRATION_LIMIT;
    loop {
        let state = control.command("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let reason = state["error-desc"].as_str().unwrap_or("failed").to_owned();
                return Err(Error::Qmp { command: "migrate".to_owned(), reason });
            }
            _ if Instant::now() > end => {
                return Err(Error::Timeout {
                    what: "the migration's end".to_owned(),
                    limit: MIGRATION_LIMIT,
                    console: state.to_string(),
                });
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Copies a file; what is a hole or zero in it becomes a hole.
fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let source = File::open(from).map_err(Error::file("open", from))?;
    let size = source.metadata().map_err(Error::file("stat", from))?.len();
    let target = File::create(to).map_err(Error::file("create", to))?;
    target.set_len(size).map_err(Error::file("size", to))?;
    let mut buffer = vec![0; 16 * CHUNK];
    let mut at = next_data(&source, 0, size).map_err(Error::file("seek in", from))?;
    while at < size {
        let n = match source.read_at(&mut buffer, at) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(source) => return Err(Error::File { what: "read", path: from.to_owned(), source }),
        };
        for (i, chunk) in buffer[..n].chunks(CHUNK).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                let place = at + (i * CHUNK) as u64;
                target.write_all_at(chunk, place).map_err(Error::file("write", to))?;
            }
        }
        at += n as u64;
        // Only where a whole buffer was empty is it worth asking for the next data: the question
        // costs a walk over the file's pages.
        if buffer[..n].iter().all(|byte| *byte == 0) {
            at = next_data(&source, at, size).map_err(Error::file("seek in", from))?;
        }
    }
    Ok(())
}

/// Where data follows at or after an offset; the file's size when only a hole does.
fn next_data(file: &File, at: u64, size: u64) -> std::io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(offset) => Ok(offset),
        Err(rustix::io::Errno::NXIO) => Ok(size),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn copies_are_equal_and_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&a).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"first", 3).unwrap();
        file.write_all_at(&[0; 1 << 20], 8 << 20).unwrap();
        file.write_all_at(b"second", (40 << 20) + 77).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        copy_sparse(&a, &b).unwrap();
        assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
        let blocks = fs::metadata(&b).unwrap().blocks() * 512;
        assert!(blocks <= 4 * CHUNK as u64, "{blocks}");
    }

    #[test]
    fn paths_survive_the_shell() {
        let odd = Path::new("/tmp/it's $HOME");
        let out = build::run(Command::new("sh").arg("-c").arg(format!("echo {}", quoted(odd))));
        assert_eq!(out.unwrap(), "/tmp/it's $HOME\n");
    }
}
