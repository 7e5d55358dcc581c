//! Guest RAM: where each range lies on the host, reading and writing it. Shared RAM is mapped; any other is
//! accessed through system calls.
#![allow(unsafe_code, reason = "process_vm_readv and process_vm_writev")]

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use guest::{GuestPhys, HostVirt, MemoryError, PhysMemory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::process::{Process, Vma};
use crate::Error;
use crate::mapping::Mapping;

/// Maps the file behind a mapping of QEMU's; `None` when it is private or its file can't be had.
fn map_file(process: Process, vma: &Vma) -> Option<Mapping> {
    let len = usize::try_from(vma.end.0.checked_sub(vma.start.0)?).ok()?;
    let file = vma.shared.then(|| process.open_file_of(vma))??;
    // A page past the end of the file would be a bus error here, not an error code.
    let size = file.metadata().ok()?.len();
    if vma.offset.checked_add(len as u64)? > size {
        return None;
    }
    Mapping::of(&file, vma.offset, len).ok()
}

/// How the bytes of a range are reached.
#[derive(Clone)]
enum Backing {
    /// In a mapping of ours, from this offset.
    Mapped(Arc<Mapping>, usize),
    /// In QEMU's address space, from this address.
    Remote(HostVirt),
}

/// A range of guest memory.
#[derive(Clone)]
struct Region {
    range: Range<GuestPhys>,
    /// RAM that the guest can write (not shadowed firmware).
    ram: bool,
    backing: Backing,
}

/// The RAM of a VM. A copy sees what the original saw when it was made.
#[derive(Clone)]
pub(crate) struct GuestRam {
    process: Process,
    /// Signals the end of the process: its id may be another's then.
    pidfd: Arc<OwnedFd>,
    /// Ascending, without overlap.
    regions: Vec<Region>,
}

impl GuestRam {
    /// No RAM yet, of this QEMU process.
    pub(crate) fn new(process: Process) -> Result<Self, Error> {
        let pid = i32::try_from(process.pid).ok().and_then(rustix::process::Pid::from_raw);
        let pidfd = rustix::process::pidfd_open(
            pid.ok_or(Error::Gone)?,
            rustix::process::PidfdFlags::empty(),
        )
        .map_err(Error::os("pidfd_open of QEMU"))?;
        Ok(Self { process, pidfd: Arc::new(pidfd), regions: Vec::new() })
    }

    /// Adds ranges of guest memory: where each starts and ends, whether it is RAM, and the address of its
    /// first byte in QEMU. Contiguous there, as QEMU's memory regions are.
    pub(crate) fn add(
        &mut self,
        ranges: &[(Range<GuestPhys>, bool, HostVirt)],
    ) -> Result<(), Error> {
        let vmas = self.process.mappings()?;
        let mut mapped: Vec<(HostVirt, Option<Arc<Mapping>>)> = Vec::new();
        for (range, ram, host) in ranges {
            let not_found = |why| Error::RamNotFound { at: range.start, why };
            let vma = vmas.iter().find(|vma| vma.start <= *host && *host < vma.end);
            let vma = vma.ok_or_else(|| not_found("no mapping of the process holds it"))?;
            let mapping = match mapped.iter().find(|(start, _)| *start == vma.start) {
                Some((_, mapping)) => mapping.clone(),
                None => {
                    let mapping = map_file(self.process, vma).map(Arc::new);
                    mapped.push((vma.start, mapping.clone()));
                    mapping
                }
            };
            let len = range.end.0.saturating_sub(range.start.0);
            let offset = host.0 - vma.start.0;
            // A range that spans several mappings (rare: bound to several NUMA nodes) goes the other way.
            let backing = match mapping {
                Some(mapping) if offset.saturating_add(len) <= mapping.len() as u64 => {
                    Backing::Mapped(mapping, offset as usize)
                }
                _ => Backing::Remote(*host),
            };
            self.regions.push(Region { range: range.clone(), ram: *ram, backing });
        }
        self.regions.sort_by_key(|region| region.range.start);
        Ok(())
    }

    /// Adds one range of RAM that is reached in QEMU's address space, without looking for its file.
    pub(crate) fn add_remote(&mut self, range: Range<GuestPhys>, host: HostVirt) {
        self.regions.push(Region { range, ram: true, backing: Backing::Remote(host) });
        self.regions.sort_by_key(|region| region.range.start);
    }

    /// Forgets the range that starts here.
    pub(crate) fn remove(&mut self, at: GuestPhys) {
        self.regions.retain(|region| region.range.start != at);
    }

    /// Whether all RAM is mapped, so that reading costs no system call.
    pub(crate) fn is_mapped(&self) -> bool {
        self.regions.iter().all(|region| matches!(region.backing, Backing::Mapped(..)))
    }

    /// Writes data. All or nothing, as far as the map of RAM tells before.
    pub(crate) fn write(&self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError> {
        let pieces = self.pieces(at, bytes.len(), true)?;
        self.check_alive(at)?;
        for piece in pieces {
            let part = bytes.get(piece.done..piece.done + piece.len).unwrap_or_default();
            let errno = match &piece.region.backing {
                Backing::Mapped(mapping, start) if mapping.write(start + piece.offset, part) => {
                    None
                }
                Backing::Mapped(..) => Some(libc::EFAULT),
                Backing::Remote(host) => self.copy_to(*host + piece.offset as u64, part).err(),
            };
            if let Some(errno) = errno {
                return Err(MemoryError::Host { at: at + piece.done as u64, errno });
            }
        }
        Ok(())
    }

    /// Fails when a byte of the range is not RAM.
    pub(crate) fn check_writable(&self, at: GuestPhys, len: usize) -> Result<(), MemoryError> {
        self.pieces(at, len, true).map(drop)
    }

    /// The parts of a range, each in one region. Fails before anything is touched.
    fn pieces(
        &self,
        at: GuestPhys,
        len: usize,
        write: bool,
    ) -> Result<Vec<Piece<'_>>, MemoryError> {
        let mut pieces = Vec::with_capacity(1);
        let mut done = 0;
        while done < len {
            let here = at.checked_add(done as u64).ok_or(MemoryError::Wraps { at: at.0, len })?;
            let missing = MemoryError::NotRam { at: here, len: len - done };
            let index = self.regions.partition_point(|region| region.range.end <= here);
            let region = self.regions.get(index).ok_or(missing)?;
            if !region.range.contains(&here) || (write && !region.ram) {
                return Err(missing);
            }
            let left = usize::try_from(region.range.end.0 - here.0).unwrap_or(usize::MAX);
            let len = left.min(len - done);
            pieces.push(Piece {
                region,
                offset: (here.0 - region.range.start.0) as usize,
                done,
                len,
            });
            done += len;
        }
        Ok(pieces)
    }

    /// Reads what lies in one mapped region, as nearly all reads do: page tables are walked with it. `false`:
    /// nothing was read, it lies elsewhere.
    fn read_mapped(&self, at: GuestPhys, into: &mut [u8]) -> bool {
        let index = self.regions.partition_point(|region| region.range.end <= at);
        let Some(region) = self.regions.get(index) else { return false };
        let Backing::Mapped(mapping, start) = &region.backing else { return false };
        let inside = region.range.contains(&at) && region.range.end.0 - at.0 >= into.len() as u64;
        inside && mapping.read(start + (at.0 - region.range.start.0) as usize, into)
    }

    /// Fails when QEMU has ended: another process may have its id.
    fn check_alive(&self, at: GuestPhys) -> Result<(), MemoryError> {
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) => Ok(()),
            Ok(_) => Err(MemoryError::Host { at, errno: libc::ESRCH }),
            Err(errno) => Err(MemoryError::Host { at, errno: errno.raw_os_error() }),
        }
    }

    fn copy_from(&self, from: HostVirt, into: &mut [u8]) -> Result<(), i32> {
        let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let remote = libc::iovec { iov_base: from.0 as *mut libc::c_void, iov_len: into.len() };
        // SAFETY: `local` is one writable buffer of ours, borrowed for the call; the kernel checks `remote`
        // against the other process.
        let copied = unsafe {
            libc::process_vm_readv(
                self.process.pid.cast_signed(),
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            )
        };
        all_copied(copied, into.len())
    }

    fn copy_to(&self, to: HostVirt, bytes: &[u8]) -> Result<(), i32> {
        let local =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: to.0 as *mut libc::c_void, iov_len: bytes.len() };
        // SAFETY: `local` is one buffer of ours that is only read, borrowed for the call; the kernel checks
        // `remote` against the other process.
        let copied = unsafe {
            libc::process_vm_writev(
                self.process.pid.cast_signed(),
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            )
        };
        all_copied(copied, bytes.len())
    }
}

