//! How long it takes to learn from a dump what crashed, by defib and by those that people use for it, on the same dump in
//! the same run: `cargo bench --bench diagnose`. Prints medians and ratios; a reader judges them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use corpus::lab::{Kernel, Snapshot, VmConfig, drivers};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A crash with a mutex held that another process waits for.
const CRASH: &str = "crash crash_locks pair mutex-waited,wait-mutex 3000";
const MEMORY_MIB: u64 = 512;
const ROUNDS: usize = 7;
/// What is asked of crash: what crashed and where, all CPUs, tasks, modules, log. It is most of what defib tells.
const OF_CRASH: &str = "set scroll off\nbt\nbt -a\nps\nmod\nlog\nexit\n";
/// The same of drgn.
const OF_DRGN: &str = "
import sys, drgn
from drgn.helpers.linux import for_each_task
from drgn.helpers.linux.printk import get_dmesg
program = drgn.Program()
program.set_core_dump(sys.argv[1])
try:
    program.load_debug_info(sys.argv[2:])
except drgn.MissingDebugInfoError:
    pass
print(program.crashed_thread().stack_trace())
print([task.comm.string_() for task in for_each_task(program)])
print(len(get_dmesg(program)))
";

/// What one program took.
#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
    /// Peak resident set, KiB: with and without what is mapped from files.
    resident: u64,
    anonymous: u64,
}

fn main() -> Result<()> {
    let root = tempfile::tempdir()?;
    let file = |name: &str| root.path().join(name);
    let kernel = Kernel::find("6.1")?;
    let vmlinux = kernel.needed_vmlinux()?;
    let driver = drivers(&kernel)?
        .iter()
        .find(|driver| driver.with_debug.to_string_lossy().contains("crash_locks"))
        .map(|driver| driver.with_debug.clone())
        .ok_or("no driver crash_locks")?;
    let dump = file("vmcore");
    make_dump(kernel, &dump)?;
    let size = std::fs::metadata(&dump)?.len() / 1_000_000;
    println!(
        "a dump of {size} MB, vmlinux of {} MB",
        std::fs::metadata(&vmlinux)?.len() / 1_000_000
    );

    let cache = file("cache");
    let modules = driver.parent().ok_or("no folder of drivers")?;
    let ours = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_defib"));
        command.arg("diagnose").arg(&dump).arg("--cache").arg(&cache);
        command.arg("--vmlinux").arg(&vmlinux).arg("--debug-dir").arg(modules);
        command
    };
    let first = measure(ours())?;
    println!("{:<28} {}", "defib, new kernel", told(first));
    let own = median(ours)?;
    println!("{:<28} {}", "defib", told(own));

    std::fs::write(file("commands"), OF_CRASH)?;
    let of_crash = median(|| {
        let mut command = Command::new("crash");
        command.arg("-s").arg("-i").arg(file("commands")).arg(&vmlinux).arg(&dump);
        command
    })?;
    compare("crash", of_crash, own);
    std::fs::write(file("look.py"), OF_DRGN)?;
    let of_drgn = median(|| {
        let mut command = Command::new("/usr/bin/python3");
        command.arg(file("look.py")).arg(&dump).arg(&vmlinux).arg(&driver);
        command
    });
    match of_drgn {
        Ok(of_drgn) => compare("drgn", of_drgn, own),
        // drgn 0.0.22 wants the notes that the guest hands to QEMU by its module qemu_fw_cfg.
        Err(error) => println!("drgn does not open it: {error}"),
    }
    Ok(())
}

fn make_dump(kernel: Kernel, dump: &Path) -> Result<()> {
    let mut config = VmConfig::new(kernel);
    config.memory_mib = MEMORY_MIB;
    let mut vm = Snapshot::cached(&config)?.restore()?;
    vm.agent().command("load crash_locks")?;
    if vm.agent().command_within(CRASH, Duration::from_secs(3)).is_ok() {
        return Err("the guest did not crash".into());
    }
    let arguments = json!({ "paging": false, "protocol": format!("file:{}", dump.display()) });
    vm.control().command("dump-guest-memory", arguments)?;
    Ok(())
}

/// The median run by wall time; the highest peaks.
fn median(command: impl Fn() -> Command) -> Result<Cost> {
    let mut costs = (0..ROUNDS).map(|_| measure(command())).collect::<Result<Vec<Cost>>>()?;
    costs.sort_by_key(|cost| cost.wall);
    let peak = |of: fn(&Cost) -> u64| costs.iter().map(of).max().unwrap_or(0);
    let middle = costs.get(ROUNDS / 2).ok_or("no round")?;
    Ok(Cost { resident: peak(|it| it.resident), anonymous: peak(|it| it.anonymous), ..*middle })
}

fn measure(mut command: Command) -> Result<Cost> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let before = cpu_of_children()?;
    let start = Instant::now();
    let mut child = command.spawn()?;
    let (mut resident, mut anonymous) = (0, 0);
    let status = loop {
        let memory = memory_of(child.id());
        resident = resident.max(memory.0);
        anonymous = anonymous.max(memory.1);
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let wall = start.elapsed();
    if !status.success() {
        return Err(format!("{command:?} ended with {status}").into());
    }
    Ok(Cost { wall, cpu: cpu_of_children()?.saturating_sub(before), resident, anonymous })
}

/// Peak resident set and present anonymous memory of a process, KiB; 0 when it has ended.
fn memory_of(pid: u32) -> (u64, u64) {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let status = std::fs::read_to_string(path).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
    };
    (field("VmHWM:"), field("RssAnon:"))
}

/// User and system time of the children that have ended; a clock tick is 10 ms on Linux (USER_HZ is 100, stable ABI).
fn cpu_of_children() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks =
        |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    Ok(Duration::from_millis((ticks(13) + ticks(14)) * 10))
}

fn told(cost: Cost) -> String {
    format!(
        "{:>8.0} ms, CPU {:>6} ms, peak {:>4} MB resident, {:>4} MB of its own",
        cost.wall.as_secs_f64() * 1e3,
        cost.cpu.as_millis(),
        cost.resident / 1000,
        cost.anonymous / 1000,
    )
}

fn compare(name: &str, cost: Cost, own: Cost) {
    println!(
        "{name:<28} {}; {:.1} times defib's time, {:.1} times its CPU",
        told(cost),
        cost.wall.as_secs_f64() / own.wall.as_secs_f64(),
        cost.cpu.as_secs_f64() / own.cpu.as_secs_f64().max(0.01),
    );
}
