//! What a campaign's verdicts add up to: how many were saved, by class and by context, beside what the same
//! crashes do to a stock guest, and the downtimes. Printing is not here.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Fate, Verdict};
use crate::stock::Course;

/// A count of what became of guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Everything goes on; one call failed, or nothing was lost.
    pub saved: usize,
    /// The guest goes on without a driver or a process.
    pub with_loss: usize,
    /// The guard let the crash take its course.
    pub refused: usize,
    /// The guest goes on, but something is not as it must be.
    pub wrong: usize,
    /// What stock guests made of it.
    pub stock: StockRow,
}

/// A count of what became of stock guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StockRow {
    /// Cases that were run without guard too, with `kernel.panic_on_oops=1`.
    pub runs: usize,
    /// Of those, guests that went down or hung.
    pub lost: usize,
    /// Of the lost, cases that the guard saved (with or without loss).
    pub lost_but_saved: usize,
    /// Cases run with `kernel.panic_on_oops=0`.
    pub lenient_runs: usize,
    /// Of those, guests that went down or hung.
    pub lenient_lost: usize,
    /// Guests that went on damaged: a process killed with locks held, a driver that no longer answers.
    pub lenient_damaged: usize,
    /// Guests that went on as if nothing had been.
    pub lenient_clean: usize,
}

impl Row {
    /// Number of verdicts.
    #[must_use]
    pub fn total(&self) -> usize {
        self.saved + self.with_loss + self.refused + self.wrong
    }

    /// Counts one verdict.
    pub fn add(&mut self, verdict: &Verdict) {
        let fate = verdict.fate();
        match fate {
            Fate::Saved => self.saved += 1,
            Fate::SavedWithLoss => self.with_loss += 1,
            Fate::Refused => self.refused += 1,
            Fate::Wrong => self.wrong += 1,
        }
        let Some(stock) = &verdict.stock else { return };
        let lost = |course: &Course| matches!(course, Course::WentDown | Course::Hung);
        self.stock.runs += 1;
        if lost(&stock.strict) {
            self.stock.lost += 1;
            self.stock.lost_but_saved +=
                usize::from(matches!(fate, Fate::Saved | Fate::SavedWithLoss));
        }
        self.stock.lenient_runs += 1;
        match &stock.lenient {
            course if lost(course) => self.stock.lenient_lost += 1,
            Course::Damaged(_) => self.stock.lenient_damaged += 1,
            _ => self.stock.lenient_clean += 1,
        }
    }
}

/// What a campaign comes to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Everything.
    pub all: Row,
    /// By the class that the case expects.
    pub classes: BTreeMap<String, Row>,
    /// By the context of the fault.
    pub contexts: BTreeMap<String, Row>,
    /// Of the repairs that held.
    pub downtimes: Vec<Duration>,
    /// Diagnoses that say something else than expected.
    pub differing: usize,
}

impl Tally {
    /// Counts all.
    #[must_use]
    pub fn of(verdicts: &[Verdict]) -> Self {
        let mut tally = Self::default();
        for verdict in verdicts {
            tally.all.add(verdict);
            tally.classes.entry(verdict.class.clone()).or_default().add(verdict);
            tally.contexts.entry(verdict.context.clone()).or_default().add(verdict);
            tally.differing += usize::from(!verdict.differences.is_empty());
            if matches!(verdict.fate(), Fate::Saved | Fate::SavedWithLoss) {
                tally.downtimes.extend(verdict.downtime);
            }
        }
        tally.downtimes.sort_unstable();
        tally
    }
}

/// The time that so many of a hundred do not exceed (nearest rank); times sorted.
#[must_use]
pub fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// A share of a whole, as it is printed.
#[must_use]
pub fn share(part: usize, whole: usize) -> String {
    match whole {
        0 => "-".to_owned(),
        _ => format!("{:.1} %", 100.0 * part as f64 / whole as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::Outcome;
    use crate::stock::Courses;

    fn verdict(
        class: &str,
        outcome: Outcome,
        rung: Option<u64>,
        stock: Option<Courses>,
    ) -> Verdict {
        Verdict {
            name: "n",
            class: class.into(),
            context: "Task".into(),
            outcome,
            rung,
            downtime: Some(Duration::from_millis(3)),
            title: String::new(),
            differences: Vec::new(),
            stock,
        }
    }

    #[test]
    fn a_driver_lost_is_a_loss_and_a_stock_guest_that_hangs_is_lost() {
        let stock = |strict, lenient| Some(Courses { strict, lenient });
        let verdicts = [
            verdict("Bug", Outcome::Saved, Some(1), stock(Course::WentDown, Course::Hung)),
            verdict("Bug", Outcome::Saved, Some(2), None),
            verdict(
                "Oops",
                Outcome::Refused("x".into()),
                None,
                stock(Course::WentDown, Course::Damaged("locks".into())),
            ),
            verdict("Oops", Outcome::Wrong(vec![]), Some(1), stock(Course::Clean, Course::Clean)),
        ];
        let tally = Tally::of(&verdicts);
        let all = tally.all;
        assert_eq!((all.saved, all.with_loss, all.refused, all.wrong), (1, 1, 1, 1));
        assert_eq!((all.stock.runs, all.stock.lost, all.stock.lost_but_saved), (3, 2, 1));
        assert_eq!((all.stock.lenient_lost, all.stock.lenient_damaged), (1, 1));
        assert_eq!(tally.classes["Bug"].total(), 2);
        assert_eq!(tally.downtimes.len(), 2);
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Some(Duration::from_millis(50)));
        assert_eq!(percentile(&times, 99), Some(Duration::from_millis(99)));
        assert_eq!(percentile(&times[..1], 99), Some(Duration::from_millis(1)));
        assert_eq!(percentile(&[], 50), None);
    }
}
