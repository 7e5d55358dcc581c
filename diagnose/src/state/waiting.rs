//! Tasks that sleep and that no signal wakes: their frames, the locks they wait for, who owns these, and circles of
//! waiting. A lock is told by the wait list that the sleeper's own stack is part of, never by a guess.

use std::collections::HashMap;

use guest::GuestVirt;
use serde::Serialize;

use super::locals::Locals;
use super::{Backtrace, Section};
use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::names::function;
use crate::tasks::{self, TaskPosition};
use crate::{Frame, context};

/// Sleepers that are looked at.
const BLOCKED_MAX: usize = 256;
/// Bytes of a stack at most; kernels have 16 KiB, with KASAN 32.
const STACK_MAX: u64 = 64 << 10;
/// Innermost frames that may be those of waiting for a lock.
const WAITING_FRAMES: usize = 12;
/// Entries of one wait list.
const WAITERS_MAX: usize = 4096;
/// Data symbols further before a lock than this do not name it, bytes.
const SYMBOL_MAX: u64 = 4096;

/// A task by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Who {
    /// Guest-virtual address of its `task_struct`.
    pub task: GuestVirt,
    /// Thread id.
    pub pid: i32,
    /// Name.
    pub comm: String,
}

/// What kind of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LockKind {
    /// `struct mutex`
    Mutex,
    /// `struct rw_semaphore`
    Rwsem,
    /// `struct semaphore`: nobody owns it.
    Semaphore,
}

/// A lock that tasks wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lock {
    /// Guest-virtual address.
    pub at: GuestVirt,
    /// Its kind.
    pub kind: LockKind,
    /// Data symbol that it is or lies in, `None` for one in allocated memory.
    pub name: Option<String>,
    /// Who holds it, for writing if it is a rwsem; `None` when nobody does or nobody is told.
    pub owner: Option<Who>,
    /// Whether readers hold the rwsem: then the kernel does not note who.
    pub held_by_readers: bool,
    /// Guest-virtual address of an owner that is no task any more: it ended with the lock held, and nobody will ever
    /// release it.
    pub owner_gone: Option<GuestVirt>,
    /// Who waits for it, in the order of its list. Sleepers that signals wake are among them.
    pub waiters: Vec<Who>,
}

/// A task that sleeps and that no signal wakes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Blocked {
    /// The task.
    pub task: Who,
    /// Its frames.
    pub backtrace: Section<Backtrace>,
    /// Guest-virtual address of the lock it waits for; `None` when it waits for no lock of a kind in `LockKind`.
    pub lock: Option<GuestVirt>,
}

/// Who waits for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// Tasks that sleep and that no signal wakes.
    pub blocked: Vec<Blocked>,
    /// How many more there are than are listed.
    pub more: usize,
    /// The locks they wait for.
    pub locks: Vec<Lock>,
    /// Tasks that wait for each other in a circle: a deadlock. Each begins with its lowest thread id.
    pub deadlocks: Vec<Vec<Who>>,
}

/// How a kind of lock keeps its waiters.
struct Scheme {
    kind: LockKind,
    lock: &'static str,
    waiter: &'static str,
    /// Functions that sleep in its list (kernel/locking/, v6.1 to v6.12); prefixes, because parts of them are inlined
    /// or specialised.
    functions: &'static [&'static str],
    /// Low bits of `owner` that are no address: `MUTEX_FLAGS`, `RWSEM_OWNER_FLAGS_MASK`.
    flags: u64,
}

const SCHEMES: [Scheme; 3] = [
    Scheme {
        kind: LockKind::Mutex,
        lock: "mutex",
        waiter: "mutex_waiter",
        functions: &["__mutex_lock", "mutex_lock", "__ww_mutex_lock", "ww_mutex_lock"],
        flags: 7,
    },
    Scheme {
        kind: LockKind::Rwsem,
        lock: "rw_semaphore",
        waiter: "rwsem_waiter",
        functions: &["rwsem_down_", "down_read", "down_write"],
        flags: 3,
    },
    Scheme {
        kind: LockKind::Semaphore,
        lock: "semaphore",
        waiter: "semaphore_waiter",
        functions: &["__down", "down"],
        flags: 0,
    },
];
/// `RWSEM_READER_OWNED` of kernel/locking/rwsem.c.
const READER_OWNED: u64 = 1;

