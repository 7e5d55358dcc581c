//! The timeline of an incident as inline SVG. Positions are of its own making; no text of a guest decides
//! over markup.

use std::time::Duration;

use super::escape::Html;
use super::page::Moment;

/// Moments that are drawn at most.
const MOMENTS_MAX: usize = 40;
const WIDTH: u64 = 720;
/// Height of one moment's row.
const ROW: u64 = 22;
/// Where the bars start and how wide they are, leaving room for labels and times.
const BARS: (u64, u64) = (200, 430);

/// One bar a moment, from the moment before to it, to scale.
pub(super) fn svg(moments: &[Moment], html: &mut Html) {
    let shown: Vec<&Moment> = moments.iter().take(MOMENTS_MAX).collect();
    let Some(end) = shown.iter().map(|moment| moment.at).max() else { return };
    let height = (shown.len() as u64 + 1) * ROW;
    html.raw("<svg role=\"img\" aria-label=\"Timeline\" viewBox=\"0 0 ").text(WIDTH).raw(" ");
    html.text(height).raw("\">");
    let mut before = Duration::ZERO;
    for (moment, row) in shown.into_iter().zip(0_u64..) {
        let (from, to) = (position(before.min(moment.at), end), position(moment.at, end));
        let baseline = row * ROW + 16;
        html.raw("<text x=\"0\" y=\"").text(baseline).raw("\">").text(clipped(&moment.label, 28));
        html.raw("</text><rect x=\"").text(BARS.0 + from).raw("\" y=\"").text(row * ROW + 5);
        html.raw("\" height=\"14\" rx=\"2\" width=\"").text((to - from).max(2));
        html.raw(if moment.standing {
            "\" fill=\"var(--bar)\"/>"
        } else {
            "\" fill=\"var(--run)\"/>"
        });
        html.raw("<text class=\"t\" x=\"").text(BARS.0 + to + 8).raw("\" y=\"").text(baseline);
        html.raw("\">").text(duration(moment.at)).raw("</text>");
        before = moment.at;
    }
    let legend = height - 4;
    html.raw("<text class=\"t\" x=\"").text(BARS.0).raw("\" y=\"").text(legend);
    html.raw(
        "\">blue: the guest stands; green: it runs. Since the stop was reported.</text></svg>",
    );
}

/// Where a moment is, in units of the drawing from the start of the bars.
fn position(at: Duration, end: Duration) -> u64 {
    let share = at.as_secs_f64() / end.as_secs_f64().max(f64::MIN_POSITIVE);
    (share.clamp(0.0, 1.0) * BARS.1 as f64) as u64
}

/// A duration for people.
pub(super) fn duration(duration: Duration) -> String {
    match duration.as_micros() {
        micros @ 0..1_000 => format!("{micros} µs"),
        micros @ 1_000..1_000_000 => format!("{:.2} ms", micros as f64 / 1e3),
        micros => format!("{:.2} s", micros as f64 / 1e6),
    }
}

/// At most `max` characters.
pub(super) fn clipped(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars().take(max.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_to_scale_and_ordered() {
        let end = Duration::from_micros(800);
        assert_eq!(position(Duration::ZERO, end), 0);
        assert_eq!(position(Duration::from_micros(400), end), BARS.1 / 2);
        assert_eq!(position(end * 2, end), BARS.1);
        assert_eq!(position(Duration::ZERO, Duration::ZERO), 0);
        let moment = |at, label: &str| Moment {
            at: Duration::from_micros(at),
            label: label.to_owned(),
            standing: true,
        };
        let mut html = Html::default();
        svg(&[moment(500, "diagnosed"), moment(100, "<late>")], &mut html);
        let svg = html.finish();
        assert!(svg.contains("&lt;late&gt;") && svg.contains("500 µs"), "{svg}");
    }

    #[test]
    fn durations_and_long_labels() {
        assert_eq!(duration(Duration::from_micros(1_500)), "1.50 ms");
        assert_eq!(duration(Duration::from_secs(2)), "2.00 s");
        assert_eq!(clipped("abcdef", 4), "abc…");
    }
}
