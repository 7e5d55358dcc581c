//! What one input tells: its crashes, or why it can't be read. No input ends the command, whatever is in it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::SystemTime;

use anyhow::Result;
use diagnose::console::{self, Report};
use diagnose::triage::Sighting;
use diagnose::{Offender, vmcore::Vmcore};
use guard::KnowledgeSources;
use quarantine::Policy;
use serde::{Deserialize, Serialize};

use crate::offline::{Crash, Input, of_dump};

/// What was seen in an input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// Crashes; none is fine.
    Crashes(Vec<Sighting>),
    /// Nothing, and why.
    Unreadable(String),
}

/// Looks at inputs.
pub struct Looker {
    knowledge: KnowledgeSources,
    policy: Policy,
}

impl Looker {
    pub fn new(knowledge: KnowledgeSources) -> Self {
        Self { knowledge, policy: Policy::default() }
    }

    /// Looks at one.
    pub fn look(&self, path: &Path) -> Seen {
        // Readers must not panic; if one does, the other inputs are read all the same.
        match catch_unwind(AssertUnwindSafe(|| self.crashes(path))) {
            Ok(Ok(crashes)) => Seen::Crashes(crashes),
            Ok(Err(error)) => Seen::Unreadable(format!("{error:#}")),
            Err(_) => Seen::Unreadable("its reader failed (a bug of defib)".to_owned()),
        }
    }

    fn crashes(&self, path: &Path) -> Result<Vec<Sighting>> {
        let input = Input::open(path)?;
        let seen = path.metadata()?.modified().ok();
        match input {
            Input::Log(log) => Ok(in_log(log.as_ref(), path, seen)),
            Input::Dump(dump) => Ok(self.in_dump(*dump, path, seen)?.into_iter().collect()),
        }
    }

    fn in_dump(
        &self,
        mut dump: Vmcore,
        path: &Path,
        seen: Option<SystemTime>,
    ) -> Result<Option<Sighting>> {
        let crash = of_dump(&mut dump, &self.knowledge, &self.policy)?;
        Ok(crash.map(|Crash { diagnosis, release, .. }| Sighting {
            offender: diagnosis.offender.as_ref().map(offender),
            signature: diagnosis.signature,
            title: diagnosis.title,
            release,
            seen,
            example: path.display().to_string(),
        }))
    }
}

/// The crashes of a log. One that follows another is as likely as not its effect, and is not counted.
fn in_log(log: &[u8], path: &Path, seen: Option<SystemTime>) -> Vec<Sighting> {
    let reports = console::read(log);
    let only = reports.iter().all(|report| report.follower);
    let counted = reports.into_iter().enumerate();
    let counted = counted.filter(|(index, report)| !report.follower || only && *index == 0);
    counted.map(|(_, report)| sighting(report, path, seen)).collect()
}

fn sighting(report: Report, path: &Path, seen: Option<SystemTime>) -> Sighting {
    Sighting {
        offender: report.offender(),
        signature: report.signature,
        title: report.title,
        release: report.release,
        seen,
        example: format!("{}:{}", path.display(), report.first_line),
    }
}

fn offender(offender: &Offender) -> String {
    match offender {
        Offender::Driver { module, function, .. } => format!("{function} [{module}]"),
        Offender::Process { function, .. } | Offender::Kernel { function, .. } => function.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::sample::OOPS;

    fn looker() -> Looker {
        Looker::new(KnowledgeSources::default())
    }

    #[test]
    fn a_log_tells_its_crash_with_line_and_offender() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, format!("[    1.0] hello\n{OOPS}")).unwrap();
        let Seen::Crashes(crashes) = looker().look(&path) else { panic!("unreadable") };
        assert_eq!(crashes.len(), 1);
        assert_eq!(crashes[0].offender.as_deref(), Some("toy_write [toy]"));
        assert_eq!(crashes[0].release.as_deref(), Some("6.1.0-1-amd64"));
        assert_eq!(crashes[0].example, format!("{}:2", path.display()));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("core");
        std::fs::write(&path, b"\x7fELF\x02\x01\x01\x00 cut").unwrap();
        assert!(matches!(looker().look(&path), Seen::Unreadable(_)));
        assert!(matches!(looker().look(&folder.path().join("gone")), Seen::Unreadable(_)));
    }
}
