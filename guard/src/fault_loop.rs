//! A process that takes the same page fault again and again because a driver's function serves it with nothing:
//! suspected, watched from call to return now and then while the guest runs, and ended when it is proven. Measuring is
//! `refaults.rs`'s, reading one call `diagnose::fault_loop`'s.

use std::time::{Duration, Instant};

use diagnose::CrashClass;
use diagnose::fault_loop::{self, Handler, Visit};
use diagnose::stuck::current_task;
use guest::{GuestVirt, Hook, HookKind, Machine, Reg, Registers, Stop};
use serde_json::json;

use crate::Error;
use crate::crash::{End, Handled};
use crate::error::in_one_line;
use crate::guard::{Guard, all_registers};
use crate::refaults::Refaults;

/// Calls that must be seen from entry to return before anything is done, all with the same end.
const CALLS_MIN: u32 = 64;
/// Calls that are watched one after the other, before the guest is left alone until the next look: more than any
/// driver needs tries for one page.
const CALLS_IN_A_ROW: u32 = 4;
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long the function is watched for the task to come by, or to return.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often it may not come by before another function is watched.
const ABSENT_MAX: u32 = 3;
/// How often others may come by first.
const OTHERS_MAX: u32 = 200;
/// Looks that may find no driver's mapping at the address that was touched last.
const MISSES_MAX: u32 = 5;
/// For how long a task is let be that was suspected of nothing, and one whose loop could not be ended.
const LET_BE: Duration = Duration::from_secs(10);
const GIVEN_UP: Duration = Duration::from_secs(3600);
/// A task is suspected after this part of the time that proves it, and no longer than for so many times of it.
const SUSPECTED_AFTER: u32 = 4;
const SUSPECTED_FOR: u32 = 6;

/// What is known of loops of page faults.
#[derive(Default)]
pub struct FaultLoops {
    refaults: Refaults,
    suspicion: Option<Suspicion>,
    /// The task whose mapping was looked for in vain, and how often.
    missed: Option<(GuestVirt, u32)>,
    looked: Option<Instant>,
}

impl FaultLoops {
    /// Whether a function is being watched, and the hook for more is in use.
    pub fn is_watching(&self) -> bool {
        self.suspicion.as_ref().is_some_and(|suspicion| suspicion.watch.is_some())
    }
}

/// A task that may loop.
struct Suspicion {
    task: GuestVirt,
    user: Registers,
    begun: Instant,
    /// Functions that may be the cause; the first is watched.
    handlers: Vec<Handler>,
    /// The call that all others must be like.
    first: Option<Visit>,
    /// Calls like it that ended alike.
    calls: u32,
    /// What the function returned.
    answer: u64,
    absent: u32,
    others: u32,
    watch: Option<Watch>,
}

/// A few calls in a row.
#[derive(Clone, Copy, Debug)]
struct Watch {
    begun: Instant,
    calls: u32,
    stage: Stage,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The function is called.
    Call,
    /// It returns, to here with this stack pointer.
    Return { at: GuestVirt, rsp: GuestVirt },
}

/// What to do after a stop.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Watch on.
    Watch(Stage),
    /// Let the guest be until the next look.
    Rest,
    /// It is proven.
    End,
    /// It is nothing.
    Over(String),
}

impl Suspicion {
    fn new(task: GuestVirt, user: Registers, handlers: Vec<Handler>) -> Self {
        Self {
            task,
            user,
            begun: Instant::now(),
            handlers,
            first: None,
            calls: 0,
            answer: 0,
            absent: 0,
            others: 0,
            watch: None,
        }
    }

    /// The function was called; `served`: the page tables allow the access; `long`: it has gone on for long enough.
    fn on_call(&mut self, visit: Visit, served: bool, long: bool) -> Next {
        if visit.task != self.task {
            return self.on_other();
        }
        self.absent = 0;
        if visit.user != self.user || self.first.as_ref().is_some_and(|it| !visit.is_again(it)) {
            return Next::Over("its page faults move on".to_owned());
        }
        if served {
            return Next::Over(format!("{:#x} is mapped by now", visit.address));
        }
        if self.calls >= CALLS_MIN && long {
            return Next::End;
        }
        let stage = Stage::Return { at: visit.returns_to, rsp: visit.rsp };
        self.first.get_or_insert(visit);
        Next::Watch(stage)
    }

