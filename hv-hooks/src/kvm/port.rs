//! A vCPU's own side: what its thread does when `KVM_RUN` comes back with an event. The rules between threads are in
//! `shared.rs`.

use std::sync::{Arc, MutexGuard};

use guest::{GuestVirt, Reg, StopReason, Vcpu};
use kvm_bindings::kvm_debug_exit_arch;
use kvm_ioctls::VcpuFd;

use super::debug::{Meaning, Program};
use super::event::VcpuEvent;
use super::registers;
use super::shared::{Answer, Job, Met, Shared, StandsOn, State};
use crate::Error;

/// What a vCPU's thread is to do after [`VcpuPort::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Back to `KVM_RUN`.
    Run,
    /// The event is the VMM's: do what you would do without a guard (look at flags of your own, reset, exit).
    Yours,
}

/// One vCPU's connection to the guard. It moves into the vCPU's thread and is dropped there.
pub struct VcpuPort {
    shared: Arc<Shared>,
    vcpu: Vcpu,
    /// What KVM has.
    program: Program,
    /// The place of the hook that this vCPU is about to step over.
    passing: Option<GuestVirt>,
    /// KVM can keep interrupts back during a step (`KVM_GUESTDBG_BLOCKIRQ`, since v5.15).
    block_interrupts: bool,
}

impl VcpuPort {
    pub(super) fn new(shared: Arc<Shared>, vcpu: Vcpu, block_interrupts: bool) -> Self {
        Self { shared, vcpu, program: Program::default(), passing: None, block_interrupts }
    }

    /// To be called first thing in the vCPU's thread, whose `KVM_RUN` is interrupted from now on by the signal that the
    /// VMM chose. The thread must not block that signal.
    pub fn enter(&mut self) {
        self.shared.enter(self.vcpu);
    }

    /// To be called when `KVM_RUN` came back with an event. Returns when the vCPU is to run again, or when the VMM is
    /// to deal with the event; meanwhile the guest may have stood for as long as a repair takes.
    ///
    /// [`VcpuEvent::Interrupted`] is always [`Next::Yours`] in the end, since the VMM may have sent a signal of its own
    /// in the same moment; a VMM that has nothing to do runs the vCPU again. After a triple fault and its like the VMM
    /// is asked for its own way only when the guard lets the guest go.
    ///
    /// # Errors
    /// KVM refuses to change the vCPU's breakpoints or to deliver a debug exception. The vCPU is left without
    /// breakpoints as far as that is possible.
    pub fn take(&mut self, vcpu: &mut VcpuFd, event: VcpuEvent) -> Result<Next, Error> {
        self.shared.enter(self.vcpu);
        match event {
            VcpuEvent::Debug(arch) => self.on_debug(vcpu, &arch),
            VcpuEvent::Interrupted => {
                let shared = Arc::clone(&self.shared);
                self.stand(vcpu, &shared, shared.lock(), After::Interrupt)?;
                Ok(Next::Yours)
            }
            other => match other.death() {
                Some(reason) => self.on_death(vcpu, reason),
                None => Ok(Next::Yours),
            },
        }
    }

    fn on_debug(&mut self, vcpu: &VcpuFd, arch: &kvm_debug_exit_arch) -> Result<Next, Error> {
        let shared = Arc::clone(&self.shared);
        match self.program.meaning(arch) {
            Meaning::Vmms => Ok(Next::Yours),
            Meaning::Guests => {
                self.program.give_back(vcpu, arch, self.block_interrupts)?;
                Ok(Next::Run)
            }
            Meaning::Stepped => {
                self.passing = None;
                let left = self.stand(vcpu, &shared, shared.lock(), After::Event)?;
                Ok(left.next(Next::Run))
            }
            Meaning::Hit(at) => {
                self.passing = None;
                let state = shared.lock();
                let left = match self.met_at(&state, at) {
                    Some(met) => self.meet(vcpu, &shared, state, met)?,
                    // A hook that was taken away in this moment.
                    None => self.stand(vcpu, &shared, state, After::Event)?,
                };
                Ok(left.next(Next::Run))
            }
        }
    }

    fn on_death(&mut self, vcpu: &VcpuFd, reason: StopReason) -> Result<Next, Error> {
        let shared = Arc::clone(&self.shared);
        let left = self.meet(vcpu, &shared, shared.lock(), Met::Death(reason))?;
        Ok(left.next(if left.moved { Next::Run } else { Next::Yours }))
    }

