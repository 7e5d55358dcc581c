//! Buckets: many crashes, one line a cause. Fed with what dumps and console logs say of each crash; knows
//! neither of them, reads no file, prints nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Kernel releases that one bucket remembers.
const RELEASES_MAX: usize = 64;

/// One crash, as far as buckets care.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// What makes crashes the same: the signature of a diagnosis or of a report.
    pub signature: String,
    /// Title.
    pub title: String,
    /// Who is at fault, `function [module]`; `None` when not determined.
    pub offender: Option<String>,
    /// Kernel release.
    pub release: Option<String>,
    /// When it happened, as well as is known: the log's own time, else the file's.
    pub seen: Option<SystemTime>,
    /// Where it is to be found: a path, with a line number for logs.
    pub example: String,
}

/// Crashes of one signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Signature.
    pub signature: String,
    /// Title that most of them have; of equals the first in the order of text.
    pub title: String,
    /// Crashes.
    pub count: u64,
    /// The earliest, `None` when no time is known.
    pub first_seen: Option<SystemTime>,
    /// The latest.
    pub last_seen: Option<SystemTime>,
    /// Who is at fault according to most of them.
    pub offender: Option<String>,
    /// Kernel releases, at most 64.
    pub releases: BTreeSet<String>,
    /// Where one of them is to be found: the first in the order of text.
    pub example: String,
}

/// Buckets under construction. Crashes may come in any order, and halves that were filled apart can be
/// merged: what comes out is the same.
#[derive(Clone, Debug, Default)]
pub struct Buckets(BTreeMap<String, Filling>);

#[derive(Clone, Debug)]
struct Filling {
    titles: BTreeMap<String, u64>,
    offenders: BTreeMap<String, u64>,
    count: u64,
    first_seen: Option<SystemTime>,
    last_seen: Option<SystemTime>,
    releases: BTreeSet<String>,
    example: String,
}

impl Buckets {
    /// Puts one crash into its bucket.
    pub fn add(&mut self, sighting: Sighting) {
        let Sighting { signature, title, offender, release, seen, example } = sighting;
        let one = Filling {
            titles: BTreeMap::from([(title, 1)]),
            offenders: offender.map(|offender| (offender, 1)).into_iter().collect(),
            count: 1,
            first_seen: seen,
            last_seen: seen,
            releases: release.into_iter().collect(),
            example,
        };
        self.put(signature, one);
    }

    /// Puts the crashes of another set into this one.
    pub fn merge(&mut self, other: Buckets) {
        for (signature, filling) in other.0 {
            self.put(signature, filling);
        }
    }

    fn put(&mut self, signature: String, filling: Filling) {
        match self.0.get_mut(&signature) {
            Some(known) => known.merge(filling),
            None => {
                self.0.insert(signature, filling);
            }
        }
    }

    /// The buckets, largest first; of equals the one with the first signature in the order of text.
    #[must_use]
    pub fn finish(self) -> Vec<Bucket> {
        let mut buckets: Vec<_> =
            self.0.into_iter().map(|(signature, filling)| filling.finish(signature)).collect();
        // Stable, and the map was in the order of signatures.
        buckets.sort_by_key(|bucket| std::cmp::Reverse(bucket.count));
        buckets
    }
}

impl Filling {
    fn merge(&mut self, other: Filling) {
        for (title, count) in other.titles {
            *self.titles.entry(title).or_default() += count;
        }
        for (offender, count) in other.offenders {
            *self.offenders.entry(offender).or_default() += count;
        }
        self.count += other.count;
        self.first_seen = [self.first_seen, other.first_seen].into_iter().flatten().min();
        self.last_seen = self.last_seen.max(other.last_seen);
        self.releases.extend(other.releases);
        while self.releases.len() > RELEASES_MAX {
            // The last goes, whatever came when.
            self.releases.pop_last();
        }
        if other.example < self.example {
            self.example = other.example;
        }
    }

    fn finish(self, signature: String) -> Bucket {
        Bucket {
            signature,
            title: most(self.titles).unwrap_or_default(),
            count: self.count,
            first_seen: self.first_seen,
            last_seen: self.last_seen,
            offender: most(self.offenders),
            releases: self.releases,
            example: self.example,
        }
    }
}

/// The most frequent; of equals the first in the order of text.
fn most(counts: BTreeMap<String, u64>) -> Option<String> {
    let mut best: Option<(String, u64)> = None;
    for (text, count) in counts {
        if best.as_ref().is_none_or(|(_, most)| count > *most) {
            best = Some((text, count));
        }
    }
    best.map(|(text, _)| text)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sighting(signature: &str, title: &str, second: u64, example: &str) -> Sighting {
        Sighting {
            signature: signature.to_owned(),
            title: title.to_owned(),
            offender: Some(format!("{title} [m]")),
            release: Some(format!("6.{second}")),
            seen: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(second)),
            example: example.to_owned(),
        }
    }

    fn all() -> Vec<Sighting> {
        vec![
            sighting("a", "x", 5, "log3:1"),
            sighting("b", "y", 1, "log1:1"),
            sighting("a", "z", 2, "log2:1"),
            sighting("a", "z", 9, "log4:1"),
        ]
    }

    #[test]
    fn one_bucket_a_signature_largest_first() {
        let mut buckets = Buckets::default();
        all().into_iter().for_each(|one| buckets.add(one));
        let found = buckets.finish();
        let short: Vec<_> = found.iter().map(|it| (it.signature.as_str(), it.count)).collect();
        assert_eq!(short, [("a", 3), ("b", 1)]);
        assert_eq!((found[0].title.as_str(), found[0].example.as_str()), ("z", "log2:1"));
        assert_eq!(found[0].offender.as_deref(), Some("z [m]"));
        let second = |seen: Option<SystemTime>| {
            seen.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
                .map(|it| it.as_secs())
        };
        assert_eq!((second(found[0].first_seen), second(found[0].last_seen)), (Some(2), Some(9)));
        assert_eq!(found[0].releases.iter().collect::<Vec<_>>(), ["6.2", "6.5", "6.9"]);
    }

    #[test]
    fn order_and_grouping_do_not_matter() {
        let mut forward = Buckets::default();
        all().into_iter().for_each(|one| forward.add(one));
        let mut halves = [Buckets::default(), Buckets::default()];
        for (index, one) in all().into_iter().rev().enumerate() {
            halves[index % 2].add(one);
        }
        let [mut one, other] = halves;
        one.merge(other);
        assert_eq!(one.finish(), forward.finish());
    }

    #[test]
    fn a_time_that_is_not_known_is_no_time() {
        let mut buckets = Buckets::default();
        buckets.add(Sighting { seen: None, ..sighting("a", "x", 0, "1") });
        buckets.add(sighting("a", "x", 7, "2"));
        let found = buckets.finish();
        assert!(found[0].first_seen.is_some());
        assert_eq!(found[0].first_seen, found[0].last_seen);
    }
}
