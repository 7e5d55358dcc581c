//! A sitting: many crashes one after the other on one guest under one guard, with the workload running throughout. What
//! a single crash costs is the campaign's matter; here it is whether anything wears out.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::campaign::names::text;
use crate::campaign::{percentile, sights};
use crate::guarded::{Guard, GuardConfig};
use crate::html::{Bar, Page, Tone, milliseconds};
use crate::lab::{Answer, Snapshot, Vm};
use crate::scenario::{Case, Class, Context, Rung, cases};
use crate::{Error, Result};

/// How long the guard may take to arm.
const ARM_LIMIT: Duration = Duration::from_secs(120);
/// How long one crash may take, and how long its process is waited for in the guest, in milliseconds.
const CRASH_LIMIT: Duration = Duration::from_secs(40);
const PROCESS_LIMIT: u64 = 20_000;
/// Crashes between two looks at the workload.
const VERIFY_EVERY: u64 = 25;
/// How long after the process has come back the guard may take to tell of its crash.
const TELL_LIMIT: Duration = Duration::from_secs(5);
/// The guard's policy: one crash after the other in the same driver is what is asked for here, so neither strikes nor
/// probation may lead up the ladder.
pub const POLICY: &str = "strikes = 1000000\nprobation_s = 0\n";

/// One crash of a sitting.
#[derive(Clone, Debug)]
pub struct Crash {
    /// Its number.
    pub index: u64,
    /// The case.
    pub name: &'static str,
    /// Rung that was taken; none when it was refused.
    pub rung: Option<u64>,
    /// How long the vCPUs stood.
    pub downtime: Option<Duration>,
    /// What was not as it must be.
    pub wrong: Vec<String>,
    /// The driver had to be loaded again.
    pub reloaded: bool,
}

impl Crash {
    /// One that the guard did not come to speak of; the sitting ends with it.
    fn unnoticed(case: &Case, index: u64, error: &Error, answer: Result<Answer>) -> Self {
        let answer = answer.map_or_else(|error| error.to_string(), |it| it.text().to_owned());
        Self {
            index,
            name: case.name,
            rung: None,
            downtime: None,
            wrong: vec![error.to_string(), format!("the guest's answer: {answer}")],
            reloaded: false,
        }
    }
}

/// What a sitting came to.
#[derive(Clone, Debug, Default)]
pub struct Sitting {
    /// What happened, in order.
    pub crashes: Vec<Crash>,
    /// What was wrong with the workload, the disk or the guard at the end.
    pub wrong: Vec<String>,
    /// The guest's available memory before and after, KiB.
    pub available_kib: (u64, u64),
    /// The guard's own memory before and after, without the guest's that it maps, KiB.
    pub guard_kib: (u64, u64),
    /// From the first crash to the last.
    pub took: Duration,
}

/// The cases that can happen again on a driver that stays loaded: a call of a process fails in a driver without
/// parameters, is repaired by an error return, and nothing has to be put right afterwards.
pub fn repeatable() -> impl Iterator<Item = &'static Case> {
    cases().filter(|case| {
        let call = matches!(
            case.class,
            Class::NullDereference
                | Class::WildDereference
                | Class::GeneralProtection
                | Class::NullCall
                | Class::Bug
                | Class::ListCorruption
                | Class::Usercopy
                | Class::Divide
        );
        // What a shell sets up, it sets up once: a link that is up, a module that is loaded.
        let plain = case.parameters.is_empty()
            && case.after.is_empty()
            && case.waiter_sees.is_none()
            && !case.operation.starts_with("sh:");
        let repaired =
            case.refused.is_none() && !case.quarantined && case.rung == Rung::ReturnError;
        call && plain && repaired && case.context == Context::Task
    })
}

