//! Tasks that sleep for each other's locks, without any exception: who waits for what, whose it is, and whether that
//! is a circle, which nobody leaves by himself. Who sleeps for a driver that is no more is in `stranded.rs`. Reads only.
//! CPUs that do not get on are `stuck`'s.

mod caught;
mod queue;
mod stranded;

use guest::{CodeAddress, GuestVirt, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;
use thiserror::Error as ThisError;

pub use caught::{NotCaught, Victim, caught};
pub use queue::{Owner, QueueKind, Queued};
pub use stranded::{NotStranded, Stranded, stranded};

use crate::code::CodeCache;
use crate::effects::{self, Around};
use crate::kernel::Kernel;
use crate::names::{display, function};
use crate::tasks::{self, TaskPosition};
use crate::{Confirmation, CrashClass, Error, Frame, Held, ResourceKind};

/// Functions of the scheduler in which every sleeper stands (kernel/sched/core.c).
const SCHEDULING: [&str; 3] = ["__schedule", "schedule", "schedule_preempt_disabled"];
/// Returns with the preempt count one higher than a sleeper's.
const DEEPER: &str = "schedule_preempt_disabled";
/// Functions between a caller and the scheduler while it sleeps for a lock (kernel/locking/mutex.c, rwsem.c). They
/// hold nothing themselves.
const LOCKING: [&str; 14] = [
    "__mutex_lock",
    "__mutex_lock_slowpath",
    "__mutex_lock_killable_slowpath",
    "mutex_lock",
    "mutex_lock_killable",
    "rwsem_down_write_slowpath",
    "__down_write_common",
    "down_write",
    "down_write_killable",
    "rwsem_down_read_slowpath",
    "__down_read_common",
    "__down_read",
    "down_read",
    "down_read_killable",
];
/// Frames that are told of a sleeper.
const FRAMES_TOLD: usize = 4;

/// A task that sleeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sleeper {
    /// The task.
    pub position: TaskPosition,
    /// How often it was switched out so far: the same at two looks, it has slept all the time.
    pub switches: u64,
    /// When it last got a CPU, in nanoseconds of the guest's scheduler clock; 0 where that is not counted.
    pub ran_at: u64,
}

impl Sleeper {
    fn read(kernel: &Kernel<'_>, position: TaskPosition) -> Result<Self, Error> {
        let task = position.task;
        let own = kernel.number(task, "task_struct", "nvcsw")?;
        let forced = kernel.number(task, "task_struct", "nivcsw")?;
        // Only with CONFIG_SCHED_INFO.
        let ran_at = kernel.number(task, "task_struct", "sched_info.last_arrival").unwrap_or(0);
        Ok(Self { position, switches: own.wrapping_add(forced), ran_at })
    }

    /// Whether it has slept on since it was looked at.
    #[must_use]
    pub fn sleeps_on(&self, image: &RepairImage, memory: &dyn VirtMemory) -> bool {
        let kernel = Kernel::of_memory(image, memory);
        let state = kernel.number(self.position.task, "task_struct", "__state");
        let now = Self::read(&kernel, self.position.clone());
        let same = now.is_ok_and(|now| now.switches == self.switches);
        same && state.is_ok_and(|state| state == u64::from(self.position.state))
    }
}

/// All tasks that sleep and are not woken by signals.
///
/// # Errors
/// As [`tasks::all`]; on a guest that runs, a list that changes meanwhile may look damaged.
pub fn sleepers(image: &RepairImage, memory: &dyn VirtMemory) -> Result<Vec<Sleeper>, Error> {
    sleepers_that(image, memory, &TaskPosition::is_uninterruptible)
}

/// All tasks that do not run and are not about to, and of which this holds.
///
/// # Errors
/// As [`sleepers`].
pub fn sleepers_that(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    holds: &dyn Fn(&TaskPosition) -> bool,
) -> Result<Vec<Sleeper>, Error> {
    let kernel = Kernel::of_memory(image, memory);
    let all = tasks::all(image, memory)?.into_iter();
    all.filter(|task| task.state != 0 && task.on_cpu.is_none() && holds(task))
        .map(|task| Sleeper::read(&kernel, task))
        .collect()
}

