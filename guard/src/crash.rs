//! One crash: diagnosed, planned, repaired or let go. Everything up to `resume` happens while the guest
//! stands, so nothing here touches the disk before. What is told of it afterwards is in `report.rs`.

use std::time::{Duration, Instant};

use diagnose::live_core::Snapshot;
use diagnose::{CrashClass, Diagnosis};
use guest::{Hook, Machine, Registers, Stop};
use quarantine::{Action, Journal, Plan, Probation, Situation, Vital};
use serde_json::json;

use crate::Error;
use crate::error::in_one_line;
use crate::guard::{Guard, all_registers};

/// After a crash was let go and the guest still runs, hooks are armed again after this long.
const REARM_AFTER: Duration = Duration::from_secs(5);

/// How a crash ended.
pub enum End {
    /// Repaired and running.
    Repaired,
    /// Nothing was written: the crash takes its stock course.
    LetGo {
        /// Why, in words.
        reason: String,
    },
}

/// What happened while the guest stood.
pub struct Handled {
    /// The hook that was hit.
    pub hook: Hook,
    /// What crashed, if that was found out.
    pub diagnosis: Option<Diagnosis>,
    /// What was to be done, if it came to that.
    pub plan: Option<Plan>,
    /// For `live.core`, if there is to be one.
    pub snapshot: Option<Snapshot>,
    /// What was done.
    pub journal: Journal,
    /// How it ended.
    pub end: End,
    /// From the report of the stop to the vCPUs running.
    pub downtime: Duration,
    /// The same, up to the end of each phase.
    pub phases: Vec<(&'static str, Duration)>,
}

impl Handled {
    /// Nothing is known yet.
    pub(crate) fn begin(hook: Hook) -> Self {
        Self {
            hook,
            diagnosis: None,
            plan: None,
            snapshot: None,
            journal: Journal::default(),
            end: End::Repaired,
            downtime: Duration::ZERO,
            phases: Vec::new(),
        }
    }
}

impl<M: Machine> Guard<M> {
    pub(crate) fn on_crash(&mut self, stop: Stop, hook: Hook) -> Result<(), Error> {
        self.incidents = self.incidents.saturating_add(1);
        self.strikes.set_time(self.elapsed());
        let mut handled = Handled::begin(hook);
        if let Err(error) = self.repair(stop, &mut handled) {
            handled.end = End::LetGo { reason: in_one_line(&error) };
            self.lost = self.lost.saturating_add(1);
            self.watch.let_go();
            // The guest dies its own death: what follows of this crash is none of our business.
            self.let_go()?;
        } else {
            self.resume()?;
        }
        self.conclude(stop, handled)
    }

    /// What is done once the guest runs again: it is told and written down, and the guest is watched.
    pub(crate) fn conclude(&mut self, stop: Stop, mut handled: Handled) -> Result<(), Error> {
        handled.downtime = stop.at.elapsed();
        handled.phases.push(("resumed", handled.downtime));
        self.announce(stop, &handled)?;
        self.record(&mut handled)?;
        self.begin_probation(&handled)
    }

    /// The part that the guest waits for.
    fn repair(&mut self, stop: Stop, handled: &mut Handled) -> Result<(), Error> {
        let mut vcpus = all_registers(&mut self.machine)?;
        let registers = vcpus.get(stop.vcpu.0).ok_or(Error::UnknownVcpu(stop.vcpu))?;
        if let Some(why) = self.session.why_not_in_kernel(self.machine.phys(), registers) {
            return Err(Error::NotInKernel { vcpu: stop.vcpu, why });
        }
        self.session.refresh_from_memory(self.machine.phys())?;
        handled.phases.push(("registers", stop.at.elapsed()));
        let diagnosis = handled.diagnosis.insert(self.diagnose(stop, handled.hook, registers)?);
        let image = &self.session.image;
        let settled = quarantine::settle(&mut self.machine, image, diagnosis);
        if settled.map_err(Error::Unsettled)? {
            vcpus = all_registers(&mut self.machine)?;
            let registers = vcpus.get(stop.vcpu.0).ok_or(Error::UnknownVcpu(stop.vcpu))?;
            handled.diagnosis = Some(self.diagnose(stop, handled.hook, registers)?);
        }
        handled.phases.push(("diagnosed", stop.at.elapsed()));
        self.treat(stop.at, &vcpus, handled)
    }

    fn diagnose(
        &mut self,
        stop: Stop,
        hook: Hook,
        registers: &Registers,
    ) -> Result<Diagnosis, Error> {
        diagnose::diagnose(
            &self.session.image,
            self.machine.phys(),
            registers,
            Some(hook),
            stop.vcpu,
            &mut self.session.cache,
        )
        .map_err(Error::Diagnosis)
    }

    /// Plans and carries out what the diagnosis calls for. The guest stands since `stopped`.
    pub(crate) fn treat(
        &mut self,
        stopped: Instant,
        vcpus: &[Registers],
        handled: &mut Handled,
    ) -> Result<(), Error> {
        let Some(diagnosis) = &handled.diagnosis else { return Err(Error::EveryRungRefused) };
        let image = &self.session.image;
        let plan = {
            let memory = image.placement.space(self.machine.phys());
            let situation = Situation { diagnosis, image, memory: &memory, vcpus };
            quarantine::plan(&situation, &self.options.policy, &self.strikes)
        };
        let plan = handled.plan.insert(plan);
        handled.phases.push(("planned", stopped.elapsed()));
        let limit = self.options.policy.live_cores;
        if self.options.incidents.is_some()
            && self.cores.why_not(&diagnosis.signature, limit).is_none()
        {
            let writes: Vec<_> = plan.actions.iter().flat_map(Action::writes).collect();
            let phys = self.machine.phys();
            handled.snapshot = Some(Snapshot::take(image, phys, vcpus, Some(diagnosis), &writes));
            handled.phases.push(("kept for live.core", stopped.elapsed()));
        }
        if plan.rung.is_none() {
            return Err(Error::EveryRungRefused);
        }
        if self.options.dry_run {
            return Err(Error::DryRun);
        }
        quarantine::apply(plan, &mut self.machine, image, &mut handled.journal)
            .map_err(Error::Apply)?;
        handled.phases.push(("applied", stopped.elapsed()));
        Ok(())
    }

