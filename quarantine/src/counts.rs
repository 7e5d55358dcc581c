//! Arithmetic of the preempt count, the RCU nesting and the interrupt flag: what they must be where
//! an error is returned to, and which part the kernel's unlock functions already do. No memory
//! access.
//!
//! Layout of the count (include/linux/preempt.h): bits 0-7 preemption, 8-15 softirq (0x100 =
//! serving one, 0x200 = one level of bottom halves off), 16-19 hardirq, 20-23 NMI; bit 31 is the
//! inverted NEED_RESCHED flag (arch/x86/include/asm/preempt.h) and belongs to the scheduler.

use diagnose::{Context, ExecutionContext, FrameEffects, Held, ResourceKind};

use crate::Reason;

/// The bits that count.
pub(crate) const COUNT_BITS: u32 = 0x7fff_ffff;
/// `SOFTIRQ_OFFSET`: a soft interrupt is being served.
const SERVING_SOFTIRQ: i64 = 0x100;
/// `SOFTIRQ_DISABLE_OFFSET`: bottom halves are off.
const BOTTOM_HALVES: i64 = 0x200;
/// `HARDIRQ_OFFSET`: one hard interrupt is being served.
pub(crate) const HARDIRQ: u32 = 0x1_0000;
const HARDIRQ_BITS: i64 = 0xf_0000;
const NMI_BITS: i64 = 0xf0_0000;

/// What holding a resource adds to the preempt count. `spin_lock_bh()` adds `SOFTIRQ_LOCK_OFFSET`.
pub(crate) fn preempt_share(kind: ResourceKind) -> i64 {
    match kind {
        ResourceKind::Spinlock
        | ResourceKind::SpinlockIrq
        | ResourceKind::SpinlockIrqsave
        | ResourceKind::ReadLock
        | ResourceKind::WriteLock
        | ResourceKind::Preemption => 1,
        ResourceKind::SpinlockBh => BOTTOM_HALVES + 1,
        ResourceKind::BottomHalves => BOTTOM_HALVES,
        _ => 0,
    }
}

/// What the unlock function that is called for it takes off the count: the plain unlock functions
/// call `preempt_enable()`. Bottom halves and bare preemption are put right by the write that
/// follows.
pub(crate) fn preempt_returned(kind: ResourceKind) -> i64 {
    match kind {
        ResourceKind::Spinlock
        | ResourceKind::SpinlockBh
        | ResourceKind::SpinlockIrq
        | ResourceKind::SpinlockIrqsave
        | ResourceKind::ReadLock
        | ResourceKind::WriteLock => 1,
        _ => 0,
    }
}

/// The preempt count before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    /// After the unlock functions ran.
    pub(crate) after_calls: u32,
    /// What it must be.
    pub(crate) target: u32,
}

/// What was assumed, for the plan's notes.
pub(crate) type Note = Option<String>;

fn sum(held: &[Held], share: fn(ResourceKind) -> i64) -> i64 {
    held.iter().map(|held| share(held.kind)).fold(0, i64::saturating_add)
}