/// The errno of a copy between processes, `EFAULT` for one that stopped half-way.
fn all_copied(copied: isize, len: usize) -> Result<(), i32> {
    if copied < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
    }
    if copied.cast_unsigned() == len { Ok(()) } else { Err(libc::EFAULT) }
}

/// A part of an access that lies in one region.
struct Piece<'r> {
    region: &'r Region,
    /// In the region.
    offset: usize,
    /// Bytes of the access before it.
    done: usize,
    len: usize,
}

impl PhysMemory for GuestRam {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        if self.read_mapped(at, into) {
            return Ok(());
        }
        for piece in self.pieces(at, into.len(), false)? {
            let part = into.get_mut(piece.done..piece.done + piece.len).unwrap_or_default();
            let errno = match &piece.region.backing {
                Backing::Mapped(mapping, start) if mapping.read(start + piece.offset, part) => None,
                Backing::Mapped(..) => Some(libc::EFAULT),
                Backing::Remote(host) => self.copy_from(*host + piece.offset as u64, part).err(),
            };
            if let Some(errno) = errno {
                return Err(MemoryError::Host { at: at + piece.done as u64, errno });
            }
        }
        Ok(())
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        let mut ranges: Vec<Range<GuestPhys>> = Vec::new();
        for region in self.regions.iter().filter(|region| region.ram) {
            match ranges.last_mut() {
                Some(last) if last.end == region.range.start => last.end = region.range.end,
                _ => ranges.push(region.range.clone()),
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RAM whose "QEMU" is this process: one private buffer and one shared file.
    fn own_ram() -> (GuestRam, Box<[u8; 8192]>) {
        let private = Box::new([7u8; 8192]);
        let mut ram = GuestRam::new(Process::find(std::process::id()).unwrap()).unwrap();
        ram.add_remote(
            GuestPhys(0x1000)..GuestPhys(0x3000),
            HostVirt(private.as_ptr().addr() as u64),
        );
        (ram, private)
    }

    fn shared_mapping() -> (Mapping, Vma) {
        let file = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        // The file stays open behind the mapping.
        let theirs = Mapping::of(&file, 0, 8192).unwrap();
        let process = Process::find(std::process::id()).unwrap();
        let vmas = process.mappings().unwrap();
        let address = theirs.address();
        let vma = vmas.into_iter().find(|vma| vma.start <= address && address < vma.end).unwrap();
        (theirs, vma)
    }

    #[test]
    fn remote_memory_is_read_and_written() {
        let (ram, private) = own_ram();
        ram.write(GuestPhys(0x1ffe), &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 6];
        ram.read(GuestPhys(0x1ffd), &mut bytes).unwrap();
        assert_eq!(bytes, [7, 1, 2, 3, 4, 7]);
        drop(private);
    }

    #[test]
    fn accesses_past_ram_touch_nothing() {
        let (ram, _private) = own_ram();
        assert!(matches!(
            ram.write(GuestPhys(0x2ffe), &[1, 2, 3]),
            Err(MemoryError::NotRam { at: GuestPhys(0x3000), len: 1 })
        ));
        assert_eq!(ram.read_u64(GuestPhys(0x2ff8)).unwrap(), 0x0707_0707_0707_0707);
        assert!(ram.read(GuestPhys(0xfff), &mut [0]).is_err());
        assert!(ram.read(GuestPhys(u64::MAX), &mut [0; 2]).is_err());
    }

    #[test]
    fn shared_files_are_mapped_a_second_time() {
        let (theirs, vma) = shared_mapping();
        let ours = map_file(Process::find(std::process::id()).unwrap(), &vma).unwrap();
        assert!(theirs.write(16, &7u64.to_le_bytes()));
        assert!(theirs.write(25, &[9, 9, 9]));
        let mut word = [0; 8];
        assert!(ours.read(16, &mut word));
        assert_eq!(u64::from_le_bytes(word), 7);
        let mut odd = [0; 3];
        assert!(ours.read(25, &mut odd));
        assert_eq!(odd, [9; 3]);
        assert!(!ours.read(8190, &mut odd));
        assert!(!ours.write(usize::MAX, &odd));
    }

    #[test]
    fn adjacent_ranges_are_one() {
        let (mut ram, private) = own_ram();
        let host = HostVirt(private.as_ptr().addr() as u64);
        ram.add_remote(GuestPhys(0x3000)..GuestPhys(0x4000), host);
        ram.add_remote(GuestPhys(0x8000)..GuestPhys(0x9000), host);
        let expected = [GuestPhys(0x1000)..GuestPhys(0x4000), GuestPhys(0x8000)..GuestPhys(0x9000)];
        assert_eq!(ram.ranges(), expected);
        ram.remove(GuestPhys(0x8000));
        assert_eq!(ram.ranges(), expected[..1]);
    }
}
