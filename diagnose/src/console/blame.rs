//! Which function a report's title names: the frames at the place that its rule gives, less those that are
//! passed over, and one of them. Not the text of the title.

use memchr::memmem;

use super::body::Entry;
use super::frame::{self, Printed};
use super::rule::{Pick, Place, Rule, in_order};
use super::skip;

/// A function that may be to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blamed {
    pub(crate) function: String,
    pub(crate) module: Option<String>,
}

/// What came of the search.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) blamed: Option<Blamed>,
    /// A frame of fault injection stands among those looked at: two stacks are mixed.
    pub(crate) mixed: bool,
    /// The line that should name it is missing; another was taken.
    pub(crate) elsewhere: bool,
}

/// Looks for the function of a report; the first entry is its head.
pub(crate) fn function(rule: &Rule, lines: &[Entry<'_>]) -> Found {
    let mut search = Search { rule, lines, at: 0, frames: Vec::new(), mixed: false };
    let (direct, elsewhere) = search.run();
    let blamed = direct.or_else(|| pick(rule.pick, &search.frames));
    Found { blamed, mixed: search.mixed, elsewhere }
}

struct Search<'l, 'a> {
    rule: &'l Rule,
    lines: &'l [Entry<'a>],
    /// The next line.
    at: usize,
    frames: Vec<Blamed>,
    mixed: bool,
}

