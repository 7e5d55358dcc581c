//! The `defib` command: reads arguments, runs one sub-command, turns its end into an exit code.

mod cli;
mod corpus_command;
mod demo;
mod diagnose;
mod guard_command;
mod image;
mod injections;
mod knowledge;
mod offline;
mod plan;
mod signals;
mod sitting;
mod target;
mod triage;

use std::process::ExitCode;

use clap::Parser;

/// How a sub-command ended, as an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything asked for was done.
    Done,
    /// The guest could not be saved, or a check found something.
    NotSaved,
}

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    let result = match arguments.command {
        cli::Command::Guard(arguments) => guard_command::run(&arguments),
        cli::Command::Image(arguments) => image::run(&arguments),
        cli::Command::Diagnose(arguments) => diagnose::run(&arguments),
        cli::Command::Plan(arguments) => plan::run(&arguments),
        cli::Command::Triage(arguments) => triage::run(&arguments),
        cli::Command::Corpus(arguments) => corpus_command::run(&arguments),
        cli::Command::Demo(arguments) => demo::run(&arguments),
    };
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::NotSaved) => ExitCode::from(1),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("defib: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// A reader that went away is no error of ours.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
