//! The loop of a guard: what it waits for, and what each stop of the guest means. One crash is in `crash.rs`,
//! what is known of the guest in `session.rs`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use guest::{Control, Hook, HookKind, Hooks, Machine, Registers, Stop, StopReason, Vcpu};
use quarantine::{Policy, Strikes};
use serde_json::{Value, json};

use crate::asleep::Asleep;
use crate::core_file::CoreFiles;
use crate::fault_loop::FaultLoops;
use crate::session::Session;
use crate::stuck::Stuck;
use crate::watch::Watch;
use crate::{Error, Failed, KnowledgeSources, Observer};

/// How long a guard sleeps at most between two looks at a healthy guest. A crash wakes it at once.
pub const POLL: Duration = Duration::from_millis(100);
/// The same while code is still being decoded ahead of a crash, and how long one slice of that may take: a
/// crash has to wait for its end.
const WARM_POLL: Duration = Duration::from_millis(1);
const WARM_SLICE: Duration = Duration::from_millis(2);
/// How long decoding may take before the hooks are armed for the first time.
const WARM_FIRST: Duration = Duration::from_millis(400);

/// What a guard is to do.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where knowledge of the guest's kernel comes from.
    pub knowledge: KnowledgeSources,
    /// What may be done to the guest.
    pub policy: Policy,
    /// Directory that incidents are written to; `None`: they are told to the observer only.
    pub incidents: Option<PathBuf>,
    /// Diagnose and plan, but write nothing to the guest: crashes take their stock course.
    pub dry_run: bool,
}

/// A guard at work.
pub struct Guard<M: Machine> {
    pub(crate) options: Options,
    pub(crate) strikes: Strikes,
    pub(crate) observer: Box<dyn Observer + Send>,
    pub(crate) machine: M,
    pub(crate) session: Session,
    pub(crate) watch: Watch,
    pub(crate) cores: CoreFiles,
    pub(crate) stuck: Stuck,
    pub(crate) asleep: Asleep,
    pub(crate) fault_loops: FaultLoops,
    /// The guest stands for our sake: we stopped it, or it waits for our answer to a stop.
    held: bool,
    begun: Instant,
    pub(crate) incidents: u32,
    pub(crate) lost: u32,
}

impl<M: Machine> Guard<M> {
    /// Learns the kernel of a machine whose guest has booted, and arms the hooks. The guest runs meanwhile
    /// but for the moment of arming. Tells `image` and `armed`.
    ///
    /// # Errors
    /// [`Error::NoAbility`] for a machine that can't be stopped or hooked; [`Error::NoKernel`] and
    /// [`Error::Booting`] while the guest boots; a kernel that can't be understood; or the machine fails.
    /// The machine is given back as it was.
    pub fn begin(
        mut machine: M,
        options: Options,
        observer: Box<dyn Observer + Send>,
    ) -> Result<Self, Failed<M>> {
        let able = control(&mut machine).map(drop).and_then(|()| hooks(&mut machine).map(drop));
        let session = able.and_then(|()| Session::begin(machine.phys(), &options.knowledge));
        match session {
            Ok(session) => Self::begin_with(machine, session, options, observer),
            Err(error) => Err(Failed { machine, error }),
        }
    }

    /// Begins with a kernel that is known.
    pub(crate) fn begin_with(
        machine: M,
        session: Session,
        options: Options,
        observer: Box<dyn Observer + Send>,
    ) -> Result<Self, Failed<M>> {
        if session.is_booting() {
            return Err(Failed { machine, error: Error::Booting });
        }
        let mut guard = Self {
            options,
            strikes: Strikes::default(),
            observer,
            machine,
            session,
            watch: Watch::default(),
            cores: CoreFiles::default(),
            stuck: Stuck::default(),
            asleep: Asleep::default(),
            fault_loops: FaultLoops::default(),
            held: false,
            begun: Instant::now(),
            incidents: 0,
            lost: 0,
        };
        let armed = guard.or_let_go(|guard| {
            guard.session.announce(&mut *guard.observer)?;
            guard.session.warm(guard.machine.phys(), WARM_FIRST);
            guard.arm()
        });
        match armed {
            Ok(()) => Ok(guard),
            Err(error) => Err(Failed { machine: guard.machine, error }),
        }
    }

