//! Probation after a repair: vital signs of the guest, read from its memory while it runs. Reads
//! only; what follows from them is decided by whoever guards the VM. Those of the memory management are
//! `memory_signs.rs`'s.

use std::time::Duration;

use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;

use crate::guest_struct::Structures;
use crate::memory_signs;

/// No timer tick for this long is suspect. An idle tickless guest ticks in bursts with gaps up to 2
/// s when the host is loaded.
const TICK_GAP: Duration = Duration::from_secs(4);
/// No task switch on any CPU for this long is suspect: even an idle guest has kernel threads that
/// wake.
const SWITCH_GAP: Duration = Duration::from_secs(10);
/// One and the same RCU grace period for this long is suspect: some CPU or reader does not come to its end. The
/// kernel itself complains after 21 s (`CONFIG_RCU_CPU_STALL_TIMEOUT`), when a probation is over.
const GRACE_PERIOD: Duration = Duration::from_secs(8);
/// `RCU_SEQ_STATE_MASK`, kernel/rcu/rcu.h: not zero while a grace period is under way. An idle guest has none.
const GRACE_UNDER_WAY: u64 = 3;

/// `1 << TAINT_WARN` (Documentation/admin-guide/tainted-kernels.rst: bit 9; never renumbered, as scripts read it).
const TAINT_WARN: u64 = 1 << 9;

/// State of the patient.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
#[non_exhaustive]
pub enum Vital {
    /// All signs that this kernel has are good, or it is too early to say otherwise.
    Healthy,
    /// A sign is bad.
    Suspect {
        /// Which, in words.
        reason: String,
    },
}

impl Vital {
    fn suspect(reason: impl Into<String>) -> Self {
        Self::Suspect { reason: reason.into() }
    }
}

/// One reading; `None` where this kernel has no such variable or it could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Signs {
    /// Timer ticks since boot.
    jiffies: Option<u64>,
    /// Task switches of each CPU.
    switches: Vec<Option<u64>>,
    /// Grace periods of RCU.
    grace_period: Option<u64>,
    /// Whether the kernel is printing an oops.
    oops: Option<u64>,
    /// Taint flags.
    taint: Option<u64>,
}

/// Watches one guest after a repair.
#[derive(Clone, Debug)]
pub struct Probation {
    first: Signs,
    last: Signs,
    /// Time of the last change of the ticks.
    ticked: Duration,
    /// Time of the last task switch.
    switched: Duration,
    /// Time when the RCU grace period last changed, or none was under way.
    graced: Duration,
    memory: memory_signs::History,
    length: Duration,
    begun: Duration,
}

impl Probation {
    /// Takes the first reading, best before the guest is resumed. `now` is any clock that does not
    /// go back.
    #[must_use]
    pub fn start(
        image: &RepairImage,
        memory: &dyn VirtMemory,
        length: Duration,
        now: Duration,
    ) -> Self {
        let first = read(image, memory);
        let reading = memory_signs::read(&Structures { image, memory });
        Self {
            memory: memory_signs::History::start(reading, now),
            last: first.clone(),
            first,
            ticked: now,
            switched: now,
            graced: now,
            length,
            begun: now,
        }
    }

    /// After a warning that was made to go on: its own taint flag, which it sets last, is no new trouble.
    #[must_use]
    pub fn of_a_warning(mut self) -> Self {
        self.first.taint = self.first.taint.map(|flags| flags | TAINT_WARN);
        self
    }

    /// Whether the time is over.
    #[must_use]
    pub fn is_over(&self, now: Duration) -> bool {
        now.saturating_sub(self.begun) >= self.length
    }

    /// Takes another reading.
    pub fn check(&mut self, image: &RepairImage, memory: &dyn VirtMemory, now: Duration) -> Vital {
        let reading = memory_signs::read(&Structures { image, memory });
        let suspicion = self.memory.take(reading, now);
        match (self.take(read(image, memory), now), suspicion) {
            (Vital::Healthy, Some(reason)) => Vital::suspect(reason),
            (vital, _) => vital,
        }
    }

    fn take(&mut self, signs: Signs, now: Duration) -> Vital {
        if signs.jiffies != self.last.jiffies {
            self.ticked = now;
        }
        if signs.switches != self.last.switches {
            self.switched = now;
        }
        let waits = signs.grace_period.is_some_and(|period| period & GRACE_UNDER_WAY != 0);
        if !waits || signs.grace_period != self.last.grace_period {
            self.graced = now;
        }
        let vital = self.judge(&signs, now);
        self.last = signs;
        vital
    }

    fn judge(&self, signs: &Signs, now: Duration) -> Vital {
        if signs.oops.is_some_and(|count| count != 0) && self.first.oops == Some(0) {
            return Vital::suspect("the kernel is printing an oops");
        }
        if let (Some(before), Some(after)) = (self.first.taint, signs.taint)
            && after & !before != 0
        {
            return Vital::suspect(format!("the kernel was tainted anew: {:#x}", after & !before));
        }
        let gap = now.saturating_sub(self.ticked);
        if signs.jiffies.is_some() && gap >= TICK_GAP {
            return Vital::suspect(format!("no timer tick for {} s", gap.as_secs()));
        }
        let gap = now.saturating_sub(self.switched);
        if signs.switches.iter().any(Option::is_some) && gap >= SWITCH_GAP {
            return Vital::suspect(format!("no CPU switched tasks for {} s", gap.as_secs()));
        }
        let gap = now.saturating_sub(self.graced);
        if gap >= GRACE_PERIOD {
            let gap = gap.as_secs();
            return Vital::suspect(format!("an RCU grace period has not ended for {gap} s"));
        }
        Vital::Healthy
    }

