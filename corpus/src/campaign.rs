//! Runs cases on lab guests under guard and judges what came of them: saved or not, and whether the
//! guard's diagnosis says what the case expects.

pub(crate) mod names;
mod page;
mod tally;

use std::time::Duration;

use serde_json::Value;

use crate::guarded::{Guard, GuardConfig};
use crate::lab::{Agent, Snapshot, Vm, VmmConfig, VmmGuest};
use crate::scenario::{Blame, Case, Class, Resource};
use crate::stock::Courses;
use crate::{Error, Result};
use names::text;
pub use page::page;
pub use tally::{Row, StockRow, Tally, percentile, share};

/// How long a guard may take to learn a kernel that it has never seen.
const ATTACH_LIMIT: Duration = Duration::from_secs(120);
/// How long one crash may take to be dealt with.
const CRASH_LIMIT: Duration = Duration::from_secs(40);
/// How long a guest that is not to be saved is listened to: it goes down in the middle of its answer.
const REFUSED_LIMIT: Duration = Duration::from_secs(10);
/// How long the crashing process is waited for, in milliseconds, in the guest.
const PROCESS_LIMIT: u64 = 20_000;

/// The driver of a device that only QEMU emulates.
const EDU_DRIVER: &str = "crash_irq";

/// What came of a case.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The case's name.
    pub name: &'static str,
    /// The class that the case expects.
    pub class: String,
    /// Where the fault happens.
    pub context: String,
    /// What became of the guest.
    pub outcome: Outcome,
    /// Rung that was taken.
    pub rung: Option<u64>,
    /// How long the vCPUs stood.
    pub downtime: Option<Duration>,
    /// Title of the diagnosis.
    pub title: String,
    /// What the diagnosis says otherwise than the case expects.
    pub differences: Vec<String>,
    /// What the same crash does without guard, when that was tried.
    pub stock: Option<Courses>,
}

/// What a crash cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// A failed call at most.
    Saved,
    /// A driver or a process.
    SavedWithLoss,
    /// The guest, knowingly.
    Refused,
    /// What should not have happened.
    Wrong,
}

impl Fate {
    /// As it is printed.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Saved => "saved",
            Self::SavedWithLoss => "saved with loss",
            Self::Refused => "refused",
            Self::Wrong => "wrong",
        }
    }
}

/// What became of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs on, the verifying workload and the driver's self-check are content.
    Saved,
    /// The guard refused to repair; the guest went down.
    Refused(String),
    /// The guest was resumed, but something is not as it must be.
    Wrong(Vec<String>),
}

impl Verdict {
    /// Of a crash that the guard did not come to speak of.
    fn unnoticed(case: &'static Case, error: &Error) -> Self {
        Self {
            name: case.name,
            class: format!("{:?}", case.class),
            context: format!("{:?}", case.context),
            outcome: Outcome::Refused(error.to_string()),
            rung: None,
            downtime: None,
            title: "not diagnosed".to_owned(),
            differences: vec!["no diagnosis".to_owned()],
            stock: None,
        }
    }

    /// What the crash cost.
    #[must_use]
    pub fn fate(&self) -> Fate {
        match (&self.outcome, self.rung) {
            // Rung 2 gives up a driver, rung 3 a process.
            (Outcome::Saved, Some(2 | 3)) => Fate::SavedWithLoss,
            (Outcome::Saved, _) => Fate::Saved,
            (Outcome::Refused(_), _) => Fate::Refused,
            (Outcome::Wrong(_), _) => Fate::Wrong,
        }
    }

    /// Whether everything is as the case expects.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.outcome == Outcome::Saved && self.differences.is_empty()
    }
}

/// Where a case's guest runs.
#[derive(Clone, Debug)]
pub enum Stand {
    /// In a QEMU that goes on from this snapshot, with `defib guard` beside it.
    Qemu(Snapshot),
    /// In the minimal VMM, booted, with the guard in its process.
    MinimalVmm(VmmConfig),
}

impl Stand {
    /// Whether it has what the case's driver drives.
    #[must_use]
    pub fn can_run(&self, case: &Case) -> bool {
        matches!(self, Self::Qemu(_)) || case.driver != EDU_DRIVER
    }

