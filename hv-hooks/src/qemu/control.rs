//! Stopping, resuming, waiting for a stop and running guest code under control: what a stop means, and which
//! vCPU may run when.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use guest::{
    Call, CallOutcome, Control, GuestVirt, Hook, MachineError, Reg, Registers, Stop, StopReason,
    Vcpu,
};
use serde_json::Value;

use super::breakpoints::{clear, set};
use super::qmp::Event;
use super::rsp::{SIGNAL_TRAP, StopReply};
use super::socket::wait_readable;
use super::{MAX_EVENTS, Qemu};
use crate::Error;
use crate::deadline::deadline;

/// gdb's number for "quit", which QEMU's stub uses for a machine that was shut down.
const SIGNAL_QUIT: u8 = 3;
/// Stops on the way of one call that are somebody else's, before it is given up.
const MAX_DETOURS: usize = 10_000;

impl Control for Qemu {
    fn is_running(&self) -> bool {
        self.stub.running()
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(self.halt()?)
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        if self.stub.running() {
            return Ok(());
        }
        // A vCPU whose hook was not reported yet still stands on it and reports it again.
        self.pending =
            self.pending.take().filter(|stop| !matches!(stop.reason, StopReason::Hook(_)));
        for index in 0..self.at_hook.len() {
            self.pass_hook(Vcpu(index))?;
        }
        self.stub.run(&[], &[])?;
        Ok(())
    }

    fn wait(&mut self, limit: Duration) -> Result<Option<Stop>, MachineError> {
        match self.wait_until(deadline(limit)) {
            Err(Error::Gone) => Ok(Some(stop_now(Vcpu(0), StopReason::Gone))),
            other => Ok(other?),
        }
    }

    fn set_registers(&mut self, vcpu: Vcpu, regs: &Registers) -> Result<(), MachineError> {
        Ok(self.stub.set_registers(vcpu, regs)?)
    }
}

impl Call for Qemu {
    fn run_until(
        &mut self,
        vcpu: Vcpu,
        regs: &Registers,
        end: GuestVirt,
        limit: Duration,
    ) -> Result<CallOutcome, MachineError> {
        let lent = self.lend_breakpoint()?;
        let outcome = self.call(vcpu, regs, end, limit);
        if let Some(hook) = lent {
            self.stub.order(&[set(hook.at)])?;
        }
        outcome
    }

    fn run_others(&mut self, vcpu: Vcpu, limit: Duration) -> Result<bool, MachineError> {
        Ok(self.let_others_run(vcpu, deadline(limit))?)
    }
}

/// A call under way.
struct RunningCall {
    vcpu: Vcpu,
    end: GuestVirt,
    /// The vCPUs that stand meanwhile.
    held: Vec<Vcpu>,
}

/// A stop that is known from something else than the stub's report.
fn stop_now(vcpu: Vcpu, reason: StopReason) -> Stop {
    Stop { vcpu, reason, at: Instant::now() }
}

impl Qemu {
    /// Under KVM a breakpoint is a debug register, and hooks may have all of them: one gives way to a call's
    /// end, if need be.
    fn lend_breakpoint(&mut self) -> Result<Option<Hook>, Error> {
        let lent = if self.translates { None } else { self.placement.lend()? };
        if let Some(hook) = lent {
            self.stub.order(&[clear(hook.at)])?;
        }
        Ok(lent)
    }

    fn call(
        &mut self,
        vcpu: Vcpu,
        regs: &Registers,
        end: GuestVirt,
        limit: Duration,
    ) -> Result<CallOutcome, MachineError> {
        let mut first = self.stub.register_writes(vcpu, regs)?;
        // Those that stand on a hook of their own would report it at once, again and again.
        let mut held = self.standing_on_hooks()?;
        if held.contains(&vcpu) {
            held.retain(|&other| other != vcpu);
            self.stub.order(&first)?;
            first.clear();
            self.pass_hook(vcpu)?;
        }
        // The others run, and what they meet next is news.
        for (index, slot) in self.at_hook.iter_mut().enumerate() {
            *slot = slot.filter(|_| index == vcpu.0 || held.contains(&Vcpu(index)));
        }
        first.push(set(end));
        let mut call = RunningCall { vcpu, end, held };
        let until = deadline(limit);
        let after = limit;
        self.stub.run(&first, &call.held)?;
        for _ in 0..MAX_DETOURS {
            let Some((reply, at)) = self.stub.receive_stop(until)? else {
                return self.abandon(&call, after);
            };
            if let Some(outcome) = self.at_stop(&mut call, reply, at)? {
                return Ok(outcome);
            }
            self.stub.run(&[], &call.held)?;
        }
        self.abandon(&call, after)
    }

