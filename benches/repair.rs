//! The figures of the main job, on a lab VM, in one run: `make bench`. Prints medians and ratios; a
//! reader judges them, nothing here fails for being slow.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use corpus::guarded::{Guard, GuardConfig};
use corpus::lab::{Kernel, Snapshot, Vm, VmConfig};
use corpus::scenario::{Case, case};
use serde_json::Value;

/// `DEFIB=/path cargo bench --bench repair` measures another build, to be compared with.
fn defib() -> PathBuf {
    std::env::var_os("DEFIB").map_or_else(|| env!("CARGO_BIN_EXE_defib").into(), PathBuf::from)
}
const LIMIT: Duration = Duration::from_secs(120);
/// Crash-and-repair rounds on one VM.
const ROUNDS: usize = 200;
/// Cases of the rounds, in turn: every lock, every context, nothing that ends a process.
const MIX: &[&str] = &[
    "null-deref",
    "memcpy-null",
    "null-call",
    "wild-pointer",
    "non-canonical",
    "bug",
    "list-corruption",
    "usercopy",
    "divide",
    "panic",
    "mutex",
    "slab-mutex",
    "rwsem-read",
    "rwsem-write",
    "spinlock",
    "spinlock-irqsave",
    "spinlock-bh",
    "three-locks",
    "rcu",
    "irqs-off",
    "bh-off",
    "preemption-off",
    "deep",
    "ioctl",
    "read",
    "poll",
    "timer-busy",
    "timer-idle",
    "hrtimer-busy",
    "tasklet",
    "work",
    "work-mutex",
    "kthread",
];
/// Pairs of runs with and without guard.
const PAIRS: usize = 5;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let kernel = Kernel::find("6.1")?;
    let root = tempfile::tempdir()?;
    println!("guest kernel {}, QEMU TCG, 2 vCPUs, 256 MiB\n", kernel.release());
    // `cargo bench --bench repair -- healthy` runs one part.
    let parts: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|word| word == part);
    if wanted("knowledge") {
        knowledge(&kernel, root.path())?;
    }
    // `-- downtime mutex deep`: crashes only, of these cases.
    if let Some(("downtime", mix)) = parts.split_first().map(|(part, mix)| (part.as_str(), mix)) {
        let mix: Vec<&str> = mix.iter().map(String::as_str).collect();
        rounds(&kernel, root.path(), if mix.is_empty() { MIX } else { &mix })?;
    }
    if wanted("repair") {
        let repaired = rounds(&kernel, root.path(), MIX)?;
        reboot(&kernel, repaired)?;
    }
    if wanted("healthy") {
        healthy(&kernel, root.path())?;
    }
    Ok(())
}

