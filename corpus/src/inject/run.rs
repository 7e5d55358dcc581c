//! One injection: a guest with a changed driver runs under guard for a while, and what came of it is judged. Where a
//! repaired guest shows harm, the same change is run without guard, to tell the change's own doing from the repair's.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::bench::{Bench, GO};
use super::mutation::Mutation;
use crate::campaign::names::text;
use crate::guarded::{Guard, GuardConfig};
use crate::lab::Vm;
use crate::{Error, Result};

/// How long a guard may take to arm.
const ARM_LIMIT: Duration = Duration::from_secs(120);
/// How long a restored guest may take to answer, and to let the workload go on.
const WAKE_LIMIT: Duration = Duration::from_secs(10);
const GO_LIMIT: Duration = Duration::from_secs(3);
/// How long the changed driver is used.
const USE: Duration = Duration::from_millis(1200);
/// How much longer after a repair.
const USE_AFTER: Duration = Duration::from_millis(1000);
/// How long a guest may take to answer before it counts as silent.
const ANSWER_LIMIT: Duration = Duration::from_secs(8);
/// How long a stop of the driver's workload is waited for, in milliseconds.
const STOP_MS: u32 = 1500;

/// What came of an injection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing was seen.
    None,
    /// Calls failed, frames were lost, or a warning was printed; nothing crashed.
    Errors(String),
    /// Wrong data came back without an error and without a crash: the change's own doing.
    WrongData(String),
    /// The driver's users, or the guest, got stuck without a crash that was seen.
    Hang(String),
    /// Crashed before the guard stood beside it; says nothing of the guard.
    Unguarded(String),
    /// Crashed and repaired; everything else is as it was.
    Saved,
    /// Crashed and repaired with the loss of a driver or a process.
    SavedWithLoss,
    /// Crashed and repaired; harm that the change does without guard too.
    SavedWithOwnHarm(Vec<String>),
    /// Crashed; the guard let it take its course.
    Refused(String),
    /// Crashed, repaired, and harmed in a way that the change alone does not show.
    WrongRepair(Vec<String>),
}

impl Effect {
    /// As it is counted.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::None => "no effect",
            Self::Errors(_) => "errors",
            Self::WrongData(_) => "wrong data, no crash",
            Self::Hang(_) => "hang, no crash seen",
            Self::Unguarded(_) => "crashed before guard",
            Self::Saved => "saved",
            Self::SavedWithLoss => "saved with loss",
            Self::SavedWithOwnHarm(_) => "saved, change still harms",
            Self::Refused(_) => "refused",
            Self::WrongRepair(_) => "WRONG REPAIR",
        }
    }

    /// What there is to say of it.
    #[must_use]
    pub fn remarks(&self) -> String {
        match self {
            Self::None | Self::Saved | Self::SavedWithLoss => String::new(),
            Self::Errors(text)
            | Self::WrongData(text)
            | Self::Hang(text)
            | Self::Unguarded(text)
            | Self::Refused(text) => text.clone(),
            Self::SavedWithOwnHarm(list) | Self::WrongRepair(list) => list.join("; "),
        }
    }
}

/// One injection with what came of it.
#[derive(Clone, Debug)]
pub struct Injection {
    /// Its number.
    pub index: u64,
    /// The driver.
    pub driver: &'static str,
    /// What was changed.
    pub mutation: Mutation,
    /// What came of it.
    pub effect: Effect,
    /// The rungs that were taken, in order.
    pub rungs: Vec<u64>,
    /// How long the vCPUs stood each time.
    pub downtimes: Vec<Duration>,
    /// Title of the first diagnosis.
    pub title: String,
    /// How long all of it took.
    pub took: Duration,
}

/// What the guard told.
#[derive(Default)]
struct Told {
    title: String,
    rungs: Vec<u64>,
    downtimes: Vec<Duration>,
    refused: Option<String>,
}