type Known<'a> = HashMap<GuestVirt, &'a TaskPosition>;

pub(super) fn of(
    kernel: &Kernel<'_>,
    tasks: &[TaskPosition],
    locals: &Locals<'_>,
    cache: &mut CodeCache,
) -> Waiting {
    let known: Known<'_> = tasks.iter().map(|task| (task.task, task)).collect();
    let sleepers = || tasks.iter().filter(|it| it.is_uninterruptible() && it.on_cpu.is_none());
    let mut waiting = Waiting::default();
    for task in sleepers().take(BLOCKED_MAX) {
        let found = tasks::frames_of_sleeping(kernel.image, kernel.memory, task, cache);
        let frames = found.as_ref().map(|(frames, _)| frames.as_slice()).unwrap_or_default();
        let lock = awaited(kernel, task, frames, &known);
        let backtrace = found.map(|(frames, end)| Backtrace::new(&frames, end, locals)).into();
        let at = lock.as_ref().map(|lock| lock.at);
        if let Some(lock) = lock.filter(|lock| waiting.locks.iter().all(|it| it.at != lock.at)) {
            waiting.locks.push(lock);
        }
        waiting.blocked.push(Blocked { task: who(task), backtrace, lock: at });
    }
    waiting.more = sleepers().count().saturating_sub(waiting.blocked.len());
    waiting.deadlocks = circles(&waiting);
    waiting
}

fn who(task: &TaskPosition) -> Who {
    Who { task: task.task, pid: task.pid, comm: task.comm.clone() }
}

/// The lock in whose list a sleeper stands.
fn awaited(
    kernel: &Kernel<'_>,
    task: &TaskPosition,
    frames: &[Frame],
    known: &Known<'_>,
) -> Option<Lock> {
    let inner = frames.iter().take(WAITING_FRAMES).filter(|frame| frame.module.is_none());
    let names: Vec<&str> = inner.map(function).collect();
    let sleeps = |scheme: &&Scheme| {
        names.iter().any(|name| scheme.functions.iter().any(|prefix| name.starts_with(prefix)))
    };
    let scheme = SCHEMES.iter().find(sleeps)?;
    let words = stack_words(kernel, task)?;
    let own = words.iter().filter(|(_, word)| *word == task.task.0);
    own.filter_map(|(at, _)| scheme.lock_of_waiter(kernel, *at, known)).next()
}

/// The words of a sleeper's stack that are in use, each with its place.
fn stack_words(kernel: &Kernel<'_>, task: &TaskPosition) -> Option<Vec<(GuestVirt, u64)>> {
    let stack = context::stack_of(kernel, task.task).filter(|stack| stack.contains(&task.sp))?;
    let start = task.sp.align_down(8);
    let size = (stack.end - start).min(STACK_MAX);
    let mut bytes = vec![0; usize::try_from(size).ok()?];
    kernel.memory.read(start, &mut bytes).ok()?;
    let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    Some((0..).step_by(8).map(|offset| start + offset).zip(words).collect())
}

impl Scheme {
    /// The lock, if the word at `slot` is the member `task` of a waiter in its list.
    fn lock_of_waiter(
        &self,
        kernel: &Kernel<'_>,
        slot: GuestVirt,
        known: &Known<'_>,
    ) -> Option<Lock> {
        let member = |name| kernel.offset(self.waiter, name).ok();
        let to_task = member("task")?.wrapping_sub(member("list")?);
        let node = GuestVirt(slot.0.wrapping_sub(to_task));
        let word = |at: GuestVirt| kernel.pointer_at(at, "wait list").ok();
        let (mut head, mut waiters) = (None, Vec::new());
        let (mut at, mut closed) = (node, false);
        while !closed && waiters.len() <= WAITERS_MAX {
            let task = word(at.wrapping_add(to_task)).and_then(|task| known.get(&task));
            match task {
                Some(task) => waiters.push(who(task)),
                None if head.is_none() => head = Some((at, waiters.len())),
                None => return None,
            }
            // `struct list_head`: next, prev.
            let next = word(at)?;
            if word(next.wrapping_add(8)) != Some(at) {
                return None;
            }
            closed = next == node;
            at = next;
        }
        if !closed {
            return None;
        }
        let (head, first) = head?;
        // The walk began in the middle: what it met before the head stands behind the rest.
        waiters.rotate_left(first);
        self.lock(kernel, head, waiters, known)
    }

