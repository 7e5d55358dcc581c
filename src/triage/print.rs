//! Buckets as text for people, JSON for scripts (docs/triage.md) and a page. Concludes nothing.

use std::fmt::Write;
use std::time::SystemTime;

use diagnose::report::{Page, Verdict, html as page_html};
use diagnose::triage::Bucket;
use humantime::format_rfc3339_seconds;
use serde_json::{Value, json};

use super::Summary;

/// Unreadable inputs that are named in texts for people.
const NAMED_MAX: usize = 20;

pub fn text(summary: &Summary) -> String {
    let mut out = String::new();
    for bucket in &summary.buckets {
        let _ = writeln!(out, "{:>6}  {}", bucket.count, bucket.title);
        for (name, value) in facts(bucket) {
            let _ = writeln!(out, "        {name:<10} {value}");
        }
    }
    let _ = writeln!(out, "{}", totals(summary));
    for (path, why) in summary.unreadable.iter().take(NAMED_MAX) {
        let _ = writeln!(out, "  unreadable: {}: {why}", path.display());
    }
    if let Some(more) = summary.unreadable.len().checked_sub(NAMED_MAX).filter(|&more| more > 0) {
        let _ = writeln!(out, "  unreadable: {more} more");
    }
    out
}

pub fn json(summary: &Summary) -> String {
    let unreadable: Vec<Value> = summary
        .unreadable
        .iter()
        .map(|(path, why)| json!({ "path": path.display().to_string(), "reason": why }))
        .collect();
    let buckets: Vec<Value> = summary.buckets.iter().map(bucket_json).collect();
    let whole = json!({
        "schema": 1, "inputs": summary.inputs, "quiet": summary.quiet,
        "buckets": buckets, "unreadable": unreadable,
    });
    format!("{whole:#}\n")
}

fn bucket_json(bucket: &Bucket) -> Value {
    json!({
        "signature": bucket.signature, "title": bucket.title, "count": bucket.count,
        "first_seen": bucket.first_seen.map(time), "last_seen": bucket.last_seen.map(time),
        "offender": bucket.offender, "releases": bucket.releases, "example": bucket.example,
    })
}

pub fn html(summary: &Summary) -> String {
    let mut page = Page::new("Triage of crashes", Verdict::Diagnosed);
    page.summary = totals(summary);
    for bucket in &summary.buckets {
        let lines = facts(bucket).map(|(name, value)| format!("{name:<10} {value}\n"));
        page.texts.push((format!("{} × {}", bucket.count, bucket.title), lines.collect()));
    }
    let unreadable = summary.unreadable.iter();
    let lines: String =
        unreadable.map(|(path, why)| format!("{}: {why}\n", path.display())).collect();
    if !lines.is_empty() {
        page.texts.push(("Unreadable".to_owned(), lines));
    }
    page_html(&page)
}

fn facts(bucket: &Bucket) -> impl Iterator<Item = (&'static str, String)> {
    let seen = match (bucket.first_seen, bucket.last_seen) {
        (Some(first), Some(last)) if first != last => {
            Some(format!("{} to {}", time(first), time(last)))
        }
        (Some(one), _) | (_, Some(one)) => Some(time(one)),
        (None, None) => None,
    };
    let releases: Vec<&str> = bucket.releases.iter().map(String::as_str).collect();
    [
        ("offender", bucket.offender.clone()),
        ("kernels", (!releases.is_empty()).then(|| releases.join(", "))),
        ("seen", seen),
        ("example", Some(bucket.example.clone())),
        ("signature", Some(bucket.signature.clone())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
}

fn totals(summary: &Summary) -> String {
    let crashes: u64 = summary.buckets.iter().map(|bucket| bucket.count).sum();
    format!(
        "{crashes} crashes in {} buckets; {} inputs: {} tell of no crash, {} can't be read",
        summary.buckets.len(),
        summary.inputs,
        summary.quiet,
        summary.unreadable.len()
    )
}

fn time(at: SystemTime) -> String {
    format_rfc3339_seconds(at).to_string()
}