impl<'a> Search<'_, 'a> {
    /// Collects frames; some places name the function outright. Also whether the place was missing.
    fn run(&mut self) -> (Option<Blamed>, bool) {
        match self.rule.place {
            Place::Nowhere => {}
            Place::Pointer => self.pointer(),
            Place::PointerThenTrace => {
                if !self.seek_pointer() {
                    self.at = 0;
                    self.trace();
                    return (None, true);
                }
                self.trace();
            }
            Place::Trace => self.trace(),
            Place::Warning => self.warning(),
            Place::After(words) => {
                if self.seek(|text| in_order(text, words)) {
                    self.stack(|_| false);
                }
            }
            Place::Named(words) => {
                self.head(words);
                self.trace();
            }
            Place::NamedThenFrames(words) => {
                self.head(words);
                self.stack(|_| false);
            }
            Place::Frames => self.stack(|text| {
                in_order(text, &["was created at:"])
                    || in_order(text, &["Local variable ", " created at:"])
            }),
            Place::Lock(words) => {
                if self.seek(|text| in_order(text, words)) {
                    self.lock();
                    self.lock();
                    self.stack(|_| false);
                }
            }
            Place::OnlyLock(words) => return (self.only_lock(words), false),
            Place::FirstAddress => {
                self.first_address();
                self.trace();
            }
            Place::LastFunction => return (self.last_function(), false),
            Place::Interrupted => self.interrupted(),
            Place::CorruptedIn => return self.corrupted_in(),
        }
        (None, false)
    }

    fn next(&mut self) -> Option<&Entry<'_>> {
        let entry = self.lines.get(self.at)?;
        self.at += 1;
        Some(entry)
    }

    /// Goes on after the next line that fits; to the end when none does.
    fn seek(&mut self, fits: impl Fn(&[u8]) -> bool) -> bool {
        while let Some(entry) = self.next() {
            if fits(&entry.text) {
                return true;
            }
        }
        false
    }

    /// Adds a function unless it is passed over.
    fn add(&mut self, function: &[u8], module: Option<&[u8]>) {
        let function = frame::base(function);
        let mut own = self.rule.skip.iter();
        if own.any(|name| name.matches(function)) || skip::reason(function).is_some() {
            return;
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.frames.push(Blamed { function: text(syscall(function)), module: module.map(text) });
    }

    fn add_printed(&mut self, printed: &Printed<'_>) {
        let before = self.frames.len();
        self.add(printed.function, printed.module);
        if let Some(from) = printed.from.filter(|_| self.frames.len() == before) {
            self.add(from, printed.module);
        }
    }

    /// Whether one frame is enough.
    fn enough(&self) -> bool {
        self.rule.pick == Pick::First && !self.frames.is_empty()
    }

    /// The line of the instruction pointer.
    fn seek_pointer(&mut self) -> bool {
        let lines = self.lines;
        while let Some(entry) = lines.get(self.at) {
            self.at += 1;
            if let Some(found) = pointer(&entry.text) {
                if let Some(printed) = found {
                    self.add_printed(&printed);
                }
                return true;
            }
        }
        false
    }

    fn pointer(&mut self) {
        self.seek_pointer();
    }

    /// The frames of the next call trace.
    fn trace(&mut self) {
        if !self.enough() && self.seek(is_call_trace) {
            self.stack(|_| false);
        }
    }

    /// Frames up to the start of the next stack, or a line that ends it.
    fn stack(&mut self, ends: impl Fn(&[u8]) -> bool) {
        let lines = self.lines;
        while let Some(entry) = lines.get(self.at) {
            if self.enough() {
                return;
            }
            self.at += 1;
            if entry.starts.is_some() || ends(&entry.text) {
                return;
            }
            let Some(printed) = entry.frame().filter(is_plain) else { continue };
            if frame::base(printed.function).starts_with(b"should_fail") {
                self.mixed = true;
                return;
            }
            self.add_printed(&printed);
        }
    }

    fn warning(&mut self) {
        if self.seek_pointer() {
            self.stack(|_| false);
        }
        if self.frames.is_empty() {
            self.at = 0;
            self.trace();
        }
    }

    /// The function after these words in the head.
    fn head(&mut self, words: &str) {
        let lines = self.lines;
        self.at = 1;
        let Some(entry) = lines.first() else { return };
        let Some(at) = memmem::find(&entry.text, words.as_bytes()) else { return };
        let rest = entry.text.get(at + words.len()..).unwrap_or_default();
        if let Some(printed) = frame::function(rest) {
            self.add(printed.function, printed.module);
        }
    }

    /// The place of the next lock: ` at: f+0x1/0x2`.
    fn next_lock(&mut self) -> Option<Blamed> {
        let lines = self.lines;
        while let Some(entry) = lines.get(self.at) {
            self.at += 1;
            let Some(at) = memmem::find(&entry.text, b"at: ") else { continue };
            let rest = entry.text.get(at + 4..).unwrap_or_default();
            let rest = frame::skip_addresses(rest.trim_ascii_start());
            if let Some(printed) = frame::function(rest) {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let function = text(frame::base(printed.function));
                return Some(Blamed { function, module: printed.module.map(text) });
            }
        }
        None
    }

    fn lock(&mut self) {
        if let Some(found) = self.next_lock() {
            self.add(found.function.as_bytes(), found.module.as_deref().map(str::as_bytes));
        }
    }

    fn only_lock(&mut self, words: &[&str]) -> Option<Blamed> {
        if !self.seek(|text| in_order(text, words)) {
            return None;
        }
        // It may stand in that line itself.
        self.at = self.at.saturating_sub(1);
        self.next_lock()
    }

    fn first_address(&mut self) {
        let lines = self.lines;
        for (index, entry) in lines.iter().enumerate() {
            let Some(open) = memmem::find(&entry.text, b"[<") else { continue };
            let rest = entry.text.get(open..).unwrap_or_default();
            let after = frame::skip_addresses(rest);
            if let Some(printed) = frame::function(after).filter(|_| after.len() < rest.len()) {
                self.add_printed(&printed);
                self.at = index + 1;
                return;
            }
            if is_call_trace(&entry.text) {
                return;
            }
        }
    }

    fn last_function(&mut self) -> Option<Blamed> {
        let words = b"last function: ";
        self.lines.iter().find_map(|entry| {
            let at = memmem::find(&entry.text, words)?;
            let name = entry.text.get(at + words.len()..)?.trim_ascii();
            let end = name
                .iter()
                .take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_')
                .count();
            let function = String::from_utf8_lossy(name.get(..end)?).into_owned();
            (end > 0).then_some(Blamed { function, module: None })
        })
    }

    fn interrupted(&mut self) {
        if self.seek(|text| in_order(text, &["apic_timer_interrupt"])) && self.seek_pointer() {
            self.stack(|_| false);
        }
        if self.frames.is_empty() || pick(self.rule.pick, &self.frames).is_none() {
            self.at = 0;
            self.frames.clear();
            let entries = ["apic_timer_interrupt", "Exception stack", "el1h_64_irq"];
            if self.seek(|text| entries.iter().any(|words| in_order(text, &[words]))) {
                self.stack(|_| false);
            }
        }
    }

    fn corrupted_in(&mut self) -> (Option<Blamed>, bool) {
        self.head("corrupted in: ");
        if self.frames.is_empty() {
            self.trace();
        }
        (None, false)
    }
}