    /// `true` when another vCPU stands on a hook, now or from before.
    fn let_others_run(&mut self, vcpu: Vcpu, until: Instant) -> Result<bool, Error> {
        let mut held = self.standing_on_hooks()?;
        if held.iter().any(|&other| other != vcpu) {
            return Ok(true);
        }
        held = vec![vcpu];
        if held.len() == self.at_hook.len() {
            return Ok(false);
        }
        self.stub.run(&[], &held)?;
        let (reply, at) = match self.stub.receive_stop(until)? {
            Some(stop) => stop,
            None => self.stub.interrupt()?,
        };
        let stop = self.explain(reply, at)?;
        let met = stop.reason != StopReason::Foreign;
        if met {
            self.pending = self.pending.take().or(Some(stop));
        }
        Ok(met)
    }

    /// Stops all vCPUs. If they were stopped by something else in the same moment, `wait` reports that.
    fn halt(&mut self) -> Result<(), Error> {
        if !self.stub.running() {
            return Ok(());
        }
        let (reply, at) = self.stub.interrupt()?;
        let stop = self.explain(reply, at)?;
        // "Foreign" is this very stop.
        if stop.reason != StopReason::Foreign {
            self.pending = self.pending.take().or(Some(stop));
        }
        Ok(())
    }

    /// The reported hook that a vCPU stands on. It may have been away in between, for a call.
    fn standing_on(&mut self, vcpu: Vcpu) -> Result<Option<Hook>, Error> {
        match self.at_hook.get(vcpu.0).copied().flatten() {
            Some(hook) => Ok((self.stub.registers(vcpu)?.rip() == Some(hook.at)).then_some(hook)),
            None => Ok(None),
        }
    }

    /// The vCPUs that stand on hooks which were reported.
    fn standing_on_hooks(&mut self) -> Result<Vec<Vcpu>, Error> {
        let mut standing = Vec::new();
        for vcpu in (0..self.at_hook.len()).map(Vcpu) {
            if self.standing_on(vcpu)?.is_some() {
                standing.push(vcpu);
            }
        }
        Ok(standing)
    }

    /// Lets a vCPU execute the hooked instruction if it stands on a hook that was reported.
    fn pass_hook(&mut self, vcpu: Vcpu) -> Result<(), Error> {
        let hook = self.standing_on(vcpu)?;
        if let Some(slot) = self.at_hook.get_mut(vcpu.0) {
            *slot = None;
        }
        match hook {
            Some(hook) => self.placement.pass(&mut self.stub, vcpu, hook),
            None => Ok(()),
        }
    }

    fn wait_until(&mut self, until: Instant) -> Result<Option<Stop>, Error> {
        loop {
            if let Some(stop) = self.pending.take() {
                return Ok(Some(stop));
            }
            if let Some((reply, at)) = self.stub.receive_stop_ready()? {
                return self.explain(reply, at).map(Some);
            }
            self.qmp.read_events()?;
            if let Some(stop) = self.look_at_events()? {
                return Ok(Some(stop));
            }
            if !wait_readable(&[self.stub.as_fd(), self.qmp.as_fd()], until)? {
                return Ok(None);
            }
        }
    }

    /// What a stop means.
    fn explain(&mut self, reply: StopReply, at: Instant) -> Result<Stop, Error> {
        let (signal, thread) = match reply {
            StopReply::Exited => return Ok(Stop { vcpu: Vcpu(0), reason: StopReason::Gone, at }),
            StopReply::Signal { signal, thread } => (signal, thread),
        };
        let vcpu = thread.and_then(|thread| self.stub.vcpu_of(thread)).unwrap_or(Vcpu(0));
        let reason = match signal {
            SIGNAL_TRAP => match self.hook_under(vcpu)? {
                Some(hook) => StopReason::Hook(hook),
                None => StopReason::Foreign,
            },
            SIGNAL_QUIT => StopReason::Gone,
            _ => StopReason::Foreign,
        };
        Ok(Stop { vcpu, reason, at })
    }