    /// Whether time went on in the guest since the start: ticks, task switches and, where there was
    /// time for one, an RCU grace period.
    #[must_use]
    pub fn has_moved(&self) -> bool {
        self.last.jiffies != self.first.jiffies
            && (self.last.switches != self.first.switches
                || self.last.grace_period != self.first.grace_period)
    }
}

fn read(image: &RepairImage, memory: &dyn VirtMemory) -> Signs {
    let structures = Structures { image, memory };
    let word = |symbol: &str, size: u64| {
        let at = image.address_of(symbol)?;
        memory.read_uint(at, size).ok()
    };
    let switches = (0..image.placement.per_cpu.len())
        .map(|cpu| {
            let queue = image.per_cpu("runqueues", cpu)?;
            structures.number(queue, "rq", "nr_switches").ok().flatten()
        })
        .collect();
    let grace = |at: GuestVirt| structures.number(at, "rcu_state", "gp_seq").ok().flatten();
    Signs {
        jiffies: word("jiffies_64", 8),
        switches,
        grace_period: image.address_of("rcu_state").and_then(grace),
        oops: word("oops_in_progress", 4),
        taint: word("tainted_mask", 8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    const SECOND: Duration = Duration::from_secs(1);

    fn check(probation: &mut Probation, scene: &Scene, now: u32) -> Vital {
        probation.check(&scene.image, &scene.machine.space(), SECOND * now)
    }

    fn start(scene: &Scene) -> Probation {
        Probation::start(&scene.image, &scene.machine.space(), SECOND * 10, Duration::ZERO)
    }

    fn live(scene: &mut Scene, tick: u64) {
        let jiffies = scene.image.address_of("jiffies_64").unwrap();
        scene.poke_word(jiffies, tick);
        let queue = scene.image.per_cpu("runqueues", 0).unwrap();
        scene.set_member("rq", "nr_switches", queue, tick);
    }

    #[test]
    fn a_ticking_guest_is_healthy() {
        let mut scene = Scene::new();
        let mut probation = start(&scene);
        for tick in 1..20 {
            live(&mut scene, tick);
            assert_eq!(check(&mut probation, &scene, tick as u32), Vital::Healthy);
        }
        assert!(probation.has_moved());
        assert!(probation.is_over(SECOND * 10));
        assert!(!probation.is_over(SECOND * 9));
    }

    #[test]
    fn memory_that_is_not_written_back_is_suspect() {
        let mut scene = Scene::new();
        scene.add_zone(40, 7);
        let mut probation = start(&scene);
        live(&mut scene, 1);
        assert_eq!(check(&mut probation, &scene, 7), Vital::Healthy);
        live(&mut scene, 2);
        assert!(matches!(check(&mut probation, &scene, 8), Vital::Suspect { .. }));
    }

    #[test]
    fn a_grace_period_that_does_not_end_is_suspect_and_an_idle_rcu_is_not() {
        let scene = Scene::new();
        for (period, is_suspect) in [(8, false), (9, true)] {
            let mut probation = start(&scene);
            let signs = Signs { grace_period: Some(period), ..Signs::default() };
            probation.last = signs.clone();
            assert_eq!(probation.take(signs.clone(), SECOND * 7), Vital::Healthy);
            let later = probation.take(signs.clone(), SECOND * 8);
            assert_eq!(matches!(later, Vital::Suspect { .. }), is_suspect, "{period}");
            let next = Signs { grace_period: Some(period + 4), ..signs };
            assert_eq!(probation.take(next, SECOND * 9), Vital::Healthy);
        }
    }

    #[test]
    fn a_standing_clock_is_suspect_after_a_while() {
        let scene = Scene::new();
        let mut probation = start(&scene);
        assert_eq!(check(&mut probation, &scene, 3), Vital::Healthy);
        assert!(matches!(check(&mut probation, &scene, 4), Vital::Suspect { .. }));
        assert!(!probation.has_moved());
    }

    #[test]
    fn the_taint_of_a_warning_that_went_on_is_its_own() {
        let mut scene = Scene::new();
        let mut probation = start(&scene).of_a_warning();
        let taint = scene.image.address_of("tainted_mask").unwrap();
        scene.poke_word(taint, TAINT_WARN);
        assert_eq!(check(&mut probation, &scene, 1), Vital::Healthy);
        scene.poke_word(taint, TAINT_WARN | 1 << 7);
        assert!(matches!(check(&mut probation, &scene, 2), Vital::Suspect { .. }));
    }

    #[test]
    fn new_taint_and_an_oops_are_suspect() {
        let mut scene = Scene::new();
        let mut probation = start(&scene);
        let taint = scene.image.address_of("tainted_mask").unwrap();
        scene.poke_word(taint, 1 << 7);
        assert!(matches!(check(&mut probation, &scene, 1), Vital::Suspect { .. }));
        let mut scene = Scene::new();
        let mut probation = start(&scene);
        let oops = scene.image.address_of("oops_in_progress").unwrap();
        scene.poke_word(oops, 1);
        assert!(matches!(check(&mut probation, &scene, 1), Vital::Suspect { .. }));
    }
}
