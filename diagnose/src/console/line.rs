//! One line of a log, taken out of what carried it: serial console, dmesg, netconsole, /dev/kmsg, journal,
//! syslog. Says nothing of what the line means.

use std::borrow::Cow;
use std::time::Duration;

use memchr::{memchr, memmem};
use serde::Serialize;

/// Longest line that is looked at, in bytes; the rest of a longer one is cut off. The kernel's own records
/// are at most 1 KiB (LOG_LINE_MAX before v5.10, PRINTKRB_RECORD_MAX since).
const LINE_MAX: usize = 4096;
/// A carrier's prefix is at most this long, in bytes.
const PREFIX_MAX: usize = 160;
/// Prefixes on one line at most: syslog, level, time, caller and the like.
const PREFIXES: usize = 6;

/// Who printed a line (CONFIG_PRINTK_CALLER, since v5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Caller {
    /// A task, by thread id.
    Task(u32),
    /// A CPU in interrupt context, by number.
    Cpu(u32),
}

/// Where a line came from, as far as its prefix tells: lines of one report have the same origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// No prefix of the kernel's: user space on the same console, or a log without time stamps.
    Plain,
    /// The kernel, by its time stamp or by the carrier's word.
    Kernel,
    /// The kernel, and the caller is known.
    Caller(Caller),
}

/// A line without its prefixes.
#[derive(Clone, Debug)]
pub(crate) struct Line<'a> {
    pub(crate) text: Cow<'a, [u8]>,
    pub(crate) origin: Origin,
    /// Time since boot.
    pub(crate) time: Option<Duration>,
    /// Wall-clock time as it stands there.
    pub(crate) wall: Option<&'a [u8]>,
}

/// Takes a line apart. `raw` has no line feed.
pub(crate) fn parse(raw: &[u8]) -> Line<'_> {
    let raw = raw.get(..LINE_MAX).unwrap_or(raw);
    let raw = raw.trim_ascii_end();
    if memchr(0x1b, raw).is_some() {
        return without_escapes(raw);
    }
    let mut rest = trim_returns(raw);
    let mut line = Line { text: Cow::Borrowed(&[]), origin: Origin::Plain, time: None, wall: None };
    for _ in 0..PREFIXES {
        match one_prefix(rest, &mut line) {
            Some(after) => rest = after,
            None => break,
        }
    }
    line.text = Cow::Borrowed(rest);
    line
}

/// The same for a line with ANSI escapes (`dmesg --color=always`, boot loaders): those are taken out first.
/// Wall-clock times of such lines are not kept.
fn without_escapes(raw: &[u8]) -> Line<'static> {
    let mut clean = Vec::with_capacity(raw.len());
    let mut bytes = raw.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != 0x1b {
            clean.push(byte);
            continue;
        }
        if bytes.next_if_eq(&b'[').is_some() {
            // CSI: parameters and intermediates up to a final byte.
            while bytes.next_if(|byte| (0x20..0x40).contains(byte)).is_some() {}
        }
        bytes.next_if(|byte| (0x40..0x7f).contains(byte));
    }
    let line = parse(&clean);
    Line {
        text: Cow::Owned(line.text.into_owned()),
        origin: line.origin,
        time: line.time,
        wall: None,
    }
}

/// A serial console's terminal may put carriage returns before a line, too.
fn trim_returns(raw: &[u8]) -> &[u8] {
    let start = raw.iter().position(|byte| *byte != b'\r' && *byte != 0).unwrap_or(raw.len());
    raw.get(start..).unwrap_or_default()
}

/// Takes one prefix off, `None` when there is none.
fn one_prefix<'a>(text: &'a [u8], line: &mut Line<'a>) -> Option<&'a [u8]> {
    match *text.first()? {
        b'<' => level(text),
        b'[' => bracket(text, line),
        b'*' => dropped(text),
        b'0'..=b'9' => record(text, line).or_else(|| carrier(text, line)),
        b'A'..=b'Z' | b'a'..=b'z' if line.origin == Origin::Plain => {
            facility(text).or_else(|| carrier(text, line)).or_else(|| login(text))
        }
        _ => None,
    }
}

/// `<6>`
fn level(text: &[u8]) -> Option<&[u8]> {
    let end = memchr(b'>', text.get(..8).unwrap_or(text))?;
    let digits = text.get(1..end)?;
    let known = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    known.then(|| text.get(end + 1..)).flatten()
}

/// `** 12 printk messages dropped ** ` (kernel/printk/printk.c).
fn dropped(text: &[u8]) -> Option<&[u8]> {
    let rest = text.strip_prefix(b"** ")?;
    let end = memmem::find(rest, b" printk messages dropped ** ")?;
    rest.get(end + b" printk messages dropped ** ".len()..)
}

