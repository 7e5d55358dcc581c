//! One line of a stack trace: function, offset, module, source place. Not which frames belong to which report.

use memchr::{memchr, memchr_iter, memmem};
use serde::Serialize;

/// A frame as it was printed, outermost last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// Function with compiler suffixes.
    pub function: String,
    /// Bytes from the function's start.
    pub offset: Option<u64>,
    /// Bytes of the function.
    pub size: Option<u64>,
    /// Module, `None` for the kernel proper.
    pub module: Option<String>,
    /// Source file and line, where the log was symbolised.
    pub source: Option<(String, u32)>,
    /// Whether it was inlined into the next frame.
    pub inline: bool,
    /// `false`: printed with `?`, found on the stack but not by unwinding.
    pub trusted: bool,
}

/// A frame in a line, borrowed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Printed<'a> {
    /// With compiler suffixes.
    pub(crate) function: &'a [u8],
    /// arm prints `(f) from [<pc>] (g+0x1/0x2)`: g.
    pub(crate) from: Option<&'a [u8]>,
    pub(crate) offset: Option<u64>,
    pub(crate) size: Option<u64>,
    pub(crate) module: Option<&'a [u8]>,
    pub(crate) source: Option<(&'a [u8], u32)>,
    pub(crate) inline: bool,
    pub(crate) trusted: bool,
    /// On one line with a mark such as `<IRQ>` (before v4.9).
    pub(crate) marked: bool,
}

impl Printed<'_> {
    pub(crate) fn owned(&self) -> Frame {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Frame {
            function: text(self.function),
            offset: self.offset,
            size: self.size,
            module: self.module.map(text),
            source: self.source.map(|(file, line)| (text(file), line)),
            inline: self.inline,
            trusted: self.trusted,
        }
    }
}

/// A function's name without compiler suffixes, as titles have it: what stands before the first dot.
pub(crate) fn base(function: &[u8]) -> &[u8] {
    let end = memchr(b'.', function.get(1..).unwrap_or_default());
    end.and_then(|end| function.get(..end + 1)).unwrap_or(function)
}

/// A line of a stack trace.
pub(crate) fn parse(text: &[u8]) -> Option<Printed<'_>> {
    let mut rest = text.trim_ascii_start();
    let mut marked = false;
    if rest.first() == Some(&b'<') {
        let end = memchr(b'>', rest.get(..8).unwrap_or(rest))?;
        rest = rest.get(end + 1..)?.trim_ascii_start();
        marked = true;
    }
    rest = skip_addresses(rest);
    let mut trusted = true;
    if let Some(after) = rest.strip_prefix(b"? ") {
        trusted = false;
        rest = after.trim_ascii_start();
    }
    if rest.ends_with(b"(unreliable)") {
        // powerpc
        trusted = false;
    }
    let printed = match rest.strip_prefix(b"(") {
        Some(inner) => arm(inner)?,
        None => function(rest)?,
    };
    Some(Printed { trusted, marked, ..printed })
}

/// Up to two of `[<ffffffff81000000>]`, `[ffffffff81000000]`.
pub(crate) fn skip_addresses(mut rest: &[u8]) -> &[u8] {
    for _ in 0..2 {
        match address(rest) {
            Some(after) => rest = after.trim_ascii_start(),
            None => break,
        }
    }
    rest
}

fn address(text: &[u8]) -> Option<&[u8]> {
    let inner = text.strip_prefix(b"[")?;
    let end = memchr(b']', inner.get(..24).unwrap_or(inner))?;
    let digits = inner.get(..end)?;
    let digits = digits.strip_prefix(b"<").unwrap_or(digits);
    let digits = digits.strip_suffix(b">").unwrap_or(digits);
    let digits = digits.strip_prefix(b"0x").unwrap_or(digits);
    let hex = !digits.is_empty() && digits.iter().all(u8::is_ascii_hexdigit);
    hex.then(|| inner.get(end + 1..)).flatten()
}

/// `f) from [<c0100000>] (g+0x1/0x2)`
fn arm(inner: &[u8]) -> Option<Printed<'_>> {
    let (first, rest) = name(inner)?;
    let rest = rest.strip_prefix(b") from ")?;
    let rest = skip_addresses(rest);
    let second = function(rest.strip_prefix(b"(").unwrap_or(rest))?;
    Some(Printed { function: first, from: Some(second.function), ..second })
}

/// `f+0x1/0x2 [module] file.c:3`, `f file.c:3 [inline]`, `f (file.c:3 (discriminator 1)) module`.
pub(crate) fn function(text: &[u8]) -> Option<Printed<'_>> {
    let (function, rest) = name(text)?;
    let mut printed = Printed { function, trusted: true, ..Printed::default() };
    if let Some(after) = rest.strip_prefix(b"+0x") {
        let (offset, after) = hex(after)?;
        printed.offset = Some(offset);
        let sized = after.strip_prefix(b"/0x").and_then(hex);
        let after = sized.map_or(after, |(_, after)| after);
        printed.size = sized.map(|(size, _)| size);
        printed.module = module(after);
        printed.source = source(after);
        return Some(printed);
    }
    let after = rest.strip_prefix(b" ")?;
    printed.source = source(after);
    printed.source?;
    if after.ends_with(b"[inline]") {
        printed.inline = true;
        return Some(printed);
    }
    // scripts/decode_stacktrace.sh.
    let inner = after.strip_prefix(b"(")?;
    let close = memmem::rfind(inner, b")")?;
    let tail = inner.get(close + 1..)?.trim_ascii();
    printed.module =
        module(tail).or_else(|| name(tail).filter(|(_, rest)| rest.is_empty()).map(|(it, _)| it));
    Some(printed)
}