/// The preempt count that the caller must find. `reporting`: part of the count that the interrupt
/// added in which the crash was reported. `correct`: the policy allows to correct a difference that
/// no found lock explains.
///
/// In task context the kernel was entered with a count of 0, so what the remaining frames hold is
/// all that may be left. A surplus made of whole bottom-half levels is taken off: every lock
/// function that turns bottom halves off adds an odd number, so no lock can hide in it. Any other
/// surplus may be a lock that was not found, which would stay locked for ever: refused, unless the
/// policy allows it.
///
/// In an interrupt the lower bits belong to whoever was interrupted and are left alone; only the
/// bits of the context itself are checked. So the count can't show a lock that was missed there, and the
/// caller must have seen to it that the kernel's lock functions are known by name.
pub(crate) fn preempt_count(
    context: &Context,
    effects: &FrameEffects,
    outer: &FrameEffects,
    reporting: u32,
    correct: bool,
) -> Result<(Count, Note), Reason> {
    let raw = context.preempt_count.ok_or(Reason::UnknownPreemptCount)?;
    // A detector's interrupt ends by itself and takes off what it added.
    let reporting = i64::from(reporting);
    let now = i64::from(raw & COUNT_BITS).saturating_sub(reporting);
    let delta = effects.preempt_delta;
    let held = sum(&effects.held, preempt_share);
    let explained = |value: i64| Reason::PreemptMismatch {
        found: raw & COUNT_BITS,
        explained: u32::try_from(value.max(0)).unwrap_or(u32::MAX),
    };
    if delta != held {
        return Err(Reason::Inconsistent {
            what: format!("held resources add {held:#x} to the preempt count, the code {delta:#x}"),
        });
    }
    let base = now.checked_sub(delta).filter(|base| *base >= 0).ok_or_else(|| explained(delta))?;
    let (target, note) = match context.kind {
        ExecutionContext::Task => task_base(base, context.idle, outer, correct)
            .map_err(|wanted| explained(wanted.saturating_add(delta)))?,
        kind => (interrupt_base(base, kind).ok_or_else(|| explained(base))?, None),
    };
    let after_calls = now.saturating_sub(sum(&effects.held, preempt_returned));
    let word =
        |value: i64| u32::try_from(value.saturating_add(reporting)).map_err(|_| explained(value));
    Ok((Count { after_calls: word(after_calls)?, target: word(target)? }, note))
}

/// The base in task context and a note, or what was expected.
fn task_base(
    base: i64,
    idle: bool,
    outer: &FrameEffects,
    correct: bool,
) -> Result<(i64, Note), i64> {
    // The idle task runs with preemption off: init_idle_preempt_count().
    let entered = i64::from(idle);
    // No frame can take off what it has not added, so where all add up to nothing, none holds anything: neither
    // those that are left nor those that stay, whatever could not be told of the latter.
    if base == entered && !outer.undetermined.is_empty() {
        return Ok((base, None));
    }
    let wanted = outer.preempt_delta.saturating_add(entered);
    let surplus = base.saturating_sub(wanted);
    if surplus == 0 {
        return Ok((base, None));
    }
    let known = outer.undetermined.is_empty() && surplus > 0 && wanted >= 0;
    if known && surplus % BOTTOM_HALVES == 0 && base & (HARDIRQ_BITS | NMI_BITS) == 0 {
        let note = format!(
            "bottom halves were off {} time(s) more than was found in the code; no lock can hide in that",
            surplus / BOTTOM_HALVES
        );
        return Ok((wanted, Some(note)));
    }
    if known && correct && base & (HARDIRQ_BITS | NMI_BITS) == 0 {
        let note = format!(
            "the preempt count had a surplus of {surplus:#x}; the policy allows to drop it"
        );
        return Ok((wanted, Some(note)));
    }
    Err(wanted)
}

/// The base in an interrupt, if the bits of the context are in it.
fn interrupt_base(base: i64, kind: ExecutionContext) -> Option<i64> {
    let fits = match kind {
        ExecutionContext::Softirq => {
            base & SERVING_SOFTIRQ != 0 && base & (HARDIRQ_BITS | NMI_BITS) == 0
        }
        ExecutionContext::Hardirq => base & HARDIRQ_BITS != 0 && base & NMI_BITS == 0,
        ExecutionContext::Nmi | ExecutionContext::Task => false,
    };
    fits.then_some(base)
}

