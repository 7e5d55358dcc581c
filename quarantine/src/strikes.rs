//! How often each driver and each kind of crash occurred, and which drivers are quarantined. Counts
//! only; what follows from them is decided in `plan.rs`. Kept across runs by whoever guards the VM.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use diagnose::{Diagnosis, Offender};
use serde::{Deserialize, Serialize};

use crate::{Policy, Reason, Rung};

/// Crashes remembered for one driver at most.
const CRASHES_MAX: usize = 64;
/// Drivers or signatures remembered at most; a guest that invents names must not fill our memory.
const NAMES_MAX: usize = 1024;

/// Counters of one guest. Times are seconds on any clock that does not go back (the guard's).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Strikes {
    /// Current time, seconds: set by [`Strikes::set_time`] before use.
    now_s: u64,
    /// Times of the crashes of each driver, oldest first.
    drivers: BTreeMap<String, Vec<u64>>,
    /// Last repair of each signature: when, and by which rung.
    repairs: BTreeMap<String, (u64, Rung)>,
    /// Quarantined drivers.
    quarantined: BTreeSet<String>,
}

/// How a crash stands with the counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// The driver at fault.
    pub(crate) module: Option<String>,
    /// Crashes of the driver within the window, this one included.
    pub(crate) strikes: u32,
    /// Whether they reach the policy's limit.
    pub(crate) used_up: bool,
    /// Whether an error return for the same signature is still on probation.
    pub(crate) came_back: bool,
}

impl Standing {
    /// Whether returning an error is no longer enough.
    pub(crate) fn escalate(&self) -> bool {
        self.used_up || self.came_back
    }

    /// Why a driver that breaks memory is not gone on with.
    pub(crate) fn broken_memory(&self) -> Reason {
        let module = self.module.clone().unwrap_or_default();
        Reason::BrokenMemory { module, strikes: self.strikes }
    }

    /// Why returning an error is not enough.
    pub(crate) fn why(&self) -> Reason {
        match &self.module {
            Some(module) if self.used_up => {
                Reason::StrikesUsedUp { module: module.clone(), strikes: self.strikes }
            }
            _ if self.came_back => Reason::CameBack,
            _ => Reason::NotNeeded,
        }
    }
}

impl Strikes {
    /// Sets the current time. An earlier time than before is ignored.
    pub fn set_time(&mut self, now: Duration) {
        self.now_s = self.now_s.max(now.as_secs());
    }

    /// Counts a crash that was repaired by `rung`.
    pub fn record(&mut self, diagnosis: &Diagnosis, rung: Rung) {
        // Damaged memory is nobody's fault.
        let driver = diagnosis.offender.as_ref().filter(|_| rung != Rung::RepairKernel);
        if let Some(Offender::Driver { module, .. }) = driver {
            if self.drivers.len() < NAMES_MAX || self.drivers.contains_key(module) {
                let crashes = self.drivers.entry(module.clone()).or_default();
                crashes.push(self.now_s);
                let surplus = crashes.len().saturating_sub(CRASHES_MAX);
                crashes.drain(..surplus);
            }
            if rung == Rung::QuarantineDriver {
                self.quarantined.insert(module.clone());
            }
        }
        if self.repairs.len() < NAMES_MAX || self.repairs.contains_key(&diagnosis.signature) {
            self.repairs.insert(diagnosis.signature.clone(), (self.now_s, rung));
        }
    }

    /// Forgets a driver: it was unloaded or the guest rebooted.
    pub fn forget_driver(&mut self, module: &str) {
        self.drivers.remove(module);
        self.quarantined.remove(module);
    }

    /// Forgets everything: the guest rebooted.
    pub fn clear(&mut self) {
        *self = Self { now_s: self.now_s, ..Self::default() };
    }

    /// Whether the driver is quarantined.
    #[must_use]
    pub fn is_quarantined(&self, module: &str) -> bool {
        self.quarantined.contains(module)
    }

    /// Quarantined drivers, by name.
    pub fn quarantined(&self) -> impl Iterator<Item = &str> {
        self.quarantined.iter().map(String::as_str)
    }

    /// Crashes of a driver within the policy's window.
    #[must_use]
    pub fn of_driver(&self, module: &str, policy: &Policy) -> u32 {
        let recent = |time: &&u64| self.now_s.saturating_sub(**time) <= policy.strike_window_s;
        let count = self.drivers.get(module).map_or(0, |times| times.iter().filter(recent).count());
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// How a new crash stands, itself counted.
    pub(crate) fn standing(&self, diagnosis: &Diagnosis, policy: &Policy) -> Standing {
        let module = match &diagnosis.offender {
            Some(Offender::Driver { module, .. }) => Some(module.clone()),
            _ => None,
        };
        let strikes =
            module.as_ref().map_or(0, |module| self.of_driver(module, policy).saturating_add(1));
        let came_back = self.repairs.get(&diagnosis.signature).is_some_and(|(when, rung)| {
            // A driver that a user calls again at once crashes again at once: that is what strikes
            // count. Only a crash that needed no caller (a timer, an interrupt) shows that the
            // repair failed.
            *rung == Rung::ReturnError
                && self.now_s.saturating_sub(*when) <= policy.probation_s
                && diagnosis.context.kind != diagnose::ExecutionContext::Task
        });
        Standing {
            used_up: module.is_some() && strikes >= policy.strikes,
            module,
            strikes,
            came_back,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    #[test]
    fn the_third_crash_is_the_last() {
        let diagnosis = Scene::new().diagnosis();
        let policy = Policy::default();
        let mut strikes = Strikes::default();
        for expected in [false, false, true] {
            assert_eq!(strikes.standing(&diagnosis, &policy).used_up, expected);
            strikes.record(&diagnosis, Rung::ReturnError);
        }
    }

    #[test]
    fn old_strikes_are_forgotten() {
        let diagnosis = Scene::new().diagnosis();
        let policy = Policy::default();
        let mut strikes = Strikes::default();
        strikes.record(&diagnosis, Rung::ReturnError);
        strikes.record(&diagnosis, Rung::ReturnError);
        strikes.set_time(Duration::from_secs(policy.strike_window_s + 1));
        assert_eq!(strikes.standing(&diagnosis, &policy).strikes, 1);
    }

    #[test]
    fn a_crash_without_a_caller_that_comes_back_on_probation_escalates() {
        let mut diagnosis = Scene::new().diagnosis();
        let policy = Policy::default();
        let mut strikes = Strikes::default();
        strikes.record(&diagnosis, Rung::ReturnError);
        assert!(!strikes.standing(&diagnosis, &policy).came_back);
        diagnosis.context.kind = diagnose::ExecutionContext::Softirq;
        assert!(strikes.standing(&diagnosis, &policy).came_back);
        strikes.set_time(Duration::from_secs(policy.probation_s + 1));
        assert!(!strikes.standing(&diagnosis, &policy).came_back);
    }

    #[test]
    fn counters_survive_a_restart() {
        let diagnosis = Scene::new().diagnosis();
        let mut strikes = Strikes::default();
        strikes.record(&diagnosis, Rung::QuarantineDriver);
        let text = serde_json::to_string(&strikes).unwrap();
        let again: Strikes = serde_json::from_str(&text).unwrap();
        assert_eq!(again, strikes);
        assert!(again.is_quarantined("toy"));
    }
}
