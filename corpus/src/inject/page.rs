//! A series of injections as one HTML page. The counting is in `tally.rs`.

use std::collections::BTreeMap;

use super::tally::{Counts, EFFECTS, Tally};
use super::{Effect, Injection};
use crate::campaign::percentile;
use crate::html::{Bar, Page, Tone, milliseconds};

/// The page; `subject` says which kernel and seed.
#[must_use]
pub fn page(subject: &str, injections: &[Injection]) -> String {
    let tally = Tally::of(injections);
    let (crashes, saved) = tally.crashes();
    let mut page = Page::new(&format!("Fault injection: {subject}"));
    page.paragraph(format_args!(
        "{} changes of one instruction each in drivers in use; {crashes} crashed the guest, {saved} of these were repaired.",
        injections.len()
    ));
    page.heading("By driver").bars(&bars(&tally.drivers)).table(&head(), &rows(&tally.drivers));
    page.heading("By kind of change")
        .bars(&bars(&tally.operators))
        .table(&head(), &rows(&tally.operators));
    page.heading("Downtime of repairs").histogram(&tally.downtimes);
    let time = |percent| percentile(&tally.downtimes, percent).map_or("-".into(), milliseconds);
    page.paragraph(format_args!("median {}, p99 {}, longest {}", time(50), time(99), time(100)));
    page.heading("Changes").table(
        &[
            "#",
            "Driver",
            "Change",
            "Function",
            "Instruction",
            "Effect",
            "Rungs",
            "Downtime",
            "Diagnosis",
            "Remarks",
        ],
        &injections.iter().map(row).collect::<Vec<_>>(),
    );
    page.finish()
}

fn tone(word: &str) -> Tone {
    match word {
        "saved" => Tone::Good,
        "saved with loss" | "saved, change still harms" => Tone::Warn,
        "WRONG REPAIR" => Tone::Bad,
        _ => Tone::Plain,
    }
}

fn head() -> Vec<&'static str> {
    std::iter::once("").chain(EFFECTS).collect()
}

fn rows(of: &BTreeMap<String, Counts>) -> Vec<Vec<(Tone, String)>> {
    let cell = |(word, count): (&&str, &usize)| {
        let tone = if *count == 0 { Tone::Plain } else { tone(word) };
        (tone, count.to_string())
    };
    of.iter()
        .map(|(name, counts)| {
            let name = std::iter::once((Tone::Plain, name.clone()));
            name.chain(EFFECTS.iter().zip(counts).map(cell)).collect()
        })
        .collect()
}

/// Only what crashed: the rest says nothing of the guard.
fn bars(of: &BTreeMap<String, Counts>) -> Vec<Bar> {
    let crashed =
        |word: &str| word.starts_with("saved") || word == "refused" || word == "WRONG REPAIR";
    of.iter()
        .map(|(name, counts)| Bar {
            label: name.clone(),
            parts: EFFECTS
                .iter()
                .zip(counts)
                .filter(|(word, _)| crashed(word))
                .map(|(&word, &count)| (tone(word), word, count))
                .collect(),
        })
        .collect()
}

fn row(injection: &Injection) -> Vec<(Tone, String)> {
    let mutation = &injection.mutation;
    let rungs: Vec<String> = injection.rungs.iter().map(ToString::to_string).collect();
    let downtime =
        injection.downtimes.iter().max().map_or_else(String::new, |&it| milliseconds(it));
    let word = injection.effect.word();
    let tone = if injection.effect == Effect::None { Tone::Plain } else { tone(word) };
    vec![
        (Tone::Plain, injection.index.to_string()),
        (Tone::Plain, injection.driver.to_owned()),
        (Tone::Plain, mutation.operator.word().to_owned()),
        (Tone::Plain, format!("{} (.text+{:#x})", mutation.function, mutation.offset)),
        (Tone::Plain, mutation.text.clone()),
        (tone, word.to_owned()),
        (Tone::Plain, rungs.join(" ")),
        (Tone::Plain, downtime),
        (Tone::Plain, injection.title.clone()),
        (Tone::Plain, injection.effect.remarks()),
    ]
}
