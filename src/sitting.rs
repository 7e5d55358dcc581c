//! `defib corpus sitting`: many crashes on one VM under one guard, and what they wear out.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use corpus::campaign::percentile;
use corpus::lab::{Kernel, Snapshot};
use corpus::sitting::{self, Crash, POLICY, Sitting};
use serde_json::json;

use crate::Outcome;
use crate::cli::SittingArguments;
use crate::corpus_command::{chosen, guard_config, micros, save_page, vm_config};

/// Runs the command.
///
/// # Errors
/// When the lab fails.
pub fn run(arguments: &SittingArguments) -> Result<Outcome> {
    let kernel = Kernel::find(&arguments.lab.kernel)?;
    let snapshot = Snapshot::cached(&vm_config(&arguments.lab, &kernel))?;
    let root = tempfile::tempdir().context("folder for incidents")?;
    let _temporary = corpus::lab::temporary(root.path());
    let policy = root.path().join("policy.toml");
    std::fs::write(&policy, POLICY)
        .with_context(|| format!("cannot write {}", policy.display()))?;
    let mut guard = guard_config(&kernel, &root.path().join("incidents"))?;
    guard.arguments.extend(["--policy".to_owned(), policy.display().to_string()]);
    let each = |crash: &Crash| print(crash, arguments.json);
    let pool = match arguments.cases.as_slice() {
        [] => sitting::repeatable().collect(),
        names => chosen(names)?,
    };
    let sitting = sitting::run(&snapshot, &guard, &pool, arguments.seed, arguments.count, each)?;
    let sums = Sums::of(&sitting);
    let text = if arguments.json { sums.json(&sitting) } else { sums.text(&sitting) };
    write!(std::io::stdout(), "{text}")?;
    if let Some(file) = &arguments.html {
        let subject = format!("{}, seed {}", kernel.release(), arguments.seed);
        save_page(file, &sitting::page(&subject, &sitting))?;
    }
    let whole = sitting.wrong.is_empty() && sums.wrong == 0;
    Ok(if whole { Outcome::Done } else { Outcome::NotSaved })
}

fn print(crash: &Crash, json: bool) {
    // A reader that went away must not end the sitting in the middle of a crash.
    let mut out = std::io::stdout().lock();
    if json {
        let line = json!({
            "index": crash.index, "case": crash.name, "rung": crash.rung,
            "downtime_us": crash.downtime.map(micros), "wrong": crash.wrong, "reloaded": crash.reloaded,
        });
        let _ = writeln!(out, "{line}");
    } else if !crash.wrong.is_empty() {
        let _ = writeln!(out, "{:>5} {:<18} {}", crash.index, crash.name, crash.wrong.join("; "));
    }
}

/// What the crashes add up to.
struct Sums {
    rungs: BTreeMap<u64, usize>,
    wrong: usize,
    reloaded: usize,
    downtimes: Vec<Duration>,
}

impl Sums {
    fn of(sitting: &Sitting) -> Self {
        let mut rungs = BTreeMap::new();
        for rung in sitting.crashes.iter().filter_map(|crash| crash.rung) {
            *rungs.entry(rung).or_insert(0) += 1;
        }
        let count = |test: fn(&&Crash) -> bool| sitting.crashes.iter().filter(test).count();
        let mut downtimes: Vec<_> =
            sitting.crashes.iter().filter_map(|crash| crash.downtime).collect();
        downtimes.sort_unstable();
        Self {
            rungs,
            wrong: count(|crash| !crash.wrong.is_empty()),
            reloaded: count(|crash| crash.reloaded),
            downtimes,
        }
    }

    fn time(&self, percent: usize) -> String {
        let time = percentile(&self.downtimes, percent);
        time.map_or("-".into(), |time| format!("{:.2} ms", time.as_secs_f64() * 1e3))
    }

    fn text(&self, sitting: &Sitting) -> String {
        let rungs: Vec<String> =
            self.rungs.iter().map(|(rung, count)| format!("{count} by rung {rung}")).collect();
        let (before, after) = sitting.available_kib;
        let (own_before, own_after) = sitting.guard_kib;
        let mut text = format!(
            "{} crashes in {:.0} s: {}; {} with something wrong, {} drivers loaded again\n\
             downtime: median {}, p99 {}, longest {}\n\
             guest memory available: {before} KiB before, {after} KiB after ({} KiB less)\n\
             guard's own memory: {own_before} KiB before, {own_after} KiB after\n",
            sitting.crashes.len(),
            sitting.took.as_secs_f64(),
            rungs.join(", "),
            self.wrong,
            self.reloaded,
            self.time(50),
            self.time(99),
            self.time(100),
            before.saturating_sub(after),
        );
        if sitting.wrong.is_empty() {
            text += "workload intact, disk clean\n";
        }
        for line in &sitting.wrong {
            text += &format!("WRONG: {line}\n");
        }
        text
    }

    fn json(&self, sitting: &Sitting) -> String {
        let time = |percent| percentile(&self.downtimes, percent).map(micros);
        let rungs: BTreeMap<String, usize> =
            self.rungs.iter().map(|(rung, count)| (rung.to_string(), *count)).collect();
        json!({ "summary": {
            "crashes": sitting.crashes.len(), "rungs": rungs, "with_something_wrong": self.wrong,
            "reloaded": self.reloaded, "wrong": sitting.wrong, "seconds": sitting.took.as_secs(),
            "available_kib": { "before": sitting.available_kib.0, "after": sitting.available_kib.1 },
            "guard_own_kib": { "before": sitting.guard_kib.0, "after": sitting.guard_kib.1 },
            "downtime_us": { "p50": time(50), "p99": time(99), "max": time(100) },
        }})
        .to_string()
            + "\n"
    }
}
