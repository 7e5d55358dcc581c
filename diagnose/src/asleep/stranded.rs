//! A task that sleeps inside a driver for something that only the driver would ever bring about: what it sleeps for, and
//! whether its frames could be abandoned. That the driver does nothing any more is for others to say.

use guest::{CodeAddress, GuestVirt, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;
use thiserror::Error;

use super::queue::{self, QueueKind, Queued};
use super::{SCHEDULING, Sleeper, Victim, place};
use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::names::function;
use crate::{CrashClass, Frame, tasks};

/// Functions between a driver and the scheduler while it sleeps without a limit (kernel/sched/core.c, kernel/sched/wait.c,
/// kernel/time/timer.c, since v6.13 sleep_timeout.c). With a limit, a timer lies on the stack.
const SLEEPING: [&str; 4] =
    ["schedule_timeout", "io_schedule", "io_schedule_timeout", "wait_woken"];
/// The same for what nobody owns (kernel/sched/completion.c, kernel/locking/semaphore.c). They hold nothing while they
/// sleep.
const WAITING: [&str; 17] = [
    "do_wait_for_common",
    "__wait_for_common",
    "wait_for_common",
    "wait_for_common_io",
    "wait_for_completion",
    "wait_for_completion_io",
    "wait_for_completion_interruptible",
    "wait_for_completion_killable",
    "wait_for_completion_state",
    "___down_common",
    "__down_common",
    "__down",
    "__down_interruptible",
    "__down_killable",
    "down",
    "down_interruptible",
    "down_killable",
];
/// `TASK_INTERRUPTIBLE`, `TASK_UNINTERRUPTIBLE`, include/linux/sched.h; ps and crash read them, so they keep their
/// numbers.
const INTERRUPTIBLE: u32 = 1;
const UNINTERRUPTIBLE: u32 = 2;
/// What the timer of a sleep of high resolution calls (kernel/time/hrtimer.c): where it is on a stack, so is the timer.
const HIGH_RESOLUTION: &str = "hrtimer_wakeup";
/// Words of one stack that are looked through at most: more than any stack of the kernel's has.
const WORDS_MAX: u64 = 4096;

/// A task that sleeps inside a driver, and that nobody but the driver wakes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stranded {
    /// The task.
    #[serde(skip)]
    pub sleeper: Sleeper,
    /// Its place in a queue; `None` where it stands in none and whoever knows it by its `task_struct` was to wake it.
    pub queued: Option<Queued>,
    /// The driver.
    pub module: String,
    /// The driver's function that sleeps.
    pub function: String,
    /// Where it goes on once it is woken, guest-virtual.
    pub resumes_at: GuestVirt,
    /// Whether the driver may know it by its `task_struct`, which must not vanish while somebody else is about inside:
    /// a thread, which its maker wakes and stops, or whoever stands in no queue.
    pub is_known: bool,
}

/// Why a sleeper is not to be taken out of a driver.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotStranded {
    /// None of its frames is a driver's that was asked for.
    #[error("it sleeps elsewhere")]
    Outside,
    /// It was woken meanwhile.
    #[error("it was woken meanwhile")]
    Woken,
    /// Its stack can't be read.
    #[error("its stack could not be read")]
    Unreadable,
    /// A signal wakes it.
    #[error("a signal wakes it")]
    TakesSignals,
    /// The core kernel sleeps on behalf of the driver: others may wake it.
    #[error("it sleeps in {place}, which others than the driver may end")]
    InTheKernel {
        /// Where, innermost function first.
        place: String,
    },
    /// It wakes by itself.
    #[error("a timer wakes it")]
    Timed,
    /// Its place in the queue was not found.
    #[error("its place in the queue of a {noun} was not found")]
    UnknownQueue {
        /// What has the queue.
        noun: &'static str,
    },
    /// Something on its stack is known to others, who may still write there.
    #[error("others know of something on its stack, at {at:#x}")]
    Linked {
        /// Where, guest-virtual.
        at: GuestVirt,
    },
}

