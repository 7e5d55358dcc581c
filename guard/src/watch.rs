//! What a guard waits for while the guest runs: the end of a probation, or a reset guest that boots.

use std::time::{Duration, Instant};

/// How often a guest that was reset is looked at.
const BOOT_POLL: Duration = Duration::from_secs(1);

/// State between two events.
#[derive(Default)]
pub struct Watch {
    /// Probation of the latest repair.
    probation: Option<quarantine::Probation>,
    /// A crash that was let go: hooks are off until the guest has shown that it goes on or was reset.
    let_go: Option<Instant>,
    /// The guest was reset; when it was last looked at.
    rebooting: Option<Instant>,
    /// The guest can't go on: only a reset brings it back.
    dead: bool,
}

impl Watch {
    /// Starts a probation.
    pub fn begin_probation(&mut self, probation: quarantine::Probation) {
        self.probation = Some(probation);
    }

    /// The probation that is under way.
    pub fn probation(&mut self) -> Option<&mut quarantine::Probation> {
        self.probation.as_mut()
    }

    /// Ends the probation.
    pub fn end_probation(&mut self) {
        self.probation = None;
    }

    /// A crash takes its stock course from now on.
    pub fn let_go(&mut self) {
        self.probation = None;
        self.let_go = Some(Instant::now());
    }

    /// The guest can't go on.
    pub fn died(&mut self) {
        *self = Self { dead: true, ..Self::default() };
    }

    /// Whether the guest can't go on and was not reset since.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    /// How long ago a crash was let go, if the guest has not been seen well since.
    #[must_use]
    pub fn since_let_go(&self) -> Option<Duration> {
        self.let_go.map(|at| at.elapsed())
    }

    /// The guest goes on after a crash that was let go.
    pub fn goes_on(&mut self) {
        self.let_go = None;
    }

    /// The guest was reset.
    pub fn wait_for_boot(&mut self) {
        *self = Self { rebooting: Some(Instant::now()), ..Self::default() };
    }

    /// Whether a guest that was reset has not booted yet.
    #[must_use]
    pub fn is_waiting_for_boot(&self) -> bool {
        self.rebooting.is_some()
    }

    /// Whether it is time to look at a rebooting guest again; then the next time is later.
    pub fn is_time_to_look(&mut self) -> bool {
        let due = self.rebooting.is_some_and(|at| at.elapsed() >= BOOT_POLL);
        if due {
            self.rebooting = Some(Instant::now());
        }
        due
    }

    /// The guest has booted.
    pub fn booted(&mut self) {
        self.rebooting = None;
    }

    /// As if that much more time had passed.
    #[cfg(test)]
    pub fn age(&mut self, by: Duration) {
        for at in [&mut self.let_go, &mut self.rebooting].into_iter().flatten() {
            *at = at.checked_sub(by).unwrap();
        }
    }

    /// Whether nothing is waited for.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.probation.is_none() && self.let_go.is_none() && self.rebooting.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_ends_everything_else() {
        let mut watch = Watch::default();
        assert!(watch.is_over());
        watch.let_go();
        assert!(watch.since_let_go().is_some());
        watch.wait_for_boot();
        assert!(watch.since_let_go().is_none() && watch.is_waiting_for_boot());
        assert!(!watch.is_time_to_look());
        watch.booted();
        assert!(watch.is_over());
        watch.died();
        assert!(watch.is_dead() && watch.is_over());
        watch.wait_for_boot();
        assert!(!watch.is_dead());
    }
}
