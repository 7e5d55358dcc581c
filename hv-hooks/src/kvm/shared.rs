//! What the guard's thread and the vCPUs' threads share, and the rules between them. What a vCPU does by itself is in
//! `port.rs`, what the guard orders in `control.rs`; neither touches the state but by what is here.
//!
//! # Protocol
//!
//! One mutex guards [`State`]. It is held for a few instructions at a time and never across an ioctl; system calls
//! made under it are futex wakes and `tgkill`. Nothing is shared without it but `immediate_exit`, a byte that is
//! stored under it too (`kick.rs` says why that is enough).
//!
//! A vCPU is at one [`Place`] at a time, which only its own thread changes:
//!
//! ```text
//!            enter()              an event, and !may_run          may_run, or nobody guards
//! Unstarted ---------> Outside ---------------------> Parked ---------------------------> Outside
//!                         | VcpuPort dropped
//!                         v
//!                        Left
//! ```
//!
//! *Outside* is `KVM_RUN` or the VMM's own code, *Parked* is waiting in `VcpuPort::take`. Only a parked vCPU stands:
//! it is in its own thread, out of `KVM_RUN`, with its last I/O completed, and its registers are read and written by
//! that thread, to which the guard's thread gives one [`Job`] at a time.
//!
//! `may_run` is what the guard wants, per vCPU:
//! - the guard clears it for all in `stop` and sets it in `resume`, `run_until`, `run_others` and when it leaves;
//! - a vCPU that meets something clears it for all (for itself, when the guest runs for a call), in the same critical
//!   section in which it queues the [`Stop`]. So no vCPU runs on while the guard wakes.
//!
//! Whoever clears `may_run` of a vCPU that is not parked kicks it, in the same critical section. A kick can't be lost:
//! `immediate_exit` is cleared by the vCPU's own thread only, in a critical section in which it finds that it may run.
//! Kicks are repeated every [`KICK_AGAIN`] while the guard waits, in case a VMM clears `immediate_exit` by itself.
//!
//! The guard's thread waits on `news` with a limit. A parked vCPU waits on its own condition without one: the guest
//! stands for as long as the guard wants. It goes on when the guard says so, when the machine is dropped (`guarded` is
//! false from then on) and when the VMM says that the VM has ended (`ended`).
//!
//! A thread that panics inside the lock can't leave the state half changed in a way that matters more than the guest
//! standing for ever would, so a poisoned lock is used as if it were not.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::{GuestVirt, Hook, Registers, Stop, StopReason, Vcpu};

use super::debug::Program;
use super::kick::{RunPage, Thread};
use crate::Error;

/// How long vCPUs may take to stop.
pub(super) const STOP_LIMIT: Duration = Duration::from_secs(1);
/// How long a parked vCPU may take for a job: a few ioctls.
const JOB_LIMIT: Duration = Duration::from_secs(1);
/// Time between two kicks of a vCPU that does not come.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// Where a vCPU's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// It has not called `VcpuPort::enter` yet.
    Unstarted,
    /// In `KVM_RUN` or in the VMM's code.
    Outside,
    /// Waiting in `VcpuPort::take`: the vCPU stands.
    Parked,
    /// The port was dropped: the vCPU never runs again.
    Left,
}

/// What a vCPU met that it stands on until it is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StandsOn {
    /// A hook: the instruction there was not executed yet.
    Hook(Hook),
    /// It can't go on.
    Death,
}

/// What a parked vCPU is to do.
#[derive(Debug)]
pub(super) enum Job {
    /// Read its registers.
    Read,
    /// Write these.
    Write(Box<Registers>),
    /// Take over the breakpoints as they are now.
    Program,
}

impl Job {
    fn name(&self) -> &'static str {
        match self {
            Self::Read => "reading its registers",
            Self::Write(_) => "writing its registers",
            Self::Program => "setting its breakpoints",
        }
    }
}

