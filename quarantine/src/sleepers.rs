//! Who sleeps inside a driver that is being quarantined: nobody would wake them any more. Those whom a signal wakes are
//! sent back as by one; the restarted call then finds the driver's entry failing. The others are seen to later, when it
//! has shown that nothing wakes them (`diagnose::asleep::stranded()`).

use diagnose::tasks::{self, TaskPosition};
use diagnose::{CodeCache, Frame};
use guest::GuestVirt;
use repair_image::{Module, base_name};

use crate::Reason;
use crate::action::Action;
use crate::guest_struct::Structures;
use crate::plan::Situation;

/// Tasks that are woken at most.
const WAKES_MAX: usize = 64;
/// `TASK_INTERRUPTIBLE`, include/linux/sched.h; ps and crash read it, so it keeps its number.
const INTERRUPTIBLE: u32 = 1;
/// Files of a process that are looked at; the default limit is 1024 (`INR_OPEN_CUR`).
const FILES_MAX: u64 = 4096;
/// Who waits for events of files, fs/select.c and fs/eventpoll.c.
const POLLERS: [&str; 6] =
    ["do_sys_poll", "do_poll", "do_select", "core_sys_select", "do_epoll_wait", "ep_poll"];
/// Makes a task believe that a signal waits for it, and wakes it if it sleeps interruptibly. There is none, so on its
/// way back to the process the call is restarted. The kernel's live patching does the same to get tasks out of old
/// functions (`klp_send_signals()`, kernel/livepatch/transition.c, since commit 43347d56c8d9, v4.16).
const WAKE: &str = "signal_wake_up_state";

/// The calls that send the sleepers back; who can't be is noted.
pub(crate) fn wake(
    situation: &Situation<'_>,
    module: &Module,
    notes: &mut Vec<String>,
) -> Vec<Action> {
    let tasks = match tasks::all(situation.image, situation.memory) {
        Ok(tasks) => tasks,
        Err(error) => {
            notes.push(format!("who sleeps in {} was not found: {error}", module.name));
            return Vec::new();
        }
    };
    let crashed = situation.diagnosis.task.as_ref().map(|task| task.at);
    let mut calls = Vec::new();
    let mut cache = CodeCache::default();
    for task in tasks {
        let stands = task.on_cpu.is_some() || Some(task.task) == crashed || task.state == 0;
        if stands || !is_inside(situation, module, &task, &mut cache) {
            continue;
        }
        match call(situation, module, &task).filter(|_| calls.len() < WAKES_MAX) {
            Some(call) => calls.push(call),
            None => notes.push(format!(
                "{} (pid {}) sleeps in {} and takes no signal: it is seen to later, if nothing wakes it",
                task.comm, task.pid, module.name
            )),
        }
    }
    calls
}

/// Whether a frame of a sleeping task is the driver's, or it waits for events of files and has one of the driver's.
fn is_inside(
    situation: &Situation<'_>,
    module: &Module,
    task: &TaskPosition,
    cache: &mut CodeCache,
) -> bool {
    let found = tasks::frames_of_sleeping(situation.image, situation.memory, task, cache);
    let Ok((frames, _)) = found else { return false };
    let polls = |frame: &Frame| {
        frame.function.as_deref().is_some_and(|name| POLLERS.contains(&base_name(name)))
    };
    frames.iter().any(|frame| module.is_text(frame.pc.lookup()))
        || (frames.iter().any(polls) && has_file(situation, module, task.task).is_ok_and(|has| has))
}

/// Whether a file that the task's process has open is the driver's.
fn has_file(situation: &Situation<'_>, module: &Module, task: GuestVirt) -> Result<bool, Reason> {
    let kernel = Structures { image: situation.image, memory: situation.memory };
    let files = GuestVirt(kernel.need(task, "task_struct", "files")?);
    let table = GuestVirt(kernel.need(files, "files_struct", "fdt")?);
    let count = kernel.need(table, "fdtable", "max_fds")?.min(FILES_MAX);
    let first = GuestVirt(kernel.need(table, "fdtable", "fd")?);
    for index in 0..count {
        let slot = first + index * 8;
        let unreadable = |_| Reason::Unreadable { what: "a file table".to_owned(), at: slot };
        let file = GuestVirt(situation.memory.read_u64(slot).map_err(unreadable)?);
        if !file.is_kernel_half() {
            continue;
        }
        let operations = GuestVirt(kernel.need(file, "file", "f_op")?);
        if module.ranges.iter().any(|range| range.contains(&operations)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `None` for a kernel thread, which takes no signals, and for who sleeps uninterruptibly.
fn call(situation: &Situation<'_>, module: &Module, task: &TaskPosition) -> Option<Action> {
    let structures = Structures { image: situation.image, memory: situation.memory };
    let is_user = structures.number(task.task, "task_struct", "mm").ok()?? != 0;
    if !is_user || task.state & INTERRUPTIBLE == 0 {
        return None;
    }
    let at: GuestVirt = situation.image.address_of(WAKE)?;
    Some(Action::CallGuest {
        function: WAKE.to_owned(),
        at,
        // The task, and no state besides the interruptible one.
        arguments: vec![task.task.0, 0],
        expected: Vec::new(),
        why: format!("{} (pid {}) sleeps in {}", task.comm, task.pid, module.name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    fn task(scene: &Scene, state: u32) -> TaskPosition {
        TaskPosition {
            task: scene.task,
            pid: 7,
            tgid: 7,
            comm: "reader".to_owned(),
            on_cpu: None,
            state,
            sp: scene.regs_at,
        }
    }

    #[test]
    fn only_who_takes_signals_is_woken() {
        let mut scene = Scene::new();
        let calls = |scene: &Scene, state| {
            let space = scene.machine.space();
            let diagnosis = scene.diagnosis();
            let situation = Situation {
                diagnosis: &diagnosis,
                image: &scene.image,
                memory: &space,
                vcpus: &[],
            };
            call(&situation, &scene.image.modules[0], &task(scene, state))
        };
        let Some(Action::CallGuest { arguments, .. }) = calls(&scene, 1) else { panic!() };
        assert_eq!(arguments, [scene.task.0, 0]);
        assert!(calls(&scene, 2).is_none(), "uninterruptible");
        assert!(calls(&scene, 0x102).is_none(), "killable: only by a real signal");
        scene.set_member("task_struct", "mm", scene.task, 0);
        assert!(calls(&scene, 1).is_none(), "a kernel thread");
    }

    #[test]
    fn a_file_of_the_driver_is_found_among_others() {
        let mut scene = Scene::new();
        let has = |scene: &Scene| {
            let (space, diagnosis) = (scene.machine.space(), scene.diagnosis());
            let situation = Situation {
                diagnosis: &diagnosis,
                image: &scene.image,
                memory: &space,
                vcpus: &[],
            };
            has_file(&situation, &scene.image.modules[0], scene.task)
        };
        assert!(has(&scene).is_err(), "no table");
        scene.add_file(GuestVirt(0xffff_ffff_8200_0000));
        assert_eq!(has(&scene), Ok(false));
        scene.add_file(scene.image.modules[0].ranges[1].start + 0x100);
        assert_eq!(has(&scene), Ok(true));
    }

    #[test]
    fn a_task_list_that_cannot_be_walked_is_told() {
        let scene = Scene::new();
        let (space, diagnosis) = (scene.machine.space(), scene.diagnosis());
        let situation =
            Situation { diagnosis: &diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        let mut notes = Vec::new();
        assert!(wake(&situation, &scene.image.modules[0], &mut notes).is_empty());
        assert!(notes[0].contains("was not found"), "{notes:?}");
    }
}
