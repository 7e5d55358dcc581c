//! Where in a log reports begin and end, and which lines are whose. One pass, linear; lines are borrowed, and
//! only those of the few reports that are open are kept. Not what the lines of a report say.

use std::collections::VecDeque;
use std::time::Duration;

use memchr::memmem::Finder;
use memchr::{memchr, memchr_iter, memmem, memrchr};

use super::blame;
use super::body::{self, Corruption, Entry};
use super::heads::HEADS;
use super::line::{self, Caller, Line, Origin};
use super::report::Report;
use super::rule::{Head, Pick, Place, Rule, in_order};
use super::{bucket, facts, guilty, title};

/// Lines of one report at most.
const LINES_MAX: usize = 1500;
/// Reports that are open at the same time, at most: CPUs that crash together.
const OPEN_MAX: usize = 8;
/// Reports of one log at most.
const REPORTS_MAX: usize = 4096;
/// Lines after the end mark that still belong to a report: x86 repeats the registers there.
const AFTER_END: usize = 30;
/// With this many lines, the panic that `panic_on_warn` brings adds nothing but its own stack.
const ENOUGH_LINES: usize = 22;
/// KMSAN's reports are shorter.
const ENOUGH_LINES_KMSAN: usize = 16;

/// The reports of a log, in the order in which they begin.
#[derive(Debug)]
pub struct Reports<'a> {
    bytes: &'a [u8],
    /// Offset of the next line.
    at: usize,
    /// Its number, from 1.
    number: usize,
    heads: Vec<Next>,
    banner: Next,
    release: Option<String>,
    open: VecDeque<Open<'a>>,
    /// Reports so far.
    count: usize,
}

/// Where some words stand next in the log.
#[derive(Debug)]
struct Next {
    finder: Finder<'static>,
    at: Option<usize>,
}

impl Next {
    fn new(words: &'static str, bytes: &[u8]) -> Self {
        let finder = Finder::new(words);
        let at = finder.find(bytes);
        Next { finder, at }
    }

    /// Moves on to the first place at or after `from`.
    fn advance(&mut self, bytes: &[u8], from: usize) {
        if self.at.is_some_and(|at| at < from) {
            let rest = bytes.get(from..).unwrap_or_default();
            self.at = self.finder.find(rest).map(|at| at + from);
        }
    }
}

/// A report whose end has not come.
#[derive(Debug)]
struct Open<'a> {
    head: &'static Head,
    rule: Option<&'static Rule>,
    origin: Origin,
    lines: Vec<Entry<'a>>,
    first_line: usize,
    time: Option<Duration>,
    wall: Option<String>,
    release: Option<String>,
    follower: bool,
    /// Its first line came while another report of the same origin had no stack yet.
    interrupts: bool,
    /// Lines since the end mark.
    ended: Option<usize>,
    /// Stacks of all CPUs follow, from other origins.
    all_cpus: bool,
    /// What follows is the panic's own.
    cut: bool,
    panic: Option<String>,
    closed: bool,
}

