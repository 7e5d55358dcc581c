//! What a crash may have broken and the guest can't go on without: looked at when a plan is made, and again when it has
//! been applied. Reads only. The run queue is `run_queue.rs`'s, the page tables are `page_tables.rs`'s, free memory is
//! `free_lists.rs`'s, what frames hold is `locks.rs`'s, whether a task may end is `process.rs`'s.

use diagnose::Diagnosis;
use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;

use crate::guest_struct::Structures;
use crate::{Reason, free_lists, page_tables, run_queue, stack_end};

/// Tasks of the task list that are looked at each way. A broken link of a far task costs that task; near the
/// current one it is the crash's. Keeps the look at some microseconds however many tasks there are.
const NEIGHBOURS: usize = 32;
/// `_QW_WMASK`, include/asm-generic/qrwlock.h: a writer has the lock or waits for it.
const WRITER: u64 = 0x1ff;
/// `LIST_POISON2` (include/linux/poison.h): `list_del_rcu()` leaves it in what was taken off a list.
const LIST_POISON2: u64 = 0xdead_0000_0000_0122;

/// Where the crash happened: the invariants are looked at from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Current {
    /// The task that ran, guest-virtual.
    pub(crate) task: GuestVirt,
    /// The kernel's number of the CPU, where it is known.
    pub(crate) cpu: Option<usize>,
}

impl Current {
    /// `None` when the task isn't known.
    pub(crate) fn of(diagnosis: &Diagnosis) -> Option<Self> {
        let task = diagnosis.task.as_ref()?.at;
        Some(Self { task, cpu: diagnosis.context.cpu })
    }
}

/// Refuses when one of them does not hold before a plan is made. The end of the task's stack may be overwritten yet:
/// the plan puts it back. The crashed call had these words in hand.
pub(crate) fn before(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    current: Current,
    in_hand: &[GuestVirt],
) -> Result<(), Reason> {
    let kernel = Structures { image, memory };
    task_list(&kernel, current.task)?;
    run_queue::check(&kernel, current)?;
    page_tables::check(&kernel, current)?;
    free_lists::check(&kernel, current, in_hand)
}

/// The same when a plan has been applied.
pub(crate) fn after(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    current: Current,
    in_hand: &[GuestVirt],
) -> Result<(), Reason> {
    let kernel = Structures { image, memory };
    if let Some(mark) = stack_end::mark(&kernel, current.task)? {
        same("the mark at the stack's end", mark.at, mark.found, mark.expected)?;
    }
    before(image, memory, current, in_hand)
}

/// The links of the process's neighbours in the list of all processes. Only leaders of thread groups are in
/// it, and idle tasks are not (`copy_process()`, kernel/fork.c): from those, and from a process that has ended, it is
/// looked at from its head.
fn task_list(kernel: &Structures<'_>, task: GuestVirt) -> Result<(), Reason> {
    let image = kernel.image;
    let (Some(init), Some(tasks)) =
        (image.address_of("init_task"), image.types.member("task_struct", "tasks"))
    else {
        return Ok(());
    };
    // Whoever changes the list was perhaps stopped between two writes.
    if image.address_of("tasklist_lock").is_none() || task_list_is_taken(kernel) {
        return Ok(());
    }
    let leader = GuestVirt(kernel.need(task, "task_struct", "group_leader")?);
    let idle = kernel.need(task, "task_struct", "pid")? == 0;
    let ended = || kernel.memory.read_u64(leader + tasks.offset + 8).ok() == Some(LIST_POISON2);
    let process = if idle || ended() { init } else { leader };
    walk(kernel.memory, process + tasks.offset)
}

/// Whether somebody changes the list of all processes, or waits to.
pub(crate) fn task_list_is_taken(kernel: &Structures<'_>) -> bool {
    let lock = kernel.image.address_of("tasklist_lock");
    let word = lock.and_then(|lock| kernel.memory.read_uint(lock, 4).ok());
    word.is_some_and(|word| word & WRITER != 0)
}

/// Whether the neighbours of a `struct list_head` point back, some steps each way.
fn walk(memory: &dyn VirtMemory, start: GuestVirt) -> Result<(), Reason> {
    let word = |at: GuestVirt| {
        let unreadable = |_| Reason::Unreadable { what: "a link of the task list".to_owned(), at };
        memory.read_u64(at).map_err(unreadable)
    };
    // `next` is the first member, `prev` the second (include/linux/types.h).
    for (onward, back) in [(0, 8), (8, 0)] {
        let mut here = start;
        for _ in 0..NEIGHBOURS {
            let other = GuestVirt(word(here + onward)?);
            let link = other + back;
            same("a link of the task list", link, word(link)?, here.0)?;
            here = other;
            if here == start {
                break;
            }
        }
    }
    Ok(())
}

/// That a word holds what it must.
pub(crate) fn same(
    what: &'static str,
    at: GuestVirt,
    found: u64,
    expected: u64,
) -> Result<(), Reason> {
    if found == expected { Ok(()) } else { Err(Reason::Broken { what, at, found, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MODULE_TEXT, STACK, Scene};

    #[test]
    fn an_applied_plan_leaves_the_mark_whole() {
        let mut scene = Scene::new();
        let current = Current { task: scene.task, cpu: Some(0) };
        assert_eq!(after(&scene.image, &scene.machine.space(), current, &[]), Ok(()));
        scene.poke_word(STACK, 0x4141);
        let broken = after(&scene.image, &scene.machine.space(), current, &[]);
        assert!(matches!(broken, Err(Reason::Broken { found: 0x4141, .. })), "{broken:?}");
    }

    #[test]
    fn a_list_is_whole_or_named_broken_and_a_cycle_ends() {
        let mut scene = Scene::new();
        let node = |index: u64| MODULE_TEXT + 0x2800 + index % 3 * 16;
        for index in 0..3 {
            scene.poke_word(node(index), node(index + 1).0);
            scene.poke_word(node(index) + 8, node(index + 2).0);
        }
        assert_eq!(walk(&scene.machine.space(), node(0)), Ok(()));
        scene.poke_word(node(2) + 8, node(2).0);
        let broken = walk(&scene.machine.space(), node(0)).unwrap_err();
        assert!(matches!(broken, Reason::Broken { at, .. } if at == node(2) + 8));
        scene.poke_word(node(0), 0x10);
        assert!(matches!(walk(&scene.machine.space(), node(0)), Err(Reason::Unreadable { .. })));
    }
}
