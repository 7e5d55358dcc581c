//! `defib corpus`: lists the cases, or runs them and prints what was saved.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use corpus::campaign::{self, Outcome as CaseOutcome, Stand, Verdict};
use corpus::guarded::GuardConfig;
use corpus::lab::{Accelerator, Kernel, Snapshot, VmConfig, VmmConfig};
use corpus::scenario::{Case, case, cases};
use hv_hooks::kvm::HostKind;
use serde_json::json;

use crate::Outcome;
use crate::cli::{CorpusAction, CorpusArguments, On};

/// Runs `defib corpus`.
///
/// # Errors
/// When a case is unknown or the lab can't be set up.
pub fn run(arguments: &CorpusArguments) -> Result<Outcome> {
    match &arguments.action {
        CorpusAction::List => list(),
        CorpusAction::Run { cases, kernel, on, vmm, vcpus, json } => {
            let kernel = Kernel::find(kernel)?;
            let stand = stand(&kernel, *on, vmm.as_deref(), *vcpus)?;
            campaign(cases, &kernel, &stand, *json)
        }
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

fn chosen(names: &[String]) -> Result<Vec<&'static Case>> {
    if names.is_empty() {
        return Ok(cases().collect());
    }
    names
        .iter()
        .map(|name| case(name).with_context(|| format!("no case is named {name:?}")))
        .collect()
}

/// Where guests run on this host; says so in one line.
fn stand(kernel: &Kernel, on: On, vmm: Option<&Path>, vcpus: u32) -> Result<Stand> {
    let kind = HostKind::detect();
    let hardware = matches!(kind, HostKind::Hardware { .. });
    let (on, words) = match on {
        On::Auto if hardware => (On::Kvm, "QEMU on KVM"),
        On::Auto | On::Tcg => (On::Tcg, "QEMU with TCG"),
        On::Kvm => (On::Kvm, "QEMU on KVM"),
        On::Vmm => (On::Vmm, "the minimal VMM"),
    };
    eprintln!("{kind}; guests run in {words}");
    anyhow::ensure!(hardware || on == On::Tcg, "stock kernels need hardware KVM there: {kind}");
    if on == On::Vmm {
        let program = match vmm {
            Some(program) => program.to_owned(),
            None => std::env::current_exe().context("own program")?.with_file_name("minimal-vmm"),
        };
        let kernel = kernel.clone();
        return Ok(Stand::MinimalVmm(VmmConfig { program, kernel, memory_mib: 256, vcpus }));
    }
    let mut config = VmConfig { vcpus, ..VmConfig::new(kernel.clone()) };
    if on == On::Kvm {
        config.accelerator = Accelerator::Kvm;
    }
    Ok(Stand::Qemu(Snapshot::cached(&config)?))
}

fn campaign(names: &[String], kernel: &Kernel, stand: &Stand, json: bool) -> Result<Outcome> {
    let cases = chosen(names)?;
    let root = tempfile::tempdir().context("folder for incidents")?;
    let guard = guard_config(kernel, root.path())?;
    let mut verdicts = Vec::new();
    for case in cases {
        if !stand.can_run(case) {
            eprintln!("{}: skipped, the VMM lacks its driver's device", case.name);
            continue;
        }
        let verdict = campaign::run(case, stand, &guard);
        let verdict = verdict.with_context(|| format!("case {}", case.name))?;
        print(&verdict, json)?;
        verdicts.push(verdict);
    }
    if !json {
        summary(&verdicts);
    }
    Ok(if verdicts.iter().all(Verdict::passed) { Outcome::Done } else { Outcome::NotSaved })
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
    let (word, reasons) = match &verdict.outcome {
        CaseOutcome::Saved => ("saved", Vec::new()),
        CaseOutcome::Refused(reason) => ("refused", vec![reason.clone()]),
        CaseOutcome::Wrong(reasons) => ("WRONG", reasons.clone()),
    };
    let mut out = std::io::stdout().lock();
    if json {
        let line = json!({
            "case": verdict.name, "outcome": word.to_lowercase(), "reasons": reasons,
            "rung": verdict.rung, "downtime_us": verdict.downtime.map(|time| time.as_micros() as u64),
            "title": verdict.title, "differences": verdict.differences,
        });
        return Ok(writeln!(out, "{line}")?);
    }
    let downtime = verdict
        .downtime
        .map_or_else(String::new, |time| format!("{:.2} ms", time.as_secs_f64() * 1e3));
    let rung = verdict.rung.map_or_else(|| "-".into(), |rung| rung.to_string());
    writeln!(
        out,
        "{:<18} {word:<8} rung {rung:<2} {downtime:>10}  {}",
        verdict.name, verdict.title
    )?;
    for line in reasons.iter().chain(&verdict.differences) {
        writeln!(out, "    {line}")?;
    }
    Ok(())
}

fn summary(verdicts: &[Verdict]) {
    let count = |wanted: fn(&CaseOutcome) -> bool| {
        verdicts.iter().filter(|verdict| wanted(&verdict.outcome)).count()
    };
    let mut downtimes: Vec<Duration> =
        verdicts.iter().filter_map(|verdict| verdict.downtime).collect();
    downtimes.sort_unstable();
    println!(
        "\n{} cases: {} saved, {} refused, {} wrong; {} diagnoses not as expected",
        verdicts.len(),
        count(|outcome| *outcome == CaseOutcome::Saved),
        count(|outcome| matches!(outcome, CaseOutcome::Refused(_))),
        count(|outcome| matches!(outcome, CaseOutcome::Wrong(_))),
        verdicts.iter().filter(|verdict| !verdict.differences.is_empty()).count(),
    );
    if let (Some(median), Some(worst)) = (downtimes.get(downtimes.len() / 2), downtimes.last()) {
        println!(
            "downtime: median {:.2} ms, worst {:.2} ms",
            median.as_secs_f64() * 1e3,
            worst.as_secs_f64() * 1e3
        );
    }
}
