//! A KVM host as a lab guest: a stock kernel on QEMU's emulated SVM with nested paging, so that what
//! needs hardware KVM can run where /dev/kvm is missing or only an emulator. Programs and files go in,
//! output and exit status come out; what they do with KVM is theirs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use serde_json::json;
use tempfile::TempDir;

use super::agent::Answer;
use super::build;
use super::cache;
use super::kernel::Kernel;
use super::snapshot::Snapshot;
use super::vm::Vm;
use super::vm::VmConfig;
use crate::Error;
use crate::Result;

/// Memory of the host, in MiB: its guests' memory comes out of this.
const MEMORY_MIB: u64 = 1024;
/// Nested paging needs no fifth level, and each level is walked for each level of the guest's own.
const CPU: &str = "max,+svm,+npt,-la57";
/// KVM's modules, in the order of their needs.
const KVM: &[&str] = &["irqbypass", "kvm", "kvm-amd"];
/// The lab's own module, which must come after KVM's.
const DEBUG_REGISTERS: &str = "nested_dr";
const DEBUG_REGISTERS_SOURCE: &str = include_str!("../../guest/nested_dr.c");
/// Where the files are in the host; the folder in which commands run.
const PLACE: &str = "/w";
/// How long the files' disk and KVM may take to come up.
const SETUP_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks whether a command has ended.
const POLL: Duration = Duration::from_millis(200);
/// How much of a command's output is kept, from its end, in bytes.
const OUTPUT_KEPT: usize = 64 << 10;
/// Bytes of output in one answer of the agent: 16 KiB hold them even if each is escaped as `\xHH`.
const CHUNK: usize = 4000;

/// A file for the host.
#[derive(Clone, Debug)]
pub struct Given {
    /// Its name in the folder in which commands run.
    pub name: String,
    /// The file or folder here. A program (by its permissions) comes with the libraries that it is linked to.
    pub path: PathBuf,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The shell's exit status: 128 and the signal's number for one that was killed.
    pub status: i64,
    /// The last 64 KiB of what it printed, stdout and stderr; control characters are `?`.
    pub output: String,
}

/// A running KVM host. Dropping it ends it.
#[derive(Debug)]
pub struct Nested {
    vm: Vm,
    /// Holds the disk with the files as long as QEMU reads it.
    _files: TempDir,
}

impl Nested {
    /// Restores a host that runs this kernel, hands the files over and loads KVM.
    ///
    /// # Errors
    /// As [`Snapshot::cached`] and [`Snapshot::restore`]; [`Error::File`] for a file, or a KVM module,
    /// that is not there; [`Error::Program`] when the disk or the lab's module cannot be made;
    /// [`Error::Agent`] with the host's words when KVM does not load.
    pub fn start(kernel: &Kernel, given: &[Given]) -> Result<Self> {
        let files = tempfile::tempdir().map_err(Error::file("create", Path::new("a folder")))?;
        let disk = pack(kernel, given, files.path())?;
        let mut vm = Snapshot::cached(&config(kernel))?.restore()?;
        plug(&mut vm, &disk)?;
        let mut nested = Self { vm, _files: files };
        nested.load_kvm()?;
        Ok(nested)
    }

