//! The tiny guest: a kernel of our own (`tiny-guest/`) that has of Linux only what defib takes for granted, boots in a
//! fraction of a second, even where KVM emulates every instruction, and crashes on demand. Built here, with the list of its
//! cases; running it in QEMU is in `tiny/qemu.rs`.
//!
//! On its serial port it prints `ready` when its tasks compute, `case NAME: write returned N`, and at the end
//! `checksum ok` or `checksum BAD`; then it writes one of [`Exit`]'s codes to port 0xf4. With `wait=1` on its command line
//! it crashes only after a byte came in on the serial port: time for a guard to come.
//!
//! ```no_run
//! use defib_corpus::tiny::{CASES, Running, Tiny};
//!
//! # fn main() -> Result<(), defib_corpus::Error> {
//! let tiny = Tiny::build()?;
//! let mut guest = Running::start(&tiny, &CASES[0])?;
//! guest.crash()?; // nobody guards it: it panics
//! # Ok(())
//! # }
//! ```

mod qemu;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use self::qemu::Running;
use crate::lab::{build, cache};
use crate::scenario::{Class, Context, Resource, Rung};
use crate::{Error, Result};

/// A source file with its text, as it is compiled.
type Source = (&'static str, &'static str);

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        &[$(($file, include_str!(concat!("../tiny-guest/", $file)))),*]
    };
}

/// Everything the guest is built from.
const SOURCES: &[Source] = sources![
    "linux.h", "map.h", "tiny.h", "tiny.lds", "boot.S", "print.c", "trap.c", "irq.c", "sched.c",
    "module.c", "main.c", "driver.c",
];
/// Object files of the kernel, in the order in which they lie in memory.
const OBJECTS: &[&str] = &["boot.o", "print.o", "trap.o", "irq.o", "sched.o", "module.o", "main.o"];
/// The driver's source.
const DRIVER: &str = "driver.c";
/// The module's name.
pub const MODULE: &str = "tiny_driver";

/// For kernel and driver: a kernel's code model, no vector registers (no KVM emulates them), and call-frame information in
/// `.debug_frame`, as Linux has it, since only assembly has ORC rows. Jump tables and sibling calls would be legal.
const FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O2",
    "-gdwarf-5",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    "-ffreestanding",
    "-nostdinc",
    "-fno-builtin",
    "-fno-pic",
    "-fno-pie",
    "-fno-common",
    "-fno-strict-aliasing",
    "-fno-delete-null-pointer-checks",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-optimize-sibling-calls",
    "-fno-jump-tables",
    "-fcf-protection=none",
    "-mcmodel=kernel",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-mpreferred-stack-boundary=3",
];
/// For the driver: each function begins with the 5-byte no-operation that a quarantine replaces.
const PATCHABLE: &[&str] = &["-pg", "-mfentry", "-mnop-mcount"];

/// The guest, built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiny {
    /// The kernel: ELF with a PVH entry, symbols, DWARF, BTF and ORC. Booted, and a debugger's `--vmlinux`.
    pub kernel: PathBuf,
    /// The driver without debug information: the guest's first boot module (`-initrd`).
    pub driver: PathBuf,
    /// The folder with the driver's debug information: a debugger's `--debug-dir`.
    pub debug_dir: PathBuf,
}

impl Tiny {
    /// The guest, built if the cache does not have it. Needs gcc, binutils and pahole (package `dwarves`).
    ///
    /// # Errors
    /// [`Error::Start`] when a tool is missing; [`Error::Program`] with a tool's messages; [`Error::File`] for the cache.
    pub fn build() -> Result<Self> {
        let mut key = cache::Key::default().add("tiny 1");
        for (file, text) in SOURCES {
            key = key.add(file).add(text);
        }
        for flag in FLAGS.iter().chain(PATCHABLE) {
            key = key.add(flag);
        }
        let folder = cache::folder("tiny", &key.name(), make)?;
        Ok(Self {
            kernel: folder.join("tiny.elf"),
            driver: folder.join("driver.ko"),
            debug_dir: folder.join("debug"),
        })
    }
}