/// A frame that stands alone on its line, with an offset, and was found by unwinding.
fn is_plain(printed: &Printed<'_>) -> bool {
    printed.trusted && !printed.marked && !printed.inline
}

/// Titles name a system call without what entry code and architecture put before it.
fn syscall(function: &[u8]) -> &[u8] {
    const PREFIXES: [&str; 15] = [
        "SYSC_",
        "SyS_",
        "sys_",
        "__x64_",
        "__ia32_",
        "__arm64_",
        "____sys_",
        "___sys_",
        "__sys_",
        "__se_",
        "__se_sys_",
        "__do_sys_",
        "compat_SYSC_",
        "compat_SyS_",
        "ksys_",
    ];
    PREFIXES
        .iter()
        .fold(function, |name, prefix| name.strip_prefix(prefix.as_bytes()).unwrap_or(name))
}

/// Whether a call trace begins after this line.
pub(crate) fn is_call_trace(text: &[u8]) -> bool {
    matches!(stack_start(text), Some(0 | 6)) && text.trim_ascii_end().ends_with(b":")
}

/// Which kind of stack begins after this line, by number below [`STACK_STARTS`].
pub(crate) fn stack_start(text: &[u8]) -> Option<usize> {
    // All of them end in a colon, and frames have none: most lines are done with here.
    if text.len() > 256 || memchr::memchr(b':', text).is_none() {
        return None;
    }
    let has = |words: &str| memmem::find(text, words.as_bytes()).is_some();
    let call = memmem::find(text, b"Call ").and_then(|at| text.get(at + 5..));
    if call.is_some_and(|rest| rest.starts_with(b"Trace") || rest.starts_with(b"trace")) {
        return Some(0);
    }
    if has("Allocated") {
        if has("Allocated:") {
            return Some(1);
        }
        if has("Allocated by task ") {
            return Some(2);
        }
    }
    if has("Freed") {
        if has("Freed:") {
            return Some(3);
        }
        if has("Freed by task ") {
            return Some(4);
        }
    }
    if let Some(at) = memmem::find(text, b" backtrace") {
        let before = at.checked_sub(1).and_then(|at| text.get(at));
        let after = text.get(at + 10..).unwrap_or_default();
        if before.is_some_and(|byte| *byte != b'k')
            && (after.starts_with(b":") || after.starts_with(b" (crc "))
        {
            return Some(5);
        }
    }
    if has("Backtrace:") {
        return Some(6);
    }
    has("Uninit was stored to memory at").then_some(7)
}

/// Kinds of [`stack_start`].
pub(crate) const STACK_STARTS: usize = 8;

/// The line of an instruction pointer: `Some(None)` when it points to no function of the kernel.
pub(crate) fn pointer(text: &[u8]) -> Option<Option<Printed<'_>>> {
    for words in ["IP", "pc ", "PC is at"] {
        let mut from = 0;
        while let Some(at) = text.get(from..).and_then(|rest| memmem::find(rest, words.as_bytes()))
        {
            let rest = text.get(from + at + words.len()..)?;
            if let Some(found) = pointed(rest) {
                return Some(found);
            }
            from += at + words.len();
        }
    }
    None
}

