//! The crash drivers as modules of one kernel: built from the sources in `drivers/` against the
//! distribution's headers, kept in the cache under the hash of sources and kernel.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use super::build;
use super::cache;
use super::kernel::Kernel;
use super::kit;
use crate::Error;
use crate::Result;

/// A driver's source file with its text, as it is compiled.
struct Source {
    /// The file's name.
    file: &'static str,
    /// Its text.
    text: &'static str,
}

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        &[$(Source { file: $file, text: include_str!(concat!("../../drivers/", $file)) }),*]
    };
}

/// Everything the drivers are built from.
const SOURCES: &[Source] = sources![
    "Makefile",
    "crash.h",
    "crash_arm.h",
    "crash_chardev.c",
    "crash_hang.c",
    "crash_disk.c",
    "crash_load.c",
    "crash_locks.c",
    "crash_timer.c",
    "crash_work.c",
    "crash_irq.c",
    "crash_core.c",
    "crash_class.c",
    "crash_callback.c",
    "crash_proc.c",
    "crash_fops.c",
    "crash_async.c",
    "crash_net.c",
    "crash_init.c",
    "crash_bind.c",
    "crash_fs.c",
    "crash_text.c",
    "crash_block.c",
    "crash_cpu.c",
];

/// One driver, built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverModule {
    /// The module's name, which is its device's name too.
    pub name: String,
    /// The file with DWARF: for the debugger's side.
    pub with_debug: PathBuf,
    /// The file as a distribution would ship it: this one is loaded.
    pub stripped: PathBuf,
}

/// The names of all drivers: one for each C file.
fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().filter_map(|source| source.file.strip_suffix(".c"))
}

/// The text of a driver's source file, as it is compiled.
pub fn driver_source(file: &str) -> Option<&'static str> {
    SOURCES.iter().find(|source| source.file == file).map(|source| source.text)
}

/// All drivers for a kernel, built if the cache does not have them.
///
/// # Errors
/// [`Error::Program`] with the compiler's messages; [`Error::File`] for the cache.
pub fn drivers(kernel: &Kernel) -> Result<Vec<DriverModule>> {
    if let Some(folder) = kit::driver_folder() {
        return Ok(in_folder(&folder));
    }
    let mut key = cache::Key::default().add("drivers 1").add(kernel.release());
    for source in SOURCES {
        key = key.add(source.file).add(source.text);
    }
    key = key.add_stat(&kernel.headers().join("Module.symvers"))?;
    let name = format!("{}-{}", kernel.release(), key.name());
    let folder = cache::folder("drivers", &name, |dir| make(kernel, dir))?;
    Ok(in_folder(&folder))
}

fn in_folder(folder: &Path) -> Vec<DriverModule> {
    names()
        .map(|name| DriverModule {
            name: name.to_owned(),
            with_debug: folder.join(format!("{name}.ko")),
            stripped: folder.join("stripped").join(format!("{name}.ko")),
        })
        .collect()
}

fn make(kernel: &Kernel, dir: &Path) -> Result<()> {
    for source in SOURCES {
        let path = dir.join(source.file);
        fs::write(&path, source.text).map_err(Error::file("write", &path))?;
    }
    build::modules(kernel, dir)?;
    let stripped = dir.join("stripped");
    fs::create_dir(&stripped).map_err(Error::file("create", &stripped))?;
    for name in names() {
        let file = format!("{name}.ko");
        build::run(
            Command::new("strip")
                .arg("-g")
                .arg(dir.join(&file))
                .arg("-o")
                .arg(stripped.join(&file)),
        )?;
    }
    Ok(())
}