/// Runs a sitting of crashes drawn from `pool`; `each` is told of every one.
///
/// # Errors
/// When the lab or the guard fails, or the guest goes down.
pub fn run(
    snapshot: &Snapshot,
    config: &GuardConfig,
    pool: &[&'static Case],
    seed: u64,
    count: u64,
    mut each: impl FnMut(&Crash),
) -> Result<Sitting> {
    let mut vm = snapshot.restore()?;
    vm.agent().command("workload start")?;
    let mut loaded = BTreeSet::new();
    for case in pool {
        if loaded.insert(case.driver) {
            vm.agent().command(&case.load_command())?;
        }
    }
    let mut guard = Guard::start(config, &vm.qmp())?;
    guard.await_event("armed", ARM_LIMIT)?;
    let mut sitting = Sitting { available_kib: (available(&mut vm)?, 0), ..Sitting::default() };
    sitting.guard_kib.0 = own_memory(guard.pid());
    let begin = Instant::now();
    for index in 0..count {
        let number = crate::inject::scatter(crate::inject::scatter(seed).wrapping_add(index));
        let Some(case) =
            usize::try_from(number % pool.len().max(1) as u64).ok().and_then(|at| pool.get(at))
        else {
            break;
        };
        let crash = one(&mut vm, &mut guard, case, index)?;
        each(&crash);
        let refused = crash.rung.is_none();
        sitting.crashes.push(crash);
        if refused {
            sitting.wrong.push(format!("crash {index} was not repaired"));
            sitting.took = begin.elapsed();
            return Ok(sitting);
        }
        if (index + 1) % VERIFY_EVERY == 0 {
            sitting.wrong.extend(workload(&mut vm, "workload verify", index));
        }
    }
    sitting.took = begin.elapsed();
    sitting.available_kib.1 = available(&mut vm)?;
    sitting.guard_kib.1 = own_memory(guard.pid());
    sitting.wrong.extend(workload(&mut vm, "workload verify", count));
    sitting.wrong.extend(workload(&mut vm, "workload stop", count));
    let status = guard.detach()?;
    if !status.success() {
        sitting.wrong.push(format!("the guard ended with {status}"));
    }
    sitting.wrong.extend(vm.finish_and_check_disk().err().map(|error| format!("disk: {error}")));
    Ok(sitting)
}

fn one(vm: &mut Vm, guard: &mut Guard, case: &'static Case, index: u64) -> Result<Crash> {
    let (mut answer, mut end) = crash(vm, guard, case);
    if answer.is_ok() && matches!(end, Err(Error::Guard { .. })) {
        // An earlier case may have brought about what leads to this one's fault: a link that is up is not set up.
        reload(vm, case)?;
        (answer, end) = crash(vm, guard, case);
    }
    let end = match end {
        Ok(end) => end,
        Err(error @ Error::Guard { .. }) => {
            return Ok(Crash::unnoticed(case, index, &error, answer));
        }
        Err(error) => return Err(error),
    };
    let mut crash = Crash {
        index,
        name: case.name,
        rung: end.get("rung").and_then(Value::as_u64),
        downtime: end.get("downtime_us").and_then(Value::as_u64).map(Duration::from_micros),
        wrong: Vec::new(),
        reloaded: false,
    };
    if text(&end, "/event") == "refused" {
        crash.rung = None;
        crash.wrong.push(text(&end, "/reason"));
        return Ok(crash);
    }
    match answer {
        Ok(answer) => crash.wrong.extend(sights(case, &answer)),
        Err(error) => crash.wrong.push(format!("no answer: {error}")),
    }
    let check = vm.agent().command(&case.check_command());
    let sound = check.as_ref().is_ok_and(|it| it.text().starts_with("ok") || it.text().is_empty());
    if !sound {
        // A driver in quarantine answers nothing; anything else that is wrong with it is wrong.
        if crash.rung != Some(2) {
            crash.wrong.push(format!("{check:?}"));
        }
        crash.reloaded = true;
        reload(vm, case)?;
    }
    Ok(crash)
}

/// What the process got, and what the guard says of it.
fn crash(vm: &mut Vm, guard: &mut Guard, case: &Case) -> (Result<Answer>, Result<Value>) {
    let answer = vm.agent().command_within(&case.crash_command(PROCESS_LIMIT), CRASH_LIMIT);
    let limit = if answer.is_ok() { TELL_LIMIT } else { CRASH_LIMIT };
    (answer, guard.await_any(&["repaired", "refused"], limit))
}

/// Loads the driver anew.
fn reload(vm: &mut Vm, case: &Case) -> Result<()> {
    vm.agent().command(&format!("unload {}", case.driver))?;
    vm.agent().command(&case.load_command()).map(drop)
}

/// The sitting as one HTML page; `subject` says which kernel and seed.
#[must_use]
pub fn page(subject: &str, sitting: &Sitting) -> String {
    let mut page = Page::new(&format!("Crashes in a row: {subject}"));
    let count =
        |test: &dyn Fn(&Crash) -> bool| sitting.crashes.iter().filter(|it| test(it)).count();
    page.paragraph(format_args!(
        "{} crashes one after the other on one guest under one guard, in {:.0} s.",
        sitting.crashes.len(),
        sitting.took.as_secs_f64()
    ));
    let wrong = |crash: &Crash| !crash.wrong.is_empty();
    let parts = vec![
        (Tone::Good, "rung 1", count(&|it| !wrong(it) && it.rung == Some(1))),
        (Tone::Warn, "rung 2 or 3", count(&|it| !wrong(it) && matches!(it.rung, Some(2 | 3)))),
        (Tone::Bad, "something wrong", count(&wrong)),
    ];
    page.heading("Outcome").bars(&[Bar { label: "crashes".into(), parts }]);
    let mut times: Vec<Duration> = sitting.crashes.iter().filter_map(|it| it.downtime).collect();
    times.sort_unstable();
    let time = |percent| percentile(&times, percent).map_or("-".into(), milliseconds);
    page.heading("Downtime").histogram(&times).paragraph(format_args!(
        "median {}, p99 {}, longest {}",
        time(50),
        time(99),
        time(100)
    ));
    let plain = |text: String| (Tone::Plain, text);
    let kib = |what: &str, (before, after): (u64, u64)| {
        vec![plain(what.into()), plain(format!("{before} KiB")), plain(format!("{after} KiB"))]
    };
    page.heading("Wear").table(
        &["", "Before", "After"],
        &[
            kib("Guest memory available", sitting.available_kib),
            kib("Guard's own memory", sitting.guard_kib),
        ],
    );
    for line in &sitting.wrong {
        page.paragraph(line);
    }
    page.finish()
}

/// What the workload says that it must not.
fn workload(vm: &mut Vm, command: &str, index: u64) -> Option<String> {
    match vm.agent().command(command) {
        Ok(answer) => {
            let zero = |name| answer.number(name).is_ok_and(|n| n == 0);
            (!zero("errors") || !zero("stalled"))
                .then(|| format!("after {index} crashes: {}", answer.text()))
        }
        Err(error) => Some(format!("after {index} crashes: {error}")),
    }
}

/// The guest's available memory in KiB, with what it can give back given back.
fn available(vm: &mut Vm) -> Result<u64> {
    let command = "exec sync; echo 3 >/proc/sys/vm/drop_caches; grep MemAvailable: /proc/meminfo";
    let answer = vm.agent().command(command)?;
    let number = answer.text().split_whitespace().find_map(|word| word.parse().ok());
    number.ok_or_else(|| Error::Answer { field: "MemAvailable", answer: answer.text().to_owned() })
}

/// Memory of a process's own in KiB, without the guest's RAM that it maps; 0 when it is gone.
fn own_memory(pid: u32) -> u64 {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(Path::new(&path)).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_enough_to_choose_from() {
        let pool: Vec<_> = repeatable().collect();
        assert!(pool.len() >= 20, "{}", pool.len());
        assert!(pool.iter().all(|case| case.parameters.is_empty()));
        assert!(pool.iter().all(|case| case.refused.is_none()), "the guest goes down");
    }

    #[test]
    fn own_memory_is_known_and_that_of_nobody_is_none() {
        assert!(own_memory(std::process::id()) > 100);
        assert_eq!(own_memory(u32::MAX), 0);
    }
}
