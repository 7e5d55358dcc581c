//! The lab in a folder: everything that is built for one kernel, so that cases run where nothing can be built, such
//! as a nested host. `DEFIB_LAB_KIT` names the folder there. What is in it is made by the lab as usual.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use super::build;
use super::cache;
use super::drivers;
use super::initramfs;
use super::kernel::Kernel;
use crate::Error;
use crate::Result;

/// The variable that names the folder.
const VARIABLE: &str = "DEFIB_LAB_KIT";
/// Names in it.
const INITRAMFS: &str = "initramfs.cpio";
const DRIVERS: &str = "drivers";

/// The folder, where a kit is in use.
pub(crate) fn in_use() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).map(PathBuf::from)
}

/// The boot image of the kit in use.
pub(crate) fn initramfs() -> Option<PathBuf> {
    Some(in_use()?.join(INITRAMFS))
}

/// The folder of the drivers in the kit in use.
pub(crate) fn driver_folder() -> Option<PathBuf> {
    Some(in_use()?.join(DRIVERS))
}

/// A kit for a kernel, made if the cache does not have it. `layers` holds compiled kernel layers; they come along, so
/// that vmlinux need not: what is in the kit has symbols, no DWARF.
///
/// # Errors
/// [`Error::NoKernel`] without its vmlinux; what goes wrong when its parts are built or copied.
pub fn kit(kernel: &Kernel, layers: &Path) -> Result<PathBuf> {
    let vmlinux = kernel.needed_vmlinux()?;
    let image = initramfs::path(kernel)?;
    let built = drivers::drivers(kernel)?;
    let mut key = cache::Key::default().add("kit 1").add_stat(&vmlinux)?.add_stat(&image)?;
    for driver in &built {
        key = key.add_stat(&driver.with_debug)?;
    }
    let kit =
        cache::folder("kits", &key.name(), |dir| make(kernel, &vmlinux, &image, &built, dir))?;
    // Compiled later than the kit was made, perhaps.
    let into = kit.join("layers");
    fs::create_dir_all(&into).map_err(Error::file("create", &into))?;
    for entry in fs::read_dir(layers).map_err(Error::file("read", layers))?.flatten() {
        copy(&entry.path(), &into.join(entry.file_name()))?;
    }
    Ok(kit)
}

fn make(
    kernel: &Kernel,
    vmlinux: &Path,
    image: &Path,
    built: &[drivers::DriverModule],
    dir: &Path,
) -> Result<()> {
    let here = dir.join("kernels").join(kernel.release());
    for folder in [&here.join("modules"), &dir.join(DRIVERS).join("stripped")] {
        fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    }
    let series = kernel.release().split('.').take(2).collect::<Vec<_>>().join(".");
    let stamp = dir.join("kernels").join(format!("{series}.stamp"));
    fs::write(&stamp, kernel.release()).map_err(Error::file("write", &stamp))?;
    copy(&kernel.vmlinuz(), &here.join("vmlinuz"))?;
    build::run(Command::new("strip").arg("-g").arg(vmlinux).arg("-o").arg(here.join("vmlinux")))?;
    copy(image, &dir.join(INITRAMFS))?;
    for driver in built {
        let file = format!("{}.ko", driver.name);
        copy(&driver.with_debug, &dir.join(DRIVERS).join(&file))?;
        copy(&driver.stripped, &dir.join(DRIVERS).join("stripped").join(&file))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(Error::file("copy", from))
}
