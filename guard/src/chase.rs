//! A sleeping task that is to be got hold of: woken from a CPU's timer tick, met where it goes on, and treated there as
//! any crash. Who is chased, and why, is `asleep.rs`'s and `stranded.rs`'s.

use std::time::{Duration, Instant};

use diagnose::asleep::{self, Circle, Stranded, Victim};
use guest::{GuestVirt, Hook, HookKind, Machine, Stop, StopReason, VirtMemory};
use quarantine::Journal;
use repair_image::RepairImage;
use serde_json::json;

use crate::Error;
use crate::crash::{End, Handled};
use crate::error::in_one_line;
use crate::guard::{Guard, all_registers};

/// How long a tick, or the task that was woken, is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why a task is chased.
#[derive(Clone, Debug)]
pub enum Quarry {
    /// It is one of tasks that wait for each other.
    Circle(Circle),
    /// Its driver was quarantined.
    Stranded(Stranded),
}

impl Quarry {
    /// Whether all is as it was, for a guest that stands; with `asleep`, nobody concerned has run. Without it, the one
    /// that is chased was woken.
    fn is_unchanged(&self, image: &RepairImage, memory: &dyn VirtMemory, asleep: bool) -> bool {
        match self {
            Self::Circle(circle) => circle.waiters.iter().enumerate().all(|(index, waiter)| {
                let sleeps = || waiter.sleeper.sleeps_on(image, memory);
                waiter.still_waits(image, memory) && (index == 0 && !asleep || sleeps())
            }),
            Self::Stranded(stranded) => {
                let sleeps = || stranded.sleeper.sleeps_on(image, memory);
                stranded.still_waits(image, memory) && (!asleep || sleeps())
            }
        }
    }

    /// What is left for now when it is not caught.
    fn noun(&self) -> &'static str {
        match self {
            Self::Circle(_) => "the deadlock",
            Self::Stranded(_) => "who sleeps in the quarantined driver",
        }
    }
}

/// A task that is to be woken and met where it goes on.
pub struct Chase {
    quarry: Quarry,
    victim: Victim,
    begun: Instant,
    /// What was written to wake it.
    journal: Journal,
    stage: Stage,
}

impl Chase {
    /// Whether what it waits for has not come in time.
    pub(crate) fn is_overdue(&self) -> bool {
        self.begun.elapsed() > PATIENCE
    }
}

/// What a chase waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// A CPU's timer tick, to wake the task from.
    Tick {
        /// Where, guest-virtual.
        at: GuestVirt,
    },
    /// The task that was woken.
    Task {
        /// Where, guest-virtual.
        at: GuestVirt,
    },
}

impl<M: Machine> Guard<M> {
    /// Whether a task is being chased, and the hook for more is in use.
    pub(crate) fn is_chasing(&self) -> bool {
        self.asleep.chase.is_some()
    }

    /// Why nobody can be chased, if that is so.
    pub(crate) fn why_not_chase(&self) -> Option<String> {
        if quarantine::nudge_at(&self.session.image).is_none() {
            return Some("the kernel has no timer tick that is known".to_owned());
        }
        self.options.dry_run.then(|| "nothing is written in a dry run".to_owned())
    }

    /// An incident that nothing is done about.
    pub(crate) fn refuse_chase(&mut self, reason: &str) -> Result<(), Error> {
        self.incidents = self.incidents.saturating_add(1);
        self.lost = self.lost.saturating_add(1);
        let text = format!("not repaired: {reason}");
        self.say("refused", json!({ "reason": reason, "refused": [] }), &text)
    }

    /// Waits for the next tick, to wake the task from there.
    pub(crate) fn begin_chase(&mut self, quarry: Quarry, victim: Victim) -> Result<(), Error> {
        let Some(at) = quarantine::nudge_at(&self.session.image) else { return Ok(()) };
        self.asleep.chase = Some(Chase {
            quarry,
            victim,
            begun: Instant::now(),
            journal: Journal::default(),
            stage: Stage::Tick { at },
        });
        self.standing(|guard| guard.arm_with(Some(Hook { kind: HookKind::Watched, at })))
    }

    /// Takes the chase and its hook away.
    pub(crate) fn end_chase(&mut self, why: &str) -> Result<(), Error> {
        let Some(chase) = self.asleep.chase.take() else { return Ok(()) };
        self.standing(|guard| guard.arm_with(None))?;
        self.tell_unchased(&chase, why)
    }