    /// The hook a vCPU has just stopped at. It is noted that it stands there.
    fn hook_under(&mut self, vcpu: Vcpu) -> Result<Option<Hook>, Error> {
        // Whoever is told of the stop asks for all of them next.
        self.stub.learn_registers()?;
        let rip = self.stub.registers(vcpu)?.rip();
        let hook = rip.and_then(|rip| self.placement.hook_at(rip));
        if let Some(slot) = self.at_hook.get_mut(vcpu.0) {
            *slot = hook;
        }
        Ok(hook)
    }

    /// Goes through the events that were read: those that end a wait, and those that tell whether somebody
    /// else let the machine run.
    pub(super) fn look_at_events(&mut self) -> Result<Option<Stop>, Error> {
        let mut stop = None;
        while let Some(event) = self.qmp.next_event() {
            match event.name.as_str() {
                "RESET" => stop = stop.or(Some(self.on_reset()?)),
                "SHUTDOWN" => stop = Some(stop_now(Vcpu(0), StopReason::Gone)),
                "RESUME" if !self.stub.running() => self.check_running()?,
                _ => {}
            }
            self.keep_event(event);
        }
        Ok(stop)
    }

    fn keep_event(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The guest was reset: the addresses of the hooks mean nothing now, nor does fresh memory.
    fn on_reset(&mut self) -> Result<Stop, Error> {
        let stop = stop_now(Vcpu(0), StopReason::Reset);
        if self.stub.running() {
            self.stub.interrupt()?;
        }
        self.pending = None;
        self.at_hook.fill(None);
        self.placement.disarm(&mut self.stub)?;
        for region in self.fresh.regions() {
            self.remove_fresh(region)?;
        }
        self.fresh.forget_ports();
        Ok(stop)
    }

    /// A RESUME event may be an old one of ours.
    fn check_running(&mut self) -> Result<(), Error> {
        let status = self.qmp.execute("query-status", Value::Null)?;
        if status.get("running").and_then(Value::as_bool) == Some(true) {
            self.at_hook.fill(None);
            self.stub.set_running();
        }
        Ok(())
    }

    /// What a stop means for a call: its outcome, or `None` when it goes on.
    fn at_stop(
        &mut self,
        call: &mut RunningCall,
        reply: StopReply,
        at: Instant,
    ) -> Result<Option<CallOutcome>, Error> {
        let StopReply::Signal { signal: SIGNAL_TRAP, thread } = reply else {
            let stop = self.explain(reply, at)?;
            // Paused by somebody else: the call goes on, it is short. Ended: it can't.
            return if stop.reason == StopReason::Gone { Err(Error::Gone) } else { Ok(None) };
        };
        let vcpu = thread.and_then(|thread| self.stub.vcpu_of(thread)).unwrap_or(call.vcpu);
        if vcpu == call.vcpu {
            let regs = self.stub.registers_after(vcpu, &[&clear(call.end)])?;
            if regs.rip() == Some(call.end) {
                return Ok(Some(CallOutcome::Reached(regs)));
            }
            if let Some(hook) = self.hook_under(vcpu)? {
                return Ok(Some(CallOutcome::Crashed(hook)));
            }
            self.stub.order(&[set(call.end)])?;
            return Ok(None);
        }
        if let Some(hook) = self.hook_under(vcpu)? {
            call.held.push(vcpu);
            let stop = Stop { vcpu, reason: StopReason::Hook(hook), at };
            self.pending = self.pending.take().or(Some(stop));
        } else if self.stub.registers(vcpu)?.get(Reg::Rip) == Some(call.end.0) {
            self.stub.step(&[clear(call.end)], vcpu)?;
            self.stub.order(&[set(call.end)])?;
        }
        Ok(None)
    }

    /// Gives a call up: the machine stands, the end is no breakpoint any more. If the call got there while it
    /// was being stopped, that counts.
    fn abandon(
        &mut self,
        call: &RunningCall,
        after: Duration,
    ) -> Result<CallOutcome, MachineError> {
        if self.stub.running() {
            self.stub.interrupt()?;
        }
        let regs = self.stub.registers_after(call.vcpu, &[&clear(call.end)])?;
        if regs.rip() == Some(call.end) {
            return Ok(CallOutcome::Reached(regs));
        }
        if let Some(hook) = self.hook_under(call.vcpu)? {
            return Ok(CallOutcome::Crashed(hook));
        }
        Err(MachineError::Timeout { what: "a call into the guest", after })
    }
}
