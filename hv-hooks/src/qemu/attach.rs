//! Attaching: finding out what the VM is and whether it may be watched, cleaning up after a guard that was
//! killed, switching the gdb stub on.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guest::{FreshKind, GuestPhys, HostVirt};
use serde_json::Value;

use super::breakpoints::HardwareBreakpoints;
use super::fresh::Fresh;
use super::hmp::{MapEntry, MapKind, MemoryMap, parse_host_address, parse_memory_map};
use super::hotplug::{self, Ports};
use super::process::Process;
use super::qmp::{Command, Qmp, hmp_text};
use super::ram::GuestRam;
use super::rundir::RunDir;
use super::socket::Socket;
use super::stub::Stub;
use super::{Qemu, default_order};
use crate::Error;

/// How long QEMU may take for one command. Plugging memory into a loaded host takes tens of milliseconds.
const COMMAND_LIMIT: Duration = Duration::from_secs(5);
/// How QEMU names the character device of its gdb stub.
const STUB_LABEL: &str = "gdb";

/// What to attach to, and how.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// QMP socket: a path, or `tcp:HOST:PORT` (then `pid` is needed).
    pub qmp: PathBuf,
    /// A gdb stub that the owner has switched on: a path, or `tcp:HOST:PORT`.
    pub gdb: Option<PathBuf>,
    /// QEMU's process id, where it is not the peer of the QMP socket.
    pub pid: Option<u32>,
    /// Ways to fresh memory, in the order in which they are tried.
    pub fresh_order: Vec<FreshKind>,
    /// Attach to a paused VM, too. It stays paused.
    pub take_over_paused: bool,
    /// How long QEMU may take for one command.
    pub command_limit: Duration,
}

impl AttachOptions {
    /// The VM behind this QMP socket, with the defaults.
    #[must_use]
    pub fn new(qmp: impl Into<PathBuf>) -> Self {
        Self {
            qmp: qmp.into(),
            gdb: None,
            pid: None,
            fresh_order: default_order(),
            take_over_paused: false,
            command_limit: COMMAND_LIMIT,
        }
    }
}

/// What is asked of QEMU before anything is done.
struct Survey {
    status: String,
    running: bool,
    /// Thread of vCPU 0.
    thread: Option<u64>,
    /// Where a gdb stub listens, if one is on.
    stub: Option<String>,
    /// Ids of the memory backends.
    backends: Vec<String>,
    map: MemoryMap,
    /// The guest's code runs on the CPU itself.
    kvm: bool,
}

pub(super) fn attach(options: AttachOptions) -> Result<Qemu, Error> {
    let socket = Socket::connect(&options.qmp)?;
    let (peer, uid) = socket.peer().unwrap_or((0, 0));
    let process = Process::find(options.pid.unwrap_or(peer))?;
    // Before the greeting: another guard holds the socket, so none would come.
    let rundir = RunDir::lock(process, uid)?;
    let mut qmp = Qmp::negotiate(socket, options.command_limit)?;
    let survey = survey(&mut qmp)?;
    if let Some(thread) = survey.thread.filter(|&thread| !process.has_thread(thread)) {
        return Err(Error::WrongProcess { pid: process.pid, thread });
    }
    let own_socket = rundir.gdb_socket();
    let left_behind = survey.stub.as_ref().is_some_and(|stub| is_at(stub, &own_socket));
    if let (Some(endpoint), false, None) = (&survey.stub, left_behind, &options.gdb) {
        return Err(Error::StubInUse { endpoint: endpoint.clone() });
    }
    // A VM that a killed guard left standing runs on; any other that stands is somebody's decision.
    let abandoned = left_behind && matches!(survey.status.as_str(), "paused" | "debug");
    let run = survey.running || abandoned;
    let resumable = matches!(survey.status.as_str(), "paused" | "debug" | "prelaunch");
    let taken_over = options.take_over_paused && resumable;
    if !run && !taken_over {
        return Err(Error::NotRunning { status: survey.status });
    }
    if left_behind {
        qmp.hmp("gdbserver none")?;
    }
    let ram = find_ram(&mut qmp, process, &survey)?;
    let ports = Ports::find(&survey.map);
    let pause = Instant::now();
    let stub = connect_stub(&mut qmp, &options, &own_socket, run)?;
    let (own_stub, lock) =
        if options.gdb.is_some() { (None, Some(rundir)) } else { (Some(rundir), None) };
    let vcpus = stub.vcpu_count();
    let mut qemu = Qemu {
        qmp,
        stub,
        ram,
        placement: Box::<HardwareBreakpoints>::default(),
        fresh: Fresh::new(options.fresh_order, ports),
        process,
        own_stub,
        _lock: lock,
        at_hook: vec![None; vcpus],
        pending: None,
        events: VecDeque::new(),
        recovered: left_behind,
        translates: !survey.kvm,
        attach_pause: Duration::ZERO,
        attached: true,
    };
    // From here on dropping it detaches. The guest stands: what a killed guard plugged in can go.
    qemu.check_register_file()?;
    qemu.recovered |= hotplug::sweep(&mut qemu.stub, ports, &survey.backends)? > 0;
    if run {
        qemu.stub.run(&[], &[])?;
        qemu.attach_pause = pause.elapsed();
    }
    Ok(qemu)
}

