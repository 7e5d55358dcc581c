//! The lab's nested KVM host, end to end: a test guest of hardware virtualisation that stops at a
//! breakpoint, in hosts of both series. What defib does with KVM is tested where that is.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use defib_corpus::Error;
use defib_corpus::lab::Given;
use defib_corpus::lab::Kernel;
use defib_corpus::lab::Nested;

/// For what takes milliseconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Compiles the probe, which is linked to libc as programs usually are.
fn probe(dir: &Path) -> PathBuf {
    let out = dir.join("probe");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nested_probe.c");
    let status = Command::new("gcc").args(["-O1", "-Wall", "-o"]).args([&out, &source]).status();
    assert!(status.unwrap().success());
    out
}

fn host_runs_guests(series: &str) {
    let dir = tempfile::tempdir().unwrap();
    let given = [Given { name: "probe".to_owned(), path: probe(dir.path()) }];
    let mut host = Nested::start(&Kernel::find(series).unwrap(), &given).unwrap();
    let ended = host.run("./probe", LIMIT).unwrap();
    assert_eq!(ended.status, 0, "{}", ended.output);
    // Each line is one property that KVM on a processor has, and an emulator may lack.
    let expected = [
        "breakpoint at 100010, dr6 hit 1",
        "again at 100010",
        "with RF passed to port f4",
        "step to 100011",
        "int3 to its handler, port f5",
        "SSE and popcnt to port f6",
        "triple fault: shutdown",
    ];
    assert_eq!(ended.output.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn host_of_6_1_runs_guests_with_breakpoints() {
    host_runs_guests("6.1");
}

#[test]
fn host_of_6_12_runs_guests_with_breakpoints() {
    host_runs_guests("6.12");
}

#[test]
fn status_output_and_limit_of_commands() {
    let mut host = Nested::start(&Kernel::find("6.1").unwrap(), &[]).unwrap();
    let failed = host.run("echo out; echo err >&2; exit 3", LIMIT).unwrap();
    assert_eq!((failed.status, failed.output.as_str()), (3, "out\nerr\n"));
    let long = host.run("seq 20000", LIMIT).unwrap();
    assert_eq!(long.status, 0);
    assert_eq!(long.output.len(), 64 << 10);
    assert!(long.output.ends_with("\n19999\n20000\n"), "{}", &long.output[65_000..]);
    let endless = host.run("echo begun; sleep 1000", Duration::from_secs(1));
    assert!(matches!(endless, Err(Error::Timeout { console, .. }) if console == "begun\n"));
}
