//! The guard's thread: stopping, resuming, waiting for a stop, hooks, and running guest code under control. The rules
//! between threads are in `shared.rs`.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use guest::{
    Call, CallOutcome, Control, GuestVirt, Hook, Hooks, MachineError, Registers, Stop, StopReason,
    Vcpu,
};
use vm_memory::GuestMemoryBackend;

use super::shared::{CallEnding, Job, Place, RunningCall, Slot, StandsOn, State};
use super::{KvmMachine, of_kvm};
use crate::Error;
use crate::deadline::deadline;
use crate::debug_registers::{DEBUG_REGISTERS, lend};

impl<M: GuestMemoryBackend> Control for KvmMachine<M> {
    fn is_running(&self) -> bool {
        self.shared.lock().running
    }

    /// Waits at most a second. If a vCPU does not come until then, the others run on as before.
    fn stop(&mut self) -> Result<(), MachineError> {
        self.halt().map_err(of_kvm)
    }

    /// What was met but not reported yet comes first: the guest stands on until [`Control::wait`] has told it.
    fn resume(&mut self) -> Result<(), MachineError> {
        let mut state = self.shared.lock();
        state.running = true;
        if state.stops.is_empty() {
            self.shared.release(&mut state, |_, _| true);
        }
        Ok(())
    }

    /// When a vCPU met something but another does not come to a stop within a second, that is an error; the guest stands
    /// as far as it does, and the next call tries again.
    fn wait(&mut self, limit: Duration) -> Result<Option<Stop>, MachineError> {
        self.wait_until(deadline(limit)).map_err(of_kvm)
    }

    fn set_registers(&mut self, vcpu: Vcpu, regs: &Registers) -> Result<(), MachineError> {
        self.write_registers(vcpu, regs).map_err(of_kvm)
    }
}

impl<M: GuestMemoryBackend> Hooks for KvmMachine<M> {
    fn arm(&mut self, hooks: &[Hook]) -> Result<(), MachineError> {
        self.place(hooks).map_err(of_kvm)
    }

    /// Also while the guest runs, where it takes effect within a few microseconds.
    fn disarm(&mut self) -> Result<(), MachineError> {
        self.take_hooks_off().map_err(of_kvm)
    }
}

impl<M: GuestMemoryBackend> Call for KvmMachine<M> {
    /// The others run meanwhile; those that stand on a hook or can't go on stay where they are.
    fn run_until(
        &mut self,
        vcpu: Vcpu,
        regs: &Registers,
        end: GuestVirt,
        limit: Duration,
    ) -> Result<CallOutcome, MachineError> {
        let ending = self.call(vcpu, regs, end, limit).map_err(of_kvm)?;
        match ending {
            Some(CallEnding::Reached) => {
                Ok(CallOutcome::Reached(self.read_registers(vcpu).map_err(of_kvm)?))
            }
            Some(CallEnding::Crashed(hook)) => Ok(CallOutcome::Crashed(hook)),
            Some(CallEnding::Died(reason)) => Err(of_kvm(Error::CallCut(reason))),
            None => Err(MachineError::Timeout { what: "a call into the guest", after: limit }),
        }
    }

    fn run_others(&mut self, vcpu: Vcpu, limit: Duration) -> Result<bool, MachineError> {
        self.let_others_run(vcpu, deadline(limit)).map_err(of_kvm)
    }
}

impl<M: GuestMemoryBackend> KvmMachine<M> {
    pub(super) fn must_stand(&self, what: &'static str) -> Result<(), Error> {
        let state = self.shared.lock();
        match (state.ended, state.running) {
            (true, _) => Err(Error::Ended),
            (_, true) => Err(Error::Running(what)),
            _ => Ok(()),
        }
    }

    pub(super) fn read_registers(&self, vcpu: Vcpu) -> Result<Registers, Error> {
        self.must_stand("reading registers")?;
        let regs = self.shared.ask(vcpu, Job::Read)?;
        Ok(regs.map_or_else(Registers::unknown, |regs| *regs))
    }

    fn write_registers(&self, vcpu: Vcpu, regs: &Registers) -> Result<(), Error> {
        self.must_stand("setting registers")?;
        self.shared.ask(vcpu, Job::Write(Box::new(*regs)))?;
        if let Some(rip) = regs.rip() {
            self.shared.lock().moved(vcpu, rip);
        }
        Ok(())
    }

    fn place(&self, hooks: &[Hook]) -> Result<(), Error> {
        self.must_stand("arming hooks")?;
        if hooks.len() > DEBUG_REGISTERS {
            return Err(Error::TooManyHooks(hooks.len()));
        }
        self.shared.lock().set_hooks(hooks);
        let placed = self.program_all();
        if placed.is_err() {
            // Those that took the hooks give them up; a vCPU that fails again has none anyway.
            let _ = self.take_hooks_off();
        }
        placed
    }

    pub(super) fn take_hooks_off(&self) -> Result<(), Error> {
        let mut state = self.shared.lock();
        state.set_hooks(&[]);
        self.shared.refresh_running(&state);
        drop(state);
        self.program_all()
    }

    /// Every vCPU that stands takes over its breakpoints; tried for all of them. One that is about to run does so by
    /// itself, and only the guard's thread lets one run: what is held here stays parked.
    fn program_all(&self) -> Result<(), Error> {
        let mut done = Ok(());
        for vcpu in (0..self.shared.vcpu_count()).map(Vcpu) {
            if self.shared.lock().holds(vcpu) {
                done = done.and(self.shared.ask(vcpu, Job::Program).map(drop));
            }
        }
        done
    }

