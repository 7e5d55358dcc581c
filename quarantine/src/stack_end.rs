//! The mark at the end of the current task's stack: put back when an overflow has overwritten it, or
//! `schedule()` panics at the next sleep of a task that was just saved. Only the mark: what a stack holds is
//! the frames' business.

use diagnose::CrashClass;
use guest::GuestVirt;

use crate::Reason;
use crate::action::Action;
use crate::guest_struct::Structures;
use crate::plan::Situation;

/// The write that puts the mark back, if it is gone.
///
/// A stack grows down to its lowest word, which `set_task_stack_end_magic()` (kernel/fork.c) marks and
/// `schedule_debug()` (kernel/sched/core.c) checks at each switch (`CONFIG_SCHED_STACK_END_CHECK`). What the mark
/// is, another stack tells: that of `init_task`, which `start_kernel()` marks.
pub(crate) fn restore(situation: &Situation<'_>) -> Result<Option<Action>, Reason> {
    let Some(task) = &situation.diagnosis.task else { return Ok(None) };
    let kernel = Structures { image: situation.image, memory: situation.memory };
    let overflow = situation.diagnosis.class == Some(CrashClass::StackOverflow);
    let Some(mark) = mark(&kernel, task.at)? else {
        return if overflow { Err(missing("init_task")) } else { Ok(None) };
    };
    if mark.found == mark.expected {
        return Ok(None);
    }
    if !has_guard_page(&kernel, task.at) {
        return Err(Reason::Inconsistent {
            what: format!(
                "the stack's end at {} is overwritten, and no guard page is below",
                mark.at
            ),
        });
    }
    Ok(Some(Action::WriteWord {
        at: mark.at,
        size: 8,
        mask: u64::MAX,
        old: mark.found,
        new: mark.expected,
        name: "mark at the stack's end".to_owned(),
        why: "the overflow has overwritten it; schedule() would panic".to_owned(),
    }))
}

/// The lowest word of a stack.
pub(crate) struct Mark {
    /// Guest-virtual address.
    pub(crate) at: GuestVirt,
    /// What it holds.
    pub(crate) found: u64,
    /// What it must hold.
    pub(crate) expected: u64,
}

/// The mark of a task's stack; `None` where it can't be told what it must be.
pub(crate) fn mark(kernel: &Structures<'_>, task: GuestVirt) -> Result<Option<Mark>, Reason> {
    let Some(init) = kernel.image.address_of("init_task") else { return Ok(None) };
    let (at, found) = end_of(kernel, task)?;
    Ok(Some(Mark { at, found, expected: end_of(kernel, init)?.1 }))
}

fn missing(name: &str) -> Reason {
    Reason::MissingFunction { name: name.to_owned() }
}

/// Where the lowest word of a task's stack is, guest-virtual, and what it holds. `end_of_stack()` in
/// include/linux/sched/task_stack.h, for kernels that keep `thread_info` in the task (x86 since v4.9).
fn end_of(kernel: &Structures<'_>, task: GuestVirt) -> Result<(GuestVirt, u64), Reason> {
    let at = GuestVirt(kernel.need(task, "task_struct", "stack")?);
    let unreadable = |_| Reason::Unreadable { what: "the end of a stack".to_owned(), at };
    Ok((at, kernel.memory.read_u64(at).map_err(unreadable)?))
}

/// Whether the stack is mapped with a page below that nothing can be written to (`CONFIG_VMAP_STACK`; the member is
/// there with it only): then what ran over the mark has hit nothing else.
fn has_guard_page(kernel: &Structures<'_>, task: GuestVirt) -> bool {
    matches!(kernel.number(task, "task_struct", "stack_vm_area"), Ok(Some(area)) if area != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{STACK, STACK_MARK, Scene};

    fn restored(scene: &Scene, class: CrashClass) -> Result<Option<Action>, Reason> {
        let space = scene.machine.space();
        let mut diagnosis = scene.diagnosis();
        diagnosis.class = Some(class);
        let image = &scene.image;
        restore(&Situation { diagnosis: &diagnosis, image, memory: &space, vcpus: &[] })
    }

    #[test]
    fn an_overwritten_mark_is_put_back() {
        let mut scene = Scene::new();
        assert!(restored(&scene, CrashClass::StackOverflow).unwrap().is_none());
        scene.poke_word(STACK, 0xdead);
        // Also when something else is met first: the panic in schedule() itself.
        for class in [CrashClass::StackOverflow, CrashClass::Panic] {
            let Some(Action::WriteWord { at, old, new, .. }) = restored(&scene, class).unwrap()
            else {
                panic!("nothing is put back");
            };
            assert_eq!((at, old, new), (STACK, 0xdead, STACK_MARK));
        }
    }

    #[test]
    fn without_a_guard_page_more_may_be_lost() {
        let mut scene = Scene::new();
        scene.poke_word(STACK, 0xdead);
        scene.set_member("task_struct", "stack_vm_area", scene.task, 0);
        let reason = restored(&scene, CrashClass::StackOverflow).unwrap_err();
        assert!(matches!(reason, Reason::Inconsistent { .. }), "{reason}");
    }
}