    /// Stands guard until `ending` says so (asked every [`POLL`] or oftener) or the machine has ended.
    ///
    /// # Errors
    /// As [`Guard::step`].
    pub fn run(&mut self, ending: &dyn Fn() -> bool) -> Result<(), Error> {
        while !ending() && self.step(POLL)? {}
        Ok(())
    }

    /// One turn of the loop, for callers with a loop of their own: waits at most `limit` for a stop of the
    /// guest and answers it, or else looks at the guest that runs. `false` when the machine has ended.
    ///
    /// # Errors
    /// The machine, the observer or the disk failed. The guard is over then: the hooks are off as far as
    /// they could be taken off, and the guest runs unless somebody else paused it.
    pub fn step(&mut self, limit: Duration) -> Result<bool, Error> {
        self.or_let_go(|guard| guard.turn(limit))
    }

    /// Incidents so far: crashes, and deaths that no hook announced.
    #[must_use]
    pub fn incidents(&self) -> u32 {
        self.incidents
    }

    /// How many of them the guest did not survive, or survived badly.
    #[must_use]
    pub fn lost(&self) -> u32 {
        self.lost
    }

    /// Whether nothing is waited for: no probation, no guest that boots or was let go.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.watch.is_over()
    }

    /// The machine, to be detached. Hooks are still armed, and nobody answers them any more: detach it (or
    /// drop it, where its backend says that this detaches) before anything else.
    #[must_use]
    pub fn into_machine(self) -> M {
        self.machine
    }

    /// Time since the guard began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    pub(crate) fn say(&mut self, event: &str, fields: Value, text: &str) -> Result<(), Error> {
        Ok(self.observer.event(event, fields, text)?)
    }

    fn turn(&mut self, limit: Duration) -> Result<bool, Error> {
        let warm = self.session.warm(self.machine.phys(), WARM_SLICE);
        let limit = if warm { limit } else { limit.min(WARM_POLL) };
        match control(&mut self.machine)?.wait(limit)? {
            Some(stop) => self.on_stop(stop),
            None => self.on_quiet().map(|()| true),
        }
    }

    /// What to do when the guest stands; `false` when there is nothing left to guard.
    fn on_stop(&mut self, stop: Stop) -> Result<bool, Error> {
        self.held = !is_foreign(stop.reason);
        match stop.reason {
            StopReason::Hook(hook) if hook.kind == HookKind::Watched => {
                if self.is_chasing() {
                    self.on_chased(stop, hook)?;
                } else if self.fault_loops.is_watching() {
                    self.on_fault_watched(stop, hook)?;
                } else {
                    self.on_watched(stop)?;
                }
            }
            StopReason::Hook(hook) => self.on_crash(stop, hook)?,
            StopReason::Reset => self.on_reset()?,
            StopReason::TripleFault => self.on_death(stop, "triple_fault", "triple fault")?,
            StopReason::Unrunnable => self.on_death(stop, "unrunnable", "it cannot be run on")?,
            StopReason::Panicked => self.on_death(stop, "panicked", "it reports a panic")?,
            StopReason::Gone => {
                self.say("gone", json!({}), "the VM has ended")?;
                return Ok(false);
            }
            // Theirs to end.
            _ => {}
        }
        Ok(true)
    }

    /// A guest that runs: follow its modules, look at its vital signs.
    fn on_quiet(&mut self) -> Result<(), Error> {
        if self.watch.is_dead() {
            return Ok(());
        }
        if self.watch.is_waiting_for_boot() {
            return self.try_again_after_reset();
        }
        if self.session.refresh_modules(self.machine.phys())? {
            self.session.announce_modules(&mut *self.observer)?;
        }
        self.look_after()?;
        // All have one hook more to arm, and one only.
        if !self.is_chasing() && !self.look_at_faults()? {
            self.look_at_progress()?;
        }
        if self.fault_loops.is_watching() { Ok(()) } else { self.look_at_sleepers() }
    }

    /// The guest was reset: all that is known of its memory is void until it has booted again.
    fn on_reset(&mut self) -> Result<(), Error> {
        self.watch.wait_for_boot();
        self.stuck = Stuck::default();
        self.asleep = Asleep::default();
        self.fault_loops = FaultLoops::default();
        self.let_go()?;
        self.say("reset", json!({}), "the guest was reset; waiting until it has booted")
    }

    fn try_again_after_reset(&mut self) -> Result<(), Error> {
        if !self.watch.is_time_to_look() {
            return Ok(());
        }
        let vcpus = self.standing(|guard| all_registers(&mut guard.machine))?;
        let Ok(session) = self.session.begin_again(self.machine.phys(), &vcpus) else {
            return Ok(());
        };
        self.session = session;
        self.strikes.clear();
        self.watch.booted();
        self.session.announce(&mut *self.observer)?;
        self.arm()
    }

    /// The guest died without passing a hook. Nothing can be done for it here: it is let go, so that the VMM
    /// does what it would do without a guard.
    fn on_death(&mut self, stop: Stop, reason: &str, text: &str) -> Result<(), Error> {
        // A crash that was let go and ends so is still the same incident.
        if self.watch.since_let_go().is_none() {
            self.incidents = self.incidents.saturating_add(1);
            self.lost = self.lost.saturating_add(1);
        }
        match stop.reason {
            // Words of the guest's: it may go on, as it may after any crash that was let go.
            StopReason::Panicked => self.watch.let_go(),
            _ => self.watch.died(),
        }
        self.let_go()?;
        let fields = json!({ "reason": reason, "vcpu": stop.vcpu });
        self.say("died", fields, &format!("the guest died: {text} (vCPU {})", stop.vcpu.0))
    }

    /// Arms the hooks with the guest standing for that moment.
    pub(crate) fn arm(&mut self) -> Result<(), Error> {
        self.standing(|guard| guard.arm_with(None))?;
        let places = self.session.hooks();
        let names: Vec<_> = places.iter().map(|hook| hook.kind.function()).collect();
        self.say("armed", json!({ "hooks": places }), &format!("armed: {}", names.join(", ")))
    }

    /// Does `work` while the guest stands, and lets it run on if it ran.
    pub(crate) fn standing<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let ran = self.halt()?;
        let result = work(self);
        if ran {
            self.resume()?;
        }
        result
    }

    /// Stops a guest that runs; [`Guard::resume`] is to follow. `false`: it stands by somebody else's will.
    pub(crate) fn halt(&mut self) -> Result<bool, Error> {
        let control = control(&mut self.machine)?;
        if !control.is_running() {
            return Ok(false);
        }
        self.held = true;
        control.stop()?;
        Ok(true)
    }

    /// Whether the guest runs, as far as is known.
    pub(crate) fn is_running(&mut self) -> bool {
        control(&mut self.machine).is_ok_and(|control| control.is_running())
    }

    /// Arms the hooks, and another for a while, on a guest that stands. Where there are debug registers for four
    /// only, the hook gives way that others stand in for (`handle_stack_overflow()` is met after
    /// `exc_double_fault()` or before `oops_begin()`).
    pub(crate) fn arm_with(&mut self, extra: Option<Hook>) -> Result<(), Error> {
        let mut places = self.session.hooks();
        let hooks = hooks(&mut self.machine)?;
        let Some(extra) = extra else { return Ok(hooks.arm(&places)?) };
        places.push(extra);
        if hooks.arm(&places).is_ok() {
            return Ok(());
        }
        places.retain(|hook| hook.kind != HookKind::StackOverflow);
        Ok(hooks.arm(&places)?)
    }

    /// Lets the guest run on.
    pub(crate) fn resume(&mut self) -> Result<(), Error> {
        control(&mut self.machine)?.resume()?;
        self.held = false;
        Ok(())
    }

    /// Takes the hooks off and lets the guest run on. The second is tried even when the first fails.
    pub(crate) fn let_go(&mut self) -> Result<(), Error> {
        let disarmed = hooks(&mut self.machine).and_then(|hooks| Ok(hooks.disarm()?));
        self.resume()?;
        disarmed
    }

    /// Does `work`; if that fails or panics, takes the hooks off and lets the guest run on.
    fn or_let_go<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut attempt = Attempt { guard: self, succeeded: false };
        let result = work(attempt.guard);
        attempt.succeeded = result.is_ok();
        result
    }

    /// The last thing that is done after a failure: what fails here can't be helped.
    fn abandon(&mut self) {
        let Ok(control) = control(&mut self.machine) else { return };
        let ran = self.held || control.is_running();
        let _ = control.stop();
        let _ = hooks(&mut self.machine).map(|hooks| hooks.disarm());
        if ran {
            let _ = self.resume();
        }
    }
}