    /// Runs a shell command, one line, in the folder of the files, which is read-only; /run may be
    /// written to.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the output so far, [`Error::HostSilent`] when the host does not answer to the end.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Ended> {
        let end = Instant::now() + limit;
        // In the background, as the agent gives up what takes long; its output must not be the agent's.
        self.shell(&format!(
            "rm -f /run/status; {{ (cd {PLACE} && {{ {command} ; }}) </dev/null >/run/output 2>&1; \
             echo $? >/run/status.new; mv /run/status.new /run/status; }} >/dev/null 2>&1 &"
        ))?;
        let mut silent = false;
        loop {
            // A busy host may be slow to answer: no reason to give up before the time is over.
            match self.shell("cat /run/status 2>/dev/null || true") {
                Ok(found) => {
                    silent = false;
                    if let Ok(status) = found.trim().parse() {
                        return Ok(Ended { status, output: self.output()? });
                    }
                }
                Err(Error::Timeout { .. }) if Instant::now() < end => silent = true,
                Err(Error::Timeout { .. }) if silent => {
                    return Err(Error::HostSilent { limit, console: self.vm.console_end() });
                }
                Err(error) => return Err(error),
            }
            if Instant::now() > end {
                let what = format!("the end of {command}");
                return Err(Error::Timeout { what, limit, console: self.output()? });
            }
            thread::sleep(POLL);
        }
    }

    /// The end of what the command has printed so far.
    fn output(&mut self) -> Result<String> {
        self.shell(&format!("tail -c {OUTPUT_KEPT} /run/output >/run/end"))?;
        let mut output = String::new();
        for chunk in 0..=OUTPUT_KEPT / CHUNK {
            let dd = format!("dd if=/run/end bs={CHUNK} skip={chunk} count=1 2>/dev/null");
            let text = self.shell(&dd)?;
            if text.is_empty() {
                break;
            }
            output.push_str(&text);
        }
        Ok(output)
    }

    fn load_kvm(&mut self) -> Result<()> {
        let names = KVM.iter().chain([&DEBUG_REGISTERS]).copied().collect::<Vec<_>>().join(" ");
        // The disk appears when the host's kernel has served the hot-plug event.
        let wait =
            "i=0; while ! [ -b /dev/vdb ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.05; done";
        let mount = format!("mkdir -p {PLACE} && mount -t ext4 -o ro /dev/vdb {PLACE}");
        let libraries = format!("ln -s {PLACE}/lib /lib && ln -s {PLACE}/lib /lib64");
        let load = format!("for m in {names}; do insmod {PLACE}/.kvm/$m.ko || exit 1; done");
        for step in [wait, &mount, &libraries, &load, "[ -c /dev/kvm ]"] {
            self.shell(step)?;
        }
        Ok(())
    }

    /// Runs a short command by the agent; its output, if it succeeded.
    fn shell(&mut self, command: &str) -> Result<String> {
        let answer: Answer =
            self.vm.agent().command_within(&format!("exec {command}"), SETUP_LIMIT)?;
        let text = answer.unescaped();
        match (answer.number("status")?, text.split_once("output=")) {
            (0, Some((_, output))) => Ok(output.to_owned()),
            _ => Err(Error::Agent { command: command.to_owned(), reason: text }),
        }
    }
}

/// The lab guest that is to be a KVM host. One vCPU: TCG is slower with more, on a machine of few cores.
fn config(kernel: &Kernel) -> VmConfig {
    VmConfig {
        memory_mib: MEMORY_MIB,
        vcpus: 1,
        cpu: Some(CPU.to_owned()),
        kernel_args: "mitigations=off".to_owned(),
        edu: false,
        disk_mib: 16,
        ..VmConfig::new(kernel.clone())
    }
}

/// Adds the disk with the files to a running host: it is no part of the snapshot, which is made once.
fn plug(vm: &mut Vm, disk: &Path) -> Result<()> {
    let file = json!({ "driver": "file", "filename": disk, "read-only": true });
    let node = json!({ "node-name": "files", "driver": "raw", "read-only": true, "file": file });
    vm.control().command("blockdev-add", node)?;
    let device = json!({ "driver": "virtio-blk-pci", "drive": "files", "id": "files" });
    vm.control().command("device_add", device)?;
    Ok(())
}