    /// The call returned `answer`; `again`: the access is to be tried again.
    fn on_return(&mut self, answer: u64, again: Option<bool>, served: bool) -> Next {
        if again != Some(true) {
            return self.suspect_next(&format!("returned {answer:#x}"));
        }
        if served {
            return Next::Over("the page was mapped".to_owned());
        }
        self.calls = self.calls.saturating_add(1);
        self.answer = answer;
        let Some(watch) = &mut self.watch else { return Next::Rest };
        watch.calls = watch.calls.saturating_add(1);
        if watch.calls < CALLS_IN_A_ROW { Next::Watch(Stage::Call) } else { Next::Rest }
    }

    /// Somebody else came by. Letting him by takes a single step of his vCPU, so he ends this try instead.
    fn on_other(&mut self) -> Next {
        self.others = self.others.saturating_add(1);
        if self.others > OTHERS_MAX {
            return Next::Over("others call the function too often to watch it".to_owned());
        }
        Next::Rest
    }

    /// Nobody came by in time.
    fn on_absence(&mut self) -> Next {
        if self.watch.is_some_and(|watch| watch.stage != Stage::Call) {
            return Next::Rest;
        }
        self.absent = self.absent.saturating_add(1);
        if self.absent < ABSENT_MAX { Next::Rest } else { self.suspect_next("is not called") }
    }

    /// The function that is watched is not the cause.
    fn suspect_next(&mut self, why: &str) -> Next {
        let last = (!self.handlers.is_empty()).then(|| self.handlers.remove(0));
        (self.first, self.calls, self.absent) = (None, 0, 0);
        match (self.handlers.first(), last) {
            (Some(_), _) => Next::Rest,
            (None, Some(last)) => Next::Over(format!("{} {why}", last.function)),
            (None, None) => Next::Over("no function is left".to_owned()),
        }
    }

    /// What was seen, one fact a line.
    fn evidence(&self, stood: Duration, faults: u64) -> Vec<String> {
        let (Some(handler), Some(first)) = (self.handlers.first(), &self.first) else {
            return Vec::new();
        };
        let kind = if first.write { "write" } else { "read" };
        vec![
            format!(
                "for {:.1} s, through {faults} page faults, no register of the program has changed",
                stood.as_secs_f64(),
            ),
            format!(
                "{} calls of {} (vm_operations_struct.{}) for a {kind} at {:#x} were watched: each returned \
                 {:#x}, which lets the access be tried again, and none mapped the page",
                self.calls, handler.function, handler.operation, first.address, self.answer,
            ),
        ]
    }
}

impl<M: Machine> Guard<M> {
    /// Looks for loops of page faults in a guest that runs; `true` while a task is suspected of one.
    pub(crate) fn look_at_faults(&mut self) -> Result<bool, Error> {
        let limit = Duration::from_secs(self.options.policy.lockup_s);
        if limit.is_zero() || self.watch.since_let_go().is_some() {
            // The hooks are off, with that of a watch.
            self.fault_loops = FaultLoops::default();
            return Ok(false);
        }
        if !self.is_running() {
            self.fault_loops.refaults.interrupt();
            return Ok(self.fault_loops.suspicion.is_some());
        }
        let now = Instant::now();
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        self.fault_loops.refaults.read(image, &memory, now);
        if self.fault_loops.suspicion.is_some() {
            self.look_again_at_faults(now, limit)?;
        } else if self.is_time_for_faults(now, 2 * LOOK_EVERY)
            && let Some((task, user)) =
                self.fault_loops.refaults.suspect(limit / SUSPECTED_AFTER, now)
        {
            self.fault_loops.looked = Some(now);
            self.suspect_of_loop(task, user, now)?;
        }
        Ok(self.fault_loops.suspicion.is_some())
    }

    fn is_time_for_faults(&self, now: Instant, rest: Duration) -> bool {
        let looked = self.fault_loops.looked;
        looked.is_none_or(|at| now.saturating_duration_since(at) >= rest)
            && !self.stuck.suspects()
            && !self.is_chasing()
    }