    /// Counts a crash that was repaired, and watches the guest for a while.
    fn begin_probation(&mut self, handled: &Handled) -> Result<(), Error> {
        let rung = handled.plan.as_ref().and_then(|plan| plan.rung);
        let (End::Repaired, Some(diagnosis), Some(rung)) = (&handled.end, &handled.diagnosis, rung)
        else {
            return Ok(());
        };
        self.strikes.record(diagnosis, rung);
        let length = Duration::from_secs(self.options.policy.probation_s);
        let memory = self.session.image.placement.space(self.machine.phys());
        let mut probation = Probation::start(&self.session.image, &memory, length, self.elapsed());
        if diagnosis.class == Some(CrashClass::Warning) {
            probation = probation.of_a_warning();
        }
        self.watch.begin_probation(probation);
        let fields = json!({ "state": "started", "seconds": length.as_secs() });
        self.say("probation", fields, "")
    }

    /// Vital signs while a probation lasts; hooks armed again after a crash that the guest survived.
    pub(crate) fn look_after(&mut self) -> Result<(), Error> {
        if self.watch.since_let_go().is_some_and(|since| since > REARM_AFTER) {
            self.watch.goes_on();
            return self.arm();
        }
        let now = self.elapsed();
        let memory = self.session.image.placement.space(self.machine.phys());
        let Some(probation) = self.watch.probation() else { return Ok(()) };
        let vital = probation.check(&self.session.image, &memory, now);
        let over = probation.is_over(now);
        match vital {
            Vital::Suspect { reason } => {
                self.watch.end_probation();
                self.lost = self.lost.saturating_add(1);
                let text = format!("probation failed: {reason}");
                self.say("escalated", json!({ "reason": reason }), &text)
            }
            Vital::Healthy if over => {
                self.watch.end_probation();
                self.say("probation", json!({ "state": "passed" }), "probation passed")
            }
            // Healthy so far, or a kind of answer that this version does not know: look again.
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use guest::{HookKind, Reg, StopReason};

    use super::*;
    use crate::POLL;
    use crate::testing::{Memory, Scripted, at_work, begin, hook};

    fn crash(guard: &mut Guard<Scripted>) {
        guard.machine.script.push_back(StopReason::Hook(hook(HookKind::OopsBegin)));
        assert!(guard.step(POLL).unwrap());
    }

    #[test]
    fn a_crash_that_can_t_be_repaired_takes_its_stock_course() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let resumes = guard.machine.resumes;
        crash(&mut guard);
        assert!(guard.machine.running && guard.machine.armed.is_empty());
        assert_eq!((guard.machine.resumes, guard.machine.writes), (resumes + 1, 0));
        assert_eq!(memory.last("refused")["reason"], "every rung is refused");
        assert_eq!(memory.names(), ["crash", "diagnosis", "plan", "refused", "resumed"]);
        assert_eq!((guard.incidents(), guard.lost()), (1, 1));
        assert!(!guard.is_settled());
        guard.watch.age(REARM_AFTER + Duration::from_millis(1));
        assert!(guard.step(POLL).unwrap());
        assert_eq!(memory.names(), ["armed"]);
        assert!(guard.is_settled());
    }

    #[test]
    fn an_incident_is_written_only_where_a_directory_is_named() {
        let root = tempfile::tempdir().unwrap();
        let memory = Memory::default();
        let guard = begin(Scripted::new(), Some(root.path()), &memory);
        crash(&mut guard.map_err(|failed| failed.error).unwrap());
        let folder = memory.last("incident")["folder"].as_str().unwrap().to_owned();
        let json = std::fs::read(format!("{folder}/incident.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["outcome"], "refused");
        let page = std::fs::read_to_string(format!("{folder}/report.html")).unwrap();
        let title = json["diagnosis"]["title"].as_str().unwrap();
        assert!(page.starts_with("<!") && page.contains(title), "{page}");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_vcpu_that_does_not_run_this_kernel_is_refused_before_diagnosis() {
        for (reg, value, reason) in [
            (Reg::Cr0, 0x10, "vCPU 0 is in real mode"),
            (Reg::Cr0, 0x11, "vCPU 0 has paging off"),
            (Reg::Efer, 0, "vCPU 0 is not in long mode"),
            (Reg::Cr3, 0, "vCPU 0 runs another kernel than the one that is known"),
        ] {
            let memory = Memory::default();
            let mut guard = at_work(&memory);
            guard.machine.set(reg, value);
            crash(&mut guard);
            assert_eq!(memory.last("refused")["reason"], reason);
            assert_eq!(memory.names(), ["crash", "refused", "resumed"]);
            assert!(guard.machine.running && guard.machine.armed.is_empty());
            assert_eq!(guard.machine.writes, 0);
        }
    }

    #[test]
    fn an_unknown_vcpu_is_refused() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let stop = Stop {
            vcpu: guest::Vcpu(7),
            reason: StopReason::Hook(hook(HookKind::Panic)),
            at: std::time::Instant::now(),
        };
        guard.machine.running = false;
        guard.on_crash(stop, hook(HookKind::Panic)).unwrap();
        assert_eq!(memory.last("refused")["reason"], "the vCPU that stopped is unknown");
        assert!(guard.machine.running);
    }
}
