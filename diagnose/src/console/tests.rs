//! The reader as a whole: several reports in one log, carriers, hostile bytes. Titles have golden logs in
//! tests/console.

use proptest::prelude::*;

use super::*;
use crate::CrashClass;
use crate::testing::{fault, frame};

const OOPS: &str = "\
BUG: kernel NULL pointer dereference, address: 0000000000000004
#PF: supervisor read access in kernel mode
#PF: error_code(0x0000) - not-present page
Oops: 0000 [#1] PREEMPT SMP NOPTI
CPU: 1 PID: 107 Comm: agent Tainted: G           OE      6.1.0-56-cloud-amd64 #1  Debian 6.1.192-2
RIP: 0010:bw.isra.0+0x8/0x10 [buggy]
Code: 8b 40 04 c3
RSP: 0018:ffffd250803dbaa8 EFLAGS: 00000246
Call Trace:
 <TASK>
 ? __die+0x1/0x2
 vfs_write+0x1c1/0x330
 ksys_write+0x63/0xe0
 </TASK>
Modules linked in: buggy(OE) virtio_net
---[ end trace 0000000000000000 ]---
Kernel panic - not syncing: Fatal exception
";

fn stamped(text: &str, prefix: &str) -> String {
    text.lines().map(|line| format!("{prefix}{line}\n")).collect()
}

#[test]
fn facts_of_an_oops() {
    let log = format!("Linux version 6.1.0-boot (x)\n{}", stamped(OOPS, "[   12.345678][  T107] "));
    let reports = read(log.as_bytes());
    assert_eq!(reports.len(), 1);
    let report = &reports[0];
    assert_eq!(report.title, "BUG: unable to handle kernel NULL pointer dereference in bw");
    assert_eq!(report.offender().as_deref(), Some("bw [buggy]"));
    assert_eq!(report.class, Some(CrashClass::NullDereference));
    assert_eq!(
        (report.cpu, report.pid, report.comm.as_deref()),
        (Some(1), Some(107), Some("agent"))
    );
    assert_eq!(report.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
    assert_eq!(report.caller, Some(Caller::Task(107)));
    assert_eq!(report.panic.as_deref(), Some("Fatal exception"));
    assert_eq!(report.modules, ["buggy", "virtio_net"]);
    assert_eq!(report.code.as_deref(), Some("8b 40 04 c3"));
    assert_eq!((report.first_line, report.follower, report.corrupted), (2, false, None));
    let trusted: Vec<_> =
        report.frames.iter().filter(|it| it.trusted).map(|it| it.function.as_str()).collect();
    assert_eq!(trusted, ["bw.isra.0", "vfs_write", "ksys_write"]);
}

#[test]
fn a_dump_of_the_same_crash_has_the_same_signature() {
    let frames = vec![
        frame("bw.isra.0", Some("buggy")),
        frame("vfs_write", None),
        frame("ksys_write", None),
    ];
    let dump = fault(frames, 0, crate::UnwindEnd::UserMode);
    let of_dump = crate::signature::id(Some(&CrashClass::NullDereference), &dump);
    assert_eq!(read(OOPS.as_bytes())[0].signature, of_dump);
}

#[test]
fn a_call_through_null_is_a_bad_call() {
    let log = OOPS.replace("supervisor read access", "supervisor instruction fetch");
    let log = log.replace("bw.isra.0+0x8/0x10 [buggy]", "0x0");
    let report = &read(log.as_bytes())[0];
    assert_eq!(report.class, Some(CrashClass::BadCall));
    assert_eq!(report.title, "BUG: unable to handle kernel NULL pointer dereference in vfs_write");
}

#[test]
fn followers_are_marked_and_ends_are_not_reports() {
    let log = format!("{}{}", stamped(OOPS, "[   12.345678] "), stamped(OOPS, "[   13.345678] "));
    let reports = read(log.as_bytes());
    let followers: Vec<_> = reports.iter().map(|report| report.follower).collect();
    assert_eq!(followers, [false, true]);
    assert_eq!(reports[1].first_line, OOPS.lines().count() + 1);
}

#[test]
fn a_log_without_reports_is_empty() {
    let calm = "[    1.000000] Linux version 6.1 (x)\n[    2.0] eth0: up\nWARNING: old config\nINFO: done\n";
    assert!(read(calm.as_bytes()).is_empty());
    assert!(read(b"").is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn any_bytes_are_a_log(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        for report in read(&bytes) {
            prop_assert!(!report.title.is_empty());
        }
    }

    #[test]
    fn damage_does_not_make_it_panic(
        cuts in proptest::collection::vec((0..OOPS.len(), any::<u8>()), 1..30),
        end in 0..OOPS.len(),
    ) {
        let mut bytes = stamped(OOPS, "[   12.345678] ").into_bytes();
        for (at, byte) in cuts {
            bytes[at] = byte;
        }
        bytes.truncate(end);
        for report in read(&bytes) {
            prop_assert!(report.title.len() <= 120);
            prop_assert!(report.frames.len() <= 257);
        }
    }
}
