//! What earlier runs have read, one JSON object a line in a file, so that a run that was cut short goes on where it
//! was. An input counts as read while its size and time are the same.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::look::Seen;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    size: u64,
    modified: Option<SystemTime>,
}

impl State {
    fn of(path: &Path) -> Option<Self> {
        let file = path.metadata().ok()?;
        Some(Self { size: file.len(), modified: file.modified().ok() })
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    path: PathBuf,
    state: State,
    seen: Seen,
}

/// What was read before.
pub struct Memory {
    known: HashMap<PathBuf, (State, Seen)>,
    file: Mutex<Result<Option<File>>>,
}

impl Memory {
    /// From a file, which is made if it is not there; none: nothing is known nor kept.
    ///
    /// # Errors
    /// When the file can't be read or made.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self { known: HashMap::new(), file: Mutex::new(Ok(None)) });
        };
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = file.with_context(|| format!("cannot use {}", path.display()))?;
        let mut known = HashMap::new();
        let mut whole = true;
        for line in BufReader::new(&file).lines() {
            let line = line.with_context(|| format!("cannot read {}", path.display()))?;
            // The run before may have been cut in the middle of a line.
            let read: Option<Line> = serde_json::from_str(&line).ok();
            whole = read.is_some();
            known.extend(read.map(|it| (it.path, (it.state, it.seen))));
        }
        if !whole {
            file.write_all(b"\n").with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Self { known, file: Mutex::new(Ok(Some(file))) })
    }

    /// What is known of an input.
    pub fn recall(&self, path: &Path) -> Option<Seen> {
        let (state, seen) = self.known.get(path)?;
        (State::of(path)? == *state).then(|| seen.clone())
    }

    /// Keeps what was seen of an input. A failure is told by [`Memory::finish`].
    pub fn keep(&self, path: &Path, seen: &Seen) {
        let Some(state) = State::of(path) else { return };
        let line = Line { path: path.to_owned(), state, seen: seen.clone() };
        let mut guard = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Ok(Some(file)) = &mut *guard else { return };
        let text = serde_json::to_string(&line).map_err(anyhow::Error::from);
        let kept = text.and_then(|text| Ok(file.write_all((text + "\n").as_bytes())?));
        if let Err(error) = kept {
            *guard = Err(error.context("cannot keep what was read"));
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// When something could not be kept.
    pub fn finish(self) -> Result<()> {
        self.file.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_recalls_until_the_input_changes_and_survives_a_cut() {
        let folder = tempfile::tempdir().unwrap();
        let (store, input) = (folder.path().join("store"), folder.path().join("input"));
        std::fs::write(&input, "one").unwrap();
        let seen = Seen::Unreadable("why".to_owned());
        let memory = Memory::open(Some(&store)).unwrap();
        assert_eq!(memory.recall(&input), None);
        memory.keep(&input, &seen);
        memory.finish().unwrap();
        OpenOptions::new().append(true).open(&store).unwrap().write_all(b"{\"path\":").unwrap();
        let memory = Memory::open(Some(&store)).unwrap();
        assert_eq!(memory.recall(&input), Some(seen.clone()));
        memory.keep(&folder.path().join("store"), &seen);
        memory.finish().unwrap();
        let memory = Memory::open(Some(&store)).unwrap();
        assert_eq!(memory.recall(&input), Some(seen));
        std::fs::write(&input, "three").unwrap();
        assert_eq!(memory.recall(&input), None);
    }
}