/// A symbol's name and what follows.
fn name(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.$".contains(byte);
    let end = text.iter().take(512).take_while(|byte| is_part(byte)).count();
    let (name, rest) = text.split_at_checked(end)?;
    let starts = name.first().is_some_and(|byte| !byte.is_ascii_digit() || name.len() > 2);
    (starts && name.iter().any(u8::is_ascii_alphabetic)).then_some((name, rest))
}

/// A hexadecimal number of at most 16 digits and what follows.
pub(crate) fn hex(text: &[u8]) -> Option<(u64, &[u8])> {
    let end = text.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (digits, rest) = text.split_at_checked(end)?;
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    let value = digits.iter().fold(0_u64, |value, byte| {
        value << 4 | u64::from(char::from(*byte).to_digit(16).unwrap_or(0))
    });
    Some((value, rest))
}

/// `[module]`, `[module 1a2b…]` with a build id (CONFIG_STACKTRACE_BUILD_ID, since v5.14).
fn module(text: &[u8]) -> Option<&[u8]> {
    let open = memchr(b'[', text)?;
    let inner = text.get(open + 1..)?;
    let (name, rest) = name(inner)?;
    let ends = matches!(rest.first(), Some(b']' | b' ' | b'('));
    (ends && name != b"inline").then_some(name)
}

/// The first `path/file.c:12` or `file.h:12` of a line.
pub(crate) fn source(text: &[u8]) -> Option<(&[u8], u32)> {
    let in_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-".contains(byte);
    memchr_iter(b':', text).find_map(|colon| {
        let stem = text.get(..colon)?;
        let stem = stem.strip_suffix(b".c").or_else(|| stem.strip_suffix(b".h"))?;
        stem.last().filter(|byte| in_name(byte))?;
        let digits = text.get(colon + 1..)?;
        let count = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let line = super::line::decimal(digits.get(..count)?)?;
        let length =
            stem.iter().rev().take_while(|byte| in_name(byte) || b"./".contains(byte)).count();
        let path = text.get(stem.len() - length..colon)?;
        Some((path, u32::try_from(line).unwrap_or(u32::MAX)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<Frame> {
        parse(text.as_bytes()).map(|frame| frame.owned())
    }

    fn like(function: &str, offset: u64, size: u64) -> Frame {
        let function = function.to_owned();
        let (offset, size) = (Some(offset), Some(size));
        Frame { function, offset, size, module: None, source: None, inline: false, trusted: true }
    }

    #[test]
    fn forms_of_a_frame() {
        let plain = like("vfs_write", 0x1f, 0x3a0);
        assert_eq!(of(" vfs_write+0x1f/0x3a0"), Some(plain.clone()));
        assert_eq!(of(" [<ffffffff81234567>] vfs_write+0x1f/0x3a0"), Some(plain.clone()));
        assert_eq!(
            of(" [<ffffffff81234567>]  [<ffffffff81234567>] vfs_write+0x1f/0x3a0"),
            Some(plain.clone())
        );
        assert_eq!(of(" <IRQ>  [<ffffffff81234567>] vfs_write+0x1f/0x3a0"), Some(plain.clone()));
        let stale = Frame { trusted: false, ..plain.clone() };
        assert_eq!(of(" ? vfs_write+0x1f/0x3a0"), Some(stale.clone()));
        assert_eq!(of(" [<ffffffff81234567>] ? vfs_write+0x1f/0x3a0"), Some(stale));
        let module = Some("m".to_owned());
        let other = Frame { module, ..like("bw.isra.0", 1, 2) };
        assert_eq!(of(" bw.isra.0+0x1/0x2 [m]"), Some(other.clone()));
        assert_eq!(
            of(" bw.isra.0+0x1/0x2 [m 0123456789abcdef0123456789abcdef01234567]"),
            Some(other)
        );
        let source = Some(("fs/read_write.c".to_owned(), 12));
        let symbolised = Frame { source: source.clone(), ..plain.clone() };
        assert_eq!(of(" vfs_write+0x1f/0x3a0 fs/read_write.c:12"), Some(symbolised));
        let inlined = Frame {
            source: source.clone(),
            inline: true,
            offset: None,
            size: None,
            ..plain.clone()
        };
        assert_eq!(of(" vfs_write fs/read_write.c:12 [inline]"), Some(inlined));
        let decoded = Frame { source, offset: None, size: None, ..plain };
        assert_eq!(of("vfs_write (fs/read_write.c:12 (discriminator 1)) "), Some(decoded));
    }

    #[test]
    fn both_names_of_arm() {
        let text = b"[<c0100000>] (dump_stack) from [<c0200000>] (vfs_write+0x1/0x2)";
        let frame = parse(text).unwrap();
        assert_eq!((frame.function, frame.from), (&b"dump_stack"[..], Some(&b"vfs_write"[..])));
    }

    #[test]
    fn other_lines_are_no_frames() {
        for text in [
            "",
            "RIP: 0010:f+0x1/0x2",
            "Code: 00 01",
            " <TASK>",
            "R10: 0+0x1",
            "CPU: 0 PID: 1 Comm: a.b",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }

    #[test]
    fn source_places() {
        assert_eq!(source(b"at ./mm/slub.c:435!"), Some((&b"./mm/slub.c"[..], 435)));
        assert_eq!(source(b"x: y.cc:1 .c:2 a.c:b a-b.h:3"), Some((&b"a-b.h"[..], 3)));
    }
}