/// What a task sleeps for inside one of the drivers for which `is_meant` holds. The guest may run meanwhile.
///
/// # Errors
/// It does not sleep in one of them, or could not be taken out.
pub fn stranded(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    sleeper: &Sleeper,
    is_meant: &dyn Fn(&str) -> bool,
    cache: &mut CodeCache,
) -> Result<Stranded, NotStranded> {
    let kernel = Kernel::of_memory(image, memory);
    let position = &sleeper.position;
    let frames = tasks::frames_of_sleeping(image, memory, position, cache);
    let (frames, _) = frames.map_err(|_| NotStranded::Unreadable)?;
    let found = look(&kernel, sleeper, &frames, is_meant);
    // What was read of the stack of a task that runs is nothing.
    if sleeper.sleeps_on(image, memory) { found } else { Err(NotStranded::Woken) }
}

fn look(
    kernel: &Kernel<'_>,
    sleeper: &Sleeper,
    frames: &[Frame],
    is_meant: &dyn Fn(&str) -> bool,
) -> Result<Stranded, NotStranded> {
    let of_driver = |frame: &Frame| frame.module.as_deref().is_some_and(is_meant);
    if !frames.iter().any(of_driver) {
        return Err(NotStranded::Outside);
    }
    let is_thread = is_thread(kernel, sleeper)?;
    check_state(sleeper, is_thread)?;
    let core = |names: &'static [&str]| {
        move |frame: &&Frame| frame.module.is_none() && names.contains(&function(frame))
    };
    let scheduling = frames.iter().take_while(core(&SCHEDULING)).count();
    let sleeping = frames.iter().skip(scheduling).take_while(core(&SLEEPING)).count();
    let at = scheduling.saturating_add(sleeping);
    let waiting = frames.iter().skip(at).take_while(core(&WAITING)).count();
    let first = at.saturating_add(waiting);
    let elsewhere = || NotStranded::InTheKernel { place: place(frames, scheduling) };
    let driver = frames.get(first).filter(|frame| scheduling > 0 && of_driver(frame));
    let (Some(driver), Some(waits)) = (driver, frames.get(at)) else { return Err(elsewhere()) };
    let (CodeAddress::Return(resumes_at), Some(module)) = (waits.pc, driver.module.clone()) else {
        return Err(elsewhere());
    };
    let slots = slots(frames, scheduling, first).ok_or(NotStranded::Unreadable)?;
    let task = sleeper.position.task;
    let kind = QueueKind::awaited_in(function(waits)).filter(|_| waits.module.is_none());
    let queued = match kind {
        None if waiting > 0 => return Err(elsewhere()),
        None => Queued::in_wait_queue(kernel, &slots, task),
        Some(kind) => Some(
            Queued::find(kernel, kind, waits, task)
                .ok_or(NotStranded::UnknownQueue { noun: kind.noun() })?,
        ),
    };
    let timers = scheduling..at;
    check_stack(kernel, &slots, queued.as_ref()).map_err(|why| match why {
        NotStranded::Linked { at }
            if frames.get(timers).is_some_and(|frames| lies_in(frames, at)) =>
        {
            NotStranded::Timed
        }
        other => other,
    })?;
    Ok(Stranded {
        sleeper: sleeper.clone(),
        is_known: is_thread || queued.is_none(),
        queued,
        module,
        function: function(driver).to_owned(),
        resumes_at,
    })
}

fn is_thread(kernel: &Kernel<'_>, sleeper: &Sleeper) -> Result<bool, NotStranded> {
    let mm = kernel.pointer(sleeper.position.task, "task_struct", "mm");
    mm.map(|mm| mm.0 == 0).map_err(|_| NotStranded::Unreadable)
}

/// Signals wake processes that sleep interruptibly, but no thread of the kernel's.
fn check_state(sleeper: &Sleeper, is_thread: bool) -> Result<(), NotStranded> {
    match sleeper.position.state {
        state if state & (INTERRUPTIBLE | UNINTERRUPTIBLE) == 0 => Err(NotStranded::Woken),
        state if state & INTERRUPTIBLE != 0 && !is_thread => Err(NotStranded::TakesSignals),
        _ => Ok(()),
    }
}

