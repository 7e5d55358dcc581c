//! One incident as one HTML page: nothing is fetched from anywhere, no script is in it, and everything that
//! came from a guest is text. For screens of any size, light and dark, and for paper.

use guest::Reg;

use super::escape::Html;
use super::page::{Page, Source, Step, Verdict, Write};
use super::timeline::{clipped, duration, svg};
use super::words::{self, described, end, place, trust};
use crate::{Diagnosis, Frame};

/// Entries of one list that are shown at most: a page of a hostile guest stays a page.
const ENTRIES_MAX: usize = 500;
/// Characters of one text that are shown at most.
const TEXT_MAX: usize = 64 << 10;
/// Bytes of one write that are shown at most, before and after.
const BYTES_MAX: usize = 64;
/// Scripts, frames, fonts and connections are forbidden to the page itself, should escaping ever fail.
const POLICY: &str = "<meta http-equiv=\"Content-Security-Policy\" \
    content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">";

/// The page.
#[must_use]
pub fn html(page: &Page<'_>) -> String {
    let mut html = Html::default();
    let title = page.diagnosis.map_or(page.title.as_str(), |diagnosis| &diagnosis.title);
    html.raw("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    html.raw(POLICY);
    html.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    html.element("title", clipped(title, 200));
    html.raw("<style>").raw(include_str!("page.css")).raw("</style></head><body><main>");
    head(page, title, &mut html);
    timeline(page, &mut html);
    if let Some(diagnosis) = page.diagnosis {
        cause(diagnosis, &mut html);
        frames(page, diagnosis, &mut html);
        held(diagnosis, &mut html);
    }
    disassembly(page, &mut html);
    page.diagnosis.into_iter().for_each(|diagnosis| registers(diagnosis, &mut html));
    plan(page, &mut html);
    writes(page, &mut html);
    texts(page, &mut html);
    html.raw("</main></body></html>\n");
    html.finish()
}

fn head(page: &Page<'_>, title: &str, html: &mut Html) {
    html.raw(match page.verdict {
        Verdict::Repaired => "<span class=\"verdict good\">repaired</span>",
        Verdict::RepairedWithLoss => "<span class=\"verdict warn\">repaired with loss</span>",
        Verdict::LetGo => "<span class=\"verdict bad\">not repaired</span>",
        Verdict::Diagnosed => "<span class=\"verdict dim\">diagnosis</span>",
    });
    html.element("h1", clipped(title, 1000));
    if let Some(diagnosis) = page.diagnosis {
        html.element("p", words::verdict(diagnosis));
    }
    if !page.summary.is_empty() {
        html.element("p", clipped(&page.summary, TEXT_MAX));
    }
    if !page.facts.is_empty() {
        let facts = page.facts.iter().take(ENTRIES_MAX);
        list(facts.map(|(name, value)| (name.as_str(), value.as_str())), html);
    }
}

/// Names and values.
fn list<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>, html: &mut Html) {
    html.raw("<dl>");
    for (name, value) in entries {
        html.element("dt", clipped(name, 200)).element("dd", clipped(value, TEXT_MAX));
    }
    html.raw("</dl>");
}

fn timeline(page: &Page<'_>, html: &mut Html) {
    if !page.timeline.is_empty() {
        html.element("h2", "Timeline");
        html.raw("<div class=\"wide\">");
        svg(&page.timeline, html);
        html.raw("</div>");
    }
}

fn cause(diagnosis: &Diagnosis, html: &mut Html) {
    html.element("h2", "Cause");
    if let Some(explanation) = &diagnosis.explanation {
        html.element("p", &explanation.sentence);
        let mut facts = vec![("instruction", explanation.instruction.clone())];
        facts.extend(explanation.operands.iter().map(|(reg, value)| (reg.as_str(), value.clone())));
        facts.extend(explanation.accessed.map(|at| ("accessed", format!("{at:#x}"))));
        facts.extend(explanation.expression.iter().map(|it| ("expression", it.clone())));
        list(facts.iter().map(|(name, value)| (*name, value.as_str())), html);
    }
    let facts = words::facts(diagnosis);
    list(facts.iter().map(|(name, value)| (*name, value.as_str())), html);
    if !diagnosis.evidence.is_empty() {
        html.raw("<ul>");
        diagnosis.evidence.iter().take(ENTRIES_MAX).for_each(|line| {
            html.element("li", clipped(line, TEXT_MAX));
        });
        html.raw("</ul>");
    }
}

