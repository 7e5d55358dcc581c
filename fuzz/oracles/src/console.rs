//! What must hold of the reader of console logs.

use diagnose::console;

/// Reports come in the order of the log and lie within it; titles are short, printable and not empty; the same
/// log says the same again; nothing of a log is repeated without bound.
///
/// # Panics
/// When that does not hold.
pub fn console(data: &[u8]) {
    let reports = console::read(data);
    let lines = data.iter().filter(|byte| **byte == b'\n').count() + 1;
    assert!(reports.is_sorted_by_key(|report| report.first_line));
    for report in &reports {
        assert!((1..=lines).contains(&report.first_line), "line {}", report.first_line);
        assert!(report.lines <= lines);
        assert!((1..=120).contains(&report.title.len()), "{:?}", report.title);
        assert!(
            report.title.bytes().all(|byte| (b' '..=b'~').contains(&byte)),
            "{:?}",
            report.title
        );
        assert_eq!(report.signature.len(), 12);
        assert!(report.frames.len() <= lines + 1);
    }
    assert!(reports.iter().skip(1).all(|report| report.follower));
    let again: Vec<_> =
        console::Reports::new(data).map(|report| (report.title, report.signature)).collect();
    assert!(
        again.into_iter().eq(reports.into_iter().map(|report| (report.title, report.signature)))
    );
}