    /// Finds out which driver's mapping a task touches. The guest stands for that moment.
    fn suspect_of_loop(
        &mut self,
        task: GuestVirt,
        user: Registers,
        now: Instant,
    ) -> Result<(), Error> {
        let handlers = self.standing(|guard| guard.handlers_for(task))?;
        let loops = &mut self.fault_loops;
        // The CPU has gone over to another task meanwhile.
        let Some(handlers) = handlers else { return Ok(()) };
        if !handlers.is_empty() {
            loops.missed = None;
            loops.suspicion = Some(Suspicion::new(task, user, handlers));
            return Ok(());
        }
        // Another task's fault may have been the CPU's latest.
        let before = loops.missed.filter(|missed| missed.0 == task).map_or(0, |missed| missed.1);
        loops.missed = Some((task, before + 1));
        if before + 1 >= MISSES_MAX {
            loops.missed = None;
            loops.refaults.spare(task, now + LET_BE);
        }
        Ok(())
    }

    /// The drivers' functions that serve faults at the address that a task touched last; `None` where no vCPU executes
    /// it.
    fn handlers_for(&mut self, task: GuestVirt) -> Result<Option<Vec<Handler>>, Error> {
        let vcpus = all_registers(&mut self.machine)?;
        let image = &self.session.image;
        let memory = image.placement.space(self.machine.phys());
        let mut own = vcpus.iter().filter(|it| current_task(image, &memory, it) == Some(task));
        let Some(registers) = own.next() else { return Ok(None) };
        let touched = registers.get(Reg::Cr2).map(GuestVirt);
        let area = touched.and_then(|at| fault_loop::area(image, &memory, task, at).ok().flatten());
        Ok(Some(area.map(|area| area.handlers).unwrap_or_default()))
    }

    fn look_again_at_faults(&mut self, now: Instant, limit: Duration) -> Result<(), Error> {
        let due = self.is_time_for_faults(now, LOOK_EVERY);
        let Some(suspicion) = &mut self.fault_loops.suspicion else { return Ok(()) };
        let next = match suspicion.watch {
            Some(watch) if watch.begun.elapsed() <= PATIENCE => return Ok(()),
            Some(_) => suspicion.on_absence(),
            None if self.fault_loops.refaults.stood(suspicion.task).0.is_zero() => {
                Next::Over("the program goes on".to_owned())
            }
            None if suspicion.begun.elapsed() > limit * SUSPECTED_FOR => {
                Next::Over("it could not be proven in time".to_owned())
            }
            None if due => Next::Watch(Stage::Call),
            None => return Ok(()),
        };
        self.fault_loops.looked = Some(now);
        let ours = self.halt()?;
        let followed = self.follow(next);
        if ours {
            self.resume()?;
        }
        followed
    }

    /// Carries out what is next, but for the end of a loop that is proven. The guest stands.
    fn follow(&mut self, next: Next) -> Result<(), Error> {
        let Some(suspicion) = &mut self.fault_loops.suspicion else { return self.arm_with(None) };
        let function = suspicion.handlers.first().map(|handler| handler.at);
        let (stage, at) = match next {
            Next::Watch(Stage::Call) => (Stage::Call, function),
            Next::Watch(stage @ Stage::Return { at, .. }) => (stage, Some(at)),
            Next::Rest | Next::End => (Stage::Call, None),
            Next::Over(why) => return self.end_loop_suspicion(&why),
        };
        let Some(at) = at else {
            suspicion.watch = None;
            return self.arm_with(None);
        };
        let calls = suspicion.watch.map_or(0, |watch| watch.calls);
        suspicion.watch = Some(Watch { begun: Instant::now(), calls, stage });
        self.arm_with(Some(Hook { kind: HookKind::Watched, at }))
    }

    /// Takes the suspicion and its hook away. The guest stands.
    fn end_loop_suspicion(&mut self, why: &str) -> Result<(), Error> {
        let Some(suspicion) = self.fault_loops.suspicion.take() else { return Ok(()) };
        self.fault_loops.refaults.spare(suspicion.task, Instant::now() + LET_BE);
        if suspicion.watch.is_some() {
            self.arm_with(None)?;
        }
        // Who was never seen to fault in vain was not told of.
        if suspicion.calls == 0 {
            return Ok(());
        }
        let fields = json!({ "task": suspicion.task, "reason": why, "looks": suspicion.calls });
        let text = format!("a loop of page faults is no longer suspected: {why}");
        self.say("unsuspected", fields, &text)
    }

