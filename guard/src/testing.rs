//! A toy kernel in a machine that plays a script of stops, and an observer that remembers: for the tests of
//! this crate. Layouts are this file's own and unlike any real kernel's. No test itself.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guest::fake::{FakeMachine, PageSize};
use guest::{
    Control, GuestPhys, GuestVirt, Hook, HookKind, Hooks, LinkAddr, Machine, MachineError,
    MemoryError, PhysMemory, Reg, Registers, Stop, StopReason, Vcpu, WriteMemory,
};
use repair_image::{
    KernelFacts, KernelText, Knowledge, KnowledgeParts, Member, Prototype, SymbolKind, TypeShape,
    Types,
};
use serde_json::Value;

use crate::knowledge::{self, Kernel, Learned};
use crate::session::Session;
use crate::{Error, Failed, Guard, KnowledgeSources, Observer, Options};

/// RAM, bytes.
const RAM: u64 = 4 << 20;
/// Where the kernel lies, guest-physical, and where it is linked and runs.
const TEXT_PHYS: u64 = 2 << 20;
const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Linux maps its image from here on.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Offsets from the start of text.
const DATA: u64 = 0x1000;
const BANNER: u64 = DATA;
const PHYS_BASE: u64 = DATA + 0x100;
const MODULES: u64 = DATA + 0x200;
const SYSTEM_STATE: u64 = DATA + 0x300;
/// `SYSTEM_RUNNING` here.
const RUNNING: u32 = 7;

#[derive(Debug)]
struct ToyTypes;

impl Types for ToyTypes {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let place = match (structure, path) {
            ("module", "name") => (0x40, 56),
            ("module", "list") => (0x10, 16),
            ("module", "state") => (0x20, 4),
            ("module", "taints") => (0x28, 8),
            ("module", "core_layout") => (0x80, 24),
            ("module", "init_layout") => (0xa0, 24),
            ("module_layout", "base") => (8, 8),
            ("module_layout", "size") => (0, 4),
            ("module_layout", "text_size") => (4, 4),
            ("list_head", "next") => (8, 8),
            _ => return None,
        };
        let (offset, size) = place;
        Some(Member { offset, size, bits: None, shape: TypeShape::Other })
    }

    fn size_of(&self, _name: &str) -> Option<u64> {
        None
    }

    fn enumerator(&self, name: &str) -> Option<i64> {
        (name == "SYSTEM_RUNNING").then_some(i64::from(RUNNING))
    }

    fn prototype(&self, _function: &str) -> Option<Prototype> {
        None
    }

    fn member_prototype(&self, _structure: &str, _path: &str) -> Option<Prototype> {
        None
    }
}

fn kernel(machine: &FakeMachine) -> Kernel {
    let root = machine.space().root().0 - TEXT_PHYS;
    let hooks = HookKind::ALL.into_iter().map(|kind| (kind.function(), hook(kind).at.0 - TEXT));
    let places = [
        ("_text", 0),
        ("_stext", 0),
        ("_etext", DATA),
        ("linux_banner", BANNER),
        ("phys_base", PHYS_BASE),
        ("modules", MODULES),
        ("system_state", SYSTEM_STATE),
        ("init_top_pgt", root),
    ];
    let symbol = |(name, offset): (&str, u64)| {
        (name.to_owned(), LinkAddr(TEXT + offset), 0x40, SymbolKind::Function)
    };
    let symbols = places.into_iter().chain(hooks).map(symbol).collect();
    let knowledge = Arc::new(Knowledge::new(KnowledgeParts { symbols, ..Default::default() }));
    let facts = KernelFacts { knowledge, types: Arc::new(ToyTypes), btf: None, build_id: None };
    Kernel { facts, layer: None, origin: "a test".into() }
}

