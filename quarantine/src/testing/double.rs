//! A machine double that can fail on demand: fresh memory, and guest calls that only do what the
//! mailbox and the counts show. No test itself.

use std::time::Duration;

use guest::fake::FakeMachine;
use guest::{
    AddressSpace, Call, CallOutcome, Control, FreshKind, FreshMemory, FreshRegion, GuestPhys,
    GuestVirt, Hook, HookKind, Machine, MachineError, MemoryError, PhysMemory, Registers, Stop,
    Vcpu, VirtMemory, WriteMemory,
};

use super::{PREEMPT_COUNT, TEXT};

/// Guest-physical address of fresh memory; all else is the guest's own.
pub(crate) const WATCHED: u64 = 0x40_0000;
/// The mailbox as the payload's source documents it.
const MAILBOX: u64 = 0x1000;
const COUNT: u64 = 0x0c;
const DONE: u64 = 0x18;
const STARTED: u64 = 0x1c;
const ENTRIES: u64 = 0x40;
const ENTRY: u64 = 0x48;
const RESULT: u64 = 0x38;
const STATUS: u64 = 0x40;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fail {
    /// Adding fresh memory.
    AddFresh,
    /// Running, before the first call.
    Run,
    /// Writing code above `WATCHED`.
    LoadCode,
    /// The write with this number, from 0.
    Write(u32),
    /// Call with this index crashes.
    CrashInCall(u32),
    /// Time runs out after so many calls.
    StopAfterCall(u32),
    /// Setting registers, except to restore them.
    Registers,
    /// Another vCPU meets a hook when the others run.
    OtherCrash,
    /// None: after so many turns of the others, the 32-bit word there is 0.
    LockGivenBack { after: usize, at: GuestVirt },
}

/// The double.
pub(crate) struct Double {
    pub(crate) machine: FakeMachine,
    pub(crate) fresh: Option<FreshRegion>,
    /// How often the other vCPUs ran.
    pub(crate) turns: usize,
    fail: Option<Fail>,
    writes: u32,
    vcpus: usize,
}

impl Double {
    pub(crate) fn new(machine: FakeMachine, fail: Option<Fail>) -> Self {
        Self { machine, fresh: None, turns: 0, fail, writes: 0, vcpus: 1 }
    }

    pub(crate) fn with_vcpus(mut self, vcpus: usize) -> Self {
        self.vcpus = vcpus;
        self
    }

    fn fails(&mut self, fail: Fail) -> bool {
        let fails = self.fail == Some(fail);
        if fails {
            self.fail = None;
        }
        fails
    }

    fn put(&mut self, at: GuestPhys, value: u32) {
        self.machine.poke(at, &value.to_le_bytes());
    }

    fn word(&self, at: GuestPhys) -> u32 {
        self.machine.memory().read_u64(at).expect("RAM") as u32
    }

    /// What the called function does to the guest: a spinlock's release lowers the preempt count.
    fn effect(&mut self, function: GuestVirt) {
        if function == TEXT + 4 * 0x40 {
            let space =
                AddressSpace::new(self.machine.memory(), self.machine.space().root(), false);
            let count = space.read_u32(PREEMPT_COUNT).expect("mapped");
            self.machine.poke_virt(PREEMPT_COUNT, &(count - 1).to_le_bytes());
        }
    }
}

fn timeout() -> MachineError {
    MachineError::Timeout { what: "test", after: Duration::from_millis(1) }
}

impl Machine for Double {
    fn phys(&self) -> &dyn PhysMemory {
        self.machine.memory()
    }

    fn vcpu_count(&self) -> usize {
        self.vcpus
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        self.machine.registers(vcpu)
    }

    fn control(&mut self) -> Option<&mut dyn Control> {
        Some(self)
    }

    fn writer(&mut self) -> Option<&mut dyn WriteMemory> {
        Some(self)
    }

    fn fresh_memory(&mut self) -> Option<&mut dyn FreshMemory> {
        Some(self)
    }

    fn caller(&mut self) -> Option<&mut dyn Call> {
        Some(self)
    }
}

impl Control for Double {
    fn is_running(&self) -> bool {
        false
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn wait(&mut self, _limit: Duration) -> Result<Option<Stop>, MachineError> {
        Ok(None)
    }

    fn set_registers(&mut self, vcpu: Vcpu, regs: &Registers) -> Result<(), MachineError> {
        if self.fails(Fail::Registers) {
            return Err(MachineError::Gone);
        }
        self.machine.set_registers(vcpu, regs)
    }
}

impl WriteMemory for Double {
    fn write(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError> {
        self.writes += 1;
        if self.fails(Fail::Write(self.writes - 1)) {
            return Err(MemoryError::NotRam { at, len: bytes.len() });
        }
        self.machine.write(at, bytes)
    }

    fn write_code(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MachineError> {
        if at.0 >= WATCHED && self.fails(Fail::LoadCode) {
            return Err(MachineError::Gone);
        }
        self.machine.write_code(at, bytes)
    }
}

impl FreshMemory for Double {
    fn add(&mut self, size: u64) -> Result<FreshRegion, MachineError> {
        if self.fails(Fail::AddFresh) {
            return Err(timeout());
        }
        let region = FreshRegion { at: GuestPhys(WATCHED), size, kind: FreshKind::HotAdded };
        self.fresh = Some(region);
        Ok(region)
    }

    fn remove(&mut self, _region: FreshRegion) -> Result<(), MachineError> {
        self.fresh = None;
        Ok(())
    }
}

impl Call for Double {
    fn run_until(
        &mut self,
        vcpu: Vcpu,
        regs: &Registers,
        _end: GuestVirt,
        _limit: Duration,
    ) -> Result<CallOutcome, MachineError> {
        self.machine.set_registers(vcpu, regs)?;
        if self.fails(Fail::Run) {
            return Err(timeout());
        }
        let mailbox = GuestPhys(WATCHED + MAILBOX);
        for index in 0..self.word(mailbox + COUNT) {
            let entry = mailbox + ENTRIES + u64::from(index) * ENTRY;
            self.put(mailbox + STARTED, index + 1);
            self.put(entry + STATUS, 1);
            if self.fails(Fail::CrashInCall(index)) {
                let hook = Hook { kind: HookKind::OopsBegin, at: TEXT };
                return Ok(CallOutcome::Crashed(hook));
            }
            let function = GuestVirt(self.machine.memory().read_u64(entry).expect("RAM"));
            self.effect(function);
            self.put(entry + RESULT, 0);
            self.put(entry + STATUS, 2);
            self.put(mailbox + DONE, index + 1);
            if self.fails(Fail::StopAfterCall(index + 1)) {
                return Err(timeout());
            }
        }
        Ok(CallOutcome::Reached(self.machine.registers(vcpu)?))
    }

    fn run_others(&mut self, _vcpu: Vcpu, _limit: Duration) -> Result<bool, MachineError> {
        self.turns += 1;
        if let Some(Fail::LockGivenBack { after, at }) = self.fail
            && self.turns >= after
        {
            self.machine.poke_virt(at, &[0; 4]);
        }
        Ok(self.fails(Fail::OtherCrash))
    }
}
