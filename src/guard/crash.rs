//! One crash: diagnosed, planned, repaired or let go, and recorded. Everything up to `resume` happens
//! while the guest stands, so nothing here touches the disk before.

use std::time::Duration;

use anyhow::{Context, Result};
use diagnose::Diagnosis;
use guest::{Control, Hook, Machine, Registers, Stop, Vcpu};
use quarantine::{Deed, Journal, Plan, Probation, Situation, Vital};
use serde_json::json;

use super::Guard;
use super::incident::Incident;

/// After a crash was let go and the guest still runs, hooks are armed again after this long.
const REARM_AFTER: Duration = Duration::from_secs(5);

/// How a crash ended.
enum End {
    /// Repaired and running.
    Repaired,
    /// Nothing was written: the crash takes its stock course.
    LetGo { reason: String },
}

/// What happened while the guest stood.
struct Handled {
    diagnosis: Option<Diagnosis>,
    plan: Option<Plan>,
    journal: Journal,
    end: End,
    /// From the report of the stop to the vCPUs running.
    downtime: Duration,
    /// The same, up to the end of each phase.
    phases: Vec<(&'static str, Duration)>,
}

impl Guard<'_> {
    pub(super) fn on_crash(&mut self, stop: Stop, hook: Hook) -> Result<()> {
        let mut handled = self.handle(stop, hook)?;
        self.incidents += 1;
        handled.phases.push(("resumed", handled.downtime));
        if let End::LetGo { .. } = handled.end {
            self.lost += 1;
            self.watch.let_go();
        }
        self.announce(stop, hook, &handled)?;
        self.record(hook, &handled)
    }

    /// The part that the guest waits for.
    fn handle(&mut self, stop: Stop, hook: Hook) -> Result<Handled> {
        let mut handled = Handled {
            diagnosis: None,
            plan: None,
            journal: Journal::default(),
            end: End::LetGo { reason: String::new() },
            downtime: Duration::ZERO,
            phases: Vec::new(),
        };
        let outcome = self.repair(stop, hook, &mut handled);
        handled.end = match outcome {
            Ok(()) => End::Repaired,
            Err(error) => {
                // The guest dies its own death: what follows of this crash is none of our business.
                Machine::hooks(&mut self.machine).context("no hooks")?.disarm()?;
                End::LetGo { reason: format!("{error:#}") }
            }
        };
        Control::resume(&mut self.machine)?;
        handled.downtime = stop.at.elapsed();
        Ok(handled)
    }

    fn repair(&mut self, stop: Stop, hook: Hook, handled: &mut Handled) -> Result<()> {
        let vcpus = all_registers(&mut self.machine)?;
        let registers =
            vcpus.get(stop.vcpu.0).copied().context("the vCPU that stopped is unknown")?;
        self.session.refresh_from_memory(self.machine.phys())?;
        handled.phases.push(("registers", stop.at.elapsed()));
        let image = &self.session.image;
        let diagnosis = handled.diagnosis.insert(
            diagnose::diagnose(
                image,
                self.machine.phys(),
                &registers,
                Some(hook),
                stop.vcpu,
                &mut self.session.cache,
            )
            .context("no diagnosis")?,
        );
        handled.phases.push(("diagnosed", stop.at.elapsed()));
        let plan = {
            let memory = image.placement.space(self.machine.phys());
            let situation = Situation { diagnosis, image, memory: &memory, vcpus: &vcpus };
            quarantine::plan(&situation, &self.policy, &self.strikes)
        };
        let plan = handled.plan.insert(plan);
        handled.phases.push(("planned", stop.at.elapsed()));
        if plan.rung.is_none() {
            anyhow::bail!("every rung is refused");
        }
        if self.arguments.dry_run {
            anyhow::bail!("dry run");
        }
        quarantine::apply(plan, &mut self.machine, image, &mut handled.journal)
            .context("the plan could not be carried out")?;
        handled.phases.push(("applied", stop.at.elapsed()));
        Ok(())
    }

