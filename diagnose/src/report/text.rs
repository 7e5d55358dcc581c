//! A diagnosis as text for people: verdict first, then why, then the facts. Layout only; nothing is
//! concluded here.

use guest::Reg;

use super::words::{self, described, end, place, trust, verdict};
use crate::{Boundary, Diagnosis, Frame, FrameEffects};

/// Columns at most.
const WIDTH: usize = 120;
/// Frames shown at each end when there are more than twice as many.
const FRAMES_EACH_END: usize = 24;
/// Where the values of the fact lines start, columns.
const LABEL: usize = 12;

/// The report, lines of at most 120 columns, each ended by a newline.
#[must_use]
pub fn text(diagnosis: &Diagnosis) -> String {
    let mut lines = Lines::default();
    lines.wrapped("", &diagnosis.title);
    lines.wrapped("", &verdict(diagnosis));
    lines.section("Facts");
    facts(diagnosis, &mut lines);
    if !diagnosis.evidence.is_empty() {
        lines.section("Evidence");
        for line in &diagnosis.evidence {
            lines.wrapped("  - ", line);
        }
    }
    explanation(diagnosis, &mut lines);
    lines.section("Frames, innermost first (> faulted, < an error can be returned to)");
    frames(diagnosis, &mut lines);
    if let Some(boundary) = &diagnosis.boundary {
        returns(diagnosis, boundary, &mut lines);
    }
    if let Some(effects) = &diagnosis.all_effects {
        lines.section("Held from the fault to the outermost frame");
        held(diagnosis, effects, &mut lines);
    }
    registers(diagnosis, &mut lines);
    lines.0
}

/// Text under construction.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn section(&mut self, title: &str) {
        self.0.push('\n');
        self.plain(title);
    }

    /// One line, cut at the width.
    fn plain(&mut self, line: &str) {
        let line = line.trim_end();
        if line.chars().count() > WIDTH {
            self.0.extend(line.chars().take(WIDTH - 3));
            self.0.push_str("...");
        } else {
            self.0.push_str(line);
        }
        self.0.push('\n');
    }

    /// Words after a prefix, further lines indented by the prefix's width.
    fn wrapped(&mut self, prefix: &str, text: &str) {
        let indent = " ".repeat(prefix.chars().count());
        let mut line = prefix.to_owned();
        let mut empty = true;
        for word in text.split_whitespace() {
            let needed = line.chars().count() + usize::from(!empty) + word.chars().count();
            if !empty && needed > WIDTH {
                self.plain(&line);
                line.clone_from(&indent);
                empty = true;
            }
            if !empty {
                line.push(' ');
            }
            line.push_str(word);
            empty = false;
        }
        self.plain(&line);
    }

    fn fact(&mut self, label: &str, value: &str) {
        self.wrapped(&format!("  {label:<LABEL$}"), value);
    }
}

fn facts(diagnosis: &Diagnosis, lines: &mut Lines) {
    for (label, value) in words::facts(diagnosis) {
        lines.fact(label, &value);
    }
}

fn explanation(diagnosis: &Diagnosis, lines: &mut Lines) {
    let Some(explanation) = &diagnosis.explanation else { return };
    lines.section("Explanation");
    lines.wrapped("  ", &explanation.sentence);
    lines.fact("instruction", &explanation.instruction);
    for (register, value) in &explanation.operands {
        lines.fact(register, value);
    }
    if let Some(accessed) = explanation.accessed {
        lines.fact("accessed", &format!("{accessed:#x}"));
    }
    if let Some(expression) = &explanation.expression {
        lines.fact("expression", expression);
    }
}

fn frames(diagnosis: &Diagnosis, lines: &mut Lines) {
    let count = diagnosis.frames.len();
    for (index, frame) in diagnosis.frames.iter().enumerate() {
        let middle = FRAMES_EACH_END..count.saturating_sub(FRAMES_EACH_END);
        if middle.contains(&index) && index != diagnosis.fault_frame {
            if index == middle.start {
                lines.plain(&format!("     ... {} frames ...", middle.len()));
            }
            continue;
        }
        frame_lines(diagnosis, index, frame, lines);
    }
    lines.plain(&format!("     {}", end(&diagnosis.unwind_end)));
}

