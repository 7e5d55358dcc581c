//! The walk along a path in RCU mode: the core asks a file system about names and rights in an RCU read section that no
//! frame on the stack has opened. `path_init()` did, and has returned.

use guest::GuestVirt;

use crate::guest_struct::Structures;

/// `LOOKUP_RCU`, include/linux/namei.h (a macro): `nameidata.flags` of a walk that holds the section.
const LOOKUP_RCU: u64 = 0x40;

/// RCU read sections of the task's walk: one, or none. The kernel notes there when it leaves this mode (`leave_rcu()`,
/// fs/namei.c), and a walk that is over is no longer the task's.
pub(crate) fn sections(kernel: &Structures<'_>, task: GuestVirt) -> i64 {
    let walk = kernel.number(task, "task_struct", "nameidata").ok().flatten().map(GuestVirt);
    let flags = walk
        .filter(|walk| walk.is_kernel_half())
        .and_then(|walk| kernel.number(walk, "nameidata", "flags").ok().flatten());
    i64::from(flags.is_some_and(|flags| flags & LOOKUP_RCU != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Scene};

    #[test]
    fn only_a_walk_in_rcu_mode_holds_a_section() {
        let mut scene = Scene::new();
        let sections = |scene: &Scene| {
            let memory = scene.machine.space();
            sections(&Structures { image: &scene.image, memory: &memory }, scene.task)
        };
        assert_eq!(sections(&scene), 0, "no walk");
        let walk = DATA + 0x3fc0;
        scene.set_member("task_struct", "nameidata", scene.task, walk.0);
        assert_eq!(sections(&scene), 0, "it has left RCU mode");
        scene.set_member("nameidata", "flags", walk, 0x41);
        assert_eq!(sections(&scene), 1);
        scene.set_member("task_struct", "nameidata", scene.task, 0x41);
        assert_eq!(sections(&scene), 0, "no pointer of the kernel's");
    }
}
