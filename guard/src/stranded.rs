//! Who still sleeps inside a driver that was quarantined: nobody enters it any more, and who was to wake them may not
//! exist. Whoever is not woken for long enough is taken out. How is in `chase.rs`; what they sleep for is
//! `diagnose::asleep`'s to say.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use diagnose::asleep::{self, NotStranded, Sleeper, Stranded};
use guest::{GuestVirt, Machine};
use serde_json::json;

use crate::Error;
use crate::chase::Quarry;
use crate::guard::Guard;

/// For how long after a quarantine all tasks are looked at: who was inside and ran then has gone to sleep or has left.
const SETTLES: Duration = Duration::from_secs(10);
/// How often one task is tried.
const TRIES_MAX: u32 = 20;
/// Sleepers that were tried or told of, and are remembered.
const KNOWN_MAX: usize = 256;

/// Instead of switches, for a task that was inside and runs, or has ended.
const AWAY: u64 = u64::MAX;

/// What is known of sleepers inside quarantined drivers.
#[derive(Default)]
pub struct Inside {
    /// Quarantined drivers, and when they were first seen to be.
    drivers: HashMap<String, Instant>,
    /// Who is inside, by task: switches, and since when it has slept on; [`AWAY`], and since when it was not seen
    /// asleep.
    sleepers: HashMap<GuestVirt, (u64, Instant)>,
    /// Tasks that were tried, and how often.
    tried: Vec<(GuestVirt, u32)>,
    /// Sleepers that are left where they are and were told of: task and switches.
    told: Vec<(GuestVirt, u64)>,
}

/// What one look found.
#[derive(Default)]
struct Found {
    /// Who can be taken out.
    stranded: Vec<Stranded>,
    /// Who can't, and why.
    left: Vec<(Sleeper, NotStranded)>,
}

impl Inside {
    /// Follows which drivers are quarantined; whether there is anything to look at.
    fn is_of_interest<'a>(&mut self, names: impl Iterator<Item = &'a str>, now: Instant) -> bool {
        let before = std::mem::take(&mut self.drivers);
        let since = |name: &str| before.get(name).copied().unwrap_or(now);
        self.drivers = names.map(|name| (name.to_owned(), since(name))).collect();
        !self.drivers.is_empty() && (self.is_settling(now) || !self.sleepers.is_empty())
    }

    fn is_settling(&self, now: Instant) -> bool {
        self.drivers.values().any(|since| now.saturating_duration_since(*since) < SETTLES)
    }

    /// Remembers who was inside and is not seen asleep now. Whoever has ended is never seen again.
    fn keep_away(
        &mut self,
        before: HashMap<GuestVirt, (u64, Instant)>,
        seen: &[GuestVirt],
        now: Instant,
    ) {
        for (task, (switches, since)) in before {
            let since = if switches == AWAY { since } else { now };
            if !seen.contains(&task) && now.saturating_duration_since(since) < SETTLES {
                self.sleepers.insert(task, (AWAY, since));
            }
        }
    }

    /// Whether all who are inside have slept on for so long.
    fn is_quiet(&self, now: Instant, limit: Duration) -> bool {
        self.sleepers.values().all(|(switches, since)| {
            *switches != AWAY && now.saturating_duration_since(*since) >= limit
        })
    }

    fn tries(&self, task: GuestVirt) -> u32 {
        self.tried.iter().find(|it| it.0 == task).map_or(0, |it| it.1)
    }

    /// Counts one more try; how many there are now.
    fn count_try(&mut self, task: GuestVirt) -> u32 {
        let tries = self.tries(task).saturating_add(1);
        self.set_tries(task, tries);
        tries
    }

    fn set_tries(&mut self, task: GuestVirt, tries: u32) {
        self.tried.retain(|it| it.0 != task);
        self.tried.truncate(KNOWN_MAX - 1);
        self.tried.insert(0, (task, tries));
    }

    /// It was taken out.
    pub(crate) fn forget(&mut self, stranded: &Stranded) {
        let task = stranded.sleeper.position.task;
        self.tried.retain(|it| it.0 != task);
        self.sleepers.remove(&task);
    }

    /// It is not tried again.
    pub(crate) fn give_up(&mut self, stranded: &Stranded) {
        self.set_tries(stranded.sleeper.position.task, TRIES_MAX);
    }
}

