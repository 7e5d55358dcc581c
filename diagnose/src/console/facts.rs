//! What else a report says: CPU, task, kernel, hardware, modules, registers, code. Each is what the log prints,
//! `None` when it does not. Not who is to blame.

use memchr::memmem;

use super::body::Entry;
use super::frame::hex;
use super::line::decimal;

/// Modules and registers of one report at most.
const LIST_MAX: usize = 512;

/// Facts of one report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    pub(crate) cpu: Option<u32>,
    pub(crate) pid: Option<u32>,
    pub(crate) comm: Option<String>,
    pub(crate) taint: Option<String>,
    pub(crate) release: Option<String>,
    pub(crate) hardware: Option<String>,
    pub(crate) modules: Vec<String>,
    pub(crate) registers: Vec<(String, u64)>,
    pub(crate) code: Option<String>,
    pub(crate) panic: Option<String>,
    /// CPUs of all lines that name one and a task, without repetition.
    pub(crate) cpus: Vec<u32>,
    /// After registers of user mode there are no more of the kernel.
    user: bool,
}

/// Reads the facts of a report.
pub(crate) fn of(lines: &[Entry<'_>]) -> Facts {
    let mut facts = Facts::default();
    for entry in lines {
        facts.line(&entry.text);
    }
    facts
}

impl Facts {
    fn line(&mut self, text: &[u8]) {
        // One of these letters starts each line that is wanted; frames start with a space.
        match text.first() {
            Some(b'C') if text.starts_with(b"CPU: ") => self.task(text),
            Some(b'C') if text.starts_with(b"Code: ") && self.code.is_none() && !self.user => {
                self.code = text.get(6..).map(owned);
            }
            Some(b'H') if text.starts_with(b"Hardware name: ") => {
                self.hardware.get_or_insert_with(|| owned(text.get(15..).unwrap_or_default()));
            }
            Some(b'M') if text.starts_with(b"Modules linked in:") => self.modules(text),
            Some(b'I') if text.starts_with(b"INFO: task ") => self.hung(text),
            Some(b'R') if text.starts_with(b"RIP: 0033:") => self.user = true,
            Some(b'K') if self.panic.is_none() => {
                let rest = text.strip_prefix(b"Kernel panic - not syncing: ");
                self.panic = rest.map(owned);
            }
            Some(b'R' | b'C' | b'E' | b'x' | b's' | b'F') if !self.user => self.registers(text),
            Some(b'w') if self.pid.is_none() => self.stuck(text),
            _ => {}
        }
    }

    /// `CPU: 0 UID: 0 PID: 107 Comm: agent Tainted: G           OE      6.1.0-1-amd64 #1  Debian`
    fn task(&mut self, text: &[u8]) {
        let Some(cpu) = number_after(text, b"CPU: ") else { return };
        if number_after(text, b" PID: ").is_none() {
            return;
        }
        if !self.cpus.contains(&cpu) && self.cpus.len() < LIST_MAX {
            self.cpus.push(cpu);
        }
        if self.cpu.is_some() {
            return;
        }
        self.cpu = Some(cpu);
        self.pid = number_after(text, b" PID: ");
        let Some(rest) = after(text, b" Comm: ") else { return };
        let ends = [&b" Not tainted "[..], b" Tainted: ", b" Kdump: ", b" tainted "];
        let end = ends.iter().filter_map(|words| memmem::find(rest, words)).min();
        self.comm = rest.get(..end.unwrap_or(rest.len())).map(owned);
        let Some(rest) = end.and_then(|end| rest.get(end..)) else { return };
        let words = after(rest, b"ainted").unwrap_or_default();
        let words = words.strip_prefix(b":").unwrap_or(words);
        let is_flag = |word: &&[u8]| word.iter().all(u8::is_ascii_uppercase);
        let mut words =
            words.split(|byte| *byte == b' ').filter(|word| !word.is_empty()).peekable();
        let mut taint = String::new();
        while let Some(word) = words.next_if(is_flag) {
            taint.push_str(&owned(word));
        }
        self.taint = (!taint.is_empty()).then_some(taint);
        self.release = words.next().map(owned);
    }

    /// `INFO: task comm:123 blocked for more than …`
    fn hung(&mut self, text: &[u8]) {
        let Some(end) = memmem::find(text, b" blocked for more than") else { return };
        let Some(task) = text.get(b"INFO: task ".len()..end) else { return };
        let Some(colon) = memchr::memrchr(b':', task) else { return };
        let pid = task.get(colon + 1..).and_then(decimal);
        if let (Some(pid), None) = (pid.and_then(|pid| u32::try_from(pid).ok()), self.pid) {
            self.pid = Some(pid);
            self.comm = task.get(..colon).map(owned);
        }
    }

    /// `watchdog: BUG: soft lockup - CPU#1 stuck for 22s! [comm:123]`
    fn stuck(&mut self, text: &[u8]) {
        let Some(rest) = after(text, b"CPU#") else { return };
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.cpu = rest.get(..digits).and_then(decimal).and_then(|cpu| u32::try_from(cpu).ok());
        let Some(task) = after(rest, b"! [").and_then(|task| task.strip_suffix(b"]")) else {
            return;
        };
        let Some(colon) = memchr::memrchr(b':', task) else { return };
        let pid = task.get(colon + 1..).and_then(decimal);
        self.pid = pid.and_then(|pid| u32::try_from(pid).ok());
        self.comm = task.get(..colon).map(owned);
    }

    /// `Modules linked in: a(OE) b [last unloaded: c]`
    fn modules(&mut self, text: &[u8]) {
        if !self.modules.is_empty() {
            return;
        }
        let list = text.get(b"Modules linked in:".len()..).unwrap_or_default();
        let list = list.split(|byte| *byte == b'[').next().unwrap_or_default();
        let names = list.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        let names = names.map(|word| word.split(|byte| *byte == b'(').next().unwrap_or_default());
        self.modules = names.take(LIST_MAX).map(owned).collect();
    }

    /// `RAX: 0000000000000000 RBX: …`, `RSP: 0018:ffffd250803dbaa8 EFLAGS: 00000246`, `x1 : …`. The first of
    /// each counts.
    fn registers(&mut self, text: &[u8]) {
        let mut rest = text;
        while let Some(colon) = memchr::memchr(b':', rest) {
            let name = rest.get(..colon).unwrap_or_default().trim_ascii();
            let name = name.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
            let value = rest.get(colon + 1..).unwrap_or_default().trim_ascii_start();
            let Some((number, after)) = hex(value) else { return };
            // Segment and offset.
            let number = match after.strip_prefix(b":").and_then(hex) {
                Some((offset, after)) if value.starts_with(b"00") => {
                    rest = after;
                    offset
                }
                _ => {
                    rest = after;
                    number
                }
            };
            if !is_register(name) || self.registers.len() >= LIST_MAX {
                return;
            }
            let name = owned(name);
            if !self.registers.iter().any(|(known, _)| *known == name) {
                self.registers.push((name, number));
            }
        }
    }
}

fn is_register(name: &[u8]) -> bool {
    matches!(name, [b'R', _, _] | [b'C', b'R', _] | [b'x', _] | [b'x', _, _] | b"EFLAGS" | b"sp")
}

fn owned(text: &[u8]) -> String {
    String::from_utf8_lossy(text).trim().to_owned()
}

fn after<'a>(text: &'a [u8], words: &[u8]) -> Option<&'a [u8]> {
    let at = memmem::find(text, words)?;
    text.get(at + words.len()..)
}