    /// A guest under guard, with the workload running and the case's driver loaded.
    fn start(&self, case: &Case, config: &GuardConfig) -> Result<(Guest, Guard)> {
        match self {
            Self::Qemu(snapshot) => {
                let mut vm = snapshot.restore()?;
                prepare(vm.agent(), case)?;
                let mut guard = Guard::start(config, &vm.qmp())?;
                guard.await_event("armed", ATTACH_LIMIT)?;
                Ok((Guest::Qemu(Box::new(vm)), guard))
            }
            Self::MinimalVmm(vmm) => {
                let (mut guest, mut guard) = Guard::start_in_vmm(config, vmm)?;
                guard.await_event("armed", ATTACH_LIMIT)?;
                // What the kernel did not like about its processor is not the case's.
                guest.agent().command("exec dmesg -c >/dev/null")?;
                prepare(guest.agent(), case)?;
                await_driver(&mut guard, case)?;
                Ok((Guest::MinimalVmm(guest), guard))
            }
        }
    }
}

/// Waits until the guard has read the driver's file: before, a diagnosis has no lines for it.
fn await_driver(guard: &mut Guard, case: &Case) -> Result<()> {
    loop {
        let event = guard.await_event("modules", ATTACH_LIMIT)?;
        let known = event.get("with_lines").and_then(Value::as_array);
        let mut known = known.into_iter().flatten().filter_map(Value::as_str);
        if known.any(|module| module == case.driver) {
            return Ok(());
        }
    }
}

fn prepare(agent: &mut Agent, case: &Case) -> Result<()> {
    agent.command("workload start")?;
    agent.command(&case.load_command()).map(drop)
}

/// A guest that runs.
enum Guest {
    Qemu(Box<Vm>),
    MinimalVmm(VmmGuest),
}

impl Guest {
    fn agent(&mut self) -> &mut Agent {
        match self {
            Self::Qemu(vm) => vm.agent(),
            Self::MinimalVmm(guest) => guest.agent(),
        }
    }

    /// Ends guest and guard in order; says what was not as it must be.
    fn finish(mut self, mut guard: Guard) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let stopped = self.agent().command("workload stop");
        wrong.extend(stopped.err().map(|error| format!("workload: {error}")));
        // A guard beside the guest leaves before it; one inside ends with it.
        let (status, checked) = match self {
            Self::Qemu(vm) => (guard.detach()?, vm.finish_and_check_disk()),
            Self::MinimalVmm(guest) => {
                let checked = guest.finish_and_check_disk(guard.process());
                (guard.detach()?, checked)
            }
        };
        wrong.extend(checked.err().map(|error| format!("disk: {error}")));
        if !status.success() {
            wrong.push(format!("the guard ended with {status}"));
        }
        Ok(wrong)
    }
}

/// Runs one case in a guest of its own.
///
/// # Errors
/// When the lab or the guard fails; what the guest does is in the verdict.
pub fn run(case: &'static Case, stand: &Stand, guard: &GuardConfig) -> Result<Verdict> {
    let (mut vm, mut guard) = stand.start(case, guard)?;
    let limit = if case.refused.is_some() { REFUSED_LIMIT } else { CRASH_LIMIT };
    let answer = vm.agent().command_within(&case.crash_command(PROCESS_LIMIT), limit);
    let diagnosis = match guard.await_event("diagnosis", CRASH_LIMIT) {
        Ok(diagnosis) => diagnosis,
        Err(error @ Error::Guard { .. }) => return Ok(Verdict::unnoticed(case, &error)),
        Err(error) => return Err(error),
    };
    // A crash that can't be judged is refused before there is a plan.
    let mut end = guard.await_any(&["plan", "refused"], CRASH_LIMIT)?;
    let mut plan = Value::Null;
    if text(&end, "/event") == "plan" {
        plan = std::mem::replace(&mut end, guard.await_any(&["repaired", "refused"], CRASH_LIMIT)?);
    }
    let mut verdict = Verdict {
        name: case.name,
        class: format!("{:?}", case.class),
        context: format!("{:?}", case.context),
        outcome: Outcome::Saved,
        rung: end.get("rung").and_then(Value::as_u64),
        downtime: end.get("downtime_us").and_then(Value::as_u64).map(Duration::from_micros),
        title: text(&diagnosis, "/title"),
        differences: differences(case, &diagnosis, &end)?,
        stock: None,
    };
    if text(&end, "/event") == "refused" {
        verdict.outcome = Outcome::Refused(refusals(&end, &plan));
        return Ok(verdict);
    }
    let mut wrong = Vec::new();
    match answer {
        Ok(answer) => wrong.extend(sights(case, &answer)),
        Err(error) => wrong.push(format!("no answer: {error}")),
    }
    if wrong.is_empty() {
        wrong.extend(aftermath(case, vm.agent()));
    }
    let later = guard.drain();
    if case.quarantined {
        // Who was left inside is taken out later, by a lower rung.
        verdict.rung = later.iter().filter_map(rung).max().or(verdict.rung);
    } else {
        wrong.extend(further_crashes(&later));
    }
    if wrong.is_empty() {
        wrong.extend(vm.finish(guard)?);
    }
    if !wrong.is_empty() {
        verdict.outcome = Outcome::Wrong(wrong);
    }
    Ok(verdict)
}