fn survey(qmp: &mut Qmp) -> Result<Survey, Error> {
    let commands = [
        Command::new("query-status", Value::Null),
        Command::new("query-cpus-fast", Value::Null),
        Command::new("query-chardev", Value::Null),
        Command::new("query-memdev", Value::Null),
        Command::hmp("info mtree -f"),
        Command::new("query-kvm", Value::Null),
    ];
    let answers = qmp.run_all(&commands).into_iter().collect::<Result<Vec<_>, _>>()?;
    let [status, cpus, chardevs, memdevs, mtree, kvm] =
        <[Value; 6]>::try_from(answers).map_err(|_| Error::Gone)?;
    let text = |value: &Value, name: &str| value.get(name)?.as_str().map(str::to_owned);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let stub = list(&chardevs)
        .iter()
        .find(|chardev| text(chardev, "label").as_deref() == Some(STUB_LABEL))
        .and_then(|chardev| text(chardev, "filename"));
    Ok(Survey {
        status: text(&status, "status").unwrap_or_default(),
        running: status.get("running").and_then(Value::as_bool).unwrap_or(false),
        thread: cpus.pointer("/0/thread-id").and_then(Value::as_u64),
        stub,
        backends: list(&memdevs).iter().filter_map(|memdev| text(memdev, "id")).collect(),
        map: parse_memory_map(&hmp_text(mtree, "HMP info mtree -f")?),
        kvm: kvm.get("enabled").and_then(Value::as_bool).unwrap_or(false),
    })
}

/// Whether a stub listens at this path: `unix:PATH,server=on`, with `disconnected:` in front while it waits.
fn is_at(stub: &str, path: &Path) -> bool {
    let stub = stub.trim_start_matches("disconnected:").trim_start_matches("unix:");
    stub.split(',').next().map(Path::new) == Some(path)
}

/// Whether a range of the memory map belongs to a memory backend. A region is named after its backend's id,
/// with `/objects/` in front on machine types before 4.0.
fn is_backed(entry: &MapEntry, backends: &[String]) -> bool {
    let name = entry.name.trim_start_matches("/objects/");
    backends.iter().any(|id| id == name)
}

/// The part of the first MiB that a chipset maps to the firmware's ROM or to RAM, read-only or not, as it is
/// programmed (PAM registers).
const SHADOWED: Range<u64> = 0xc_0000..0x10_0000;

/// The RAM ranges of a memory map: their parts outside of [`SHADOWED`].
fn ram_ranges(map: &MemoryMap, backends: &[String]) -> Vec<Range<GuestPhys>> {
    let is_ram = |entry: &&MapEntry| entry.kind == MapKind::Ram && is_backed(entry, backends);
    let outside = |entry: &MapEntry| {
        let end = entry.last.0.saturating_add(1);
        let below = entry.start.0..end.min(SHADOWED.start);
        let above = entry.start.0.max(SHADOWED.end)..end;
        [below, above]
    };
    let parts = map.memory.iter().filter(is_ram).flat_map(outside);
    parts
        .filter(|part| !part.is_empty())
        .map(|part| GuestPhys(part.start)..GuestPhys(part.end))
        .collect()
}

