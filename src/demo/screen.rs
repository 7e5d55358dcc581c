//! What the demonstration prints: steps, lines and tables, to a terminal or a log alike.

use std::time::{Duration, Instant};

/// Prints steps with their time.
pub struct Screen {
    start: Instant,
    step: u32,
}

impl Screen {
    /// Starts the clock.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now(), step: 0 }
    }

    /// The headline.
    pub fn title(&self, text: &str) {
        println!("{text}\n{}", "=".repeat(text.chars().count()));
    }

    /// A new step.
    pub fn step(&mut self, text: &str) {
        self.step += 1;
        println!("\n[{:>5.1} s] {}. {text}", self.start.elapsed().as_secs_f64(), self.step);
    }

    /// A line that belongs to the step.
    pub fn say(&self, text: &str) {
        for line in text.lines() {
            println!("            {line}");
        }
    }

    /// A table, columns as wide as their widest cell.
    pub fn table(&self, heads: &[&str], rows: &[Vec<String>]) {
        let width = |column: usize| {
            let cells =
                rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
            cells.chain([heads[column].chars().count()]).max().unwrap_or(0)
        };
        let line = |cells: Vec<&str>| {
            let padded: Vec<String> = cells
                .iter()
                .enumerate()
                .map(|(column, cell)| format!("{cell:<width$}", width = width(column)))
                .collect();
            self.say(format!("  {}", padded.join("   ")).trim_end());
        };
        println!();
        line(heads.to_vec());
        for row in rows {
            line(row.iter().map(String::as_str).collect());
        }
        println!();
    }
}

/// `12.3 s`
#[must_use]
pub fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

/// `1.23 ms`
#[must_use]
pub fn milliseconds(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}
