//! Carrying out a plan on a machine that stands: preconditions first, every write journaled, and on
//! a failure everything taken back that can be. Calls into the guest are `guest_call.rs`'s.

use guest::{AddressSpace, GuestPhys, GuestVirt, Machine, Registers, Vcpu, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;

use crate::action::{Action, Expected};
use crate::guest_call::{self, Called, GuestCall};
use crate::guest_struct::Structures;
use crate::journal::{Deed, Journal};
use crate::{Error, Plan, bystanders, invariants, locks};

/// What became of a plan. The machine still stands; resuming it is the caller's.
#[derive(Clone, Debug, Serialize)]
pub struct Applied {
    /// Steps carried out.
    pub steps: usize,
    /// Functions of the guest that were called, with their return values in hex.
    pub calls: Vec<(String, String)>,
    /// Bytes written into the guest's own memory.
    pub bytes_written: usize,
}

/// Carries out a plan. The machine must stand since the plan was made, and is left standing.
///
/// # Errors
/// [`Error::NothingToDo`], [`Error::NoAbility`], [`Error::Changed`]: nothing was changed. After any
/// other error but [`Error::HalfDone`] and [`Error::RollbackFailed`], everything was taken back:
/// the guest is as it was at the crash.
pub fn apply(
    plan: &Plan,
    machine: &mut dyn Machine,
    image: &RepairImage,
    journal: &mut Journal,
) -> Result<Applied, Error> {
    if plan.rung.is_none() || plan.actions.is_empty() {
        return Err(Error::NothingToDo);
    }
    check_abilities(plan, machine)?;
    check_preconditions(plan, machine, image)?;
    let mark = journal.entries().len();
    let mut hand = Hand { machine, image, journal };
    let mut called = Called::default();
    let result = carry_out(plan, &mut hand, &mut called);
    match result.and_then(|steps| check_soundness(plan, &mut hand).map(|()| steps)) {
        Ok(steps) => {
            let bytes_written = hand.bytes_written(mark);
            Ok(Applied { steps, calls: called.returned, bytes_written })
        }
        Err(cause) => Err(take_back(&mut hand, mark, called, cause)),
    }
}

/// A function that was called may have run into what the crash broke.
fn check_soundness(plan: &Plan, hand: &mut Hand<'_>) -> Result<(), Error> {
    let Some(current) = plan.current else { return Ok(()) };
    if plan.calls_guest() {
        // The others ran meanwhile, and stand somewhere else now.
        bystanders::wait(hand.machine, hand.image, plan.vcpu, current)?;
    }
    let memory = space(hand.machine, hand.image);
    let kernel = Structures { image: hand.image, memory: &memory };
    locks::given_back(&kernel, &plan.actions, current.task).map_err(Error::Unsound)?;
    invariants::after(hand.image, &memory, current, &plan.in_hand).map_err(Error::Unsound)
}

fn check_abilities(plan: &Plan, machine: &mut dyn Machine) -> Result<(), Error> {
    let need = |has: bool, ability| if has { Ok(()) } else { Err(Error::NoAbility { ability }) };
    need(machine.control().is_some(), "set registers")?;
    need(machine.writer().is_some(), "write to guest memory")?;
    if plan.calls_guest() {
        need(machine.fresh_memory().is_some(), "give the guest fresh memory")?;
        need(machine.caller().is_some(), "run guest code under control")?;
    }
    Ok(())
}

/// All words that the plan relies on and that no step of it changes before.
fn check_preconditions(
    plan: &Plan,
    machine: &mut dyn Machine,
    image: &RepairImage,
) -> Result<(), Error> {
    let space = space(machine, image);
    let word = |what: &str, expected: &Expected| check_word(&space, what, expected);
    let whole = |at: GuestVirt, size: u8, value: u64| Expected { at, size, mask: u64::MAX, value };
    for action in &plan.actions {
        match action {
            Action::CallGuest { function, expected, .. } => {
                expected.iter().try_for_each(|expected| word(function, expected))?;
            }
            Action::RewriteSavedRegisters { words, .. } => {
                for saved in words {
                    word(saved.register, &whole(saved.at, 8, saved.old))?;
                }
            }
            Action::PatchEntry { function, at, old, .. } => {
                for (index, &byte) in old.iter().enumerate() {
                    word(function, &whole(*at + index as u64, 1, u64::from(byte)))?;
                }
            }
            Action::Restore { name, at, old, .. } => {
                for (index, &byte) in old.iter().enumerate() {
                    word(name, &whole(*at + index as u64, 1, u64::from(byte)))?;
                }
            }
            // A word may be changed by the calls before it; it is checked when it is written.
            Action::WriteWord { .. } | Action::SetRegisters { .. } => {}
        }
    }
    Ok(())
}

fn check_word(space: &AddressSpace<'_>, what: &str, expected: &Expected) -> Result<(), Error> {
    let found = space
        .read_uint(expected.at, u64::from(expected.size))
        .map_err(|source| Error::memory(what, source))?;
    if found & expected.mask == expected.value & expected.mask {
        return Ok(());
    }
    Err(Error::Changed {
        what: what.to_owned(),
        at: expected.at,
        found: found & expected.mask,
        expected: expected.value & expected.mask,
    })
}

fn space<'m>(machine: &'m dyn Machine, image: &RepairImage) -> AddressSpace<'m> {
    image.placement.space(machine.phys())
}

