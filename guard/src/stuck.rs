//! A CPU that stands: suspected, looked at again and again while the guest runs, and repaired when it is proven that
//! one call into a driver has not returned all the time. Measuring is `progress.rs`'s, judging one look
//! `diagnose::stuck`'s.

use std::time::{Duration, Instant};

use diagnose::stuck::{self, Call, Found, NotStuck};
use guest::{Hook, HookKind, Machine, Reg, Registers, Stop, StopReason, Vcpu};
use serde_json::json;

use crate::Error;
use crate::crash::{End, Handled};
use crate::error::in_one_line;
use crate::guard::{Guard, all_registers};
use crate::progress::Progress;

/// Looks that must find the same before anything is done.
const LOOKS_MIN: u32 = 4;
/// Time between two looks: the guest stands for each.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Looks kept for telling a loop that makes headway.
const VALUES_MAX: usize = 64;
/// How much longer a loop that makes headway may take.
const HEADWAY: u32 = 4;
/// How often others may call the watched function before watching it costs the guest too much.
const VISITS_MAX: u32 = 500;
/// Causes that were refused and are not told again.
const TOLD_MAX: usize = 16;

/// What is known of CPUs that stand.
#[derive(Default)]
pub struct Stuck {
    progress: Progress,
    suspicion: Option<Suspicion>,
    /// Calls that could not be repaired: once is enough.
    refused: Vec<Call>,
    /// The latest reason for which a CPU that stands was not suspected.
    told: Option<(usize, String)>,
    /// When CPUs were last looked at.
    looked: Option<Instant>,
}

impl Stuck {
    /// Whether a call is suspected, and its function watched.
    pub fn suspects(&self) -> bool {
        self.suspicion.is_some()
    }
}

/// A call that may never return.
struct Suspicion {
    cpu: usize,
    call: Call,
    looks: u32,
    visits: u32,
    /// Registers of the driver's innermost frame at each look.
    values: Vec<Vec<(Reg, u64)>>,
}

impl Suspicion {
    /// Whether a register went up at every look, or down: the loop counts, and may end.
    fn makes_headway(&self) -> bool {
        let Some(first) = self.values.first() else { return false };
        let course = |reg: Reg| -> Option<Vec<u64>> {
            let of = |look: &Vec<(Reg, u64)>| look.iter().find(|(other, _)| *other == reg).copied();
            self.values.iter().map(|look| of(look).map(|(_, value)| value)).collect()
        };
        self.values.len() >= LOOKS_MIN as usize
            && first
                .iter()
                .filter(|(reg, _)| !matches!(reg, Reg::Rip | Reg::Rflags))
                .filter_map(|(reg, _)| course(*reg))
                .any(|course| {
                    course.windows(2).all(|pair| matches!(pair, [a, b] if a < b))
                        || course.windows(2).all(|pair| matches!(pair, [a, b] if a > b))
                })
    }
}

impl<M: Machine> Guard<M> {
    /// Looks whether the CPUs of a guest that runs get on.
    pub(crate) fn look_at_progress(&mut self) -> Result<(), Error> {
        let limit = Duration::from_secs(self.options.policy.lockup_s);
        if limit.is_zero() || self.watch.since_let_go().is_some() {
            return Ok(());
        }
        if !self.is_running() {
            self.stuck.progress.interrupt();
            return Ok(());
        }
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        let now = Instant::now();
        self.stuck.progress.read(image, &memory, now);
        let standing = self.stuck.progress.standing_for(limit / 2);
        if let Some(suspicion) = &self.stuck.suspicion
            && !standing.contains(&suspicion.cpu)
        {
            return self.end_suspicion("the CPU gets on");
        }
        let rested = self.stuck.looked.is_none_or(|at| now.duration_since(at) >= LOOK_EVERY);
        if standing.is_empty() || !rested {
            return Ok(());
        }
        self.stuck.looked = Some(now);
        self.look(&standing, limit)
    }

    /// The watched function was called.
    pub(crate) fn on_watched(&mut self, stop: Stop) -> Result<(), Error> {
        let task = self.current_of(stop.vcpu);
        let Some(suspicion) = &mut self.stuck.suspicion else {
            self.arm_with(None)?;
            return self.resume();
        };
        suspicion.visits = suspicion.visits.saturating_add(1);
        if task == Some(suspicion.call.task) {
            self.end_suspicion("the call has returned")?;
        } else if suspicion.visits > VISITS_MAX {
            self.end_suspicion("others call the function too often to watch it")?;
        }
        self.resume()
    }

