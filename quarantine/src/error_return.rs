//! Rung 1: leave the driver at its entry point and hand its caller in the core kernel an error.
//! Which value is `values.rs`'s, which locks `locks.rs`'s, which counts `counts.rs`'s.

use diagnose::{Boundary, CrashClass, Diagnosis, ExecutionContext, Frame, FrameEffects};
use guest::{
    CodeAddress, GuestVirt, HookKind, RFLAGS_AC, RFLAGS_DF, RFLAGS_IF, RFLAGS_TF, Reg, Registers,
};
use repair_image::{RepairImage, base_name};

use crate::action::{Action, SavedWord, saved_name};
use crate::boundaries::{HOPELESS, Rule, rule};
use crate::counts::{self, COUNT_BITS, on_off};
use crate::guest_struct::Structures;
use crate::plan::{Situation, Steps};
use crate::{Policy, Reason, callbacks, locks, path_walk, transmit, values};

/// Nested-task flag (bit 14) and resume flag (bit 16) in rflags, Intel SDM 1 3.4.3: an `iret` must
/// not find the first, and the second belongs to the faulting instruction.
const RFLAGS_NT_RF: u64 = 1 << 14 | 1 << 16;
/// Bit 1 of rflags is always set.
const RFLAGS_FIXED: u64 = 2;

/// Exceptions whose entry counts as an NMI (`irqentry_nmi_enter()`): they can't be left by plain
/// registers.
const NMI_LIKE: [&str; 5] =
    ["exc_double_fault", "exc_nmi", "exc_int3", "exc_debug", "exc_machine_check"];

/// Functions by whose calls held spinlocks are found. Linux builds them out of line: x86 selects none of the
/// `ARCH_INLINE_SPIN_LOCK` symbols of kernel/Kconfig.locks.
const LOCK_FUNCTIONS: [&str; 2] = ["_raw_spin_lock", "_raw_spin_lock_irqsave"];

/// In an interrupt nothing would show that a lock was missed, so the functions to look for must be known.
fn check_lock_functions(situation: &Situation<'_>) -> Result<(), Reason> {
    if situation.diagnosis.context.kind == ExecutionContext::Task {
        return Ok(());
    }
    let missing = LOCK_FUNCTIONS.iter().find(|name| situation.image.address_of(name).is_none());
    missing.map_or(Ok(()), |name| Err(Reason::MissingFunction { name: (*name).to_owned() }))
}

/// The steps of an error return.
pub(crate) fn steps(situation: &Situation<'_>, policy: &Policy) -> Result<Steps, Reason> {
    let diagnosis = situation.diagnosis;
    let boundary = diagnosis.boundary.as_ref().ok_or(Reason::NoBoundary)?;
    check_context(diagnosis)?;
    check_lock_functions(situation)?;
    locks::check(diagnosis, &boundary.effects)?;
    let rule = rule(&boundary.function);
    let target = target(situation, boundary, rule)?;
    let actions =
        locks::release_calls(diagnosis, &boundary.effects, situation.image, situation.memory)?;
    let mut steps = Steps { actions, ..Steps::default() };
    let outer = outer_effects(situation, boundary);
    counts::check_rcu(&diagnosis.context, &boundary.effects, &outer)?;
    let (count, note) = counts::preempt_count(
        &diagnosis.context,
        &boundary.effects,
        &outer,
        detector(diagnosis).map_or(0, |_| counts::HARDIRQ),
        policy.correct_preempt_count,
    )?;
    steps.notes.extend(note);
    steps.actions.extend(write_count(diagnosis, count)?);
    if rule.is_none() {
        steps.notes.push(format!(
            "{} is not in the table of callers: the value follows from the type alone",
            boundary.function
        ));
    }
    let why = format!("{} continues: {}", boundary.function, target.1);
    steps.actions.extend(leave(situation, &target.0, why)?);
    steps.notes.push(
        "memory, references and device state that the abandoned frames had in hand are not given back"
            .to_owned(),
    );
    Ok(steps)
}

/// What the frames that stay hold. Where code analysis could not tell and the caller is one that sends packets,
/// the device tells.
fn outer_effects(situation: &Situation<'_>, boundary: &Boundary) -> FrameEffects {
    let mut outer = boundary.outer.clone();
    if !outer.undetermined.is_empty()
        && callbacks::sends_packets(&boundary.function)
        && let Some(count) = transmit::preempt_count(situation, boundary)
    {
        outer.preempt_delta = count;
    }
    if let Some(task) = &situation.diagnosis.task {
        let kernel = Structures { image: situation.image, memory: situation.memory };
        outer.rcu_delta = outer.rcu_delta.saturating_add(path_walk::sections(&kernel, task.at));
    }
    outer
}