    fn tell_unchased(&mut self, chase: &Chase, why: &str) -> Result<(), Error> {
        let text = format!("{} is left for now: {why}", chase.quarry.noun());
        self.say("unchased", json!({ "reason": why }), &text)
    }

    /// A vCPU came to the place that is watched for a chase.
    pub(crate) fn on_chased(&mut self, stop: Stop, hook: Hook) -> Result<(), Error> {
        let Some(chase) = &self.asleep.chase else {
            self.arm_with(None)?;
            return self.resume();
        };
        match chase.stage {
            Stage::Tick { at } if at == hook.at => self.on_tick(stop),
            Stage::Task { at } if at == hook.at => self.on_passing(stop),
            _ => {
                self.end_chase("a vCPU stands at another place")?;
                self.resume()
            }
        }
    }

    /// A CPU's tick: the task is woken from there.
    fn on_tick(&mut self, stop: Stop) -> Result<(), Error> {
        let Some(mut chase) = self.asleep.chase.take() else { return self.resume() };
        let (task, at) = (chase.victim.sleeper.position.task, chase.victim.resumes_at);
        let nudged = if self.is_unchanged(&chase.quarry, true) {
            self.arm_with(Some(Hook { kind: HookKind::Watched, at })).and_then(|()| {
                let image = &self.session.image;
                let journal = &mut chase.journal;
                quarantine::nudge(&mut self.machine, image, journal, stop.vcpu, task)
                    .map_err(Error::Apply)
            })
        } else {
            Err(Error::NotAsleep)
        };
        match nudged {
            Ok(()) => {
                chase.stage = Stage::Task { at };
                chase.begun = Instant::now();
                self.asleep.chase = Some(chase);
                self.resume()
            }
            Err(error) => {
                self.arm_with(None)?;
                self.resume()?;
                self.tell_unchased(&chase, &in_one_line(&error))
            }
        }
    }

    fn is_unchanged(&self, quarry: &Quarry, asleep: bool) -> bool {
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        quarry.is_unchanged(image, &memory, asleep)
    }

    /// Somebody passes the place where the task goes on.
    fn on_passing(&mut self, stop: Stop) -> Result<(), Error> {
        let current = self.current_of(stop.vcpu);
        let Some(chase) = &self.asleep.chase else { return self.resume() };
        if Some(chase.victim.sleeper.position.task) != current {
            // Letting somebody by takes a single step of the vCPU, of which a debug exception may reach the guest. The
            // task that was woken goes to sleep again, and is woken another time.
            self.end_chase("another task came first to where it goes on")?;
            return self.resume();
        }
        let Some(chase) = self.asleep.chase.take() else { return self.resume() };
        let hook = Hook { kind: HookKind::Stuck, ..hook_of(stop) };
        let mut handled = Handled::begin(hook);
        let caught = self.on_caught(stop, &chase, &mut handled);
        // The others' looks begin anew, and so does this one's if it goes on waiting.
        self.asleep.circle = None;
        match caught {
            Err(error @ Error::NotAsleep) => {
                self.resume()?;
                return self.tell_unchased(&chase, &in_one_line(&error));
            }
            Err(error) => {
                handled.end = End::LetGo { reason: in_one_line(&error) };
                self.lost = self.lost.saturating_add(1);
                self.give_up(&chase.quarry);
            }
            Ok(()) => self.forget(&chase.quarry),
        }
        self.incidents = self.incidents.saturating_add(1);
        self.resume()?;
        self.conclude(stop, handled)
    }

    /// The task stands where it goes on.
    fn on_caught(&mut self, stop: Stop, chase: &Chase, handled: &mut Handled) -> Result<(), Error> {
        self.arm_with(None)?;
        if !self.is_unchanged(&chase.quarry, false) {
            return Err(Error::NotAsleep);
        }
        self.strikes.set_time(self.elapsed());
        let vcpus = all_registers(&mut self.machine)?;
        let registers = vcpus.get(stop.vcpu.0).ok_or(Error::UnknownVcpu(stop.vcpu))?;
        self.session.refresh_from_memory(self.machine.phys())?;
        handled.phases.push(("registers", stop.at.elapsed()));
        let diagnosis = asleep::caught(
            &self.session.image,
            self.machine.phys(),
            registers,
            stop.vcpu,
            &chase.victim,
            &mut self.session.cache,
        );
        handled.diagnosis = Some(diagnosis.map_err(Error::NotCaught)?);
        handled.phases.push(("diagnosed", stop.at.elapsed()));
        self.treat(stop.at, &vcpus, handled)
    }