fn frames(page: &Page<'_>, diagnosis: &Diagnosis, html: &mut Html) {
    html.element("h2", "Frames, innermost first");
    html.raw("<div class=\"wide\"><table><thead><tr><th>#<th>Function<th>Source<th>Found by</tr></thead>");
    for (index, frame) in diagnosis.frames.iter().enumerate().take(ENTRIES_MAX) {
        frame_rows(diagnosis, index, frame, html);
    }
    html.raw("</table></div>");
    if let Some(left) = diagnosis.frames.len().checked_sub(ENTRIES_MAX).filter(|&left| left > 0) {
        html.element("p", format_args!("{left} frames more"));
    }
    html.raw("<p class=dim>").text(end(&diagnosis.unwind_end)).raw("</p>");
    for source in page.sources.iter().take(ENTRIES_MAX) {
        source_lines(diagnosis, source, html);
    }
}

fn frame_rows(diagnosis: &Diagnosis, index: usize, frame: &Frame, html: &mut Html) {
    let faulted = index == diagnosis.fault_frame;
    let open = if faulted { "<tr class=\"fault\"><td>" } else { "<tr><td>" };
    let (own, inlined) = match frame.source.split_last() {
        Some((own, inlined)) => (Some(own), inlined),
        None => (None, &[][..]),
    };
    for level in inlined.iter().take(ENTRIES_MAX) {
        html.raw(open).raw("<td class=\"n\">");
        html.text(level.function.as_deref().unwrap_or("?"));
        html.raw(" <span class=\"dim\">inlined</span><td class=\"n\">").text(place(level));
        html.raw("<td></tr>");
    }
    html.raw(open).text(index).raw("<td class=\"n\">").text(clipped(&described(frame), 400));
    if faulted {
        html.raw(" <span class=\"bad\">faulted</span>");
    }
    if diagnosis.boundary.as_ref().is_some_and(|boundary| boundary.frame == index) {
        html.raw(" <span class=\"good\">an error can be returned here</span>");
    }
    html.raw("<td class=\"n\">").text(own.map(place).unwrap_or_default());
    html.raw("<td>").text(trust(frame.trust)).raw("</tr>");
}

fn source_lines(diagnosis: &Diagnosis, source: &Source, html: &mut Html) {
    let frame = diagnosis.frames.get(source.frame).map(described).unwrap_or_default();
    html.raw(if source.frame == diagnosis.fault_frame {
        "<details open><summary class=\"n\">"
    } else {
        "<details><summary class=\"n\">"
    });
    html.text(format_args!(
        "{}:{}  {}",
        clipped(&source.file, 400),
        source.at,
        clipped(&frame, 400)
    ));
    html.raw("</summary><pre>");
    for (line, number) in source.lines.iter().take(ENTRIES_MAX).zip(source.first..) {
        let hit = number == source.at;
        html.raw(if hit {
            "<span class=\"hit\"><span class=\"ln\">"
        } else {
            "<span class=\"ln\">"
        });
        html.text(number).raw("</span>").text(clipped(line, 400));
        html.raw(if hit { "</span>" } else { "\n" });
    }
    html.raw("</pre></details>");
}

fn held(diagnosis: &Diagnosis, html: &mut Html) {
    if let Some(effects) = &diagnosis.all_effects {
        html.element("h2", "Held from the fault to the outermost frame");
        html.raw("<ul>");
        for line in words::effects(diagnosis, effects).iter().take(ENTRIES_MAX) {
            html.element("li", clipped(line, 1000));
        }
        html.raw("</ul>");
    }
}

fn disassembly(page: &Page<'_>, html: &mut Html) {
    if page.disassembly.is_empty() {
        return;
    }
    html.element("h2", "Instructions around the fault");
    html.raw("<pre>");
    for line in page.disassembly.iter().take(ENTRIES_MAX) {
        html.raw(if line.faulted { "<span class=\"hit\">" } else { "<span>" });
        let at = format!("{:016x}", line.at.0);
        html.text(format_args!("{at}  {:<32} {}", hex(&line.bytes, 15), clipped(&line.text, 200)));
        html.raw(if line.faulted { "</span>" } else { "</span>\n" });
    }
    html.raw("</pre>");
}