/// A hook of the toy kernel.
pub(crate) fn hook(kind: HookKind) -> Hook {
    let index = HookKind::ALL.iter().position(|other| *other == kind).unwrap_or(0) as u64;
    Hook { kind, at: GuestVirt(TEXT + 0x100 + index * 0x40) }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Hooks can't be taken off.
    Disarm,
    /// The guard's own code panics while it reads registers.
    Panic,
}

/// The machine: runs, stops as its script says, and counts what is done to it.
pub(crate) struct Scripted {
    pub(crate) machine: FakeMachine,
    pub(crate) script: VecDeque<StopReason>,
    pub(crate) running: bool,
    pub(crate) armed: Vec<Hook>,
    pub(crate) resumes: u32,
    pub(crate) writes: u32,
    pub(crate) fault: Option<Fault>,
}

impl Scripted {
    /// A machine whose toy kernel has booted.
    pub(crate) fn new() -> Self {
        let mut machine = FakeMachine::new(RAM, false);
        for page in 0..2 {
            let at = page * 4096;
            machine.map(GuestVirt(TEXT + at), GuestPhys(TEXT_PHYS + at), PageSize::Size4K);
        }
        let root = machine.space().root().0;
        *machine.registers_mut() = Registers::unknown()
            .with(Reg::Cr0, 0x8005_0033)
            .with(Reg::Cr3, root)
            .with(Reg::Cr4, 0x20)
            .with(Reg::Efer, 0xd01)
            .with(Reg::Rip, hook(HookKind::OopsBegin).at.0)
            .with(Reg::Rsp, TEXT + DATA + 0x800);
        let (script, armed) = (VecDeque::new(), Vec::new());
        let mut scripted =
            Self { machine, script, running: true, armed, resumes: 0, writes: 0, fault: None };
        scripted.boot();
        scripted
    }

    /// Puts the kernel into memory, as after a boot.
    pub(crate) fn boot(&mut self) {
        let mut poke =
            |offset: u64, bytes: &[u8]| self.machine.poke(GuestPhys(TEXT_PHYS + offset), bytes);
        poke(BANNER, b"Linux version 9.9.9 (toy)\n\0");
        let phys_base = TEXT_PHYS.wrapping_sub(TEXT - KERNEL_MAP);
        poke(PHYS_BASE, &phys_base.to_le_bytes());
        // The list of modules is empty: its head points to itself.
        poke(MODULES + 8, &(TEXT + MODULES).to_le_bytes());
        poke(SYSTEM_STATE, &RUNNING.to_le_bytes());
    }

    /// A kernel with sleeping spinlocks.
    pub(crate) fn is_real_time(&mut self) {
        let banner = b"Linux version 9.9.9 (toy) #1 SMP PREEMPT_RT toy\n\0";
        self.machine.poke(GuestPhys(TEXT_PHYS + BANNER), banner);
    }

    /// A kernel that has not started user space yet.
    pub(crate) fn still_boots(&mut self) {
        self.machine.poke(GuestPhys(TEXT_PHYS + SYSTEM_STATE), &[1, 0, 0, 0]);
    }

    /// A guest whose memory was wiped.
    pub(crate) fn wipe(&mut self) {
        self.machine.poke(GuestPhys(TEXT_PHYS), &[0; 0x2000]);
    }

    pub(crate) fn set(&mut self, reg: Reg, value: u64) {
        self.machine.registers_mut().set(reg, value);
    }
}

impl Machine for Scripted {
    fn phys(&self) -> &dyn PhysMemory {
        self.machine.memory()
    }

    fn vcpu_count(&self) -> usize {
        1
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        assert_ne!(self.fault, Some(Fault::Panic), "a defect of the guard's, played");
        self.machine.registers(vcpu)
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
}

impl Control for Scripted {
    fn is_running(&self) -> bool {
        self.running
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.running = true;
        self.resumes += 1;
        Ok(())
    }

    fn wait(&mut self, _limit: Duration) -> Result<Option<Stop>, MachineError> {
        let Some(reason) = self.script.pop_front() else { return Ok(None) };
        self.running = false;
        Ok(Some(Stop { vcpu: Vcpu(0), reason, at: Instant::now() }))
    }