/// Compiling a vmlinux, cold, and the size of what comes out.
fn knowledge(kernel: &Kernel, root: &Path) -> Result<()> {
    let vmlinux = kernel.vmlinux().ok_or("no vmlinux")?;
    let output = root.join("kernel.defib");
    let start = Instant::now();
    let mut child = Command::new(defib())
        .args(["image", "build", "--cache"])
        .arg(root.join("cold"))
        .arg("--vmlinux")
        .arg(&vmlinux)
        .arg("-o")
        .arg(&output)
        .stdout(Stdio::null())
        .spawn()?;
    let mut peak = 0;
    let status = loop {
        peak = peak.max(peak_kib(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    if !status.success() {
        return Err(format!("image build ended with {status}").into());
    }
    println!(
        "compile of a {} MB vmlinux: {:.2} s, peak {} MiB, kernel layer {:.2} MiB\n",
        std::fs::metadata(&vmlinux)?.len() / 1_000_000,
        start.elapsed().as_secs_f64(),
        peak / 1024,
        std::fs::metadata(&output)?.len() as f64 / f64::from(1 << 20),
    );
    Ok(())
}

/// Peak resident set of a process, KiB.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").trim().parse().ok()
}

fn guard(vm: &Vm, root: &Path, policy: &str) -> Result<(Guard, Value)> {
    let kernel = &vm.config().kernel;
    let policy_file = root.join("policy.toml");
    std::fs::write(&policy_file, policy)?;
    let mut config = GuardConfig::with_debug_files(defib(), kernel, root.join("incidents"))?;
    config.arguments.extend(["--policy".into(), policy_file.display().to_string()]);
    let mut guard = Guard::start(&config, &vm.qmp())?;
    let image = guard.await_event("image", LIMIT)?;
    guard.await_event("armed", LIMIT)?;
    Ok((guard, image))
}

/// Many crashes on one VM, whose workload must not notice.
fn rounds(kernel: &Kernel, root: &Path, mix: &[&str]) -> Result<Duration> {
    let mut vm = Snapshot::cached(&VmConfig::new(kernel.clone()))?.restore()?;
    vm.agent().command("workload start")?;
    let cases: Vec<&Case> = mix.iter().filter_map(|name| case(name)).collect();
    let mut loaded = Vec::new();
    for case in &cases {
        if !loaded.contains(&case.driver) {
            vm.agent().command(&case.load_command())?;
            loaded.push(case.driver);
        }
    }
    let (mut guard, image) = guard(&vm, root, "rungs = [\"return_error\"]\n")?;
    let taken = image.get("guest_layer_us").and_then(Value::as_u64).unwrap_or(0);
    println!(
        "guest layer taken from the running guest in {:.1} ms, without a pause",
        taken as f64 / 1e3
    );
    let memory = resident_kib(guard.pid())?;
    let mut downtimes = Vec::new();
    let mut by_case: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for round in 0..ROUNDS {
        let case = cases[round % cases.len()];
        let answer = vm.agent().command(&case.crash_command(20_000))?;
        let end = guard.await_any(&["repaired", "refused"], Duration::from_secs(20));
        let end = end
            .map_err(|error| format!("round {round}, {}: {}: {error}", case.name, answer.text()))?;
        let Some(downtime) = end.get("downtime_us").and_then(Value::as_u64) else {
            return Err(format!("round {round}, {}: {end}", case.name).into());
        };
        if !case.sees.is_shown_by(&answer, "") {
            return Err(format!("round {round}, {}: {}", case.name, answer.text()).into());
        }
        vm.agent().command(&case.check_command())?;
        downtimes.push(Duration::from_micros(downtime));
        by_case.entry(case.name).or_default().push(Duration::from_micros(downtime));
    }
    let workload = vm.agent().command("workload verify")?;
    let splats = vm.agent().command("splats")?;
    println!(
        "    guard's memory: {} KiB at first, {} KiB at last",
        memory,
        resident_kib(guard.pid())?
    );
    guard.detach()?;
    phases(&root.join("incidents"))?;
    for (name, times) in &mut by_case {
        times.sort_unstable();
        println!("    {name:<18} median {:>7.2} ms", millis(times[times.len() / 2]));
    }
    downtimes.sort_unstable();
    let at = |share: f64| downtimes[((downtimes.len() - 1) as f64 * share).round() as usize];
    println!(
        "{ROUNDS} crashes on one VM: downtime p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms, worst {:.2} ms",
        millis(at(0.5)),
        millis(at(0.9)),
        millis(at(0.99)),
        millis(at(1.0)),
    );
    println!("    workload: {}\n    kernel log: {}\n", workload.text(), splats.text());
    Ok(at(0.5))
}

/// Medians of how long each phase took, from the incidents: of those that called functions of the guest, and of
/// the others.
fn phases(incidents: &Path) -> Result<()> {
    let mut all: BTreeMap<(bool, String), Vec<u64>> = BTreeMap::new();
    for folder in std::fs::read_dir(incidents)? {
        let Ok(text) = std::fs::read_to_string(folder?.path().join("incident.json")) else {
            continue;
        };
        let incident: Value = serde_json::from_str(&text)?;
        let calls = text.contains("\"kind\":\"called\"") || text.contains("\"kind\": \"called\"");
        let ends = incident.get("phases_us").and_then(Value::as_object);
        let mut ends: Vec<(u64, String)> = ends
            .into_iter()
            .flatten()
            .filter_map(|(name, end)| Some((end.as_u64()?, name.clone())))
            .collect();
        ends.sort();
        let mut before = 0;
        for (end, name) in ends {
            all.entry((calls, name)).or_default().push(end - before);
            before = end;
        }
    }
    for ((calls, name), times) in &mut all {
        times.sort_unstable();
        let with = if *calls { "with calls" } else { "without calls" };
        let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
        println!("    {with:<14} {name:<20} median {median:>6} us, most {most:>6} us");
    }
    Ok(())
}

/// Resident memory of a process that is its own, KiB: pages of the guest's RAM that it maps are not counted.
fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    Ok(line.ok_or("no RssAnon")?.trim().trim_end_matches(" kB").trim().parse()?)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The stock way: panic, reboot, user space answers again.
fn reboot(kernel: &Kernel, repaired: Duration) -> Result<()> {
    let mut config = VmConfig::new(kernel.clone());
    config.panic_timeout = -1;
    config.reboot = true;
    let mut vm = Snapshot::cached(&config)?.restore()?;
    vm.agent().command("load crash_chardev")?;
    let start = Instant::now();
    let crash = "crash crash_chardev write null-deref 1000";
    if vm.agent().command_within(crash, Duration::from_secs(1)).is_ok() {
        return Err("the stock VM did not crash".into());
    }
    while !vm.agent().answers(Duration::from_millis(100)) {
        if start.elapsed() > LIMIT {
            return Err("the stock VM is not back".into());
        }
    }
    let back = start.elapsed();
    println!(
        "the same crash on the stock VM: back after {:.2} s; reboot / in place = {:.0}\n",
        back.as_secs_f64(),
        back.as_secs_f64() / repaired.as_secs_f64(),
    );
    Ok(())
}

/// What a healthy guest pays for being guarded: pairs of runs, alternating.
fn healthy(kernel: &Kernel, root: &Path) -> Result<()> {
    let mut vm = Snapshot::cached(&VmConfig::new(kernel.clone()))?.restore()?;
    let loads = [
        ("system calls", "exec dd if=/dev/zero of=/dev/null bs=1 count=60000 2>/dev/null"),
        ("computing", "exec i=0; while [ $i -lt 15000 ]; do i=$((i+1)); done"),
    ];
    for (name, command) in loads {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            without.push(timed(&mut vm, command)?);
            let (guard, _) = guard(&vm, root, "")?;
            with.push(timed(&mut vm, command)?);
            guard.detach()?;
        }
        without.sort_unstable();
        with.sort_unstable();
        let (without, with) = (without[PAIRS / 2], with[PAIRS / 2]);
        println!(
            "healthy cost, {name}: {:.0} ms without guard, {:.0} ms with; ratio {:.3}",
            millis(without),
            millis(with),
            with.as_secs_f64() / without.as_secs_f64(),
        );
    }
    Ok(())
}

/// CPU time of QEMU for one command in the guest: wall time would count the host's other work.
fn timed(vm: &mut Vm, command: &str) -> Result<Duration> {
    let before = cpu_time(vm.pid())?;
    vm.agent().command_within(command, LIMIT)?;
    Ok(cpu_time(vm.pid())?.saturating_sub(before))
}

/// User and system time of a process; a clock tick is 10 ms on Linux (USER_HZ is 100, stable ABI).
fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks =
        |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    Ok(Duration::from_millis((ticks(11) + ticks(12)) * 10))
}
