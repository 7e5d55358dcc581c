//! `defib triage`: many dumps and console logs, one bucket a cause. Reading one input is `look.rs`'s, what was
//! read before is `memory.rs`'s, printing is `print.rs`'s.

mod look;
mod memory;
mod print;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use diagnose::triage::{Bucket, Buckets};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use walkdir::WalkDir;

use crate::cli::{TriageArguments, TriageFormat};
use crate::{Outcome, knowledge};
use look::{Looker, Seen};
use memory::Memory;

/// What is said of all inputs together.
pub struct Summary {
    /// One a cause, largest first.
    pub buckets: Vec<Bucket>,
    /// Files.
    pub inputs: usize,
    /// Inputs that tell of no crash.
    pub quiet: usize,
    /// Inputs that can't be read, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// Runs `defib triage`.
///
/// # Errors
/// When a path does not exist, or the output can't be written. An input that can't be read is a finding.
pub fn run(arguments: &TriageArguments) -> Result<Outcome> {
    let files = files(&arguments.paths)?;
    if files.is_empty() {
        bail!("there is no file in what was named");
    }
    let memory = Memory::open(arguments.resume.as_deref())?;
    let looker = Looker::new(knowledge::sources(&arguments.knowledge));
    let progress = progress(files.len());
    let seen: Vec<(PathBuf, Seen)> = files
        .into_par_iter()
        .map(|path| {
            let seen = memory.recall(&path).unwrap_or_else(|| {
                let seen = looker.look(&path);
                memory.keep(&path, &seen);
                seen
            });
            progress.inc(1);
            (path, seen)
        })
        .collect();
    progress.finish_and_clear();
    memory.finish()?;
    let summary = Summary::of(seen);
    let text = match arguments.format {
        TriageFormat::Text => print::text(&summary),
        TriageFormat::Json => print::json(&summary),
        TriageFormat::Html => print::html(&summary),
    };
    match &arguments.output {
        Some(file) => std::fs::write(file, text)
            .with_context(|| format!("cannot write {}", file.display()))?,
        None => std::io::stdout().write_all(text.as_bytes())?,
    }
    Ok(if summary.unreadable.is_empty() { Outcome::Done } else { Outcome::NotSaved })
}

impl Summary {
    fn of(seen: Vec<(PathBuf, Seen)>) -> Self {
        let mut summary =
            Self { buckets: Vec::new(), inputs: seen.len(), quiet: 0, unreadable: Vec::new() };
        let mut buckets = Buckets::default();
        for (path, seen) in seen {
            match seen {
                Seen::Crashes(crashes) if crashes.is_empty() => summary.quiet += 1,
                Seen::Crashes(crashes) => crashes.into_iter().for_each(|it| buckets.add(it)),
                Seen::Unreadable(why) => summary.unreadable.push((path, why)),
            }
        }
        summary.buckets = buckets.finish();
        summary
    }
}

/// All files that are named or lie below what is named, each once, in the order of text.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = BTreeSet::new();
    for path in paths {
        for entry in WalkDir::new(path) {
            let entry = entry.with_context(|| format!("cannot read {}", path.display()))?;
            if entry.depth() == 0 && !entry.file_type().is_dir() || is_file(entry.path()) {
                files.insert(entry.into_path());
            }
        }
    }
    Ok(files.into_iter().collect())
}

/// Whether it is a file or leads to one.
fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|it| it.is_file())
}

/// A bar on stderr if that is a terminal.
fn progress(count: usize) -> ProgressBar {
    let bar = ProgressBar::new(count as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} ({per_sec}, {eta} left)")
    {
        bar.set_style(style);
    }
    bar
}