/// A sleeper and what it sleeps for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// The sleeper.
    pub sleeper: Sleeper,
    /// The lock and the place in its queue.
    pub queued: Queued,
    /// Whose the lock is.
    pub owner: Option<Owner>,
    /// The `rw_semaphore`s that its own frames hold for reading, guest-virtual: nothing in memory names readers.
    pub reads: Vec<GuestVirt>,
    /// The driver that waits, and its function, if a driver does.
    pub driver: Option<(String, String)>,
    /// Where it goes on in the kernel's lock function once it is woken, guest-virtual.
    pub resumes_at: GuestVirt,
    /// Its stack pointer then, guest-virtual.
    pub rsp: GuestVirt,
    /// The preempt count then, without the flag in bit 31.
    pub preempt_count: u32,
}

/// Why it is not known what a sleeper sleeps for.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum NotWaiting {
    /// It was woken meanwhile.
    #[error("it was woken meanwhile")]
    Woken,
    /// Its stack can't be read.
    #[error("its stack could not be read")]
    Unreadable,
    /// It sleeps for something else than a lock.
    #[error("it sleeps in {place}, not for a mutex or rw_semaphore")]
    Elsewhere {
        /// Where, innermost function first.
        place: String,
    },
    /// It sleeps for a lock that was not found.
    #[error("it sleeps for a {noun} that was not found, in {place}")]
    UnknownLock {
        /// What kind of lock.
        noun: &'static str,
        /// Where, innermost function first.
        place: String,
    },
}

/// What a sleeper sleeps for. The guest may run meanwhile.
///
/// # Errors
/// It was woken, or what it sleeps for is not a lock whose waiters are known.
pub fn look(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    sleeper: &Sleeper,
    cache: &mut CodeCache,
) -> Result<Waiter, NotWaiting> {
    cache.look_again();
    let found = waiter(image, memory, sleeper, cache);
    // What was read of the stack of a task that runs is nothing.
    if sleeper.sleeps_on(image, memory) { found } else { Err(NotWaiting::Woken) }
}

fn waiter(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    sleeper: &Sleeper,
    cache: &mut CodeCache,
) -> Result<Waiter, NotWaiting> {
    let kernel = Kernel::of_memory(image, memory);
    let task = sleeper.position.task;
    let (frames, _) = tasks::frames_of_sleeping(image, memory, &sleeper.position, cache)
        .map_err(|_| NotWaiting::Unreadable)?;
    let is_scheduling =
        |frame: &&Frame| frame.module.is_none() && SCHEDULING.contains(&function(frame));
    let at = frames.iter().take_while(is_scheduling).count();
    let elsewhere = || NotWaiting::Elsewhere { place: place(&frames, at) };
    let (Some(inner), Some(frame)) =
        (at.checked_sub(1).and_then(|it| frames.get(it)), frames.get(at))
    else {
        return Err(elsewhere());
    };
    let kind = QueueKind::waited_for_in(function(frame)).filter(|_| frame.module.is_none());
    let kind = kind.ok_or_else(elsewhere)?;
    let unknown = || NotWaiting::UnknownLock { noun: kind.noun(), place: place(&frames, at) };
    let queued = Queued::find(&kernel, kind, frame, task).ok_or_else(unknown)?;
    let (CodeAddress::Return(resumes_at), Some(rsp)) = (frame.pc, frame.registers.rsp()) else {
        return Err(unknown());
    };
    let driver =
        frames.iter().find_map(|frame| Some((frame.module.clone()?, function(frame).to_owned())));
    Ok(Waiter {
        sleeper: sleeper.clone(),
        owner: queued.owner(&kernel),
        reads: reads(&kernel, &frames, task, cache),
        queued,
        driver,
        resumes_at,
        rsp,
        preempt_count: u32::from(function(inner) == DEEPER),
    })
}

/// The `rw_semaphore`s that frames hold for reading, by what their code says.
fn reads(
    kernel: &Kernel<'_>,
    frames: &[Frame],
    task: GuestVirt,
    cache: &mut CodeCache,
) -> Vec<GuestVirt> {
    let waits = |frame: &&Frame| {
        frame.module.is_none()
            && (SCHEDULING.contains(&function(frame)) || LOCKING.contains(&function(frame)))
    };
    let range = frames.iter().take_while(waits).count()..frames.len();
    // Whoever sleeps does so with interrupts on.
    let around = Around { task: Some(task), interrupts_enabled: Some(true), ..Around::default() };
    let found = effects::of(kernel.image, kernel.memory, cache, frames, range, &around);
    let is_read = |held: &&Held| {
        held.kind == ResourceKind::RwsemRead && held.confirmed == Confirmation::Confirmed
    };
    found.held.iter().filter(is_read).filter_map(|held| held.lock).collect()
}

