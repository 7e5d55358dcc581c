//! Whether the CPUs of a running guest get on: a few words a CPU, read without stopping it. Says who is suspect and
//! for how long; what a suspect does, and whether it is stuck, is `stuck.rs`'s.

use std::time::{Duration, Instant};

use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;

/// The most time that one reading counts for: a host that let neither guard nor guest run in between must not look
/// like a guest that stood still.
const GAP_MAX: Duration = Duration::from_millis(250);
/// CPUs at most.
const CPUS_MAX: usize = 1024;
/// Kinds of time at most (`NR_STATS`, include/linux/kernel_stat.h: 10 or 11).
const KINDS_MAX: u64 = 32;

/// A soft interrupt (bit 8) or hard interrupts (bits 16 to 19) are being served, include/linux/preempt.h.
const SERVING: u32 = 0x000f_0100;
/// Bit 31 of x86's preempt count is the inverted flag that the scheduler wants the CPU.
const NOT_WANTED: u32 = 0x8000_0000;

/// Where a CPU's words lie, guest-virtual.
#[derive(Clone, Debug)]
struct Words {
    /// `rq.nr_switches`
    switches: GuestVirt,
    /// `rq.curr`
    current: GuestVirt,
    /// `rq.idle`
    idle: GuestVirt,
    /// `kernel_cpustat.cpustat`: nanoseconds of each kind of time.
    times: GuestVirt,
    preempt_count: GuestVirt,
}

/// Where the words lie in one kernel.
#[derive(Clone, Debug)]
struct Layout {
    jiffies: GuestVirt,
    cpus: Vec<Words>,
    /// Kinds of time.
    kinds: usize,
    /// Those that are spent in programs.
    of_programs: Vec<usize>,
}

impl Layout {
    /// `None` when this kernel has not all of it.
    fn of(image: &RepairImage) -> Option<Self> {
        let types = &image.types;
        let member = |structure, path| types.member(structure, path).map(|member| member.offset);
        let times = types.member("kernel_cpustat", "cpustat")?;
        // In `pcpu_hot` from v6.2 (commit e57ef2ed97c1) to v6.14, a variable of its own before and after.
        let hot = member("pcpu_hot", "preempt_count");
        let preempt_count = |cpu| match image.per_cpu("pcpu_hot", cpu) {
            Some(at) => Some(at + hot?),
            None => image.per_cpu("__preempt_count", cpu),
        };
        let words = |cpu| {
            let queue = image.per_cpu("runqueues", cpu)?;
            Some(Words {
                switches: queue + member("rq", "nr_switches")?,
                current: queue + member("rq", "curr")?,
                idle: queue + member("rq", "idle")?,
                times: image.per_cpu("kernel_cpustat", cpu)? + times.offset,
                preempt_count: preempt_count(cpu)?,
            })
        };
        let count = image.placement.per_cpu.len().min(CPUS_MAX);
        let of_programs = ["CPUTIME_USER", "CPUTIME_NICE"]
            .iter()
            .map(|name| usize::try_from(types.enumerator(name)?).ok());
        Some(Self {
            jiffies: image.address_of("jiffies_64")?,
            cpus: (0..count).map(words).collect::<Option<_>>()?,
            kinds: usize::try_from((times.size / 8).min(KINDS_MAX)).ok()?,
            of_programs: of_programs.collect::<Option<_>>()?,
        })
    }
}

/// One reading of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    switches: u64,
    current: u64,
    is_idle: bool,
    /// Time accounted to anything.
    ticked: u64,
    /// Time accounted to programs.
    in_programs: u64,
    preempt_count: u32,
}

impl Reading {
    fn of(layout: &Layout, words: &Words, memory: &dyn VirtMemory) -> Option<Self> {
        let word = |at| memory.read_u64(at).ok();
        let current = word(words.current)?;
        let time = |kind: usize| word(words.times + 8 * kind as u64);
        let mut ticked = 0_u64;
        for kind in 0..layout.kinds {
            ticked = ticked.wrapping_add(time(kind)?);
        }
        let mut in_programs = 0_u64;
        for &kind in &layout.of_programs {
            in_programs = in_programs.wrapping_add(time(kind)?);
        }
        Some(Self {
            switches: word(words.switches)?,
            current,
            is_idle: current == word(words.idle)?,
            ticked,
            in_programs,
            preempt_count: memory.read_u32(words.preempt_count).ok()?,
        })
    }

    /// Whether nothing since `before` shows that the CPU gets on, and something says that it should have: the
    /// scheduler wants it, its timer does not tick, or it is in one interrupt again and again. A program that
    /// computes, an idle CPU, and a thread that polls while nobody else wants the CPU all get on.
    fn stands_since(&self, before: &Self) -> bool {
        let serving = self.preempt_count & SERVING != 0;
        let wanted = self.preempt_count & NOT_WANTED == 0;
        let silent = self.ticked == before.ticked;
        let same = self.switches == before.switches
            && self.current == before.current
            && self.in_programs == before.in_programs;
        same && if self.is_idle { serving } else { serving || wanted || silent }
    }
}

/// A CPU since it was last seen to get on.
#[derive(Clone, Copy, Debug, Default)]
struct Course {
    last: Option<Reading>,
    /// How long it has stood.
    stood: Duration,
}