impl<M: Machine> Guard<M> {
    /// Looks at who sleeps inside quarantined drivers; whoever has slept on for `limit` is taken out, one at a time.
    pub(crate) fn look_inside(&mut self, now: Instant, limit: Duration) -> Result<(), Error> {
        if !self.asleep.inside.is_of_interest(self.strikes.quarantined(), now) {
            return Ok(());
        }
        let Found { stranded, left } = self.inside(now, limit);
        let tries = |stranded: &Stranded| self.asleep.inside.tries(stranded.sleeper.position.task);
        let next = stranded.into_iter().filter(|stranded| tries(stranded) < TRIES_MAX);
        if let Some(stranded) = next.min_by_key(tries) {
            return self.on_stranded(stranded);
        }
        // Who waits for another that is inside goes on when that is out.
        left.into_iter().try_for_each(|(sleeper, why)| self.tell_left(&sleeper, &why))
    }

    /// Who has slept on for so long. What can't be read of a guest that runs is read at the next look.
    fn inside(&mut self, now: Instant, limit: Duration) -> Found {
        let (image, inside) = (&self.session.image, &mut self.asleep.inside);
        let memory = image.placement.space(self.machine.phys());
        let (all, before) = (inside.is_settling(now), &inside.sleepers);
        let sleepers =
            asleep::sleepers_that(image, &memory, &|task| all || before.contains_key(&task.task));
        let Ok(sleepers) = sleepers else { return Found::default() };
        let before = std::mem::take(&mut inside.sleepers);
        let is_quarantined = |name: &str| inside.drivers.contains_key(name);
        let cache = &mut self.session.cache;
        let mut found = Found::default();
        let mut seen = Vec::new();
        cache.look_again();
        for sleeper in sleepers {
            let task = sleeper.position.task;
            seen.push(task);
            let look = asleep::stranded(image, &memory, &sleeper, &is_quarantined, cache);
            if matches!(look, Err(NotStranded::Outside | NotStranded::Unreadable)) {
                continue;
            }
            let same = before.get(&task).filter(|(switches, _)| *switches == sleeper.switches);
            // Whoever wakes by other means is about to run, however long it has slept.
            let wakes = matches!(
                look,
                Err(NotStranded::Woken | NotStranded::TakesSignals | NotStranded::Timed)
            );
            let since = same.filter(|_| !wakes).map_or(now, |(_, since)| *since);
            inside.sleepers.insert(task, (sleeper.switches, since));
            if now.saturating_duration_since(since) < limit {
                continue;
            }
            match look {
                Ok(stranded) => found.stranded.push(stranded),
                Err(why) => found.left.push((sleeper, why)),
            }
        }
        inside.keep_away(before, &seen, now);
        if !inside.is_quiet(now, limit) {
            found.stranded.retain(|stranded| !stranded.is_known);
        }
        found
    }

    /// Names who has to be left where it sleeps.
    fn tell_left(&mut self, sleeper: &Sleeper, why: &NotStranded) -> Result<(), Error> {
        let position = &sleeper.position;
        let key = (position.task, sleeper.switches);
        let told = &mut self.asleep.inside.told;
        if told.contains(&key) {
            return Ok(());
        }
        told.truncate(KNOWN_MAX - 1);
        told.insert(0, key);
        let (comm, pid, reason) = (position.comm.clone(), position.pid, why.to_string());
        let text = format!("{comm} (pid {pid}) is left in a quarantined driver: {reason}");
        let fields = json!({ "comm": comm, "pid": pid, "task": position.task, "reason": reason });
        self.say("left_inside", fields, &text)
    }

