//! What a machine was doing as titled texts, for a terminal and for a page alike. Layout only.

use std::fmt::Write;

use repair_image::SourceFrame;

use super::words;
use crate::state::{
    Backtrace, Blocked, Content, Cpu, Doing, FrameVariables, KernelLog, Lock, LockKind, Memory,
    ModuleInfo, Pending, PendingKind, Place, Section, State, Value, Waiting, Who,
};
use crate::tasks::TaskPosition;

/// Columns at most.
const WIDTH: usize = 120;
/// Frames of one backtrace that are shown.
const FRAMES_SHOWN: usize = 32;
/// Tasks that are shown.
const TASKS_SHOWN: usize = 2000;
/// Numbers from this on may be sets of bits.
const BITS_FROM: u64 = 4096;
/// `PAGE_SIZE` of x86, in KiB.
const PAGE_KIB: u64 = 4;

/// Which frames are shown with their variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variables {
    /// Those of the crash: what is read first, in a terminal, must not drown in the rest.
    OfTheCrash,
    /// All.
    OfAll,
}

/// The state in parts: title and text, no line wider than 120 columns.
#[must_use]
pub fn sections(state: &State, shown: Variables) -> Vec<(String, String)> {
    let modules = section("Modules", Some(&state.modules), |modules| modules_text(modules));
    let cpus = match state.cpus.as_slice() {
        [] => ("CPUs".to_owned(), "  unknown: no registers are in the dump\n".to_owned()),
        all => ("CPUs".to_owned(), all.iter().map(|it| cpu(it, shown)).collect()),
    };
    vec![
        of("Parameters and variables of the frames", &state.variables, |it| variables(it)),
        cpus,
        of("Blocked tasks", &state.waiting, |it| waiting(it, shown)),
        of("Locks that blocked tasks wait for", &state.waiting, locks),
        of("Pending calls into the driver", &state.pending, |it| pending(it)),
        of("Memory", &state.memory, memory),
        modules,
        of("Tasks", &state.tasks, |it| tasks(it)),
        of("Kernel log, its end", &state.log, log),
    ]
}

fn of<T>(title: &str, part: &Section<T>, text: impl Fn(&T) -> String) -> (String, String) {
    match part {
        Section::Known(part) => section(title, Some(part), text),
        Section::Unknown(why) => (title.to_owned(), cut(&format!("  unknown: {why}"))),
    }
}

fn section<T>(title: &str, part: Option<&T>, text: impl Fn(&T) -> String) -> (String, String) {
    let text = part.map(text).unwrap_or_default();
    let text = if text.is_empty() { "  none\n".to_owned() } else { text };
    (title.to_owned(), text.lines().map(cut).collect())
}

/// A line of at most 120 columns, with its end.
fn cut(line: &str) -> String {
    let line = line.trim_end();
    if line.chars().count() <= WIDTH {
        return format!("{line}\n");
    }
    let start: String = line.chars().take(WIDTH - 3).collect();
    format!("{start}...\n")
}

fn cpu(cpu: &Cpu, shown: Variables) -> String {
    let number = cpu.cpu.map_or_else(|| "?".to_owned(), |number| number.to_string());
    let task = match &cpu.task {
        Section::Known(task) => format!("{} (pid {})", task.comm, task.pid),
        Section::Unknown(why) => why.clone(),
    };
    let doing = match cpu.doing {
        Doing::Crashed => "crashed",
        Doing::Idle => "idle",
        Doing::UserMode => "user mode",
        Doing::Kernel => "in the kernel",
        Doing::Unknown => "unknown",
    };
    let mut out = cut(&format!("  CPU {number} (vCPU {}): {doing}, {task}", cpu.vcpu));
    out.push_str(&match (&cpu.backtrace, cpu.doing) {
        (_, Doing::Crashed) => "      its frames are those of the crash\n".to_owned(),
        (part, _) => backtrace(part, shown),
    });
    out
}

fn backtrace(part: &Section<Backtrace>, shown: Variables) -> String {
    let trace = match part {
        Section::Known(trace) => trace,
        Section::Unknown(why) => return cut(&format!("      frames unknown: {why}")),
    };
    let with_variables = |place: &Place| match shown {
        Variables::OfTheCrash => frame(place),
        Variables::OfAll => frame(place) + &values(&place.variables, 10),
    };
    let mut out: String = trace.frames.iter().take(FRAMES_SHOWN).map(with_variables).collect();
    if let Some(more) = trace.frames.len().checked_sub(FRAMES_SHOWN).filter(|&more| more > 0) {
        let _ = writeln!(out, "      ... {more} frames more ...");
    }
    out.push_str(&cut(&format!("      {}", words::end(&trace.end))));
    if let (Variables::OfAll, Some(why)) = (shown, &trace.left_out) {
        out.push_str(&cut(&format!("      variables: {why}")));
    }
    out
}

