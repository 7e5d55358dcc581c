//! The queue of a sleeping lock: the entry that a waiter keeps on its stack, the lock that the queue belongs to, and
//! who owns that. Reads memory that may change meanwhile or lie: all is bounded, and what is not certain is `None`.

use guest::{GuestVirt, Reg};
use serde::Serialize;

use crate::Frame;
use crate::kernel::Kernel;

/// Bytes of one frame that are looked through at most.
const FRAME_MAX: u64 = 1024;
/// Entries of one queue at most.
const QUEUE_MAX: usize = 4096;
/// Low bits of an owner's word that are flags: `MUTEX_FLAGS` (kernel/locking/mutex.h), `RWSEM_OWNER_FLAGS_MASK`
/// (kernel/locking/rwsem.c, 3 bits of which 2 are in use).
const OWNER_FLAGS: u64 = 7;
/// `MUTEX_FLAG_PICKUP`, kernel/locking/mutex.h: the lock was handed to a waiter.
const MUTEX_PICKUP: u64 = 4;
/// `RWSEM_READER_OWNED`, kernel/locking/rwsem.c.
const READER_OWNED: u64 = 1;
/// `RWSEM_READER_SHIFT`: readers are counted from this bit of `rw_semaphore.count` on, kernel/locking/rwsem.c.
const READER_SHIFT: u32 = 8;
/// `RWSEM_WRITER_LOCKED` in `rw_semaphore.count`, kernel/locking/rwsem.c.
const WRITER_LOCKED: u64 = 1;

/// A lock that tasks sleep for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SleepingLock {
    /// `struct mutex`
    Mutex,
    /// `struct rw_semaphore`, waited for to write.
    RwsemWrite,
    /// `struct rw_semaphore`, waited for to read.
    RwsemRead,
}

impl SleepingLock {
    /// The lock that the function waits for in which a task sleeps (kernel/locking/mutex.c, rwsem.c); those for
    /// `ww_mutex` are others.
    pub(super) fn waited_for_in(function: &str) -> Option<Self> {
        match function {
            "__mutex_lock" => Some(Self::Mutex),
            "rwsem_down_write_slowpath" => Some(Self::RwsemWrite),
            "rwsem_down_read_slowpath" => Some(Self::RwsemRead),
            _ => None,
        }
    }

    /// Its C structure.
    #[must_use]
    pub const fn structure(self) -> &'static str {
        match self {
            Self::Mutex => "mutex",
            Self::RwsemWrite | Self::RwsemRead => "rw_semaphore",
        }
    }

    /// The C structure of an entry of its queue; `list` links it, `task` is who waits.
    #[must_use]
    pub const fn entry(self) -> &'static str {
        match self {
            Self::Mutex => "mutex_waiter",
            Self::RwsemWrite | Self::RwsemRead => "rwsem_waiter",
        }
    }

    /// What people call it.
    #[must_use]
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Mutex => "mutex",
            Self::RwsemWrite => "rw_semaphore (write)",
            Self::RwsemRead => "rw_semaphore (read)",
        }
    }
}

/// Whose a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// A task's, guest-virtual address of its `task_struct`.
    Task(GuestVirt),
    /// Readers', whom the lock does not name.
    Readers,
}

impl Owner {
    fn task(word: u64) -> Option<Self> {
        let task = GuestVirt(word & !OWNER_FLAGS);
        task.is_kernel_half().then_some(Self::Task(task))
    }
}

/// A lock that a task waits for, and its place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Queued {
    /// What it is.
    pub kind: SleepingLock,
    /// The lock, guest-virtual.
    pub lock: GuestVirt,
    /// The waiter's entry in the queue, on the waiter's stack, guest-virtual.
    pub entry: GuestVirt,
}

