//! The cache folder: where it is, and files in it that are named by the content they were made from.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use xxhash_rust::xxh3::Xxh3;

use crate::Error;
use crate::Result;

/// `$DEFIB_CACHE`, or `.cache/defib` in the home folder.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("DEFIB_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/defib"),
    }
}

/// A name made of everything a product is made from.
#[derive(Default)]
pub(crate) struct Key(Xxh3);

impl Key {
    /// Adds bytes; their length separates them from the next.
    pub(crate) fn add(mut self, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a large file by its path, size and time of change.
    pub(crate) fn add_stat(self, path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(Error::file("stat", path))?;
        let text = format!("{} {} {:?}", path.display(), meta.len(), meta.modified().ok());
        Ok(self.add(text))
    }

    /// The name.
    pub(crate) fn name(&self) -> String {
        format!("{:016x}", self.0.digest())
    }
}

/// The folder `kind`/`name` of the cache, made by `fill` in a scratch folder if it is not there.
/// Another process that makes the same at the same time is no harm: the first one's stays.
pub(crate) fn folder(
    kind: &str,
    name: &str,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let parent = root().join(kind);
    let folder = parent.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&parent).map_err(Error::file("create", &parent))?;
    let scratch = tempfile::Builder::new()
        .prefix(".making.")
        .tempdir_in(&parent)
        .map_err(Error::file("create a folder in", &parent))?;
    fill(scratch.path())?;
    let scratch = scratch.keep();
    match fs::rename(&scratch, &folder) {
        Ok(()) => Ok(folder),
        Err(_) if folder.is_dir() => {
            fs::remove_dir_all(&scratch).map_err(Error::file("remove", &scratch))?;
            Ok(folder)
        }
        Err(source) => Err(Error::File { what: "rename", path: scratch, source }),
    }
}

/// Removes the oldest folders of a kind beyond a number, as far as they are older than an age.
pub(crate) fn prune(kind: &str, keep: usize, age: Duration) -> Result<()> {
    prune_in(&root().join(kind), keep, age)
}

fn prune_in(parent: &Path, keep: usize, age: Duration) -> Result<()> {
    let entries = fs::read_dir(parent).map_err(Error::file("read", parent))?;
    let mut folders: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    folders.sort();
    let surplus = folders.len().saturating_sub(keep);
    for (modified, path) in folders.into_iter().take(surplus) {
        if modified.elapsed().is_ok_and(|old| old > age) {
            fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_surplus_beyond_its_age_goes() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let left = || fs::read_dir(dir.path()).unwrap().count();
        prune_in(dir.path(), 1, Duration::from_secs(3600)).unwrap();
        assert_eq!(left(), 3);
        prune_in(dir.path(), 1, Duration::ZERO).unwrap();
        assert_eq!(left(), 1);
    }

    #[test]
    fn key_separates_its_parts() {
        let a = Key::default().add("ab").add("c").name();
        let b = Key::default().add("a").add("bc").name();
        assert_ne!(a, b);
        assert_eq!(a.len(), 16);
    }
}