/// Whether somebody else is to end this stop, or nobody can.
fn is_foreign(reason: StopReason) -> bool {
    use StopReason::{Hook, Panicked, Reset, TripleFault, Unrunnable};
    !matches!(reason, Hook(_) | Reset | TripleFault | Unrunnable | Panicked)
}

/// Something that must not leave the guest standing, nor hooks that nobody answers.
struct Attempt<'g, M: Machine> {
    guard: &'g mut Guard<M>,
    succeeded: bool,
}

impl<M: Machine> Drop for Attempt<'_, M> {
    fn drop(&mut self) {
        if !self.succeeded {
            self.guard.abandon();
        }
    }
}

fn control(machine: &mut impl Machine) -> Result<&mut dyn Control, Error> {
    machine.control().ok_or(Error::NoAbility { ability: "stop and resume its guest" })
}

fn hooks(machine: &mut impl Machine) -> Result<&mut dyn Hooks, Error> {
    machine.hooks().ok_or(Error::NoAbility { ability: "hook places of the kernel" })
}

/// Registers of every vCPU of a machine that stands.
pub(crate) fn all_registers(machine: &mut impl Machine) -> Result<Vec<Registers>, Error> {
    let vcpus = 0..machine.vcpu_count();
    vcpus.map(|vcpu| machine.registers(Vcpu(vcpu)).map_err(Error::Registers)).collect()
}