/// The words of the stack that the frames take from where the task sleeps to the end of the driver's run: what would
/// be abandoned.
fn slots(frames: &[Frame], from: usize, first: usize) -> Option<Vec<GuestVirt>> {
    let bottom = frames.get(from)?.registers.rsp()?;
    let run = frames.iter().skip(first).take_while(|frame| frame.module.is_some()).count();
    let outermost = frames.get(first.checked_add(run)?.checked_sub(1)?)?;
    let words = outermost.cfa?.0.checked_sub(bottom.0)? / 8;
    (words <= WORDS_MAX).then(|| (0..words).map(|word| bottom + word * 8).collect())
}

/// Nobody may know of anything on the stack but of its place in the queue.
fn check_stack(
    kernel: &Kernel<'_>,
    slots: &[GuestVirt],
    queued: Option<&Queued>,
) -> Result<(), NotStranded> {
    let timer = kernel.image.address_of(HIGH_RESOLUTION);
    let calls = |at: &GuestVirt| {
        kernel.memory.read_u64(*at).is_ok_and(|word| Some(GuestVirt(word)) == timer)
    };
    if timer.is_none() || slots.iter().any(calls) {
        return Err(NotStranded::Timed);
    }
    let own = queued.and_then(|queued| queued.link_at(kernel));
    queue::linked(kernel, slots, own).map_or(Ok(()), |at| Err(NotStranded::Linked { at }))
}

/// Whether an address is on the part of the stack that these frames take.
fn lies_in(frames: &[Frame], at: GuestVirt) -> bool {
    let bottom = frames.first().and_then(|frame| frame.registers.rsp());
    let top = frames.last().and_then(|frame| frame.cfa);
    bottom.zip(top).is_some_and(|(bottom, top)| (bottom..top).contains(&at))
}

impl Stranded {
    /// One line: who sleeps where for what.
    #[must_use]
    pub fn describe(&self) -> String {
        let position = &self.sleeper.position;
        let what = match self.queued {
            Some(Queued { kind, lock, .. }) => format!("for the {} at {lock:#x}", kind.noun()),
            None => "to be woken".to_owned(),
        };
        format!(
            "{} (pid {}) sleeps in {} [{}] {what}, and nobody is left to end that",
            position.comm, position.pid, self.function, self.module
        )
    }

    /// Whether it still stands in its queue. For a guest that stands; the task itself may have been woken.
    #[must_use]
    pub fn still_waits(&self, image: &RepairImage, memory: &dyn VirtMemory) -> bool {
        let kernel = Kernel::of_memory(image, memory);
        let task = self.sleeper.position.task;
        self.queued.is_none_or(|queued| queued.is_whole(&kernel, task))
    }

    /// The task, to be met where it goes on.
    #[must_use]
    pub fn victim(&self) -> Victim {
        Victim {
            sleeper: self.sleeper.clone(),
            queued: self.queued,
            resumes_at: self.resumes_at,
            preempt_count: 0,
            class: CrashClass::EndlessSleep,
            evidence: vec![self.describe()],
        }
    }
}

/// Whether a function sleeps on behalf of its caller, and holds nothing meanwhile.
pub(super) fn sleeps_for_its_caller(frame: &Frame) -> bool {
    let name = function(frame);
    frame.module.is_none() && (SLEEPING.contains(&name) || WAITING.contains(&name))
}

#[cfg(test)]
mod tests {
    use guest::Reg;

    use super::*;
    use crate::tasks::TaskPosition;
    use crate::testing::{DATA, Guest, frame};

    const TASK: u64 = DATA + 0x1000;
    const STACK: u64 = DATA + 0x3000;
    const TIMER: u64 = DATA + 0x9000;

    fn guest() -> Guest {
        let mut guest = Guest::new()
            .object(HIGH_RESOLUTION, TIMER)
            .types(|types| types.with("list_head", "next", 0, 8).with("list_head", "prev", 8, 8));
        guest.poke_task(TASK, 7, "reader");
        guest
    }

    fn sleeper(state: u32) -> Sleeper {
        let task = GuestVirt(TASK);
        let (comm, sp) = ("reader".to_owned(), GuestVirt(STACK));
        let position = TaskPosition { task, pid: 7, tgid: 7, comm, on_cpu: None, state, sp };
        Sleeper { position, switches: 3, ran_at: 0 }
    }