    /// The task that a vCPU of a guest that stands executes.
    pub(crate) fn current_of(&mut self, vcpu: Vcpu) -> Option<guest::GuestVirt> {
        let registers = self.machine.registers(vcpu).ok()?;
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        stuck::current_task(image, &memory, &registers)
    }

    /// Takes the suspicion and the hook away.
    fn end_suspicion(&mut self, why: &str) -> Result<(), Error> {
        let Some(suspicion) = self.stuck.suspicion.take() else { return Ok(()) };
        self.stuck.progress.absolve(suspicion.cpu);
        let ours = self.halt()?;
        let armed = self.arm_with(None);
        if ours {
            self.resume()?;
        }
        armed?;
        let fields = json!({ "cpu": suspicion.cpu, "reason": why, "looks": suspicion.looks });
        let text = format!("CPU {} is no longer suspected: {why}", suspicion.cpu);
        self.say("unsuspected", fields, &text)
    }

    /// One look at the CPUs that stand. The guest stands meanwhile, and afterwards runs on.
    fn look(&mut self, standing: &[usize], limit: Duration) -> Result<(), Error> {
        if !self.halt()? {
            return Ok(());
        }
        let stopped = Instant::now();
        let looked = self.looked_at(standing);
        let (vcpus, found) = match looked {
            Ok(looked) => looked,
            Err(error) => {
                self.resume()?;
                return Err(error);
            }
        };
        match found {
            Ok(found) => self.on_found(found, &vcpus, stopped, limit),
            Err(why) => {
                self.resume()?;
                self.on_not_stuck(standing, &why)
            }
        }
    }

    fn looked_at(
        &mut self,
        standing: &[usize],
    ) -> Result<(Vec<Registers>, Result<Found, NotStuck>), Error> {
        let vcpus = all_registers(&mut self.machine)?;
        self.session.refresh_from_memory(self.machine.phys())?;
        let image = &self.session.image;
        let suspects: Vec<Vcpu> = (0..vcpus.len())
            .filter(|&index| {
                let cpu = vcpus.get(index).and_then(|it| stuck::cpu_of(image, it));
                cpu.is_some_and(|cpu| standing.contains(&cpu))
            })
            .map(Vcpu)
            .collect();
        let phys = self.machine.phys();
        let found = stuck::find(image, phys, &vcpus, &suspects, &mut self.session.cache);
        Ok((vcpus, found))
    }

    /// A cause was seen. It is acted upon if it is the one that was seen all the time, for long enough.
    fn on_found(
        &mut self,
        found: Found,
        vcpus: &[Registers],
        stopped: Instant,
        limit: Duration,
    ) -> Result<(), Error> {
        if self.stuck.refused.contains(&found.call) {
            return self.resume();
        }
        let same = self.stuck.suspicion.as_ref().is_some_and(|it| it.call == found.call);
        if !same {
            return self.suspect(found);
        }
        let Some(suspicion) = &mut self.stuck.suspicion else { return self.resume() };
        suspicion.looks = suspicion.looks.saturating_add(1);
        if suspicion.values.len() < VALUES_MAX {
            suspicion.values.push(found.values.clone());
        }
        let limit = if suspicion.makes_headway() { limit * HEADWAY } else { limit };
        let long = self.stuck.progress.stood(suspicion.cpu) >= limit;
        if suspicion.looks < LOOKS_MIN || !long {
            return self.resume();
        }
        self.on_stuck(found, vcpus, stopped)
    }

    /// Begins to suspect a call: from now on the entry of its function is watched.
    fn suspect(&mut self, found: Found) -> Result<(), Error> {
        let Found { diagnosis, call, values } = found;
        let cpu = diagnosis.context.cpu.unwrap_or_default();
        let watched = Hook { kind: HookKind::Watched, at: call.entry_at };
        let armed = self.arm_with(Some(watched));
        self.resume()?;
        armed?;
        let fields = json!({
            "cpu": cpu, "vcpu": call.vcpu, "module": call.module, "function": call.function,
            "class": diagnosis.class, "title": diagnosis.title,
        });
        let text = format!("CPU {cpu} makes no progress in {} [{}]", call.function, call.module);
        self.stuck.told = None;
        self.stuck.suspicion =
            Some(Suspicion { cpu, call, looks: 1, visits: 0, values: vec![values] });
        self.say("suspected", fields, &text)
    }