#[cfg(test)]
mod tests {
    use guest::fake::FakeMachine;

    use super::*;
    use crate::testing::{Fault, Memory, Scripted, at_work, begin, hook, session};

    const SECOND: Duration = Duration::from_secs(1);

    fn step(guard: &mut Guard<Scripted>, reason: StopReason) -> Result<bool, Error> {
        guard.machine.script.push_back(reason);
        guard.step(POLL)
    }

    fn runs_without_hooks(machine: &Scripted) -> bool {
        machine.running && machine.armed.is_empty()
    }

    #[test]
    fn a_machine_without_hooks_is_refused_and_given_back() {
        let machine = FakeMachine::new(1 << 20, false);
        let begun = Guard::begin(machine, Options::default(), Box::new(Memory::default()));
        let Err(Failed { machine, error }) = begun else { panic!("it began") };
        assert!(matches!(error, Error::NoAbility { ability } if ability.contains("hook")));
        assert_eq!(machine.vcpu_count(), 1);
    }

    #[test]
    fn memory_without_a_kernel_is_refused() {
        let mut machine = Scripted::new();
        machine.wipe();
        let begun = Guard::begin(machine, Options::default(), Box::new(Memory::default()));
        let Err(Failed { machine, error }) = begun else { panic!("it began") };
        assert!(matches!(error, Error::NoKernel(_)), "{error}");
        assert!(runs_without_hooks(&machine));
    }

