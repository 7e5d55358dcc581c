//! `defib corpus`: lists the cases, or runs them and prints what was saved.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use corpus::campaign::{
    self, Outcome as CaseOutcome, Row, Stand, Tally, Verdict, percentile, share,
};
use corpus::guarded::GuardConfig;
use corpus::lab::{Accelerator, Kernel, Snapshot, VmConfig, VmmConfig};
use corpus::scenario::{Case, case, cases};
use hv_hooks::kvm::HostKind;
use serde_json::{Value, json};

use crate::Outcome;
use crate::cli::{CorpusAction, CorpusArguments, LabArguments, On, RunArguments};
use crate::signals::end_lab_on_signals;
use crate::{injections, sitting};

/// Runs `defib corpus`.
///
/// # Errors
/// When a case is unknown or the lab can't be set up.
pub fn run(arguments: &CorpusArguments) -> Result<Outcome> {
    end_lab_on_signals()?;
    match &arguments.action {
        CorpusAction::List => list(),
        CorpusAction::Run(arguments) => {
            let kernel = Kernel::find(&arguments.lab.kernel)?;
            let stand = stand(&kernel, arguments)?;
            campaign(arguments, &kernel, &stand)
        }
        CorpusAction::Inject(arguments) => injections::run(arguments),
        CorpusAction::Sitting(arguments) => sitting::run(arguments),
    }
}

fn list() -> Result<Outcome> {
    let mut out = std::io::stdout().lock();
    for case in cases() {
        writeln!(
            out,
            "{:<18} {:<14} {:<18} {:<13} {:?}",
            case.name,
            case.driver,
            format!("{:?}", case.class),
            format!("{:?}", case.context),
            case.held
        )?;
    }
    Ok(Outcome::Done)
}

/// The named cases; all when none is named.
pub fn chosen(names: &[String]) -> Result<Vec<&'static Case>> {
    if names.is_empty() {
        return Ok(cases().collect());
    }
    names
        .iter()
        .map(|name| case(name).with_context(|| format!("no case is named {name:?}")))
        .collect()
}

/// A QEMU guest as asked for.
pub fn vm_config(lab: &LabArguments, kernel: &Kernel) -> VmConfig {
    VmConfig { vcpus: lab.vcpus, memory_mib: lab.memory, ..VmConfig::new(kernel.clone()) }
}

/// Where guests run on this host; says so in one line.
fn stand(kernel: &Kernel, arguments: &RunArguments) -> Result<Stand> {
    let kind = HostKind::detect();
    let hardware = matches!(kind, HostKind::Hardware { .. });
    let (on, words) = match arguments.on {
        On::Auto if hardware => (On::Kvm, "QEMU on KVM"),
        On::Auto | On::Tcg => (On::Tcg, "QEMU with TCG"),
        On::Kvm => (On::Kvm, "QEMU on KVM"),
        On::Vmm => (On::Vmm, "the minimal VMM"),
    };
    eprintln!("{kind}; guests run in {words}");
    anyhow::ensure!(hardware || on == On::Tcg, "stock kernels need hardware KVM there: {kind}");
    let lab = &arguments.lab;
    if on == On::Vmm {
        let program = match &arguments.vmm {
            Some(program) => program.clone(),
            None => std::env::current_exe().context("own program")?.with_file_name("minimal-vmm"),
        };
        let (kernel, memory_mib) = (kernel.clone(), lab.memory);
        return Ok(Stand::MinimalVmm(VmmConfig { program, kernel, memory_mib, vcpus: lab.vcpus }));
    }
    let mut config = vm_config(lab, kernel);
    if on == On::Kvm {
        config.accelerator = Accelerator::Kvm;
    }
    Ok(Stand::Qemu(Snapshot::cached(&config)?))
}