fn carry_out(plan: &Plan, hand: &mut Hand<'_>, called: &mut Called) -> Result<usize, Error> {
    let mut steps = 0;
    let mut rest = plan.actions.as_slice();
    while let Some(action) = rest.first() {
        let calls: Vec<GuestCall> = rest.iter().map_while(GuestCall::of).collect();
        if calls.is_empty() {
            step(action, hand)?;
        } else {
            let count = plan.preempt_count_at;
            guest_call::run(hand, plan.vcpu, count, &calls, plan.limit(), called)?;
        }
        let done = calls.len().max(1);
        steps += done;
        rest = rest.get(done..).unwrap_or(&[]);
    }
    Ok(steps)
}

fn step(action: &Action, hand: &mut Hand<'_>) -> Result<(), Error> {
    match action {
        Action::CallGuest { .. } => Ok(()),
        Action::WriteWord { at, size, mask, old, new, name, why } => {
            let expected = Expected { at: *at, size: *size, mask: *mask, value: *old };
            let space = space(hand.machine, hand.image);
            check_word(&space, name, &expected)?;
            let now = space
                .read_uint(*at, u64::from(*size))
                .map_err(|source| Error::memory(name, source))?;
            let bytes = (now & !mask | new & mask).to_le_bytes();
            let bytes = bytes.get(..usize::from(*size)).unwrap_or(&bytes);
            hand.write_virt(*at, bytes, false, why)
        }
        Action::RewriteSavedRegisters { words, why, .. } => {
            for word in words {
                hand.write_virt(word.at, &word.new.to_le_bytes(), false, why)?;
            }
            Ok(())
        }
        Action::PatchEntry { at, new, why, .. } => hand.write_virt(*at, new, true, why),
        Action::Restore { at, new, code, why, .. } => hand.write_virt(*at, new, *code, why),
        Action::SetRegisters { vcpu, registers, why } => hand.set_registers(*vcpu, registers, why),
    }
}

/// Takes back what was done since `mark` and says in what state the guest is.
fn take_back(hand: &mut Hand<'_>, mark: usize, called: Called, cause: Error) -> Error {
    if let Err(source) = hand.roll_back(mark) {
        return Error::RollbackFailed { cause: Box::new(cause), source: Box::new(source) };
    }
    if called.returned.is_empty() && called.begun.is_none() {
        return cause;
    }
    let returned = called.returned.into_iter().map(|(function, _)| function);
    let done = returned.chain(called.begun).collect();
    Error::HalfDone { done, cause: Box::new(cause) }
}

/// The machine, with a journal: the only way in which this crate changes a guest.
pub(crate) struct Hand<'a> {
    pub(crate) machine: &'a mut dyn Machine,
    pub(crate) image: &'a RepairImage,
    pub(crate) journal: &'a mut Journal,
}