    #[test]
    fn a_kernel_that_boots_is_left_alone_until_it_has() {
        let memory = Memory::default();
        let mut machine = Scripted::new();
        machine.still_boots();
        let Err(Failed { mut machine, error }) = begin(machine, None, &memory) else {
            panic!("it began")
        };
        assert!(matches!(error, Error::Booting));
        assert!(runs_without_hooks(&machine) && machine.resumes == 0);
        // While the layer was being taken: what was read before may be of a stage of the boot.
        let early = session(&machine).map_err(|error| error.to_string()).unwrap();
        machine.boot();
        let begun = Guard::begin_with(machine, early, Options::default(), Box::new(memory.clone()));
        let Err(Failed { machine, error }) = begun else { panic!("it began") };
        assert!(matches!(error, Error::Booting));
        assert!(begin(machine, None, &memory).is_ok());
    }

    #[test]
    fn a_kernel_for_real_time_is_refused_by_name() {
        let mut machine = Scripted::new();
        machine.is_real_time();
        let Err(Failed { machine, error }) = begin(machine, None, &Memory::default()) else {
            panic!("it began")
        };
        assert!(matches!(error, Error::RealTime { banner } if banner.contains("9.9.9")));
        assert!(runs_without_hooks(&machine));
    }

    #[test]
    fn hooks_are_armed_and_a_pause_before_is_kept() {
        let memory = Memory::default();
        let guard = at_work(&memory);
        assert_eq!(guard.machine.armed.len(), 4);
        assert!(guard.machine.running);
        let mut paused = Scripted::new();
        paused.running = false;
        let guard = begin(paused, None, &memory).map_err(|failed| failed.error).unwrap();
        assert!(!guard.machine.running && guard.machine.resumes == 0);
    }

    #[test]
    fn an_observer_that_is_gone_at_the_start_leaves_no_hook() {
        let begun = begin(Scripted::new(), None, &Memory::refusing("armed"));
        let Err(Failed { machine, error }) = begun else { panic!("it began") };
        assert!(matches!(error, Error::Observer(_)));
        assert!(runs_without_hooks(&machine));
    }