    /// Stops all vCPUs. What they meet in the same moment is for `wait`.
    pub(super) fn halt(&self) -> Result<(), Error> {
        let mut state = self.shared.lock();
        if state.ended {
            return Err(Error::Ended);
        }
        self.shared.halt(&mut state);
        let (mut state, stands) = self.shared.settle(state);
        match stands {
            Ok(()) => state.running = false,
            Err(_) if state.running && state.stops.is_empty() => {
                self.shared.release(&mut state, |_, _| true);
            }
            Err(_) => {}
        }
        stands
    }

    fn wait_until(&mut self, until: Instant) -> Result<Option<Stop>, Error> {
        let shared = std::sync::Arc::clone(&self.shared);
        let mut state = shared.lock();
        loop {
            if !state.ended && !state.stops.is_empty() {
                let (next, stands) = shared.settle(state);
                state = next;
                match stands {
                    Ok(()) => return self.next_stop(state),
                    Err(Error::Ended) => {}
                    Err(error) => return Err(error),
                }
            }
            if state.ended {
                state.running = false;
                let at = Instant::now();
                return Ok(Some(Stop { vcpu: Vcpu(0), reason: StopReason::Gone, at }));
            }
            let (next, in_time) = shared.wait_for_news(state, until);
            state = next;
            if !in_time {
                return Ok(None);
            }
        }
    }

    /// The oldest stop, of a machine that stands. After a reset the addresses of hooks mean nothing, nor does fresh
    /// memory.
    fn next_stop(&mut self, mut state: MutexGuard<'_, State>) -> Result<Option<Stop>, Error> {
        let Some(stop) = state.stops.pop_front() else { return Ok(None) };
        state.running = false;
        if stop.reason == StopReason::Reset {
            state.set_hooks(&[]);
            drop(state);
            let disarmed = self.program_all();
            self.ram.remove_all()?;
            disarmed?;
        }
        Ok(Some(stop))
    }

    /// `true` when another vCPU has met something that was not reported yet. Whatever comes of it, the guest stands.
    fn let_others_run(&self, vcpu: Vcpu, until: Instant) -> Result<bool, Error> {
        self.must_stand("letting other vCPUs run")?;
        let mut state = self.shared.lock();
        if state.stops.is_empty() {
            let may = |other, slot: &Slot| other != vcpu && !stays(slot.stands_on);
            self.shared.release(&mut state, may);
        }
        while state.stops.is_empty() && !state.ended {
            let (next, in_time) = self.shared.wait_for_news(state, until);
            state = next;
            if !in_time {
                break;
            }
        }
        self.shared.halt(&mut state);
        let (state, stands) = self.shared.settle(state);
        stands?;
        Ok(!state.stops.is_empty())
    }

    /// A call; `None` when the time is over. Whatever comes of it, the guest stands, and the call's end is no breakpoint
    /// any more.
    fn call(
        &self,
        vcpu: Vcpu,
        regs: &Registers,
        end: GuestVirt,
        limit: Duration,
    ) -> Result<Option<CallEnding>, Error> {
        self.must_stand("calling into the guest")?;
        self.write_registers(vcpu, regs)?;
        let ending = self.run_call(vcpu, end, limit);
        self.shared.lock().call = None;
        let unset = self.shared.ask(vcpu, Job::Program);
        let ending = ending?;
        unset?;
        Ok(ending)
    }

    /// Lets the guest run until the call is over one way or another, and stops it.
    fn run_call(
        &self,
        vcpu: Vcpu,
        end: GuestVirt,
        limit: Duration,
    ) -> Result<Option<CallEnding>, Error> {
        let until = deadline(limit);
        let mut state = self.shared.lock();
        let lent = lend(&state.hooks)?;
        state.stops.retain(|stop| stop.vcpu != vcpu || !matches!(stop.reason, StopReason::Hook(_)));
        // What concerns the whole machine ends a call before it begins.
        let cut = state.stops.iter().find(|stop| is_cut(stop, vcpu)).map(|stop| stop.reason);
        if let Some(reason) = cut {
            return Ok(Some(CallEnding::Died(reason)));
        }
        state.call = Some(RunningCall { vcpu, end, lent, outcome: None });
        drop(state);
        self.shared.ask(vcpu, Job::Program)?;

        let mut state = self.shared.lock();
        self.shared.release(&mut state, |index, slot| index == vcpu || !stays(slot.stands_on));
        let outcome = |state: &State| state.call.as_ref().and_then(|call| call.outcome);
        while outcome(&state).is_none() && !state.ended {
            let gone = state.slots.get(vcpu.0).is_none_or(|slot| slot.place == Place::Left);
            if gone {
                break;
            }
            let (next, in_time) = self.shared.wait_for_news(state, until);
            state = next;
            if !in_time {
                break;
            }
        }
        self.shared.halt(&mut state);
        let (state, stands) = self.shared.settle(state);
        stands?;
        if state.slots.get(vcpu.0).is_none_or(|slot| slot.place == Place::Left) {
            return Err(Error::VcpuGone(vcpu));
        }
        // If the vCPU got there while it was being stopped, that counts.
        Ok(outcome(&state))
    }
}

/// Whether a stop that was not reported yet makes a call on that vCPU pointless.
fn is_cut(stop: &Stop, vcpu: Vcpu) -> bool {
    match stop.reason {
        StopReason::Reset => true,
        StopReason::Hook(_) | StopReason::CallEnd => false,
        _ => stop.vcpu == vcpu,
    }
}

/// Whether a vCPU stays where it is during a call of another's: it would report again what it reported already.
fn stays(stands_on: Option<StandsOn>) -> bool {
    stands_on.is_some()
}