fn find_ram(qmp: &mut Qmp, process: Process, survey: &Survey) -> Result<GuestRam, Error> {
    let found = ram_ranges(&survey.map, &survey.backends);
    let commands: Vec<Command> =
        found.iter().map(|range| Command::hmp(format!("gpa2hva {:#x}", range.start))).collect();
    let mut ranges: Vec<(Range<GuestPhys>, bool, HostVirt)> = Vec::new();
    for (range, answer) in found.into_iter().zip(qmp.run_all(&commands)) {
        let text = hmp_text(answer?, "HMP gpa2hva")?;
        let host = parse_host_address(&text).ok_or_else(|| Error::answer("HMP gpa2hva", &text))?;
        // RAM goes on behind what is mapped there just now, and that is where firmware copies itself to.
        if range.start.0 == 0 {
            let shadowed = GuestPhys(SHADOWED.start)..GuestPhys(SHADOWED.end);
            ranges.push((shadowed, false, host + SHADOWED.start));
        }
        ranges.push((range, true, host));
    }
    if ranges.is_empty() {
        return Err(Error::NoRam);
    }
    let mut ram = GuestRam::new(process)?;
    ram.add(&ranges)?;
    Ok(ram)
}

/// Connects to the owner's stub or switches one on. Pauses the VM; if that fails half-way, it runs again if it
/// is to `run`.
fn connect_stub(
    qmp: &mut Qmp,
    options: &AttachOptions,
    own_socket: &Path,
    run: bool,
) -> Result<Stub, Error> {
    let endpoint = match &options.gdb {
        Some(endpoint) => endpoint.as_path(),
        None => {
            let said =
                qmp.hmp(format!("gdbserver unix:{},server=on,wait=off", own_socket.display()))?;
            if !said.starts_with("Waiting for gdb connection") {
                return Err(Error::answer("HMP gdbserver", said));
            }
            own_socket
        }
    };
    Stub::connect(endpoint, options.command_limit).inspect_err(|_| {
        if options.gdb.is_none() {
            let _ = qmp.hmp("gdbserver none");
        }
        if run {
            let _ = qmp.execute("cont", Value::Null);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_found_however_the_chipset_is_programmed() {
        let text = |ranges: &str| format!("FlatView #1\n AS \"memory\", root: system\n{ranges}");
        let booted = "  0-9ffff (prio 0, ram): m\n  c0000-cafff (prio 0, rom): m @c0000\n  \
            cb000-cdfff (prio 0, ram): m @cb000\n  100000-fffffff (prio 0, ram): m @100000\n  \
            fd000000-fdffffff (prio 1, ram): vga.vram\n";
        let all_ram = "  0-9ffff (prio 0, ram): m\n  c0000-fffffff (prio 0, ram): m @c0000\n";
        let expected =
            [GuestPhys(0)..GuestPhys(0xa_0000), GuestPhys(0x10_0000)..GuestPhys(0x1000_0000)];
        for ranges in [booted, all_ram] {
            let map = parse_memory_map(&text(ranges));
            assert_eq!(ram_ranges(&map, &["m".into()]), expected);
            assert!(ram_ranges(&map, &["other".into()]).is_empty());
        }
    }

    #[test]
    fn own_stub_is_recognised() {
        let path = Path::new("/run/defib/qemu-7-9/gdb.sock");
        assert!(is_at("disconnected:unix:/run/defib/qemu-7-9/gdb.sock,server=on", path));
        assert!(is_at("unix:/run/defib/qemu-7-9/gdb.sock,server=on <-> ", path));
        assert!(!is_at("disconnected:tcp:0.0.0.0:1234,server=on", path));
        assert!(!is_at("disconnected:unix:/tmp/gdb.sock,server=on", path));
    }
}