    /// The lock whose list begins at `head`; `None` when its owner can't be a task.
    fn lock(
        &self,
        kernel: &Kernel<'_>,
        head: GuestVirt,
        waiters: Vec<Who>,
        known: &Known<'_>,
    ) -> Option<Lock> {
        let list = kernel.offset(self.lock, "wait_list").ok()?;
        let at = GuestVirt(head.0.wrapping_sub(list));
        let word = match self.kind {
            LockKind::Semaphore => 0,
            _ => kernel.number(at, self.lock, "owner").ok()?,
        };
        let held_by_readers = self.kind == LockKind::Rwsem && word & READER_OWNED != 0;
        let address = word & !self.flags;
        let address = GuestVirt(address);
        if address.0 != 0 && (!address.is_kernel_half() || address.0 & 7 != 0) {
            return None;
        }
        let owner = known.get(&address).map(|task| who(task));
        // The last reader is kept there, too, and may have ended since.
        let owner = owner.filter(|_| !held_by_readers);
        let gone = owner.is_none() && !held_by_readers && address.0 != 0;
        Some(Lock {
            at,
            kind: self.kind,
            name: name(kernel, at),
            owner,
            held_by_readers,
            owner_gone: gone.then_some(address),
            waiters,
        })
    }
}

/// The data symbol that an address lies in.
fn name(kernel: &Kernel<'_>, at: GuestVirt) -> Option<String> {
    let image = kernel.image;
    let module = image.modules.iter().find(|module| module.contains(at));
    let (knowledge, link) = match module {
        Some(module) => (&module.knowledge, at.0),
        None if image.address_of("_text")? <= at && at < image.address_of("_end")? => {
            (&image.kernel, image.link(at).0)
        }
        None => return None,
    };
    let before = knowledge.symbols().take_while(|symbol| symbol.at.0 <= link);
    let symbol =
        before.filter(|symbol| link - symbol.at.0 < symbol.size.clamp(1, SYMBOL_MAX)).last()?;
    let offset = link - symbol.at.0;
    let place = module.map(|module| format!(" [{}]", module.name)).unwrap_or_default();
    Some(match offset {
        0 => format!("{}{place}", symbol.name),
        _ => format!("{}+{offset:#x}{place}", symbol.name),
    })
}

