//! Which tasks take page faults again and again while their program stays where it is: a few words a CPU, read without
//! stopping the guest. Says who is suspect and for how long; whether a driver is the cause is `fault_loop.rs`'s.

use std::time::{Duration, Instant};

use diagnose::fault_loop::user_registers;
use guest::{GuestVirt, Registers, VirtMemory};
use repair_image::RepairImage;

/// The least time between two looks at a task: a rate needs some.
const GAP_MIN: Duration = Duration::from_millis(50);
/// The most time that one look counts for: a task that was not seen for longer may have done anything.
const GAP_MAX: Duration = Duration::from_millis(500);
/// Tasks that were not seen for so long are forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(5);
/// Page faults in a second, below which a task is not suspect. One that loops takes thousands, and shares its CPU.
const RATE_MIN: u128 = 100;
/// Looks that must find a task where it was before it is suspect.
const LOOKS_MIN: u32 = 8;
/// Tasks at most.
const TASKS_MAX: usize = 64;
/// CPUs at most.
const CPUS_MAX: usize = 1024;

/// Where the words lie in one kernel.
#[derive(Clone, Debug)]
struct Layout {
    /// `rq.curr` of each CPU, guest-virtual.
    current: Vec<GuestVirt>,
    /// `min_flt` and `maj_flt`: one of both counts each fault that the kernel takes for served, of user mode or not
    /// (`mm_account_fault()`, since v5.9), also where a driver says `VM_FAULT_NOPAGE`.
    counts: [u64; 2],
}

impl Layout {
    /// `None` when this kernel has not all of it.
    fn of(image: &RepairImage) -> Option<Self> {
        let offset = |structure, path| Some(image.types.member(structure, path)?.offset);
        let current = offset("rq", "curr")?;
        let cpus = image.placement.per_cpu.len().min(CPUS_MAX);
        let current = (0..cpus).map(|cpu| Some(image.per_cpu("runqueues", cpu)? + current));
        Some(Self {
            current: current.collect::<Option<_>>()?,
            counts: [offset("task_struct", "min_flt")?, offset("task_struct", "maj_flt")?],
        })
    }

    /// The tasks that the CPUs execute, and how many page faults each has taken.
    fn tasks(&self, memory: &dyn VirtMemory) -> Vec<(GuestVirt, u64)> {
        let counted = |&at: &GuestVirt| {
            let task = memory.read_u64(at).ok().map(GuestVirt)?;
            let [minor, major] = self.counts.map(|offset| memory.read_u64(task + offset).ok());
            Some((task, minor?.wrapping_add(major?)))
        };
        self.current.iter().filter_map(counted).collect()
    }
}

/// A task since its program was last seen to go on.
#[derive(Clone, Debug)]
struct Course {
    task: GuestVirt,
    seen: Instant,
    faults: u64,
    user: Option<Registers>,
    /// How long its program has stayed where it is, at how many looks, and with how many faults.
    stood: Duration,
    looks: u32,
    taken: u64,
    /// Until when it is not suspected again.
    spared: Option<Instant>,
}

/// The tasks of one guest that take page faults.
#[derive(Debug, Default)]
pub struct Refaults {
    /// Where to look, once that was asked.
    layout: Option<Option<Layout>>,
    courses: Vec<Course>,
}

impl Refaults {
    /// The guest stands or stood: what was seen before counts no more.
    pub fn interrupt(&mut self) {
        self.courses.clear();
    }

    /// Reads the guest while it runs.
    pub fn read(&mut self, image: &RepairImage, memory: &dyn VirtMemory, now: Instant) {
        let layout = self.layout.get_or_insert_with(|| Layout::of(image));
        let Some(layout) = layout else { return };
        for (task, faults) in layout.tasks(memory) {
            self.judge(task, faults, now, || user_registers(image, memory, task));
        }
        self.courses.retain(|it| now.saturating_duration_since(it.seen) < FORGOTTEN_AFTER);
    }

    /// `user` is asked for only where faults are or were many.
    fn judge(
        &mut self,
        task: GuestVirt,
        faults: u64,
        now: Instant,
        user: impl FnOnce() -> Option<Registers>,
    ) {
        let Some(course) = self.courses.iter_mut().find(|course| course.task == task) else {
            if self.courses.len() < TASKS_MAX {
                self.courses.push(Course::begin(task, faults, now));
            }
            return;
        };
        let passed = now.saturating_duration_since(course.seen);
        if passed < GAP_MIN {
            return;
        }
        let taken = faults.saturating_sub(course.faults);
        (course.seen, course.faults) = (now, faults);
        let often = u128::from(taken) * 1000 >= RATE_MIN * passed.as_millis();
        // Once it was seen to take many, few are enough: the host may not let the guest run, nor the guest the task.
        if !often && course.user.is_none() {
            return;
        }
        let user = user();
        if user.is_none() || user != course.user {
            let begun = Course::begin(task, faults, now);
            *course = Course { spared: course.spared, user: user.filter(|_| often), ..begun };
        } else if taken > 0 {
            course.stood += passed.min(GAP_MAX);
            course.looks = course.looks.saturating_add(1);
            course.taken = course.taken.saturating_add(taken);
        }
    }

    /// The task whose program has stayed where it is for longest, if that is for so long; and user mode's registers.
    #[must_use]
    pub fn suspect(&self, limit: Duration, now: Instant) -> Option<(GuestVirt, Registers)> {
        let is_suspect = |course: &&Course| {
            let spared = course.spared.is_some_and(|until| now < until);
            !spared && course.looks >= LOOKS_MIN && course.stood >= limit
        };
        let suspect = self.courses.iter().filter(is_suspect).max_by_key(|course| course.stood)?;
        Some((suspect.task, suspect.user?))
    }

