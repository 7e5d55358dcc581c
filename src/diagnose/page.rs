//! A finding as one HTML page. How it looks is `diagnose::report`'s.

use diagnose::report::{self, Page, Step, Variables, Verdict};

use super::Finding;
use super::dump::OfDump;
use super::log::OfLog;
use super::text::{AS_IT_STANDS, ONLY_A_LOG, QUIET, no_crash, of_report, report_facts};

pub fn page(finding: &Finding) -> String {
    match finding {
        Finding::Dump(dump) => of_dump(dump),
        Finding::Log(log) => of_log(log),
    }
}

fn of_dump(dump: &OfDump) -> String {
    let mut page = Page::new("No crash", Verdict::Diagnosed);
    page.facts = owned(dump.facts());
    match &dump.crash {
        Some(crash) => {
            page.diagnosis = Some(&crash.diagnosis);
            let taken = crash
                .plan
                .rung
                .map(|rung| format!("The repair that would have been made: {rung}."));
            let taken = taken.unwrap_or_else(|| "No repair would have been made.".to_owned());
            page.summary = format!("{taken} {AS_IT_STANDS}");
            page.plan = crash
                .plan
                .actions
                .iter()
                .map(|action| Step {
                    what: action.what(),
                    why: action.why().to_owned(),
                    preconditions: Vec::new(),
                    done: None,
                })
                .collect();
            let refused = crash.plan.refused.iter();
            page.refusals = refused.map(|it| (it.rung.to_string(), it.text.clone())).collect();
        }
        None => page.summary = no_crash(dump),
    }
    page.texts = report::sections(&dump.state, Variables::OfAll);
    report::html(&page)
}

fn of_log(log: &OfLog) -> String {
    let Some(cause) = log.cause().and_then(|index| log.reports.get(index)) else {
        let mut page = Page::new("No crash", Verdict::Diagnosed);
        QUIET.clone_into(&mut page.summary);
        page.facts = vec![("log".to_owned(), log.name.clone())];
        return report::html(&page);
    };
    let mut page = Page::new(&cause.title, Verdict::Diagnosed);
    ONLY_A_LOG.clone_into(&mut page.summary);
    page.facts = owned(report_facts(cause));
    page.facts.push(("log".to_owned(), log.name.clone()));
    let title = |first: usize, title: &str| format!("Line {first}: {title}");
    let texts = log.reports.iter().map(|it| (title(it.first_line, &it.title), of_report(it)));
    page.texts = texts.collect();
    report::html(&page)
}

fn owned(facts: Vec<(&'static str, String)>) -> Vec<(String, String)> {
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
