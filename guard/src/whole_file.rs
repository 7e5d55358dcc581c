//! A file that its readers see whole or not at all. What is in it, and whether it must survive a power cut,
//! is the caller's.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Writes a file beside `path`, then renames it to `path`.
///
/// # Errors
/// When the disk refuses or `write` fails; a former file at `path` is then as it was.
pub fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    write(&mut File::create(&partial)?)?;
    fs::rename(partial, path)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_failed_write_leaves_the_former_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("live.core");
        replace(&path, |file| file.write_all(b"former")).unwrap();
        let failed = replace(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"former");
        replace(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
