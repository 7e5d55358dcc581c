//! Reading guest memory, bounded: the two traits every reader uses. Writing is an ability of a
//! machine (see `machine.rs`), so that nothing that only reads can write.

use std::ops::Range;

use thiserror::Error;

use crate::{GuestPhys, GuestVirt};

/// Why bytes of the guest could not be read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// No RAM at this guest-physical address.
    #[error("no guest RAM at guest-physical {at:#x} ({len} bytes)")]
    NotRam {
        /// First address that is not RAM.
        at: GuestPhys,
        /// Bytes asked for.
        len: usize,
    },
    /// The page tables map nothing here.
    #[error("guest-virtual {at:#x} is not mapped (level {level} entry not present)")]
    NotMapped {
        /// First unmapped address.
        at: GuestVirt,
        /// Page-table level of the entry that is not present: 5 (PML5) to 1 (PT).
        level: u8,
    },
    /// Not a canonical address.
    #[error("guest-virtual {at:#x} is not canonical")]
    NotCanonical {
        /// The address.
        at: GuestVirt,
    },
    /// The address range wraps around the end of the address space.
    #[error("{len} bytes from {at:#x} wrap around the address space")]
    Wraps {
        /// First address, in whichever space was read.
        at: u64,
        /// Bytes asked for.
        len: usize,
    },
    /// The page exists but its contents were not captured (filtered or damaged dump).
    #[error("guest-physical {at:#x} was not captured")]
    NotCaptured {
        /// The address.
        at: GuestPhys,
    },
    /// No terminator within the bound.
    #[error("no end of string within {max} bytes of guest-virtual {at:#x}")]
    Unterminated {
        /// Start of the string.
        at: GuestVirt,
        /// The bound.
        max: usize,
    },
    /// The host could not access the memory.
    #[error("host error {errno} while accessing guest-physical {at:#x}")]
    Host {
        /// The address.
        at: GuestPhys,
        /// `errno` of the system call.
        errno: i32,
    },
}

/// Guest-physical memory.
pub trait PhysMemory {
    /// Fills `into` from guest-physical `at`. All or nothing.
    ///
    /// # Errors
    /// When a byte of the range is not RAM or can't be had.
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError>;

    /// The ranges of RAM, ascending, without overlap. Small windows (VGA, firmware) may be left out.
    fn ranges(&self) -> Vec<Range<GuestPhys>>;

    /// A RAM range as a slice, where the backend maps it and the contents can't change while borrowed
    /// (dumps). `None` for live machines.
    fn slice(&self, _range: Range<GuestPhys>) -> Option<&[u8]> {
        None
    }

    /// One little-endian 64-bit word.
    ///
    /// # Errors
    /// As [`PhysMemory::read`].
    fn read_u64(&self, at: GuestPhys) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Guest-virtual memory under one page-table root.
pub trait VirtMemory {
    /// Fills `into` from guest-virtual `at`. All or nothing.
    ///
    /// # Errors
    /// When a byte of the range is not mapped, not RAM or can't be had.
    fn read(&self, at: GuestVirt, into: &mut [u8]) -> Result<(), MemoryError>;

    /// The guest-physical address behind `at`.
    ///
    /// # Errors
    /// When it is not mapped.
    fn translate(&self, at: GuestVirt) -> Result<GuestPhys, MemoryError>;

    /// One byte.
    ///
    /// # Errors
    /// As [`VirtMemory::read`].
    fn read_u8(&self, at: GuestVirt) -> Result<u8, MemoryError> {
        let mut bytes = [0; 1];
        self.read(at, &mut bytes)?;
        Ok(bytes[0])
    }

    /// One little-endian 16-bit word.
    ///
    /// # Errors
    /// As [`VirtMemory::read`].
    fn read_u16(&self, at: GuestVirt) -> Result<u16, MemoryError> {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// One little-endian 32-bit word.
    ///
    /// # Errors
    /// As [`VirtMemory::read`].
    fn read_u32(&self, at: GuestVirt) -> Result<u32, MemoryError> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// One little-endian 64-bit word.
    ///
    /// # Errors
    /// As [`VirtMemory::read`].
    fn read_u64(&self, at: GuestVirt) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A little-endian unsigned number of 1, 2, 4 or 8 bytes (other sizes read 8).
    ///
    /// # Errors
    /// As [`VirtMemory::read`].
    fn read_uint(&self, at: GuestVirt, size: u64) -> Result<u64, MemoryError> {
        match size {
            1 => self.read_u8(at).map(u64::from),
            2 => self.read_u16(at).map(u64::from),
            4 => self.read_u32(at).map(u64::from),
            _ => self.read_u64(at),
        }
    }

    /// A NUL-terminated string of at most `max` bytes, lossily decoded.
    ///
    /// # Errors
    /// [`MemoryError::Unterminated`] when no NUL stands in the first `max` bytes.
    fn read_cstr(&self, at: GuestVirt, max: usize) -> Result<String, MemoryError> {
        let mut text = Vec::new();
        while text.len() < max {
            let here = at + text.len() as u64;
            let to_page_end = 4096 - (here.0 & 4095) as usize;
            let mut chunk = vec![0; to_page_end.min(max - text.len()).min(64)];
            self.read(here, &mut chunk)?;
            if let Some(end) = chunk.iter().position(|&byte| byte == 0) {
                text.extend_from_slice(&chunk[..end]);
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            text.extend_from_slice(&chunk);
        }
        Err(MemoryError::Unterminated { at, max })
    }
}
