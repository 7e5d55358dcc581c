//! The kernels that `scripts/setup` put into the cache. Only where their files are; what is in them is
//! `repair-image`'s matter.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use super::cache;
use super::kit;
use crate::Error;
use crate::Result;

/// One stock kernel with its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    release: String,
    dir: PathBuf,
}

impl Kernel {
    /// The kernel of a series (`6.1`, `6.12`) that was set up last.
    ///
    /// # Errors
    /// [`Error::NoKernel`] when `scripts/setup` has not put one there.
    pub fn find(series: &str) -> Result<Self> {
        let kernels = kit::in_use().unwrap_or_else(cache::root).join("kernels");
        let stamp = kernels.join(format!("{series}.stamp"));
        let none = || Error::NoKernel { series: series.to_owned(), cache: kernels.clone() };
        let text = fs::read_to_string(stamp).map_err(|_| none())?;
        let release = text.split_whitespace().next().ok_or_else(none)?.to_owned();
        let dir = kernels.join(&release);
        let kernel = Self { release, dir };
        if kernel.vmlinuz().is_file() { Ok(kernel) } else { Err(none()) }
    }

    /// What `uname -r` prints in its guest.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The boot file.
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The file with symbols and DWARF, if it was set up.
    pub fn vmlinux(&self) -> Option<PathBuf> {
        Some(self.dir.join("vmlinux")).filter(|path| path.is_file())
    }

    /// The file with symbols and DWARF, where nothing can be done without.
    ///
    /// # Errors
    /// [`Error::NoKernel`] when it was not set up.
    pub fn needed_vmlinux(&self) -> Result<PathBuf> {
        let (series, cache) = (self.release.clone(), self.dir.clone());
        self.vmlinux().ok_or(Error::NoKernel { series, cache })
    }

    /// The distribution's modules that a lab guest may load, uncompressed.
    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// The headers against which its modules are built: those in the cache, or those that are installed.
    pub fn headers(&self) -> PathBuf {
        let unpacked = self.dir.join("headers");
        if unpacked.is_dir() {
            return unpacked;
        }
        Path::new("/usr/src").join(format!("linux-headers-{}", self.release))
    }
}
