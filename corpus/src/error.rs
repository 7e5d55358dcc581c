//! The one error type of the crate. No recovery happens here; each variant carries what a reader of a
//! test log needs to see.

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// What the crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the lab could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No kernel of this series is in the cache.
    #[error("no {series} kernel under {}: run scripts/setup", cache.display())]
    NoKernel {
        /// The series asked for, as in `6.1`.
        series: String,
        /// The folder that was searched.
        cache: PathBuf,
    },
    /// A file operation failed.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// The system's word.
        source: io::Error,
    },
    /// A program of the build or of the disk check failed.
    #[error("{program} failed ({status}):\n{output}")]
    Program {
        /// The program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it printed.
        output: String,
    },
    /// QEMU ended when it should have been running.
    #[error("QEMU ended ({status}): {output}")]
    QemuEnded {
        /// How it ended.
        status: ExitStatus,
        /// The end of its own messages.
        output: String,
    },
    /// QEMU refused a command or spoke something that is not QMP.
    #[error("QMP {command}: {reason}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's description, or what was wrong with its answer.
        reason: String,
    },
    /// Something took too long.
    #[error("{what} did not happen within {limit:?}; the console's end:\n{console}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long it was waited for.
        limit: Duration,
        /// The end of the guest's console, where there is one.
        console: String,
    },
    /// A nested host, whose processor QEMU emulates, stopped answering: nothing is known of what ran in it.
    #[error("the nested host was silent for {limit:?}; its console's end:\n{console}")]
    HostSilent {
        /// How long it was waited for.
        limit: Duration,
        /// The end of its console.
        console: String,
    },
    /// The guest's agent answered `err`.
    #[error("guest: {command}: {reason}")]
    Agent {
        /// The command line.
        command: String,
        /// The agent's text.
        reason: String,
    },
    /// The agent's answer lacks a field, or the field is not a number.
    #[error("the guest's answer has no usable {field}: {answer}")]
    Answer {
        /// The field.
        field: &'static str,
        /// The whole answer.
        answer: String,
    },
    /// The guard did not say or do what was waited for.
    #[error("the guard did not come to {waited_for}; it said:\n{said}")]
    Guard {
        /// The events or the end that was waited for.
        waited_for: String,
        /// The guard's messages so far.
        said: String,
    },
    /// A module's file is not what is expected of one.
    #[error("module {name}: {reason}")]
    Module {
        /// The module, or a function of it.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A guest for injections is not in the state that they start from.
    #[error("the guest for {target} is not ready: {reason}")]
    NotReady {
        /// The driver.
        target: String,
        /// What is missing.
        reason: String,
    },
    /// A driver's source lacks the marker of a case, or has it twice.
    #[error("{driver}: the marker of case {case} is there {count} times")]
    Marker {
        /// The driver.
        driver: String,
        /// The case.
        case: String,
        /// How often the marker was found.
        count: usize,
    },
}

impl Error {
    /// Wraps a file operation's error; for `map_err`.
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }
}
