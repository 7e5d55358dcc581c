//! Tasks that sleep for each other's locks: noticed while the guest runs, named, and the call that closes the circle
//! ended. Who sleeps for what is `diagnose::asleep`'s; a task that was woken and stands is treated as any crash.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use diagnose::asleep::{self, Circle, NotWaiting, Sleeper, Waiter};
use guest::{GuestVirt, Hook, HookKind, Machine, Stop, StopReason, VirtMemory};
use quarantine::Journal;
use serde_json::json;

use crate::Error;
use crate::crash::{End, Handled};
use crate::error::in_one_line;
use crate::guard::{Guard, all_registers};

/// Time between two looks at all tasks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A look may take no more than one part in so many of the time, unless looks would then be too far apart.
const SHARE: u32 = 20;
const LOOK_EVERY_MAX: Duration = Duration::from_secs(2);
/// Sleepers whose stacks are looked at, at one look.
const LOOKED_AT_MAX: usize = 64;
/// How long a tick, or the task that was woken, is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often one circle is tried.
const TRIES_MAX: u32 = 20;
/// Circles and sleepers that were told and are not told again.
const TOLD_MAX: usize = 64;

/// What is known of tasks that sleep.
#[derive(Default)]
pub struct Asleep {
    looked: Option<Instant>,
    rest: Duration,
    /// Sleepers by task, since when they sleep.
    sleepers: HashMap<GuestVirt, (u64, Instant)>,
    /// The circle that the last look found, and when it was first found as it is.
    circle: Option<(Circle, Instant)>,
    chase: Option<Chase>,
    /// Tasks and locks of circles that were tried, and how often.
    tried: Vec<(GuestVirt, GuestVirt, u32)>,
    /// Sleepers that were told of: task and switches.
    told: Vec<(GuestVirt, u64)>,
}

/// A task that is to be woken and met where it goes on.
struct Chase {
    circle: Circle,
    begun: Instant,
    /// What was written to wake it.
    journal: Journal,
    stage: Stage,
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

    /// Looks at the tasks of a guest that runs.
    pub(crate) fn look_at_sleepers(&mut self) -> Result<(), Error> {
        let limit = Duration::from_secs(self.options.policy.lockup_s);
        if limit.is_zero() || self.watch.since_let_go().is_some() {
            return Ok(());
        }
        if self.asleep.chase.as_ref().is_some_and(|chase| chase.begun.elapsed() > PATIENCE) {
            return self.end_chase("the task was not met in time");
        }
        let now = Instant::now();
        let due = self.asleep.looked.is_none_or(|at| now.duration_since(at) >= self.asleep.rest);
        if !due || self.is_chasing() || self.stuck.suspects() || !self.is_running() {
            return Ok(());
        }
        let found = self.sleepers(now);
        self.asleep.looked = Some(now);
        self.asleep.rest = (now.elapsed() * SHARE).clamp(LOOK_EVERY, LOOK_EVERY_MAX);
        let (circle, hung) = found;
        let before = self.asleep.circle.take();
        if let Some(circle) = circle {
            let same = before.filter(|(before, _)| before.is_same(&circle));
            // It stood for so long before the try that failed.
            let again = same.is_some() && self.was_tried(&circle);
            let since = same.map_or(now, |(_, since)| since);
            self.asleep.circle = Some((circle.clone(), since));
            if again || now.saturating_duration_since(since) >= limit {
                return self.on_circle(circle);
            }
        }
        self.tell_hung(hung)
    }

    /// Whether it was tried to end this circle before.
    fn was_tried(&self, circle: &Circle) -> bool {
        let first = circle.waiters.first();
        let key = first.map(|first| (first.sleeper.position.task, first.queued.lock));
        self.asleep.tried.iter().any(|it| Some((it.0, it.1)) == key)
    }