/// Refuses what would only be met again at once.
pub(crate) fn check_hope(diagnosis: &Diagnosis) -> Result<(), Reason> {
    let names = diagnosis.frames.iter().filter_map(|frame| frame.function.as_deref());
    let mut found = names.filter_map(|name| HOPELESS.iter().find(|it| it.0 == base_name(name)));
    found.next().map_or(Ok(()), |(function, why)| {
        Err(Reason::NotReturnable { function: (*function).to_owned(), why: (*why).to_owned() })
    })
}

fn check_context(diagnosis: &Diagnosis) -> Result<(), Reason> {
    check_hope(diagnosis)?;
    if diagnosis.context.kind == ExecutionContext::Nmi {
        return Err(Reason::Context { context: "non-maskable interrupt" });
    }
    // At the entry of exc_double_fault() itself (frame 0) nothing has been entered yet.
    let nmi_like = diagnosis.frames.iter().take(diagnosis.fault_frame).skip(1).any(|frame| {
        frame.function.as_deref().is_some_and(|function| NMI_LIKE.contains(&base_name(function)))
    });
    if nmi_like {
        return Err(Reason::Context { context: "non-maskable exception" });
    }
    match diagnosis.class {
        Some(CrashClass::HardLockup) => Err(Reason::Context { context: "hard-lockup detector" }),
        Some(CrashClass::RcuStall) => Err(Reason::Context { context: "RCU-stall detector" }),
        Some(CrashClass::HungTask) => Err(Reason::Context { context: "hung-task detector" }),
        _ => Ok(()),
    }
}

/// Registers with which the caller continues, and the value it gets, in words.
fn target(
    situation: &Situation<'_>,
    boundary: &Boundary,
    rule: Option<&Rule>,
) -> Result<(Registers, String), Reason> {
    let diagnosis = situation.diagnosis;
    if boundary.frame != boundary.entry.saturating_add(1) || boundary.entry < diagnosis.fault_frame
    {
        return Err(Reason::Inconsistent {
            what: format!("frame {} did not call frame {}", boundary.frame, boundary.entry),
        });
    }
    let missing = || Reason::Inconsistent { what: "a frame is missing".to_owned() };
    let caller = diagnosis.frames.get(boundary.frame).ok_or_else(missing)?;
    let entry = diagnosis.frames.get(boundary.entry).ok_or_else(missing)?;
    let mut registers = continued(situation, caller, entry)?;
    let entry_name = entry.function.as_deref().unwrap_or("the driver");
    let value = values::error_for_caller(
        boundary.prototype.as_ref(),
        &boundary.function,
        entry_name,
        rule,
        &*situation.image.types,
    )?;
    if let Some(number) = value.number {
        registers.set(Reg::Rax, number as u64);
    }
    let contract = rule.and_then(|rule| rule.interrupts);
    let interrupts = counts::interrupts(&boundary.function, &boundary.effects, contract)?;
    registers.set(Reg::Rflags, flags(diagnosis, caller, interrupts));
    let words = format!(
        "{entry_name} returns {} ({}), interrupts {}",
        value.name,
        value.why,
        on_off(interrupts)
    );
    Ok((registers, words))
}

/// rip, rsp and the callee-saved registers of `caller` after the call of `callee` returned. All
/// must be known, and the return address must still be on the stack.
pub(crate) fn continued(
    situation: &Situation<'_>,
    caller: &Frame,
    callee: &Frame,
) -> Result<Registers, Reason> {
    let function = || caller.function.clone().unwrap_or_else(|| "the caller".to_owned());
    let CodeAddress::Return(rip) = caller.pc else {
        return Err(Reason::Inconsistent {
            what: format!("{} was interrupted, it did not call the driver", function()),
        });
    };
    let unknown = |reg: Reg| Reason::UnknownRegister { register: reg.name(), function: function() };
    let rsp = caller.registers.rsp().or(callee.cfa).ok_or_else(|| unknown(Reg::Rsp))?;
    if callee.cfa.is_some_and(|cfa| cfa != rsp) {
        return Err(Reason::Inconsistent {
            what: format!("rsp of {} is not the CFA of the frame that it called", function()),
        });
    }
    if !rsp.is_kernel_half() || rsp.0 % 8 != 0 || !situation.image.is_text(rip) {
        return Err(Reason::Inconsistent {
            what: format!("{} cannot continue at {rip:#x} with the stack at {rsp:#x}", function()),
        });
    }
    let at = rsp.offset(-8);
    let found = situation
        .memory
        .read_u64(at)
        .map_err(|_| Reason::Unreadable { what: "the return address".to_owned(), at })?;
    if found != rip.0 {
        return Err(Reason::ReturnAddressGone { at, found, expected: rip });
    }
    let mut registers = Registers::unknown().with(Reg::Rip, rip.0).with(Reg::Rsp, rsp.0);
    for reg in Reg::CALLEE_SAVED {
        registers.set(reg, caller.registers.get(reg).ok_or_else(|| unknown(reg))?);
    }
    Ok(registers)
}