fn frame_lines(diagnosis: &Diagnosis, index: usize, frame: &Frame, lines: &mut Lines) {
    let mark = match (index == diagnosis.fault_frame, &diagnosis.boundary) {
        (true, _) => '>',
        (false, Some(boundary)) if boundary.frame == index => '<',
        _ => ' ',
    };
    // Inlined levels first: they are further in than the function that they were inlined into.
    let (inlined, own) = match frame.source.split_last() {
        Some((own, inlined)) => (inlined, Some(own)),
        None => (&[][..], None),
    };
    for level in inlined {
        let name = level.function.as_deref().unwrap_or("?");
        lines.plain(&columns("", &format!("  {name} (inlined)"), "", &place(level)));
    }
    let number = format!("{mark}{index:>3}");
    let source = own.map(place).unwrap_or_default();
    lines.plain(&columns(&number, &described(frame), trust(frame.trust), &source));
}

fn columns(number: &str, function: &str, trust: &str, place: &str) -> String {
    format!("{number:<5}{function:<52} {trust:<10} {place}")
}

fn returns(diagnosis: &Diagnosis, boundary: &Boundary, lines: &mut Lines) {
    lines.section("An error can be returned");
    let entry = diagnosis.frames.get(boundary.entry).map(described).unwrap_or_default();
    let said = format!(
        "from frame {} ({}) to frame {} ({}); given up on the way:",
        boundary.entry, entry, boundary.frame, boundary.function
    );
    lines.wrapped("  ", &said);
    held(diagnosis, &boundary.effects, lines);
}

fn held(diagnosis: &Diagnosis, effects: &FrameEffects, lines: &mut Lines) {
    for line in words::effects(diagnosis, effects) {
        lines.plain(&format!("  {line}"));
    }
}

/// Registers of the fault, four a line.
fn registers(diagnosis: &Diagnosis, lines: &mut Lines) {
    let Some(frame) = diagnosis.frames.get(diagnosis.fault_frame) else { return };
    lines.section(&format!("Registers in frame {}", diagnosis.fault_frame));
    let shown: Vec<String> = Reg::GENERAL
        .iter()
        .chain(&[Reg::Rip, Reg::Rflags])
        .filter_map(|&reg| Some(format!("{:>6} {:016x}", reg.name(), frame.registers.get(reg)?)))
        .collect();
    for line in shown.chunks(4) {
        lines.plain(&format!("  {}", line.join("  ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{diagnosis, frame, golden};

    #[test]
    fn the_report_of_a_driver() {
        golden("driver.txt", &text(&diagnosis()));
    }

    #[test]
    fn the_json_of_a_driver() {
        let json = serde_json::to_string_pretty(&diagnosis()).unwrap();
        golden("driver.json", &(json + "\n"));
    }

    #[test]
    fn no_line_is_wider_than_a_terminal() {
        let mut long = diagnosis();
        long.evidence.push("word ".repeat(100));
        long.message = Some("x".repeat(500));
        long.frames.extend((0..200).map(|_| frame(&"f".repeat(300), Some("m"))));
        let report = text(&long);
        assert!(report.lines().all(|line| line.chars().count() <= WIDTH));
        assert!(report.contains("... 156 frames ..."));
        assert!(!report.lines().any(|line| line.ends_with(' ')));
    }

    #[test]
    fn nothing_known_is_said_in_words() {
        let mut empty = diagnosis();
        (empty.offender, empty.explanation, empty.boundary) = (None, None, None);
        (empty.task, empty.all_effects, empty.frames) = (None, None, Vec::new());
        assert!(text(&empty).contains("could not be determined"));
    }
}
