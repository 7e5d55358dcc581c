//! What a guard does to a VM besides repairing it: attach, detach, be killed, be refused. Real guests.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use corpus::guarded::{Guard, GuardConfig};
use corpus::lab::{Backend, Kernel, Machine, Snapshot, Vm, VmConfig};
use serde_json::{Value, json};

const DEFIB: &str = env!("CARGO_BIN_EXE_defib");
const LIMIT: Duration = Duration::from_secs(120);

/// Guests need both cores: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn config() -> VmConfig {
    VmConfig::new(Kernel::find("6.1").unwrap())
}

fn vm(config: &VmConfig) -> Vm {
    Snapshot::cached(config).unwrap().restore().unwrap()
}

fn start(vm: &Vm, incidents: &Path, more: &[&str]) -> Guard {
    let vmlinux = vm.config().kernel.vmlinux().unwrap();
    let mut arguments = vec!["--vmlinux".into(), vmlinux.display().to_string()];
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    let guard = GuardConfig { program: DEFIB.into(), incidents: incidents.to_owned(), arguments };
    Guard::start(&guard, &vm.qmp()).unwrap()
}

fn armed(vm: &Vm, incidents: &Path) -> Guard {
    let mut guard = start(vm, incidents, &[]);
    guard.await_event("armed", LIMIT).unwrap();
    guard
}

/// A guard that is expected to give up by itself.
fn refused(arguments: &[&str]) -> (i32, String) {
    let Output { status, stderr, .. } =
        Command::new(DEFIB).arg("guard").args(arguments).stdin(Stdio::null()).output().unwrap();
    (status.code().unwrap_or(-1), String::from_utf8_lossy(&stderr).into_owned())
}

fn status(vm: &mut Vm) -> String {
    let answer = vm.control().command("query-status", json!({})).unwrap();
    answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn stub(vm: &mut Vm) -> bool {
    let answer = vm.control().command("query-chardev", json!({})).unwrap();
    let chardevs = answer.as_array().cloned().unwrap_or_default();
    chardevs.iter().any(|chardev| chardev.get("label").and_then(Value::as_str) == Some("gdb"))
}

fn crash_is_repaired(vm: &mut Vm, guard: &mut Guard) {
    vm.agent().command("load crash_chardev").unwrap();
    let answer = vm.agent().command("crash crash_chardev write null-deref 20000").unwrap();
    assert_eq!(answer.field("errno"), Some("EIO"), "{}", answer.text());
    guard.await_event("repaired", LIMIT).unwrap();
}

#[test]
fn sigterm_detaches_without_a_trace() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut vm = vm(&config());
    let log_before = vm.agent().command("dmesg 100000").unwrap();
    let guard = armed(&vm, folder.path());
    assert!(guard.detach().unwrap().success());
    assert_eq!(status(&mut vm), "running");
    assert!(!stub(&mut vm), "the gdb stub is still on");
    assert_eq!(vm.agent().command("dmesg 100000").unwrap().text(), log_before.text());
}

