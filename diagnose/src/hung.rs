//! Which tasks sleep and cannot be woken by signals: the suspects of a hung-task panic, whose own frames
//! say nothing. Evidence only; nobody is blamed from here.

use repair_image::base_name;

use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::names::display;
use crate::tasks::{self, TaskPosition};

/// Tasks named at most.
const NAMED_MAX: usize = 16;
/// Frames shown of each.
const FRAMES_SHOWN: usize = 4;
/// Frames of sleeping itself, which every sleeper has.
const SLEEPING: [&str; 8] = [
    "__schedule",
    "schedule",
    "schedule_preempt_disabled",
    "schedule_timeout",
    "io_schedule",
    "__mutex_lock",
    "__down_common",
    "__wait_for_common",
];

/// One line a task that sleeps uninterruptibly.
pub(crate) fn evidence(kernel: &Kernel<'_>, cache: &mut CodeCache, into: &mut Vec<String>) {
    let tasks = match tasks::all(kernel.image, kernel.memory) {
        Ok(tasks) => tasks,
        Err(error) => {
            into.push(format!("the task list can't be read: {error}"));
            return;
        }
    };
    let sleepers = tasks.iter().filter(|task| task.is_uninterruptible() && task.on_cpu.is_none());
    for task in sleepers.take(NAMED_MAX) {
        into.push(line(kernel, task, cache));
    }
}

fn line(kernel: &Kernel<'_>, task: &TaskPosition, cache: &mut CodeCache) -> String {
    let who = format!("{} (pid {}) sleeps uninterruptibly", task.comm, task.pid);
    let Ok((frames, _)) = tasks::frames_of_sleeping(kernel.image, kernel.memory, task, cache)
    else {
        return who;
    };
    let sleeping =
        |name: &Option<String>| name.as_deref().is_some_and(|n| SLEEPING.contains(&base_name(n)));
    let shown: Vec<String> = frames
        .iter()
        .skip_while(|frame| sleeping(&frame.function))
        .take(FRAMES_SHOWN)
        .map(display)
        .collect();
    if shown.is_empty() { who } else { format!("{who} in {}", shown.join(" < ")) }
}