    /// A circle among those who have slept since the last look, and who has slept for too long. What can't be read of
    /// a guest that runs is read at the next look.
    fn sleepers(&mut self, now: Instant) -> (Option<Circle>, Vec<(Sleeper, Duration, String)>) {
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        let Ok(sleepers) = asleep::sleepers(image, &memory) else { return (None, Vec::new()) };
        let timeout = hung_timeout(image, &memory);
        let before = std::mem::take(&mut self.asleep.sleepers);
        let mut waiters: Vec<Waiter> = Vec::new();
        let mut hung = Vec::new();
        for sleeper in sleepers {
            let task = sleeper.position.task;
            let since = match before.get(&task) {
                Some((switches, since)) if *switches == sleeper.switches => Some(*since),
                _ => None,
            };
            self.asleep.sleepers.insert(task, (sleeper.switches, since.unwrap_or(now)));
            let Some(since) = since.filter(|_| waiters.len() < LOOKED_AT_MAX) else { continue };
            let long = now.saturating_duration_since(since);
            let found = asleep::look(image, &memory, &sleeper, &mut self.session.cache);
            if timeout.is_some_and(|timeout| long >= timeout) && found != Err(NotWaiting::Woken) {
                let what = match &found {
                    Ok(waiter) => waiter.describe(),
                    Err(why) => why.to_string(),
                };
                hung.push((sleeper, long, what));
            }
            waiters.extend(found.ok());
        }
        (Circle::find(&waiters), hung)
    }

    /// Names who has slept for longer than the kernel itself allows. Who is at fault is not known.
    fn tell_hung(&mut self, hung: Vec<(Sleeper, Duration, String)>) -> Result<(), Error> {
        for (sleeper, long, what) in hung {
            let key = (sleeper.position.task, sleeper.switches);
            if self.asleep.told.contains(&key) {
                continue;
            }
            self.asleep.told.truncate(TOLD_MAX - 1);
            self.asleep.told.insert(0, key);
            let reason =
                "no circle of owners and waiters is seen: whoever is waited for may still come";
            let position = &sleeper.position;
            let (comm, pid) = (position.comm.clone(), position.pid);
            let seconds = long.as_secs();
            let fields = json!({
                "comm": comm, "pid": pid, "task": position.task, "seconds": seconds,
                "what": what, "reason": reason,
            });
            let text = format!("{comm} (pid {pid}) has slept for {seconds} s: {what}; {reason}");
            self.say("hung", fields, &text)?;
        }
        Ok(())
    }

    /// A circle has stood for so long, with nobody in it having run. By the kernel's rules the owner alone unlocks, so
    /// it is proven at the second look; the time is for drivers that break them and unlock in another task.
    fn on_circle(&mut self, circle: Circle) -> Result<(), Error> {
        let Some(first) = circle.waiters.first() else { return Ok(()) };
        let key = (first.sleeper.position.task, first.queued.lock);
        let tried = &mut self.asleep.tried;
        let tries = match tried.iter_mut().find(|it| (it.0, it.1) == key) {
            Some(it) => {
                it.2 = it.2.saturating_add(1);
                it.2
            }
            None => {
                tried.truncate(TOLD_MAX - 1);
                tried.insert(0, (key.0, key.1, 1));
                1
            }
        };
        if tries == 1 {
            let lines = circle.describe();
            let text = format!("deadlock: {}", lines.join("; "));
            let tasks: Vec<_> = circle.waiters.iter().map(|it| it.sleeper.position.pid).collect();
            self.say("deadlock", json!({ "waiters": lines, "pids": tasks }), &text)?;
        }
        let at = quarantine::nudge_at(&self.session.image);
        let refused = match (circle.victim(), at) {
            (Err(why), _) => Some(why.to_string()),
            (_, None) => Some("the kernel has no timer tick that is known".to_owned()),
            _ if self.options.dry_run => Some("nothing is written in a dry run".to_owned()),
            _ => None,
        };
        if let Some(reason) = refused {
            if tries > 1 {
                return Ok(());
            }
            self.incidents = self.incidents.saturating_add(1);
            self.lost = self.lost.saturating_add(1);
            let text = format!("not repaired: {reason}");
            return self.say("refused", json!({ "reason": reason, "refused": [] }), &text);
        }
        let Some(at) = at.filter(|_| tries <= TRIES_MAX) else { return Ok(()) };
        self.asleep.chase = Some(Chase {
            circle,
            begun: Instant::now(),
            journal: Journal::default(),
            stage: Stage::Tick { at },
        });
        self.standing(|guard| guard.arm_with(Some(Hook { kind: HookKind::Watched, at })))
    }