/// The functions a sleeper is in, without those of the scheduler.
fn place(frames: &[Frame], from: usize) -> String {
    let names: Vec<String> = frames.iter().skip(from).take(FRAMES_TOLD).map(display).collect();
    names.join(" < ")
}

impl Waiter {
    /// One line: who waits for what, and whose it is.
    #[must_use]
    pub fn describe(&self) -> String {
        let TaskPosition { comm, pid, .. } = &self.sleeper.position;
        let place = match &self.driver {
            Some((module, function)) => format!(" in {function} [{module}]"),
            None => String::new(),
        };
        let Queued { kind, lock, .. } = self.queued;
        format!("{comm} (pid {pid}) waits{place} for the {} at {lock:#x}", kind.noun())
    }

    /// Whether both looks found the same.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.sleeper.position.task == other.sleeper.position.task
            && self.sleeper.switches == other.sleeper.switches
            && (self.queued, self.owner) == (other.queued, other.owner)
            && self.reads == other.reads
    }

    /// Whether it still stands in the lock's queue, and the lock is still its owner's. For a guest that stands; the
    /// waiter itself may have been woken.
    #[must_use]
    pub fn still_waits(&self, image: &RepairImage, memory: &dyn VirtMemory) -> bool {
        let kernel = Kernel::of_memory(image, memory);
        self.queued.is_whole(&kernel, self.sleeper.position.task)
            && self.owner.is_some()
            && self.queued.owner(&kernel) == self.owner
    }
}

/// Waiters of which each waits for the next, and the last for the first: none of them ever goes on.
#[derive(Clone, Debug, Serialize)]
pub struct Circle {
    /// In the order in which they wait for each other, from the one that is given up if one is.
    #[serde(skip)]
    pub waiters: Vec<Waiter>,
}

impl Circle {
    /// Finds a circle. It begins with the driver's call that went to sleep last, and so closed it; of two, with the
    /// one of the younger task.
    #[must_use]
    pub fn find(waiters: &[Waiter]) -> Option<Self> {
        let next = |waiter: &Waiter| {
            // Of several readers, one that never lets go is enough.
            let holds = |other: &&Waiter| match waiter.owner {
                Some(Owner::Task(owner)) => other.sleeper.position.task == owner,
                Some(Owner::Readers) => other.reads.contains(&waiter.queued.lock),
                None => false,
            };
            waiters.iter().find(holds)
        };
        let circle = waiters.iter().find_map(|start| {
            let mut circle = vec![start.clone()];
            for _ in 0..waiters.len() {
                let other = next(circle.last()?)?;
                if other.sleeper.position.task == start.sleeper.position.task {
                    return Some(circle);
                }
                circle.push(other.clone());
            }
            None
        });
        let mut waiters = circle?;
        let key = |waiter: &Waiter| {
            let Sleeper { position, ran_at, .. } = &waiter.sleeper;
            (waiter.can_be_given_up(), *ran_at, position.pid)
        };
        let last = waiters.iter().enumerate().max_by_key(|(_, waiter)| key(waiter));
        let last = last.map_or(0, |(index, _)| index);
        waiters.rotate_left(last);
        Some(Self { waiters })
    }

    /// Whether both looks found the same.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.waiters.len() == other.waiters.len()
            && self.waiters.iter().zip(&other.waiters).all(|(own, other)| own.is_same(other))
    }

    /// Whose call is given up.
    ///
    /// # Errors
    /// Why none can be.
    pub fn victim(&self) -> Result<Victim, NotCaught> {
        let first = self.waiters.first().filter(|waiter| waiter.can_be_given_up());
        let first = first.ok_or(NotCaught::NobodyToGiveUp)?;
        let class = match self.waiters.as_slice() {
            [_] => CrashClass::LockSelfDeadlock,
            _ => CrashClass::LockCycle,
        };
        Ok(Victim {
            sleeper: first.sleeper.clone(),
            queued: Some(first.queued),
            resumes_at: first.resumes_at,
            preempt_count: first.preempt_count,
            class,
            evidence: self.describe(),
        })
    }

    /// One line a waiter.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let next = self.waiters.iter().cycle().skip(1);
        let line = |(waiter, next): (&Waiter, &Waiter)| {
            let TaskPosition { comm, pid, .. } = &next.sleeper.position;
            format!("{}, which {comm} (pid {pid}) holds", waiter.describe())
        };
        self.waiters.iter().zip(next).map(line).collect()
    }
}