/// The rung that was taken, if the event tells of a repair.
fn rung(event: &Value) -> Option<u64> {
    event.get("rung").and_then(Value::as_u64).filter(|_| text(event, "/event") == "repaired")
}

/// Crashes after the repair: each is one that the repair has left behind.
fn further_crashes(events: &[Value]) -> Vec<String> {
    let crashes = events.iter().filter(|event| text(event, "/event") == "diagnosis");
    crashes.map(|crash| format!("another crash: {}", text(crash, "/title"))).collect()
}

fn refusals(end: &Value, plan: &Value) -> String {
    let mut reasons = vec![text(end, "/reason")];
    let refused = plan.get("refused").and_then(Value::as_array);
    reasons.extend(
        refused
            .into_iter()
            .flatten()
            .map(|refusal| format!("{}: {}", text(refusal, "/rung"), text(refusal, "/text"))),
    );
    reasons.join("; ")
}

/// What the processes saw otherwise than they must.
pub(crate) fn sights(case: &Case, answer: &crate::lab::Answer) -> Vec<String> {
    let seen = |own: &str, other: &str| {
        let waiter = case.waiter_sees.is_none_or(|sight| sight.is_shown_by(answer, other));
        (case.sees.is_shown_by(answer, own), waiter)
    };
    let (process, waiter) = seen("", "waiter_");
    if (process && waiter) || (case.either_way && seen("waiter_", "") == (true, true)) {
        return Vec::new();
    }
    let mut wrong = Vec::new();
    if !process {
        wrong.push(format!("the process saw {:?}, not {:?}", answer.text(), case.sees));
    }
    if !waiter {
        wrong.push(format!("the waiter saw {:?}", answer.text()));
    }
    wrong
}

/// What is not as it must be in a guest that was resumed.
fn aftermath(case: &Case, agent: &mut crate::lab::Agent) -> Vec<String> {
    let mut wrong = Vec::new();
    if case.quarantined {
        // A quarantined driver fails cleanly.
        let answer = agent.command(&case.check_command());
        let said = answer.map_or_else(|error| error.to_string(), |it| it.text().to_owned());
        if !said.contains("EIO") {
            wrong.push(format!("the quarantined driver's device answered {said:?}"));
        }
    }
    let mut must =
        |command: &str, good: &dyn Fn(&crate::lab::Answer) -> bool| match agent.command(command) {
            Ok(answer) if good(&answer) => {}
            Ok(answer) => wrong.push(format!("{command}: {}", answer.text())),
            Err(error) => wrong.push(format!("{command}: {error}")),
        };
    if !case.quarantined {
        must(&case.check_command(), &|answer| {
            answer.text().starts_with("ok") || answer.text().is_empty()
        });
    }
    for command in case.after {
        must(command, &|answer| answer.number("status").map_or(true, |status| status == 0));
    }
    must("workload verify", &|answer| {
        answer.number("errors").is_ok_and(|n| n == 0)
            && answer.number("stalled").is_ok_and(|n| n == 0)
    });
    let (most, own) = own_lines(case);
    must("splats", &|answer| match answer.number("splats") {
        Ok(0) => true,
        Ok(count) => count <= most && own.iter().any(|line| answer.text().contains(line)),
        Err(_) => false,
    });
    wrong
}

/// What the kernel has written about the crash itself before it came to the hook: lines at most, and what the first
/// must hold.
fn own_lines(case: &Case) -> (i64, &'static [&'static str]) {
    use Class::{Bug, DoubleFree, Fortify, ListCorruption, Usercopy, Warning};
    match case.class {
        _ if !case.logs.is_empty() => (i64::MAX, case.logs),
        // report_bug() prints its line before the kernel knows whether it is going to oops; a check of lists prints
        // one of its own besides, and __fortify_report() warns first since v6.9.
        Bug | ListCorruption | Usercopy | DoubleFree | Fortify => (
            2,
            &["kernel BUG at", "list_del corruption", "list_add corruption", "__fortify_report"],
        ),
        // The warning is the crash.
        Warning => (1, &["WARNING: CPU"]),
        // Since v6.5 do_user_addr_fault() warns of a fault with interrupts off before it oopses.
        _ if case.held.contains(&Resource::IrqsOff) => (1, &["fault.c"]),
        _ => (0, &[]),
    }
}

