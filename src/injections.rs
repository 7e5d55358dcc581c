//! `defib corpus inject`: a series of injections into drivers of lab guests, with what came of each.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use corpus::campaign::percentile;
use corpus::inject::{self, Bench, Injection, TARGETS, Tally, target};
use corpus::lab::Kernel;
use serde_json::{Value, json};

use crate::Outcome;
use crate::cli::InjectArguments;
use crate::corpus_command::{guard_config, micros, save_page, vm_config};

/// Runs the command.
///
/// # Errors
/// When a driver is unknown, or the lab fails.
pub fn run(arguments: &InjectArguments) -> Result<Outcome> {
    let kernel = Kernel::find(&arguments.lab.kernel)?;
    let config = vm_config(&arguments.lab, &kernel);
    let chosen: Vec<_> = if arguments.driver.is_empty() {
        TARGETS.iter().collect()
    } else {
        let named =
            |name: &String| target(name).with_context(|| format!("no driver is named {name:?}"));
        arguments.driver.iter().map(named).collect::<Result<_>>()?
    };
    let mut benches = Vec::new();
    for target in chosen {
        let bench = Bench::cached(&config, target)?;
        eprintln!("{}: {} changes can be made", target.name, bench.size());
        benches.push(bench);
    }
    let root = tempfile::tempdir().context("folder for incidents")?;
    let _temporary = corpus::lab::temporary(root.path());
    let guard = guard_config(&kernel, root.path())?;
    let mut done = Vec::new();
    for index in arguments.from..arguments.from.saturating_add(arguments.count) {
        let (bench, mutation) =
            inject::draw(&benches, arguments.seed, index).context("nothing can be changed")?;
        let injection = inject::run(bench, index, mutation, &guard).with_context(|| {
            format!("injection {index} ({} in {})", mutation.text, mutation.function)
        })?;
        print(&injection, arguments.json)?;
        done.push(injection);
        if let Some(file) = &arguments.html {
            let subject = format!("{}, seed {}", kernel.release(), arguments.seed);
            save_page(file, &inject::page(&subject, &done))?;
        }
    }
    let tally = Tally::of(&done);
    let text =
        if arguments.json { summary_json(&tally).to_string() + "\n" } else { summary(&tally) };
    write!(std::io::stdout(), "{text}")?;
    let wrong = done.iter().any(|it| matches!(it.effect, inject::Effect::WrongRepair(_)));
    Ok(if wrong { Outcome::NotSaved } else { Outcome::Done })
}

fn print(injection: &Injection, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mutation = &injection.mutation;
    let remarks = injection.effect.remarks();
    if json {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let line = json!({
            "index": injection.index, "driver": injection.driver, "change": mutation.operator.word(),
            "function": mutation.function, "offset": mutation.offset, "instruction": mutation.text,
            "old": hex(&mutation.old), "new": hex(&mutation.new), "effect": injection.effect.word(),
            "rungs": injection.rungs,
            "downtimes_us": injection.downtimes.iter().copied().map(micros).collect::<Vec<_>>(),
            "title": injection.title, "remarks": remarks, "took_ms": micros(injection.took) / 1000,
        });
        return Ok(writeln!(out, "{line}")?);
    }
    writeln!(
        out,
        "{:>4} {:<10} {:<24} {:<26} {:>4.1} s  {} in {}: {}",
        injection.index,
        injection.driver,
        mutation.operator.word(),
        injection.effect.word(),
        injection.took.as_secs_f64(),
        mutation.text,
        mutation.function,
        injection.title
    )?;
    if !remarks.is_empty() {
        writeln!(out, "       {remarks}")?;
    }
    Ok(())
}

/// The sums, for people.
fn summary(tally: &Tally) -> String {
    let row = |name: &str, counts: &[usize]| {
        let cells: String = counts.iter().map(|count| format!(" {count:>9}")).collect();
        format!("{name:<24}{cells}\n")
    };
    let heads = [
        "none", "errors", "data", "hang", "early", "saved", "loss", "own harm", "refused", "WRONG",
    ];
    let cells: String = heads.iter().map(|head| format!(" {head:>9}")).collect();
    let mut text = String::new();
    for rows in [&tally.drivers, &tally.operators] {
        text += &format!("\n{:<24}{cells}\n", "");
        for (name, counts) in rows {
            text += &row(name, counts);
        }
    }
    let (crashes, saved) = tally.crashes();
    let time = |percent| {
        let time = percentile(&tally.downtimes, percent);
        time.map_or("-".into(), |time| format!("{:.2} ms", time.as_secs_f64() * 1e3))
    };
    text + &row("all", &tally.all)
        + &format!(
            "{crashes} crashes, {saved} repaired; downtime: median {}, p99 {}, longest {}\n",
            time(50),
            time(99),
            time(100)
        )
}

/// The sums, for scripts.
fn summary_json(tally: &Tally) -> Value {
    let row = |counts: &[usize]| -> Value {
        Tally::EFFECTS
            .iter()
            .zip(counts)
            .map(|(word, count)| ((*word).to_owned(), json!(count)))
            .collect()
    };
    let rows = |rows: &BTreeMap<String, [usize; Tally::EFFECTS.len()]>| -> Value {
        rows.iter().map(|(name, counts)| (name.clone(), row(counts))).collect()
    };
    let (crashes, saved) = tally.crashes();
    let time = |percent| percentile(&tally.downtimes, percent).map(|time: Duration| micros(time));
    json!({ "summary": {
        "all": row(&tally.all), "drivers": rows(&tally.drivers), "changes": rows(&tally.operators),
        "crashes": crashes, "repaired": saved,
        "downtime_us": { "p50": time(50), "p99": time(99), "max": time(100) },
    }})
}
