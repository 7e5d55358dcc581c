//! The VM without a guard: how long it takes to be back after a crash.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use corpus::lab::Snapshot;

use super::{Act, DRIVER};

/// How long a reboot may take on a loaded machine.
const REBOOT_LIMIT: Duration = Duration::from_secs(240);

/// Crashes the VM and waits until its user space answers again; returns how long that took.
pub fn crash(snapshot: &Snapshot, act: &Act) -> Result<Duration> {
    let mut vm = snapshot.restore().context("stock VM")?;
    vm.agent().command("workload start")?;
    vm.agent().command(&format!("load {DRIVER}"))?;
    let command = format!("crash {DRIVER} {} {} 2000", act.operation, act.case);
    let start = Instant::now();
    // The answer never comes: the guest is gone before it could be given.
    if let Ok(answer) = vm.agent().command_within(&command, Duration::from_secs(2)) {
        bail!("the stock VM did not crash but answered {:?}", answer.text());
    }
    while start.elapsed() < REBOOT_LIMIT {
        if vm.agent().answers(Duration::from_millis(250)) {
            return Ok(start.elapsed());
        }
    }
    bail!("the stock VM was not back after {REBOOT_LIMIT:?}")
}