/// What the diagnosis says otherwise than the case expects.
fn differences(case: &Case, diagnosis: &Value, end: &Value) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let mut compare = |what: &str, found: String, expected: &str| {
        if found != expected {
            differences.push(format!("{what}: {found:?} instead of {expected:?}"));
        }
    };
    compare("class", text(diagnosis, "/class/kind"), names::class(case.class));
    compare("context", text(diagnosis, "/context/kind"), names::context(case.context));
    if let Some(place) = case.offender()? {
        let file = text(diagnosis, "/offender/source/file");
        let file = file.rsplit('/').next().unwrap_or_default();
        let line = diagnosis.pointer("/offender/source/line").and_then(Value::as_u64).unwrap_or(0);
        compare("offender", text(diagnosis, "/offender/module"), place.module);
        if case.has_lines || line != 0 {
            let at = |line: usize| format!("{}:{line}", place.file);
            let places: Vec<String> = place.lines.iter().copied().map(at).collect();
            let found = format!("{file}:{line}");
            let expected =
                if places.contains(&found) { found.clone() } else { places.join(" or ") };
            compare("place", found, &expected);
        }
    }
    if let Blame::Process { core_function } = case.blame {
        compare("offender", text(diagnosis, "/offender/kind"), "process");
        let frames = diagnosis.get("frames").and_then(Value::as_array).cloned().unwrap_or_default();
        let named = frames.iter().any(|frame| {
            let inlined =
                frame.get("source").and_then(Value::as_array).cloned().unwrap_or_default();
            text(frame, "/function").starts_with(core_function)
                || inlined.iter().any(|level| text(level, "/function") == core_function)
        });
        compare("core function named", named.to_string(), "true");
    }
    let held_at = match case.blame {
        Blame::Driver => "/boundary/effects/held",
        Blame::Process { .. } => "/all_effects/held",
    };
    let (held, expected) = (names::held(diagnosis, held_at), names::resources(case.held));
    let held = if case.by_chance { names::common(&held, &expected) } else { held };
    compare("held", held, &expected);
    if let Some(rung) = end.get("rung").and_then(Value::as_u64) {
        compare("rung", rung.to_string(), &names::rung(case.rung).to_string());
    }
    Ok(differences)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::scenario::case;

    #[test]
    fn a_right_diagnosis_differs_in_nothing() {
        let case = case("three-locks").unwrap();
        let line = case.offender().unwrap().unwrap().lines[0];
        let mut diagnosis = json!({
            "class": { "kind": "bug" }, "context": { "kind": "task" },
            "offender": { "kind": "driver", "module": "crash_locks",
                          "source": { "file": "/x/crash_locks.c", "line": line } },
            "boundary": { "effects": { "held": [
                { "kind": "spinlock_irqsave" }, { "kind": "mutex" }, { "kind": "spinlock_irqsave" }] } },
        });
        let end = json!({ "rung": 1 });
        assert_eq!(differences(case, &diagnosis, &end).unwrap(), Vec::<String>::new());
        diagnosis["offender"]["source"]["line"] = json!(line + 1);
        assert_eq!(differences(case, &diagnosis, &json!({ "rung": 3 })).unwrap().len(), 2);
    }

    #[test]
    fn whoever_meets_it_by_chance_may_hold_more_but_not_less() {
        let case = case("out-of-memory").unwrap();
        let mut diagnosis = json!({
            "class": { "kind": "panic" }, "context": { "kind": "task" }, "offender": { "kind": "process" },
            "fault_frame": 0, "frames": [{ "function": "out_of_memory" }],
            "all_effects": { "held": [{ "kind": "rwsem_write" }, { "kind": "mutex" }] },
        });
        assert_eq!(differences(case, &diagnosis, &json!({})).unwrap(), Vec::<String>::new());
        diagnosis["all_effects"]["held"] = json!([{ "kind": "rwsem_write" }]);
        assert_eq!(differences(case, &diagnosis, &json!({})).unwrap().len(), 1);
    }
}
