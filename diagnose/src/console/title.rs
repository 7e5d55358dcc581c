//! The text of a title: the rule's words with the function filled in, and everything taken out that differs
//! from one crash to the next. Not which function.

use memchr::memmem;

use super::body::Entry;
use super::rule::{Rule, Word};

/// Longest title in bytes: lines that were mixed can be very long.
const TITLE_MAX: usize = 120;
/// What stands for a function that could not be found, as the dashboards have it.
const NO_FUNCTION: &str = "corrupted";

/// A title; `None` when the words that it needs are missing.
pub(crate) fn of(rule: &Rule, lines: &[Entry<'_>], function: Option<&str>) -> Option<String> {
    let head = lines.first().map(|entry| &*entry.text).unwrap_or_default();
    let mut title = rule.title.replace("{f}", function.unwrap_or(NO_FUNCTION));
    if rule.title.contains("{1}") {
        title = title.replace("{1}", &word(rule.word, head, lines)?);
    }
    Some(stable(&title))
}

/// The title of a report that no rule knows: its first line from these words on.
pub(crate) fn raw(words: &str, head: &[u8]) -> String {
    let at = memmem::find(head, words.as_bytes()).unwrap_or_default();
    stable(&String::from_utf8_lossy(head.get(at..).unwrap_or_default()))
}

fn word(word: Word, head: &[u8], lines: &[Entry<'_>]) -> Option<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match word {
        Word::None => None,
        Word::RestAfter(words) => after(head, words).map(text),
        Word::Between(first, second) => {
            let rest = after(head, first)?;
            let end = memmem::find(rest, second.as_bytes())?;
            rest.get(..end).map(text)
        }
        Word::OneOf(words) => {
            let stands = |word: &&&str| memmem::find(head, word.as_bytes()).is_some();
            words.iter().find(stands).map(|word| (*word).to_owned())
        }
        Word::Access => {
            let kind = after(head, "KASAN: ")?;
            let end =
                kind.iter().take_while(|byte| byte.is_ascii_lowercase() || **byte == b'-').count();
            Some(format!("{} {}", text(kind.get(..end)?), access(lines)?))
        }
    }
}

fn after<'a>(text: &'a [u8], words: &str) -> Option<&'a [u8]> {
    let at = memmem::find(text, words.as_bytes())?;
    text.get(at + words.len()..)
}

/// `Read of size 8 at addr …`, `Write at addr …` (software and hardware tags).
fn access(lines: &[Entry<'_>]) -> Option<&'static str> {
    lines.iter().skip(1).find_map(|entry| {
        [
            ("Read of size ", "Read"),
            ("Write of size ", "Write"),
            ("Read at addr ", "Read"),
            ("Write at addr ", "Write"),
        ]
        .into_iter()
        .find(|(words, _)| memmem::find(&entry.text, words.as_bytes()).is_some())
        .map(|(_, name)| name)
    })
}

/// Whether another line's time stamp stands in it: `[   12.345678]`.
pub(crate) fn is_broken(title: &str) -> bool {
    title.match_indices('[').any(|(open, _)| {
        let inner = title.get(open + 1..).unwrap_or_default().trim_start_matches(' ');
        let Some((stamp, _)) = inner.split_once(']') else { return false };
        let Some((whole, fraction)) = stamp.split_once('.') else { return false };
        let digits =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits(whole) && digits(fraction)
    })
}

/// Without what differs from one crash to the next: addresses, offsets, line numbers, numbers.
pub(crate) fn stable(title: &str) -> String {
    let plain = printable(title);
    let mut out = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    // A broken title is kept as it is: its stamps show that it is.
    while !rest.is_empty() && !is_broken(&plain) {
        rest = token(rest, &mut out);
    }
    let out = if is_broken(&plain) { plain } else { out };
    out.get(..TITLE_MAX).unwrap_or(&out).trim().to_owned()
}

/// Writes what stands for the next token, and returns what follows it. A name is one token, so that the
/// digits in it stay.
fn token<'a>(text: &'a str, out: &mut String) -> &'a str {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (name, after) = text.split_at(text.find(|c| !is_part(c)).unwrap_or(text.len()));
    if name.is_empty() {
        if let Some((extension, after)) = line_number(text) {
            out.push_str(extension);
            out.push_str(":LINE");
            return after;
        }
        let mut chars = text.chars();
        out.extend(chars.next());
        return chars.as_str();
    }
    if let Some(after) = offset(after) {
        out.push_str(name);
        return after;
    }
    let hex = name.strip_prefix("0x").unwrap_or(name);
    if hex.len() >= 6 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        out.push_str("ADDR");
    } else if let Some(after) = network_address(text) {
        out.push_str("IP");
        return after;
    } else if name.bytes().all(|byte| byte.is_ascii_digit()) && !out.is_empty() {
        out.push_str("NUM");
    } else {
        out.push_str(name);
    }
    after
}

/// `.c:12`, `.c:12:3`: the extension and what follows.
fn line_number(text: &str) -> Option<(&str, &str)> {
    let name = text.strip_prefix('.')?;
    let end = name.find(|c: char| !c.is_ascii_alphanumeric())?;
    let (extension, mut rest) = text.split_at_checked(end + 1)?;
    let mut found = false;
    while let Some(digits) =
        rest.strip_prefix(':').filter(|it| it.starts_with(|c: char| c.is_ascii_digit()))
    {
        rest = digits.trim_start_matches(|c: char| c.is_ascii_digit());
        found = true;
    }
    (found && end > 0).then_some((extension, rest))
}

/// `+0x1/0x2` and what follows.
fn offset(text: &str) -> Option<&str> {
    let rest = text.strip_prefix("+0x")?;
    let rest = rest.trim_start_matches(|c: char| c.is_ascii_hexdigit());
    let rest = rest.strip_prefix("/0x")?;
    Some(rest.trim_start_matches(|c: char| c.is_ascii_hexdigit()))
}

/// `10.0.0.1` and what follows.
fn network_address(text: &str) -> Option<&str> {
    let mut rest = text;
    for part in 0..4 {
        if part > 0 {
            rest = rest.strip_prefix('.')?;
        }
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        rest = rest.get(digits..).filter(|_| (1..=3).contains(&digits))?;
    }
    Some(rest)
}

/// Printable ASCII with single spaces.
fn printable(title: &str) -> String {
    let mut out = String::with_capacity(title.len());
    for c in title.chars().map(|c| if c == '\t' { ' ' } else { c }) {
        let doubled = c == ' ' && out.ends_with(' ');
        if (' '..='~').contains(&c) && !doubled {
            out.push(c);
        }
    }
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_taken_out() {
        for (title, stable_title) in [
            ("kernel panic: at ffffffff81000000 x", "kernel panic: at ADDR x"),
            ("BUG: f+0x1/0x2 in g.c:12:3", "BUG: f in g.c:LINE"),
            ("x 12 (34) of ipv4 10.0.0.1", "x NUM (NUM) of ipv4 IP"),
            ("KCSAN: data-race in a / b2", "KCSAN: data-race in a / b2"),
            ("a \u{7}\tb", "a b"),
        ] {
            assert_eq!(stable(title), stable_title);
        }
        assert_eq!(stable(&"x ".repeat(200)).len(), TITLE_MAX - 1);
    }

    #[test]
    fn time_stamps_break_a_title() {
        assert!(is_broken("BUG: unable to [   12.345678] x"));
        assert!(!is_broken("BUG: Dentry [unmount of 1.2]"));
    }
}