/// Builds everything in `dir`.
fn make(dir: &Path) -> Result<()> {
    for (file, text) in SOURCES {
        let path = dir.join(file);
        fs::write(&path, text).map_err(Error::file("write", &path))?;
    }
    for object in OBJECTS {
        let c = format!("{}.c", object.trim_end_matches(".o"));
        let is_c = SOURCES.iter().any(|(file, _)| *file == c);
        let source = if is_c { c } else { c.replace(".c", ".S") };
        compile(dir, &source, if is_c { FLAGS } else { &["-gdwarf-5"] }, &[])?;
    }
    let link = ["-nostdlib", "-static", "--build-id=sha1", "--no-warn-rwx-segments"];
    let page = ["-z", "max-page-size=4096", "-T", "tiny.lds", "-o", "tiny.elf"];
    tool(dir, "ld", &[&link[..], &page, OBJECTS].concat())?;
    tool(dir, "pahole", &["-J", "tiny.elf"])?;
    compile(dir, DRIVER, FLAGS, PATCHABLE)?;
    let debug = dir.join("debug");
    fs::create_dir(&debug).map_err(Error::file("create", &debug))?;
    let with_debug = format!("debug/{MODULE}.ko");
    tool(dir, "ld", &["-r", "--build-id=sha1", "-o", &with_debug, "driver.o"])?;
    tool(dir, "strip", &["-g", &with_debug, "-o", "driver.ko"])
}

/// Compiles one file to an object beside it. Paths in debug information do not tell where the cache is.
fn compile(dir: &Path, source: &str, flags: &[&str], more: &[&str]) -> Result<()> {
    let map = format!("-ffile-prefix-map={}=/tiny-guest", dir.display());
    tool(dir, "gcc", &[flags, more, &[&map, "-c", source][..]].concat())
}

fn tool(dir: &Path, program: &str, arguments: &[&str]) -> Result<()> {
    build::run(Command::new(program).args(arguments).current_dir(dir)).map(drop)
}

/// How the guest ended: the code that it writes to port 0xf4. QEMU's `isa-debug-exit` makes `2 * code + 1` of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// Everything was computed, nothing lost.
    ChecksumOk,
    /// A step of a task was lost or done twice.
    ChecksumBad,
    /// A task or the driver did not go on.
    Stuck,
    /// `panic()` came to its end.
    Panic,
}

impl Exit {
    /// What a code means; `None` for one that the guest does not write.
    #[must_use]
    pub fn of_code(code: u8) -> Option<Self> {
        let all = [Self::ChecksumOk, Self::ChecksumBad, Self::Stuck, Self::Panic];
        all.get(usize::from(code)).copied()
    }
}

/// One crash of the tiny guest: what triggers it and what is expected of diagnosis and repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// The case's name: `case=` on the command line, and the text that is written to the device.
    pub name: &'static str,
    /// What the diagnosis must call it.
    pub class: Class,
    /// Where it happens. Tasks of this guest are kernel threads: it has no user mode.
    pub context: Context,
    /// The driver's function at fault.
    pub function: &'static str,
    /// The kernel's function that an error is returned to.
    pub boundary: &'static str,
    /// What the abandoned frames hold, outermost first.
    pub held: &'static [Resource],
    /// The rung that repairs it.
    pub rung: Rung,
    /// What the write that triggers it returns after the repair: -EIO where it crashes in it.
    pub write_returns: i64,
}

impl Case {
    /// The kernel's command line. With `wait`, it crashes after a byte came in on the serial port.
    #[must_use]
    pub fn command_line(&self, wait: bool) -> String {
        format!("{}case={}", if wait { "wait=1 " } else { "" }, self.name)
    }

    /// The line of `driver.c` at fault, from 1: the one marked `crash: NAME`.
    ///
    /// # Errors
    /// [`Error::Marker`] when the source does not mark it exactly once.
    pub fn line(&self) -> Result<usize> {
        let text = SOURCES.iter().find(|(file, _)| *file == DRIVER).map_or("", |(_, text)| text);
        let marker = format!("/* crash: {} */", self.name);
        let mut lines = (1..).zip(text.lines()).filter(|(_, line)| line.contains(&marker));
        match (lines.next(), lines.count()) {
            (Some((number, _)), 0) => Ok(number),
            (found, more) => {
                let count = usize::from(found.is_some()) + more;
                Err(Error::Marker { driver: MODULE.into(), case: self.name.into(), count })
            }
        }
    }

