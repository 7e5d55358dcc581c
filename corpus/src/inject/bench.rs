//! A guest ready for injections: a driver loaded and in use, saved as a snapshot, with what is known of its code: where
//! it is, which functions its workload calls, which changes can be made. One injection is in `run.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::module_file::ModuleFile;
use super::mutation::{Mutation, Operator, candidates};
use super::target::{TARGETS, Target};
use crate::lab::initramfs::{self, Extra};
use crate::lab::{Answer, Snapshot, Vm, VmConfig, build, cache};
use crate::{Error, Result};

const PROGRAM: &str = include_str!("../../guest/inject.c");
/// What of busybox the set-up needs beyond the usual.
const APPLETS: &[&str] = &["losetup", "mkdosfs"];
const FACTS: &str = "facts.json";
/// Lets the driver's workload go on.
pub(crate) const GO: &str = "exec inject go";
/// How long the driver's workload runs before the guest is saved.
const STEADY: Duration = Duration::from_millis(2500);
/// How long an operation under way may take to end once the workload is held: a frame is waited for 300 ms.
const HELD: Duration = Duration::from_millis(700);
/// How often the functions called are looked at.
const LOOKS: u32 = 12;
const PAGE: u64 = 4096;
/// Of a module of which the workload calls one function in a thousand, a change is still found.
const DRAWS_MAX: u32 = 100_000;
/// The most code of a module that is looked at, in bytes.
const CODE_MAX: u64 = 4 << 20;

/// A guest ready for injections.
#[derive(Debug)]
pub struct Bench {
    /// The driver.
    pub target: &'static Target,
    snapshot: Snapshot,
    /// Address of the module's `.text` in the guest.
    base: u64,
    /// The changes that can be made in the module's functions.
    changes: BTreeMap<Operator, Vec<Mutation>>,
    /// The functions that the workload was seen to call.
    called: BTreeSet<String>,
}

impl Bench {
    /// The bench of a driver, from the cache or made now.
    ///
    /// # Errors
    /// [`Error::NotReady`] when the guest does not come to use the driver; [`Error::File`] when `scripts/setup` has
    /// not unpacked the module.
    pub fn cached(config: &VmConfig, target: &'static Target) -> Result<Self> {
        let config = with_target(config, target)?;
        let qemu = build::run(Command::new(&config.qemu).arg("--version"))?;
        let key = cache::Key::default()
            .add("inject 7")
            .add(qemu)
            .add(format!("{config:?} {target:?}"))
            .add_stat(&config.kernel.vmlinuz())?;
        let make = |dir: &Path| make(&config, target, dir);
        let dir = cache::folder("inject", &key.name(), make)?;
        let facts = dir.join(FACTS);
        let text = fs::read_to_string(&facts).map_err(Error::file("read", &facts))?;
        let facts: Value = serde_json::from_str(&text).unwrap_or_default();
        let snapshot = Snapshot::in_folder(dir, config);
        Self::new(target, snapshot, &facts)
    }

    fn new(target: &'static Target, snapshot: Snapshot, facts: &Value) -> Result<Self> {
        let number = |name: &str| facts.get(name).and_then(Value::as_u64);
        let missing = || not_ready(target, "its facts are incomplete");
        let base = number("text").ok_or_else(missing)?;
        let called = facts.get("called").and_then(Value::as_array).ok_or_else(missing)?;
        let called = called.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        let mut bench = Self { target, snapshot, base, changes: BTreeMap::new(), called };
        let mut vm = bench.snapshot.restore_standing()?;
        let path = vm.config().kernel.modules().join(format!("{}.ko", target.module));
        let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
        let file = ModuleFile::parse(target.module, &bytes)?;
        let code = bench.read(&mut vm, base, file.size.min(CODE_MAX))?;
        for function in &file.functions {
            for change in candidates(&file, function, &code, base)? {
                bench.changes.entry(change.operator).or_default().push(change);
            }
        }
        bench.changes.retain(|_, changes| changes.iter().any(|change| change.is_in(&bench.called)));
        if bench.changes.is_empty() {
            return Err(not_ready(target, "no function of it is called"));
        }
        Ok(bench)
    }

    /// The change that a number stands for: its kind first, then the place, each as likely as the others.
    #[must_use]
    pub fn draw(&self, number: u64) -> Option<&Mutation> {
        draw(&self.changes, &self.called, number)
    }

    /// How many changes can be made in functions that are called.
    #[must_use]
    pub fn size(&self) -> usize {
        let all = self.changes.values().flatten();
        all.filter(|change| change.is_in(&self.called)).count()
    }

    /// A guest with the change made before its first instruction: no translation of the old code exists. The
    /// driver's workload waits for [`GO`].
    pub(crate) fn changed(&self, mutation: &Mutation) -> Result<Vm> {
        let mut vm = self.snapshot.restore_standing()?;
        let at = self.base + mutation.offset;
        let found = self.read(&mut vm, at, mutation.old.len() as u64)?;
        if found != mutation.old {
            return Err(not_ready(self.target, "its code is not where it was"));
        }
        self.write(&mut vm, at, &mutation.new)?;
        Ok(vm)
    }