    fn announce(&mut self, stop: Stop, hook: Hook, handled: &Handled) -> Result<()> {
        let events = &self.events;
        let downtime = micros(handled.downtime);
        let crash = json!({ "hook": hook, "vcpu": stop.vcpu });
        events.say(
            "crash",
            crash,
            &format!("crash: {} hit on vCPU {}", hook.kind.function(), stop.vcpu.0),
        )?;
        if let Some(diagnosis) = &handled.diagnosis {
            let text = format!("diagnosis: {}", diagnosis.title);
            events.say("diagnosis", serde_json::to_value(diagnosis)?, &text)?;
        }
        if let Some(plan) = &handled.plan {
            events.say("plan", serde_json::to_value(plan)?, &plan.to_string())?;
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
                events.say("repaired", fields, &text)?;
            }
            End::LetGo { reason } => {
                let refused = handled.plan.as_ref().map(|plan| &plan.refused);
                let fields = json!({ "reason": reason, "refused": refused });
                events.say("refused", fields, &format!("not repaired: {reason}"))?;
            }
        }
        Ok(events.say("resumed", json!({ "downtime_us": downtime }), "")?)
    }

    /// Writes the incident and starts the probation.
    fn record(&mut self, hook: Hook, handled: &Handled) -> Result<()> {
        let signature = handled.diagnosis.as_ref().map_or("undiagnosed", |d| d.signature.as_str());
        let mut incident = Incident::open(&self.arguments.incidents, signature)?;
        incident.set("hook", hook);
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
        incident.write()?;
        let text = format!("incident: {}", incident.folder().display());
        self.events.say("incident", json!({ "folder": incident.folder() }), &text)?;
        let rung = handled.plan.as_ref().and_then(|plan| plan.rung);
        if let (End::Repaired, Some(diagnosis), Some(rung)) =
            (&handled.end, &handled.diagnosis, rung)
        {
            self.strikes.record(diagnosis, rung);
            self.begin_probation()?;
        }
        Ok(())
    }

    fn begin_probation(&mut self) -> Result<()> {
        let length = Duration::from_secs(self.policy.probation_s);
        let memory = self.session.image.placement.space(self.machine.phys());
        let now = self.events.elapsed();
        self.watch.begin_probation(Probation::start(&self.session.image, &memory, length, now));
        let fields = json!({ "state": "started", "seconds": length.as_secs() });
        Ok(self.events.say("probation", fields, "")?)
    }

    /// Vital signs while a probation lasts; hooks armed again after a crash that the guest survived.
    pub(super) fn look_after(&mut self) -> Result<()> {
        if self.watch.since_let_go().is_some_and(|since| since > REARM_AFTER) {
            self.watch.goes_on();
            return self.arm();
        }
        let memory = self.session.image.placement.space(self.machine.phys());
        let Some(probation) = self.watch.probation() else { return Ok(()) };
        let now = self.events.elapsed();
        let vital = probation.check(&self.session.image, &memory, now);
        let over = probation.is_over(now);
        match vital {
            Vital::Suspect { reason } => {
                self.watch.end_probation();
                let text = format!("probation failed: {reason}");
                self.events.say("escalated", json!({ "reason": reason }), &text)?;
                self.lost += 1;
            }
            Vital::Healthy if over => {
                self.watch.end_probation();
                self.events.say("probation", json!({ "state": "passed" }), "probation passed")?;
            }
            // Healthy so far, or a kind of answer that this version does not know: look again.
            _ => {}
        }
        Ok(())
    }
}

/// Registers of every vCPU of a machine that stands.
pub(super) fn all_registers(machine: &mut dyn Machine) -> Result<Vec<Registers>> {
    let vcpus = machine.vcpu_count();
    (0..vcpus).map(|vcpu| machine.registers(Vcpu(vcpu)).context("registers")).collect()
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
