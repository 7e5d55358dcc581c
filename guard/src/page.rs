//! The page about one crash, filled from what was done: `report.html` of an incident. How it looks is
//! `diagnose::report`'s.

use std::time::Duration;

use diagnose::report::{Moment, Page, Step, Verdict, Write};
use quarantine::{Action, Deed, Entry, Expected, Plan, Rung};

use crate::crash::{End, Handled};

/// The page.
pub fn page<'a>(handled: &'a Handled, summary: &str, kernel: &str) -> Page<'a> {
    let title = handled
        .diagnosis
        .as_ref()
        .map_or("a crash that was not diagnosed", |diagnosis| diagnosis.title.as_str());
    let mut page = Page::new(title, verdict(handled));
    page.diagnosis = handled.diagnosis.as_ref();
    summary.clone_into(&mut page.summary);
    page.facts = facts(handled, kernel);
    page.timeline = timeline(handled);
    if let Some(plan) = &handled.plan {
        let done = matches!(handled.end, End::Repaired).then_some(true);
        page.plan = plan.actions.iter().map(|action| step(action, done)).collect();
        let refused = plan.refused.iter();
        page.refusals = refused.map(|it| (it.rung.to_string(), it.text.clone())).collect();
    }
    page.writes = handled.journal.entries().iter().filter_map(write).collect();
    page
}

fn verdict(handled: &Handled) -> Verdict {
    match (&handled.end, handled.plan.as_ref().and_then(|plan| plan.rung)) {
        (End::LetGo { .. }, _) => Verdict::LetGo,
        (End::Repaired, Some(Rung::ReturnError | Rung::RepairKernel)) => Verdict::Repaired,
        (End::Repaired, _) => Verdict::RepairedWithLoss,
    }
}

fn facts(handled: &Handled, kernel: &str) -> Vec<(String, String)> {
    let rung = handled.plan.as_ref().and_then(|plan: &Plan| plan.rung);
    let stood = format!("{:.2} ms", handled.downtime.as_secs_f64() * 1e3);
    let facts = [
        ("kernel", kernel.to_owned()),
        ("hook", handled.hook.kind.function().to_owned()),
        ("guest stood for", stood),
        ("rung", rung.map_or_else(|| "none".to_owned(), |rung| rung.to_string())),
        ("guest lost", handled.plan.as_ref().map_or_else(String::new, |plan| plan.loss.clone())),
    ];
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn timeline(handled: &Handled) -> Vec<Moment> {
    let moment = |label: &str, at: Duration| Moment { at, label: label.to_owned(), standing: true };
    let start = std::iter::once(moment("vCPUs stopped", Duration::ZERO));
    start.chain(handled.phases.iter().map(|(name, at)| moment(name, *at))).collect()
}

fn step(action: &Action, done: Option<bool>) -> Step {
    let preconditions = match action {
        Action::CallGuest { expected, .. } => expected.iter().map(condition).collect(),
        Action::WriteWord { at, old, mask, .. } => {
            vec![format!("{at:#x} & {mask:#x} == {:#x}", old & mask)]
        }
        _ => Vec::new(),
    };
    let details = action.details().into_iter();
    let what = std::iter::once(action.what()).chain(details).collect::<Vec<_>>().join("\n");
    Step { what, why: action.why().to_owned(), preconditions, done }
}

fn condition(expected: &Expected) -> String {
    let Expected { at, mask, value, size } = expected;
    format!("{size} bytes at {at:#x} & {mask:#x} == {value:#x}")
}

/// A write to guest memory; other deeds are in the report's text.
fn write(entry: &Entry) -> Option<Write> {
    let Deed::Write { phys, virt, old, new, .. } = &entry.deed else { return None };
    let when = Some(Duration::from_micros(entry.at_us));
    let (old, new) = (old.clone(), new.clone());
    Some(Write { at: *virt, phys: *phys, old, new, what: entry.why.clone(), when })
}
