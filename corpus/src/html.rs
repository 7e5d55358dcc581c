//! The building blocks of the corpus' result pages: tables, bars and a histogram as inline SVG, light and dark,
//! with nothing fetched from anywhere and no script. What a page tells is its caller's.

use std::fmt::{Display, Write};
use std::time::Duration;

/// Rows of one table that are shown at most.
const ROWS_MAX: usize = 5000;
/// Characters of one text that are shown at most.
const TEXT_MAX: usize = 2000;
/// Width of the drawings, in their own units.
const WIDTH: f64 = 760.0;
const STYLE: &str = include_str!("html.css");
/// Should escaping ever fail, the page itself forbids what could come of it.
const POLICY: &str = "<meta http-equiv=\"Content-Security-Policy\" \
    content=\"default-src 'none'; style-src 'unsafe-inline'\">";

/// What a number or a cell says of its matter; gives it its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it should be.
    Good,
    /// At a price.
    Warn,
    /// Not as it should be.
    Bad,
    /// Neither.
    Plain,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
            Self::Plain => "dim",
        }
    }
}

/// One bar: its label, and its parts with the word for each.
pub(crate) struct Bar {
    /// What stands before it.
    pub(crate) label: String,
    /// Tone, word and size of each part.
    pub(crate) parts: Vec<(Tone, &'static str, usize)>,
}

/// A page under construction.
pub(crate) struct Page(String);

impl Page {
    /// A page with its head.
    pub(crate) fn new(title: &str) -> Self {
        let mut page =
            Self("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">".into());
        page.0.push_str(POLICY);
        page.0.push_str(
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>",
        );
        page.text(title);
        page.0.push_str("</title><style>");
        page.0.push_str(STYLE);
        page.0.push_str("</style></head><body><main><h1>");
        page.text(title);
        page.0.push_str("</h1>");
        page
    }

    /// Text, whoever wrote it.
    fn text(&mut self, text: impl Display) {
        let text = text.to_string();
        for c in text.chars().take(TEXT_MAX) {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                '\n' => self.0.push(c),
                c if c.is_control() => self.0.push('\u{fffd}'),
                '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                    self.0.push('\u{fffd}');
                }
                c => self.0.push(c),
            }
        }
    }

    /// A paragraph.
    pub(crate) fn paragraph(&mut self, text: impl Display) -> &mut Self {
        self.0.push_str("<p>");
        self.text(text);
        self.0.push_str("</p>");
        self
    }

    /// A heading.
    pub(crate) fn heading(&mut self, text: &str) -> &mut Self {
        self.0.push_str("<h2>");
        self.text(text);
        self.0.push_str("</h2>");
        self
    }

    /// A table; the cells are text.
    pub(crate) fn table(&mut self, head: &[&str], rows: &[Vec<(Tone, String)>]) -> &mut Self {
        self.0.push_str("<div class=\"wide\"><table><thead><tr>");
        for name in head {
            self.0.push_str("<th>");
            self.text(name);
        }
        self.0.push_str("</tr></thead>");
        for row in rows.iter().take(ROWS_MAX) {
            self.0.push_str("<tr>");
            for (tone, cell) in row {
                match tone {
                    Tone::Plain => self.0.push_str("<td>"),
                    tone => self.0.push_str(&format!("<td class=\"{}\">", tone.class())),
                }
                self.text(cell);
            }
            self.0.push_str("</tr>");
        }
        self.0.push_str("</table></div>");
        if rows.len() > ROWS_MAX {
            self.paragraph(format_args!("{} rows more", rows.len() - ROWS_MAX));
        }
        self
    }

    /// Bars of parts, one below the other; all are to the scale of the longest.
    pub(crate) fn bars(&mut self, bars: &[Bar]) -> &mut Self {
        let total = |bar: &Bar| bar.parts.iter().map(|part| part.2).sum::<usize>();
        let longest = bars.iter().map(total).max().unwrap_or(0).max(1);
        let (left, row) = (220.0, 24.0);
        let height = row * bars.len() as f64 + 4.0;
        self.open_svg(height);
        for (index, bar) in bars.iter().enumerate() {
            let y = row * index as f64;
            self.label(left - 8.0, y + 16.0, "end", &bar.label);
            let mut x = left;
            for (tone, word, size) in &bar.parts {
                let width = (WIDTH - left - 40.0) * *size as f64 / longest as f64;
                if *size == 0 {
                    continue;
                }
                let class = tone.class();
                let _ = write!(
                    self.0,
                    "<rect class=\"f-{class}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"18\"><title>",
                    y + 3.0
                );
                self.text(format_args!("{}: {size} {word}", bar.label));
                self.0.push_str("</title></rect>");
                x += width;
            }
            self.label(x + 6.0, y + 16.0, "start", &total(bar).to_string());
        }
        self.0.push_str("</svg></div>");
        self.legend(bars);
        self
    }

