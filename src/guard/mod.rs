//! `defib guard`: stands beside a running VM, and when its kernel crashes carries out the way of one
//! crash through the house. The loop is here; one crash is in `crash.rs`, what is known of the guest in
//! `session.rs`, the folder on disk in `incident.rs`.

mod crash;
mod incident;
mod session;
mod watch;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use guest::{Control, FreshKind, Machine, Stop, StopReason};
use hv_hooks::qemu::{AttachOptions, Qemu};
use quarantine::{FreshWay, Policy, Strikes};
use serde_json::json;

pub use session::Session;

use crate::Outcome;
use crate::cli::GuardArguments;
use crate::events::Events;
use crate::signals::Ending;
use crate::target;
use watch::Watch;

/// How long the guard sleeps between two looks at a healthy guest. A crash wakes it at once.
const POLL: Duration = Duration::from_millis(100);
/// The same while code is still being decoded ahead of a crash, and how long one slice of that may take: a
/// crash has to wait for its end.
const WARM_POLL: Duration = Duration::from_millis(1);
const WARM_SLICE: Duration = Duration::from_millis(2);
/// How long decoding may take before the hooks are armed for the first time.
const WARM_FIRST: Duration = Duration::from_millis(400);

/// A guard at work.
struct Guard<'a> {
    arguments: &'a GuardArguments,
    policy: Policy,
    strikes: Strikes,
    events: Events,
    machine: Qemu,
    session: Session,
    watch: Watch,
    /// Incidents so far, and how many of them the guest did not survive.
    incidents: u32,
    lost: u32,
}

/// Runs `defib guard`.
///
/// # Errors
/// When the VM can't be attached to, or its kernel can't be understood.
pub fn run(arguments: &GuardArguments) -> Result<Outcome> {
    let ending = Ending::on_signals()?;
    let policy = policy(arguments.policy.as_deref())?;
    let events = Events::new(arguments.json);
    let mut guard = Guard::attach(arguments, policy, events)?;
    let result = guard.stand(&ending);
    guard.leave(result)
}

/// The policy in a file, or the defaults.
///
/// # Errors
/// When the file can't be read or says what no policy says.
pub fn policy(file: Option<&std::path::Path>) -> Result<Policy> {
    let Some(file) = file else { return Ok(Policy::default()) };
    let text = fs::read_to_string(file)
        .with_context(|| format!("cannot read policy {}", file.display()))?;
    Policy::parse(&text).with_context(|| format!("policy {}", file.display()))
}

impl<'a> Guard<'a> {
    fn attach(arguments: &'a GuardArguments, policy: Policy, events: Events) -> Result<Self> {
        let socket = target::qmp_socket(&arguments.target)?;
        let mut options = AttachOptions::new(&socket);
        options.gdb.clone_from(&arguments.gdb);
        options.fresh_order = fresh_order(&policy);
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
        let mut session = Session::begin(&machine, &arguments.knowledge)?;
        session.announce(&events)?;
        session.warm(machine.phys(), WARM_FIRST);
        let mut guard = Self {
            arguments,
            policy,
            strikes: Strikes::default(),
            events,
            machine,
            session,
            watch: Watch::default(),
            incidents: 0,
            lost: 0,
        };
        guard.arm()?;
        Ok(guard)
    }

    /// Arms the hooks with the guest standing for that moment.
    fn arm(&mut self) -> Result<()> {
        let hooks = self.session.hooks();
        self.standing(|machine| Ok(machine.hooks().context("no hooks")?.arm(&hooks)?))?;
        let places: Vec<_> = hooks.iter().map(|hook| hook.kind.function()).collect();
        let text = format!("armed: {}", places.join(", "));
        Ok(self.events.say("armed", json!({ "hooks": hooks }), &text)?)
    }

    /// Does `work` while the guest stands, and lets it run on if it ran.
    fn standing(&mut self, work: impl FnOnce(&mut Qemu) -> Result<()>) -> Result<()> {
        let ran = Control::is_running(&self.machine);
        if ran {
            Control::stop(&mut self.machine)?;
        }
        let result = work(&mut self.machine);
        if ran {
            Control::resume(&mut self.machine)?;
        }
        result
    }

    /// The loop: until somebody asks for the end or the VM is gone.
    fn stand(&mut self, ending: &Ending) -> Result<()> {
        while !ending.asked() {
            let warm = self.session.warm(self.machine.phys(), WARM_SLICE);
            match Control::wait(&mut self.machine, if warm { POLL } else { WARM_POLL })? {
                Some(stop) => {
                    if !self.on_stop(stop)? {
                        return Ok(());
                    }
                }
                None => self.on_quiet()?,
            }
            if self.arguments.once && self.incidents > 0 && self.watch.is_over() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What to do when the guest stands; `false` when there is nothing left to guard.
    fn on_stop(&mut self, stop: Stop) -> Result<bool> {
        match stop.reason {
            StopReason::Hook(hook) => self.on_crash(stop, hook).map(|()| true),
            StopReason::Reset => self.on_reset().map(|()| true),
            StopReason::Gone => {
                self.events.say("gone", json!({}), "the VM has ended")?;
                Ok(false)
            }
            // Somebody else's pause is theirs to end.
            _ => Ok(true),
        }
    }

    /// A guest that runs: follow its modules, look at its vital signs.
    fn on_quiet(&mut self) -> Result<()> {
        if self.watch.is_waiting_for_boot() {
            return self.try_again_after_reset();
        }
        if self.session.refresh_modules(self.machine.phys())? {
            self.session.announce_modules(&self.events)?;
        }
        self.look_after()
    }

    /// The guest was reset: all that is known of its memory is void until it has booted again.
    fn on_reset(&mut self) -> Result<()> {
        self.events.say("reset", json!({}), "the guest was reset; waiting until it has booted")?;
        // The machine stands, its hooks are off: the firmware may go on.
        Control::resume(&mut self.machine)?;
        self.watch.wait_for_boot();
        Ok(())
    }

    fn try_again_after_reset(&mut self) -> Result<()> {
        if !self.watch.is_time_to_look() {
            return Ok(());
        }
        let mut vcpus = Vec::new();
        self.standing(|machine| {
            vcpus = crash::all_registers(machine)?;
            Ok(())
        })?;
        let Ok(session) = self.session.begin_again(&self.machine, &vcpus) else { return Ok(()) };
        self.session = session;
        self.strikes.clear();
        self.watch.booted();
        self.session.announce(&self.events)?;
        self.arm()
    }

    fn leave(self, result: Result<()>) -> Result<Outcome> {
        let Self { machine, events, lost, incidents, .. } = self;
        let detached = machine.detach();
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