fn number_after(text: &[u8], words: &[u8]) -> Option<u32> {
    let rest = after(text, words)?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    decimal(rest.get(..digits)?).and_then(|number| u32::try_from(number).ok())
}

/// The release in the kernel's banner: `Linux version 6.1.0-1-amd64 (…`.
pub(crate) fn banner(text: &[u8]) -> Option<String> {
    let rest = after(text, b"Linux version ")?;
    let word = rest.split(|byte| *byte == b' ').next()?;
    word.first().filter(|byte| byte.is_ascii_digit())?;
    Some(owned(word))
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    fn facts(lines: &[&'static str]) -> Facts {
        let entry = |line: &&'static str| Entry::new(Cow::Borrowed(line.as_bytes()));
        of(&lines.iter().map(entry).collect::<Vec<_>>())
    }

    #[test]
    fn tasks_and_kernels() {
        let text = "CPU: 1 PID: 107 Comm: a b Tainted: G S         OE      6.1.0-56-cloud-amd64 #1  Debian 6.1.192-2";
        let found = facts(&[text]);
        assert_eq!(
            (found.cpu, found.pid, found.comm.as_deref()),
            (Some(1), Some(107), Some("a b"))
        );
        assert_eq!(found.taint.as_deref(), Some("GSOE"));
        assert_eq!(found.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
        let found = facts(&["CPU: 0 UID: 0 PID: 1 Comm: x Not tainted 6.12.0+ #1 PREEMPT(full)"]);
        assert_eq!((found.taint, found.release.as_deref()), (None, Some("6.12.0+")));
        let found = facts(&["INFO: task kworker/0:1:12 blocked for more than 120 seconds."]);
        assert_eq!((found.pid, found.comm.as_deref()), (Some(12), Some("kworker/0:1")));
        let found = facts(&["watchdog: BUG: soft lockup - CPU#3 stuck for 22s! [dd:7]"]);
        assert_eq!((found.cpu, found.pid, found.comm.as_deref()), (Some(3), Some(7), Some("dd")));
    }

    #[test]
    fn registers_are_those_of_the_kernel() {
        let found = facts(&[
            "RSP: 0018:ffffd250803dbaa8 EFLAGS: 00000246",
            "RAX: 0000000000000001 RBX: 000000000000000a RCX: 0000000000000000",
            "FS:  00000000251a5380(0000) GS:ffff8b428f400000(0000) knlGS:0000000000000000",
            "CR2: ffffffffc03c0fde CR3: 0000000002a5e000 CR4: 00000000000006b0",
            "RIP: 0033:0x7f0000000000",
            "RAX: 0000000000000002 R08: 0000000000000000",
        ]);
        let names: Vec<_> = found.registers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["RSP", "EFLAGS", "RAX", "RBX", "RCX", "CR2", "CR3", "CR4"]);
        assert_eq!(found.registers[2].1, 1);
        assert_eq!(found.registers[0].1, 0xffff_d250_803d_baa8);
    }

    #[test]
    fn modules() {
        let found = facts(&["Modules linked in: crash(OE) virtio_blk [last unloaded: x]"]);
        assert_eq!(found.modules, ["crash", "virtio_blk"]);
    }
}