    /// What a breakpoint at this address is there for.
    fn met_at(&self, state: &State, at: GuestVirt) -> Option<Met> {
        let is_end =
            state.call.as_ref().is_some_and(|call| call.vcpu == self.vcpu && call.end == at);
        if is_end { Some(Met::CallEnd) } else { state.hook_at(at).map(Met::Hook) }
    }

    /// Tells the guard and stands until it says how to go on.
    fn meet<'s>(
        &mut self,
        vcpu: &VcpuFd,
        shared: &'s Shared,
        mut state: MutexGuard<'s, State>,
        met: Met,
    ) -> Result<LeftWith, Error> {
        if !state.is_over() {
            shared.report(&mut state, self.vcpu, met);
        }
        self.stand(vcpu, shared, state, After::Event)
    }

    /// Stands while the vCPU may not run; then takes over the breakpoints that it is to have.
    fn stand<'s>(
        &mut self,
        vcpu: &VcpuFd,
        shared: &'s Shared,
        mut state: MutexGuard<'s, State>,
        after: After,
    ) -> Result<LeftWith, Error> {
        let index = self.vcpu;
        let stood = state.slots.get(index.0).is_some_and(|slot| !slot.may_run) && !state.is_over();
        if stood {
            state = shared.park(state, index, |job| self.work(vcpu, job));
        }
        let ended = state.ended;
        let (stands_on, moved) = state
            .slots
            .get_mut(index.0)
            .map_or((None, false), |slot| (slot.stands_on.take(), std::mem::take(&mut slot.moved)));
        let program = state.program(index);
        if let Some(StandsOn::Hook(hook)) = stands_on {
            self.passing = Some(hook.at);
        }
        // A place that is no breakpoint any more needs no step.
        self.passing = self.passing.filter(|at| program.has(*at));
        match after {
            After::Interrupt => shared.set_immediate_exit(index, false),
            After::Event if stood => shared.set_immediate_exit(index, true),
            After::Event => {}
        }
        drop(state);
        if stood {
            // Tells a guest with kvmclock that it stood, so that its watchdogs don't take it for hung. A guest without
            // one is no error.
            let _ = vcpu.kvmclock_ctrl();
        }
        self.take_over(vcpu, program)?;
        Ok(LeftWith { ended, moved })
    }

    fn take_over(&mut self, vcpu: &VcpuFd, program: Program) -> Result<(), Error> {
        let program = match self.passing {
            Some(at) => program.passing(at),
            None => program,
        };
        if program == self.program {
            return Ok(());
        }
        if let Err(error) = program.install(vcpu, self.block_interrupts) {
            // Better no hooks than a vCPU that stops where nobody expects it.
            self.passing = None;
            self.program = Program::default();
            Program::default().install(vcpu, false)?;
            return Err(error);
        }
        self.program = program;
        Ok(())
    }

    fn work(&mut self, vcpu: &VcpuFd, job: Job) -> Answer {
        match job {
            Job::Read => registers::read(vcpu).map(|regs| Some(Box::new(regs))),
            Job::Write(regs) => {
                registers::write(vcpu, &regs)?;
                let to = regs.get(Reg::Rip).map(GuestVirt);
                // Told to go somewhere else, it has nothing to step over.
                self.passing = self.passing.filter(|at| to.is_none_or(|to| to == *at));
                Ok(None)
            }
            Job::Program => {
                let program = self.shared.lock().program(self.vcpu);
                self.passing = self.passing.filter(|at| program.has(*at));
                self.take_over(vcpu, program).map(|()| None)
            }
        }
    }
}

/// What brought a vCPU into [`VcpuPort::take`], and thus what happens to `immediate_exit` when it goes on.
#[derive(Clone, Copy)]
enum After {
    /// A kick, ours or the VMM's: it is heard. The VMM is told of it ([`Next::Yours`]), so that clearing
    /// `immediate_exit` can't lose a request of its own.
    Interrupt,
    /// Anything else: if the vCPU stood, the next `KVM_RUN` is to come back at once, because a signal that the VMM sent
    /// meanwhile is gone.
    Event,
}

/// What a vCPU knows when it goes on.
#[derive(Clone, Copy)]
struct LeftWith {
    /// The VM has ended.
    ended: bool,
    /// The guard gave it another place to go on at.
    moved: bool,
}

impl LeftWith {
    /// How to go on, unless the VM has ended.
    fn next(self, otherwise: Next) -> Next {
        if self.ended { Next::Yours } else { otherwise }
    }
}

impl Drop for VcpuPort {
    fn drop(&mut self) {
        self.shared.leave(self.vcpu);
    }
}