/// What became of a job; registers for [`Job::Read`].
pub(super) type Answer = Result<Option<Box<Registers>>, Error>;

/// One vCPU.
pub(super) struct Slot {
    pub(super) place: Place,
    pub(super) may_run: bool,
    pub(super) stands_on: Option<StandsOn>,
    /// The guard gave it another place to go on at.
    pub(super) moved: bool,
    /// Known from `enter` until the port is dropped.
    thread: Option<Thread>,
    /// Numbered, so that an answer that nobody waits for any more is known as such.
    job: Option<(u64, Job)>,
    answer: Option<(u64, Answer)>,
}

/// A call under way.
pub(super) struct RunningCall {
    pub(super) vcpu: Vcpu,
    pub(super) end: GuestVirt,
    /// The hook that gives way to the call's end on that vCPU.
    pub(super) lent: Option<Hook>,
    pub(super) outcome: Option<CallEnding>,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallEnding {
    Reached,
    Crashed(Hook),
    Died(StopReason),
}

/// All that is shared.
pub(super) struct State {
    pub(super) slots: Vec<Slot>,
    /// What has not been reported yet, oldest first. One for each vCPU at most (it is parked until it was reported)
    /// and one of each kind that the VMM tells.
    pub(super) stops: VecDeque<Stop>,
    pub(super) hooks: Vec<Hook>,
    pub(super) call: Option<RunningCall>,
    /// What the guard knows: a stop counts when it was reported.
    pub(super) running: bool,
    /// The VMM said so, or all ports are gone.
    pub(super) ended: bool,
    /// The machine was not dropped.
    pub(super) guarded: bool,
    jobs: u64,
}

impl State {
    /// Whether nobody guards this VM any more.
    pub(super) fn is_over(&self) -> bool {
        self.ended || !self.guarded
    }

    /// Whether a vCPU stands, and will until the guard lets it run.
    pub(super) fn holds(&self, vcpu: Vcpu) -> bool {
        let parked = |slot: &Slot| slot.place == Place::Parked && !slot.may_run;
        !self.is_over() && self.slots.get(vcpu.0).is_some_and(parked)
    }

    /// The breakpoints that a vCPU is to have.
    pub(super) fn program(&self, vcpu: Vcpu) -> Program {
        if self.is_over() {
            return Program::default();
        }
        let call = self.call.as_ref().filter(|call| call.vcpu == vcpu);
        let lent = call.and_then(|call| call.lent);
        let hooks = self.hooks.iter().filter(|hook| Some(**hook) != lent).map(|hook| hook.at);
        Program::breakpoints(hooks.chain(call.map(|call| call.end)))
    }

    /// The hook at an address.
    pub(super) fn hook_at(&self, at: GuestVirt) -> Option<Hook> {
        self.hooks.iter().find(|hook| hook.at == at).copied()
    }

    /// Other hooks are in place, or none: what was met at one that is no more is void.
    pub(super) fn set_hooks(&mut self, hooks: &[Hook]) {
        self.hooks = hooks.to_vec();
        let known = |hook: &Hook| hooks.iter().any(|other| other.at == hook.at);
        self.stops.retain(|stop| match stop.reason {
            StopReason::Hook(hook) => known(&hook),
            _ => true,
        });
        for slot in &mut self.slots {
            slot.stands_on = slot.stands_on.filter(|on| match on {
                StandsOn::Hook(hook) => known(hook),
                StandsOn::Death => true,
            });
        }
    }

    /// A vCPU was given another instruction pointer.
    pub(super) fn moved(&mut self, vcpu: Vcpu, to: GuestVirt) {
        let Some(slot) = self.slots.get_mut(vcpu.0) else { return };
        match slot.stands_on {
            Some(StandsOn::Hook(hook)) if hook.at != to => slot.stands_on = None,
            Some(StandsOn::Death) => slot.moved = true,
            _ => return,
        }
        let is_void = |stop: &Stop| stop.vcpu == vcpu && matches!(stop.reason, StopReason::Hook(_));
        self.stops.retain(|stop| !is_void(stop));
    }