    /// A vCPU came to where the function is watched.
    pub(crate) fn on_fault_watched(&mut self, stop: Stop, hook: Hook) -> Result<(), Error> {
        let registers = self.machine.registers(stop.vcpu).map_err(Error::Registers)?;
        let next = self.next_after(hook, &registers);
        if next == Next::End {
            return self.on_fault_loop(stop);
        }
        let calls = self.fault_loops.suspicion.as_ref().map(|suspicion| suspicion.calls);
        let began = calls == Some(1) && next == Next::Watch(Stage::Call);
        self.follow(next)?;
        self.resume()?;
        if began { self.tell_suspect(stop, &registers) } else { Ok(()) }
    }

    /// What a stop where the function is watched means.
    fn next_after(&mut self, hook: Hook, registers: &Registers) -> Next {
        let limit = Duration::from_secs(self.options.policy.lockup_s);
        let image = &self.session.image;
        let phys = self.machine.phys();
        let Some(suspicion) = &mut self.fault_loops.suspicion else { return Next::Rest };
        let served = |visit: &Visit| visit.is_served(image, phys).unwrap_or(true);
        // Of two vCPUs that stopped at once, the other may stand where was watched before.
        let is_call = suspicion.handlers.first().map(|handler| handler.at) == Some(hook.at);
        match suspicion.watch.map(|watch| watch.stage) {
            Some(Stage::Call) if is_call => {
                let visit = Visit::read(image, &image.placement.space(phys), registers);
                let Ok(visit) = visit else { return Next::Over("a call is unreadable".to_owned()) };
                let (stood, _) = self.fault_loops.refaults.stood(suspicion.task);
                let served = served(&visit);
                suspicion.on_call(visit, served, stood >= limit)
            }
            Some(Stage::Return { rsp, .. }) if registers.rsp() == Some(rsp) => {
                // The value is 32 bits wide.
                let answer = registers.get(Reg::Rax).unwrap_or_default() & 0xffff_ffff;
                let again = fault_loop::asks_again(&*image.types, answer);
                let served = suspicion.first.as_ref().is_none_or(served);
                suspicion.on_return(answer, again, served)
            }
            _ => suspicion.on_other(),
        }
    }

    /// The first call that came to nothing was seen.
    fn tell_suspect(&mut self, stop: Stop, registers: &Registers) -> Result<(), Error> {
        let suspicion = self.fault_loops.suspicion.as_ref();
        let Some(handler) = suspicion.and_then(|it| it.handlers.first()) else { return Ok(()) };
        let (module, function) = (&handler.module, &handler.function);
        let fields = json!({
            "cpu": diagnose::stuck::cpu_of(&self.session.image, registers), "vcpu": stop.vcpu,
            "module": module, "function": function, "class": CrashClass::FaultLoop,
            "title": format!("page fault loop in {function} [{module}]"),
        });
        let text =
            format!("a process takes one page fault again and again in {function} [{module}]");
        self.say("suspected", fields, &text)
    }

    /// It is proven: the vCPU stands where the function is entered once more.
    fn on_fault_loop(&mut self, stop: Stop) -> Result<(), Error> {
        let Some(suspicion) = self.fault_loops.suspicion.take() else { return self.resume() };
        self.incidents = self.incidents.saturating_add(1);
        self.strikes.set_time(self.elapsed());
        let at = suspicion.handlers.first().map_or(GuestVirt(0), |handler| handler.at);
        let mut handled = Handled::begin(Hook { kind: HookKind::Stuck, at });
        let ended = self.end_fault_loop(stop, &suspicion, &mut handled);
        let mut until = Instant::now();
        if let Err(error) = ended {
            handled.end = End::LetGo { reason: in_one_line(&error) };
            self.lost = self.lost.saturating_add(1);
            until += GIVEN_UP;
        }
        self.fault_loops.refaults.spare(suspicion.task, until);
        self.resume()?;
        self.conclude(stop, handled)
    }

    fn end_fault_loop(
        &mut self,
        stop: Stop,
        suspicion: &Suspicion,
        handled: &mut Handled,
    ) -> Result<(), Error> {
        self.arm_with(None)?;
        let vcpus = all_registers(&mut self.machine)?;
        let registers = vcpus.get(stop.vcpu.0).ok_or(Error::UnknownVcpu(stop.vcpu))?;
        self.session.refresh_from_memory(self.machine.phys())?;
        handled.phases.push(("registers", stop.at.elapsed()));
        let (stood, faults) = self.fault_loops.refaults.stood(suspicion.task);
        let diagnosis = fault_loop::caught(
            &self.session.image,
            self.machine.phys(),
            registers,
            stop.vcpu,
            suspicion.evidence(stood, faults),
            &mut self.session.cache,
        );
        handled.diagnosis = Some(diagnosis.map_err(Error::NotEnded)?);
        handled.phases.push(("diagnosed", stop.at.elapsed()));
        self.treat(stop.at, &vcpus, handled)
    }
}