impl Hand<'_> {
    /// Writes at a guest-virtual address of the kernel, page by page.
    pub(crate) fn write_virt(
        &mut self,
        at: GuestVirt,
        bytes: &[u8],
        code: bool,
        why: &str,
    ) -> Result<(), Error> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
            let here = at + done as u64;
            let in_page = usize::try_from(4096 - (here.0 & 4095)).unwrap_or(1);
            let part = rest.get(..in_page).unwrap_or(rest);
            let phys = space(self.machine, self.image)
                .translate(here)
                .map_err(|source| Error::memory(why, source))?;
            self.write_phys(phys, Some(here), part, code, why)?;
            done += part.len();
        }
        Ok(())
    }

    /// Writes at a guest-physical address.
    pub(crate) fn write_phys(
        &mut self,
        phys: GuestPhys,
        virt: Option<GuestVirt>,
        new: &[u8],
        code: bool,
        why: &str,
    ) -> Result<(), Error> {
        let mut old = vec![0; new.len()];
        self.machine.phys().read(phys, &mut old).map_err(|source| Error::memory(why, source))?;
        self.raw_write(phys, new, code, why)?;
        let new = new.to_vec();
        self.journal.push(Deed::Write { phys, virt, old, new, code }, why);
        Ok(())
    }

    fn raw_write(
        &mut self,
        phys: GuestPhys,
        bytes: &[u8],
        code: bool,
        why: &str,
    ) -> Result<(), Error> {
        let writer =
            self.machine.writer().ok_or(Error::NoAbility { ability: "write to guest memory" })?;
        if code {
            writer.write_code(phys, bytes).map_err(Error::machine("writing code"))
        } else {
            writer.write(phys, bytes).map_err(|source| Error::memory(why, source))
        }
    }

    /// Sets registers of a vCPU.
    pub(crate) fn set_registers(
        &mut self,
        vcpu: Vcpu,
        registers: &Registers,
        why: &str,
    ) -> Result<(), Error> {
        let old = self.machine.registers(vcpu).map_err(Error::machine("reading registers"))?;
        let control =
            self.machine.control().ok_or(Error::NoAbility { ability: "set registers" })?;
        // Journaled first: a backend that fails half-way has set some of them.
        self.journal
            .push(Deed::Registers { vcpu, old: Box::new(old), new: Box::new(*registers) }, why);
        control.set_registers(vcpu, registers).map_err(Error::machine("setting registers"))
    }

    /// Takes back the deeds from entry `mark` on, last first. Everything is tried; the first
    /// failure is reported.
    pub(crate) fn roll_back(&mut self, mark: usize) -> Result<(), Error> {
        let deeds: Vec<Deed> = self.journal.undo_order(mark).map(|e| e.deed.clone()).collect();
        let removed: Vec<GuestPhys> = deeds
            .iter()
            .filter_map(|deed| match deed {
                Deed::FreshRemoved { region } => Some(region.at),
                _ => None,
            })
            .collect();
        let mut first = Ok(());
        let mut taken_back = 0;
        for deed in deeds {
            let result = self.undo(&deed, &removed);
            taken_back += usize::from(matches!(result, Ok(true)));
            first = first.and(result.map(drop));
        }
        if taken_back > 0 {
            self.journal.push(Deed::RolledBack { deeds: taken_back }, "the repair failed");
        }
        first
    }

    /// Takes one deed back; whether there was anything to take back.
    fn undo(&mut self, deed: &Deed, removed: &[GuestPhys]) -> Result<bool, Error> {
        match deed {
            Deed::Write { phys, old, code, .. } => {
                self.raw_write(*phys, old, *code, "taking a write back")?;
            }
            Deed::Registers { vcpu, old, .. } => {
                let control =
                    self.machine.control().ok_or(Error::NoAbility { ability: "set registers" })?;
                control
                    .set_registers(*vcpu, old.as_ref())
                    .map_err(Error::machine("restoring registers"))?;
            }
            Deed::FreshAdded { region } if !removed.contains(&region.at) => {
                let fresh = self
                    .machine
                    .fresh_memory()
                    .ok_or(Error::NoAbility { ability: "remove fresh memory" })?;
                fresh.remove(*region).map_err(Error::machine("removing fresh memory"))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Bytes written to the guest's own memory since entry `mark`.
    fn bytes_written(&self, mark: usize) -> usize {
        let entries = self.journal.entries().get(mark..).unwrap_or(&[]);
        entries
            .iter()
            .map(|entry| match &entry.deed {
                Deed::Write { virt: Some(_), new, .. } => new.len(),
                _ => 0,
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use diagnose::{Diagnosis, ResourceKind};
    use guest::Reg;

    use super::*;
    use crate::testing::double::{Double, Fail, WATCHED};
    use crate::testing::{PREEMPT_COUNT, RAM, Scene};
    use crate::{Policy, Situation, Strikes};

    const LOCKS: [ResourceKind; 2] = [ResourceKind::Mutex, ResourceKind::SpinlockBh];

    fn plan_of(scene: &Scene, diagnosis: &Diagnosis, policy: &Policy) -> Plan {
        let space = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        crate::plan(&situation, policy, &Strikes::default())
    }

    /// A crash of the toy driver with locks held, a plan for it, and the machine it is for.
    fn prepared(fail: Option<Fail>, quarantine: bool) -> (Double, RepairImage, Plan) {
        let mut scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        scene.hold(&mut diagnosis, &LOCKS);
        let count = diagnosis.context.preempt_count.unwrap();
        scene.machine.poke_virt(PREEMPT_COUNT, &count.to_le_bytes());
        let policy = Policy { strikes: if quarantine { 1 } else { 3 }, ..Policy::default() };
        let plan = plan_of(&scene, &diagnosis, &policy);
        (Double::new(scene.machine, fail), scene.image, plan)
    }

    fn snapshot(machine: &Double) -> Vec<u8> {
        let mut bytes = vec![0; RAM as usize];
        machine.phys().read(GuestPhys(0), &mut bytes).unwrap();
        bytes[WATCHED as usize..][..0x1_0000].fill(0);
        bytes
    }

    #[test]
    fn an_error_return_with_locks_held() {
        let (mut machine, image, plan) = prepared(None, false);
        let mut journal = Journal::open();
        let applied = apply(&plan, &mut machine, &image, &mut journal).unwrap();
        let names: Vec<_> = applied.calls.iter().map(|call| call.0.as_str()).collect();
        assert_eq!(names, ["_raw_spin_unlock", "mutex_unlock"]);
        assert_eq!(applied.steps, plan.actions.len());
        let space = AddressSpace::new(machine.phys(), image.placement.root, false);
        assert_eq!(space.read_u32(PREEMPT_COUNT), Ok(0x8000_0000));
        assert_eq!(machine.registers(Vcpu(0)).unwrap().get(Reg::Rax), Some(-5_i64 as u64));
        assert!(machine.fresh.is_none(), "fresh memory is gone");
        let text = serde_json::to_string(&journal).unwrap();
        for word in ["fresh_added", "fresh_removed", "called", "write", "registers"] {
            assert!(text.contains(&format!("\"kind\":\"{word}\"")), "{word}");
        }
    }

    #[test]
    fn a_quarantine_patches_every_entry_point() {
        let (mut machine, image, plan) = prepared(None, true);
        assert_eq!(plan.rung, Some(crate::Rung::QuarantineDriver));
        apply(&plan, &mut machine, &image, &mut Journal::open()).unwrap();
        let space = AddressSpace::new(machine.phys(), image.placement.root, false);
        let mut code = [0; 4];
        space.read(crate::testing::MODULE_TEXT, &mut code).unwrap();
        assert_eq!(code, [0x6a, 0xfb, 0x58, 0xc3]);
    }

    #[test]
    fn a_failure_before_the_first_call_leaves_no_trace() {
        for quarantine in [false, true] {
            for fail in [Fail::AddFresh, Fail::Run, Fail::LoadCode, Fail::Write(1)] {
                let (mut machine, image, plan) = prepared(Some(fail), quarantine);
                let before = snapshot(&machine);
                let registers = machine.registers(Vcpu(0)).unwrap();
                let error = apply(&plan, &mut machine, &image, &mut Journal::open()).unwrap_err();
                assert!(!matches!(error, Error::HalfDone { .. }), "{fail:?}: {error}");
                assert!(snapshot(&machine) == before, "{fail:?}: memory was changed");
                assert_eq!(machine.registers(Vcpu(0)).unwrap(), registers, "{fail:?}");
                assert!(machine.fresh.is_none(), "{fail:?}: fresh memory was left");
            }
        }
    }

    #[test]
    fn a_failure_after_a_call_is_half_done_and_says_so() {
        for fail in [Fail::CrashInCall(1), Fail::StopAfterCall(1), Fail::Registers] {
            let (mut machine, image, plan) = prepared(Some(fail), true);
            let registers = machine.registers(Vcpu(0)).unwrap();
            let error = apply(&plan, &mut machine, &image, &mut Journal::open()).unwrap_err();
            let Error::HalfDone { done, .. } = error else { panic!("{fail:?}: {error}") };
            assert_eq!(done.first().map(String::as_str), Some("_raw_spin_unlock"), "{fail:?}");
            assert_eq!(machine.registers(Vcpu(0)).unwrap(), registers, "{fail:?}");
            let space = AddressSpace::new(machine.phys(), image.placement.root, false);
            assert_eq!(space.read_u8(crate::testing::MODULE_TEXT), Ok(0x0f), "{fail:?}");
        }
    }

    #[test]
    fn a_changed_precondition_changes_nothing() {
        let (mut machine, image, plan) = prepared(None, false);
        let Some(Action::CallGuest { expected, .. }) = plan.actions.first() else { panic!() };
        let at = expected[0].at;
        machine.machine.poke_virt(at, &[0xee]);
        let before = snapshot(&machine);
        let error = apply(&plan, &mut machine, &image, &mut Journal::open()).unwrap_err();
        assert!(matches!(error, Error::Changed { .. }));
        assert!(snapshot(&machine) == before);
    }

    #[test]
    fn a_machine_that_can_only_be_read_is_refused() {
        let (double, image, plan) = prepared(None, false);
        let mut machine = double.machine;
        let error = apply(&plan, &mut machine, &image, &mut Journal::open()).unwrap_err();
        assert!(matches!(error, Error::NoAbility { .. }));
    }
}