    fn read(&self, vm: &mut Vm, at: u64, size: u64) -> Result<Vec<u8>> {
        let ram = self.ram(vm, false)?;
        let mut bytes = Vec::new();
        for (place, piece) in pieces(at, size) {
            let start = bytes.len();
            bytes.resize(start + piece, 0);
            let phys = self.physical(vm, place)?;
            let slot = bytes.get_mut(start..).unwrap_or_default();
            ram.read_exact_at(slot, phys)
                .map_err(Error::file("read", Path::new("guest memory")))?;
        }
        Ok(bytes)
    }

    fn write(&self, vm: &mut Vm, at: u64, bytes: &[u8]) -> Result<()> {
        let ram = self.ram(vm, true)?;
        let mut rest = bytes;
        for (place, piece) in pieces(at, bytes.len() as u64) {
            let (now, later) = rest.split_at(piece.min(rest.len()));
            let phys = self.physical(vm, place)?;
            ram.write_all_at(now, phys).map_err(Error::file("write", Path::new("guest memory")))?;
            rest = later;
        }
        Ok(())
    }

    fn ram(&self, vm: &Vm, write: bool) -> Result<File> {
        let path = vm.ram_file().ok_or_else(|| not_ready(self.target, "its memory is no file"))?;
        File::options().read(true).write(write).open(&path).map_err(Error::file("open", &path))
    }

    /// Where a kernel address is in the memory's file: QEMU walks the tables of vCPU 0. Below 3 GiB, guest-physical
    /// addresses are offsets.
    fn physical(&self, vm: &mut Vm, address: u64) -> Result<u64> {
        let line = format!("gva2gpa {address:#x}");
        let arguments = json!({ "command-line": line });
        let answer = vm.control().command("human-monitor-command", arguments)?;
        answer
            .as_str()
            .and_then(|text| text.trim().strip_prefix("gpa: 0x"))
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .filter(|&phys| phys < 3 << 30)
            .ok_or_else(|| not_ready(self.target, &format!("{address:#x} is {answer}")))
    }
}

/// A range in pieces that do not cross a page.
fn pieces(at: u64, size: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = at + size;
    let mut next = at;
    std::iter::from_fn(move || {
        let place = next;
        next = (place / PAGE + 1).saturating_mul(PAGE).min(end);
        (place < end).then(|| (place, usize::try_from(next - place).unwrap_or(0)))
    })
}

/// Draws among all of the module's changes until one is in a function that is called: which ones were seen depends on the
/// moment, and must not move a number to another change.
fn draw<'a>(
    changes: &'a BTreeMap<Operator, Vec<Mutation>>,
    called: &BTreeSet<String>,
    number: u64,
) -> Option<&'a Mutation> {
    let kinds: Vec<&Vec<Mutation>> = changes.values().collect();
    let kind = kinds.get(usize::try_from(number.checked_rem(kinds.len() as u64)?).ok()?)?;
    let mut place = number;
    (0..DRAWS_MAX).find_map(|_| {
        place = scatter(place);
        let change = kind.get(usize::try_from(place % kind.len() as u64).ok()?)?;
        change.is_in(called).then_some(change)
    })
}

