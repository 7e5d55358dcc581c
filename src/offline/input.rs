//! One file that a crash has left behind, told by its content: a dump in any known format, or a console log.

use std::path::Path;

use anyhow::{Result, bail};
use diagnose::vmcore::{self, Vmcore};
use repair_image::MappedFile;

/// Bytes that decide whether a file is text.
const LOOKED_AT: usize = 64 << 10;
/// Of these, at most one in so many may be neither text nor a control character that terminals know: serial lines
/// lose and invent some.
const ODD_ONE_IN: usize = 20;

/// An opened file.
pub enum Input {
    /// Memory and registers.
    Dump(Box<Vmcore>),
    /// Lines of a console.
    Log(MappedFile),
}

impl Input {
    /// Opens a file.
    ///
    /// # Errors
    /// When it can't be read, is a damaged dump, or is neither a dump nor text.
    pub fn open(path: &Path) -> Result<Self> {
        let file = std::fs::metadata(path)?;
        if !file.is_file() {
            bail!("it is no file");
        }
        if file.len() == 0 {
            bail!("it is empty");
        }
        match Vmcore::parse(MappedFile::open(path)?) {
            Ok(dump) => Ok(Self::Dump(Box::new(dump))),
            Err(error @ vmcore::Error::UnknownFormat { .. }) => {
                let log = MappedFile::open(path)?;
                if !is_text(log.as_ref()) {
                    bail!("{error}, and it is no text");
                }
                Ok(Self::Log(log))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn is_text(bytes: &[u8]) -> bool {
    let start = bytes.get(..LOOKED_AT).unwrap_or(bytes);
    // Escape begins a colour; bytes above 0x7f are UTF-8 or what a line made of it.
    let odd = |byte: &&u8| matches!(byte, 0..=6 | 14..=26 | 28..=31 | 127);
    start.iter().filter(odd).count() * ODD_ONE_IN <= start.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_may_be_noisy_but_not_binary() {
        assert!(is_text(b"[    1.0] \x1b[31mBUG\x1b[0m: bad\x00 page\r\n and so on and on"));
        assert!(!is_text(&[0, 1, 2, 3, b'a', b'b', b'c']));
    }

    #[test]
    fn a_file_is_told_by_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("input");
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Input::open(&path)
        };
        assert!(matches!(open(b"[    1.0] Kernel panic - not syncing: x\n"), Ok(Input::Log(_))));
        assert!(open(b"").is_err());
        assert!(open(b"\x7fELF\x02\x01\x01 and no more").is_err());
        assert!(open(&[7, 3, 200, 1, 5, 0, 0]).is_err());
        assert!(Input::open(folder.path()).is_err());
    }
}