    /// Frames of 0x40 bytes each, innermost first; `[m]` marks the driver's.
    fn frames(names: &[&str]) -> Vec<Frame> {
        let frame = |(index, name): (u64, &&str)| {
            let driver = name.strip_suffix(" [m]");
            let mut frame = frame(driver.unwrap_or(name), driver.map(|_| "m"));
            frame.registers.set(Reg::Rsp, STACK + index * 0x40);
            frame.cfa = Some(GuestVirt(STACK + (index + 1) * 0x40));
            frame
        };
        (0..).zip(names).map(frame).collect()
    }

    fn found(guest: &mut Guest, state: u32, names: &[&str]) -> Result<Stranded, NotStranded> {
        let image = guest.image();
        let space = guest.machine.space();
        let kernel = Kernel::of_memory(&image, &space);
        look(&kernel, &sleeper(state), &frames(names), &|module| module == "m")
    }

    #[test]
    fn the_driver_itself_must_sleep() {
        let inside = |names: &[&str]| found(&mut guest(), 2, names);
        let outside = NotStranded::Outside;
        assert_eq!(inside(&["schedule", "vfs_read"]), Err(outside.clone()));
        assert_eq!(inside(&["schedule", "f [other]"]), Err(outside));
        let stranded = inside(&["__schedule", "schedule", "f [m]", "vfs_ioctl"]).unwrap();
        assert_eq!((stranded.module.as_str(), stranded.function.as_str()), ("m", "f"));
        assert_eq!((stranded.queued, stranded.is_known), (None, true));
        assert!(stranded.describe().contains("reader (pid 7) sleeps in f [m] to be woken"));
        for names in [
            &["schedule", "kthread_stop", "f [m]"][..],
            &["schedule", "schedule_timeout", "__wait_for_common", "kthread_stop", "f [m]"],
            &["schedule_preempt_disabled", "__mutex_lock", "f [m]"],
            &["f [m]", "vfs_ioctl"],
        ] {
            let refused = inside(names);
            assert!(matches!(refused, Err(NotStranded::InTheKernel { .. })), "{refused:?}");
        }
        let refused = inside(&["schedule", "schedule_timeout", "__wait_for_common", "f [m]"]);
        assert_eq!(refused, Err(NotStranded::UnknownQueue { noun: "completion" }));
    }

    #[test]
    fn whom_a_signal_wakes_is_no_matter_but_a_thread_of_the_kernel_is() {
        let names = ["schedule", "f [m]"];
        let guest_of = |state, mm| {
            let mut guest = guest();
            guest.poke_u64(TASK + 0x30, mm);
            found(&mut guest, state, &names).map(drop)
        };
        assert_eq!(guest_of(1, DATA), Err(NotStranded::TakesSignals));
        assert_eq!(guest_of(1, 0), Ok(()));
        assert_eq!(guest_of(2, DATA), Ok(()));
        assert_eq!(guest_of(0x102, DATA), Ok(()), "killable");
        assert_eq!(guest_of(0x402, 0), Ok(()), "idle");
        assert_eq!(guest_of(0, DATA), Err(NotStranded::Woken));
        assert_eq!(guest_of(0x80, DATA), Err(NotStranded::Woken), "dead");
    }

    #[test]
    fn what_others_know_of_keeps_it_where_it_is() {
        let names = ["schedule", "schedule_timeout", "f [m]", "g [m]", "vfs_ioctl"];
        let linked_at = |at: u64| {
            let mut guest = guest();
            guest.poke_u64(at + 8, TIMER + 0x100);
            guest.poke_u64(TIMER + 0x100, at);
            found(&mut guest, 2, &names)
        };
        assert_eq!(linked_at(STACK + 0x50), Err(NotStranded::Timed), "in schedule_timeout()");
        let at = STACK + 0x80;
        assert_eq!(linked_at(at), Err(NotStranded::Linked { at: GuestVirt(at) }));
        let at = STACK + 0xc0;
        assert_eq!(linked_at(at), Err(NotStranded::Linked { at: GuestVirt(at) }), "its caller's");
        assert!(linked_at(STACK + 0x100).is_ok(), "nothing that is abandoned");
        let mut guest = guest();
        guest.poke_u64(STACK + 0x90, TIMER);
        assert_eq!(found(&mut guest, 2, &names), Err(NotStranded::Timed));
    }
}
