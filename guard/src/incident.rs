//! The folder on disk that records one incident: `incident.json` for scripts (schema in
//! `docs/incident.md`), `report.txt` and `report.html` for people. Written after the guest runs again, never before.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{Error, whole_file};

/// Version of the schema of `incident.json`; raised when a field changes its meaning.
const SCHEMA: u32 = 1;

/// One incident, open or closed.
pub struct Incident {
    folder: PathBuf,
    record: Map<String, Value>,
    report: String,
    page: String,
}

impl Incident {
    /// Makes a new folder under `incidents`, named by time and signature.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn open(incidents: &Path, signature: &str) -> Result<Self, Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = timestamp(now.as_secs());
        let safe: String =
            signature.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
        let name = format!("{}-{:03}-{safe}", stamp.replace([':', '-'], ""), now.subsec_millis());
        let folder = unused(&incidents.join(name));
        fs::create_dir_all(&folder)
            .map_err(|source| Error::IncidentFolder { path: folder.clone(), source })?;
        let mut record = Map::new();
        record.insert("schema".into(), json!(SCHEMA));
        record.insert("opened".into(), json!(stamp));
        Ok(Self { folder, record, report: String::new(), page: String::new() })
    }

    /// Where it is.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Adds a field to `incident.json`.
    pub fn set(&mut self, field: &str, value: impl Serialize) {
        let value = serde_json::to_value(value).unwrap_or_else(|error| json!(error.to_string()));
        self.record.insert(field.into(), value);
    }

    /// Adds a section to `report.txt`.
    pub fn section(&mut self, heading: &str, text: &str) {
        if !self.report.is_empty() {
            self.report.push('\n');
        }
        if !heading.is_empty() {
            self.report.push_str(&format!("{heading}\n{}\n", "-".repeat(heading.chars().count())));
        }
        self.report.push_str(text.trim_end());
        self.report.push('\n');
    }

    /// What `report.html` holds.
    pub fn set_page(&mut self, page: String) {
        self.page = page;
    }

    /// Writes the files, each by rename so that a reader never sees half of one.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self) -> Result<(), Error> {
        let json = serde_json::to_vec_pretty(&self.record)
            .map_err(|source| Error::Json { what: "incident.json", source })?;
        replace(&self.folder.join("incident.json"), &json)?;
        replace(&self.folder.join("report.html"), self.page.as_bytes())?;
        replace(&self.folder.join("report.txt"), self.report.as_bytes())
    }
}

/// `folder`, or with a number behind it the first that does not exist.
fn unused(folder: &Path) -> PathBuf {
    let numbered = |n: u32| PathBuf::from(format!("{}-{n}", folder.display()));
    let candidates = std::iter::once(folder.to_path_buf()).chain((2..1000).map(numbered));
    let mut free = candidates.filter(|candidate| !candidate.exists());
    free.next().unwrap_or_else(|| folder.to_path_buf())
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let write = |file: &mut fs::File| {
        file.write_all(bytes)?;
        file.sync_all()
    };
    whole_file::replace(path, write)
        .map_err(|source| Error::IncidentFile { path: path.to_owned(), source })
}

/// UTC time as RFC 3339, seconds. Days to date after Hinnant's "civil_from_days".
fn timestamp(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_rfc_3339() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00Z");
        assert_eq!(timestamp(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(timestamp(1_795_351_487), "2026-11-22T12:44:47Z");
    }

    #[test]
    fn two_incidents_of_one_moment_get_two_folders() {
        let root = tempfile::tempdir().unwrap();
        let mut first = Incident::open(root.path(), "a/../b").unwrap();
        first.set("x", 1);
        first.section("Heading", "text");
        first.write().unwrap();
        let again = unused(first.folder());
        assert_ne!(first.folder(), again);
        assert!(first.folder().starts_with(root.path()));
        let text = fs::read_to_string(first.folder().join("report.txt")).unwrap();
        assert_eq!(text, "Heading\n-------\ntext\n");
    }
}