impl Told {
    fn take(&mut self, events: &[Value]) {
        for event in events {
            match text(event, "/event").as_str() {
                "diagnosis" if self.title.is_empty() => self.title = text(event, "/title"),
                "repaired" => {
                    self.rungs.push(event.get("rung").and_then(Value::as_u64).unwrap_or(0));
                    let downtime = event.get("downtime_us").and_then(Value::as_u64);
                    self.downtimes.extend(downtime.map(Duration::from_micros));
                }
                "refused" | "died" | "lost" => {
                    self.refused.get_or_insert_with(|| refusal(event));
                }
                _ => {}
            }
        }
    }
}

fn refusal(event: &Value) -> String {
    let mut reasons = vec![text(event, "/reason")];
    let rungs = event.get("refused").and_then(Value::as_array);
    reasons.extend(rungs.into_iter().flatten().map(|rung| text(rung, "/text")));
    reasons.join("; ")
}

/// What a guest looks like after a while of use.
#[derive(Default)]
struct Seen {
    /// What does not answer.
    silent: Option<String>,
    /// Errors of the driver's workload.
    errors: Option<String>,
    /// Its users no longer get on.
    stuck: Option<String>,
    /// Data that is silently wrong.
    wrong: Option<String>,
    /// Harm to the workload that has nothing to do with the driver.
    others: Option<String>,
    /// The first trouble in the kernel's log, without its time.
    log: Option<String>,
    /// The data disk.
    disk: Option<String>,
}

impl Seen {
    /// Looks at a guest that runs.
    fn of(vm: &mut Vm) -> Self {
        let mut seen = Self::default();
        match vm.agent().command_within("exec inject look", ANSWER_LIMIT) {
            Ok(answer) => {
                let number = |name| answer.number(name).unwrap_or(0);
                let after = |mark: &str| {
                    let text = answer.unescaped();
                    text.split_once(mark).map_or(text.clone(), |(_, rest)| rest.to_owned())
                };
                if number("errors") > 0 || number("deaths") > 0 {
                    seen.errors = Some(format!(
                        "{} errors, {} deaths: {}",
                        number("errors"),
                        number("deaths"),
                        after(" error=")
                    ));
                }
                if number("wrong") > 0 {
                    seen.wrong = Some(after(" harm="));
                }
                if number("more") == 0 {
                    seen.stuck =
                        Some(format!("worker in state {}", answer.field("state").unwrap_or("?")));
                }
            }
            Err(Error::Agent { reason, .. }) if !reason.contains("does not end") => {
                seen.errors = Some(reason);
            }
            Err(error) => seen.silent = Some(first_line(&error.to_string())),
        }
        if seen.silent.is_some() {
            return seen;
        }
        match vm.agent().command_within("workload verify 6000", ANSWER_LIMIT) {
            Ok(answer) => {
                let zero = |name| answer.number(name).is_ok_and(|n| n == 0);
                if !zero("errors") || !zero("stalled") {
                    seen.others = Some(answer.text().to_owned());
                }
            }
            Err(error) => seen.silent = Some(first_line(&error.to_string())),
        }
        if let Ok(answer) = vm.agent().command_within("splats", ANSWER_LIMIT)
            && answer.number("splats").is_ok_and(|n| n > 0)
        {
            let line = answer.unescaped();
            seen.log = line.split_once("] ").map(|(_, line)| line.trim().to_owned());
        }
        seen
    }

    /// Harm that a repaired guest must not show, by kind. That a request to the driver's own device fails is what a
    /// repair announces.
    fn harms(&self, driver: &str) -> Vec<(&'static str, String)> {
        let request = format!("I/O error, dev {driver}");
        let announced = |line: &String| {
            ["kernel BUG at", "list_del corruption", "list_add corruption", &request]
                .iter()
                .any(|text| line.contains(text))
        };
        let log = self.log.clone().filter(|line| !announced(line));
        [
            ("silent", self.silent.clone()),
            ("data", self.wrong.clone()),
            ("workload", self.others.clone()),
            ("log", log),
            ("disk", self.disk.clone()),
        ]
        .into_iter()
        .filter_map(|(kind, text)| Some((kind, text?)))
        .collect()
    }

