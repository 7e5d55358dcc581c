//! Takes the bytes of a fuzzer apart. Never fails: what is missing is zero. Knows no parser.

/// Bytes not used yet.
pub(crate) struct Input<'d>(&'d [u8]);

impl<'d> Input<'d> {
    pub(crate) fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    /// The next bytes: as many of `len` as there are.
    pub(crate) fn bytes(&mut self, len: usize) -> &'d [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub(crate) fn u64(&mut self) -> u64 {
        self.bytes(8).iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// Bytes behind a length of 16 bits.
    pub(crate) fn part(&mut self) -> &'d [u8] {
        let len = self.u16();
        self.bytes(usize::from(len))
    }

    pub(crate) fn rest(self) -> &'d [u8] {
        self.0
    }
}