#[cfg(test)]
mod tests {
    use guest::StopReason;

    use super::*;
    use crate::POLL;
    use crate::testing::{Memory, at_work};

    const TASK: GuestVirt = GuestVirt(0xffff_8880_0000_1000);
    const SERVE: GuestVirt = GuestVirt(0xffff_ffff_c000_0000);
    const MKWRITE: GuestVirt = GuestVirt(0xffff_ffff_c000_0100);
    const CALLER: GuestVirt = GuestVirt(0xffff_ffff_8100_0800);
    const NOPAGE: u64 = 0x100;

    fn handler(operation: &'static str, at: GuestVirt) -> Handler {
        Handler { operation, at, module: "m".to_owned(), function: operation.to_owned() }
    }

    fn suspicion(handlers: &[(&'static str, GuestVirt)]) -> Suspicion {
        let handlers = handlers.iter().map(|&(name, at)| handler(name, at)).collect();
        let mut suspicion = Suspicion::new(TASK, Registers::unknown(), handlers);
        suspicion.watch = Some(Watch { begun: Instant::now(), calls: 0, stage: Stage::Call });
        suspicion
    }

    fn visit(address: u64) -> Visit {
        Visit {
            task: TASK,
            area: GuestVirt(0xffff_8880_0000_2000),
            address: GuestVirt(address),
            write: false,
            user: Registers::unknown(),
            returns_to: CALLER,
            rsp: CALLER,
        }
    }

    /// One call for `address` that asks for another try without having mapped anything.
    fn call(suspicion: &mut Suspicion, address: u64, long: bool) -> Next {
        match suspicion.on_call(visit(address), false, long) {
            Next::Watch(Stage::Return { .. }) => suspicion.on_return(NOPAGE, Some(true), false),
            next => next,
        }
    }

    #[test]
    fn many_calls_and_enough_time_prove_it() {
        let mut looping = suspicion(&[("fault", SERVE)]);
        for calls in 1..CALLS_MIN {
            let rests = calls % CALLS_IN_A_ROW == 0;
            let next = if rests { Next::Rest } else { Next::Watch(Stage::Call) };
            assert_eq!(call(&mut looping, 0x7000, true), next, "{calls}");
            if rests {
                looping.watch = Some(Watch { calls: 0, ..looping.watch.unwrap() });
            }
        }
        assert_eq!(call(&mut looping, 0x7000, false), Next::Rest);
        let soon = looping.on_call(visit(0x7000), false, false);
        assert!(matches!(soon, Next::Watch(Stage::Return { .. })), "too soon: {soon:?}");
        assert_eq!(looping.on_call(visit(0x7000), false, true), Next::End);
        let evidence = looping.evidence(Duration::from_secs(6), 90_000);
        assert!(evidence[0].contains("90000 page faults"), "{evidence:?}");
        assert!(evidence[1].starts_with("64 calls of fault") && evidence[1].contains("0x7000"));
    }

    #[test]
    fn a_fault_that_needs_three_tries_ends_the_suspicion() {
        let mut tries = suspicion(&[("fault", SERVE)]);
        for _ in 0..2 {
            assert_eq!(call(&mut tries, 0x7000, true), Next::Watch(Stage::Call));
        }
        tries.on_call(visit(0x7000), false, true);
        // VM_FAULT_NOPAGE after vmf_insert_pfn().
        let third = tries.on_return(NOPAGE, Some(true), true);
        assert!(matches!(third, Next::Over(_)), "{third:?}");
    }

    #[test]
    fn faults_that_move_on_end_the_suspicion() {
        let mut moves = suspicion(&[("fault", SERVE)]);
        assert_eq!(call(&mut moves, 0x7000, true), Next::Watch(Stage::Call));
        assert!(matches!(call(&mut moves, 0x8000, true), Next::Over(_)));
        let mut computes = suspicion(&[("fault", SERVE)]);
        let user = Registers::unknown().with(Reg::Rbx, 1);
        let next = computes.on_call(Visit { user, ..visit(0x7000) }, false, true);
        assert!(matches!(next, Next::Over(_)), "{next:?}");
        assert!(matches!(computes.on_call(visit(0x7000), true, true), Next::Over(_)), "mapped");
    }

    #[test]
    fn a_function_that_hands_out_pages_is_not_the_cause_but_the_next_may_be() {
        let mut two = suspicion(&[("page_mkwrite", MKWRITE), ("fault", SERVE)]);
        two.on_call(visit(0x7000), false, false);
        assert_eq!(two.on_return(0, Some(false), false), Next::Rest);
        assert_eq!((two.handlers[0].at, two.calls), (SERVE, 0));
        two.on_call(visit(0x7000), false, false);
        let next = two.on_return(0x200, Some(false), false);
        assert_eq!(next, Next::Over("fault returned 0x200".to_owned()));
    }

    #[test]
    fn a_function_that_is_not_called_gives_way() {
        let mut two = suspicion(&[("page_mkwrite", MKWRITE), ("fault", SERVE)]);
        for _ in 0..ABSENT_MAX {
            assert_eq!(two.on_absence(), Next::Rest);
        }
        assert_eq!(two.handlers[0].at, SERVE);
        let stage = Stage::Return { at: CALLER, rsp: CALLER };
        two.watch = Some(Watch { begun: Instant::now(), calls: 0, stage });
        for _ in 0..=ABSENT_MAX {
            assert_eq!(two.on_absence(), Next::Rest, "it sleeps");
        }
    }

    #[test]
    fn others_are_let_by_until_they_are_too_many() {
        let mut busy = suspicion(&[("fault", SERVE)]);
        let other = Visit { task: CALLER, ..visit(0x9000) };
        for _ in 0..OTHERS_MAX {
            assert_eq!(busy.on_call(other.clone(), true, true), Next::Rest);
        }
        assert!(matches!(busy.on_call(other, true, true), Next::Over(_)));
    }

    #[test]
    fn a_call_that_can_t_be_read_ends_the_watch() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let mut watched = suspicion(&[("fault", SERVE)]);
        watched.calls = 3;
        guard.fault_loops.suspicion = Some(watched);
        assert!(guard.fault_loops.is_watching());
        let hook = Hook { kind: HookKind::Watched, at: SERVE };
        guard.machine.script.push_back(StopReason::Hook(hook));
        assert!(guard.step(POLL).unwrap());
        assert!(guard.machine.running && guard.fault_loops.suspicion.is_none());
        assert_eq!(guard.machine.armed.len(), 4);
        assert_eq!(memory.names(), ["unsuspected"]);
        assert_eq!((guard.incidents(), guard.lost(), guard.machine.writes), (0, 0, 0));
    }

    #[test]
    fn a_vcpu_at_another_place_is_let_by() {
        let mut guard = at_work(&Memory::default());
        guard.fault_loops.suspicion = Some(suspicion(&[("fault", SERVE)]));
        let hook = Hook { kind: HookKind::Watched, at: CALLER };
        guard.machine.script.push_back(StopReason::Hook(hook));
        assert!(guard.step(POLL).unwrap());
        let suspicion = guard.fault_loops.suspicion.as_ref().unwrap();
        assert_eq!((suspicion.others, suspicion.watch.is_none()), (1, true));
        assert!(guard.machine.running && guard.machine.armed.len() == 4);
    }

    #[test]
    fn a_watch_that_nobody_comes_to_is_taken_off() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let mut watched = suspicion(&[("fault", SERVE)]);
        let begun = Instant::now().checked_sub(2 * PATIENCE).unwrap();
        watched.watch = Some(Watch { begun, calls: 0, stage: Stage::Call });
        guard.fault_loops.suspicion = Some(watched);
        guard.machine.armed.push(Hook { kind: HookKind::Watched, at: SERVE });
        assert!(guard.step(POLL).unwrap());
        assert!(!guard.fault_loops.is_watching() && guard.fault_loops.suspicion.is_some());
        assert_eq!(guard.machine.armed.len(), 4);
        // The toy kernel counts no faults: the program is not seen to stand.
        assert!(guard.step(POLL).unwrap());
        assert!(guard.machine.running && guard.fault_loops.suspicion.is_none());
        assert!(memory.names().is_empty(), "nobody was told of it");
    }
}