    /// A task has slept on since its driver was quarantined, and by now nobody is likely to wake it.
    fn on_stranded(&mut self, stranded: Stranded) -> Result<(), Error> {
        let position = &stranded.sleeper.position;
        let tries = self.asleep.inside.count_try(position.task);
        if tries == 1 {
            let what = stranded.describe();
            let fields = json!({
                "comm": position.comm, "pid": position.pid, "task": position.task,
                "module": stranded.module, "function": stranded.function, "what": what,
            });
            self.say("stranded", fields, &format!("stranded: {what}"))?;
        }
        if let Some(reason) = self.why_not_chase() {
            return if tries > 1 { Ok(()) } else { self.refuse_chase(&reason) };
        }
        let victim = stranded.victim();
        self.begin_chase(Quarry::Stranded(stranded), victim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Memory, at_work, sleeper};

    const TASK: GuestVirt = GuestVirt(0xffff_8880_0000_1000);

    fn stranded() -> Stranded {
        let (module, function) = ("m".to_owned(), "f".to_owned());
        let (sleeper, queued, is_known) = (sleeper(TASK), None, true);
        Stranded { sleeper, queued, module, function, resumes_at: TASK, is_known }
    }

    #[test]
    fn tasks_are_looked_at_for_a_while_and_then_only_who_is_inside() {
        let mut inside = Inside::default();
        let now = Instant::now();
        assert!(!inside.is_of_interest([].into_iter(), now));
        assert!(inside.is_of_interest(["m"].into_iter(), now));
        let later = now + SETTLES;
        assert!(!inside.is_of_interest(["m"].into_iter(), later));
        inside.sleepers.insert(TASK, (1, now));
        assert!(inside.is_of_interest(["m"].into_iter(), later) && !inside.is_settling(later));
        assert!(inside.is_of_interest(["m", "n"].into_iter(), later) && inside.is_settling(later));
        assert!(!inside.is_of_interest([].into_iter(), later), "no driver is quarantined any more");
    }

    #[test]
    fn it_is_quiet_when_nobody_is_about() {
        let (mut inside, now) = (Inside::default(), Instant::now());
        let limit = Duration::from_secs(5);
        let later = now + limit;
        assert!(inside.is_quiet(now, limit));
        inside.sleepers.insert(TASK, (1, now));
        assert!(!inside.is_quiet(now, limit) && inside.is_quiet(later, limit));
        let before = std::mem::take(&mut inside.sleepers);
        inside.keep_away(before.clone(), &[TASK], later);
        assert!(inside.sleepers.is_empty(), "it sleeps elsewhere");
        inside.keep_away(before, &[], later);
        assert!(!inside.is_quiet(later + limit, limit), "it runs");
        let before = std::mem::take(&mut inside.sleepers);
        inside.keep_away(before, &[], later + SETTLES);
        assert!(inside.sleepers.is_empty(), "it has ended");
    }

    #[test]
    fn tries_are_counted_until_it_is_out_or_given_up() {
        let mut inside = Inside::default();
        assert_eq!((inside.count_try(TASK), inside.count_try(TASK)), (1, 2));
        inside.forget(&stranded());
        assert_eq!(inside.count_try(TASK), 1);
        inside.give_up(&stranded());
        assert_eq!(inside.tries(TASK), TRIES_MAX);
    }

    #[test]
    fn what_cannot_be_done_is_told_once() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        // The toy kernel has no tick to wake anybody from.
        for expected in [vec!["stranded", "refused"], vec![]] {
            guard.on_stranded(stranded()).unwrap();
            assert_eq!(memory.names(), expected);
        }
        assert!(!guard.is_chasing());
        assert_eq!((guard.incidents(), guard.lost(), guard.machine.writes), (1, 1, 0));
    }

    #[test]
    fn who_is_left_is_told_once_and_why() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let why = NotStranded::InTheKernel { place: "kthread_stop < f [m]".to_owned() };
        for expected in [vec!["left_inside"], vec![]] {
            guard.tell_left(&sleeper(TASK), &why).unwrap();
            if !expected.is_empty() {
                let told = memory.last("left_inside");
                let reason = told["reason"].as_str().unwrap();
                assert!(reason.contains("kthread_stop"), "{reason}");
            }
            assert_eq!(memory.names(), expected);
        }
        assert_eq!((guard.incidents(), guard.lost()), (0, 0));
    }
}
