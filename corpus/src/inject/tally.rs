//! What a series of injections adds up to, by driver and by kind of change. Printing is not here.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Injection;

/// The words of all effects, in the order in which they are shown.
pub const EFFECTS: [&str; 10] = [
    "no effect",
    "errors",
    "wrong data, no crash",
    "hang, no crash seen",
    "crashed before guard",
    "saved",
    "saved with loss",
    "saved, change still harms",
    "refused",
    "WRONG REPAIR",
];

/// Counts by effect, in the order of [`EFFECTS`].
pub type Counts = [usize; EFFECTS.len()];

/// What a series comes to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Everything.
    pub all: Counts,
    /// By driver.
    pub drivers: BTreeMap<String, Counts>,
    /// By kind of change.
    pub operators: BTreeMap<String, Counts>,
    /// Of all repairs, sorted.
    pub downtimes: Vec<Duration>,
}

impl Tally {
    /// The words of all effects, in the order of the counts.
    pub const EFFECTS: [&'static str; EFFECTS.len()] = EFFECTS;

    /// Counts all.
    #[must_use]
    pub fn of(injections: &[Injection]) -> Self {
        let mut tally = Self::default();
        for injection in injections {
            let word = injection.effect.word();
            let rows = [
                &mut tally.all,
                tally.drivers.entry(injection.driver.to_owned()).or_default(),
                tally.operators.entry(injection.mutation.operator.word().to_owned()).or_default(),
            ];
            for row in rows {
                let counted =
                    EFFECTS.iter().zip(row.iter_mut()).find(|(effect, _)| **effect == word);
                if let Some((_, count)) = counted {
                    *count += 1;
                }
            }
            tally.downtimes.extend(&injection.downtimes);
        }
        tally.downtimes.sort_unstable();
        tally
    }

    /// Crashes, and those of them that were repaired without a wrong repair.
    #[must_use]
    pub fn crashes(&self) -> (usize, usize) {
        let of = |word: &str| {
            EFFECTS.iter().zip(self.all).find(|(effect, _)| **effect == word).map_or(0, |it| it.1)
        };
        let saved = of("saved") + of("saved with loss") + of("saved, change still harms");
        (saved + of("refused") + of("WRONG REPAIR"), saved)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Effect, Mutation, Operator};
    use super::*;

    #[test]
    fn every_effect_is_counted_once_in_each_table() {
        let effects = [
            Effect::None,
            Effect::Errors(String::new()),
            Effect::WrongData(String::new()),
            Effect::Hang(String::new()),
            Effect::Unguarded(String::new()),
            Effect::Saved,
            Effect::SavedWithLoss,
            Effect::SavedWithOwnHarm(Vec::new()),
            Effect::Refused(String::new()),
            Effect::WrongRepair(Vec::new()),
        ];
        let injections: Vec<Injection> = effects
            .into_iter()
            .map(|effect| Injection {
                index: 0,
                driver: "loop",
                mutation: Mutation {
                    operator: Operator::OffByOne,
                    function: String::new(),
                    offset: 0,
                    old: Vec::new(),
                    new: Vec::new(),
                    text: String::new(),
                },
                effect,
                rungs: Vec::new(),
                downtimes: Vec::new(),
                title: String::new(),
                took: Duration::ZERO,
            })
            .collect();
        let tally = Tally::of(&injections);
        assert_eq!(tally.all, [1; 10]);
        assert_eq!(tally.drivers["loop"], [1; 10]);
        assert_eq!(tally.crashes(), (5, 3));
    }
}