    #[test]
    fn a_reset_takes_hooks_off_until_the_guest_has_booted_again() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        guard.machine.wipe();
        assert!(step(&mut guard, StopReason::Reset).unwrap());
        assert!(runs_without_hooks(&guard.machine));
        assert_eq!(memory.names(), ["reset"]);
        for stage in [Scripted::wipe, Scripted::still_boots] {
            stage(&mut guard.machine);
            guard.watch.age(2 * SECOND);
            assert!(guard.step(POLL).unwrap());
            assert!(runs_without_hooks(&guard.machine) && !guard.is_settled());
            guard.machine.boot();
        }
        // The first vCPU is still in the firmware: what lies in memory is the boot before.
        guard.machine.set(guest::Reg::Cr0, 0x10);
        guard.watch.age(2 * SECOND);
        assert!(guard.step(POLL).unwrap());
        assert!(runs_without_hooks(&guard.machine));
        guard.machine.set(guest::Reg::Cr0, 0x8000_0011);
        guard.watch.age(2 * SECOND);
        assert!(guard.step(POLL).unwrap());
        assert_eq!(memory.names(), ["image", "armed"]);
        assert!(guard.machine.running && guard.is_settled());
        assert_eq!((guard.incidents(), guard.lost()), (0, 0));
    }

    #[test]
    fn the_end_of_the_vm_ends_the_guard() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        assert!(!step(&mut guard, StopReason::Gone).unwrap());
        assert_eq!(memory.names(), ["gone"]);
        guard.machine.script.push_back(StopReason::Gone);
        guard.run(&|| false).unwrap();
        guard.run(&|| true).unwrap();
    }

    #[test]
    fn a_foreign_pause_is_left_alone() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        let before = guard.machine.resumes;
        assert!(step(&mut guard, StopReason::Foreign).unwrap());
        assert!(guard.step(POLL).unwrap());
        assert!(!guard.machine.running && guard.machine.resumes == before);
        assert_eq!(guard.machine.armed.len(), 4);
        // Nor does a failure of ours end it, but the hooks go: nobody would answer them.
        guard.machine.wipe();
        assert!(matches!(guard.step(POLL), Err(Error::Modules(_))));
        assert!(!guard.machine.running && guard.machine.armed.is_empty());
    }

    #[test]
    fn deaths_are_told_and_the_guest_is_let_go() {
        for (reason, word) in [
            (StopReason::TripleFault, "triple_fault"),
            (StopReason::Unrunnable, "unrunnable"),
            (StopReason::Panicked, "panicked"),
        ] {
            let memory = Memory::default();
            let mut guard = at_work(&memory);
            assert!(step(&mut guard, reason).unwrap());
            assert!(runs_without_hooks(&guard.machine));
            assert_eq!(memory.last("died")["reason"], word);
            assert_eq!((guard.incidents(), guard.lost()), (1, 1));
            let resumes = guard.machine.resumes;
            guard.watch.age(60 * SECOND);
            assert!(guard.step(POLL).unwrap());
            // Only a guest that merely says so is given another chance.
            let again = if reason == StopReason::Panicked { 4 } else { 0 };
            assert_eq!(guard.machine.armed.len(), again);
            assert_eq!(guard.machine.resumes > resumes, again > 0);
        }
    }

    #[test]
    fn a_crash_that_was_let_go_and_its_death_are_one_incident() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        assert!(step(&mut guard, StopReason::Hook(hook(HookKind::OopsBegin))).unwrap());
        assert!(step(&mut guard, StopReason::TripleFault).unwrap());
        assert_eq!((guard.incidents(), guard.lost()), (1, 1));
        assert_eq!(memory.names().last().unwrap(), "died");
    }

    #[test]
    fn a_reset_brings_back_what_had_died() {
        let memory = Memory::default();
        let mut guard = at_work(&memory);
        assert!(step(&mut guard, StopReason::Unrunnable).unwrap());
        assert!(step(&mut guard, StopReason::Reset).unwrap());
        guard.watch.age(2 * SECOND);
        assert!(guard.step(POLL).unwrap());
        assert_eq!(memory.names(), ["died", "reset", "image", "armed"]);
        assert_eq!(guard.machine.armed.len(), 4);
    }

    #[test]
    fn hooks_that_do_not_come_off_do_not_keep_the_guest_standing() {
        let mut guard = at_work(&Memory::default());
        guard.machine.fault = Some(Fault::Disarm);
        let result = step(&mut guard, StopReason::Hook(hook(HookKind::Panic)));
        assert!(matches!(result, Err(Error::Machine(guest::MachineError::Gone))));
        // The second try took them off.
        assert!(runs_without_hooks(&guard.machine));
    }

    #[test]
    fn a_panic_of_ours_lets_the_guest_go() {
        let mut guard = at_work(&Memory::default());
        guard.machine.fault = Some(Fault::Panic);
        guard.machine.script.push_back(StopReason::Hook(hook(HookKind::Panic)));
        let step = std::panic::AssertUnwindSafe(|| guard.step(POLL));
        assert!(std::panic::catch_unwind(step).is_err());
        assert!(runs_without_hooks(&guard.machine));
    }

    #[test]
    fn an_observer_that_goes_away_leaves_no_hook() {
        let memory = Memory::refusing("reset");
        let mut guard = at_work(&memory);
        assert!(matches!(step(&mut guard, StopReason::Reset), Err(Error::Observer(_))));
        assert!(runs_without_hooks(&guard.machine));
    }
}
