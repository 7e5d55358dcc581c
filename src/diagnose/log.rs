//! All that a console log tells: the kernel's own reports in it. Less than a dump: nothing is checked against memory.

use diagnose::console::{self, Report};

/// What a log tells.
pub struct OfLog {
    /// Its name.
    pub name: String,
    /// Its reports, in the order in which they begin.
    pub reports: Vec<Report>,
}

impl OfLog {
    /// Reads one.
    pub fn read(name: String, log: &[u8]) -> Self {
        Self { name, reports: console::read(log) }
    }

    /// Index of the report to be read first: one that follows another is as likely as not its effect.
    pub fn cause(&self) -> Option<usize> {
        let first = self.reports.iter().position(|report| !report.follower);
        first.or_else(|| (!self.reports.is_empty()).then_some(0))
    }
}