    /// It is done with: should there be another like it, it is another.
    fn forget(&mut self, quarry: &Quarry) {
        match quarry {
            Quarry::Circle(circle) => self.forget_circle(circle),
            Quarry::Stranded(stranded) => self.asleep.inside.forget(stranded),
        }
    }

    /// It is not tried again.
    fn give_up(&mut self, quarry: &Quarry) {
        match quarry {
            Quarry::Circle(circle) => self.give_up_circle(circle),
            Quarry::Stranded(stranded) => self.asleep.inside.give_up(stranded),
        }
    }
}

fn hook_of(stop: Stop) -> Hook {
    match stop.reason {
        StopReason::Hook(hook) => hook,
        _ => Hook { kind: HookKind::Stuck, at: GuestVirt(0) },
    }
}

#[cfg(test)]
mod tests {
    use diagnose::asleep::Waiter;

    use super::*;
    use crate::POLL;
    use crate::testing::{Memory, at_work, sleeper};

    fn circle(at: GuestVirt) -> Quarry {
        let queued = asleep::Queued { kind: asleep::QueueKind::Mutex, lock: at, entry: at };
        let waiter = Waiter {
            sleeper: sleeper(at),
            queued,
            owner: None,
            reads: Vec::new(),
            driver: Some(("m".to_owned(), "f".to_owned())),
            resumes_at: at,
            rsp: at,
            preempt_count: 1,
        };
        Quarry::Circle(Circle { waiters: vec![waiter] })
    }

    fn stranded(at: GuestVirt) -> Quarry {
        let (module, function) = ("m".to_owned(), "f".to_owned());
        let sleeper = sleeper(at);
        let (queued, is_known) = (None, true);
        Quarry::Stranded(Stranded { sleeper, queued, module, function, resumes_at: at, is_known })
    }

    fn chase(quarry: Quarry, begun: Instant, stage: Stage) -> Chase {
        let victim = match &quarry {
            Quarry::Circle(circle) => circle.victim().unwrap(),
            Quarry::Stranded(stranded) => stranded.victim(),
        };
        Chase { quarry, victim, begun, journal: Journal::default(), stage }
    }

    #[test]
    fn whoever_else_passes_ends_a_chase() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let at = GuestVirt(0xffff_ffff_8100_0800);
        for (quarry, hook_at) in [(circle(at), at), (circle(at), at + 8), (stranded(at), at)] {
            guard.asleep.chase = Some(chase(quarry, Instant::now(), Stage::Task { at }));
            let hook = Hook { kind: HookKind::Watched, at: hook_at };
            guard.machine.script.push_back(StopReason::Hook(hook));
            assert!(guard.step(POLL).unwrap());
            assert!(guard.machine.running && !guard.is_chasing());
            assert_eq!(memory.names(), ["unchased"]);
            assert_eq!(guard.machine.armed.len(), 4);
        }
        assert_eq!((guard.machine.writes, guard.incidents(), guard.lost()), (0, 0, 0));
    }

    #[test]
    fn a_task_that_does_not_come_is_not_waited_for() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let long_ago = Instant::now().checked_sub(PATIENCE * 2).unwrap();
        let at = GuestVirt(0xffff_ffff_8100_0800);
        guard.asleep.chase = Some(chase(circle(at), long_ago, Stage::Task { at }));
        assert!(guard.step(POLL).unwrap());
        assert!(guard.machine.running && !guard.is_chasing());
        assert_eq!(memory.names(), ["unchased"]);
    }

    #[test]
    fn whoever_does_not_sleep_any_more_is_left_alone() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let at = GuestVirt(0xffff_ffff_8100_0800);
        for quarry in [circle(at), stranded(at)] {
            guard.asleep.chase = Some(chase(quarry, Instant::now(), Stage::Tick { at }));
            guard.machine.script.push_back(StopReason::Hook(Hook { kind: HookKind::Watched, at }));
            assert!(guard.step(POLL).unwrap());
            assert!(guard.machine.running && !guard.is_chasing());
            assert_eq!(guard.machine.writes, 0);
            assert_eq!(memory.names(), ["unchased"]);
        }
    }
}