/// Circles: whoever is met again on the way from a sleeper to the owner of the lock it waits for, and so on.
fn circles(waiting: &Waiting) -> Vec<Vec<Who>> {
    let next = |task: GuestVirt| {
        let blocked = waiting.blocked.iter().find(|blocked| blocked.task.task == task)?;
        let lock = waiting.locks.iter().find(|lock| Some(lock.at) == blocked.lock)?;
        Some((&blocked.task, lock.owner.as_ref()?.task))
    };
    let mut found: Vec<Vec<Who>> = Vec::new();
    for start in &waiting.blocked {
        let mut path: Vec<Who> = Vec::new();
        let mut at = start.task.task;
        while let Some((who, owner)) = next(at) {
            if let Some(back) = path.iter().position(|it| it.task == who.task) {
                let mut circle = path.split_off(back);
                let first = circle.iter().enumerate().min_by_key(|(_, who)| who.pid);
                let first = first.map_or(0, |(index, _)| index);
                circle.rotate_left(first);
                if !found.contains(&circle) {
                    found.push(circle);
                }
                break;
            }
            path.push(who.clone());
            at = owner;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest, frame};

    const LOCK: u64 = DATA + 0x100;
    const TASK: u64 = DATA + 0x1000;
    const OTHER: u64 = DATA + 0x2000;
    const STACK: u64 = DATA + 0x1_0000;
    const OTHER_STACK: u64 = DATA + 0x2_0000;
    const WAITER: u64 = STACK + 0x3000;

    fn position(at: u64, pid: i32, sp: u64) -> TaskPosition {
        let comm = format!("t{pid}");
        TaskPosition {
            task: GuestVirt(at),
            pid,
            tgid: pid,
            comm,
            on_cpu: None,
            state: 2,
            sp: GuestVirt(sp),
        }
    }

    /// Two tasks, one of which sleeps in the list of a mutex that the other owns.
    fn guest() -> Guest {
        let mut guest = Guest::new().object("_text", DATA).object("_end", DATA + 0x8000);
        guest = guest.object("big_lock", LOCK).types(|types| {
            types
                .with("mutex", "owner", 0, 8)
                .with("mutex", "wait_list", 16, 16)
                .with("mutex_waiter", "list", 0, 16)
                .with("mutex_waiter", "task", 16, 8)
        });
        for (task, stack) in [(TASK, STACK), (OTHER, OTHER_STACK)] {
            guest.poke_u64(task + 0x38, stack);
        }
        guest.poke_u64(LOCK, OTHER | 1);
        for (at, next) in [(LOCK + 16, WAITER), (WAITER, LOCK + 16)] {
            guest.poke_u64(at, next);
            guest.poke_u64(at + 8, next);
        }
        guest.poke_u64(WAITER + 16, TASK);
        guest
    }

    fn look(guest: &mut Guest) -> Option<Lock> {
        let image = guest.image();
        let space = guest.machine.space();
        let tasks = [position(TASK, 7, STACK + 0x2f00), position(OTHER, 8, OTHER_STACK + 0x3f00)];
        let known = tasks.iter().map(|task| (task.task, task)).collect();
        let frames = [frame("__schedule", None), frame("__mutex_lock.constprop.0", None)];
        awaited(&Kernel::of_memory(&image, &space), &tasks[0], &frames, &known)
    }

    #[test]
    fn a_mutex_is_found_by_the_list_that_the_stack_is_part_of() {
        let lock = look(&mut guest()).unwrap();
        assert_eq!((lock.at, lock.kind), (GuestVirt(LOCK), LockKind::Mutex));
        assert_eq!(lock.owner.map(|owner| owner.pid), Some(8));
        assert_eq!(lock.name.as_deref(), Some("big_lock"));
        assert_eq!(lock.waiters.iter().map(|who| who.pid).collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn an_owner_that_has_ended_is_told() {
        let mut guest = guest();
        guest.poke_u64(LOCK, DATA + 0x7001);
        let lock = look(&mut guest).unwrap();
        assert_eq!((lock.owner, lock.owner_gone), (None, Some(GuestVirt(DATA + 0x7000))));
    }

    #[test]
    fn a_list_that_does_not_hold_together_tells_of_no_lock() {
        for (at, value) in [
            (LOCK + 24, 0),
            (WAITER, WAITER),
            (WAITER + 8, DATA + 0x500),
            (LOCK, 0x4141_4141_4141_4140),
            (LOCK + 16, 0x10),
        ] {
            let mut guest = guest();
            guest.poke_u64(at, value);
            assert_eq!(look(&mut guest), None, "{at:#x} = {value:#x}");
        }
    }

    #[test]
    fn a_circle_is_told_once() {
        let who = |pid: u8| Who { task: GuestVirt(pid.into()), pid: pid.into(), comm: "t".into() };
        let blocked = |pid, lock| Blocked {
            task: who(pid),
            backtrace: Section::Unknown(String::new()),
            lock: Some(GuestVirt(lock)),
        };
        let lock = |at, owner| Lock {
            at: GuestVirt(at),
            kind: LockKind::Mutex,
            name: None,
            owner: Some(who(owner)),
            held_by_readers: false,
            owner_gone: None,
            waiters: Vec::new(),
        };
        let mut waiting = Waiting {
            blocked: vec![blocked(5, 100), blocked(3, 200), blocked(4, 100)],
            locks: vec![lock(100, 3), lock(200, 5)],
            ..Waiting::default()
        };
        assert_eq!(circles(&waiting), [vec![who(3), who(5)]]);
        waiting.locks[1].owner = Some(who(9));
        assert!(circles(&waiting).is_empty());
    }
}