/// rflags for continuing: AC, DF, TF, NT and RF off, IF as asked.
fn flags(diagnosis: &Diagnosis, caller: &Frame, interrupts: bool) -> u64 {
    let fault = diagnosis.frames.get(diagnosis.fault_frame);
    let known = caller
        .registers
        .get(Reg::Rflags)
        .or_else(|| fault.and_then(|frame| frame.registers.get(Reg::Rflags)))
        .unwrap_or(0);
    let cleared = RFLAGS_AC | RFLAGS_DF | RFLAGS_TF | RFLAGS_IF | RFLAGS_NT_RF;
    known & !cleared | RFLAGS_FIXED | if interrupts { RFLAGS_IF } else { 0 }
}

/// The write that puts the preempt count right after the unlock calls, if one is needed.
/// NEED_RESCHED (bit 31) may change while calls are made, thus it is not touched.
pub(crate) fn write_count(
    diagnosis: &Diagnosis,
    count: counts::Count,
) -> Result<Option<Action>, Reason> {
    if count.after_calls == count.target {
        return Ok(None);
    }
    let at = diagnosis.context.preempt_count_at.ok_or(Reason::UnknownPreemptCount)?;
    Ok(Some(Action::WriteWord {
        at,
        size: 4,
        mask: u64::from(COUNT_BITS),
        old: u64::from(count.after_calls),
        new: u64::from(count.target),
        name: "__preempt_count".to_owned(),
        why: "what the abandoned frames added and no unlock function takes off".to_owned(),
    }))
}

/// Index of the soft-lockup detector's frame, if the crash was reported by it: a timer interrupt
/// that interrupted the driver.
fn detector(diagnosis: &Diagnosis) -> Option<usize> {
    let reporting = diagnosis.frames.get(..diagnosis.fault_frame)?;
    reporting
        .iter()
        .position(|frame| frame.function.as_deref().map(base_name) == Some("watchdog_timer_fn"))
}

/// The way from the crash to `target`.
fn leave(
    situation: &Situation<'_>,
    target: &Registers,
    why: String,
) -> Result<Vec<Action>, Reason> {
    let diagnosis = situation.diagnosis;
    if let Some(detector) = detector(diagnosis) {
        return leave_detector(situation, detector, target, why);
    }
    if diagnosis.class == Some(CrashClass::SoftLockup) {
        return Err(Reason::Context { context: "soft-lockup detector" });
    }
    // On the entry of exc_double_fault() nothing has been entered that would have to be left.
    let double_fault =
        diagnosis.hook.is_some_and(|hook| matches!(hook.kind, HookKind::DoubleFault));
    if diagnosis.context.idle
        && !double_fault
        && let Some(regs) = diagnosis.fault_regs_at
    {
        return leave_exception(situation, regs, target, why);
    }
    Ok(vec![Action::SetRegisters { vcpu: diagnosis.vcpu, registers: *target, why }])
}

/// Over the idle task, the exception entry told RCU that the CPU is no longer idle
/// (`ct_irq_enter()` in `irqentry_enter()`), and only `irqentry_exit()` takes that back. Left
/// undone, RCU would from then on take the CPU for idle when it is busy, and free memory in use. So
/// the saved registers are rewritten and the kernel leaves the exception itself.
pub(crate) fn leave_exception(
    situation: &Situation<'_>,
    regs: GuestVirt,
    target: &Registers,
    why: String,
) -> Result<Vec<Action>, Reason> {
    let image = situation.image;
    let function = |name: &str| {
        image.address_of(name).ok_or_else(|| Reason::MissingFunction { name: name.to_owned() })
    };
    let exit = function("irqentry_exit")?;
    let back = function("error_return")?;
    let slot = regs.offset(-8);
    let old = situation
        .memory
        .read_u64(slot)
        .map_err(|_| Reason::Unreadable { what: "the stack".to_owned(), at: slot })?;
    let flags = flags(situation.diagnosis, &outermost(situation), false);
    Ok(vec![
        rewrite(situation, regs, target, why)?,
        Action::WriteWord {
            at: slot,
            size: 8,
            mask: u64::MAX,
            old,
            new: back.0,
            name: "return address".to_owned(),
            why: "irqentry_exit() returns to error_return, the end of the exception entry"
                .to_owned(),
        },
        Action::SetRegisters {
            vcpu: situation.diagnosis.vcpu,
            // irqentry_state_t is a union of one byte, passed in a register; exit_rcu = true.
            registers: Registers::unknown()
                .with(Reg::Rip, exit.0)
                .with(Reg::Rdi, regs.0)
                .with(Reg::Rsi, 1)
                .with(Reg::Rsp, slot.0)
                .with(Reg::Rflags, flags),
            why:
                "the idle task was interrupted: the exception is left through irqentry_exit(), so \
                  that RCU's view of the CPU stays right"
                    .to_owned(),
        },
    ])
}