/// Makes the disk: the files, the libraries of the programs, KVM's modules.
fn pack(kernel: &Kernel, given: &[Given], dir: &Path) -> Result<PathBuf> {
    let staged = dir.join("files");
    for folder in ["lib", ".kvm"] {
        let path = staged.join(folder);
        fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
    }
    for file in given {
        stage(&file.path, &staged.join(&file.name))?;
        if file.path.is_dir() {
            continue;
        }
        for library in libraries(&file.path)? {
            let name = library.file_name().unwrap_or_default();
            stage(&library, &staged.join("lib").join(name))?;
        }
    }
    for module in KVM {
        let file = format!("{module}.ko");
        stage(&kernel.modules().join(&file), &staged.join(".kvm").join(&file))?;
    }
    let own = format!("{DEBUG_REGISTERS}.ko");
    stage(&debug_registers(kernel)?, &staged.join(".kvm").join(&own))?;
    let disk = dir.join("disk.img");
    make_disk(&staged, &disk)?;
    // What is on the disk is not needed twice.
    fs::remove_dir_all(&staged).map_err(Error::file("remove", &staged))?;
    Ok(disk)
}

/// Puts a file into the folder that becomes the disk: as a second name of it, or a copy where it is on
/// another file system.
fn stage(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    if from.is_dir() {
        fs::create_dir(to).map_err(Error::file("create", to))?;
        for entry in fs::read_dir(from).map_err(Error::file("read", from))?.flatten() {
            stage(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    // A link's own path is of no use in the host.
    let from = fs::canonicalize(from).map_err(Error::file("find", from))?;
    match fs::hard_link(&from, to) {
        Ok(()) => Ok(()),
        Err(_) => fs::copy(&from, to).map(drop).map_err(Error::file("copy", &from)),
    }
}

/// What the loader would map for a program: none for a file that is no program, or a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let meta = fs::metadata(program).map_err(Error::file("stat", program))?;
    if meta.permissions().mode() & 0o111 == 0 {
        return Ok(Vec::new());
    }
    match build::run(Command::new("ldd").arg(program)) {
        Ok(listed) => Ok(paths(&listed)),
        // ldd's way of saying that there are none.
        Err(Error::Program { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The paths in ldd's listing: `name => /path (0xaddress)` or `/path (0xaddress)`.
fn paths(listed: &str) -> Vec<PathBuf> {
    listed
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

fn make_disk(content: &Path, disk: &Path) -> Result<()> {
    let listed = build::run(Command::new("du").args(["-sk", "--apparent-size"]).arg(content))?;
    let kib: u64 = listed.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
    // ext4's own tables take a few per cent; what stays empty is a hole.
    let size = format!("{}K", kib + kib / 8 + (16 << 10));
    build::run(
        Command::new("/sbin/mkfs.ext4")
            .args(["-q", "-F", "-O", "^has_journal", "-m", "0", "-d"])
            .args([content, disk])
            .arg(size),
    )?;
    Ok(())
}

/// The lab's module for a kernel, built against its headers if the cache does not have it.
fn debug_registers(kernel: &Kernel) -> Result<PathBuf> {
    let key = cache::Key::default()
        .add(DEBUG_REGISTERS_SOURCE)
        .add(kernel.release())
        .add_stat(&kernel.headers().join("Module.symvers"))?;
    let object = format!("{DEBUG_REGISTERS}.ko");
    let folder = cache::folder("nested", &key.name(), |dir| {
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(Error::file("write", &path))
        };
        write(&format!("{DEBUG_REGISTERS}.c"), DEBUG_REGISTERS_SOURCE)?;
        write("Makefile", &format!("obj-m := {DEBUG_REGISTERS}.o\n"))?;
        build::modules(kernel, dir)?;
        build::run(Command::new("strip").arg("-g").arg(dir.join(&object))).map(drop)
    })?;
    Ok(folder.join(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_libraries_are_found() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x7f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let expected = ["/lib/x/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(paths(listed), expected);
    }

    #[test]
    fn only_programs_bring_libraries() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        fs::write(&text, "no program").unwrap();
        assert_eq!(libraries(&text).unwrap(), Vec::<PathBuf>::new());
        assert!(!libraries(Path::new("/bin/ls")).unwrap().is_empty());
    }
}
