//! The host's view of the QEMU process: when it started, its threads, its mappings and the files behind them.
//! Reads /proc only.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use guest::HostVirt;

use crate::Error;

/// Most mappings and open files of a process that are looked at.
const MAX_LISTED: usize = 64 << 10;

/// A process, by its id and the time it started: the pair is not reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Process id.
    pub(crate) pid: u32,
    /// Clock ticks from the host's boot to its start.
    pub(crate) started: u64,
}

/// A mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    /// First address.
    pub(crate) start: HostVirt,
    /// First address behind it.
    pub(crate) end: HostVirt,
    /// `MAP_SHARED`.
    pub(crate) shared: bool,
    /// Offset of `start` in the file, bytes.
    pub(crate) offset: u64,
    /// Device of the file: major, minor.
    device: (u32, u32),
    /// Inode number of the file, 0 for none.
    inode: u64,
}

impl Process {
    /// The process of this id.
    pub(crate) fn find(pid: u32) -> Result<Self, Error> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
            .map_err(Error::io("reading /proc/PID/stat of QEMU"))?;
        let started = start_time(&stat).ok_or_else(|| Error::answer("/proc/PID/stat", &stat))?;
        Ok(Self { pid, started })
    }

    /// Whether it runs a thread of this id.
    pub(crate) fn has_thread(self, thread: u64) -> bool {
        fs::exists(format!("/proc/{}/task/{thread}", self.pid)).unwrap_or(false)
    }

    /// Its mappings, ascending.
    pub(crate) fn mappings(self) -> Result<Vec<Vma>, Error> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid))
            .map_err(Error::io("reading /proc/PID/maps of QEMU"))?;
        Ok(maps.lines().take(MAX_LISTED).filter_map(parse_mapping).collect())
    }

    /// Opens the file behind a mapping for reading and writing: the mapping itself (needs the capability to
    /// follow /proc/PID/map_files), else an open file of the process with the same inode.
    pub(crate) fn open_file_of(self, vma: &Vma) -> Option<File> {
        let open = |path: PathBuf| OpenOptions::new().read(true).write(true).open(path).ok();
        let is_it = |file: &File| {
            file.metadata().is_ok_and(|meta| {
                let device = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
                meta.ino() == vma.inode && device == vma.device
            })
        };
        let range = format!("{:x}-{:x}", vma.start.0, vma.end.0);
        let mapped = open(format!("/proc/{}/map_files/{range}", self.pid).into());
        mapped.filter(is_it).or_else(|| {
            let files = fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?;
            let same_inode =
                |path: &PathBuf| fs::metadata(path).is_ok_and(|meta| meta.ino() == vma.inode);
            let mut paths = files.take(MAX_LISTED).flatten().map(|entry| entry.path());
            paths.find(same_inode).and_then(open).filter(is_it)
        })
    }
}

/// Field 22 of /proc/PID/stat; field 2 is a name in parentheses that may hold anything (proc(5)).
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()
}

/// `7f71a3fff000-7f71b3fff000 rw-s 00000000 00:01 1034  /memfd:m (deleted)`
fn parse_mapping(line: &str) -> Option<Vma> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let flags = words.next()?;
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    Some(Vma {
        start: HostVirt(hex(start)?),
        end: HostVirt(hex(end)?),
        shared: flags.as_bytes().get(3) == Some(&b's'),
        offset,
        device: (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?),
        inode: words.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read() {
        let vma =
            parse_mapping("7f71a3fff000-7f71b3fff000 rw-s 00001000 00:01 1034  /memfd:m (deleted)")
                .unwrap();
        assert!(vma.shared);
        assert_eq!((vma.end - vma.start, vma.offset, vma.inode), (0x1000_0000, 0x1000, 1034));
        assert_eq!(parse_mapping("nonsense"), None);
        assert!(!Process::find(std::process::id()).unwrap().mappings().unwrap().is_empty());
    }

    #[test]
    fn names_with_parentheses_do_not_shift_fields() {
        let mut stat = String::from("7 (a) b) S");
        for field in 4..=30 {
            stat += &format!(" {field}");
        }
        assert_eq!(start_time(&stat), Some(22));
        assert_eq!(start_time("7 (x"), None);
    }

    #[test]
    fn threads_are_told_apart() {
        let this = Process::find(std::process::id()).unwrap();
        assert!(this.has_thread(u64::from(this.pid)));
        assert!(!this.has_thread(1) || this.pid == 1);
    }
}
