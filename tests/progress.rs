//! Guests that are busy, idle or paused under guard: none of them may be taken for a guest that hangs.

use std::path::Path;
use std::time::{Duration, Instant};

use corpus::guarded::{Guard, GuardConfig};
use corpus::lab::{Kernel, Snapshot, Vm, VmConfig};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);

/// What a driver does legitimately: four seconds without a break and eight with breaks, in one call.
const BUSY: &str = "crash crash_hang write busy 90000";
/// A program that computes, and one that asks the kernel for long copies.
const PROGRAMS: &str = "exec (timeout 7 sh -c 'while :; do :; done' & \
                        timeout 7 dd if=/dev/zero of=/dev/null bs=64M 2>/dev/null & wait) ; true";

/// A program that takes page faults in a driver's mapping for twenty seconds, each of which needs three tries, by
/// itself and in long calls to the kernel.
const SWEEP: &str = "crash crash_fops sweep:/dev/crash_fops hesitate 90000";

/// A guest with a driver, under guard.
fn guarded(kernel: &str, driver: &str, incidents: &Path) -> (Vm, Guard) {
    let config = VmConfig::new(Kernel::find(kernel).unwrap());
    let mut vm = Snapshot::cached(&config).unwrap().restore().unwrap();
    vm.agent().command(&format!("load {driver}")).unwrap();
    let vmlinux = vm.config().kernel.vmlinux().unwrap();
    let guard = GuardConfig {
        program: env!("CARGO_BIN_EXE_defib").into(),
        incidents: incidents.to_owned(),
        arguments: vec!["--vmlinux".into(), vmlinux.display().to_string()],
    };
    let mut guard = Guard::start(&guard, &vm.qmp()).unwrap();
    guard.await_event("armed", LIMIT).unwrap();
    (vm, guard)
}

/// Nothing was done to the guest.
fn assert_left_alone(mut guard: Guard) {
    let events = guard.drain();
    let name = |event: &Value| event.get("event").and_then(Value::as_str).map(str::to_owned);
    let names: Vec<String> = events.iter().filter_map(name).collect();
    for wrong in ["crash", "plan", "repaired", "refused"] {
        assert!(!names.iter().any(|name| name == wrong), "{events:?}");
    }
    assert!(guard.detach().unwrap().success());
}

#[test]
fn a_process_that_faults_all_the_time_and_gets_on_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (mut vm, guard) = guarded("6.1", "crash_fops", folder.path());
    vm.agent().command("workload start").unwrap();
    let answer = vm.agent().command_within(SWEEP, LIMIT).unwrap();
    assert_eq!(answer.field("outcome"), Some("returned"), "{}", answer.text());
    assert_eq!(answer.field("value"), Some("0"), "{}", answer.text());
    vm.agent().command("workload stop").unwrap();
    assert_left_alone(guard);
}

#[test]
fn a_busy_an_idle_and_a_paused_guest_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (mut vm, guard) = guarded("6.1", "crash_hang", folder.path());
    let answer = vm.agent().command_within(BUSY, LIMIT).unwrap();
    assert_eq!(answer.field("outcome"), Some("returned"), "{}", answer.text());
    assert_eq!(answer.field("errno"), Some("0"), "{}", answer.text());
    vm.agent().command_within(PROGRAMS, LIMIT).unwrap();
    // Idle, and then paused by its owner for longer than any limit.
    std::thread::sleep(Duration::from_secs(7));
    vm.control().command("stop", json!({})).unwrap();
    std::thread::sleep(Duration::from_secs(7));
    vm.control().command("cont", json!({})).unwrap();
    let resumed = Instant::now();
    while resumed.elapsed() < Duration::from_secs(7) {
        vm.agent().command("exec true").unwrap();
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_left_alone(guard);
}
