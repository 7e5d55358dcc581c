//! `defib image`, `defib plan` and `defib triage` as a user types them, on a real guest and its real dump.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use corpus::lab::{Kernel, Snapshot, VmConfig};
use serde_json::{Value, json};

fn defib(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_defib")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn image_and_plan() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = Kernel::find("6.1").unwrap();
    let vmlinux = kernel.vmlinux().unwrap();
    let mut vm = Snapshot::cached(&VmConfig::new(kernel)).unwrap().restore().unwrap();
    let (qmp, image) = (vm.qmp(), folder.path().join("vm.defib"));
    let vmlinux = ["--vmlinux", text(&vmlinux)];

    let build =
        [&["image", "build", "--qmp", text(&qmp), "-o", text(&image)][..], &vmlinux].concat();
    let (code, _, stderr) = defib(&build);
    assert_eq!(code, 0, "{stderr}");
    let (code, stdout, stderr) = defib(&["image", "inspect", text(&image)]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("guest layer: slide 0x") && stdout.contains("virtio_blk"), "{stdout}");
    let (code, stdout, stderr) = defib(&["image", "verify", text(&image), "--qmp", text(&qmp)]);
    assert_eq!((code, stdout.lines().last()), (0, Some("clean")), "{stdout}{stderr}");
    std::fs::write(&image, b"no image").unwrap();
    assert_eq!(defib(&["image", "inspect", text(&image)]).0, 2);

    let dump = folder.path().join("vmcore");
    vm.agent().command("load crash_chardev").unwrap();
    let crash = "crash crash_chardev write null-deref 1000";
    assert!(vm.agent().command_within(crash, Duration::from_secs(3)).is_err(), "no crash");
    let arguments = json!({ "paging": false, "protocol": format!("file:{}", dump.display()) });
    vm.control().command("dump-guest-memory", arguments).unwrap();
    let (code, stdout, stderr) =
        defib(&[&["plan", text(&dump), "--format", "json"][..], &vmlinux].concat());
    // The kernel is inside panic() by now; planned is as of the crash.
    assert_eq!(code, 0, "{stderr}");
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(answer.pointer("/diagnosis/class/kind"), Some(&json!("null_dereference")));
    assert_eq!(answer.pointer("/diagnosis/offender/module"), Some(&json!("crash_chardev")));
    assert_eq!(answer.pointer("/plan/rung"), Some(&json!("return_error")));
    assert_eq!(answer.pointer("/plan/refused").and_then(Value::as_array).map(Vec::len), Some(2));

    // The dump and the console tell of one crash; what is neither is said.
    std::fs::copy(vm.serial_log(), folder.path().join("console.log")).unwrap();
    std::fs::write(folder.path().join("cut"), b"\x7fELF\x02\x01\x01").unwrap();
    let kept = tempfile::NamedTempFile::new().unwrap();
    let arguments =
        ["triage", text(folder.path()), "--format", "json", "--resume", text(kept.path())];
    for _ in 0..2 {
        let (code, stdout, stderr) = defib(&[&arguments[..], &vmlinux].concat());
        assert_eq!(code, 1, "{stderr}");
        let answer: Value = serde_json::from_str(&stdout).unwrap();
        let number = |path: &str| answer.pointer(path).and_then(Value::as_u64);
        assert_eq!(number("/buckets/0/count"), Some(2), "{stdout}");
        assert_eq!(answer.pointer("/buckets/1"), None, "{stdout}");
        assert_eq!(
            answer.pointer("/buckets/0/offender"),
            Some(&json!("fault_null_deref [crash_chardev]"))
        );
        let unreadable = answer.pointer("/unreadable/0/path").and_then(Value::as_str);
        assert!(unreadable.is_some_and(|path| path.ends_with("cut")), "{stdout}");
    }
}
