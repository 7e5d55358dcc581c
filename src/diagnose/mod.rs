//! `defib diagnose`: one dump or console log, and all that can be said of it. What a dump tells is `dump.rs`'s, what a
//! log tells is `log.rs`'s; printing is `text.rs`'s, `json.rs`'s and `page.rs`'s.

mod dump;
mod json;
mod log;
mod page;
mod text;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use diagnose::vmcore::{self, Hints};

use crate::cli::{DiagnoseArguments, ReportFormat};
use crate::offline::Input;
use crate::{Outcome, guard_command, knowledge};
use dump::OfDump;
use log::OfLog;

/// What was found in an input.
pub enum Finding {
    /// In memory and registers.
    Dump(Box<OfDump>),
    /// In the lines of a console.
    Log(OfLog),
}

impl Finding {
    fn tells_of_a_crash(&self) -> bool {
        match self {
            Self::Dump(dump) => dump.crash.is_some() || !dump.reports.is_empty(),
            Self::Log(log) => !log.reports.is_empty(),
        }
    }
}

/// Runs `defib diagnose`.
///
/// # Errors
/// When the input is neither a dump nor a log, is damaged, or the kernel in it can't be understood; or the output
/// can't be written.
pub fn run(arguments: &DiagnoseArguments) -> Result<Outcome> {
    let finding = find(arguments)?;
    let text = match arguments.format {
        ReportFormat::Text => text::text(&finding),
        ReportFormat::Json => json::json(&finding)?,
        ReportFormat::Html => page::page(&finding),
    };
    match &arguments.output {
        Some(file) => std::fs::write(file, text)
            .with_context(|| format!("cannot write {}", file.display()))?,
        None => std::io::stdout().write_all(text.as_bytes())?,
    }
    Ok(if finding.tells_of_a_crash() { Outcome::Done } else { Outcome::NotSaved })
}

fn find(arguments: &DiagnoseArguments) -> Result<Finding> {
    let names = names(&arguments.inputs);
    let input = open(&arguments.inputs).with_context(|| format!("cannot use {names}"))?;
    let policy = guard_command::policy(arguments.policy.as_deref())?;
    let sources = knowledge::sources(&arguments.knowledge);
    Ok(match input {
        Input::Log(log) => Finding::Log(OfLog::read(names, log.as_ref())),
        Input::Dump(dump) => {
            let found = OfDump::read(names.clone(), *dump, &sources, &policy);
            Finding::Dump(Box::new(found.with_context(|| format!("cannot diagnose {names}"))?))
        }
    })
}

/// One input; several files are parts of one split dump.
fn open(paths: &[PathBuf]) -> Result<Input> {
    match paths {
        [path] => Input::open(path),
        parts => Ok(Input::Dump(Box::new(vmcore::open(parts, &Hints::default())?))),
    }
}

fn names(paths: &[PathBuf]) -> String {
    let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    names.join(", ")
}