impl Waiter {
    /// Whether its call could be ended: a driver's.
    fn can_be_given_up(&self) -> bool {
        self.driver.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKS: u64 = 0xffff_8880_0000_1000;

    fn task(number: u64) -> GuestVirt {
        GuestVirt(0xffff_8880_0000_2000 + number * 0x100)
    }

    /// Task `number` waits for a lock of the owner's.
    fn waiter(number: u64, owner: Option<Owner>) -> Waiter {
        let position = TaskPosition {
            task: task(number),
            pid: number as i32,
            tgid: number as i32,
            comm: "t".to_owned(),
            on_cpu: None,
            state: 2,
            sp: GuestVirt(0),
        };
        let lock = GuestVirt(LOCKS + number * 0x40);
        Waiter {
            sleeper: Sleeper { position, switches: 7, ran_at: 0 },
            queued: Queued { kind: QueueKind::Mutex, lock, entry: GuestVirt(0) },
            owner,
            reads: Vec::new(),
            driver: Some(("m".to_owned(), "f".to_owned())),
            resumes_at: GuestVirt(0),
            rsp: GuestVirt(0),
            preempt_count: 1,
        }
    }

    fn owned_by(number: u64) -> Option<Owner> {
        Some(Owner::Task(task(number)))
    }

    fn circle(waiters: &[Waiter]) -> Option<Vec<i32>> {
        let found = Circle::find(waiters)?;
        Some(found.waiters.iter().map(|waiter| waiter.sleeper.position.pid).collect())
    }

    #[test]
    fn a_chain_is_no_circle() {
        let chain = [waiter(1, owned_by(2)), waiter(2, owned_by(3)), waiter(3, None)];
        assert_eq!(circle(&chain), None);
        assert_eq!(circle(&chain[..2]), None, "the owner does not sleep");
        assert_eq!(circle(&[]), None);
    }

    #[test]
    fn whoever_only_waits_for_a_circle_is_not_in_it() {
        let waiters = [waiter(1, owned_by(2)), waiter(2, owned_by(3)), waiter(3, owned_by(2))];
        assert_eq!(circle(&waiters), Some(vec![3, 2]));
        assert_eq!(circle(&[waiter(1, owned_by(1))]), Some(vec![1]));
    }

    #[test]
    fn the_call_that_closed_it_comes_first() {
        let mut waiters = [waiter(1, owned_by(2)), waiter(2, owned_by(3)), waiter(3, owned_by(1))];
        waiters[1].sleeper.ran_at = 9;
        assert_eq!(circle(&waiters), Some(vec![2, 3, 1]));
        waiters[1].driver = None;
        assert_eq!(circle(&waiters), Some(vec![3, 1, 2]), "of a driver");
    }

    #[test]
    fn readers_are_known_by_their_frames() {
        let mut waiters = [waiter(1, Some(Owner::Readers)), waiter(2, owned_by(1))];
        assert_eq!(circle(&waiters), None);
        waiters[1].reads = vec![waiters[0].queued.lock];
        assert_eq!(circle(&waiters), Some(vec![2, 1]));
    }

    #[test]
    fn without_a_driver_nobody_is_given_up() {
        let mut own = waiter(1, owned_by(1));
        assert!(Circle::find(std::slice::from_ref(&own)).unwrap().victim().is_ok());
        own.driver = None;
        let found = Circle::find(&[own]).unwrap();
        assert_eq!(found.victim(), Err(NotCaught::NobodyToGiveUp));
    }

    #[test]
    fn whoever_has_run_is_another() {
        let one = Circle::find(&[waiter(1, owned_by(1))]).unwrap();
        let mut later = one.clone();
        assert!(one.is_same(&later));
        later.waiters[0].sleeper.switches += 1;
        assert!(!one.is_same(&later));
    }
}
