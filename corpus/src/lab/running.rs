//! The processes and folders that must not outlive the lab when a signal ends it: destructors do not run then. What
//! ends in order is ended by its owner, not here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What one owner has running. A file descriptor names the process: its number may be another's by then.
struct Entry {
    process: Option<OwnedFd>,
    folders: Vec<PathBuf>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

static RUNNING: Mutex<Entries> = Mutex::new(Entries { next: 0, entries: BTreeMap::new() });

fn running() -> MutexGuard<'static, Entries> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entries {
    fn add(&mut self, process: Option<OwnedFd>, folders: Vec<PathBuf>) -> Running {
        self.next += 1;
        self.entries.insert(self.next, Entry { process, folders });
        Running(self.next)
    }
}

/// As long as this lives, the process and its folders go when the lab is ended by a signal.
#[derive(Debug)]
pub struct Running(u64);

impl Drop for Running {
    fn drop(&mut self) {
        running().entries.remove(&self.0);
    }
}

/// Starts a process. No signal finds it started and not yet known.
pub(crate) fn start(command: &mut Command, folders: Vec<PathBuf>) -> io::Result<(Child, Running)> {
    let mut running = running();
    let mut child = command.spawn()?;
    match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        Ok(process) => Ok((child, running.add(Some(process), folders))),
        Err(error) => {
            // Both fail only when it has ended already.
            let _ = child.kill();
            let _ = child.wait();
            Err(error.into())
        }
    }
}

/// A folder that goes when the lab is ended by a signal.
#[must_use]
pub fn temporary(folder: &Path) -> Running {
    running().add(None, vec![folder.to_owned()])
}

/// Kills what the lab has running and removes its folders. Nothing can be started from then on, so this process must
/// end next.
pub fn end_all() {
    let running = running();
    for process in running.entries.values().filter_map(|entry| entry.process.as_ref()) {
        // One that has ended already is no matter.
        let _ = pidfd_send_signal(process, Signal::KILL);
    }
    for folder in running.entries.values().flat_map(|entry| &entry.folders) {
        let _ = fs::remove_dir_all(folder);
    }
    std::mem::forget(running);
}
