//! Taking a task that is to leave a lock's function, or whatever else it sleeps in, out of the queue there, as the kernel
//! does when a signal ends the wait. Which queue is the diagnosis's to say; releasing locks is `locks.rs`'s.

use diagnose::asleep::QueueKind;
use guest::GuestVirt;

use crate::Reason;
use crate::action::Action;
use crate::guest_struct::Structures;
use crate::plan::Situation;

/// `MUTEX_FLAGS` in `mutex.owner` (kernel/locking/mutex.h): waiters, handoff, pickup. An empty queue has none.
const MUTEX_FLAGS: u64 = 7;
/// `RWSEM_FLAG_WAITERS | RWSEM_FLAG_HANDOFF` in `rw_semaphore.count` (kernel/locking/rwsem.c).
const RWSEM_FLAGS: u64 = 6;
/// Bytes of `raw_spinlock_t` without debugging: lock debugging keeps more, and more in the waiter, too.
const SPINLOCK_SIZE: u64 = 4;

/// The writes of `__mutex_remove_waiter()` (kernel/locking/mutex.c), `rwsem_del_waiter()` (kernel/locking/rwsem.c),
/// `finish_wait()` (kernel/sched/wait.c), `__finish_swait()` (kernel/sched/swait.c) or the end of `___down_common()`
/// (kernel/locking/semaphore.c), none where no task leaves a queue.
///
/// The kernel does this with the queue's spinlock held: it must be free, and stays so while the machine stands.
/// `rwsem_del_wake_waiter()` also wakes the next waiters if the first one leaves: readers among them could have the
/// lock now if its owners are readers. Here they get it when its last owner unlocks, as behind a writer: the flag
/// that somebody waits makes that unlock wake them.
pub(crate) fn leave(situation: &Situation<'_>) -> Result<Vec<Action>, Reason> {
    let Some(queued) = situation.diagnosis.queued else { return Ok(Vec::new()) };
    let kernel = Structures { image: situation.image, memory: situation.memory };
    let kind = queued.kind;
    check_plain(&kernel, kind)?;
    if kernel.need(queued.lock, kind.structure(), kind.guarded_by())? != 0 {
        return Err(Reason::TaskState {
            why: "the queue it stands in is being changed".to_owned(),
        });
    }
    let head = kernel.need_at(queued.lock, kind.structure(), kind.list())?;
    let own = kernel.need_at(queued.entry, kind.entry(), kind.link())?;
    let next = GuestVirt(kernel.need(own, "list_head", "next")?);
    let prev = GuestVirt(kernel.need(own, "list_head", "prev")?);
    let back = (kernel.need(next, "list_head", "prev")?, kernel.need(prev, "list_head", "next")?);
    if back != (own.0, own.0) {
        return Err(Reason::Inconsistent {
            what: format!("the entry at {own:#x} is not in the queue of its neighbours"),
        });
    }
    let mut actions = vec![
        link(kernel.need_at(next, "list_head", "prev")?, own, prev),
        link(kernel.need_at(prev, "list_head", "next")?, own, next),
    ];
    if next == head && prev == head {
        actions.extend(clear_flags(&kernel, queued.kind, queued.lock)?);
    }
    Ok(actions)
}

/// Refuses kernels that debug locks: there is more to be undone.
fn check_plain(kernel: &Structures<'_>, kind: QueueKind) -> Result<(), Reason> {
    let types = &kernel.image.types;
    let size = types.member(kind.structure(), kind.guarded_by()).map(|member| member.size);
    let debugged = types.member(kind.structure(), "magic").is_some()
        || types.member(kind.entry(), "magic").is_some()
        || types.member(kind.structure(), "dep_map").is_some();
    if size == Some(SPINLOCK_SIZE) && !debugged {
        return Ok(());
    }
    Err(Reason::TaskState { why: "its kernel debugs locks".to_owned() })
}

fn link(at: GuestVirt, old: GuestVirt, new: GuestVirt) -> Action {
    Action::WriteWord {
        at,
        size: 8,
        mask: u64::MAX,
        old: old.0,
        new: new.0,
        name: "the queue".to_owned(),
        why: "the task does not wait any more".to_owned(),
    }
}

