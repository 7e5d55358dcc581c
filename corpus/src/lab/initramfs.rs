//! The guest's boot image: busybox, the agent, the workload, the kernel's modules and the crash
//! drivers in one cpio archive, kept in the cache under the hash of what it is made from.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use super::build;
use super::cache;
use super::drivers;
use super::kernel::Kernel;
use super::kit;
use crate::Error;
use crate::Result;

const INIT: &str = include_str!("../../guest/init");
const SOURCES: &[(&str, &str)] = &[
    ("agent.h", include_str!("../../guest/agent.h")),
    ("agent.c", include_str!("../../guest/agent.c")),
    ("system.c", include_str!("../../guest/system.c")),
    ("trigger.h", include_str!("../../guest/trigger.h")),
    ("trigger.c", include_str!("../../guest/trigger.c")),
    ("trigger_core.c", include_str!("../../guest/trigger_core.c")),
    ("trigger_text.c", include_str!("../../guest/trigger_text.c")),
    ("trigger_path.c", include_str!("../../guest/trigger_path.c")),
    ("supervise.c", include_str!("../../guest/supervise.c")),
    ("workload.h", include_str!("../../guest/workload.h")),
    ("workload.c", include_str!("../../guest/workload.c")),
];
const AGENT: &[&str] = &[
    "agent.c",
    "system.c",
    "trigger.c",
    "trigger_core.c",
    "trigger_text.c",
    "trigger_path.c",
    "supervise.c",
];
const WORKLOAD: &[&str] = &["workload.c"];

/// Modules in the order of their needs; those built into a kernel are not there as files.
const MODULE_ORDER: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "crc32c_generic",
    "mbcache",
    "jbd2",
    "ext4",
    "virtio_balloon",
    "pvpanic",
    "pvpanic-mmio",
    "pvpanic-pci",
];
const BUSYBOX: &str = "/bin/busybox";
const APPLETS: &[&str] = &[
    "sh",
    "mount",
    "umount",
    "insmod",
    "rmmod",
    "lsmod",
    "ip",
    "sleep",
    "cat",
    "echo",
    "ls",
    "dd",
    "ps",
    "kill",
    "dmesg",
    "sync",
    "poweroff",
    "reboot",
    "head",
    "tail",
    "grep",
    "sed",
    "awk",
    "wc",
    "mknod",
    "mkdir",
    "rm",
    "cp",
    "mv",
    "ln",
    "touch",
    "hostname",
    "uname",
    "id",
    "top",
    "free",
    "vmstat",
    "md5sum",
    "sha256sum",
    "find",
    "xargs",
    "seq",
    "yes",
    "true",
    "false",
    "test",
    "printf",
    "date",
    "timeout",
    "taskset",
    "nc",
    "cut",
    "sort",
    "uniq",
    "stty",
    "env",
];

/// The boot image for a kernel, made if the cache has none of this content.
pub(crate) fn path(kernel: &Kernel) -> Result<PathBuf> {
    if let Some(path) = kit::initramfs() {
        return Ok(path);
    }
    let mut key = cache::Key::default().add("initramfs 1").add(INIT).add(kernel.release());
    for (name, text) in SOURCES {
        key = key.add(name).add(text);
    }
    for name in MODULE_ORDER.iter().chain(APPLETS) {
        key = key.add(name);
    }
    key = key.add_stat(Path::new(BUSYBOX))?.add_stat(&kernel.modules())?;
    for module in drivers::drivers(kernel)? {
        key = key.add_stat(&module.stripped)?;
    }
    let folder = cache::folder("initramfs", &key.name(), |dir| make(kernel, dir))?;
    Ok(folder.join("initramfs.cpio"))
}

/// A file of a boot image.
pub(crate) struct Extra {
    /// Its path from the root.
    pub(crate) path: String,
    /// Its content.
    pub(crate) bytes: Vec<u8>,
    /// Whether it is a program.
    pub(crate) program: bool,
}