#[test]
fn after_sigkill_the_next_guard_goes_on() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut vm = vm(&config());
    for delay in [0, 20, 60, 150, 400] {
        let mut guard = start(&vm, folder.path(), &[]);
        guard.await_event("attached", LIMIT).unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        let pid = rustix::process::Pid::from_raw(guard.pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    let mut guard = armed(&vm, folder.path());
    assert!(vm.agent().answers(Duration::from_secs(5)));
    crash_is_repaired(&mut vm, &mut guard);
    assert!(guard.detach().unwrap().success());
}

#[test]
fn a_second_guard_is_refused() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let vm = vm(&config());
    let guard = armed(&vm, folder.path());
    let (code, said) = refused(&["--qmp", vm.qmp().to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(said.contains("another guard"), "{said}");
    assert!(guard.detach().unwrap().success());
}

#[test]
fn a_wrong_vmlinux_is_refused_and_nothing_is_left() {
    let _alone = alone();
    let mut vm = vm(&config());
    let other = Kernel::find("6.12").unwrap().vmlinux().unwrap();
    let (code, said) =
        refused(&["--qmp", vm.qmp().to_str().unwrap(), "--vmlinux", other.to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(said.contains("build id"), "{said}");
    assert_eq!(status(&mut vm), "running");
    assert!(!stub(&mut vm));
}

#[test]
fn what_is_no_qmp_socket_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chatty.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        use std::io::Write;
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"220 mail.example ESMTP\r\n");
        }
    });
    let (code, said) = refused(&["--qmp", path.to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(said.contains("not a QMP socket"), "{said}");
    server.join().unwrap();
    let (code, said) = refused(&["--qmp", "/nonexistent/qmp.sock"]);
    assert_eq!(code, 2);
    assert!(said.contains("can't connect"), "{said}");
}

#[test]
fn a_paused_vm_and_a_foreign_stub_are_left_alone() {
    let _alone = alone();
    let mut vm = vm(&config());
    vm.control().command("stop", json!({})).unwrap();
    let (code, said) = refused(&["--qmp", vm.qmp().to_str().unwrap()]);
    assert_eq!((code, status(&mut vm).as_str()), (2, "paused"), "{said}");
    vm.control().command("cont", json!({})).unwrap();
    let socket = vm.run_dir().join("owner.gdb");
    let command = format!("gdbserver unix:{},server=on,wait=off", socket.display());
    let hmp = json!({ "command-line": command });
    vm.control().command("human-monitor-command", hmp).unwrap();
    let (code, said) = refused(&["--qmp", vm.qmp().to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(said.contains("--gdb"), "{said}");
    assert_eq!(status(&mut vm), "running");
}

#[test]
fn vms_without_shared_memory_or_slots_are_repaired_too() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut bare = config();
    bare.backend = Backend::Anonymous;
    bare.slots = false;
    let mut memfd = config();
    memfd.backend = Backend::Memfd;
    memfd.machine = Machine::Q35;
    for config in [bare, memfd] {
        let mut vm = vm(&config);
        let mut guard = armed(&vm, folder.path());
        crash_is_repaired(&mut vm, &mut guard);
        vm.agent().command("load crash_locks").unwrap();
        let answer = vm.agent().command("crash crash_locks write mutex 20000").unwrap();
        assert_eq!(answer.field("errno"), Some("EIO"), "{}", answer.text());
        guard.await_event("repaired", LIMIT).unwrap();
        assert!(guard.detach().unwrap().success());
    }
}

#[test]
fn a_guest_that_reboots_is_guarded_again() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.reboot = true;
    let mut vm = vm(&config);
    let mut guard = armed(&vm, folder.path());
    vm.control().command("system_reset", json!({})).unwrap();
    guard.await_event("reset", LIMIT).unwrap();
    guard.await_event("armed", LIMIT).unwrap();
    assert!((0..120).any(|_| vm.agent().answers(Duration::from_secs(1))), "the guest is not back");
    crash_is_repaired(&mut vm, &mut guard);
    assert!(guard.detach().unwrap().success());
}

/// Locks that name no owner: left taken, whoever wants the page or the buffer would wait for ever.
#[test]
fn a_call_with_a_locked_page_or_buffer_in_hand_is_not_abandoned() {
    let _alone = alone();
    for (fault, reason) in [("fs-page-lock", "the page at "), ("fs-buffer-lock", "the buffer at ")]
    {
        let folder = tempfile::tempdir().unwrap();
        let mut vm = vm(&config());
        let mut guard = armed(&vm, folder.path());
        vm.agent().command("load crash_fs").unwrap();
        let deed = format!("crash crash_fs in-fsync:/run/note {fault} 3000");
        assert!(vm.agent().command_within(&deed, Duration::from_secs(5)).is_err(), "{fault}");
        let event = guard.await_any(&["repaired", "refused"], LIMIT).unwrap();
        assert_eq!(event["event"], "refused", "{fault}: {event}");
        assert!(event.to_string().contains(reason), "{fault}: {event}");
    }
}

#[test]
fn a_dry_run_writes_nothing_and_lets_the_guest_die_its_own_death() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut vm = vm(&config());
    let mut guard = start(&vm, folder.path(), &["--dry-run"]);
    guard.await_event("armed", LIMIT).unwrap();
    vm.agent().command("load crash_chardev").unwrap();
    let answer = vm
        .agent()
        .command_within("crash crash_chardev write null-deref 3000", Duration::from_secs(5));
    assert!(answer.is_err(), "the guest survived a dry run");
    let diagnosis = guard.await_event("diagnosis", LIMIT).unwrap();
    guard.await_event("refused", LIMIT).unwrap();
    frames_agree(&diagnosis, &vm.console());
    assert_eq!(guard.detach().unwrap().code(), Some(1));
}

/// The kernel's own call trace names the same functions in the same order ("?" marks guesses of its).
fn frames_agree(diagnosis: &Value, console: &str) {
    let trace: Vec<&str> = console
        .lines()
        .skip_while(|line| !line.contains("Call Trace:"))
        .filter_map(|line| line.split("] ").last())
        .map(str::trim)
        .filter(|line| line.contains("+0x") && !line.starts_with('?') && !line.starts_with("RIP"))
        .filter_map(|line| line.split('+').next())
        .take_while(|name| !name.starts_with("entry_SYSCALL"))
        .collect();
    let fault = diagnosis.get("fault_frame").and_then(Value::as_u64).unwrap_or(0) as usize;
    let frames = diagnosis.get("frames").and_then(Value::as_array).unwrap();
    let ours: Vec<&str> = frames[fault..]
        .iter()
        .filter_map(|frame| frame.get("function").and_then(Value::as_str))
        .collect();
    let names: Vec<&str> = trace.iter().copied().filter(|name| ours.contains(name)).collect();
    assert!(names.len() >= 4, "kernel: {trace:?}\nours: {ours:?}");
    let in_order: Vec<&str> = ours.iter().copied().filter(|name| trace.contains(name)).collect();
    assert_eq!(in_order, names, "kernel: {trace:?}\nours: {ours:?}");
}
