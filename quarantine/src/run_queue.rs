//! Whether the run queue of the CPU that crashed is whole: who runs there, and the trees of who waits to. Reads only.

use guest::GuestVirt;

use crate::Reason;
use crate::guest_struct::Structures;
use crate::invariants::{Current, same};

/// Nodes of a tree that are looked at.
const NODES: usize = 64;
/// The colour of a node is kept in the low bits of its parent's address (`rb_parent()`, include/linux/rbtree_augmented.h).
const COLOUR: u64 = 3;

/// The queue's current task, and the links of the fair class's trees: the CPU's, and that of the current task's
/// group. Where the queue's lock is taken, somebody is changing it, perhaps the frames that crashed.
pub(crate) fn check(kernel: &Structures<'_>, current: Current) -> Result<(), Reason> {
    let queue = current.cpu.and_then(|cpu| kernel.image.per_cpu("runqueues", cpu));
    let Some(queue) = queue else { return Ok(()) };
    if lock_word(kernel, queue) != Some(0) {
        return Ok(());
    }
    let running = kernel.need(queue, "rq", "curr")?;
    if let Some(at) = kernel.member_at(queue, "rq", "curr") {
        same("the run queue's current task", at, running, current.task.0)?;
    }
    let mut trees = Vec::new();
    trees.extend(kernel.member_at(queue, "rq", "cfs"));
    // Only with CONFIG_FAIR_GROUP_SCHED.
    let group = kernel.number(current.task, "task_struct", "se.cfs_rq")?.map(GuestVirt);
    trees.extend(group.filter(|group| !trees.contains(group)));
    trees.into_iter().try_for_each(|tree| walk(kernel, tree))
}

/// Whether somebody changes the queue of the CPU that crashed.
pub(crate) fn is_taken(kernel: &Structures<'_>, current: Current) -> bool {
    let queue = current.cpu.and_then(|cpu| kernel.image.per_cpu("runqueues", cpu));
    queue.and_then(|queue| lock_word(kernel, queue)).is_some_and(|word| word != 0)
}

/// The word of a queue's spinlock: 0 when nobody has it or waits for it.
fn lock_word(kernel: &Structures<'_>, queue: GuestVirt) -> Option<u64> {
    // `rq.lock` before commit 5cb9eaa3d274 ("sched: Wrap rq::lock access", v5.14).
    let lock = ["__lock", "lock"].into_iter().find_map(|lock| kernel.member_at(queue, "rq", lock));
    lock.and_then(|lock| kernel.memory.read_uint(lock, 4).ok())
}

/// Whether the nodes next to the root of a `struct cfs_rq`'s tree name their parents.
fn walk(kernel: &Structures<'_>, tree: GuestVirt) -> Result<(), Reason> {
    let root = kernel.need(tree, "cfs_rq", "tasks_timeline.rb_root.rb_node")?;
    let mut rest = vec![(root, 0)];
    for _ in 0..NODES {
        let Some((node, parent)) = rest.pop() else { break };
        if node == 0 {
            continue;
        }
        let node = GuestVirt(node);
        let link = kernel.need(node, "rb_node", "__rb_parent_color")?;
        same("a node of the run queue", node, link & !COLOUR, parent)?;
        for child in ["rb_left", "rb_right"] {
            rest.push((kernel.need(node, "rb_node", child)?, node.0));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    fn check(scene: &Scene) -> Result<(), Reason> {
        let memory = scene.machine.space();
        let kernel = Structures { image: &scene.image, memory: &memory };
        super::check(&kernel, Current { task: scene.task, cpu: Some(0) })
    }

    #[test]
    fn the_queue_runs_the_current_task() {
        let mut scene = Scene::new();
        assert_eq!(check(&scene), Ok(()));
        let queue = scene.image.per_cpu("runqueues", 0).unwrap();
        scene.set_member("rq", "curr", queue, 0x1234);
        assert!(matches!(check(&scene), Err(Reason::Broken { found: 0x1234, .. })));
        scene.set_member("rq", "__lock", queue, 1);
        assert_eq!(check(&scene), Ok(()), "it is being changed");
    }

    #[test]
    fn every_node_names_its_parent() {
        let mut scene = Scene::new();
        let [root, left, right] = scene.add_waiting_tasks();
        assert_eq!(check(&scene), Ok(()));
        for node in [root, left, right] {
            let mut broken = Scene::new();
            broken.add_waiting_tasks();
            broken.set_member("rb_node", "__rb_parent_color", node, 0x6660);
            let found = check(&broken);
            assert!(matches!(found, Err(Reason::Broken { at, found: 0x6660, .. }) if at == node));
        }
        // A child that is its own ancestor ends too.
        scene.set_member("rb_node", "rb_left", left, root.0);
        assert!(check(&scene).is_err());
        scene.set_member("rb_node", "rb_left", left, 0x10);
        assert!(matches!(check(&scene), Err(Reason::Unreadable { .. })));
    }
}
