//! `defib guard`: attaches to a running VM and stands guard over it. What a guard does is crate `guard`'s;
//! here are its arguments, its way out and its exit code.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use guard::{EventLines, Failed, Guard, Options, POLL};
use guest::{FreshKind, Machine};
use hv_hooks::qemu::{AttachOptions, Qemu};
use quarantine::{FreshWay, Policy};
use serde_json::json;

use crate::Outcome;
use crate::cli::GuardArguments;
use crate::knowledge;
use crate::signals::Ending;
use crate::target;

/// Runs `defib guard`.
///
/// # Errors
/// When the VM can't be attached to, or its kernel can't be understood.
pub fn run(arguments: &GuardArguments) -> Result<Outcome> {
    let ending = Ending::on_signals()?;
    let policy = policy(arguments.policy.as_deref())?;
    let events = EventLines::new(arguments.json);
    let machine = attach(arguments, &policy, &events)?;
    let options = Options {
        knowledge: knowledge::sources(&arguments.knowledge),
        policy,
        incidents: Some(arguments.incidents.clone()),
        dry_run: arguments.dry_run,
    };
    let mut guard = Guard::begin(machine, options, Box::new(events.clone()))
        .map_err(|Failed { error, .. }| error)?;
    come_first();
    let result = stand(&mut guard, &ending, arguments.once);
    leave(guard, result, &events)
}

/// A guest that has crashed must not wait until whatever else the host does makes room for its guard, which does nothing
/// most of the time: this thread comes first. Where that is not allowed, all stays as it was.
fn come_first() {
    const NICENESS: i32 = -10;
    // Linux takes no process for that of the calling thread: setpriority(2), "C library/kernel differences".
    let _ = rustix::process::setpriority_process(None, NICENESS);
}

/// The policy in a file, or the defaults.
///
/// # Errors
/// When the file can't be read or says what no policy says.
pub fn policy(file: Option<&Path>) -> Result<Policy> {
    let Some(file) = file else { return Ok(Policy::default()) };
    let text = fs::read_to_string(file)
        .with_context(|| format!("cannot read policy {}", file.display()))?;
    Policy::parse(&text).with_context(|| format!("policy {}", file.display()))
}

fn attach(arguments: &GuardArguments, policy: &Policy, events: &EventLines) -> Result<Qemu> {
    let socket = target::qmp_socket(&arguments.target)?;
    let mut options = AttachOptions::new(&socket);
    options.gdb.clone_from(&arguments.gdb);
    options.fresh_order = fresh_order(policy);
    let machine = Qemu::attach(options)
        .with_context(|| format!("cannot guard the VM behind {}", socket.display()))?;
    let attached = json!({
        "qmp": socket, "pid": machine.pid(), "qemu": version(&machine),
        "vcpus": machine.vcpu_count(), "ram_mapped": machine.memory_is_mapped(),
        "recovered": machine.recovered(),
    });
    let text = format!(
        "attached to QEMU {} (pid {}, {} vCPUs){}",
        version(&machine),
        machine.pid(),
        machine.vcpu_count(),
        if machine.recovered() { "; cleaned up after a guard that was killed" } else { "" },
    );
    events.say("attached", attached, &text)?;
    Ok(machine)
}

/// Until somebody asks for the end, the VM is gone or, with `once`, an incident is over.
fn stand(guard: &mut Guard<Qemu>, ending: &Ending, once: bool) -> Result<(), guard::Error> {
    while !ending.asked() && guard.step(POLL)? {
        if once && guard.incidents() > 0 && guard.is_settled() {
            break;
        }
    }
    Ok(())
}

fn leave(
    guard: Guard<Qemu>,
    result: Result<(), guard::Error>,
    events: &EventLines,
) -> Result<Outcome> {
    let (incidents, lost) = (guard.incidents(), guard.lost());
    let detached = guard.into_machine().detach();
    result?;
    match detached {
        Ok(()) => {}
        Err(hv_hooks::Error::Gone) => {}
        Err(error) => return Err(error).context("cannot detach"),
    }
    let text = format!("detached after {incidents} incidents, {lost} of them not survived");
    events.say("detached", json!({ "incidents": incidents, "lost": lost }), &text)?;
    Ok(if lost == 0 { Outcome::Done } else { Outcome::NotSaved })
}

/// The policy's ways to fresh memory, as machines name them.
fn fresh_order(policy: &Policy) -> Vec<FreshKind> {
    let kind = |way: &FreshWay| match way {
        FreshWay::HotAdd => Some(FreshKind::HotAdded),
        FreshWay::FirmwareTail => Some(FreshKind::FirmwareTail),
        _ => None,
    };
    policy.fresh_memory.iter().filter_map(kind).collect()
}

fn version(machine: &Qemu) -> String {
    let [major, minor, micro] = machine.version();
    format!("{major}.{minor}.{micro}")
}