    fn legend(&mut self, bars: &[Bar]) {
        let mut seen: Vec<(Tone, &'static str)> = Vec::new();
        for (tone, word, size) in bars.iter().flat_map(|bar| &bar.parts) {
            if *size > 0 && !seen.contains(&(*tone, *word)) {
                seen.push((*tone, *word));
            }
        }
        self.0.push_str("<p>");
        for (tone, word) in seen {
            let _ = write!(self.0, "<span class=\"key k-{}\"></span>", tone.class());
            self.text(word);
            self.0.push_str(" &nbsp; ");
        }
        self.0.push_str("</p>");
    }

    /// How times are distributed, on a logarithmic scale.
    pub(crate) fn histogram(&mut self, times: &[Duration]) -> &mut Self {
        let bins = bins(times);
        let most = bins.iter().map(|bin| bin.2).max().unwrap_or(0);
        if most == 0 {
            return self.paragraph("no times were measured");
        }
        let (height, left, bottom) = (220.0, 40.0, 190.0);
        self.open_svg(height);
        let width = (WIDTH - left - 10.0) / bins.len() as f64;
        for (index, (from, to, count)) in bins.iter().enumerate() {
            let x = left + width * index as f64;
            let tall = 160.0 * *count as f64 / most as f64;
            let _ = write!(
                self.0,
                "<rect class=\"f-run\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"><title>{count} from {} to {}</title></rect>",
                x + 1.0,
                bottom - tall,
                (width - 2.0).max(1.0),
                milliseconds(*from),
                milliseconds(*to),
            );
            if *count > 0 {
                self.label(x + width / 2.0, bottom - tall - 5.0, "middle", &count.to_string());
            }
            self.label(x, bottom + 16.0, "middle", &milliseconds(*from));
        }
        self.0.push_str("</svg></div>");
        self
    }

    fn open_svg(&mut self, height: f64) {
        let _ = write!(
            self.0,
            "<div class=\"wide\"><svg role=\"img\" viewBox=\"0 0 {WIDTH} {height}\">"
        );
    }

    fn label(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let _ = write!(self.0, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">");
        self.text(text);
        self.0.push_str("</text>");
    }

    /// The whole page.
    pub(crate) fn finish(mut self) -> String {
        self.0.push_str("</main></body></html>\n");
        self.0
    }
}

/// Bins of a logarithmic scale, three a decade, with how many times fall into each: from the bin of
/// the shortest to that of the longest.
fn bins(times: &[Duration]) -> Vec<(Duration, Duration, usize)> {
    let edge = |step: i32| Duration::from_secs_f64(1e-6 * 10f64.powf(f64::from(step) / 3.0));
    // From a microsecond to a quarter of an hour.
    let all: Vec<_> = (0..27)
        .map(|step| {
            let (from, to) = (edge(step), edge(step + 1));
            (from, to, times.iter().filter(|&&time| from <= time && time < to).count())
        })
        .collect();
    let first = all.iter().position(|bin| bin.2 > 0).unwrap_or(0);
    let last = all.iter().rposition(|bin| bin.2 > 0).unwrap_or(0);
    all.get(first..=last).unwrap_or_default().to_vec()
}

/// A time in milliseconds, as it is printed.
pub(crate) fn milliseconds(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        ms if ms >= 100.0 => format!("{ms:.0} ms"),
        ms if ms >= 10.0 => format!("{ms:.1} ms"),
        ms => format!("{ms:.2} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_guest_is_no_markup() {
        let mut page = Page::new("<b>");
        page.table(&["a"], &[vec![(Tone::Bad, "<script>&\u{202e}".into())]]);
        page.bars(&[Bar { label: "<i>".into(), parts: vec![(Tone::Good, "saved", 2)] }]);
        let html = page.finish();
        assert!(html.contains("&lt;script&gt;&amp;\u{fffd}"), "{html}");
        assert!(!html.contains("<script") && !html.contains("<i>") && !html.contains("<b>"));
        assert!(!html.contains("http://") && !html.contains("https://"));
    }

    #[test]
    fn every_time_is_in_one_bin() {
        let times: Vec<Duration> =
            [900, 1000, 5500, 5600, 80_000].map(Duration::from_micros).into();
        let bins = bins(&times);
        assert_eq!(bins.iter().map(|bin| bin.2).sum::<usize>(), times.len());
        assert!(bins.first().unwrap().2 > 0 && bins.last().unwrap().2 > 0);
    }
}