impl<'a> Reports<'a> {
    /// Starts at the beginning of a log.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Reports {
            bytes,
            at: 0,
            number: 1,
            heads: HEADS.iter().map(|head| Next::new(head.words, bytes)).collect(),
            banner: Next::new("Linux version ", bytes),
            release: None,
            open: VecDeque::new(),
            count: 0,
        }
    }

    /// Goes over lines that cannot matter: those before the next head, while no report is open.
    fn skip(&mut self) {
        let next = self.heads.iter().filter_map(|head| head.at).chain(self.banner.at).min();
        let to = next.unwrap_or(self.bytes.len());
        let skipped = self.bytes.get(self.at..to).unwrap_or_default();
        // Only whole lines.
        if let Some(end) = memrchr(b'\n', skipped) {
            let lines = skipped.get(..=end).unwrap_or_default();
            self.number += memchr_iter(b'\n', lines).count();
            self.at += end + 1;
        }
    }

    /// Reads one line; `false` at the end.
    fn step(&mut self) -> bool {
        if self.open.is_empty() {
            self.skip();
        }
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        if rest.is_empty() {
            return false;
        }
        let end = memchr(b'\n', rest).unwrap_or(rest.len());
        let raw = rest.get(..end).unwrap_or_default();
        let start = self.at;
        let number = self.number;
        self.at = start.saturating_add(end).saturating_add(1).min(self.bytes.len());
        self.number += 1;
        let head = self.head(start, start + end, raw);
        self.read_banner(start, start + end, raw);
        if head.is_some() || !self.open.is_empty() {
            self.line(line::parse(raw), head, number);
        }
        true
    }

    /// The head that the line has, if it begins a report or goes on with one.
    fn head(&mut self, start: usize, end: usize, raw: &[u8]) -> Option<&'static Head> {
        let mut found = None;
        for (next, head) in self.heads.iter_mut().zip(HEADS) {
            next.advance(self.bytes, start);
            let here = next.at.is_some_and(|at| at < end);
            if here && found.is_none() && !head.not.iter().any(|words| in_order(raw, words)) {
                found = Some(head);
            }
        }
        found
    }

    fn read_banner(&mut self, start: usize, end: usize, raw: &[u8]) {
        self.banner.advance(self.bytes, start);
        if self.banner.at.is_some_and(|at| at < end) {
            self.release = facts::banner(raw).or(self.release.take());
            // Each boot is a log of its own.
            self.open.iter_mut().for_each(|open| open.closed = true);
        }
    }

    fn line(&mut self, line: Line<'a>, head: Option<&'static Head>, number: usize) {
        match head {
            Some(head) if !self.goes_on(head, &line) => self.begin(head, line, number),
            _ => self.add(&line),
        }
    }

    /// Whether a head belongs to a report that has begun.
    fn goes_on(&self, head: &Head, line: &Line<'_>) -> bool {
        let mut same = self.open.iter().filter(|open| !open.closed && open.origin == line.origin);
        let unfinished = same.any(|open| open.ended.is_none());
        head.goes_on && (unfinished || (self.count > 0 && is_consequence(&line.text)))
    }

    fn begin(&mut self, head: &'static Head, line: Line<'a>, number: usize) {
        let follower = self.count > 0;
        let mut interrupts = false;
        for open in self.open.iter_mut().filter(|open| open.origin == line.origin && !open.closed) {
            interrupts |= open.ended.is_none() && !open.has_stack();
            open.closed = true;
        }
        if self.open.iter().filter(|open| !open.closed).count() >= OPEN_MAX
            && let Some(first) = self.open.iter_mut().find(|open| !open.closed)
        {
            first.closed = true;
        }
        self.count += 1;
        let wall = line.wall.map(|wall| String::from_utf8_lossy(wall).into_owned());
        self.open.push_back(Open {
            head,
            rule: head.rule(&line.text),
            origin: line.origin,
            first_line: number,
            time: line.time,
            wall,
            release: self.release.clone(),
            follower,
            interrupts,
            ended: None,
            all_cpus: false,
            cut: false,
            panic: panic_text(&line.text),
            closed: false,
            lines: vec![Entry::new(line.text)],
        });
    }

    /// Gives a line to the reports that it belongs to.
    fn add(&mut self, line: &Line<'a>) {
        for open in self.open.iter_mut().filter(|open| !open.closed) {
            let mine = open.origin == line.origin;
            let other_cpu = open.all_cpus && matches!(line.origin, Origin::Caller(Caller::Cpu(_)));
            if mine || other_cpu {
                open.add(line);
            }
        }
    }
}

impl<'a> Iterator for Reports<'a> {
    type Item = Report;

    fn next(&mut self) -> Option<Report> {
        loop {
            if self.open.front().is_some_and(|open| open.closed)
                && let Some(open) = self.open.pop_front()
            {
                if let Some(report) = open.finish() {
                    return Some(report);
                }
                continue;
            }
            let more = self.count < REPORTS_MAX && self.step();
            if !more {
                match self.open.is_empty() {
                    true => return None,
                    false => self.open.iter_mut().for_each(|open| open.closed = true),
                }
            }
        }
    }
}

impl<'a> Open<'a> {
    fn add(&mut self, line: &Line<'a>) {
        let text = &line.text;
        if let Some(lines) = &mut self.ended {
            *lines += 1;
            self.closed = *lines >= AFTER_END;
        }
        if text.starts_with(b"---[ end ") {
            self.ended.get_or_insert(0);
        }
        if self.panic.is_none() {
            self.panic = panic_text(text);
        }
        if !self.keeps(text) {
            return;
        }
        self.lines.push(Entry::new(text.clone()));
        if self.lines.len() >= LINES_MAX {
            self.closed = true;
        }
    }

    /// Whether a line of the report's origin says something about it.
    fn keeps(&mut self, text: &[u8]) -> bool {
        let has = |words: &str| memmem::find(text, words.as_bytes()).is_some();
        if has("Disabling lock debugging due to kernel taint") {
            return false;
        }
        if has("Sending NMI from CPU") {
            self.all_cpus = true;
        }
        let enough = if self.head.words == "BUG:" && self.has_kmsan() {
            ENOUGH_LINES_KMSAN
        } else {
            ENOUGH_LINES
        };
        if self.lines.len() >= enough && has("Kernel panic - not syncing") {
            self.cut = true;
        }
        !self.cut
    }

    fn has_kmsan(&self) -> bool {
        self.lines.first().is_some_and(|entry| memmem::find(&entry.text, b"BUG: KMSAN:").is_some())
    }

    fn has_stack(&self) -> bool {
        self.lines.iter().any(|entry| entry.frame().is_some())
    }