/// The CPUs of one guest.
#[derive(Debug, Default)]
pub struct Progress {
    /// Where to look, once that was asked.
    layout: Option<Option<Layout>>,
    courses: Vec<Course>,
    jiffies: Option<u64>,
    at: Option<Instant>,
}

impl Progress {
    /// The guest stands or stood: nothing is concluded from the time until the next reading.
    pub fn interrupt(&mut self) {
        self.at = None;
    }

    /// One CPU is watched from the beginning again.
    pub fn absolve(&mut self, cpu: usize) {
        if let Some(course) = self.courses.get_mut(cpu) {
            *course = Course::default();
        }
    }

    /// Reads all CPUs of a guest that runs.
    pub fn read(&mut self, image: &RepairImage, memory: &dyn VirtMemory, now: Instant) {
        let Some(layout) = self.layout.get_or_insert_with(|| Layout::of(image)) else { return };
        let readings: Vec<_> =
            layout.cpus.iter().map(|words| Reading::of(layout, words, memory)).collect();
        let jiffies = memory.read_u64(layout.jiffies).ok();
        let passed = self.at.map(|at| now.saturating_duration_since(at).min(GAP_MAX));
        let lives = jiffies != self.jiffies;
        self.judge(&readings, passed, lives);
        self.jiffies = jiffies;
        self.at = Some(now);
    }

    /// `passed` is `None` when nothing is to be concluded from this reading; `lives`: the guest's time went on.
    fn judge(&mut self, readings: &[Option<Reading>], passed: Option<Duration>, lives: bool) {
        self.courses.resize_with(readings.len(), Course::default);
        for (course, reading) in self.courses.iter_mut().zip(readings) {
            let stands = match (reading, course.last) {
                (Some(now), Some(before)) => now.stands_since(&before),
                _ => false,
            };
            course.stood = match passed {
                // With no timer ticking anywhere it may be the host that does not let the guest run.
                Some(passed) if stands => course.stood + if lives { passed } else { passed / 2 },
                None if stands => course.stood,
                _ => Duration::ZERO,
            };
            course.last = *reading;
        }
    }

    /// How long a CPU has stood.
    #[must_use]
    pub fn stood(&self, cpu: usize) -> Duration {
        self.courses.get(cpu).map_or(Duration::ZERO, |course| course.stood)
    }

    /// The CPUs that have stood for so long, by kernel number.
    #[must_use]
    pub fn standing_for(&self, limit: Duration) -> Vec<usize> {
        (0..self.courses.len()).filter(|&cpu| self.stood(cpu) >= limit).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Reading = Reading {
        switches: 7,
        current: 1,
        is_idle: false,
        ticked: 100,
        in_programs: 50,
        preempt_count: 0,
    };
    const TENTH: Duration = Duration::from_millis(100);

    /// How long it has stood after ten readings, each made of the one before.
    fn after_ten(first: Reading, next: impl Fn(&mut Reading), lives: bool) -> Duration {
        let mut progress = Progress::default();
        let mut reading = first;
        for _ in 0..=10 {
            progress.judge(&[Some(reading)], Some(TENTH), lives);
            next(&mut reading);
        }
        progress.stood(0)
    }

    fn ticks(reading: &mut Reading) {
        reading.ticked += 1;
    }

    #[test]
    fn a_cpu_that_is_wanted_and_does_not_switch_stands() {
        assert_eq!(after_ten(BUSY, ticks, true), 10 * TENTH);
        let unwanted = Reading { preempt_count: NOT_WANTED, ..BUSY };
        assert_eq!(after_ten(unwanted, ticks, true), Duration::ZERO);
    }

    #[test]
    fn a_cpu_without_ticks_stands_unless_it_is_idle() {
        let unwanted = Reading { preempt_count: NOT_WANTED, ..BUSY };
        assert_eq!(after_ten(unwanted, |_| (), true), 10 * TENTH);
        let idle = Reading { is_idle: true, ..unwanted };
        assert_eq!(after_ten(idle, |_| (), true), Duration::ZERO);
        let in_softirq = Reading { preempt_count: NOT_WANTED | 0x101, ..idle };
        assert_eq!(after_ten(in_softirq, ticks, true), 10 * TENTH);
    }

    #[test]
    fn programs_and_switches_are_progress() {
        assert_eq!(after_ten(BUSY, |reading| reading.in_programs += 1, true), Duration::ZERO);
        assert_eq!(after_ten(BUSY, |reading| reading.switches += 1, true), Duration::ZERO);
        assert_eq!(after_ten(BUSY, |reading| reading.current += 1, true), Duration::ZERO);
    }

    #[test]
    fn time_counts_half_when_no_timer_ticks_at_all() {
        assert_eq!(after_ten(BUSY, |_| (), false), 5 * TENTH);
    }

    #[test]
    fn a_pause_or_a_starved_host_does_not_count() {
        let mut progress = Progress::default();
        for passed in [None, Some(TENTH), None, None] {
            progress.judge(&[Some(BUSY)], passed, true);
        }
        assert_eq!(progress.stood(0), TENTH);
        assert_eq!(progress.standing_for(TENTH), [0]);
        assert!(progress.standing_for(2 * TENTH).is_empty());
        progress.absolve(0);
        assert_eq!(progress.stood(0), Duration::ZERO);
    }
}