    /// Takes the chase and its hook away.
    fn end_chase(&mut self, why: &str) -> Result<(), Error> {
        if self.asleep.chase.take().is_none() {
            return Ok(());
        }
        self.standing(|guard| guard.arm_with(None))?;
        let fields = json!({ "reason": why });
        self.say("unchased", fields, &format!("the deadlock is left for now: {why}"))
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
        let Some(victim) = chase.circle.waiters.first() else { return self.resume() };
        let (task, at) = (victim.sleeper.position.task, victim.resumes_at);
        let nudged = if self.is_unchanged(&chase.circle, true) {
            self.arm_with(Some(Hook { kind: HookKind::Watched, at })).and_then(|()| {
                let image = &self.session.image;
                let journal = &mut chase.journal;
                quarantine::nudge(&mut self.machine, image, journal, stop.vcpu, task)
                    .map_err(Error::Apply)
            })
        } else {
            Err(Error::CircleOpen)
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
                let reason = in_one_line(&error);
                let text = format!("the deadlock is left for now: {reason}");
                self.say("unchased", json!({ "reason": reason }), &text)
            }
        }
    }

    /// Whether the circle of a guest that stands is as it was; with `asleep`, nobody in it has run. Without it, the
    /// first one was woken.
    fn is_unchanged(&self, circle: &Circle, asleep: bool) -> bool {
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        circle.waiters.iter().enumerate().all(|(index, waiter)| {
            let sleeps = || waiter.sleeper.sleeps_on(image, &memory);
            waiter.still_waits(image, &memory) && (index == 0 && !asleep || sleeps())
        })
    }

    /// Somebody passes the place where the task goes on.
    fn on_passing(&mut self, stop: Stop) -> Result<(), Error> {
        let current = self.current_of(stop.vcpu);
        let Some(chase) = &self.asleep.chase else { return self.resume() };
        let victim = chase.circle.waiters.first();
        if victim.is_none_or(|victim| Some(victim.sleeper.position.task) != current) {
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
            Err(Error::CircleOpen) => {
                self.resume()?;
                let fields = json!({ "reason": "it is open" });
                return self.say("unchased", fields, "the deadlock is none any more");
            }
            Err(error) => {
                handled.end = End::LetGo { reason: in_one_line(&error) };
                self.lost = self.lost.saturating_add(1);
                self.give_up(&chase.circle);
            }
            Ok(()) => self.forget(&chase.circle),
        }
        self.incidents = self.incidents.saturating_add(1);
        self.resume()?;
        self.conclude(stop, handled)
    }

    /// The task stands where it goes on.
    fn on_caught(&mut self, stop: Stop, chase: &Chase, handled: &mut Handled) -> Result<(), Error> {
        self.arm_with(None)?;
        if !self.is_unchanged(&chase.circle, false) {
            return Err(Error::CircleOpen);
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
            &chase.circle,
            &mut self.session.cache,
        );
        handled.diagnosis = Some(diagnosis.map_err(Error::NotCaught)?);
        handled.phases.push(("diagnosed", stop.at.elapsed()));
        self.treat(stop.at, &vcpus, handled)
    }

    /// The circle is open: should there be one like it again, it is another.
    fn forget(&mut self, circle: &Circle) {
        let Some(first) = circle.waiters.first() else { return };
        let task = first.sleeper.position.task;
        self.asleep.tried.retain(|it| it.0 != task);
    }

    /// The circle is not tried again.
    fn give_up(&mut self, circle: &Circle) {
        let Some(first) = circle.waiters.first() else { return };
        let key = (first.sleeper.position.task, first.queued.lock);
        if let Some(tried) = self.asleep.tried.iter_mut().find(|it| (it.0, it.1) == key) {
            tried.2 = TRIES_MAX;
        }
    }
}