/// Panic called by the soft-lockup detector, in the timer interrupt: the detector returns
/// HRTIMER_RESTART, the interrupt ends as always, and the code that it interrupted continues at the
/// target. Jumping out of the interrupt would leave its stack in use and its timer dead.
fn leave_detector(
    situation: &Situation<'_>,
    detector: usize,
    target: &Registers,
    why: String,
) -> Result<Vec<Action>, Reason> {
    let diagnosis = situation.diagnosis;
    let regs = diagnosis.fault_regs_at.ok_or(Reason::NoSavedRegisters)?;
    let missing = || Reason::Inconsistent { what: "the detector has no caller".to_owned() };
    let callee = diagnosis.frames.get(detector).ok_or_else(missing)?;
    let caller = diagnosis.frames.get(detector.saturating_add(1)).ok_or_else(missing)?;
    if diagnosis.context.idle
        || caller.function.as_deref().map(base_name) != Some("__hrtimer_run_queues")
    {
        return Err(Reason::Context { context: "soft-lockup detector" });
    }
    let restart = situation.image.types.enumerator("HRTIMER_RESTART").ok_or_else(|| {
        Reason::NoErrorValue {
            shape: "enum hrtimer_restart".to_owned(),
            function: "__hrtimer_run_queues".to_owned(),
        }
    })?;
    let mut registers = continued(situation, caller, callee)?;
    registers.set(Reg::Rax, restart as u64);
    registers.set(Reg::Rflags, flags(diagnosis, caller, false));
    Ok(vec![
        rewrite(situation, regs, target, why)?,
        Action::SetRegisters {
            vcpu: diagnosis.vcpu,
            registers,
            why: "the soft-lockup detector returns HRTIMER_RESTART and the timer interrupt ends"
                .to_owned(),
        },
    ])
}

/// The frame whose flags are taken over when the kernel's own code runs next.
fn outermost(situation: &Situation<'_>) -> Frame {
    let diagnosis = situation.diagnosis;
    let boundary = diagnosis.boundary.as_ref().and_then(|b| diagnosis.frames.get(b.frame));
    boundary.or(diagnosis.frames.first()).cloned().unwrap_or_else(|| Frame {
        pc: CodeAddress::Exact(GuestVirt(0)),
        cfa: None,
        registers: Registers::unknown(),
        trust: diagnose::Trust::Context,
        module: None,
        function: None,
        function_start: None,
        source: Vec::new(),
        saved_at: None,
    })
}

fn rewrite(
    situation: &Situation<'_>,
    regs: GuestVirt,
    target: &Registers,
    why: String,
) -> Result<Action, Reason> {
    let mut words = Vec::new();
    for (reg, new) in target.iter() {
        let Some(name) = saved_name(reg) else { continue };
        let at = regs + saved_offset(situation.image, name)?;
        let old = situation
            .memory
            .read_u64(at)
            .map_err(|_| Reason::Unreadable { what: "saved registers".to_owned(), at })?;
        if old != new {
            words.push(SavedWord { register: reg.name(), at, old, new });
        }
    }
    Ok(Action::RewriteSavedRegisters { at: regs, words, why })
}

