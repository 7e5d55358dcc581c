//! QEMU as a machine: QMP for the machine's state, the gdb stub for its vCPUs, and its RAM on the host.
//! For QEMU 7.2 (Debian 12) to 10.0 (its backports). Here: the type and the abilities that are calls into
//! one part each; `control.rs` has those that wait.

use std::collections::VecDeque;
use std::time::Duration;

use guest::{
    Call, Control, FreshKind, FreshMemory, FreshRegion, GuestPhys, Hook, Hooks, Machine,
    MachineError, MemoryError, PhysMemory, Reg, Registers, Stop, Vcpu, WriteMemory,
};
use serde_json::{Value, json};

mod attach;
mod breakpoints;
mod control;
mod firmware_tail;
mod fresh;
pub mod hmp;
mod hotplug;
mod process;
pub mod qmp;
mod ram;
pub mod rsp;
mod rundir;
mod socket;
mod stub;
pub mod target_xml;

pub use attach::AttachOptions;
pub use hmp::{CpuTables, Table};
pub use qmp::Event;

use breakpoints::HookPlacement;
use fresh::Fresh;
use process::Process;
use qmp::Qmp;
use ram::GuestRam;
use rundir::RunDir;
use stub::Stub;

use crate::Error;

/// Events kept for [`Qemu::take_events`]; the oldest go first.
const MAX_EVENTS: usize = 1024;

/// A VM of QEMU's that is attached to.
///
/// Detaches when it is dropped: hooks and fresh memory are removed, the gdb stub that was switched on is
/// switched off, and the VM runs.
pub struct Qemu {
    qmp: Qmp,
    stub: Stub,
    ram: GuestRam,
    placement: Box<dyn HookPlacement>,
    fresh: Fresh,
    process: Process,
    /// `None` when the owner's stub is used, which stays on.
    own_stub: Option<RunDir>,
    /// The lock when the owner's stub is used.
    _lock: Option<RunDir>,
    /// For each vCPU the hook it was reported at, while it stands there.
    at_hook: Vec<Option<Hook>>,
    /// A stop that was met on the way and not reported yet.
    pending: Option<Stop>,
    events: VecDeque<Event>,
    recovered: bool,
    /// QEMU translates code (TCG) and must be told when code changes.
    translates: bool,
    attach_pause: Duration,
    attached: bool,
}

impl Qemu {
    /// Attaches to a VM. It is paused for a few milliseconds, and runs afterwards unless it was taken over
    /// while it stood.
    ///
    /// # Errors
    /// Anything that makes the VM unfit to be watched; it is then left as it was found.
    pub fn attach(options: AttachOptions) -> Result<Self, Error> {
        attach::attach(options)
    }

    /// QEMU's version: major, minor, micro.
    #[must_use]
    pub fn version(&self) -> [u64; 3] {
        self.qmp.version()
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Whether all of guest RAM is mapped here; if not, each access is a system call.
    #[must_use]
    pub fn memory_is_mapped(&self) -> bool {
        self.ram.is_mapped()
    }

    /// Whether the leftovers of a guard that was killed were found and cleaned up while attaching.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// How long the guest stood while it was attached to, at most; zero when it was not running before.
    #[must_use]
    pub fn attach_pause(&self) -> Duration {
        self.attach_pause
    }

    /// Descriptor tables of a vCPU, and whether it sleeps. Also while the guest runs.
    ///
    /// # Errors
    /// No such vCPU, or QEMU's answer is not understood.
    pub fn cpu_tables(&mut self, vcpu: Vcpu) -> Result<CpuTables, Error> {
        if vcpu.0 >= self.stub.vcpu_count() {
            return Err(Error::NoSuchVcpu(vcpu));
        }
        let arguments = json!({ "command-line": "info registers", "cpu-index": vcpu.0 });
        let text = qmp::hmp_text(
            self.qmp.execute("human-monitor-command", arguments)?,
            "HMP info registers",
        )?;
        hmp::parse_tables(&text).ok_or_else(|| Error::answer("HMP info registers", text))
    }

    /// Compares control registers as the stub and the monitor tell them: a register file that was understood
    /// wrongly would do harm when registers are written.
    fn check_register_file(&mut self) -> Result<(), Error> {
        let text = self.stub.monitor(&["info registers".into()])?.concat();
        let regs = self.stub.registers(Vcpu(0))?;
        let pairs = [(Reg::Cr0, "CR0"), (Reg::Cr3, "CR3"), (Reg::Cr4, "CR4"), (Reg::Efer, "EFER")];
        match pairs
            .into_iter()
            .find(|(reg, name)| regs.get(*reg) != hmp::parse_register(&text, name))
        {
            Some((reg, _)) => Err(Error::RegisterFile(reg.name())),
            None => Ok(()),
        }
    }

    /// The events that QEMU has sent since this was last called, oldest first: `GUEST_PANICKED`,
    /// `WATCHDOG` and any other.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn take_events(&mut self) -> Result<Vec<Event>, Error> {
        self.qmp.read_events()?;
        // Those that matter to `wait` are looked at there; all pass through `self.events`.
        self.pending = self.pending.take().or(self.look_at_events()?);
        Ok(self.events.drain(..).collect())
    }