/// `[   12.345678] `, `[ T12] `, `[    C0] `, `[Sun Nov 22 16:28:14 2026] `, `[Nov22 16:28] `, `[  +0.000012] `.
fn bracket<'a>(text: &'a [u8], line: &mut Line<'a>) -> Option<&'a [u8]> {
    let end = memchr(b']', text.get(..40).unwrap_or(text))?;
    let inner = text.get(1..end)?.trim_ascii();
    let after = text.get(end + 1..)?;
    // Between time and caller there is no space, after the last there is one.
    let after_space = after.strip_prefix(b" ").unwrap_or(after);
    let ends = after.is_empty() || after.starts_with(b" ") || after.starts_with(b"[");
    if !ends {
        return None;
    }
    if let Some(caller) = caller(inner).filter(|_| line.time.is_some()) {
        line.origin = Origin::Caller(caller);
        return Some(after_space);
    }
    if line.time.is_none()
        && let Some(time) = seconds(inner)
    {
        line.time = Some(time);
        if line.origin == Origin::Plain {
            line.origin = Origin::Kernel;
        }
        // A journal's monotonic time is followed by `host kernel: `.
        let host = carried(after_space.get(..PREFIX_MAX).unwrap_or(after_space));
        return Some(host.and_then(|at| after_space.get(at..)).unwrap_or(after_space));
    }
    let relative = inner.first() == Some(&b'+') && seconds(inner.get(1..)?).is_some();
    if relative || dmesg_date(inner) {
        line.origin = Origin::Kernel;
        if !relative {
            line.wall = Some(inner);
        }
        return Some(after_space);
    }
    None
}

/// `T123` or `C0`
fn caller(inner: &[u8]) -> Option<Caller> {
    let number = decimal(inner.get(1..)?).and_then(|number| u32::try_from(number).ok())?;
    match inner.first()? {
        b'T' => Some(Caller::Task(number)),
        b'C' => Some(Caller::Cpu(number)),
        _ => None,
    }
}

/// `12.345678`
fn seconds(text: &[u8]) -> Option<Duration> {
    let dot = memchr(b'.', text)?;
    let whole = decimal(text.get(..dot)?)?;
    let fraction = text.get(dot + 1..)?;
    if fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let scale = 10_u64.checked_pow(9 - u32::try_from(fraction.len()).ok()?)?;
    Some(
        Duration::from_secs(whole).saturating_add(Duration::from_nanos(decimal(fraction)? * scale)),
    )
}

/// A decimal number of at most 18 digits, and nothing else.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 18 {
        return None;
    }
    text.iter().try_fold(0_u64, |value, byte| {
        byte.is_ascii_digit().then(|| value * 10 + u64::from(byte - b'0'))
    })
}

const MONTHS: [&[u8; 3]; 12] = [
    b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec",
];

fn is_month(text: &[u8]) -> bool {
    text.get(..3).is_some_and(|word| MONTHS.iter().any(|month| month.as_slice() == word))
}

/// `Sun Nov 22 16:28:14 2026` (dmesg -T) or `Nov22 16:28` (dmesg -e).
fn dmesg_date(inner: &[u8]) -> bool {
    is_month(inner) || (inner.len() > 19 && inner.get(4..).is_some_and(is_month))
}

/// `kern  :warn  : ` (dmesg -x).
fn facility(text: &[u8]) -> Option<&[u8]> {
    let rest = text.strip_prefix(b"kern")?;
    let colon = memchr(b':', rest.get(..6).unwrap_or(rest))?;
    let rest = rest.get(colon + 1..)?;
    let colon = memchr(b':', rest.get(..8).unwrap_or(rest))?;
    let level = rest.get(..colon)?.trim_ascii_end();
    let known = [&b"emerg"[..], b"alert", b"crit", b"err", b"warn", b"notice", b"info", b"debug"];
    known.contains(&level).then(|| rest.get(colon + 1..)?.strip_prefix(b" ")).flatten()
}

/// `6,416,1799876,-,caller=T1;`: netconsole's extended format and /dev/kmsg
/// (Documentation/ABI/testing/dev-kmsg).
fn record<'a>(text: &'a [u8], line: &mut Line<'a>) -> Option<&'a [u8]> {
    let end = memchr(b';', text.get(..PREFIX_MAX).unwrap_or(text))?;
    let mut fields = text.get(..end)?.split(|byte| *byte == b',');
    decimal(fields.next()?)?;
    decimal(fields.next()?)?;
    let micros = decimal(fields.next()?)?;
    fields.next().filter(|flags| flags.len() == 1)?;
    line.time = Some(Duration::from_micros(micros));
    line.origin = Origin::Kernel;
    let named = fields.find_map(|field| caller(field.strip_prefix(b"caller=")?));
    if let Some(caller) = named {
        line.origin = Origin::Caller(caller);
    }
    text.get(end + 1..)
}

/// `Nov 22 16:28:14 host kernel: `, `2026-11-22T16:28:14.123456+00:00 host kernel: `, the same without
/// host and program (`dmesg --time-format iso`).
fn carrier<'a>(text: &'a [u8], line: &mut Line<'a>) -> Option<&'a [u8]> {
    let words = if is_month(text) { 3 } else { 1 };
    if words == 1 && !iso_date(text) {
        return None;
    }
    let head = text.get(..PREFIX_MAX).unwrap_or(text);
    let mut at = 0;
    for _ in 0..words {
        let skipped = head.get(at..)?.iter().take_while(|byte| **byte == b' ').count();
        at += skipped + memchr(b' ', head.get(at + skipped..)?)?;
    }
    line.wall = text.get(..at);
    let rest = text.get(at + 1..)?;
    match carried(rest.get(..PREFIX_MAX).unwrap_or(rest)) {
        Some(after) => {
            line.origin = Origin::Kernel;
            rest.get(after..)
        }
        // dmesg's ISO time has a comma before the microseconds.
        None if words == 1 && memchr(b',', text.get(..at)?).is_some() => {
            line.origin = Origin::Kernel;
            Some(rest)
        }
        None => None,
    }
}

