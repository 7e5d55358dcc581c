//! `defib demo`: the main job on lab VMs, start to end. One VM without and one with a guard go through
//! the same crashes, one after the other so that neither steals the other's time; what is printed was
//! measured in this run. The story is here, the two VMs are in `stock.rs` and `guarded.rs`.

mod guarded;
mod screen;
mod stock;

use std::fs;

use anyhow::{Context, Result, bail};
use corpus::lab::{Kernel, Snapshot, VmConfig};

use crate::Outcome;
use crate::cli::DemoArguments;
use guarded::Guarded;
use screen::{Screen, milliseconds, seconds};

/// The driver whose bugs crash the kernel.
const DRIVER: &str = "crash_chardev";

/// A crash: operation on the device, case of the driver, in words.
struct Act {
    operation: &'static str,
    case: &'static str,
    words: &'static str,
}

/// The crash that both VMs go through.
const FIRST: Act =
    Act { operation: "write", case: "null-deref", words: "NULL dereference in write()" };

/// More ways to crash, in the guarded VM only.
const MORE: [(&str, Act); 4] = [
    (
        "crash_locks",
        Act {
            operation: "write",
            case: "three-locks",
            words: "BUG() under a mutex and two spinlocks",
        },
    ),
    (
        "crash_locks",
        Act { operation: "write", case: "rcu", words: "NULL dereference in an RCU section" },
    ),
    (
        "crash_timer",
        Act { operation: "busy", case: "timer", words: "NULL dereference in a timer (softirq)" },
    ),
    (
        "crash_work",
        Act { operation: "idle", case: "kthread", words: "NULL dereference in a kernel thread" },
    ),
];

/// Runs `defib demo`.
///
/// # Errors
/// When the lab can't be set up, or the demonstration does not show what it promises.
pub fn run(arguments: &DemoArguments) -> Result<Outcome> {
    let mut screen = Screen::new();
    fs::create_dir_all(&arguments.incidents).context("incidents folder")?;
    let kernel = Kernel::find(&arguments.kernel).context("no kernel; run scripts/setup")?;
    screen.title(&format!(
        "An unmodified Debian kernel ({}) crashes: what it costs without and with a guard",
        kernel.release()
    ));
    let mut config = VmConfig::new(kernel);
    config.panic_timeout = -1;
    config.reboot = true;
    screen.step(
        "booting a VM (2 vCPUs, 256 MiB, KASLR, panic_on_oops=1) and keeping a snapshot of it",
    );
    let snapshot = Snapshot::cached(&config).context("lab VM")?;

    screen.step("STOCK VM: a process writes to a device; the driver dereferences NULL");
    let stock = stock::crash(&snapshot, &FIRST)?;
    screen
        .say(&format!("kernel panic, reboot; the workload is lost; back after {}", seconds(stock)));

    screen.step(
        "GUARDED VM: restored from the same snapshot; a workload of writers, pipes, TCP, timers,",
    );
    screen.say("forks and futexes starts; then `defib guard` attaches to the running VM");
    let mut guarded = Guarded::start(&snapshot, &arguments.incidents)?;
    screen.say(&guarded.attached()?);
    screen.step("GUARDED VM: the same crash");
    let first = guarded.crash(DRIVER, &FIRST)?;
    screen.say(&first.to_string());
    if !first.saved() {
        bail!("the guarded VM was not saved; see {}", arguments.incidents.display());
    }
    screen.table(
        &["", "STOCK VM", "GUARDED VM"],
        &[
            vec!["the kernel".into(), "panics and reboots".into(), "runs on".into()],
            vec!["stands for".into(), seconds(stock), milliseconds(first.downtime())],
            vec!["write() returns".into(), "never".into(), first.process_saw()],
            vec!["workload".into(), "lost".into(), guarded.workload()?],
        ],
    );
    let ratio = stock.as_secs_f64() / first.downtime().as_secs_f64();
    screen.say(&format!("downtime, reboot / in place: {ratio:.0} times"));

    more_ways(&mut screen, &mut guarded)?;
    quarantine_driver(&mut screen, &mut guarded)?;
    core_kernel(&mut screen, &mut guarded)?;

    screen.step("GUARDED VM: is everything else as it was?");
    screen.say(&format!("workload: {}", guarded.workload()?));
    screen.say(&format!("kernel log: {}", guarded.splats()?));
    let folder = guarded.finish()?;
    screen.say(&format!("\nThe latest incident report: {}", folder.join("report.txt").display()));
    Ok(Outcome::Done)
}

fn more_ways(screen: &mut Screen, guarded: &mut Guarded) -> Result<()> {
    screen.step("GUARDED VM: more ways to crash");
    let mut rows = Vec::new();
    for (driver, act) in &MORE {
        let crash = guarded.crash(driver, act)?;
        rows.push(vec![
            act.words.into(),
            crash.process_saw(),
            milliseconds(crash.downtime()),
            crash.repair(),
        ]);
    }
    screen.table(&["crash", "the process saw", "VM stood for", "repair"], &rows);
    Ok(())
}

/// The first driver again, until its strikes are used up.
fn quarantine_driver(screen: &mut Screen, guarded: &mut Guarded) -> Result<()> {
    screen.step("GUARDED VM: the first driver crashes again, until its strikes are used up");
    for _ in 0..10 {
        let crash = guarded.crash(DRIVER, &FIRST)?;
        screen.say(&crash.to_string());
        if crash.rung() == Some(2) {
            let after = guarded.try_device(DRIVER, &FIRST)?;
            screen.say(&format!("the driver is in quarantine; its device now says: {after}"));
            return Ok(());
        }
    }
    bail!("the driver was not quarantined after ten crashes")
}

fn core_kernel(screen: &mut Screen, guarded: &mut Guarded) -> Result<()> {
    screen
        .step("GUARDED VM: core-kernel code crashes, no driver on the stack; a process caused it");
    let acts = [("getcwd", "getcwd", "getcwd()", 1), ("sethostname", "uname", "sethostname()", 3)];
    for (operation, case, words, rung) in acts {
        let crash = guarded.crash("crash_core", &Act { operation, case, words })?;
        screen.say(&format!("{words} in a damaged process: {crash}"));
        if crash.rung() != Some(rung) {
            bail!("not repaired by rung {rung}");
        }
    }
    Ok(())
}