    /// Runs a QMP command.
    ///
    /// # Errors
    /// QEMU refuses it, or the connection is lost.
    pub fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        self.qmp.execute(command, arguments)
    }

    /// Takes hooks and fresh memory away, lets the VM run, and leaves it.
    ///
    /// # Errors
    /// When the VM is gone or something of ours could not be removed; the rest has been tried.
    pub fn detach(mut self) -> Result<(), Error> {
        self.leave()
    }

    fn leave(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.attached) {
            return Ok(());
        }
        let stopped = if self.stub.running() { self.stub.interrupt().map(drop) } else { Ok(()) };
        let disarmed = self.placement.disarm(&mut self.stub);
        let regions = self.fresh.regions();
        let removed = regions.into_iter().try_for_each(|region| self.remove_fresh(region));
        let left = self.stub.detach();
        let off = match self.own_stub.take() {
            Some(_) => self.qmp.hmp("gdbserver none").map(drop),
            None => Ok(()),
        };
        stopped.and(disarmed).and(removed).and(left).and(off)
    }

    fn remove_fresh(&mut self, region: FreshRegion) -> Result<(), Error> {
        self.fresh.remove(&mut self.stub, &mut self.ram, region)
    }

    fn must_stand(&self, what: &'static str) -> Result<(), Error> {
        if self.stub.running() { Err(Error::Running(what)) } else { Ok(()) }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // A VM that is gone needs nothing; any other failure was the last try.
        let _ = self.leave();
    }
}

impl Machine for Qemu {
    fn phys(&self) -> &dyn PhysMemory {
        &self.ram
    }

    fn vcpu_count(&self) -> usize {
        self.stub.vcpu_count()
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        Ok(self.stub.registers(vcpu)?)
    }

    fn control(&mut self) -> Option<&mut dyn Control> {
        Some(self)
    }

    fn writer(&mut self) -> Option<&mut dyn WriteMemory> {
        Some(self)
    }

    fn hooks(&mut self) -> Option<&mut dyn Hooks> {
        Some(self)
    }

    fn fresh_memory(&mut self) -> Option<&mut dyn FreshMemory> {
        Some(self)
    }

    fn second_view(&self) -> Option<Box<dyn PhysMemory + Send>> {
        Some(Box::new(self.ram.clone()))
    }

    fn caller(&mut self) -> Option<&mut dyn Call> {
        Some(self)
    }
}

impl WriteMemory for Qemu {
    fn write(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError> {
        self.ram.write(at, bytes)
    }

    /// Under TCG through the stub, which pauses a guest that runs; 1 ms for 4 KiB. Else as data.
    fn write_code(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MachineError> {
        if !self.translates || self.fresh.may_bypass(at, bytes) {
            return Ok(self.ram.write(at, bytes)?);
        }
        // The stub writes what it can and ignores the rest, so the range is checked here.
        self.ram.check_writable(at, bytes.len())?;
        let ran = self.stub.running();
        self.stop()?;
        let written = self.stub.write_memory(at, bytes);
        if ran {
            self.resume()?;
        }
        Ok(written?)
    }
}

impl Hooks for Qemu {
    fn arm(&mut self, hooks: &[Hook]) -> Result<(), MachineError> {
        self.must_stand("arming hooks")?;
        self.at_hook.fill(None);
        self.fresh.find_ports(&mut self.stub)?;
        Ok(self.placement.arm(&mut self.stub, hooks)?)
    }

    fn disarm(&mut self) -> Result<(), MachineError> {
        self.must_stand("disarming hooks")?;
        self.at_hook.fill(None);
        Ok(self.placement.disarm(&mut self.stub)?)
    }
}

impl FreshMemory for Qemu {
    fn add(&mut self, size: u64) -> Result<FreshRegion, MachineError> {
        self.must_stand("adding fresh memory")?;
        Ok(self.fresh.add(&mut self.stub, &mut self.ram, size)?)
    }

    fn remove(&mut self, region: FreshRegion) -> Result<(), MachineError> {
        self.must_stand("removing fresh memory")?;
        Ok(self.remove_fresh(region)?)
    }
}

/// The order in which fresh memory is looked for if nothing else is said. Plugging a module in and out takes
/// milliseconds, the firmware's memory nothing.
fn default_order() -> Vec<FreshKind> {
    vec![FreshKind::FirmwareTail, FreshKind::HotAdded]
}