/// The boot image with more files in it: the kernel unpacks archives one after the other
/// (init/initramfs.c, unpack_to_rootfs()).
pub(crate) fn extended(kernel: &Kernel, links: &[&str], files: &[Extra]) -> Result<PathBuf> {
    let base = path(kernel)?;
    let mut key = cache::Key::default().add("extended 1").add(base.to_string_lossy().as_bytes());
    key = key.add_stat(&base)?;
    for link in links {
        key = key.add(link);
    }
    for file in files {
        key = key.add(&file.path).add(&file.bytes);
    }
    let folder = cache::folder("initramfs", &key.name(), |dir| {
        let mut more = Cpio::default();
        for applet in links {
            more.link(&format!("bin/{applet}"), "busybox");
        }
        for file in files {
            more.file(&file.path, if file.program { 0o755 } else { 0o644 }, &file.bytes);
        }
        let mut bytes = fs::read(&base).map_err(Error::file("read", &base))?;
        bytes.extend(more.finish());
        let out = dir.join("initramfs.cpio");
        fs::write(&out, bytes).map_err(Error::file("write", &out))
    })?;
    Ok(folder.join("initramfs.cpio"))
}

/// Compiles a program for guests out of one source file.
pub(crate) fn program(name: &str, text: &str) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir().map_err(Error::file("create", Path::new("a folder")))?;
    let source = format!("{name}.c");
    let path = dir.path().join(&source);
    fs::write(&path, text).map_err(Error::file("write", &path))?;
    compile(dir.path(), name, &[&source])
}

fn compile(dir: &Path, program: &str, sources: &[&str]) -> Result<Vec<u8>> {
    let out = dir.join(program);
    build::run(
        Command::new("gcc")
            .current_dir(dir)
            .args(["-static", "-O2", "-Wall", "-Wextra", "-pthread", "-s", "-o", program])
            .args(sources),
    )?;
    fs::read(&out).map_err(Error::file("read", &out))
}

fn make(kernel: &Kernel, dir: &Path) -> Result<()> {
    let sources = tempfile::tempdir().map_err(Error::file("create", Path::new("a folder")))?;
    for (name, text) in SOURCES {
        let path = sources.path().join(name);
        fs::write(&path, text).map_err(Error::file("write", &path))?;
    }
    let mut image = Cpio::default();
    for name in ["bin", "dev", "proc", "sys", "run", "data", "tmp", "modules", "sbin"] {
        image.folder(name);
    }
    // The console before devtmpfs is mounted: init's own messages go there.
    image.console("dev/console");
    image.file("init", 0o755, INIT.as_bytes());
    let busybox = fs::read(BUSYBOX).map_err(Error::file("read", Path::new(BUSYBOX)))?;
    image.file("bin/busybox", 0o755, &busybox);
    for applet in APPLETS {
        image.link(&format!("bin/{applet}"), "busybox");
    }
    image.file("bin/agent", 0o755, &compile(sources.path(), "agent", AGENT)?);
    image.file("bin/workload", 0o755, &compile(sources.path(), "workload", WORKLOAD)?);
    let mut order = String::new();
    for module in MODULE_ORDER {
        let path = kernel.modules().join(format!("{module}.ko"));
        if path.is_file() {
            let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
            image.file(&format!("modules/{module}.ko"), 0o644, &bytes);
            order.push_str(module);
            order.push('\n');
        }
    }
    image.file("modules/order", 0o644, order.as_bytes());
    for driver in drivers::drivers(kernel)? {
        let bytes = fs::read(&driver.stripped).map_err(Error::file("read", &driver.stripped))?;
        image.file(&format!("modules/{}.ko", driver.name), 0o644, &bytes);
    }
    let out = dir.join("initramfs.cpio");
    fs::write(&out, image.finish()).map_err(Error::file("write", &out))
}

/// A cpio archive of the `newc` form (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, (0, 0), content);
    }

    fn link(&mut self, name: &str, target: &str) {
        self.entry(name, 0o120_777, (0, 0), target.as_bytes());
    }

    fn console(&mut self, name: &str) {
        self.entry(name, 0o020_600, (5, 1), &[]);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Stdio;

    use super::*;

    /// The archive is read back by a cpio that is not ours.
    #[test]
    fn cpio_reads_what_was_written() {
        let mut image = Cpio::default();
        image.folder("d");
        image.file("d/f", 0o644, b"12345");
        image.link("d/l", "f");
        let mut child = Command::new("cpio")
            .args(["-itv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&image.finish()).unwrap();
        let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 3, "{out}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" d"), "{out}");
        assert!(lines[1].starts_with("-rw-r--r--") && lines[1].contains(" 5 "), "{out}");
        assert!(lines[2].ends_with("d/l -> f"), "{out}");
    }
}
