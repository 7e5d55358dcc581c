//! What the kernel's own reporting of a crash has added to counts and flags by the time a dump is taken: it is taken
//! off, so that the context is that of the crash. Not what the reporting frames say of the class.

use guest::{RFLAGS_IF, Reg, Registers};

use crate::boundary::Scene;
use crate::code::CodeCache;
use crate::context::NEED_RESCHED;
use crate::names::function;
use crate::{Context, FrameEffects};

/// What preemption turned off adds. The bits above it are of interrupts, and those say themselves what they added.
const PREEMPTION: std::ops::RangeInclusive<i64> = 0..=0xff;

/// The context before the frames further in than the fault ran; `None` when there are none, or their code does not
/// tell.
///
/// A dump of a panic is taken inside of `panic()`, which turns interrupts and preemption off (kernel/panic.c). Where a
/// hook is, nothing of that has happened yet.
pub(crate) fn taken_off(
    scene: &Scene<'_>,
    registers: &Registers,
    cache: &mut CodeCache,
    evidence: &mut Vec<String>,
) -> Option<Context> {
    let fault = scene.fault;
    if fault.at == 0 || !fault.found {
        return None;
    }
    let interrupts = registers.get(Reg::Rflags).map(|flags| flags & RFLAGS_IF != 0);
    let added = scene.effects(cache, 0..fault.at, interrupts);
    let Some(context) = before(scene.context, fault.regs_at.is_some(), &added) else {
        evidence
            .push("what reporting the crash added to the preempt count is not known".to_owned());
        return None;
    };
    if added.preempt_delta != 0 {
        let by = added.held.iter().filter_map(|held| fault.frames.get(held.frame)).map(function);
        let by = by.collect::<Vec<_>>().join(", ");
        evidence.push(format!(
            "{:#x} of the preempt count is the crash's own reporting, in {by}",
            added.preempt_delta
        ));
    }
    Some(context)
}

/// `context` without what was added since. `saved`: the fault's own registers are known, and with them the flag.
fn before(context: &Context, saved: bool, added: &FrameEffects) -> Option<Context> {
    if !added.undetermined.is_empty() || !PREEMPTION.contains(&added.preempt_delta) {
        return None;
    }
    let (count, flag) = match context.preempt_count {
        Some(found) => (found & !NEED_RESCHED, found & NEED_RESCHED),
        None => return Some(context.clone()),
    };
    let count = u32::try_from(i64::from(count).checked_sub(added.preempt_delta)?).ok()?;
    let nesting = match context.rcu_nesting {
        Some(found) => Some(i32::try_from(i64::from(found).checked_sub(added.rcu_delta)?).ok()?),
        None => None,
    };
    let interrupts = if saved { context.interrupts_enabled } else { added.interrupts_before };
    Some(Context {
        preempt_count: Some(count | flag),
        rcu_nesting: nesting,
        interrupts_enabled: interrupts,
        ..context.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExecutionContext;

    fn context(count: u32) -> Context {
        Context {
            preempt_count: Some(count),
            rcu_nesting: Some(1),
            interrupts_enabled: Some(true),
            ..crate::testing::context(ExecutionContext::Task)
        }
    }

    fn added(preempt_delta: i64) -> FrameEffects {
        FrameEffects { preempt_delta, rcu_delta: 1, ..FrameEffects::default() }
    }

    #[test]
    fn what_panic_added_is_taken_off() {
        let found = before(&context(0x8000_0002), true, &added(1)).unwrap();
        assert_eq!(found.preempt_count, Some(0x8000_0001));
        assert_eq!((found.rcu_nesting, found.interrupts_enabled), (Some(0), Some(true)));
    }

    #[test]
    fn without_saved_registers_the_code_tells_the_interrupt_flag() {
        assert_eq!(before(&context(1), false, &added(1)).unwrap().interrupts_enabled, None);
        let known = FrameEffects { interrupts_before: Some(true), ..added(1) };
        assert_eq!(before(&context(1), false, &known).unwrap().interrupts_enabled, Some(true));
    }

    #[test]
    fn what_is_not_known_or_not_there_is_not_taken_off() {
        let unknown = FrameEffects { undetermined: vec![0], ..added(1) };
        assert!(before(&context(1), true, &unknown).is_none());
        assert!(before(&context(0x8000_0000), true, &added(1)).is_none());
        assert!(before(&context(0x1_0001), true, &added(0x1_0001)).is_none());
        let nowhere = Context { preempt_count: None, ..context(1) };
        assert!(before(&nowhere, true, &added(1)).unwrap().preempt_count.is_none());
    }
}