    /// For how long a task's program has stayed where it is, and how many faults it took there.
    #[must_use]
    pub fn stood(&self, task: GuestVirt) -> (Duration, u64) {
        let course = self.courses.iter().find(|course| course.task == task);
        course.map_or((Duration::ZERO, 0), |course| (course.stood, course.taken))
    }

    /// A task is watched from the beginning again, and not suspected until then.
    pub fn spare(&mut self, task: GuestVirt, until: Instant) {
        if let Some(course) = self.courses.iter_mut().find(|course| course.task == task) {
            *course = Course {
                spared: Some(until),
                ..Course::begin(course.task, course.faults, course.seen)
            };
        }
    }
}

impl Course {
    fn begin(task: GuestVirt, faults: u64, now: Instant) -> Self {
        Self {
            task,
            seen: now,
            faults,
            user: None,
            stood: Duration::ZERO,
            looks: 0,
            taken: 0,
            spared: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use guest::Reg;

    use super::*;

    const TASK: GuestVirt = GuestVirt(0xffff_8880_0000_1000);
    const TENTH: Duration = Duration::from_millis(100);
    const SECOND: Duration = Duration::from_secs(1);

    /// How the task is seen at the n-th look: faults so far and where its program is.
    fn looks(count: u32, of: impl Fn(u64) -> (u64, u64)) -> (Refaults, Instant) {
        let (mut refaults, mut now) = (Refaults::default(), Instant::now());
        for look in 0..u64::from(count) {
            let (faults, at) = of(look);
            refaults.judge(TASK, faults, now, || {
                Some(Registers::unknown().with(Reg::Rip, 0x40_1000).with(Reg::Rdi, at))
            });
            now += TENTH;
        }
        (refaults, now)
    }

    #[test]
    fn a_program_that_faults_where_it_is_is_suspect() {
        let (refaults, now) = looks(12, |look| (look * 2000, 7));
        let (task, user) = refaults.suspect(SECOND, now).unwrap();
        assert_eq!((task, user.get(Reg::Rdi)), (TASK, Some(7)));
        assert_eq!(refaults.stood(TASK), (10 * TENTH, 20_000));
        assert_eq!(refaults.suspect(2 * SECOND, now), None);
    }

    #[test]
    fn a_program_that_touches_page_after_page_is_not() {
        // 1 GiB, as fast as it goes.
        let (refaults, now) = looks(100, |look| (look * 2600, look * 2600 * 4096));
        assert_eq!(refaults.suspect(Duration::ZERO, now), None);
        assert_eq!(refaults.stood(TASK), (Duration::ZERO, 0));
    }

    #[test]
    fn a_program_that_moves_once_begins_anew() {
        let (refaults, now) = looks(60, |look| (look * 2000, u64::from(look > 50)));
        assert_eq!(refaults.suspect(SECOND, now), None);
        assert_eq!(refaults.stood(TASK).0, 8 * TENTH);
    }

    #[test]
    fn a_program_that_waits_or_computes_takes_few_faults() {
        // Faults that somebody serves slowly, as with userfaultfd: five a second, each at another address.
        let (refaults, now) = looks(100, |look| (look / 2, look / 2));
        assert_eq!(refaults.suspect(Duration::ZERO, now), None);
        let (refaults, now) = looks(100, |_| (5, 7));
        assert_eq!(refaults.suspect(Duration::ZERO, now), None);
    }

    #[test]
    fn a_program_that_the_host_holds_up_is_suspect_still() {
        // At every other look it has not run at all.
        let (refaults, now) = looks(40, |look| (look / 2 * 30, 7));
        assert!(refaults.suspect(SECOND, now).is_some());
        let (stood, taken) = refaults.stood(TASK);
        assert!(stood < 20 * TENTH && taken <= 19 * 30, "{stood:?} {taken}");
        // And one that has looped and now computes is none.
        let (refaults, now) = looks(40, |look| ((look * 30).min(900), 7 + look.max(30)));
        assert_eq!(refaults.suspect(Duration::ZERO, now), None);
    }

    #[test]
    fn long_gaps_count_for_little_and_short_ones_not_at_all() {
        let mut refaults = Refaults::default();
        let user = || Some(Registers::unknown().with(Reg::Rip, 0x40_1000));
        let mut now = Instant::now();
        for look in 0..4 {
            refaults.judge(TASK, look * 100_000, now, user);
            refaults.judge(TASK, look * 100_000 + 1, now + Duration::from_millis(1), || None);
            now += 3 * SECOND;
        }
        assert_eq!(refaults.stood(TASK).0, 2 * GAP_MAX);
    }

    #[test]
    fn whoever_was_spared_is_let_be_for_a_while() {
        let (mut refaults, now) = looks(12, |look| (look * 2000, 7));
        refaults.spare(TASK, now + 2 * SECOND);
        assert_eq!(refaults.suspect(Duration::ZERO, now), None);
        let (mut at, mut faults) = (now, 24_000);
        for _ in 0..12 {
            (at, faults) = (at + TENTH, faults + 2000);
            let user = Registers::unknown().with(Reg::Rdi, 7);
            refaults.judge(TASK, faults, at, || Some(user));
        }
        assert_eq!(refaults.suspect(SECOND, at), None);
        assert!(refaults.suspect(SECOND, at + SECOND).is_some());
        refaults.interrupt();
        assert_eq!(refaults.suspect(Duration::ZERO, at + SECOND), None);
    }
}