fn frame(place: &Place) -> String {
    let (inlined, own) = match place.source.split_last() {
        Some((own, inlined)) => (inlined, Some(own)),
        None => (&[][..], None),
    };
    let level = |level: &SourceFrame| {
        let name = level.function.as_deref().unwrap_or("?");
        cut(&format!("      {:<52} {}", format!("  {name} (inlined)"), words::place(level)))
    };
    let mut out: String = inlined.iter().map(level).collect();
    let name = match (&place.function, place.offset) {
        (Some(name), Some(offset)) => format!("{name}+{offset:#x}"),
        (Some(name), None) => name.clone(),
        (None, _) => format!("{:#x}", place.pc),
    };
    let module = place.module.as_ref().map(|module| format!(" [{module}]")).unwrap_or_default();
    let source = own.map(words::place).unwrap_or_default();
    out.push_str(&cut(&format!("      {:<52} {source}", name + &module)));
    out
}

fn variables(frames: &[FrameVariables]) -> String {
    let one = |frame: &FrameVariables| {
        let name = frame.function.as_ref().map(|name| format!(", {name}")).unwrap_or_default();
        format!("  frame {}{name}\n{}", frame.frame, values(&frame.variables, 6))
    };
    frames.iter().map(one).collect()
}

/// One line for each that is known, and one for the names of all others.
fn values(variables: &[Value], indent: usize) -> String {
    let mut out = String::new();
    let mut inlined = None;
    for variable in variables {
        let value = match (&variable.value, variable.at) {
            (Some(value), _) => told(value),
            (None, Some(at)) => format!("at {at:#x}"),
            (None, None) => continue,
        };
        let text = variable.text.as_ref().map(|text| format!(" \"{text}\"")).unwrap_or_default();
        if inlined != variable.inlined.as_deref() {
            inlined = variable.inlined.as_deref();
            let scope =
                inlined.map_or("the function itself:".to_owned(), |it| format!("{it} (inlined):"));
            out.push_str(&cut(&format!("{:indent$}{scope}", "")));
        }
        let Value { of, name, .. } = variable;
        out.push_str(&cut(&format!("{:indent$}{of:<28} {name} = {value}{text}", "")));
    }
    let unknown = |variable: &&Value| variable.value.is_none() && variable.at.is_none();
    let mut names: Vec<&str> = Vec::new();
    for variable in variables.iter().filter(unknown) {
        if !names.contains(&variable.name.as_str()) {
            names.push(&variable.name);
        }
    }
    if !names.is_empty() {
        let names = names.join(", ");
        out.push_str(&cut(&format!("{:indent$}overwritten or nowhere: {names}", "")));
    }
    out
}

/// Large numbers are often sets of bits: they are told in both ways.
fn told(value: &Content) -> String {
    match value {
        Content::Unsigned(number) if *number >= BITS_FROM => format!("{number} ({number:#x})"),
        other => other.to_string(),
    }
}

fn who(who: &Who) -> String {
    format!("{} (pid {})", who.comm, who.pid)
}

fn waiting(waiting: &Waiting, shown: Variables) -> String {
    let mut out: String = waiting.blocked.iter().map(|it| blocked(it, shown)).collect();
    if waiting.more > 0 {
        let _ = writeln!(out, "  and {} more", waiting.more);
    }
    for circle in &waiting.deadlocks {
        let names: Vec<String> = circle.iter().chain(circle.first()).map(who).collect();
        let _ = writeln!(out, "  DEADLOCK: {}", names.join(" waits for "));
    }
    out
}

fn blocked(blocked: &Blocked, shown: Variables) -> String {
    let lock = blocked.lock.map(|at| format!(", waits for the lock at {at:#x}"));
    let mut out = format!("  {}{}\n", who(&blocked.task), lock.unwrap_or_default());
    out.push_str(&backtrace(&blocked.backtrace, shown));
    out
}

fn locks(waiting: &Waiting) -> String {
    let line = |lock: &Lock| {
        let kind = match lock.kind {
            LockKind::Mutex => "mutex",
            LockKind::Rwsem => "rwsem",
            LockKind::Semaphore => "semaphore",
        };
        let name = lock.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        let owner = match (&lock.owner, lock.owner_gone, lock.kind) {
            (Some(owner), ..) => format!("held by {}", who(owner)),
            (None, Some(at), _) => {
                format!("held by a task that has ended ({at:#x}): never released")
            }
            (None, None, LockKind::Semaphore) => "a semaphore has no owner".to_owned(),
            (None, None, _) if lock.held_by_readers => "held by readers".to_owned(),
            (None, None, _) => "held by nobody".to_owned(),
        };
        let waiters: Vec<String> = lock.waiters.iter().map(who).collect();
        format!("  {kind}{name} at {:#x}: {owner}; waiting: {}\n", lock.at, waiters.join(", "))
    };
    waiting.locks.iter().map(line).collect()
}

fn pending(calls: &[Pending]) -> String {
    let line = |call: &Pending| {
        let kind = match call.kind {
            PendingKind::Timer => "timer",
            PendingKind::DelayedWork => "delayed work",
            PendingKind::Work => "work",
        };
        let when = call.expires_in.map(|in_| format!(", expires in {in_} jiffies"));
        let when = when.unwrap_or_default();
        format!("  {kind:<12} {}() at {:#x}, CPU {}{when}\n", call.function, call.at, call.cpu)
    };
    calls.iter().map(line).collect()
}

