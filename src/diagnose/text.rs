//! A finding as text for people. Concludes nothing.

use std::fmt::Write;

use diagnose::console::{Frame, Report};
use diagnose::report::{self, Variables};

use super::Finding;
use super::dump::OfDump;
use super::log::OfLog;

/// Columns at most, as in `diagnose::report`.
const WIDTH: usize = 120;

/// Said of a dump without a crash.
pub const NO_CRASH: &str = "No vCPU is crashing: none has the kernel's crash code on its stack. What each was doing stands below.";
/// Said of every plan: a guard stops the CPU at the first instruction of the crash code.
pub const AS_IT_STANDS: &str = "Planned from the state in the dump. A guard steps in before panic() and the reports \
    have changed it, and may repair what is refused here.";
/// Said of a log without a crash.
pub const QUIET: &str = "No crash, warning or stall is reported in this log.";
/// Said of every log.
pub const ONLY_A_LOG: &str = "From a console log only: this is what the kernel printed, unchecked; offender by the rules of fuzzing dashboards.";

pub fn text(finding: &Finding) -> String {
    match finding {
        Finding::Dump(dump) => of_dump(dump),
        Finding::Log(log) => of_log(log),
    }
}

fn of_dump(dump: &OfDump) -> String {
    let mut out = match &dump.crash {
        Some(crash) => report::text(&crash.diagnosis),
        None => format!("{}\n", no_crash(dump)),
    };
    if let Some(crash) = &dump.crash {
        let _ = write!(
            out,
            "\nRepair that would have been made\n{}{}",
            indented(AS_IT_STANDS),
            indented(&crash.plan.to_string())
        );
    }
    for (title, text) in report::sections(&dump.state, Variables::OfTheCrash) {
        let _ = write!(out, "\n{title}\n{text}");
    }
    let _ = write!(out, "\nSource\n{}", facts(&dump.facts()));
    out
}

/// Said of a dump in which nothing crashes at the moment: what the kernel has reported before.
pub fn no_crash(dump: &OfDump) -> String {
    let titles =
        dump.reports.iter().map(|report| format!("\nIts kernel log reports: {}", report.title));
    std::iter::once(NO_CRASH.to_owned()).chain(titles).collect()
}

/// Lines two columns in, wrapped between words.
fn indented(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let (mut column, mut first) = (0, true);
        for word in line.split_inclusive(' ') {
            let width = word.trim_end().chars().count();
            if first || column + width > WIDTH {
                out.push_str(if first { "  " } else { "\n      " });
                column = if first { 2 } else { 6 };
                first = false;
            }
            out.push_str(word);
            column += word.chars().count();
        }
        out.push('\n');
    }
    out
}

fn facts(facts: &[(&'static str, String)]) -> String {
    facts.iter().map(|(name, value)| format!("  {name:<12} {value}\n")).collect()
}

fn of_log(log: &OfLog) -> String {
    let Some(cause) = log.cause().and_then(|index| log.reports.get(index)) else {
        return format!("{QUIET}\n");
    };
    let mut out = format!("{}\n{ONLY_A_LOG}\n\n", cause.title);
    out.push_str(&of_report(cause));
    let others = log.reports.iter().filter(|report| !std::ptr::eq(*report, cause));
    let lines: String =
        others.map(|it| format!("  line {:>6}  {}\n", it.first_line, it.title)).collect();
    if !lines.is_empty() {
        let _ = write!(out, "\nOther reports in this log\n{lines}");
    }
    let _ = write!(out, "\nSource\n  {:<12} {}\n", "log", log.name);
    out
}

/// One report of a log, in parts as `report::sections`.
pub fn of_report(report: &Report) -> String {
    let mut out = format!("Facts\n{}", facts(&report_facts(report)));
    let frames: String = report.frames.iter().map(frame).collect();
    let frames =
        if frames.is_empty() { "  unknown: the log has none\n".to_owned() } else { frames };
    let _ = write!(out, "\nFrames as printed, innermost first (? not certain)\n{frames}");
    let _ = write!(out, "\nModules\n{}", wrapped(&report.modules));
    out
}

/// What a report says, by name; what it does not say is left out or said to be unknown.
pub fn report_facts(report: &Report) -> Vec<(&'static str, String)> {
    let unknown = || "unknown: the log does not say".to_owned();
    let class = report.class.as_ref().map(|class| format!("{class:?}"));
    let task = match (&report.comm, report.pid) {
        (Some(comm), Some(pid)) => format!("{comm} (pid {pid})"),
        (Some(comm), None) => comm.clone(),
        (None, Some(pid)) => format!("pid {pid}"),
        (None, None) => unknown(),
    };
    let mut facts = vec![
        ("signature", report.signature.clone()),
        ("class", class.unwrap_or_else(unknown)),
        ("offender", report.offender().unwrap_or_else(unknown)),
        (
            "guilty file",
            report
                .file
                .clone()
                .unwrap_or_else(|| "unknown: the log has no source lines".to_owned()),
        ),
        ("task", task),
    ];
    let optional = [
        ("CPU", report.cpu.map(|cpu| cpu.to_string())),
        ("kernel", report.release.clone()),
        ("taint", report.taint.clone()),
        ("hardware", report.hardware.clone()),
        ("uptime", report.uptime.map(|at| format!("{:.6} s", at.as_secs_f64()))),
        ("panic", report.panic.clone()),
        ("doubtful", report.corrupted.map(|why| why.to_string())),
        ("lines", Some(format!("{} from line {}", report.lines, report.first_line))),
    ];
    facts.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    facts
}

fn frame(frame: &Frame) -> String {
    let mut name = frame.function.clone();
    if let Some(offset) = frame.offset {
        let _ = write!(name, "+{offset:#x}");
    }
    if let Some(module) = &frame.module {
        let _ = write!(name, " [{module}]");
    }
    let source = frame.source.as_ref().map(|(file, line)| format!("{file}:{line}"));
    let mark = if frame.trusted { ' ' } else { '?' };
    let inline = if frame.inline { " (inlined)" } else { "" };
    let line = format!("  {mark} {:<52} {}", name + inline, source.unwrap_or_default());
    format!("{}\n", line.trim_end())
}

fn wrapped(words: &[String]) -> String {
    if words.is_empty() {
        return "  unknown: the log does not list them\n".to_owned();
    }
    let mut out = String::new();
    let mut line = " ".to_owned();
    for word in words {
        if line.len() > 1 && line.len() + 1 + word.len() > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = " ".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    out + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::sample::OOPS;

    #[test]
    fn a_log_is_told_with_what_it_does_not_say() {
        let said = text(&Finding::Log(OfLog::read("console".to_owned(), OOPS.as_bytes())));
        for word in ["toy_write [toy]", "init (pid 1)", ONLY_A_LOG, "guilty file  unknown: "] {
            assert!(said.contains(word), "{word}: {said}");
        }
        let quiet = text(&Finding::Log(OfLog::read("console".to_owned(), b"hello\n")));
        assert_eq!(quiet.trim_end(), QUIET);
    }

    #[test]
    fn a_long_sentence_of_a_plan_is_wrapped() {
        let said = indented(&"word ".repeat(60));
        assert!(said.lines().all(|line| line.trim_end().chars().count() <= WIDTH), "{said}");
        assert_eq!(said.split_whitespace().count(), 60);
        assert_eq!(indented("one\ntwo"), "  one\n  two\n");
    }
}
