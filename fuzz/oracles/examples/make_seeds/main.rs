//! Writes the seeds of the fuzz targets, all but the finds: `cargo run -p defib-fuzz-oracles --example make_seeds`.
//! Needs gcc, ld, objcopy (binutils) and pahole. Imports no layout of the readers.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

mod binaries;
mod crashes;
mod texts;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Where seeds go: a folder a target.
struct Seeds(PathBuf);

impl Seeds {
    fn add(&self, target: &str, name: &str, bytes: impl AsRef<[u8]>) -> Outcome<()> {
        let folder = self.0.join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), bytes)?;
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let seeds = Seeds(Path::new(env!("CARGO_MANIFEST_DIR")).join("../seeds"));
    texts::add(&seeds)?;
    crashes::add(&seeds)?;
    binaries::add(&seeds)
}