/// What follows the words of an instruction pointer.
fn pointed(rest: &[u8]) -> Option<Option<Printed<'_>>> {
    let rest = rest.strip_prefix(b":").unwrap_or(rest).strip_prefix(b" ")?;
    let selector = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let rest = match rest.get(selector) {
        Some(b':') if selector > 0 => rest.get(selector + 1..)?.trim_ascii_start(),
        _ => rest,
    };
    if rest.starts_with(b"0x") || memmem::find(rest, b"(null)").is_some() {
        return Some(None);
    }
    let after = frame::skip_addresses(rest);
    // powerpc64 puts a dot before names of code.
    let after = after.strip_prefix(b".").unwrap_or(after);
    frame::function(after).filter(|printed| printed.offset.is_some()).map(Some)
}

fn pick(how: Pick, frames: &[Blamed]) -> Option<Blamed> {
    match how {
        Pick::First => frames.first().cloned(),
        Pick::Stall => stall(frames),
        Pick::Hang => hang(frames),
    }
}

/// A loop is caught anywhere inside; what stays the same is how the kernel got there: the function before
/// the first dispatcher.
fn stall(frames: &[Blamed]) -> Option<Blamed> {
    let mut before = frames.first()?;
    for frame in frames {
        if is_dispatcher(frame.function.as_bytes()) {
            if frame.function.contains("smp_call_function") {
                return Some(Blamed { function: "smp_call_function".to_owned(), module: None });
            }
            return Some(before.clone());
        }
        before = frame;
    }
    None
}

/// A hung task is a victim, so waits for RCU and for rtnl are one bucket each; otherwise what it waits in.
fn hang(frames: &[Blamed]) -> Option<Blamed> {
    const RCU: [&str; 4] =
        ["synchronize_rcu", "synchronize_srcu", "synchronize_net", "synchronize_sched"];
    const WAITING: [&str; 12] = [
        "sched",
        "_lock",
        "_slowlock",
        "down",
        "rwsem",
        "completion",
        "kthread",
        "wait",
        "synchronize",
        "context_switch",
        "__switch_to",
        "cancel_delayed_work",
    ];
    for frame in frames {
        if frame.function.contains("rtnl_lock") {
            return Some(frame.clone());
        }
        if RCU.iter().any(|name| frame.function.contains(name)) {
            return Some(Blamed { function: RCU[0].to_owned(), module: None });
        }
    }
    let waits = |function: &str| {
        WAITING.iter().any(|part| function.contains(part)) || function.contains("rcu_barrier")
    };
    frames.iter().find(|frame| !waits(&frame.function)).cloned()
}