fn campaign(arguments: &RunArguments, kernel: &Kernel, stand: &Stand) -> Result<Outcome> {
    let mut cases = chosen(&arguments.cases)?;
    cases.retain(|case| {
        let can = stand.can_run(case);
        if !can {
            eprintln!("{}: skipped, the VMM lacks its driver's device", case.name);
        }
        can
    });
    let root = tempfile::tempdir().context("folder for incidents")?;
    let _temporary = corpus::lab::temporary(root.path());
    let guard = guard_config(kernel, root.path())?;
    let next = AtomicUsize::new(0);
    let verdicts = Mutex::new(Vec::new());
    let worker = || -> Result<()> {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let guard = GuardConfig { incidents: root.path().join(case.name), ..guard.clone() };
            let verdict = one(case, stand, &guard, arguments.stock);
            let verdict = verdict.with_context(|| format!("case {}", case.name));
            // One that fails ends the others too.
            let verdict = verdict.inspect_err(|_| next.store(cases.len(), Ordering::Relaxed))?;
            print(&verdict, arguments.json)?;
            verdicts.lock().unwrap_or_else(PoisonError::into_inner).push(verdict);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..arguments.jobs).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    let mut verdicts = verdicts.into_inner().unwrap_or_else(PoisonError::into_inner);
    let place = |verdict: &Verdict| cases.iter().position(|case| case.name == verdict.name);
    verdicts.sort_by_key(place);
    let tally = Tally::of(&verdicts);
    if arguments.json {
        writeln!(std::io::stdout(), "{}", summary_json(&tally))?;
    } else {
        write!(std::io::stdout(), "{}", summary(&tally))?;
    }
    if let Some(file) = &arguments.html {
        let subject = format!(
            "{} ({} vCPUs, {} MiB)",
            kernel.release(),
            arguments.lab.vcpus,
            arguments.lab.memory
        );
        save_page(file, &campaign::page(&subject, &verdicts))?;
    }
    Ok(if verdicts.iter().all(Verdict::passed) { Outcome::Done } else { Outcome::NotSaved })
}

/// Writes a page of results.
///
/// # Errors
/// When the file can't be written.
pub fn save_page(file: &Path, page: &str) -> Result<()> {
    std::fs::write(file, page).with_context(|| format!("cannot write {}", file.display()))
}

/// A case under guard and, if asked for, without.
fn one(case: &'static Case, stand: &Stand, guard: &GuardConfig, stock: bool) -> Result<Verdict> {
    let mut verdict = campaign::run(case, stand, guard)?;
    if let (true, Stand::Qemu(snapshot)) = (stock, stand) {
        verdict.stock = Some(corpus::stock::courses(case, snapshot)?);
    }
    Ok(verdict)
}

/// How the guard is started for a lab guest.
///
/// # Errors
/// When the drivers can't be built.
pub fn guard_config(kernel: &Kernel, incidents: &Path) -> Result<GuardConfig> {
    let program = std::env::current_exe().context("own program")?;
    Ok(GuardConfig::with_debug_files(program, kernel, incidents)?)
}

fn print(verdict: &Verdict, json: bool) -> Result<()> {
    let word = verdict.fate().word();
    let reasons = match &verdict.outcome {
        CaseOutcome::Saved => Vec::new(),
        CaseOutcome::Refused(reason) => vec![reason.clone()],
        CaseOutcome::Wrong(reasons) => reasons.clone(),
    };
    let mut out = std::io::stdout().lock();
    if json {
        let stock = verdict.stock.as_ref().map(|stock| {
            json!({ "panic_on_oops_1": stock.strict.to_string(), "panic_on_oops_0": stock.lenient.to_string() })
        });
        let line = json!({
            "case": verdict.name, "class": verdict.class, "context": verdict.context, "outcome": word,
            "reasons": reasons, "rung": verdict.rung, "downtime_us": verdict.downtime.map(micros),
            "title": verdict.title, "differences": verdict.differences, "stock": stock,
        });
        return Ok(writeln!(out, "{line}")?);
    }
    let downtime = verdict
        .downtime
        .map_or_else(String::new, |time| format!("{:.2} ms", time.as_secs_f64() * 1e3));
    let rung = verdict.rung.map_or_else(|| "-".into(), |rung| rung.to_string());
    writeln!(
        out,
        "{:<18} {word:<15} rung {rung:<2} {downtime:>10}  {}",
        verdict.name, verdict.title
    )?;
    if let Some(stock) = &verdict.stock {
        writeln!(out, "    stock: panic_on_oops=1 {}; =0 {}", stock.strict, stock.lenient)?;
    }
    for line in reasons.iter().chain(&verdict.differences) {
        writeln!(out, "    {line}")?;
    }
    Ok(())
}