/// Checks that the RCU nesting is explained. Each section found is left by `__rcu_read_unlock()`.
pub(crate) fn check_rcu(
    context: &Context,
    effects: &FrameEffects,
    outer: &FrameEffects,
) -> Result<(), Reason> {
    let found = effects.held.iter().filter(|held| held.kind == ResourceKind::Rcu).count();
    let found = i64::try_from(found).unwrap_or(i64::MAX);
    if found != effects.rcu_delta {
        return Err(Reason::Inconsistent {
            what: format!("{found} RCU sections were found, the code adds {}", effects.rcu_delta),
        });
    }
    let Some(nesting) = context.rcu_nesting.map(i64::from) else {
        return if found == 0 {
            Ok(())
        } else {
            Err(Reason::RcuMismatch { found: 0, explained: found })
        };
    };
    // In an interrupt the nesting counts the sections of the interrupted code too.
    let explained = found.saturating_add(outer.rcu_delta);
    let whole = context.kind == ExecutionContext::Task && outer.undetermined.is_empty();
    if nesting < found || (whole && nesting != explained) {
        return Err(Reason::RcuMismatch { found: nesting, explained });
    }
    Ok(())
}

/// Whether interrupts are on where the caller continues: what the code did before, which must not
/// contradict the caller's contract; the contract alone where the code does not tell.
pub(crate) fn interrupts(
    function: &str,
    effects: &FrameEffects,
    contract: Option<bool>,
) -> Result<bool, Reason> {
    match (effects.interrupts_before, contract) {
        (Some(before), Some(contract)) if before != contract => Err(Reason::Inconsistent {
            what: format!(
                "{function} calls drivers with interrupts {}, but they were {} before",
                on_off(contract),
                on_off(before)
            ),
        }),
        (Some(known), _) | (None, Some(known)) => Ok(known),
        (None, None) => Err(Reason::UnknownInterrupts { function: function.to_owned() }),
    }
}

