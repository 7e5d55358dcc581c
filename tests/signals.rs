//! What a signal to the lab leaves behind: no guest, no guard, no files.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use corpus::lab::{Kernel, Snapshot, VmConfig};

/// Process ids whose command line names a folder.
fn processes_naming(folder: &Path) -> Vec<u32> {
    let name = folder.to_str().unwrap();
    let ids = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = ids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(name)
    })
    .collect()
}

fn wait_until(what: &str, limit: Duration, mut test: impl FnMut() -> bool) {
    let until = Instant::now() + limit;
    while !test() {
        assert!(Instant::now() < until, "{what}: not within {limit:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_lab_that_is_ended_by_a_signal_leaves_nothing_running() {
    // Else the lab would be ended while it boots.
    let kernel = Kernel::find("6.1").unwrap();
    Snapshot::cached(&VmConfig::new(kernel)).unwrap();
    for (signal, status) in [("TERM", 143), ("INT", 130)] {
        let folder = tempfile::tempdir().unwrap();
        let mut lab: Child = Command::new(env!("CARGO_BIN_EXE_defib"))
            .args(["corpus", "sitting", "--count", "1000", "--json"])
            .env("TMPDIR", folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // QEMU and the guard both name the run's folder.
        let both = || processes_naming(folder.path()).len() >= 2;
        wait_until("guest and guard", Duration::from_secs(120), both);
        let kill = Command::new("kill").args(["-s", signal, &lab.id().to_string()]).status();
        assert!(kill.unwrap().success());
        let mut ended = None;
        wait_until("the lab's end", Duration::from_secs(20), || {
            ended = lab.try_wait().unwrap();
            ended.is_some()
        });
        assert_eq!(ended.and_then(|it| it.code()), Some(status), "SIG{signal}");
        let none = || processes_naming(folder.path()).is_empty();
        wait_until("the guest's end", Duration::from_secs(10), none);
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