    /// The vCPU whose thread calls.
    fn current_vcpu(&self) -> Option<Vcpu> {
        let thread = Some(Thread::current());
        self.slots.iter().position(|slot| slot.thread == thread).map(Vcpu)
    }

    /// The first vCPU that is to stand and does not, and why.
    fn missing(&self) -> Option<(Vcpu, &'static str)> {
        self.slots.iter().enumerate().filter(|(_, slot)| !slot.may_run).find_map(|(index, slot)| {
            let why = match slot.place {
                Place::Unstarted => "its thread has not called VcpuPort::enter()",
                Place::Outside => {
                    "its thread does not come back from KVM_RUN or the VMM's own code"
                }
                Place::Parked | Place::Left => return None,
            };
            Some((Vcpu(index), why))
        })
    }
}

/// The state, its lock, and the ways to wake threads.
pub(super) struct Shared {
    state: Mutex<State>,
    /// For the guard's thread: a vCPU parked, answered or left; the VMM told something.
    news: Condvar,
    /// For each vCPU: it may run, or has a job.
    wakes: Vec<Condvar>,
    run_pages: Vec<RunPage>,
    signal: libc::c_int,
}

impl Shared {
    /// All vCPUs run, or will.
    pub(super) fn new(run_pages: Vec<RunPage>, signal: libc::c_int) -> Self {
        let slot = |_: &RunPage| Slot {
            place: Place::Unstarted,
            may_run: true,
            stands_on: None,
            moved: false,
            thread: None,
            job: None,
            answer: None,
        };
        let state = State {
            slots: run_pages.iter().map(slot).collect(),
            stops: VecDeque::new(),
            hooks: Vec::new(),
            call: None,
            running: true,
            ended: false,
            guarded: true,
            jobs: 0,
        };
        let wakes = run_pages.iter().map(|_| Condvar::new()).collect();
        Self { state: Mutex::new(state), news: Condvar::new(), wakes, run_pages, signal }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vCPUs.
    pub(super) fn vcpu_count(&self) -> usize {
        self.run_pages.len()
    }

    fn kick(&self, index: usize, slot: &Slot) {
        if !matches!(slot.place, Place::Unstarted | Place::Outside) {
            return;
        }
        if let Some(page) = self.run_pages.get(index) {
            page.set_immediate_exit(true);
        }
        if let Some(thread) = slot.thread {
            thread.signal(self.signal);
        }
    }

    /// Tells every vCPU to stand.
    pub(super) fn halt(&self, state: &mut State) {
        for (index, slot) in state.slots.iter_mut().enumerate() {
            slot.may_run = false;
            self.kick(index, slot);
        }
    }

    /// Tells one vCPU to stand.
    fn halt_one(&self, state: &mut State, vcpu: Vcpu) {
        if let Some(slot) = state.slots.get_mut(vcpu.0) {
            slot.may_run = false;
            self.kick(vcpu.0, slot);
        }
    }

    /// Lets every vCPU run for which `may` holds.
    pub(super) fn release(&self, state: &mut State, may: impl Fn(Vcpu, &Slot) -> bool) {
        for (index, slot) in state.slots.iter_mut().enumerate() {
            if may(Vcpu(index), slot) {
                slot.may_run = true;
            }
        }
        self.wakes.iter().for_each(Condvar::notify_one);
    }

    /// Makes vCPUs that run take over what has changed in their breakpoints.
    pub(super) fn refresh_running(&self, state: &State) {
        for (index, slot) in state.slots.iter().enumerate() {
            self.kick(index, slot);
        }
    }

    /// Waits for news at most until then; `false` when the time is over.
    pub(super) fn wait_for_news<'s>(
        &self,
        state: MutexGuard<'s, State>,
        until: Instant,
    ) -> (MutexGuard<'s, State>, bool) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (state, false);
        }
        let (state, _) =
            self.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        (state, true)
    }