/// `on` or `off`.
pub(crate) fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{context, effects};

    fn count(
        kind: ExecutionContext,
        raw: u32,
        held: &[ResourceKind],
        outer: &[ResourceKind],
        correct: bool,
    ) -> Result<(u32, u32), Reason> {
        preempt_count(&context(kind, raw), &effects(held), &effects(outer), 0, correct)
            .map(|(count, _)| (count.after_calls, count.target))
    }

    use ExecutionContext::{Hardirq, Nmi, Softirq, Task};
    use ResourceKind as K;

    #[test]
    fn unlock_functions_take_their_share_and_the_write_the_rest() {
        assert_eq!(count(Task, 0x8000_0000, &[], &[], false), Ok((0, 0)));
        assert_eq!(count(Task, 0x8000_0001, &[K::Spinlock], &[], false), Ok((0, 0)));
        assert_eq!(count(Task, 0x8000_0201, &[K::SpinlockBh], &[], false), Ok((0x200, 0)));
        assert_eq!(
            count(Task, 0x201, &[K::BottomHalves, K::Preemption], &[], false),
            Ok((0x201, 0))
        );
        assert_eq!(
            count(
                Task,
                3,
                &[K::Mutex, K::SpinlockIrqsave, K::SpinlockIrq, K::ReadLock],
                &[],
                false
            ),
            Ok((0, 0))
        );
        assert_eq!(count(Task, 1, &[K::RwsemRead, K::Preemption], &[], false), Ok((1, 0)));
    }

    #[test]
    fn what_the_outer_frames_hold_stays() {
        assert_eq!(count(Task, 2, &[K::Spinlock], &[K::Spinlock], false), Ok((1, 1)));
        assert_eq!(
            count(Task, 0x201, &[K::Spinlock], &[K::BottomHalves], false),
            Ok((0x200, 0x200))
        );
    }

    #[test]
    fn a_surplus_is_refused_unless_it_can_hide_no_lock() {
        assert!(matches!(count(Task, 1, &[], &[], false), Err(Reason::PreemptMismatch { .. })));
        assert_eq!(count(Task, 1, &[], &[], true), Ok((1, 0)));
        assert_eq!(count(Task, 0x200, &[], &[], false), Ok((0x200, 0)));
        assert!(matches!(count(Task, 0x201, &[], &[], false), Err(Reason::PreemptMismatch { .. })));
        assert!(matches!(
            count(Task, 0x1_0000, &[], &[], true),
            Err(Reason::PreemptMismatch { .. })
        ));
    }

    #[test]
    fn a_count_of_nothing_needs_no_explanation() {
        // What a frame gives back was taken by another, of which nothing could be told.
        let mut outer = effects(&[]);
        outer.preempt_delta = -1;
        let count = |raw, idle, outer: &FrameEffects| {
            let mut task = context(Task, raw);
            task.idle = idle;
            preempt_count(&task, &effects(&[]), outer, 0, false).map(|(count, _)| count.target)
        };
        assert!(matches!(count(0, false, &outer), Err(Reason::PreemptMismatch { .. })));
        outer.undetermined.push(9);
        assert_eq!(count(0x8000_0000, false, &outer), Ok(0));
        assert_eq!(count(1, true, &outer), Ok(1));
        assert!(matches!(count(1, false, &outer), Err(Reason::PreemptMismatch { .. })));
        assert!(matches!(count(0x200, false, &outer), Err(Reason::PreemptMismatch { .. })));
    }

    #[test]
    fn a_deficit_is_always_refused() {
        assert!(count(Task, 0, &[K::Spinlock], &[], true).is_err());
        assert!(count(Task, 0, &[], &[K::Spinlock], true).is_err());
    }

    #[test]
    fn interrupt_bits_stay() {
        assert_eq!(count(Softirq, 0x8000_0101, &[K::Spinlock], &[], false), Ok((0x100, 0x100)));
        assert_eq!(
            count(Hardirq, 0x8001_0002, &[K::Spinlock], &[], false),
            Ok((0x1_0001, 0x1_0001))
        );
        assert_eq!(count(Hardirq, 0x1_0100, &[], &[], false), Ok((0x1_0100, 0x1_0100)));
        assert!(count(Softirq, 0, &[], &[], true).is_err());
        assert!(count(Hardirq, 0x100, &[], &[], true).is_err());
        assert!(count(Nmi, 0x11_0000, &[], &[], true).is_err());
    }

    #[test]
    fn the_detectors_interrupt_stays() {
        let result = preempt_count(
            &context(Task, 0x1_0001),
            &effects(&[K::Preemption]),
            &effects(&[]),
            0x1_0000,
            false,
        );
        assert_eq!(result, Ok((Count { after_calls: 0x1_0001, target: 0x1_0000 }, None)));
    }

    #[test]
    fn a_delta_that_no_resource_explains_is_a_contradiction() {
        let mut odd = effects(&[K::Spinlock]);
        odd.preempt_delta = 2;
        let result = preempt_count(&context(Task, 2), &odd, &effects(&[]), 0, true);
        assert!(matches!(result, Err(Reason::Inconsistent { .. })));
    }

    #[test]
    fn the_idle_task_has_preemption_off() {
        let mut idle = context(Task, 1);
        idle.idle = true;
        let (count, _) = preempt_count(&idle, &effects(&[]), &effects(&[]), 0, false).unwrap();
        assert_eq!((count.after_calls, count.target), (1, 1));
    }

    #[test]
    fn rcu_must_add_up_in_task_context() {
        let mut task = context(Task, 0);
        task.rcu_nesting = Some(2);
        assert_eq!(check_rcu(&task, &effects(&[K::Rcu]), &effects(&[K::Rcu])), Ok(()));
        assert!(check_rcu(&task, &effects(&[K::Rcu]), &effects(&[])).is_err());
        task.kind = Softirq;
        assert_eq!(check_rcu(&task, &effects(&[K::Rcu]), &effects(&[])), Ok(()));
        task.rcu_nesting = Some(0);
        assert!(check_rcu(&task, &effects(&[K::Rcu]), &effects(&[])).is_err());
    }

    #[test]
    fn interrupts_follow_the_code_then_the_contract() {
        let mut code = effects(&[]);
        assert_eq!(interrupts("f", &code, Some(false)), Ok(false));
        assert!(matches!(interrupts("f", &code, None), Err(Reason::UnknownInterrupts { .. })));
        code.interrupts_before = Some(true);
        assert_eq!(interrupts("f", &code, None), Ok(true));
        assert!(matches!(interrupts("f", &code, Some(false)), Err(Reason::Inconsistent { .. })));
    }
}