impl Queued {
    /// What `task` waits for in `frame`, which sleeps for a lock of this kind. `None` unless there is exactly one
    /// queue of such a lock with an entry of this task in this frame.
    pub(super) fn find(
        kernel: &Kernel<'_>,
        kind: SleepingLock,
        frame: &Frame,
        task: GuestVirt,
    ) -> Option<Self> {
        let bottom = frame.registers.rsp()?;
        let size = frame.cfa?.0.checked_sub(bottom.0).filter(|size| *size <= FRAME_MAX)?;
        let slots: Vec<GuestVirt> = (0..size / 8).map(|slot| bottom + slot * 8).collect();
        let of_task = kernel.offset(kind.entry(), "task").ok()?;
        let entries = slots.iter().copied().filter(|&at| {
            at.checked_add(of_task)
                .and_then(|at| kernel.memory.read_u64(at).ok())
                .is_some_and(|found| found == task.0)
        });
        let saved = slots.iter().filter_map(|&at| kernel.memory.read_u64(at).ok());
        let registers = Reg::CALLEE_SAVED.into_iter().filter_map(|reg| frame.registers.get(reg));
        let mut locks: Vec<GuestVirt> = registers.chain(saved).map(GuestVirt).collect();
        locks.retain(|at| at.is_kernel_half() && at.0 % 8 == 0);
        locks.sort_unstable();
        locks.dedup();
        let found: Vec<Self> = entries
            .flat_map(|entry| locks.iter().map(move |&lock| Self { kind, lock, entry }))
            .filter(|queued| queued.is_whole(kernel, task))
            .collect();
        match found.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// Whether the entry is in the lock's queue, which is sound, and is still this task's.
    pub(super) fn is_whole(&self, kernel: &Kernel<'_>, task: GuestVirt) -> bool {
        self.check(kernel, task).unwrap_or(false)
    }

    fn check(&self, kernel: &Kernel<'_>, task: GuestVirt) -> Option<bool> {
        let head =
            self.lock.checked_add(kernel.offset(self.kind.structure(), "wait_list").ok()?)?;
        let own = self.entry.checked_add(kernel.offset(self.kind.entry(), "list").ok()?)?;
        if kernel.pointer(self.entry, self.kind.entry(), "task").ok()? != task {
            return Some(false);
        }
        let mut at = head;
        let mut met = false;
        for _ in 0..QUEUE_MAX {
            let next = kernel.pointer(at, "list_head", "next").ok()?;
            let back = kernel.pointer(next, "list_head", "prev").ok()?;
            if back != at {
                return Some(false);
            }
            if next == head {
                return Some(met);
            }
            met |= next == own;
            at = next;
        }
        Some(false)
    }

    /// Whose the lock is; `None` when it is free or being handed over.
    pub(super) fn owner(&self, kernel: &Kernel<'_>) -> Option<Owner> {
        let word = kernel.number(self.lock, self.kind.structure(), "owner").ok()?;
        if self.kind == SleepingLock::Mutex {
            return Owner::task(word).filter(|_| word & MUTEX_PICKUP == 0);
        }
        let count = kernel.number(self.lock, self.kind.structure(), "count").ok()?;
        match (word & READER_OWNED != 0, count & WRITER_LOCKED != 0, count >> READER_SHIFT) {
            (false, true, 0) => Owner::task(word),
            (true, false, 1..) => Some(Owner::Readers),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use guest::VirtMemory;

    use super::*;
    use crate::testing::{DATA, Guest, frame};

    const TASK: u64 = DATA + 0x1000;
    const LOCK: u64 = DATA + 0x2000;
    const HEAD: u64 = LOCK + 0x10;
    const STACK: u64 = DATA + 0x3000;
    /// The entry of the task's, in its frame.
    const ENTRY: u64 = STACK + 0x20;

    /// A mutex with this task alone in its queue.
    fn guest() -> Guest {
        let mut guest = Guest::new().types(|types| {
            types
                .with("list_head", "next", 0, 8)
                .with("list_head", "prev", 8, 8)
                .with("mutex", "owner", 0, 8)
                .with("mutex", "wait_list", 0x10, 16)
                .with("mutex_waiter", "list", 8, 16)
                .with("mutex_waiter", "task", 0, 8)
                .with("rw_semaphore", "count", 0, 8)
                .with("rw_semaphore", "owner", 8, 8)
        });
        for (at, to) in
            [(HEAD, ENTRY + 8), (HEAD + 8, ENTRY + 8), (ENTRY + 8, HEAD), (ENTRY + 16, HEAD)]
        {
            guest.poke_u64(at, to);
        }
        guest.poke_u64(ENTRY, TASK);
        guest
    }

    fn found(guest: &mut Guest, registers: &[(Reg, u64)]) -> Option<Queued> {
        let mut frame = frame("__mutex_lock", None);
        frame.cfa = Some(GuestVirt(STACK + 0x80));
        frame.registers.set(Reg::Rsp, STACK);
        registers.iter().for_each(|(reg, value)| frame.registers.set(*reg, *value));
        let image = guest.image();
        let space = guest.machine.space();
        let memory: &dyn VirtMemory = &space;
        let kernel = Kernel::of_memory(&image, memory);
        Queued::find(&kernel, SleepingLock::Mutex, &frame, GuestVirt(TASK))
    }

    #[test]
    fn the_lock_is_in_a_register_or_on_the_stack() {
        let expected =
            Queued { kind: SleepingLock::Mutex, lock: GuestVirt(LOCK), entry: GuestVirt(ENTRY) };
        assert_eq!(found(&mut guest(), &[(Reg::Rbx, LOCK)]), Some(expected));
        assert_eq!(found(&mut guest(), &[(Reg::Rbx, LOCK + 8)]), None);
        let mut guest = guest();
        guest.poke_u64(STACK, LOCK);
        assert_eq!(found(&mut guest, &[]), Some(expected));
    }

    #[test]
    fn a_queue_that_is_not_whole_says_nothing() {
        for (at, value) in [
            (ENTRY, TASK + 8),
            (ENTRY + 8, ENTRY + 8),
            (ENTRY + 16, STACK),
            (HEAD, HEAD),
            (HEAD, 0x4141_4141_4141_4141),
            (ENTRY + 8, u64::MAX - 3),
        ] {
            let mut guest = guest();
            guest.poke_u64(at, value);
            assert_eq!(found(&mut guest, &[(Reg::Rbx, LOCK)]), None, "{at:#x} = {value:#x}");
        }
    }

    fn owner(kind: SleepingLock, words: [u64; 2]) -> Option<Owner> {
        let mut guest = guest();
        guest.poke_u64(LOCK, words[0]);
        guest.poke_u64(LOCK + 8, words[1]);
        let image = guest.image();
        let space = guest.machine.space();
        let queued = Queued { kind, lock: GuestVirt(LOCK), entry: GuestVirt(ENTRY) };
        queued.owner(&Kernel::of_memory(&image, &space))
    }

    #[test]
    fn flags_are_no_part_of_the_owner() {
        let task = Some(Owner::Task(GuestVirt(TASK)));
        assert_eq!(owner(SleepingLock::Mutex, [TASK | 3, 0]), task);
        assert_eq!(owner(SleepingLock::Mutex, [TASK | 4, 0]), None, "it is handed over");
        assert_eq!(owner(SleepingLock::Mutex, [1, 0]), None);
        assert_eq!(owner(SleepingLock::RwsemWrite, [7, TASK]), task);
        assert_eq!(owner(SleepingLock::RwsemWrite, [6, TASK]), None, "it is free");
        assert_eq!(owner(SleepingLock::RwsemWrite, [0x102, TASK | 1]), Some(Owner::Readers));
        assert_eq!(owner(SleepingLock::RwsemRead, [2, TASK | 1]), None, "the last one has gone");
    }
}
