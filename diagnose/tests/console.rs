//! Every log of tests/console against the titles and guilty files that stand at its head. What the logs are
//! and where they come from: tests/console/README.md.

use std::fs;
use std::path::{Path, PathBuf};

use defib_diagnose::console;

fn logs() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/console");
    let entries =
        fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("an entry").path());
    let mut paths: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|it| it == "log")).collect();
    paths.sort();
    paths
}

/// What is expected, and the log itself.
fn parts(bytes: &[u8]) -> (Vec<String>, &[u8]) {
    let end = bytes.windows(2).position(|pair| pair == b"\n\n").expect("a head");
    let head = String::from_utf8_lossy(&bytes[..end]);
    (head.lines().map(str::to_owned).collect(), &bytes[end + 2..])
}

/// What was read, in the form of a head.
fn found(log: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    for report in console::read(log) {
        lines.push(format!("TITLE: {}", report.title));
        lines.extend(report.file.map(|file| format!("FILE: {file}")));
        lines.extend(report.corrupted.map(|_| "CORRUPTED: yes".to_owned()));
    }
    lines
}

#[test]
fn titles_and_guilty_files() {
    let paths = logs();
    assert!(paths.len() > 100, "{} logs", paths.len());
    let wrong: Vec<String> = paths
        .iter()
        .filter_map(|path| {
            let bytes = fs::read(path).expect("a log");
            let (expected, log) = parts(&bytes);
            let found = found(log);
            let name = path.file_name()?.to_string_lossy().into_owned();
            (found != expected).then(|| format!("{name}: {found:?}, not {expected:?}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_log_that_ends_anywhere_is_read() {
    for path in logs() {
        let bytes = fs::read(&path).expect("a log");
        let (_, log) = parts(&bytes);
        for end in (0..log.len()).step_by(97) {
            let reports = console::read(&log[..end]);
            assert!(
                reports.iter().all(|report| report.title.len() <= 120 && !report.title.is_empty())
            );
        }
    }
}