fn memory(memory: &Memory) -> String {
    let lines = [
        ("total", Some(memory.total)),
        ("free", memory.free),
        ("page cache", memory.file),
        ("anonymous", memory.anonymous),
        ("dirty", memory.dirty),
        ("slab, reclaimable", memory.slab_reclaimable),
        ("slab, other", memory.slab_unreclaimable),
    ];
    let line = |(name, pages): (&str, Option<u64>)| {
        let value = pages.map_or_else(
            || "unknown: this kernel does not count it so".to_owned(),
            |pages| format!("{:>12} KiB", pages.saturating_mul(PAGE_KIB)),
        );
        format!("  {name:<18} {value}\n")
    };
    lines.into_iter().map(line).collect()
}

fn modules_text(modules: &[ModuleInfo]) -> String {
    let line = |module: &ModuleInfo| {
        let at = module.at.map(|at| format!("{at:#x}")).unwrap_or_default();
        let taints = match module.taints.as_str() {
            "" => String::new(),
            taints => format!(" ({taints})"),
        };
        format!("  {:<28} {at} {:>9}{taints}\n", module.name, module.size)
    };
    modules.iter().map(line).collect()
}

fn tasks(tasks: &[TaskPosition]) -> String {
    let line = |task: &TaskPosition| {
        let cpu = task.on_cpu.map(|cpu| format!("CPU {cpu}")).unwrap_or_default();
        format!("  {:>7} {:>7}  {} {:<16} {cpu}\n", task.pid, task.tgid, task.letter(), task.comm)
    };
    let mut out: String = tasks.iter().take(TASKS_SHOWN).map(line).collect();
    if let Some(more) = tasks.len().checked_sub(TASKS_SHOWN).filter(|&more| more > 0) {
        let _ = writeln!(out, "  and {more} more");
    }
    out
}

fn log(log: &KernelLog) -> String {
    let mut out = String::new();
    if log.older > 0 {
        let _ = writeln!(out, "  ... {} older records ...", log.older);
    }
    for line in log.text().lines() {
        let _ = writeln!(out, "  {line}");
    }
    if log.unreadable > 0 {
        let _ = writeln!(out, "  {} records are not in the dump", log.unreadable);
    }
    out
}

#[cfg(test)]
mod tests {
    use guest::GuestVirt;

    use super::*;
    use crate::state::Record;

    fn state() -> State {
        State {
            cpus: Vec::new(),
            variables: Section::Unknown("no debug information".to_owned()),
            waiting: Section::Known(Waiting::default()),
            pending: Section::Known(Vec::new()),
            tasks: Section::Known(Vec::new()),
            modules: Vec::new(),
            memory: Section::Unknown("x".repeat(400)),
            log: Section::Known(KernelLog {
                records: vec![Record { at_us: 12_000_345, text: "hello".to_owned() }],
                older: 3,
                unreadable: 0,
            }),
        }
    }

    fn text(state: &State) -> String {
        sections(state, Variables::OfAll)
            .into_iter()
            .map(|(title, text)| title + "\n" + &text)
            .collect()
    }

    #[test]
    fn what_is_not_known_says_why_and_what_is_empty_says_none() {
        let text = text(&state());
        assert!(text.contains("unknown: no debug information"));
        assert!(text.contains("Blocked tasks\n  none\n"));
        assert!(text.contains("CPUs\n  unknown: no registers"));
        assert!(text.contains("[   12.000345] hello"));
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH));
    }

    #[test]
    fn a_deadlock_is_a_closed_sentence() {
        let who = |pid| Who { task: GuestVirt(1), pid, comm: format!("t{pid}") };
        let circle = Waiting { deadlocks: vec![vec![who(3), who(5)]], ..Waiting::default() };
        let said = waiting(&circle, Variables::OfTheCrash);
        assert!(said.contains("t3 (pid 3) waits for t5 (pid 5) waits for t3 (pid 3)"), "{said}");
    }

    #[test]
    fn variables_are_told_by_scope_and_the_lost_ones_by_name() {
        let value = |name: &str, inlined: Option<&str>, value| Value {
            name: name.to_owned(),
            of: "int".to_owned(),
            inlined: inlined.map(str::to_owned),
            at: None,
            value,
            text: None,
            absent: None,
        };
        let said = values(
            &[
                value("a", Some("inner"), Some(Content::Signed(-9))),
                value("b", None, Some(Content::Unsigned(0x1_0000))),
                value("c", None, None),
                value("c", None, None),
            ],
            2,
        );
        let lines: Vec<_> = said.lines().map(str::trim).collect();
        assert_eq!((lines[0], lines[2]), ("inner (inlined):", "the function itself:"), "{said}");
        assert!(
            lines[1].ends_with("a = -9") && lines[3].ends_with("b = 65536 (0x10000)"),
            "{said}"
        );
        assert_eq!(lines[4], "overwritten or nowhere: c");
    }
}