    /// The report, `None` when it was none.
    fn finish(self) -> Option<Report> {
        let known: Vec<Entry<'a>> =
            self.lines.iter().filter(|entry| !is_stale(entry)).cloned().collect();
        let rule = self.rule;
        let damaged = body::stacks(&known);
        if rule.is_none() && self.head.common && damaged.is_some() {
            return None;
        }
        let found = rule.map(|rule| blame::function(rule, &known)).unwrap_or_default();
        let blamed = found.blamed.as_ref();
        let head = known.first().map(|entry| &*entry.text).unwrap_or_default();
        let title =
            rule.and_then(|rule| title::of(rule, &known, blamed.map(|it| it.function.as_str())));
        let incomplete = rule.is_some() && title.is_none();
        let title = title.unwrap_or_else(|| title::raw(self.raw_words(), head));
        let frames = bucket::frames(&self.lines);
        let of_head = rule.and_then(|rule| (rule.class)());
        let mut class = bucket::class(of_head, &known, &frames);
        if class.is_none() && self.panic.is_some() {
            // panic_on_warn, or a sanitizer told to panic: a dump's class is that of the panic.
            class = Some(crate::CrashClass::Panic);
        }
        let facts = facts::of(&known);
        let corrupted = self.corruption(&title, incomplete, &found, damaged, &facts.cpus);
        Some(Report {
            function: found.blamed.as_ref().map(|it| it.function.clone()),
            module: found.blamed.and_then(|it| it.module),
            file: guilty::file(&title, &known),
            signature: bucket::signature(class.as_ref(), &frames),
            title,
            class,
            follower: self.follower,
            corrupted,
            frames,
            panic: self.panic,
            uptime: self.time,
            wall_clock: self.wall,
            caller: match self.origin {
                Origin::Caller(caller) => Some(caller),
                Origin::Plain | Origin::Kernel => None,
            },
            cpu: facts.cpu,
            pid: facts.pid,
            comm: facts.comm,
            taint: facts.taint,
            release: facts.release.or(self.release),
            hardware: facts.hardware,
            modules: facts.modules,
            registers: facts.registers,
            code: facts.code,
            first_line: self.first_line,
            lines: self.lines.len(),
        })
    }

    fn raw_words(&self) -> &'static str {
        match self.rule {
            // What the dashboards say of a sanitizer's report without its details.
            Some(rule) if rule.words.first() == Some(&"BUG: KASAN: ") => "KASAN: ",
            _ => self.head.words,
        }
    }

    fn corruption(
        &self,
        title: &str,
        incomplete: bool,
        found: &blame::Found,
        damaged: Option<Corruption>,
        cpus: &[u32],
    ) -> Option<Corruption> {
        if title::is_broken(title) {
            return Some(Corruption::TitleBroken);
        }
        let rule = self.rule?;
        if incomplete {
            return Some(Corruption::BodyMissing);
        }
        if rule.lost_head {
            return Some(Corruption::HeadMissing);
        }
        if self.interrupts || found.mixed {
            return Some(Corruption::Interleaved);
        }
        let nameless = rule.title.contains("{f}") && found.blamed.is_none();
        if let Some(damaged) = damaged.filter(|_| rule.stack) {
            return Some(damaged);
        }
        if nameless {
            return Some(Corruption::NoFunction);
        }
        if found.elsewhere {
            return Some(Corruption::NoPointer);
        }
        // Stalls show other CPUs; others come from one.
        let one_cpu = rule.pick == Pick::First && !matches!(rule.place, Place::Interrupted);
        let mixed = one_cpu && !self.all_cpus && cpus.len() > 1;
        mixed.then_some(Corruption::Interleaved)
    }
}

/// A frame that was not found by unwinding: not looked at for blame.
fn is_stale(entry: &Entry<'_>) -> bool {
    memmem::find(&entry.text, b"? ").is_some() && entry.frame().is_some_and(|frame| !frame.trusted)
        || entry.text.ends_with(b"(unreliable)")
}

/// The text of a panic.
fn panic_text(text: &[u8]) -> Option<String> {
    let words = b"Kernel panic - not syncing: ";
    let at = memmem::find(text, words)?;
    let rest = text.get(at + words.len()..)?;
    Some(String::from_utf8_lossy(rest).trim().to_owned())
}

/// Whether a panic is the end of something that was reported before.
fn is_consequence(text: &[u8]) -> bool {
    const ENDS: [&str; 8] = [
        "Fatal exception",
        "panic_on_warn set",
        "hung_task: blocked tasks",
        "softlockup: hung tasks",
        "Hard LOCKUP",
        "RCU Stall",
        "Aiee, killing interrupt handler",
        "Attempted to kill",
    ];
    let panic = memmem::find(text, b"Kernel panic - not syncing").is_some();
    panic && ENDS.iter().any(|words| memmem::find(text, words.as_bytes()).is_some())
}
