//! Kernel console logs as a source of diagnoses: every report (oops, panic, warning, stall, sanitizer, lockdep)
//! with title, blamed function, guilty file and facts. Any bytes are a log; no file is opened here.
//!
//! Titles, blamed functions and guilty files follow what kernel fuzzing dashboards (syzkaller's `pkg/report`)
//! print for the same text, with these differences on purpose:
//! - a log without stacks gets no report for a `WARNING:` or `INFO:` line that no rule knows: user space prints
//!   such lines;
//! - every report of a log is told, not the first alone;
//! - when the line of the instruction pointer is missing, the call trace is looked at;
//! - a hard lockup and an oops whose first line is lost have a title.

mod blame;
mod body;
mod bucket;
mod bug_rules;
mod facts;
mod frame;
mod guilty;
mod heads;
mod line;
mod reader;
mod report;
mod rule;
mod skip;
mod title;
mod warning_rules;

pub use body::Corruption;
pub use frame::Frame;
pub use line::Caller;
pub use reader::Reports;
pub use report::Report;

/// Every report of a log, in the order in which they begin.
#[must_use]
pub fn read(bytes: &[u8]) -> Vec<Report> {
    Reports::new(bytes).collect()
}

#[cfg(test)]
mod tests;
