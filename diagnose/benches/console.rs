//! How fast console logs are read: 1,000 logs of about 20 KB, `cargo bench -p defib-diagnose --bench console`.
//! Prints figures; a reader judges them.

use std::fs;
use std::path::Path;
use std::time::Instant;

use defib_diagnose::console;

/// Logs, and bytes of each.
const LOGS: usize = 1000;
const SIZE: usize = 20 << 10;
const ROUNDS: usize = 5;

/// What a console shows while nothing happens.
const CALM: &str = "[   12.345678] virtio_net virtio0 eth0: link becomes ready: state 0x1 -> 0x2\n";

/// A log of a boot that ends in one of the reports of tests/console.
fn log(report: &[u8]) -> Vec<u8> {
    let calm = SIZE.saturating_sub(report.len()) / CALM.len();
    let mut log = CALM.repeat(calm).into_bytes();
    log.extend_from_slice(report);
    log
}

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/console");
    let mut paths: Vec<_> = fs::read_dir(folder)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.retain(|path| path.extension().is_some_and(|it| it == "log"));
    paths.sort();
    let reports: Vec<_> = paths.iter().map(|path| fs::read(path).expect("a log")).collect();
    let logs: Vec<_> = (0..LOGS).map(|index| log(&reports[index % reports.len()])).collect();
    let bytes: usize = logs.iter().map(Vec::len).sum();
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let found: usize = logs.iter().map(|log| console::read(log).len()).sum();
            assert!(found >= LOGS, "{found} reports");
            start.elapsed()
        })
        .collect();
    times.sort();
    let median = times[ROUNDS / 2].as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = bytes as f64 / median / 1e6;
    println!(
        "{LOGS} logs, {bytes} bytes: median {:.1} ms, {rate:.0} MB/s, one thread",
        median * 1e3
    );
}