/// Functions that hand work to whoever registered for it: entries of system calls, interrupts, threads,
/// files, sockets, page faults.
fn is_dispatcher(function: &[u8]) -> bool {
    const HAS: &[&str] = &[
        "process_one_work",
        "do_syscall_",
        "do_fast_syscall_",
        "sysenter_dispatch",
        "tracesys_phase2",
        "el0_svc_handler",
        "invoke_syscall",
        "ret_fast_syscall",
        "netif_receive_skb",
        "do_softirq",
        "call_timer_fn",
        "_run_timers",
        "run_timer_softirq",
        "hrtimer_run",
        "run_ksoftirqd",
        "smpboot_thread_fn",
        "start_secondary",
        "cpu_startup_entry",
        "ret_from_fork",
        "vfs_write",
        "vfs_read",
        "vfs_iter_read",
        "vfs_iter_write",
        "do_iter_read",
        "do_iter_write",
        "call_read_iter",
        "call_write_iter",
        "new_sync_read",
        "new_sync_write",
        "vfs_ioctl",
        "ksys_ioctl",
        "compat_ioctl",
        "compat_sys_ioctl",
        "blkdev_driver_ioctl",
        "blkdev_ioctl",
        "do_iter_readv_writev",
        "mmap_region",
        "do_mmap",
        "do_dentry_open",
        "vfs_open",
        "kernel_setsockopt",
        "sock_common_setsockopt",
        "kernel_listen",
        "sk_common_release",
        "kernel_accept",
        "__do_fault",
        "do_page_fault",
        "__fput",
        "task_work_run",
        "exit_to_usermode",
        "smp_call_function",
        "tasklet_action",
        "tasklet_hi_action",
    ];
    const STARTS: &[&str] = &[
        "call_mmap",
        "sock_sendmsg",
        "sock_recvmsg",
        "sock_release",
        "__sock_release",
        "sock_mmap",
        "sock_do_ioctl",
        "sock_ioctl",
        "compat_sock_ioctl",
        "nfnetlink_rcv_msg",
        "rtnetlink_rcv_msg",
        "netlink_dump",
        "socketpair",
        "connect",
        "ioctl",
        "sys_socketpair",
        "sys_connect",
        "sys_ioctl",
    ];
    const IS: &[&str] = &["kthread", "setsockopt", "listen", "accept", "page_fault"];
    HAS.iter().any(|part| memmem::find(function, part.as_bytes()).is_some())
        || STARTS.iter().any(|part| function.starts_with(part.as_bytes()))
        || IS.iter().any(|whole| function == whole.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_pointers() {
        let of = |text: &'static str| {
            let found = pointer(text.as_bytes());
            found.map(|printed| printed.map(|it| String::from_utf8_lossy(it.function).into_owned()))
        };
        let f = Some(Some("f".to_owned()));
        for text in [
            "RIP: 0010:f+0x1/0x2 [m]",
            "RIP: 0010:[<ffffffff81000000>]  [<ffffffff81000000>] f+0x1/0x2",
            "IP: f+0x1/0x2",
            "IP: [<ffffffff81000000>] f+0x1/0x2",
            "pc : f+0x1/0x2",
            "PC is at f+0x1/0x2",
            "NIP [c000000000000000] .f+0x1/0x2",
        ] {
            assert_eq!(of(text), f, "{text}");
        }
        assert_eq!(of("RIP: 0033:0x7f0000000000"), Some(None));
        assert_eq!(of("RIP: 0010:0x0"), Some(None));
        assert_eq!(of("IP:           (null)"), Some(None));
        assert_eq!(of("RIPE: f+0x1/0x2"), None);
        assert_eq!(of("an IP address"), None);
    }

    fn frames(names: &[&str]) -> Vec<Blamed> {
        names.iter().map(|name| Blamed { function: (*name).to_owned(), module: None }).collect()
    }

    #[test]
    fn stalls_are_named_after_their_entry() {
        let of = |names: &[&str]| stall(&frames(names)).map(|it| it.function);
        assert_eq!(of(&["a", "b", "vfs_write", "c"]).as_deref(), Some("b"));
        assert_eq!(of(&["vfs_write", "c"]).as_deref(), Some("vfs_write"));
        assert_eq!(of(&["a", "smp_call_function_many"]).as_deref(), Some("smp_call_function"));
        assert_eq!(of(&["a", "b"]), None);
    }

    #[test]
    fn hangs_are_named_after_what_they_wait_in() {
        let of = |names: &[&str]| hang(&frames(names)).map(|it| it.function);
        assert_eq!(of(&["__schedule", "schedule", "io_schedule", "f"]).as_deref(), Some("f"));
        assert_eq!(of(&["schedule", "f", "synchronize_srcu"]).as_deref(), Some("synchronize_rcu"));
        assert_eq!(
            of(&["schedule", "rtnl_lock_killable", "f"]).as_deref(),
            Some("rtnl_lock_killable")
        );
        assert_eq!(of(&["schedule"]), None);
    }

    #[test]
    fn names_of_system_calls() {
        for (from, to) in [
            ("__x64_sys_write", "sys_write"),
            ("__do_sys_bpf", "bpf"),
            ("ksys_read", "read"),
            ("SyS_open", "open"),
        ] {
            assert_eq!(syscall(from.as_bytes()), to.as_bytes());
        }
    }
}
