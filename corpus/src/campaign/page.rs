//! A campaign's results as one HTML page. The counting is in `tally.rs`, the building blocks in `html.rs`.

use super::tally::{Row, Tally, percentile, share};
use super::{Fate, Outcome, Verdict};
use crate::html::{Bar, Page, Tone, milliseconds};
use crate::stock::Course;

/// The page; `subject` says which kernel on what.
#[must_use]
pub fn page(subject: &str, verdicts: &[Verdict]) -> String {
    let tally = Tally::of(verdicts);
    let mut page = Page::new(&format!("Crash corpus: {subject}"));
    let all = tally.all;
    page.paragraph(format_args!(
        "{} crashes: {} saved, {} saved with the loss of a driver or a process, {} refused, {} wrong.",
        all.total(),
        all.saved,
        all.with_loss,
        all.refused,
        all.wrong
    ));
    if all.stock.runs > 0 {
        page.paragraph(format_args!(
            "Of the {} that take a stock guest with panic_on_oops=1 down, {} were saved ({}).",
            all.stock.lost,
            all.stock.lost_but_saved,
            share(all.stock.lost_but_saved, all.stock.lost)
        ));
    }
    page.heading("Outcome by class").bars(&bars(&tally.classes));
    page.table(HEAD, &rows(&tally.classes));
    page.heading("Outcome by context").bars(&bars(&tally.contexts));
    page.table(HEAD, &rows(&tally.contexts));
    if all.stock.runs > 0 {
        page.heading("The same crashes without guard").bars(&beside(&all));
    }
    page.heading("Downtime").histogram(&tally.downtimes);
    let time = |percent| percentile(&tally.downtimes, percent).map_or("-".into(), milliseconds);
    page.paragraph(format_args!("median {}, p99 {}, longest {}", time(50), time(99), time(100)));
    page.heading("Cases").table(
        &["Case", "Outcome", "Rung", "Downtime", "panic_on_oops=1", "=0", "Diagnosis", "Remarks"],
        &verdicts.iter().map(row).collect::<Vec<_>>(),
    );
    page.finish()
}

const HEAD: &[&str] = &[
    "",
    "Cases",
    "Saved",
    "With loss",
    "Refused",
    "Wrong",
    "Stock lost (=1)",
    "of these saved",
    "Stock lost (=0)",
    "damaged",
    "clean",
];

fn rows(of: &std::collections::BTreeMap<String, Row>) -> Vec<Vec<(Tone, String)>> {
    let count = |tone, count: usize| match count {
        0 => (Tone::Plain, "0".to_owned()),
        count => (tone, count.to_string()),
    };
    of.iter()
        .map(|(name, row)| {
            let stock = row.stock;
            vec![
                (Tone::Plain, name.clone()),
                count(Tone::Plain, row.total()),
                count(Tone::Good, row.saved),
                count(Tone::Warn, row.with_loss),
                count(Tone::Plain, row.refused),
                count(Tone::Bad, row.wrong),
                count(Tone::Plain, stock.lost),
                (Tone::Plain, share(stock.lost_but_saved, stock.lost)),
                count(Tone::Plain, stock.lenient_lost),
                count(Tone::Plain, stock.lenient_damaged),
                count(Tone::Plain, stock.lenient_clean),
            ]
        })
        .collect()
}

fn bars(of: &std::collections::BTreeMap<String, Row>) -> Vec<Bar> {
    of.iter().map(|(name, row)| bar(name.clone(), row)).collect()
}

fn bar(label: String, row: &Row) -> Bar {
    let parts = vec![
        (Tone::Good, "saved", row.saved),
        (Tone::Warn, "saved with loss", row.with_loss),
        (Tone::Plain, "refused", row.refused),
        (Tone::Bad, "wrong", row.wrong),
    ];
    Bar { label, parts }
}

/// Guarded and stock, one below the other.
fn beside(all: &Row) -> Vec<Bar> {
    let stock = all.stock;
    let strict = vec![
        (Tone::Good, "went on", stock.runs - stock.lost),
        (Tone::Bad, "down or hung", stock.lost),
    ];
    let lenient = vec![
        (Tone::Good, "went on", stock.lenient_clean),
        (Tone::Warn, "went on damaged", stock.lenient_damaged),
        (Tone::Bad, "down or hung", stock.lenient_lost),
    ];
    vec![
        bar("under guard".into(), all),
        Bar { label: "stock, panic_on_oops=1".into(), parts: strict },
        Bar { label: "stock, panic_on_oops=0".into(), parts: lenient },
    ]
}

fn row(verdict: &Verdict) -> Vec<(Tone, String)> {
    let fate = verdict.fate();
    let tone = match fate {
        Fate::Saved => Tone::Good,
        Fate::SavedWithLoss => Tone::Warn,
        Fate::Refused => Tone::Plain,
        Fate::Wrong => Tone::Bad,
    };
    let mut remarks = match &verdict.outcome {
        Outcome::Saved => Vec::new(),
        Outcome::Refused(reason) => vec![reason.clone()],
        Outcome::Wrong(reasons) => reasons.clone(),
    };
    remarks.extend(verdict.differences.iter().cloned());
    let course = |course: Option<&Course>| {
        let text = course.map_or_else(String::new, ToString::to_string);
        (Tone::Plain, text)
    };
    vec![
        (Tone::Plain, verdict.name.to_owned()),
        (tone, fate.word().to_owned()),
        (Tone::Plain, verdict.rung.map_or("-".into(), |rung| rung.to_string())),
        (Tone::Plain, verdict.downtime.map_or_else(String::new, milliseconds)),
        course(verdict.stock.as_ref().map(|stock| &stock.strict)),
        course(verdict.stock.as_ref().map(|stock| &stock.lenient)),
        (Tone::Plain, verdict.title.clone()),
        (Tone::Plain, remarks.join("; ")),
    ]
}