fn registers(diagnosis: &Diagnosis, html: &mut Html) {
    let Some(frame) = diagnosis.frames.get(diagnosis.fault_frame) else { return };
    let shown: Vec<String> = Reg::GENERAL
        .iter()
        .chain(&[Reg::Rip, Reg::Rflags])
        .filter_map(|&reg| Some(format!("{:>6} {:016x}", reg.name(), frame.registers.get(reg)?)))
        .collect();
    if shown.is_empty() {
        return;
    }
    html.element("h2", format_args!("Registers in frame {}", diagnosis.fault_frame));
    html.raw("<pre>");
    shown.chunks(3).for_each(|line| {
        html.text(line.join("  ")).raw("\n");
    });
    html.raw("</pre>");
}

fn plan(page: &Page<'_>, html: &mut Html) {
    if !page.plan.is_empty() {
        html.element("h2", "Plan");
        html.raw("<ol>");
        page.plan.iter().take(ENTRIES_MAX).for_each(|step| plan_step(step, html));
        html.raw("</ol>");
    }
    if !page.refusals.is_empty() {
        html.element("h2", "Refused");
        let refusals = page.refusals.iter().take(ENTRIES_MAX);
        list(refusals.map(|(rung, why)| (rung.as_str(), why.as_str())), html);
    }
}

fn plan_step(step: &Step, html: &mut Html) {
    html.raw("<li>").text(clipped(&step.what, 1000));
    html.raw(match step.done {
        Some(true) => " <span class=\"good\">done</span>",
        Some(false) => " <span class=\"bad\">failed</span>",
        None => "",
    });
    html.raw("<br><span class=\"dim\">").text(clipped(&step.why, 1000)).raw("</span>");
    if !step.preconditions.is_empty() {
        html.raw("<ul>");
        for condition in step.preconditions.iter().take(ENTRIES_MAX) {
            html.element("li", clipped(condition, 1000));
        }
        html.raw("</ul>");
    }
    html.raw("</li>");
}

fn writes(page: &Page<'_>, html: &mut Html) {
    if page.writes.is_empty() {
        return;
    }
    html.element("h2", "Written to the guest");
    html.raw("<div class=\"wide\"><table><thead><tr><th>When<th>Address<th>Before and after<th>What</tr></thead>");
    for write in page.writes.iter().take(ENTRIES_MAX) {
        write_row(write, html);
    }
    html.raw("</table></div>");
    if let Some(left) = page.writes.len().checked_sub(ENTRIES_MAX).filter(|&left| left > 0) {
        html.element("p", format_args!("{left} writes more"));
    }
}

fn write_row(write: &Write, html: &mut Html) {
    html.raw("<tr><td>").text(write.when.map(duration).unwrap_or_default());
    html.raw("<td class=\"n\">");
    match write.at {
        Some(at) => html.text(format_args!("{at:#x}")),
        None => html.text(format_args!("physical {:#x}", write.phys)),
    };
    html.raw("<td class=\"n\"><del>").text(hex(&write.old, BYTES_MAX)).raw("</del><br><ins>");
    html.text(hex(&write.new, BYTES_MAX)).raw("</ins><td>").text(clipped(&write.what, 1000));
    html.raw("</tr>");
}

/// Bytes in memory order.
fn hex(bytes: &[u8], max: usize) -> String {
    let mut shown: Vec<String> = bytes.iter().take(max).map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() > max {
        shown.push(format!("… ({} bytes)", bytes.len()));
    }
    shown.join(" ")
}

fn texts(page: &Page<'_>, html: &mut Html) {
    for (title, text) in page.texts.iter().take(ENTRIES_MAX) {
        html.element("h2", clipped(title, 200));
        html.raw("<pre>").text(clipped(text, TEXT_MAX)).raw("</pre>");
    }
}

#[cfg(test)]
#[path = "html_tests.rs"]
mod tests;