/// The sums, for people.
fn summary(tally: &Tally) -> String {
    let all = tally.all;
    let mut text = format!(
        "\n{} cases: {} saved, {} saved with loss, {} refused, {} wrong; {} diagnoses not as expected\n",
        all.total(),
        all.saved,
        all.with_loss,
        all.refused,
        all.wrong,
        tally.differing
    );
    if all.stock.runs > 0 {
        text += &format!(
            "of {} that take a stock guest (panic_on_oops=1) down {} were saved: {}\n",
            all.stock.lost,
            all.stock.lost_but_saved,
            share(all.stock.lost_but_saved, all.stock.lost)
        );
    }
    for (what, rows) in [("class", &tally.classes), ("context", &tally.contexts)] {
        text += &format!(
            "\n{what:<20} {:>5} {:>6} {:>5} {:>8} {:>6}",
            "cases", "saved", "loss", "refused", "wrong"
        );
        if all.stock.runs > 0 {
            text += "   stock: down  of these saved  =0: down  damaged  goes on";
        }
        text.push('\n');
        for (name, row) in rows {
            text += &line(name, row);
        }
    }
    let time = |percent| {
        let time = percentile(&tally.downtimes, percent);
        time.map_or("-".into(), |time| format!("{:.2} ms", time.as_secs_f64() * 1e3))
    };
    text + &format!("\ndowntime: median {}, p99 {}, longest {}\n", time(50), time(99), time(100))
}

fn line(name: &str, row: &Row) -> String {
    let mut line = format!(
        "{name:<20} {:>5} {:>6} {:>5} {:>8} {:>6}",
        row.total(),
        row.saved,
        row.with_loss,
        row.refused,
        row.wrong
    );
    let stock = row.stock;
    if stock.runs > 0 {
        line += &format!(
            "   {:>11}  {:>14}  {:>8}  {:>7}  {:>7}",
            stock.lost,
            share(stock.lost_but_saved, stock.lost),
            stock.lenient_lost,
            stock.lenient_damaged,
            stock.lenient_clean
        );
    }
    line + "\n"
}

fn row_json(row: &Row) -> Value {
    let mut json = json!({
        "cases": row.total(), "saved": row.saved, "saved_with_loss": row.with_loss,
        "refused": row.refused, "wrong": row.wrong,
    });
    let stock = row.stock;
    if stock.runs > 0 {
        json["stock"] = json!({
            "runs": stock.runs, "lost": stock.lost, "lost_but_saved": stock.lost_but_saved,
            "lenient_lost": stock.lenient_lost, "lenient_damaged": stock.lenient_damaged,
            "lenient_clean": stock.lenient_clean,
        });
    }
    json
}

/// The sums, for scripts.
fn summary_json(tally: &Tally) -> Value {
    let rows = |rows: &BTreeMap<String, Row>| -> Value {
        rows.iter().map(|(name, row)| (name.clone(), row_json(row))).collect()
    };
    let time = |percent| percentile(&tally.downtimes, percent).map(micros);
    json!({ "summary": {
        "all": row_json(&tally.all), "classes": rows(&tally.classes), "contexts": rows(&tally.contexts),
        "diagnoses_differing": tally.differing,
        "downtime_us": { "p50": time(50), "p99": time(99), "max": time(100) },
    }})
}

/// Microseconds, as they are told to scripts.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