fn iso_date(text: &[u8]) -> bool {
    let shape = b"0000-00-00T00:00:00";
    text.len() > shape.len()
        && text.iter().zip(shape).all(|(byte, like)| match like {
            b'0' => byte.is_ascii_digit(),
            b'T' => *byte == b'T' || *byte == b' ',
            _ => byte == like,
        })
}

/// Where the message starts in `host kernel: message`.
fn carried(rest: &[u8]) -> Option<usize> {
    let end = memmem::find(rest, b"kernel: ")?;
    let host = rest.get(..end)?;
    // At most the host before it, with one space.
    let spaces = host.iter().filter(|byte| **byte == b' ').count();
    let fits = end == 0 || (spaces == 1 && host.ends_with(b" "));
    fits.then_some(end + b"kernel: ".len())
}

/// The kernel prints over the prompt of a serial getty: `host login: [   12.345678] `.
fn login(text: &[u8]) -> Option<&[u8]> {
    let head = text.get(..PREFIX_MAX).unwrap_or(text);
    let end = memmem::find(head, b" login: ")? + b" login: ".len();
    text.get(end..).filter(|rest| matches!(rest.first(), Some(b'[' | b'<')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: Origin = Origin::Caller(Caller::Task(123));

    fn of(raw: &str) -> (String, Origin, Option<u64>) {
        let line = parse(raw.as_bytes());
        let text = String::from_utf8_lossy(&line.text).into_owned();
        (text, line.origin, line.time.map(|time| u64::try_from(time.as_micros()).unwrap()))
    }

    fn check(raw: &str, origin: Origin, micros: Option<u64>) {
        assert_eq!(of(raw), ("BUG: x".to_owned(), origin, micros), "{raw}");
    }

    #[test]
    fn carriers() {
        let kernel = Origin::Kernel;
        check("BUG: x", Origin::Plain, None);
        check("BUG: x\r", Origin::Plain, None);
        check("[   12.345678] BUG: x", kernel, Some(12_345_678));
        check("<4>[   12.345678] BUG: x", kernel, Some(12_345_678));
        check("[   12.345678][  T123] BUG: x", TASK, Some(12_345_678));
        check("[   12.345678] [ T123] BUG: x", TASK, Some(12_345_678));
        check("[ 1.000001][    C1] BUG: x\r", Origin::Caller(Caller::Cpu(1)), Some(1_000_001));
        check("** 12 printk messages dropped ** [ 1.000001] BUG: x", kernel, Some(1_000_001));
        check("host login: [    1.000001][ T123] BUG: x", TASK, Some(1_000_001));
        check("4,416,1000001,-;BUG: x", kernel, Some(1_000_001));
        check("4,416,1000001,-,caller=T123;BUG: x", TASK, Some(1_000_001));
        check("Nov 22 16:28:14 host kernel: BUG: x", kernel, None);
        check("Nov  2 16:28:14 host kernel: [    1.000001] BUG: x", kernel, Some(1_000_001));
        check("2026-11-22T16:28:14.123456+00:00 host kernel: BUG: x", kernel, None);
        check("2026-11-22T16:28:14,123456+00:00 BUG: x", kernel, None);
        check("[    1.000001] host kernel: BUG: x", kernel, Some(1_000_001));
        check("[Sun Nov 22 16:28:14 2026] BUG: x", kernel, None);
        check("[Nov22 16:28] BUG: x", kernel, None);
        check("[  +0.000012] BUG: x", kernel, None);
        check("kern  :warn  : [    1.000001] BUG: x", kernel, Some(1_000_001));
        check("\x1b[32m[    1.000001] \x1b[0m\x1b[31mBUG: x\x1b[0m", kernel, Some(1_000_001));
    }

    #[test]
    fn what_is_no_prefix_stays() {
        for raw in
            ["[drm] BUG", "<TASK>", "[<ffffffff81000000>] f+0x1/0x2", "1,2;x", "May be BUG: x"]
        {
            assert_eq!(of(raw).0, raw);
        }
        // The time of the record, not that in the message.
        assert_eq!(of("[ 1.000000] [ 2.000000] x").0, "[ 2.000000] x");
    }

    #[test]
    fn wall_clock_times_are_kept_as_they_stand() {
        let line = parse(b"Nov 22 16:28:14 host kernel: x");
        assert_eq!(line.wall, Some(&b"Nov 22 16:28:14"[..]));
        let line = parse(b"[Sun Nov 22 16:28:14 2026] x");
        assert_eq!(line.wall, Some(&b"Sun Nov 22 16:28:14 2026"[..]));
    }
}