    /// Waits until every vCPU that is to stand does.
    pub(super) fn settle<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
    ) -> (MutexGuard<'s, State>, Result<(), Error>) {
        let until = Instant::now() + STOP_LIMIT;
        loop {
            if state.ended {
                return (state, Err(Error::Ended));
            }
            let Some((vcpu, why)) = state.missing() else { return (state, Ok(())) };
            let now = Instant::now();
            if now >= until {
                return (state, Err(Error::VcpuMissing { vcpu, after: STOP_LIMIT, why }));
            }
            let again = until.min(now + KICK_AGAIN);
            state = self.wait_for_news(state, again).0;
            if Instant::now() >= again {
                for (index, slot) in state.slots.iter().enumerate().filter(|(_, s)| !s.may_run) {
                    self.kick(index, slot);
                }
            }
        }
    }

    /// Gives a parked vCPU a job and waits until it is done.
    pub(super) fn ask(&self, vcpu: Vcpu, job: Job) -> Answer {
        let what = job.name();
        let mut state = self.lock();
        if state.ended {
            return Err(Error::Ended);
        }
        let number = state.jobs;
        state.jobs = state.jobs.wrapping_add(1);
        let slot = state.slots.get_mut(vcpu.0).ok_or(Error::NoSuchVcpu(vcpu))?;
        match slot.place {
            Place::Parked => {}
            Place::Left => return Err(Error::VcpuGone(vcpu)),
            Place::Unstarted | Place::Outside => return Err(Error::Running(what)),
        }
        slot.job = Some((number, job));
        slot.answer = None;
        self.wakes.get(vcpu.0).into_iter().for_each(Condvar::notify_one);
        let until = Instant::now() + JOB_LIMIT;
        loop {
            let (next, in_time) = self.wait_for_news(state, until);
            state = next;
            let ended = state.ended;
            let slot = state.slots.get_mut(vcpu.0).ok_or(Error::NoSuchVcpu(vcpu))?;
            match slot.answer.take() {
                Some((answered, answer)) if answered == number => return answer,
                _ if ended => return Err(Error::Ended),
                _ if slot.place == Place::Left => return Err(Error::VcpuGone(vcpu)),
                _ if !in_time => {
                    // If it was begun, its answer has a number that nobody asks for any more.
                    slot.job = None;
                    return Err(Error::VcpuSilent { vcpu, what, after: JOB_LIMIT });
                }
                _ => {}
            }
        }
    }

    /// A vCPU's thread begins, or goes on in another thread.
    pub(super) fn enter(&self, vcpu: Vcpu) {
        let mut state = self.lock();
        if let Some(slot) = state.slots.get_mut(vcpu.0) {
            slot.thread = Some(Thread::current());
            if slot.place == Place::Unstarted {
                slot.place = Place::Outside;
            }
        }
    }

    /// A vCPU's port is dropped, and with it, as a rule, its thread. It is not kicked any more.
    pub(super) fn leave(&self, vcpu: Vcpu) {
        let mut state = self.lock();
        if let Some(slot) = state.slots.get_mut(vcpu.0) {
            slot.place = Place::Left;
            slot.thread = None;
        }
        if state.slots.iter().all(|slot| slot.place == Place::Left) {
            state.ended = true;
        }
        self.news.notify_all();
    }

    /// A vCPU met something. What it is for a call under way is decided here; without one all vCPUs are to stand.
    pub(super) fn report(&self, state: &mut State, vcpu: Vcpu, met: Met) {
        let at = Instant::now();
        let (reason, stands_on) = match met {
            Met::Hook(hook) => (StopReason::Hook(hook), Some(StandsOn::Hook(hook))),
            Met::Death(reason) => (reason, Some(StandsOn::Death)),
            Met::CallEnd => (StopReason::CallEnd, None),
        };
        if let Some(slot) = state.slots.get_mut(vcpu.0) {
            // It is in `take` and goes from here to `park`: no kick is needed.
            slot.place = Place::Parked;
            slot.may_run = false;
            slot.stands_on = stands_on;
            slot.moved = false;
        }
        let mine = state.call.as_mut().filter(|call| call.vcpu == vcpu);
        match (mine, met) {
            (Some(call), Met::CallEnd) => call.outcome = Some(CallEnding::Reached),
            (Some(call), Met::Hook(hook)) => call.outcome = Some(CallEnding::Crashed(hook)),
            (Some(call), Met::Death(reason)) => {
                call.outcome = Some(CallEnding::Died(reason));
                state.stops.push_back(Stop { vcpu, reason, at });
            }
            (None, _) => {
                state.stops.push_back(Stop { vcpu, reason, at });
                if state.call.is_some() {
                    // The call goes on.
                    self.news.notify_all();
                    return;
                }
            }
        }
        self.halt(state);
    }

    /// The VMM tells something about the whole machine.
    pub(super) fn tell(&self, reason: StopReason) {
        let mut state = self.lock();
        if state.is_over() || state.stops.iter().any(|stop| stop.reason == reason) {
            return;
        }
        let vcpu = state.current_vcpu().unwrap_or(Vcpu(0));
        state.stops.push_back(Stop { vcpu, reason, at: Instant::now() });
        let is_panic = reason == StopReason::Panicked;
        match &mut state.call {
            Some(call) if is_panic && call.vcpu != vcpu => self.halt_one(&mut state, vcpu),
            Some(call) => {
                call.outcome = call.outcome.or(Some(CallEnding::Died(reason)));
                self.halt(&mut state);
            }
            None => self.halt(&mut state),
        }
        self.news.notify_all();
    }

    /// The VM has ended: everybody goes on.
    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.news.notify_all();
        self.wakes.iter().for_each(Condvar::notify_all);
    }

    /// The machine is not guarded any more: every vCPU runs, without breakpoints.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        state.guarded = false;
        state.call = None;
        state.stops.clear();
        state.hooks.clear();
        self.release(&mut state, |_, _| true);
        self.refresh_running(&state);
    }

    /// Parks the vCPU whose thread calls until it may run. Jobs are done by `work`, outside the lock. Returns with the
    /// lock held, so that what the vCPU finds is what it goes on with.
    pub(super) fn park<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        vcpu: Vcpu,
        mut work: impl FnMut(Job) -> Answer,
    ) -> MutexGuard<'s, State> {
        self.set_place(&mut state, vcpu, Place::Parked);
        loop {
            let over = state.is_over();
            let Some(slot) = state.slots.get_mut(vcpu.0) else { break };
            if over {
                break;
            }
            if let Some((number, job)) = slot.job.take() {
                drop(state);
                let answer = work(job);
                state = self.lock();
                if let Some(slot) = state.slots.get_mut(vcpu.0) {
                    slot.answer = Some((number, answer));
                }
                self.news.notify_all();
                continue;
            }
            if slot.may_run {
                break;
            }
            let Some(wake) = self.wakes.get(vcpu.0) else { break };
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.set_place(&mut state, vcpu, Place::Outside);
        state
    }

    fn set_place(&self, state: &mut State, vcpu: Vcpu, place: Place) {
        if let Some(slot) = state.slots.get_mut(vcpu.0) {
            slot.place = place;
        }
        self.news.notify_all();
    }

    /// Whether the next `KVM_RUN` of a vCPU is to come back at once; said by its own thread, with the lock held.
    pub(super) fn set_immediate_exit(&self, vcpu: Vcpu, on: bool) {
        if let Some(page) = self.run_pages.get(vcpu.0) {
            page.set_immediate_exit(on);
        }
    }
}

/// What a vCPU met.
#[derive(Clone, Copy, Debug)]
pub(super) enum Met {
    Hook(Hook),
    CallEnd,
    Death(StopReason),
}