    /// What became of a guest in which nothing crashed.
    fn without_crash(self) -> Effect {
        if let Some(text) = self.silent {
            return Effect::Hang(format!("the guest: {text}"));
        }
        if let Some(text) = self.others {
            return Effect::Hang(format!("the other workload: {text}"));
        }
        match (self.wrong, self.stuck, self.errors.or(self.log)) {
            (Some(text), ..) => Effect::WrongData(text),
            (_, Some(text), _) => Effect::Hang(text),
            (.., Some(text)) => Effect::Errors(text),
            _ => Effect::None,
        }
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Runs one injection.
///
/// # Errors
/// When the lab or the guard fails; what the guest does is in the result.
pub fn run(
    bench: &Bench,
    index: u64,
    mutation: &Mutation,
    config: &GuardConfig,
) -> Result<Injection> {
    let begin = Instant::now();
    let mut vm = bench.changed(mutation)?;
    vm.go_on()?;
    let mut told = Told::default();
    let injection = |effect: Effect, told: Told| Injection {
        index,
        driver: bench.target.name,
        mutation: mutation.clone(),
        effect,
        rungs: told.rungs,
        downtimes: told.downtimes,
        title: told.title,
        took: begin.elapsed(),
    };
    // The kernel may call the driver of its own accord.
    if vm.wait_for_agent(WAKE_LIMIT).is_err() {
        let text = vm.console_end();
        let text = text.lines().find_map(|line| line.split_once("] ")).map_or("", |it| it.1);
        return Ok(injection(Effect::Unguarded(text.to_owned()), told));
    }
    let mut guard = Guard::start(config, &vm.qmp())?;
    guard.await_event("armed", ARM_LIMIT)?;
    // A guest that crashes before it has answered has done what it was asked for.
    let _ = vm.agent().command_within(GO, GO_LIMIT);
    watch(&mut guard, &mut told, USE);
    if !told.rungs.is_empty() && told.refused.is_none() {
        watch(&mut guard, &mut told, USE_AFTER);
    }
    // A guest that was let go has nothing more to say of the guard.
    let mut seen = match told.refused {
        Some(_) => Seen::default(),
        None => Seen::of(&mut vm),
    };
    told.take(&guard.drain());
    let repaired = !told.rungs.is_empty();
    if repaired && told.refused.is_none() && seen.silent.is_none() {
        finish(vm, guard, &mut seen, &mut told);
    }
    let effect = judge(bench, mutation, &told, seen)?;
    Ok(injection(effect, told))
}

/// Collects what the guard tells for a while.
fn watch(guard: &mut Guard, told: &mut Told, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until && told.refused.is_none() {
        told.take(&guard.drain());
        thread::sleep(Duration::from_millis(25));
    }
}

/// Ends a repaired guest in order: the workloads to their last check, the guard, the disk.
fn finish(mut vm: Vm, mut guard: Guard, seen: &mut Seen, told: &mut Told) {
    let stop = format!("exec inject stop {STOP_MS}");
    // What the driver's users say at their end is theirs; that the guest answers is not.
    if let Err(error) = vm.agent().command_within(&stop, ANSWER_LIMIT) {
        seen.silent = Some(first_line(&error.to_string()));
        // It may be silent because it was let go.
        told.take(&guard.drain());
        return;
    }
    match vm.agent().command("workload stop") {
        Ok(answer) => {
            let zero = |name| answer.number(name).is_ok_and(|n| n == 0);
            if !zero("errors") || !zero("stalled") {
                seen.others.get_or_insert(answer.text().to_owned());
            }
        }
        Err(error) => seen.silent = Some(first_line(&error.to_string())),
    }
    told.take(&guard.drain());
    if told.refused.is_some() {
        return;
    }
    if let Err(error) = guard.detach() {
        seen.silent = Some(format!("guard: {}", first_line(&error.to_string())));
    }
    if let Err(error) = vm.finish_and_check_disk() {
        seen.disk = Some(error.to_string());
    }
}

fn judge(bench: &Bench, mutation: &Mutation, told: &Told, seen: Seen) -> Result<Effect> {
    if let Some(reason) = &told.refused {
        let earlier = match told.rungs.len() {
            0 => String::new(),
            n => format!(" (after {n} repairs)"),
        };
        return Ok(Effect::Refused(format!("{reason}{earlier}")));
    }
    if told.rungs.is_empty() {
        return Ok(seen.without_crash());
    }
    let harms = seen.harms(bench.target.name);
    if harms.is_empty() {
        let loss = told.rungs.iter().any(|rung| matches!(rung, 2 | 3));
        return Ok(if loss { Effect::SavedWithLoss } else { Effect::Saved });
    }
    let (alone, console) = alone(bench, mutation)?;
    let own = |(kind, text): &(&str, String)| match *kind {
        // Without guard the log always tells of the crash: only the very same line counts.
        "log" => {
            let bare =
                |text: &str| text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
            bare(&console).contains(&bare(text))
        }
        kind => alone.harms(bench.target.name).iter().any(|(other, _)| other == &kind),
    };
    let (own, new): (Vec<_>, Vec<_>) = harms.into_iter().partition(own);
    let texts = |list: Vec<(&str, String)>| -> Vec<String> {
        list.into_iter().map(|(kind, text)| format!("{kind}: {text}")).collect()
    };
    Ok(if new.is_empty() {
        Effect::SavedWithOwnHarm(texts(own))
    } else {
        Effect::WrongRepair(texts(new))
    })
}

/// The same change in a guest that nobody guards and whose oopses only end the process; with its log.
fn alone(bench: &Bench, mutation: &Mutation) -> Result<(Seen, String)> {
    let mut vm = bench.changed(mutation)?;
    vm.go_on()?;
    vm.wait_for_agent(WAKE_LIMIT)?;
    let _ = vm.agent().command_within(GO, GO_LIMIT);
    thread::sleep(USE + USE_AFTER);
    let seen = Seen::of(&mut vm);
    let log = vm.agent().command_within("dmesg 12000", ANSWER_LIMIT);
    let log = log.map_or_else(|_| String::new(), |answer| answer.unescaped());
    let console = vm.console();
    Ok((seen, log + &console))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_repair_without_harm_is_told_from_one_with_loss() {
        let mut told = Told::default();
        told.take(&[
            json!({ "event": "diagnosis", "title": "first" }),
            json!({ "event": "repaired", "rung": 1, "downtime_us": 5000 }),
            json!({ "event": "diagnosis", "title": "second" }),
            json!({ "event": "repaired", "rung": 2, "downtime_us": 7000 }),
        ]);
        assert_eq!((told.title.as_str(), told.rungs.as_slice()), ("first", &[1, 2][..]));
        assert_eq!(told.downtimes.len(), 2);
        assert!(told.refused.is_none());
    }

    #[test]
    fn what_nobody_crashed_is_judged_by_the_worst() {
        let seen = Seen { errors: Some("e".into()), wrong: Some("w".into()), ..Seen::default() };
        assert_eq!(seen.without_crash(), Effect::WrongData("w".into()));
        let seen = Seen { errors: Some("e".into()), stuck: Some("s".into()), ..Seen::default() };
        assert_eq!(seen.without_crash(), Effect::Hang("s".into()));
        assert_eq!(Seen::default().without_crash(), Effect::None);
        let seen = Seen { log: Some("kernel BUG at x.c:1!".into()), ..Seen::default() };
        assert!(seen.harms("loop").is_empty());
        let log = "I/O error, dev loop0, sector 8 op 0x1:(WRITE)".to_owned();
        let seen = Seen { log: Some(log), ..Seen::default() };
        assert!(seen.harms("loop").is_empty());
        assert!(!seen.harms("veth").is_empty(), "somebody else's device");
    }
}