/// The write that says that nobody waits, where something says so besides the queue itself.
fn clear_flags(
    kernel: &Structures<'_>,
    kind: QueueKind,
    lock: GuestVirt,
) -> Result<Option<Action>, Reason> {
    let (path, mask) = match kind {
        QueueKind::Mutex => ("owner", MUTEX_FLAGS),
        QueueKind::RwsemWrite | QueueKind::RwsemRead => ("count", RWSEM_FLAGS),
        QueueKind::Completion | QueueKind::Semaphore | QueueKind::WaitQueue => return Ok(None),
    };
    let old = kernel.need(lock, kind.structure(), path)? & mask;
    let missing =
        || Reason::MissingMember { structure: kind.structure().to_owned(), path: path.to_owned() };
    let at = kernel.member_at(lock, kind.structure(), path).ok_or_else(missing)?;
    Ok((old != 0).then(|| Action::WriteWord {
        at,
        size: 8,
        mask,
        old,
        new: 0,
        name: format!("{}.{path}", kind.structure()),
        why: "nobody waits for the lock any more".to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use diagnose::Diagnosis;
    use diagnose::asleep::Queued;

    use super::*;
    use crate::testing::{STACK, Scene};

    const LOCK: GuestVirt = GuestVirt(0xffff_8880_0000_0b00);
    const HEAD: GuestVirt = GuestVirt(LOCK.0 + 0x10);
    const ENTRY: GuestVirt = GuestVirt(STACK.0 + 0x1000);
    const OTHER: GuestVirt = GuestVirt(STACK.0 + 0x1100);

    /// A queue of these entries, of which the diagnosed task is the first.
    fn scene(kind: QueueKind, entries: &[GuestVirt]) -> (Scene, Diagnosis) {
        let mut scene = Scene::new();
        let ring: Vec<GuestVirt> =
            [HEAD].into_iter().chain(entries.iter().map(|&entry| entry + 8)).collect();
        for (at, next) in ring.iter().zip(ring.iter().cycle().skip(1)) {
            scene.set_member("list_head", "next", *at, next.0);
            scene.set_member("list_head", "prev", *next, at.0);
        }
        scene.set_member("mutex", "owner", LOCK, scene.task.0 | 3);
        if kind != QueueKind::Mutex {
            scene.set_member("rw_semaphore", "count", LOCK, 0x7);
            scene.set_member("rw_semaphore", "wait_lock", LOCK, 0);
        }
        let queued = Some(Queued { kind, lock: LOCK, entry: ENTRY });
        let diagnosis = Diagnosis { queued, ..scene.diagnosis() };
        (scene, diagnosis)
    }

    fn left(scene: &Scene, diagnosis: &Diagnosis) -> Result<Vec<(u64, u64, u64)>, Reason> {
        let memory = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &memory, vcpus: &[] };
        let actions = leave(&situation)?;
        let writes = actions.iter().filter_map(|action| match action {
            Action::WriteWord { at, old, new, .. } => Some((at.0, *old, *new)),
            _ => None,
        });
        Ok(writes.collect())
    }

    #[test]
    fn whoever_waits_for_nothing_leaves_nothing() {
        let scene = Scene::new();
        assert_eq!(left(&scene, &scene.diagnosis()), Ok(Vec::new()));
    }

    #[test]
    fn the_last_one_clears_the_flags() {
        let links = [(HEAD.0, ENTRY.0 + 8, HEAD.0), (HEAD.0 + 8, ENTRY.0 + 8, HEAD.0)];
        let (scene, diagnosis) = scene(QueueKind::Mutex, &[ENTRY]);
        let flags = (LOCK.0 + 8, 3, 0);
        assert_eq!(left(&scene, &diagnosis), Ok(vec![links[0], links[1], flags]));
    }

    #[test]
    fn a_semaphore_stays_locked() {
        let (scene, diagnosis) = scene(QueueKind::RwsemWrite, &[ENTRY]);
        assert_eq!(left(&scene, &diagnosis).unwrap().last(), Some(&(LOCK.0, 6, 0)));
    }

    #[test]
    fn what_nobody_owns_has_no_flags() {
        let links = [(HEAD.0, ENTRY.0 + 8, HEAD.0), (HEAD.0 + 8, ENTRY.0 + 8, HEAD.0)];
        for kind in [QueueKind::Completion, QueueKind::Semaphore, QueueKind::WaitQueue] {
            let (mut scene, diagnosis) = scene(kind, &[ENTRY]);
            scene.set_member("mutex", "wait_lock", LOCK, 0);
            assert_eq!(left(&scene, &diagnosis), Ok(links.to_vec()), "{kind:?}");
            scene.set_member(kind.structure(), kind.guarded_by(), LOCK, 1);
            assert!(matches!(left(&scene, &diagnosis), Err(Reason::TaskState { .. })));
        }
    }

    #[test]
    fn others_go_on_waiting() {
        let (scene, diagnosis) = scene(QueueKind::Mutex, &[ENTRY, OTHER]);
        let links =
            vec![(OTHER.0 + 8, ENTRY.0 + 8, HEAD.0), (HEAD.0 + 8, ENTRY.0 + 8, OTHER.0 + 8)];
        assert_eq!(left(&scene, &diagnosis), Ok(links));
    }

    #[test]
    fn a_queue_that_is_being_changed_or_is_broken_is_refused() {
        let (mut scene, diagnosis) = scene(QueueKind::Mutex, &[ENTRY]);
        scene.set_member("mutex", "wait_lock", LOCK, 1);
        assert!(matches!(left(&scene, &diagnosis), Err(Reason::TaskState { .. })));
        scene.set_member("mutex", "wait_lock", LOCK, 0);
        scene.set_member("list_head", "prev", HEAD, OTHER.0);
        assert!(matches!(left(&scene, &diagnosis), Err(Reason::Inconsistent { .. })));
    }
}
