//! What is told of a crash once the guest runs again: to the observer, and in the incident's files.

use std::path::Path;
use std::time::Duration;

use diagnose::live_core::Snapshot;
use guest::{Machine, Stop};
use quarantine::{Deed, Journal};
use serde::Serialize;
use serde_json::{Value, json};

use crate::core_file::{self, Job};
use crate::crash::{End, Handled};
use crate::incident::Incident;
use crate::page;
use crate::{Error, Guard};

impl<M: Machine> Guard<M> {
    /// Tells the observer.
    pub(crate) fn announce(&mut self, stop: Stop, handled: &Handled) -> Result<(), Error> {
        let hook = handled.hook;
        let downtime = micros(handled.downtime);
        let crash = json!({ "hook": hook, "vcpu": stop.vcpu });
        self.say(
            "crash",
            crash,
            &format!("crash: {} hit on vCPU {}", hook.kind.function(), stop.vcpu.0),
        )?;
        if let Some(diagnosis) = &handled.diagnosis {
            let text = format!("diagnosis: {}", diagnosis.title);
            self.say("diagnosis", json_of("diagnosis", diagnosis)?, &text)?;
        }
        if let Some(plan) = &handled.plan {
            self.say("plan", json_of("plan", plan)?, &plan.to_string())?;
        }
        match &handled.end {
            End::Repaired => {
                let rung = handled.plan.as_ref().and_then(|plan| plan.rung);
                let fields =
                    json!({ "rung": rung.map(|rung| rung.number()), "downtime_us": downtime });
                let text = format!(
                    "repaired: {} in {:.2} ms",
                    rung.map(|rung| rung.to_string()).unwrap_or_default(),
                    handled.downtime.as_secs_f64() * 1e3
                );
                self.say("repaired", fields, &text)?;
            }
            End::LetGo { reason } => {
                let refused = handled.plan.as_ref().map(|plan| &plan.refused);
                let fields = json!({ "reason": reason, "refused": refused });
                self.say("refused", fields, &format!("not repaired: {reason}"))?;
            }
        }
        self.say("resumed", json!({ "downtime_us": downtime }), "")
    }

    /// Writes the incident.
    pub(crate) fn record(&mut self, handled: &mut Handled) -> Result<(), Error> {
        let Some(incidents) = &self.options.incidents else { return Ok(()) };
        let signature = handled.diagnosis.as_ref().map(|diagnosis| diagnosis.signature.clone());
        let signature = signature.unwrap_or_else(|| "undiagnosed".to_owned());
        let mut incident = Incident::open(incidents, &signature)?;
        let core = self.write_core(handled.snapshot.take(), &signature, incident.folder());
        match core {
            Ok(()) => incident.set("live_core", json!({ "file": core_file::NAME })),
            Err(reason) => incident.set("live_core", json!({ "file": null, "reason": reason })),
        }
        incident.set("hook", handled.hook);
        incident.set("kernel", self.session.describe());
        incident.set("downtime_us", micros(handled.downtime));
        incident.set("phases_us", phases(&handled.phases));
        let (outcome, verdict) = match &handled.end {
            End::Repaired => ("repaired", verdict(handled)),
            End::LetGo { reason } => {
                ("refused", format!("NOT REPAIRED: {reason}. The crash took its stock course."))
            }
        };
        incident.set("outcome", outcome);
        incident.section("", &verdict);
        if let Some(diagnosis) = &handled.diagnosis {
            incident.set("diagnosis", diagnosis);
            incident.section("Diagnosis", &diagnose::report::text(diagnosis));
        }
        if let Some(plan) = &handled.plan {
            incident.set("plan", plan);
            incident.section("Plan", &plan.to_string());
        }
        incident.set("journal", &handled.journal);
        incident.section("Journal of writes", &journal(&handled.journal));
        incident.section("Timeline", &timeline(&handled.phases));
        let page = page::page(handled, &verdict, self.session.banner());
        incident.set_page(diagnose::report::html(&page));
        incident.write()?;
        let text = format!("incident: {}", incident.folder().display());
        self.say("incident", json!({ "folder": incident.folder() }), &text)
    }

    /// Has `live.core` written while the guest runs; or why there is none.
    fn write_core(
        &mut self,
        snapshot: Option<Snapshot>,
        signature: &str,
        folder: &Path,
    ) -> Result<(), &'static str> {
        let limit = self.options.policy.live_cores;
        self.cores.why_not(signature, limit).map_or(Ok(()), Err)?;
        let snapshot = snapshot.ok_or("the crash was not diagnosed")?;
        let phys =
            self.machine.second_view().ok_or("the machine shows its memory to one thread")?;
        let (image, folder) = (self.session.image.clone(), folder.to_owned());
        self.cores.write(signature, Job { snapshot, image, phys, folder })
    }
}

fn json_of(what: &'static str, value: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|source| Error::Json { what, source })
}

fn verdict(handled: &Handled) -> String {
    let rung = handled.plan.as_ref().and_then(|plan| plan.rung);
    format!(
        "REPAIRED by {} in {:.2} ms; the guest lost {}.",
        rung.map(|rung| rung.to_string()).unwrap_or_default(),
        handled.downtime.as_secs_f64() * 1e3,
        handled.plan.as_ref().map_or("nothing", |plan| plan.loss.as_str()),
    )
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn phases(phases: &[(&'static str, Duration)]) -> serde_json::Value {
    phases.iter().map(|(name, at)| ((*name).to_owned(), json!(micros(*at)))).collect()
}

fn timeline(phases: &[(&'static str, Duration)]) -> String {
    let line =
        |(name, at): &(&str, Duration)| format!("{:>10.3} ms  {name}\n", at.as_secs_f64() * 1e3);
    std::iter::once("     0.000 ms  vCPUs stopped\n".to_owned())
        .chain(phases.iter().map(line))
        .collect()
}

/// The journal, a line an entry.
fn journal(journal: &Journal) -> String {
    let line = |entry: &quarantine::Entry| {
        let what = match &entry.deed {
            Deed::Write { phys, virt, old, new, code } => {
                let place =
                    virt.map_or_else(|| format!("phys {phys:#x}"), |virt| format!("{virt:#x}"));
                let kind = if *code { "code" } else { "data" };
                format!("{kind} at {place}: {} -> {}", hex(old), hex(new))
            }
            Deed::Registers { vcpu, new, .. } => format!("registers of vCPU {}: {new:x?}", vcpu.0),
            Deed::FreshAdded { region } => {
                format!(
                    "fresh memory added: {} bytes at phys {:#x} ({:?})",
                    region.size, region.at, region.kind
                )
            }
            Deed::FreshRemoved { region } => {
                format!("fresh memory removed at phys {:#x}", region.at)
            }
            Deed::Loaded { phys, bytes } => format!("{bytes} bytes loaded at phys {phys:#x}"),
            Deed::Called { function, result } => format!("called {function}, returned {result}"),
            Deed::RolledBack { deeds } => format!("{deeds} deeds taken back"),
            other => format!("{other:?}"),
        };
        format!("{:>10.3} ms  {what}\n               {}\n", entry.at_us as f64 / 1e3, entry.why)
    };
    journal.entries().iter().map(line).collect()
}

/// At most 16 bytes as hex.
fn hex(bytes: &[u8]) -> String {
    let shown: String = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() > 16 { format!("{shown}… ({} bytes)", bytes.len()) } else { shown }
}