    /// A crash inside the write that triggers it.
    const fn in_write(
        name: &'static str,
        class: Class,
        function: &'static str,
        held: &'static [Resource],
    ) -> Self {
        let (context, boundary) = (Context::KernelThread, "vfs_write");
        let rung = Rung::ReturnError;
        Self { name, class, context, function, boundary, held, rung, write_returns: -5 }
    }

    /// A null dereference that a write only sets off: it happens elsewhere, and the write succeeds.
    const fn elsewhere(
        name: &'static str,
        context: Context,
        function: &'static str,
        boundary: &'static str,
        held: &'static [Resource],
    ) -> Self {
        let (class, rung) = (Class::NullDereference, Rung::ReturnError);
        let write_returns = name.len() as i64;
        Self { name, class, context, function, boundary, held, rung, write_returns }
    }
}

/// All cases. `case=none` is none: nothing crashes.
pub const CASES: &[Case] = &[
    Case::in_write("null-mutex", Class::NullDereference, "null_mutex", &[Resource::Mutex]),
    Case::in_write(
        "null-spinlock",
        Class::NullDereference,
        "null_spinlock",
        &[Resource::SpinlockIrqsave],
    ),
    Case::in_write("bug", Class::Bug, "bug", &[]),
    Case::in_write("divide", Class::Divide, "divide", &[]),
    Case::in_write("wild", Class::WildDereference, "wild", &[]),
    Case::in_write("non-canonical", Class::GeneralProtection, "non_canonical", &[]),
    Case::in_write("null-call", Class::NullCall, "null_call", &[]),
    Case::in_write("stack-overflow", Class::StackOverflow, "stack_overflow", &[Resource::Mutex]),
    Case::in_write("panic", Class::Panic, "panics", &[Resource::Mutex]),
    Case::elsewhere(
        "null-timer",
        Context::Softirq,
        "on_timer",
        "call_timer_fn",
        &[Resource::Spinlock],
    ),
    Case::elsewhere("null-irq", Context::Hardirq, "on_interrupt", "__handle_irq_event_percpu", &[]),
    Case::elsewhere("null-work", Context::Work, "on_work", "process_one_work", &[Resource::Mutex]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_its_line_in_the_driver() {
        for case in CASES {
            assert!(case.line().unwrap() > 1, "{}", case.name);
            let driver = SOURCES.last().unwrap().1;
            assert!(driver.contains(&format!("{{ \"{}\", ", case.name)), "{}", case.name);
        }
    }

    #[test]
    fn the_contract_names_every_way_into_the_driver() {
        let text = SOURCES.first().unwrap().1;
        for case in CASES {
            assert!(text.contains(&format!(" {}(", case.boundary)), "{}", case.boundary);
        }
    }

    #[test]
    fn codes_are_those_of_the_guest() {
        let text = SOURCES.iter().find(|(file, _)| *file == "tiny.h").unwrap().1;
        assert!(text.contains("enum { EXIT_OK, EXIT_BAD, EXIT_STUCK, EXIT_PANIC }"));
        assert_eq!(Exit::of_code(3), Some(Exit::Panic));
        assert_eq!(Exit::of_code(4), None);
    }

    #[test]
    fn unguarded_every_case_ends_in_panic() {
        let tiny = Tiny::build().unwrap();
        for case in CASES {
            let mut guest = Running::start(&tiny, case).unwrap();
            guest.crash().unwrap();
            assert_eq!(guest.wait().unwrap(), Some(Exit::Panic), "{}", guest.serial());
            assert!(guest.serial().contains("Kernel panic"), "{}", guest.serial());
        }
    }

    #[test]
    fn without_a_crash_nothing_is_lost() {
        let none = Case { name: "none", ..CASES[0] };
        let mut guest = Running::start(&Tiny::build().unwrap(), &none).unwrap();
        guest.crash().unwrap();
        assert_eq!(guest.wait().unwrap(), Some(Exit::ChecksumOk), "{}", guest.serial());
        assert!(guest.serial().contains("2 CPUs"), "{}", guest.serial());
    }
}
