//! A file mapped read-only, the only unsafe code of this crate. What the bytes mean is in `file.rs` and `compile/`.
#![allow(unsafe_code, reason = "memory-mapping a file is unsafe in every crate that offers it")]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::Error;

/// A file mapped read-only.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps the whole file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        // SAFETY: the mapping is private and read-only. Another process could still change the file under
        // it; vmlinux files and knowledge files are written once under a temporary name and renamed into
        // place, never changed afterwards, and every reader of the bytes checks bounds on each access, so
        // changed bytes give wrong answers but no access outside of the mapping. Truncation would raise SIGBUS,
        // as with any mapped executable.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        Ok(Self(map))
    }

    /// Gives back the memory that a range takes in this process, `len` bytes from `offset` on. Whoever reads there
    /// again has it mapped again.
    pub fn forget(&self, offset: usize, len: usize) {
        if offset.checked_add(len).is_none_or(|end| end > self.0.len()) {
            return;
        }
        // SAFETY: `DONTNEED` throws away what was written to private pages. Nothing is ever written to this read-only
        // mapping, so that the pages come back from the file as they were.
        let done = unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len) };
        // Without effect nothing is lost.
        drop(done);
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
