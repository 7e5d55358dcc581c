//! The guest's data disk: an ext4 image made and checked on the host.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::build;
use crate::Error;
use crate::Result;

/// Makes a sparse image with an empty ext4.
pub(crate) fn create(image: &Path, mib: u64) -> Result<()> {
    let file = File::create(image).map_err(Error::file("create", image))?;
    file.set_len(mib << 20).map_err(Error::file("size", image))?;
    // The same journal and checksums as a Debian installation; only the lazy background
    // initialisation is off, so that an idle guest is idle.
    build::run(
        Command::new("/sbin/mkfs.ext4")
            .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(image),
    )?;
    Ok(())
}

/// Checks an image that is no longer written; an error carries what e2fsck found.
pub(crate) fn check(image: &Path) -> Result<()> {
    build::run(Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(image)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::io::SeekFrom;
    use std::io::Write;

    use super::*;

    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        create(&image, 16).unwrap();
        check(&image).unwrap();
        let mut file = File::options().write(true).open(&image).unwrap();
        // Block 1 holds the group descriptors (1 KiB blocks at this size: block 2).
        file.seek(SeekFrom::Start(2048)).unwrap();
        file.write_all(&[0x55; 64]).unwrap();
        assert!(matches!(check(&image), Err(Error::Program { .. })));
    }
}