/// Offset of a register in `struct pt_regs`, bytes.
fn saved_offset(image: &RepairImage, name: &str) -> Result<u64, Reason> {
    let member = image.types.member("pt_regs", name).ok_or_else(|| Reason::MissingMember {
        structure: "pt_regs".to_owned(),
        path: name.to_owned(),
    })?;
    Ok(member.offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;
    use diagnose::ResourceKind;

    fn run(scene: &Scene, diagnosis: &Diagnosis) -> Result<Steps, Reason> {
        let space = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        steps(&situation, &Policy::default())
    }

    fn last_registers(steps: &Steps) -> Registers {
        match steps.actions.last() {
            Some(Action::SetRegisters { registers, .. }) => *registers,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_plain_error_return() {
        let scene = Scene::new();
        let steps = run(&scene, &scene.diagnosis()).unwrap();
        assert_eq!(steps.actions.len(), 1);
        let registers = last_registers(&steps);
        assert_eq!(registers.rip(), Some(scene.return_address));
        assert_eq!(registers.rsp(), Some(scene.boundary_rsp));
        assert_eq!(registers.get(Reg::Rax), Some(-5i64 as u64));
        assert_eq!(registers.get(Reg::R15), Some(0x15));
        assert_eq!(registers.get(Reg::Rflags), Some(RFLAGS_IF | RFLAGS_FIXED));
    }

    #[test]
    fn an_unknown_register_refuses() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        let frame = diagnosis.boundary.as_ref().unwrap().frame;
        diagnosis.frames[frame].registers.forget(Reg::R13);
        let found = run(&scene, &diagnosis).unwrap_err();
        assert!(matches!(found, Reason::UnknownRegister { register: "r13", .. }));
    }

    #[test]
    fn an_overwritten_return_address_refuses() {
        let mut scene = Scene::new();
        let diagnosis = scene.diagnosis();
        scene.machine.poke_virt(scene.boundary_rsp.offset(-8), &[1; 8]);
        assert!(matches!(run(&scene, &diagnosis), Err(Reason::ReturnAddressGone { .. })));
    }

    #[test]
    fn locks_first_then_the_count_then_the_registers() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        scene.hold(&mut diagnosis, &[ResourceKind::Mutex, ResourceKind::SpinlockBh]);
        let steps = run(&scene, &diagnosis).unwrap();
        let kinds: Vec<_> = steps
            .actions
            .iter()
            .map(|action| match action {
                Action::CallGuest { function, .. } => function.as_str(),
                Action::WriteWord { new: 0, old: 0x200, size: 4, .. } => "count",
                Action::SetRegisters { .. } => "registers",
                _ => "?",
            })
            .collect();
        assert_eq!(kinds, ["_raw_spin_unlock", "mutex_unlock", "count", "registers"]);
    }

    #[test]
    fn a_transmitting_caller_keeps_its_counts() {
        for (own_locking, kept, refused) in [(0, 0x201, 0x200), (1, 0x200, 0x201)] {
            let mut scene = Scene::new();
            let mut diagnosis = scene.diagnosis();
            let boundary = diagnosis.boundary.as_mut().unwrap();
            boundary.outer.undetermined.push(boundary.frame);
            diagnosis.context.preempt_count = Some(kept);
            assert!(matches!(run(&scene, &diagnosis), Err(Reason::PreemptMismatch { .. })));
            diagnosis.boundary.as_mut().unwrap().function = "dev_hard_start_xmit".to_owned();
            assert!(matches!(run(&scene, &diagnosis), Err(Reason::PreemptMismatch { .. })));
            scene.sends_packets(&mut diagnosis, own_locking);
            let steps = run(&scene, &diagnosis).unwrap();
            let writes = |action: &Action| matches!(action, Action::WriteWord { .. });
            assert!(!steps.actions.iter().any(writes));
            diagnosis.context.preempt_count = Some(refused);
            assert!(matches!(run(&scene, &diagnosis), Err(Reason::PreemptMismatch { .. })));
        }
    }

    #[test]
    fn without_memory_nothing_goes_on() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        diagnosis.frames[0].function = Some("out_of_memory".to_owned());
        assert!(matches!(run(&scene, &diagnosis), Err(Reason::NotReturnable { .. })));
    }

    #[test]
    fn over_idle_the_exception_is_left_by_the_kernel() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        scene.over_idle(&mut diagnosis);
        let steps = run(&scene, &diagnosis).unwrap();
        let registers = last_registers(&steps);
        assert_eq!(registers.rip(), scene.image.address_of("irqentry_exit"));
        assert_eq!(registers.get(Reg::Rdi), Some(scene.regs_at.0));
        assert_eq!(registers.rsp(), Some(scene.regs_at.offset(-8)));
        assert_eq!(registers.get(Reg::Rflags).unwrap() & RFLAGS_IF, 0);
        let Action::RewriteSavedRegisters { words, .. } = &steps.actions[0] else { panic!() };
        let rip = words.iter().find(|word| word.register == "rip").unwrap();
        assert_eq!(rip.new, scene.return_address.0);
        assert!(matches!(steps.actions[1], Action::WriteWord { size: 8, .. }));
    }
}
