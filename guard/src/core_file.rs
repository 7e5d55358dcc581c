//! `live.core` of an incident: what the guest's standing is too short for is read and written by a thread of its own.
//! What is in the file is `diagnose::live_core`'s.

use std::collections::HashSet;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use diagnose::live_core::{Contents, Limits, Snapshot};
use guest::PhysMemory;
use repair_image::RepairImage;

use crate::whole_file;

/// Name of the file in an incident's folder.
pub const NAME: &str = "live.core";
/// Cores that wait for the one that is being written. Each holds 2 MiB; a guest that crashes faster goes without.
const WAITING: usize = 4;
/// Signatures that are remembered at most; a guest that crashes in more ways than that gets no further cores.
const SIGNATURES: usize = 1024;

/// What a core is made of, once the guest runs again.
pub struct Job {
    /// Taken while the guest stood.
    pub snapshot: Snapshot,
    /// What was known of the kernel then.
    pub image: RepairImage,
    /// Guest RAM.
    pub phys: Box<dyn PhysMemory + Send>,
    /// The incident's folder.
    pub folder: PathBuf,
}

/// Writes cores one after the other. Dropped, it finishes what it was given.
#[derive(Default)]
pub struct CoreFiles {
    /// Signatures of the crashes that have one.
    written: HashSet<String>,
    thread: Option<(SyncSender<Job>, JoinHandle<()>)>,
}

impl CoreFiles {
    /// Why a crash of this signature gets no core; `limit` is how many there may be in all.
    pub fn why_not(&self, signature: &str, limit: u32) -> Option<&'static str> {
        if self.written.contains(signature) {
            Some("an earlier incident of this signature has one")
        } else if self.written.len() >= SIGNATURES.min(limit as usize) {
            Some("as many as the policy allows were written")
        } else {
            None
        }
    }

    /// Hands a core over to the thread, which is started if there is none.
    ///
    /// # Errors
    /// Why it goes without.
    pub fn write(&mut self, signature: &str, job: Job) -> Result<(), &'static str> {
        let sender = match &self.thread {
            Some((sender, _)) => sender,
            None => {
                let (sender, jobs) = sync_channel(WAITING);
                let thread = thread::Builder::new().name("live.core".to_owned());
                let thread = thread.spawn(move || work(&jobs));
                let thread = thread.map_err(|_| "no thread could be started")?;
                &self.thread.insert((sender, thread)).0
            }
        };
        sender.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => "too many are being written already",
            TrySendError::Disconnected(_) => "the thread that writes them has failed",
        })?;
        self.written.insert(signature.to_owned());
        Ok(())
    }
}

impl Drop for CoreFiles {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.thread.take() {
            drop(sender);
            // A panic there has cost a file, no more.
            let _ = thread.join();
        }
    }
}

/// The thread's work. A core that can't be made leaves its reason in a file, as nobody waits for an answer.
fn work(jobs: &Receiver<Job>) {
    // Whatever haste the guard itself is in: nobody waits for this.
    let _ = rustix::process::setpriority_process(None, 0);
    for job in jobs {
        let folder = job.folder.clone();
        if let Err(reason) = make(job) {
            let _ = fs::write(folder.join("live.core.failed"), format!("{reason}\n"));
        }
    }
}

fn make(job: Job) -> Result<(), String> {
    let Job { snapshot, image, phys, folder } = job;
    let contents = Contents::collect(&image, &*phys, snapshot, &Limits::default());
    let contents = contents.map_err(|error| error.to_string())?;
    store(&contents, &folder).map_err(|error| error.to_string())
}

fn store(contents: &Contents, folder: &Path) -> io::Result<()> {
    whole_file::replace(&folder.join(NAME), |file| {
        let mut file = BufWriter::new(file);
        contents.write(&mut file)?;
        file.flush()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_each_signature_and_no_more_than_allowed() {
        let mut files = CoreFiles::default();
        assert_eq!(files.why_not("a", 1), None);
        files.written.insert("a".to_owned());
        assert!(files.why_not("a", 9).is_some_and(|why| why.contains("signature")));
        assert!(files.why_not("b", 1).is_some_and(|why| why.contains("policy")));
        assert_eq!(files.why_not("b", 2), None);
        assert!(CoreFiles::default().why_not("a", 0).is_some());
    }
}
