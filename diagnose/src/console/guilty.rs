//! The file that is most likely at fault: the first of a report that is not passed over, or one deeper in the
//! same folder. Needs a log that was symbolised, or a kernel that prints places itself.

use memchr::memmem;

use super::body::Entry;
use super::frame;
use super::skip;

/// The guilty file of a report.
pub(crate) fn file(title: &str, lines: &[Entry<'_>]) -> Option<String> {
    if title.starts_with("INFO: rcu detected stall") {
        // What was interrupted, not the way of the interrupt that noticed.
        for entry in ["apic_timer_interrupt+0x", "el1h_64_irq+0x", "Exception stack"] {
            let at =
                lines.iter().position(|line| memmem::find(&line.text, entry.as_bytes()).is_some());
            let found = at.and_then(|at| of(lines.get(at..)?));
            if found.is_some() {
                return found;
            }
        }
    }
    of(lines)
}

fn of(lines: &[Entry<'_>]) -> Option<String> {
    let mut places = lines.iter().filter_map(|line| {
        let (path, _) = frame::source(&line.text)?;
        Some((clean(path), passed_over(path, &line.text)))
    });
    let mut first = None;
    let mut guilty = loop {
        match places.next() {
            Some((path, false)) => break path,
            // Better a file that is passed over than none.
            Some((path, true)) => first = first.or(Some(path)),
            None => return first,
        }
    };
    let mut folder = parent(&guilty).to_owned();
    for (path, over) in places {
        let below = path.strip_prefix(&folder).and_then(|rest| rest.strip_prefix('/'));
        if !over && below.is_some_and(|rest| rest.contains('/')) {
            folder = parent(&path).to_owned();
            guilty = path;
        }
    }
    Some(guilty)
}

fn passed_over(path: &[u8], line: &[u8]) -> bool {
    let irqs = || {
        let kinds =
            [&b"hardirqs last "[..], b"softirqs last ", b"hardirqs  last ", b"softirqs  last "];
        kinds.iter().any(|words| memmem::find(line, words).is_some())
    };
    skip::file_reason(path).is_some()
        || irqs()
        || (line.starts_with(b"Register r") && memmem::find(line, b" information").is_some())
}

/// The path without `.`, `..` and doubled slashes.
fn clean(path: &[u8]) -> String {
    let path = String::from_utf8_lossy(path);
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let absolute = if path.starts_with('/') { "/" } else { "" };
    format!("{absolute}{}", parts.join("/"))
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn guilty(title: &str, lines: &[&str]) -> Option<String> {
        let entry = |line: &&'static str| Entry::new(Cow::Borrowed(line.as_bytes()));
        // Leaked: a test's strings live anyway.
        let lines: Vec<&'static str> = lines.iter().map(|line| &*line.to_string().leak()).collect();
        file(title, &lines.iter().map(entry).collect::<Vec<_>>())
    }

    #[test]
    fn the_first_that_is_not_passed_over() {
        let found = guilty(
            "x",
            &["a lib/dump_stack.c:88 [inline]", "b ./net/../fs/x.c:1", "c mm/mmap.c:3"],
        );
        assert_eq!(found.as_deref(), Some("fs/x.c"));
        assert_eq!(guilty("x", &["a lib/dump_stack.c:88"]).as_deref(), Some("lib/dump_stack.c"));
        assert_eq!(guilty("x", &["a"]), None);
    }

    #[test]
    fn a_file_deeper_in_the_same_folder_is_better() {
        let found = guilty("x", &["a fs/open.c:1", "b fs/ext4/inode.c:2", "c fs/xfs/x.c:3"]);
        assert_eq!(found.as_deref(), Some("fs/ext4/inode.c"));
        assert_eq!(guilty("x", &["a fs/open.c:1", "b fs/namei.c:2"]).as_deref(), Some("fs/open.c"));
    }

    #[test]
    fn stalls_are_of_what_was_interrupted() {
        let lines = ["a arch/x86/x.c:1", " apic_timer_interrupt+0x1/0x2", "b net/ipv4/tcp.c:2"];
        assert_eq!(
            guilty("INFO: rcu detected stall in f", &lines).as_deref(),
            Some("net/ipv4/tcp.c")
        );
    }
}