    /// A CPU stands, and no driver is seen to be the cause at this look.
    fn on_not_stuck(&mut self, standing: &[usize], why: &NotStuck) -> Result<(), Error> {
        // What it merely was interrupted by says nothing.
        if matches!(why, NotStuck::Interrupted | NotStuck::Free { .. }) {
            return Ok(());
        }
        if self.stuck.suspicion.is_some() {
            return self.end_suspicion(&why.to_string());
        }
        let Some(&cpu) = standing.first() else { return Ok(()) };
        for &cpu in standing {
            self.stuck.progress.absolve(cpu);
        }
        let told = Some((cpu, why.to_string()));
        if *why == NotStuck::UserMode || self.stuck.told == told {
            return Ok(());
        }
        self.stuck.told = told;
        let text = format!("CPU {cpu} makes no progress: {why}");
        self.say("standing", json!({ "cpu": cpu, "reason": why.to_string() }), &text)
    }

    /// It is proven: the call is ended if that can be done. The guest stands since `stopped`.
    fn on_stuck(
        &mut self,
        found: Found,
        vcpus: &[Registers],
        stopped: Instant,
    ) -> Result<(), Error> {
        let Found { mut diagnosis, call, .. } = found;
        let Some(suspicion) = self.stuck.suspicion.take() else { return self.resume() };
        let stood = self.stuck.progress.stood(suspicion.cpu);
        self.stuck.progress.absolve(suspicion.cpu);
        self.incidents = self.incidents.saturating_add(1);
        self.strikes.set_time(self.elapsed());
        diagnosis.evidence.push(format!(
            "CPU {} made no progress for {:.1} s of its time; {} looks found it in this call of {}, which was not \
             called again meanwhile",
            suspicion.cpu,
            stood.as_secs_f64(),
            suspicion.looks,
            call.entry,
        ));
        let hook = Hook { kind: HookKind::Stuck, at: call.entry_at };
        let stop = Stop { vcpu: call.vcpu, reason: StopReason::Hook(hook), at: stopped };
        let mut handled = Handled::begin(hook);
        handled.diagnosis = Some(diagnosis);
        handled.phases.push(("diagnosed", stopped.elapsed()));
        let armed = self.arm_with(None);
        let treated = armed.and_then(|()| self.treat(stopped, vcpus, &mut handled));
        if let Err(error) = treated {
            handled.end = End::LetGo { reason: in_one_line(&error) };
            self.lost = self.lost.saturating_add(1);
            self.stuck.refused.truncate(TOLD_MAX - 1);
            self.stuck.refused.insert(0, call);
        }
        self.resume()?;
        self.conclude(stop, handled)
    }
}

#[cfg(test)]
mod tests {
    use guest::GuestVirt;

    use super::*;
    use crate::POLL;
    use crate::testing::{Memory, at_work};

    fn suspicion(values: &[u64]) -> Suspicion {
        let look = |&value: &u64| vec![(Reg::Rip, value), (Reg::Rbx, 7), (Reg::R12, value)];
        let at = GuestVirt(0xffff_ffff_c000_0000);
        let call = Call {
            vcpu: Vcpu(0),
            task: at,
            returns_to: at,
            rsp: at,
            entry_at: at,
            module: "m".to_owned(),
            entry: "write".to_owned(),
            function: "poll".to_owned(),
        };
        let values = values.iter().map(look).collect();
        Suspicion { cpu: 0, call, looks: 4, visits: 0, values }
    }

    #[test]
    fn a_loop_that_counts_makes_headway() {
        assert!(suspicion(&[1, 5, 6, 9]).makes_headway());
        assert!(suspicion(&[9, 8, 3, 2]).makes_headway());
        assert!(!suspicion(&[1, 5, 5, 9]).makes_headway());
        assert!(!suspicion(&[1, 5, 2, 9]).makes_headway());
        assert!(!suspicion(&[1, 5, 9]).makes_headway(), "too few looks to say so");
    }

    #[test]
    fn a_visit_to_a_watched_function_is_no_crash() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let watched = Hook { kind: HookKind::Watched, at: GuestVirt(0xffff_ffff_c000_0000) };
        guard.stuck.suspicion = Some(suspicion(&[1]));
        for visits in [1, VISITS_MAX] {
            let suspicion = guard.stuck.suspicion.as_mut().unwrap();
            suspicion.visits = visits - 1;
            guard.machine.script.push_back(StopReason::Hook(watched));
            assert!(guard.step(POLL).unwrap());
            assert!(guard.machine.running && guard.stuck.suspicion.is_some());
        }
        guard.machine.script.push_back(StopReason::Hook(watched));
        assert!(guard.step(POLL).unwrap());
        assert!(guard.machine.running && guard.stuck.suspicion.is_none());
        assert_eq!(guard.machine.armed.len(), 4);
        assert_eq!(memory.names(), ["unsuspected"]);
        assert_eq!((guard.incidents(), guard.lost()), (0, 0));
    }
}
