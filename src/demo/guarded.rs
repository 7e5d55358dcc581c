//! The VM with a guard beside it: crashes, and what the guard and the process that caused them said.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use corpus::guarded::Guard;
use corpus::lab::{Snapshot, Vm};
use serde_json::Value;

use super::Act;
use crate::corpus_command::guard_config;

/// How long the guard may take to learn a kernel that it has never seen.
const ATTACH_LIMIT: Duration = Duration::from_secs(120);
/// How long one crash may take to be dealt with.
const CRASH_LIMIT: Duration = Duration::from_secs(30);

/// A VM and its guard.
pub struct Guarded {
    vm: Vm,
    guard: Guard,
    loaded: Vec<String>,
    incident: Option<PathBuf>,
}

/// One crash that was dealt with.
pub struct Crash {
    title: String,
    end: Value,
    answer: String,
}

impl Guarded {
    /// Restores the VM, starts the workload in it, then the guard beside it.
    pub fn start(snapshot: &Snapshot, incidents: &Path) -> Result<Self> {
        let mut vm = snapshot.restore().context("guarded VM")?;
        vm.agent().command("workload start")?;
        let config = guard_config(&vm.config().kernel, incidents)?;
        let guard = Guard::start(&config, &vm.qmp())?;
        Ok(Self { vm, guard, loaded: Vec::new(), incident: None })
    }

    /// Waits until the hooks are armed; what the guard says of the image it took.
    pub fn attached(&mut self) -> Result<String> {
        let image = self.guard.await_event("image", ATTACH_LIMIT)?;
        self.guard.await_event("armed", ATTACH_LIMIT)?;
        let text = |key: &str| image.get(key).map(|value| value.to_string().replace('"', ""));
        Ok(format!(
            "armed; repair image: kernel layer {} (from {}), guest layer taken in {} us without a pause",
            text("kernel_layer_bytes")
                .map_or_else(|| "in memory".into(), |bytes| format!("{bytes} bytes")),
            text("knowledge").unwrap_or_default(),
            text("guest_layer_us").unwrap_or_default(),
        ))
    }

    /// Lets a process crash the kernel.
    pub fn crash(&mut self, driver: &str, act: &Act) -> Result<Crash> {
        self.load(driver)?;
        self.guard.drain();
        let answer = self.try_device(driver, act)?;
        let diagnosis = self.guard.await_event("diagnosis", CRASH_LIMIT)?;
        let end = self.guard.await_any(&["repaired", "refused"], CRASH_LIMIT)?;
        let incident = self.guard.await_event("incident", CRASH_LIMIT)?;
        self.incident = incident.get("folder").and_then(Value::as_str).map(PathBuf::from);
        let title = diagnosis.get("title").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Crash { title, end, answer })
    }

    /// Loads a driver once, and waits until the guard has seen it.
    fn load(&mut self, driver: &str) -> Result<()> {
        if !self.loaded.iter().any(|loaded| loaded == driver) {
            self.vm.agent().command(&format!("load {driver}"))?;
            self.guard.await_event("modules", CRASH_LIMIT)?;
            self.loaded.push(driver.to_owned());
        }
        Ok(())
    }

    /// Uses the device; what the process saw.
    pub fn try_device(&mut self, driver: &str, act: &Act) -> Result<String> {
        let command = format!("crash {driver} {} {} 10000", act.operation, act.case);
        let answer = self.vm.agent().command(&command)?;
        let field = |name: &str| answer.field(name).map(str::to_owned);
        Ok(match (field("errno"), field("signal"), field("self")) {
            (_, Some(signal), _) => format!("killed by signal {signal}"),
            (Some(errno), _, _) if errno != "0" => format!("error {errno}"),
            (_, _, Some(open)) if open.starts_with("open:") => format!("{} at open()", &open[5..]),
            _ => "success".to_owned(),
        })
    }

    /// Lets the workload check itself.
    pub fn workload(&mut self) -> Result<String> {
        let answer = self.vm.agent().command("workload verify")?;
        let (errors, stalled) = (answer.number("errors")?, answer.number("stalled")?);
        if errors != 0 || stalled != 0 {
            bail!("the workload noticed: {}", answer.text());
        }
        Ok(format!("all checksums right, {errors} errors, {stalled} members stalled"))
    }

    /// What the kernel has complained about.
    pub fn splats(&mut self) -> Result<String> {
        Ok(self.vm.agent().command("splats")?.unescaped())
    }

    /// Detaches the guard and ends the VM; the folder of the latest incident.
    pub fn finish(self) -> Result<PathBuf> {
        let status = self.guard.detach()?;
        if !status.success() {
            bail!("the guard ended with {status}");
        }
        self.incident.context("no incident was recorded")
    }
}

impl Crash {
    /// Whether it was repaired in place.
    pub fn saved(&self) -> bool {
        self.end.get("event").and_then(Value::as_str) == Some("repaired")
    }

    /// Rung that saved it.
    pub fn rung(&self) -> Option<u64> {
        self.end.get("rung").and_then(Value::as_u64)
    }

    /// How long the vCPUs stood.
    pub fn downtime(&self) -> Duration {
        Duration::from_micros(
            self.end.get("downtime_us").and_then(Value::as_u64).unwrap_or(u64::MAX),
        )
    }

    /// What the process that caused it saw.
    pub fn process_saw(&self) -> String {
        self.answer.clone()
    }

    /// The repair in words.
    pub fn repair(&self) -> String {
        match self.rung() {
            Some(1) => "error returned".into(),
            Some(2) => "driver quarantined".into(),
            Some(3) => "process quarantined".into(),
            _ => "not repaired".into(),
        }
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let downtime = super::milliseconds(self.downtime());
        write!(
            f,
            "{}\n{} after {downtime}; the process saw: {}",
            self.title,
            self.repair(),
            self.answer
        )
    }
}
