//! Reading a stream front to back: numbers in network order, names behind their lengths. Knows nothing of what they
//! mean.

use crate::dump::storage::{Bytes, Storage};

/// What is read of a file before its memory is given back: pages are passed over, but the headers between them bring
/// nearly all of a mapped file in.
const KEPT: u64 = 4 << 20;

/// Why reading a stream ends before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The file ends.
    Cut,
    /// What is there can't be.
    Broken {
        /// Offset in the file.
        at: u64,
    },
    /// A section whose length nothing tells.
    Unknown {
        /// Its name.
        name: String,
    },
}

/// A place in a stream.
pub(super) struct Cursor<'a, B> {
    storage: &'a Storage<B>,
    at: u64,
    /// What was read before this is given back.
    forgotten: u64,
}

impl<B: Bytes> Cursor<'_, B> {
    /// Gives memory of what has been read back, now and then.
    pub(super) fn forget(&mut self) {
        if self.at - self.forgotten >= KEPT {
            self.storage.forget(self.forgotten, self.at);
            self.forgotten = self.at;
        }
    }
}

impl<'a, B: AsRef<[u8]>> Cursor<'a, B> {
    pub(super) fn new(storage: &'a Storage<B>, at: u64) -> Self {
        Self { storage, at, forgotten: at }
    }

    /// Offset in the file.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Goes on behind so many bytes, all of which must be there.
    pub(super) fn skip(&mut self, len: u64) -> Result<(), Stop> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.storage.len());
        self.at = end.ok_or(Stop::Cut)?;
        Ok(())
    }

    /// The next bytes, which stay.
    pub(super) fn peek<const N: usize>(&self) -> Option<[u8; N]> {
        self.storage.array(self.at)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let bytes = self.peek().ok_or(Stop::Cut)?;
        self.skip(N as u64)?;
        Ok(bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Stop> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stop> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text of at most so many bytes.
    pub(super) fn text(&mut self, len: u64) -> Result<String, Stop> {
        let at = self.at;
        self.skip(len)?;
        let bytes = self.storage.bytes(at, len).ok_or(Stop::Cut)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A text behind one byte with its length.
    pub(super) fn name(&mut self) -> Result<String, Stop> {
        let len = self.u8()?;
        self.text(len.into())
    }
}
