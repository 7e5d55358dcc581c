//! The lab itself, end to end: guests come up and back, the workload tells a lost byte and a stalled
//! member, the disk is checked, and cases bring a stock guest down in the function they name. Needs
//! what `scripts/setup` installs. The full list of cases is the ignored test at the end.

use std::time::Duration;

use defib_corpus::Error;
use defib_corpus::lab::Backend;
use defib_corpus::lab::Kernel;
use defib_corpus::lab::Snapshot;
use defib_corpus::lab::Vm;
use defib_corpus::lab::VmConfig;
use defib_corpus::scenario;
use defib_corpus::stock;

fn config(series: &str) -> VmConfig {
    VmConfig::new(Kernel::find(series).unwrap())
}

fn restored() -> Vm {
    Snapshot::cached(&config("6.1")).unwrap().restore().unwrap()
}

#[test]
fn a_guest_works_and_its_disk_is_clean() {
    let mut vm = restored();
    eprintln!("restored in {:?}", vm.took());
    let agent = vm.agent();
    agent.command("workload start").unwrap();
    let verified = agent.command("workload verify").unwrap();
    assert_eq!(verified.number("errors").unwrap(), 0, "{}", verified.text());
    assert_eq!(verified.number("stalled").unwrap(), 0, "{}", verified.text());
    let stopped = agent.command("workload stop").unwrap();
    assert_eq!(stopped.number("errors").unwrap(), 0, "{}", stopped.text());
    assert_eq!(stopped.number("stalled").unwrap(), 0, "{}", stopped.text());
    assert!(stopped.number("files").unwrap() > 0);
    assert_eq!(agent.command("splats").unwrap().number("splats").unwrap(), 0);
    vm.finish_and_check_disk().unwrap();
}

#[test]
fn a_lost_byte_is_found() {
    let mut vm = restored();
    let agent = vm.agent();
    agent.command("workload start").unwrap();
    agent.command("workload verify").unwrap();
    let members = agent.command("ps").unwrap();
    let mut names = members.text().split_whitespace();
    let files = names.find(|name| name.contains(":files:")).unwrap();
    let pid = files.split(':').next().unwrap();
    // Every file there is loses a byte, the member stopped, so that it cannot write them anew first.
    agent.command(&format!("exec kill -STOP {pid}")).unwrap();
    let harm = "exec for f in /data/file.*; do \
        printf X | dd of=$f bs=1 seek=5000 conv=notrunc 2>/dev/null || exit 1; done; sync";
    assert_eq!(agent.command(harm).unwrap().field("status"), Some("0"));
    let stalled = agent.command("workload verify 2000").unwrap();
    assert_eq!(stalled.number("stalled").unwrap(), 1, "{}", stalled.text());
    assert_eq!(stalled.number("errors").unwrap(), 0, "{}", stalled.text());
    agent.command(&format!("exec kill -CONT {pid}")).unwrap();
    let stopped = agent.command("workload stop").unwrap();
    assert!(stopped.number("errors").unwrap() > 0, "{}", stopped.text());
    assert!(stopped.text().contains("wrong bytes"), "{}", stopped.text());
}

#[test]
fn guests_of_one_snapshot_do_not_share() {
    let snapshot = Snapshot::cached(&config("6.1")).unwrap();
    let mut first = snapshot.restore().unwrap();
    let mut second = snapshot.restore().unwrap();
    first.agent().command("exec echo first >/data/f; hostname first; sync").unwrap();
    let seen = second.agent().command("exec cat /data/f; hostname").unwrap();
    assert!(!seen.unescaped().contains("first"), "{}", seen.text());
}

#[test]
fn private_memory_is_restored_too() {
    let mut config = config("6.1");
    config.backend = Backend::Anonymous;
    let mut vm = Snapshot::cached(&config).unwrap().restore().unwrap();
    vm.agent().command("load crash_chardev").unwrap();
    assert_eq!(vm.agent().command("check crash_chardev").unwrap().text(), "ok");
    assert!(vm.ram_file().is_none());
}

#[test]
fn later_kernel_loads_every_driver() {
    let mut vm = Snapshot::cached(&config("6.12")).unwrap().restore().unwrap();
    let mut drivers: Vec<_> = scenario::cases().map(|case| case.driver).collect();
    drivers.dedup();
    for driver in drivers {
        vm.agent().command(&format!("load {driver}")).unwrap();
        assert_eq!(
            vm.agent().command(&format!("check {driver}")).unwrap().text(),
            "ok",
            "{driver}"
        );
        vm.agent().command(&format!("unload {driver}")).unwrap();
    }
}

#[test]
fn a_refusal_says_why() {
    let mut vm = restored();
    let error = vm.agent().command("load no_such_driver").unwrap_err();
    assert!(matches!(error, Error::Agent { reason, .. } if reason.contains("ENOENT")));
    let error = vm.agent().command_within("exec sleep 5", Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }));
}

#[test]
fn a_restored_guest_can_reboot() {
    let mut config = config("6.1");
    config.panic_timeout = 1;
    config.reboot = true;
    let mut vm = Snapshot::cached(&config).unwrap().restore().unwrap();
    vm.agent().command("load crash_chardev").unwrap();
    let crash = "crash crash_chardev write null-deref 1000";
    vm.agent().command_within(crash, Duration::from_secs(2)).unwrap_err();
    let down = vm.wait_for_agent(Duration::from_secs(120)).unwrap();
    eprintln!("rebooted in {down:?}");
    // The driver is not loaded any more: it is a new boot that answers.
    vm.agent()
        .command("check crash_chardev")
        .map(|answer| {
            assert!(answer.text().contains("ENOENT"), "{}", answer.text());
        })
        .unwrap();
}

fn goes_down(series: &str, names: &[&str]) {
    let snapshot = Snapshot::cached(&stock::config(config(series))).unwrap();
    let mut wrong = Vec::new();
    for case in scenario::cases().filter(|c| names.is_empty() || names.contains(&c.name)) {
        match stock::crash(case, &snapshot) {
            Ok(down) if down.names_offender => {}
            Ok(down) => wrong.push(format!("{}: another function:\n{}", case.name, down.console)),
            Err(error) => wrong.push(format!("{}: {error}", case.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn stock_guests_go_down_as_the_cases_say() {
    goes_down("6.1", &["null-deref", "three-locks", "hrtimer-idle", "uname"]);
    goes_down("6.12", &["null-deref", "deep", "msi-spinlock", "pipe-read"]);
}

#[test]
#[ignore = "several minutes: every case on both kernels"]
fn every_case_brings_stock_guests_down() {
    goes_down("6.1", &[]);
    goes_down("6.12", &[]);
}
