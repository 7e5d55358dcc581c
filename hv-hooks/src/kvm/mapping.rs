//! A shared mapping of pages that a file descriptor of KVM's offers: made, undone, and its words read and written
//! atomically. What the words mean is not known here.
#![allow(unsafe_code, reason = "mmap, and access to memory shared with the host's kernel")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use rustix::mm::{MapFlags, ProtFlags};

use crate::Error;

/// Pages shared with KVM.
pub(super) struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: the pointer is only used through atomics, which any thread may use at any time.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes at `offset` of what `fd` offers.
    pub(super) fn of(fd: &impl AsRawFd, offset: u64, len: usize) -> Result<Self, Error> {
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
        Ok(Self { start: start.map_err(Error::os("mmap of a vCPU"))?.cast(), len })
    }

    /// The address of `size` bytes at `offset`, aligned to `size`. `None` when they are not all inside.
    fn word(&self, offset: usize, size: usize) -> Option<*mut u8> {
        let inside = offset.checked_add(size).is_some_and(|end| end <= self.len);
        // SAFETY: offset <= len, so the result stays inside the mapping.
        (inside && offset.is_multiple_of(size)).then(|| unsafe { self.start.add(offset) })
    }

    /// The byte at `offset`.
    pub(super) fn byte(&self, offset: usize) -> Option<&AtomicU8> {
        // SAFETY: inside the mapping, which lives as long as `self`; this process accesses it by atomics only here,
        // and the kernel and the VMM's own mapping of the page are as other processes to it.
        self.word(offset, 1).map(|at| unsafe { AtomicU8::from_ptr(at) })
    }

    /// The 32-bit word at `offset`, a multiple of 4.
    pub(super) fn u32(&self, offset: usize) -> Option<&AtomicU32> {
        // SAFETY: as above; mappings begin at a page boundary, so the word is aligned.
        self.word(offset, 4).map(|at| unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// The 64-bit word at `offset`, a multiple of 8.
    pub(super) fn u64(&self, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: as above.
        self.word(offset, 8).map(|at| unsafe { AtomicU64::from_ptr(at.cast()) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `of` mapped; nothing points into it, `self` is going away. A failure would
        // only leave address space in use.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}
