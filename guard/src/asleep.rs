//! Tasks that sleep for each other's locks: noticed while the guest runs, named, and the call that closes the circle
//! ended. Who sleeps for what is `diagnose::asleep`'s; how a sleeping task is got hold of is in `chase.rs`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use diagnose::asleep::{self, Circle, NotWaiting, Sleeper, Waiter};
use guest::{GuestVirt, Machine, VirtMemory};
use serde_json::json;

use crate::Error;
use crate::chase::{Chase, Quarry};
use crate::guard::Guard;
use crate::stranded::Inside;

/// Time between two looks at all tasks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A look may take no more than one part in so many of the time, unless looks would then be too far apart.
const SHARE: u32 = 20;
const LOOK_EVERY_MAX: Duration = Duration::from_secs(2);
/// Sleepers whose stacks are looked at, at one look.
const LOOKED_AT_MAX: usize = 64;
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
    pub(crate) circle: Option<(Circle, Instant)>,
    pub(crate) chase: Option<Chase>,
    /// Who sleeps inside drivers that were quarantined.
    pub(crate) inside: Inside,
    /// Tasks and locks of circles that were tried, and how often.
    tried: Vec<(GuestVirt, GuestVirt, u32)>,
    /// Sleepers that were told of: task and switches.
    told: Vec<(GuestVirt, u64)>,
}

impl<M: Machine> Guard<M> {
    /// Looks at the tasks of a guest that runs.
    pub(crate) fn look_at_sleepers(&mut self) -> Result<(), Error> {
        let limit = Duration::from_secs(self.options.policy.lockup_s);
        if limit.is_zero() || self.watch.since_let_go().is_some() {
            return Ok(());
        }
        if self.asleep.chase.as_ref().is_some_and(Chase::is_overdue) {
            return self.end_chase("the task was not met in time");
        }
        let now = Instant::now();
        let due = self.asleep.looked.is_none_or(|at| now.duration_since(at) >= self.asleep.rest);
        if !due || self.is_chasing() || self.stuck.suspects() || !self.is_running() {
            return Ok(());
        }
        let (circle, hung) = self.sleepers(now);
        self.look_inside(now, limit)?;
        self.asleep.looked = Some(now);
        self.asleep.rest = (now.elapsed() * SHARE).clamp(LOOK_EVERY, LOOK_EVERY_MAX);
        if self.is_chasing() {
            return Ok(());
        }
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
        let victim = circle.victim();
        let refused = self.why_not_chase().or(victim.as_ref().err().map(ToString::to_string));
        if let Some(reason) = refused {
            return if tries > 1 { Ok(()) } else { self.refuse_chase(&reason) };
        }
        match victim {
            Ok(victim) if tries <= TRIES_MAX => self.begin_chase(Quarry::Circle(circle), victim),
            _ => Ok(()),
        }
    }

    /// The circle is open: should there be one like it again, it is another.
    pub(crate) fn forget_circle(&mut self, circle: &Circle) {
        let Some(first) = circle.waiters.first() else { return };
        let task = first.sleeper.position.task;
        self.asleep.tried.retain(|it| it.0 != task);
    }

    /// The circle is not tried again.
    pub(crate) fn give_up_circle(&mut self, circle: &Circle) {
        let Some(first) = circle.waiters.first() else { return };
        let key = (first.sleeper.position.task, first.queued.lock);
        if let Some(tried) = self.asleep.tried.iter_mut().find(|it| (it.0, it.1) == key) {
            tried.2 = TRIES_MAX;
        }
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
    use crate::testing::{Memory, at_work, sleeper};

    #[test]
    fn who_sleeps_for_too_long_is_told_once() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let mut sleeper = sleeper(GuestVirt(0xffff_8880_0000_1000));
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
}