fn hook_of(stop: Stop) -> Hook {
    match stop.reason {
        StopReason::Hook(hook) => hook,
        _ => Hook { kind: HookKind::Stuck, at: GuestVirt(0) },
    }
}

/// How long the kernel lets a task sleep, `sysctl_hung_task_timeout_secs` (kernel/hung_task.c); `None` where it does
/// not look.
fn hung_timeout(image: &repair_image::RepairImage, memory: &dyn VirtMemory) -> Option<Duration> {
    let at = image.address_of("sysctl_hung_task_timeout_secs")?;
    let seconds = memory.read_u64(at).ok().filter(|seconds| *seconds > 0)?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::POLL;
    use crate::testing::{Memory, at_work};

    fn chase(at: GuestVirt, begun: Instant) -> Chase {
        let position = diagnose::tasks::TaskPosition {
            task: at,
            pid: 1,
            tgid: 1,
            comm: String::new(),
            on_cpu: None,
            state: 2,
            sp: at,
        };
        let queued = asleep::Queued { kind: asleep::SleepingLock::Mutex, lock: at, entry: at };
        let waiter = Waiter {
            sleeper: Sleeper { position, switches: 0, ran_at: 0 },
            queued,
            owner: None,
            reads: Vec::new(),
            driver: Some(("m".to_owned(), "f".to_owned())),
            resumes_at: at,
            rsp: at,
            preempt_count: 1,
        };
        let circle = Circle { waiters: vec![waiter] };
        Chase { circle, begun, journal: Journal::default(), stage: Stage::Task { at } }
    }

    #[test]
    fn whoever_else_passes_ends_a_chase() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let at = GuestVirt(0xffff_ffff_8100_0800);
        for hook_at in [at, at + 8] {
            guard.asleep.chase = Some(chase(at, Instant::now()));
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
    fn who_sleeps_for_too_long_is_told_once() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let circle = chase(GuestVirt(0xffff_8880_0000_1000), Instant::now()).circle;
        let mut sleeper = circle.waiters[0].sleeper.clone();
        for (switches, expected) in [(1, vec!["hung"]), (1, vec![]), (2, vec!["hung"])] {
            sleeper.switches = switches;
            let long = Duration::from_secs(120);
            guard.tell_hung(vec![(sleeper.clone(), long, "it sleeps in f".to_owned())]).unwrap();
            if !expected.is_empty() {
                let told = memory.last("hung");
                assert_eq!((&told["seconds"], &told["pid"]), (&json!(120), &json!(1)));
                assert_eq!(told["what"], "it sleeps in f");
            }
            assert_eq!(memory.names(), expected);
        }
        assert_eq!((guard.incidents(), guard.lost()), (0, 0));
    }

    #[test]
    fn a_task_that_does_not_come_is_not_waited_for() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let long_ago = Instant::now().checked_sub(PATIENCE * 2).unwrap();
        guard.asleep.chase = Some(chase(GuestVirt(0xffff_ffff_8100_0800), long_ago));
        assert!(guard.step(POLL).unwrap());
        assert!(guard.machine.running && !guard.is_chasing());
        assert_eq!(memory.names(), ["unchased"]);
    }

    #[test]
    fn a_circle_that_has_opened_is_left_alone() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let at = GuestVirt(0xffff_ffff_8100_0800);
        guard.asleep.chase = Some(Chase { stage: Stage::Tick { at }, ..chase(at, Instant::now()) });
        guard.machine.script.push_back(StopReason::Hook(Hook { kind: HookKind::Watched, at }));
        assert!(guard.step(POLL).unwrap());
        assert!(guard.machine.running && !guard.is_chasing());
        assert_eq!(guard.machine.writes, 0);
        assert_eq!(memory.names(), ["unchased"]);
    }
}
