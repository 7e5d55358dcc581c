//! A shared mapping of what a file descriptor offers (guest RAM, pages of KVM's): made, undone, and read and written
//! while others do so too. What is in it is not known here.
#![allow(
    unsafe_code,
    reason = "mmap, and access to memory shared with other processes and the kernel"
)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Shared memory.
pub(crate) struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the pointer is only used through atomics and raw copies, which make no references to what it points to.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent copies race as they do with the guest itself, which may write at any time.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` of what `fd` offers.
    pub(crate) fn of(fd: &impl AsRawFd, offset: u64, len: usize) -> Result<Self, Errno> {
        // SAFETY: `fd` is borrowed for this function, so its descriptor stays open meanwhile. The mapping holds the
        // file itself.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing of this process.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                offset,
            )
        };
        Ok(Self { start: start?.cast(), len })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it begins.
    #[cfg(test)]
    pub(crate) fn address(&self) -> guest::HostVirt {
        guest::HostVirt(self.start.addr() as u64)
    }

    /// The address of `size` bytes at `offset`, aligned to `size`. `None` when they are not all inside.
    fn word(&self, offset: usize, size: usize) -> Option<*mut u8> {
        // SAFETY: offset <= len, so the result stays inside the mapping.
        (self.holds(offset, size) && offset.is_multiple_of(size))
            .then(|| unsafe { self.start.add(offset) })
    }

    /// The byte at `offset`.
    pub(crate) fn byte(&self, offset: usize) -> Option<&AtomicU8> {
        // SAFETY: inside the mapping, which lives as long as `self`; this process accesses it by atomics only here,
        // and the kernel and the VMM's own mapping of the page are as other processes to it.
        self.word(offset, 1).map(|at| unsafe { AtomicU8::from_ptr(at) })
    }

    /// The 32-bit word at `offset`, a multiple of 4.
    pub(crate) fn u32(&self, offset: usize) -> Option<&AtomicU32> {
        // SAFETY: as above; mappings begin at a page boundary, so the word is aligned.
        self.word(offset, 4).map(|at| unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// The 64-bit word at `offset`, a multiple of 8.
    pub(crate) fn u64(&self, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: as above.
        self.word(offset, 8).map(|at| unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// Whether `len` bytes at `offset` lie inside.
    fn holds(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Copies out. Aligned words are read in one go, so that a page-table entry is never half old.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        if !self.holds(offset, into.len()) {
            return false;
        }
        // SAFETY: offset + len <= self.len was checked, so the result stays inside the mapping.
        let from = unsafe { self.start.add(offset) };
        match into.len() {
            8 if from.addr() % 8 == 0 => {
                // SAFETY: valid for 8 bytes (checked), aligned (checked), and only accessed atomically or by
                // raw copies.
                let word = unsafe { AtomicU64::from_ptr(from.cast()) }.load(Ordering::Relaxed);
                into.copy_from_slice(&word.to_ne_bytes());
            }
            4 if from.addr() % 4 == 0 => {
                // SAFETY: as above, for 4 bytes.
                let word = unsafe { AtomicU32::from_ptr(from.cast()) }.load(Ordering::Relaxed);
                into.copy_from_slice(&word.to_ne_bytes());
            }
            // SAFETY: `from` is valid for len bytes (checked); `into` is memory of ours, so they don't overlap.
            len => unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), len) },
        }
        true
    }

    /// Copies in, with the same rule for words.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        if !self.holds(offset, bytes.len()) {
            return false;
        }
        // SAFETY: offset + len <= self.len was checked, so the result stays inside the mapping.
        let to = unsafe { self.start.add(offset) };
        match *bytes {
            [a, b, c, d, e, f, g, h] if to.addr() % 8 == 0 => {
                let word = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                // SAFETY: valid for 8 bytes (checked), aligned (checked), and only accessed atomically or by
                // raw copies.
                unsafe { AtomicU64::from_ptr(to.cast()) }.store(word, Ordering::Relaxed);
            }
            [a, b, c, d] if to.addr() % 4 == 0 => {
                let word = u32::from_ne_bytes([a, b, c, d]);
                // SAFETY: as above, for 4 bytes.
                unsafe { AtomicU32::from_ptr(to.cast()) }.store(word, Ordering::Relaxed);
            }
            // SAFETY: `to` is valid for len bytes (checked); `bytes` is memory of ours, so they don't overlap.
            _ => unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) },
        }
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `of` mapped; nothing points into it, `self` is going away. A failure would
        // only leave address space in use.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}