/// A number far from those of its neighbours (splitmix64).
pub(crate) fn scatter(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn not_ready(target: &Target, reason: &str) -> Error {
    Error::NotReady { target: target.name.to_owned(), reason: reason.to_owned() }
}

/// The lab guest with the target's modules, devices and workload.
fn with_target(config: &VmConfig, target: &Target) -> Result<VmConfig> {
    let mut files = vec![Extra {
        path: "bin/inject".into(),
        bytes: initramfs::program("inject", PROGRAM)?,
        program: true,
    }];
    let mut modules: Vec<&str> = TARGETS.iter().flat_map(|target| target.load).copied().collect();
    modules.sort_unstable();
    modules.dedup();
    for module in modules {
        let path = config.kernel.modules().join(format!("{module}.ko"));
        if path.is_file() {
            let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
            files.push(Extra { path: format!("modules/{module}.ko"), bytes, program: false });
        }
    }
    let image = initramfs::extended(&config.kernel, APPLETS, &files)?;
    // As Debian sets it: without guard an oops ends the process, and the guest shows what the change does then.
    let mut config = VmConfig { panic_on_oops: false, ..config.clone() };
    config.extra_args.extend(target.qemu.iter().map(|&word| word.to_owned()));
    // The last one counts.
    config.extra_args.extend(["-initrd".to_owned(), image.display().to_string()]);
    Ok(config)
}

/// Boots, puts the driver to use, saves; then finds out in a copy which functions are called.
fn make(config: &VmConfig, target: &'static Target, dir: &Path) -> Result<()> {
    let mut vm = Vm::boot(config)?;
    for module in target.load {
        if config.kernel.modules().join(format!("{module}.ko")).is_file() {
            vm.agent().command(&format!("load {module}"))?;
        }
    }
    for command in target.setup {
        shell(&mut vm, target, command)?;
    }
    vm.agent().command("workload start")?;
    shell(&mut vm, target, &format!("inject start {}", target.name))?;
    thread::sleep(STEADY);
    let look = shell(&mut vm, target, "inject look")?;
    if look.number("more")? == 0 || look.number("wrong")? != 0 || look.number("errors")? != 0 {
        return Err(not_ready(target, look.text()));
    }
    // Nothing may be under way in the saved guest: a frame that a slow restore delays would count as lost.
    shell(&mut vm, target, "inject hold")?;
    thread::sleep(HELD);
    let text =
        shell(&mut vm, target, &format!("cat /sys/module/{}/sections/.text", target.module))?;
    let taken = Snapshot::take(vm, dir)?;
    let facts = json!({
        "text": hex(&text),
        "called": called(&taken, target)?,
    });
    let path = dir.join(FACTS);
    fs::write(&path, facts.to_string()).map_err(Error::file("write", &path))
}

/// A shell command that must succeed.
fn shell(vm: &mut Vm, target: &Target, command: &str) -> Result<Answer> {
    let answer = vm.agent().command(&format!("exec {command}"))?;
    if answer.number("status")? == 0 {
        Ok(answer)
    } else {
        Err(not_ready(target, &format!("{command}: {}", answer.text())))
    }
}

/// The hexadecimal number at the start of a command's output.
fn hex(answer: &Answer) -> Option<u64> {
    let text = answer.unescaped();
    let (_, output) = text.split_once("output=")?;
    let word = output.split_whitespace().next()?;
    u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()
}

/// The module's functions that the workload calls, by the kernel's own tracer. Many short looks: an emulated guest
/// takes longer to print thousands of calls than the agent waits.
fn called(snapshot: &Snapshot, target: &Target) -> Result<Vec<String>> {
    let mut vm = snapshot.restore()?;
    let set_up = format!(
        "cd /sys/kernel/debug/tracing && echo 0 >tracing_on && echo 24 >buffer_size_kb && \
         echo ':mod:{}' >set_ftrace_filter && echo function >current_tracer && inject go",
        target.module
    );
    shell(&mut vm, target, &set_up)?;
    let look = "cd /sys/kernel/debug/tracing && echo >trace && echo 1 >tracing_on && sleep 0.4 && \
                echo 0 >tracing_on && sed -n 's/.*: \\([^ ]*\\) <-.*/\\1/p' trace | sort -u";
    let mut names = BTreeSet::new();
    for _ in 0..LOOKS {
        let text = shell(&mut vm, target, look)?.unescaped();
        let output = text.split_once("output=").map_or("", |(_, output)| output);
        names.extend(output.split_whitespace().map(str::to_owned));
    }
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_pages() {
        let found: Vec<_> = pieces(0xffe, 0x1004).collect();
        assert_eq!(found, [(0xffe, 2), (0x1000, 0x1000), (0x2000, 2)]);
        assert_eq!(pieces(5, 0).count(), 0);
    }

    fn change(function: &str, offset: u64) -> Mutation {
        Mutation {
            operator: Operator::DropBranch,
            function: function.to_owned(),
            offset,
            old: vec![0x74, 0x05],
            new: vec![0x66, 0x90],
            text: "je".to_owned(),
        }
    }

    #[test]
    fn a_function_that_was_not_seen_moves_no_other_change() {
        let names: Vec<String> = (0..40).map(|number| format!("f{number}")).collect();
        let places = names.iter().zip(0..).map(|(name, place)| change(name, place)).collect();
        let changes = BTreeMap::from([(Operator::DropBranch, places)]);
        let all: BTreeSet<String> = names.iter().cloned().collect();
        let most: BTreeSet<String> = names.iter().skip(1).cloned().collect();
        for number in 0..500 {
            let before = draw(&changes, &all, number).unwrap();
            let now = draw(&changes, &most, number).unwrap();
            assert_eq!(before != now, before.function == "f0", "{number}");
        }
        assert_eq!(draw(&changes, &BTreeSet::new(), 1), None);
        assert_eq!(draw(&BTreeMap::new(), &all, 1), None);
    }

    #[test]
    fn neighbours_are_scattered() {
        let mut seen: Vec<u64> = (0..1000).map(|n| scatter(n) % 10).collect();
        seen.sort_unstable();
        for digit in 0..10 {
            let count = seen.iter().filter(|&&it| it == digit).count();
            assert!((60..140).contains(&count), "{digit}: {count}");
        }
    }
}