    fn set_registers(&mut self, _: Vcpu, _: &Registers) -> Result<(), MachineError> {
        self.writes += 1;
        Ok(())
    }
}

impl WriteMemory for Scripted {
    fn write(&mut self, _: GuestPhys, _: &[u8]) -> Result<(), MemoryError> {
        self.writes += 1;
        Ok(())
    }

    fn write_code(&mut self, _: GuestPhys, _: &[u8]) -> Result<(), MachineError> {
        self.writes += 1;
        Ok(())
    }
}

impl Hooks for Scripted {
    fn arm(&mut self, hooks: &[Hook]) -> Result<(), MachineError> {
        assert!(!self.running, "armed while the guest runs");
        self.armed = hooks.to_vec();
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), MachineError> {
        assert!(!self.running, "disarmed while the guest runs");
        if self.fault == Some(Fault::Disarm) {
            self.fault = None;
            return Err(MachineError::Gone);
        }
        self.armed.clear();
        Ok(())
    }
}

/// Remembers events; refuses the one whose name it was given.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    events: Arc<Mutex<Vec<(String, Value)>>>,
    refused: Option<&'static str>,
}

impl Memory {
    pub(crate) fn refusing(event: &'static str) -> Self {
        Self { refused: Some(event), ..Self::default() }
    }

    /// Names of the events so far, after which they are forgotten.
    pub(crate) fn names(&self) -> Vec<String> {
        self.events.lock().unwrap().drain(..).map(|(name, _)| name).collect()
    }

    /// Fields of the last event of that name.
    pub(crate) fn last(&self, event: &str) -> Value {
        let events = self.events.lock().unwrap();
        let last = events.iter().rev().find(|(name, _)| name == event);
        last.map(|(_, fields)| fields.clone()).unwrap_or_default()
    }
}

impl Observer for Memory {
    fn event(&mut self, event: &str, fields: Value, _text: &str) -> io::Result<()> {
        if self.refused == Some(event) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.events.lock().unwrap().push((event.to_owned(), fields));
        Ok(())
    }
}

/// A guard that begins with the toy kernel.
#[allow(clippy::result_large_err, reason = "as `Guard::begin`: the machine is given back")]
pub(crate) fn begin(
    machine: Scripted,
    incidents: Option<&Path>,
    memory: &Memory,
) -> Result<Guard<Scripted>, Failed<Scripted>> {
    let options = Options { incidents: incidents.map(Path::to_owned), ..Options::default() };
    match session(&machine) {
        Ok(session) => Guard::begin_with(machine, session, options, Box::new(memory.clone())),
        Err(error) => Err(Failed { machine, error }),
    }
}

/// Knowledge of the toy kernel as it stands.
pub(crate) fn session(machine: &Scripted) -> Result<Session, Error> {
    let Learned { kernel, layer, taken } =
        knowledge::take(machine.phys(), kernel(&machine.machine), &[], KernelText::Kept)?;
    Session::with(Learned { kernel, layer, taken }, KnowledgeSources::default())
}

/// A guard at work whose beginning is forgotten.
pub(crate) fn at_work(memory: &Memory) -> Guard<Scripted> {
    let guard = begin(Scripted::new(), None, memory).map_err(|failed| failed.error).unwrap();
    assert_eq!(memory.names(), ["image", "armed"]);
    guard
}

/// A task that sleeps uninterruptibly.
pub(crate) fn sleeper(task: GuestVirt) -> diagnose::asleep::Sleeper {
    let position = diagnose::tasks::TaskPosition {
        task,
        pid: 1,
        tgid: 1,
        comm: String::new(),
        on_cpu: None,
        state: 2,
        sp: task,
    };
    diagnose::asleep::Sleeper { position, switches: 0, ran_at: 0 }
}
