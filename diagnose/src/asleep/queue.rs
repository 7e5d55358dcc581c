//! The queue in which a task sleeps: the entry that a waiter keeps on its stack, the lock or whatever else the queue
//! belongs to, and who owns that. Reads memory that may change meanwhile or lie: all is bounded, and what is not certain is `None`.

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

/// What tasks sleep for in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QueueKind {
    /// `struct mutex`
    Mutex,
    /// `struct rw_semaphore`, waited for to write.
    RwsemWrite,
    /// `struct rw_semaphore`, waited for to read.
    RwsemRead,
    /// `struct completion`
    Completion,
    /// `struct semaphore`
    Semaphore,
    /// `struct wait_queue_head`
    WaitQueue,
}

impl QueueKind {
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

    /// The same for what nobody owns (kernel/sched/completion.c, kernel/locking/semaphore.c).
    pub(super) fn awaited_in(function: &str) -> Option<Self> {
        match function {
            "do_wait_for_common" | "__wait_for_common" => Some(Self::Completion),
            "___down_common" | "__down_common" => Some(Self::Semaphore),
            _ => None,
        }
    }

    /// Its C structure.
    #[must_use]
    pub const fn structure(self) -> &'static str {
        match self {
            Self::Mutex => "mutex",
            Self::RwsemWrite | Self::RwsemRead => "rw_semaphore",
            Self::Completion => "completion",
            Self::Semaphore => "semaphore",
            Self::WaitQueue => "wait_queue_head",
        }
    }

    /// The member of it that is the queue.
    #[must_use]
    pub const fn list(self) -> &'static str {
        match self {
            Self::Mutex | Self::RwsemWrite | Self::RwsemRead | Self::Semaphore => "wait_list",
            Self::Completion => "wait.task_list",
            Self::WaitQueue => "head",
        }
    }

    /// The spinlock that whoever changes the queue holds.
    #[must_use]
    pub const fn guarded_by(self) -> &'static str {
        match self {
            Self::Mutex | Self::RwsemWrite | Self::RwsemRead => "wait_lock",
            Self::Completion => "wait.lock",
            Self::Semaphore | Self::WaitQueue => "lock",
        }
    }

    /// The C structure of an entry of its queue.
    #[must_use]
    pub const fn entry(self) -> &'static str {
        match self {
            Self::Mutex => "mutex_waiter",
            Self::RwsemWrite | Self::RwsemRead => "rwsem_waiter",
            Self::Completion => "swait_queue",
            Self::Semaphore => "semaphore_waiter",
            Self::WaitQueue => "wait_queue_entry",
        }
    }

    /// The member that links an entry.
    #[must_use]
    pub const fn link(self) -> &'static str {
        match self {
            Self::Mutex | Self::RwsemWrite | Self::RwsemRead | Self::Semaphore => "list",
            Self::Completion => "task_list",
            Self::WaitQueue => "entry",
        }
    }

    /// The member that says who waits.
    #[must_use]
    pub const fn waiter(self) -> &'static str {
        match self {
            Self::WaitQueue => "private",
            _ => "task",
        }
    }

    /// What people call it.
    #[must_use]
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Mutex => "mutex",
            Self::RwsemWrite => "rw_semaphore (write)",
            Self::RwsemRead => "rw_semaphore (read)",
            Self::Completion => "completion",
            Self::Semaphore => "semaphore",
            Self::WaitQueue => "wait queue",
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

/// What a task waits for, and its place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Queued {
    /// What it is.
    pub kind: QueueKind,
    /// The lock, or what else has the queue, guest-virtual.
    pub lock: GuestVirt,
    /// The waiter's entry in the queue, on the waiter's stack, guest-virtual.
    pub entry: GuestVirt,
}

impl Queued {
    /// What `task` waits for in `frame`, which sleeps for a lock of this kind. `None` unless there is exactly one
    /// queue of such a lock with an entry of this task in this frame.
    pub(super) fn find(
        kernel: &Kernel<'_>,
        kind: QueueKind,
        frame: &Frame,
        task: GuestVirt,
    ) -> Option<Self> {
        let bottom = frame.registers.rsp()?;
        let size = frame.cfa?.0.checked_sub(bottom.0).filter(|size| *size <= FRAME_MAX)?;
        let slots: Vec<GuestVirt> = (0..size / 8).map(|slot| bottom + slot * 8).collect();
        let entries = entries(kernel, kind, &slots, task);
        let saved = slots.iter().filter_map(|&at| kernel.memory.read_u64(at).ok());
        let registers = Reg::CALLEE_SAVED.into_iter().filter_map(|reg| frame.registers.get(reg));
        let mut locks: Vec<GuestVirt> = registers.chain(saved).map(GuestVirt).collect();
        locks.retain(|at| at.is_kernel_half() && at.0 % 8 == 0);
        locks.sort_unstable();
        locks.dedup();
        let found: Vec<Self> = entries
            .into_iter()
            .flat_map(|entry| locks.iter().map(move |&lock| Self { kind, lock, entry }))
            .filter(|queued| queued.is_whole(kernel, task))
            .collect();
        match found.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// The wait queue that `task` stands in by an entry among these words of its stack: `DEFINE_WAIT()` and the macros
    /// of include/linux/wait.h keep it in the frame of whoever waits. `None` unless it is exactly one.
    pub(super) fn in_wait_queue(
        kernel: &Kernel<'_>,
        slots: &[GuestVirt],
        task: GuestVirt,
    ) -> Option<Self> {
        let kind = QueueKind::WaitQueue;
        let found: Vec<Self> = entries(kernel, kind, slots, task)
            .into_iter()
            .filter_map(|entry| Some(Self { kind, lock: head_of(kernel, entry)?, entry }))
            .filter(|queued| queued.is_whole(kernel, task))
            .collect();
        match found.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// Where the entry is linked, guest-virtual.
    pub(super) fn link_at(&self, kernel: &Kernel<'_>) -> Option<GuestVirt> {
        self.entry.checked_add(kernel.offset(self.kind.entry(), self.kind.link()).ok()?)
    }

    /// Whether the entry is in the lock's queue, which is sound, and is still this task's.
    pub(super) fn is_whole(&self, kernel: &Kernel<'_>, task: GuestVirt) -> bool {
        self.check(kernel, task).unwrap_or(false)
    }

    fn check(&self, kernel: &Kernel<'_>, task: GuestVirt) -> Option<bool> {
        let list = kernel.offset(self.kind.structure(), self.kind.list()).ok()?;
        let head = self.lock.checked_add(list)?;
        let own = self.link_at(kernel)?;
        if kernel.pointer(self.entry, self.kind.entry(), self.kind.waiter()).ok()? != task {
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
        if self.kind == QueueKind::Mutex {
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

/// Words of a stack at which an entry of this task's may lie.
fn entries(
    kernel: &Kernel<'_>,
    kind: QueueKind,
    slots: &[GuestVirt],
    task: GuestVirt,
) -> Vec<GuestVirt> {
    let Ok(of_task) = kernel.offset(kind.entry(), kind.waiter()) else { return Vec::new() };
    let names_task = |at: &GuestVirt| {
        let word = at.checked_add(of_task).and_then(|at| kernel.memory.read_u64(at).ok());
        word.is_some_and(|found| found == task.0)
    };
    slots.iter().copied().filter(names_task).collect()
}

/// The `wait_queue_head` in whose queue an entry is: what is linked there is an entry if its `func` is a function's
/// address, and one thing is none. Before a head's list there is its spinlock.
fn head_of(kernel: &Kernel<'_>, entry: GuestVirt) -> Option<GuestVirt> {
    let kind = QueueKind::WaitQueue;
    let link = kernel.offset(kind.entry(), kind.link()).ok()?;
    let own = entry.checked_add(link)?;
    let (mut at, mut head) = (own, None);
    for _ in 0..QUEUE_MAX {
        let next = kernel.pointer(at, "list_head", "next").ok()?;
        if next == own {
            let list = kernel.offset(kind.structure(), kind.list()).ok()?;
            return head.map(|head: GuestVirt| GuestVirt(head.0.wrapping_sub(list)));
        }
        let other = GuestVirt(next.0.wrapping_sub(link));
        let called = kernel.pointer(other, kind.entry(), "func").ok()?;
        if !kernel.image.is_text(called) && head.replace(next).is_some() {
            return None;
        }
        at = next;
    }
    None
}

/// The first of these words of a stack at which something is linked with others, but for what is linked at `except`:
/// the `prev` of a list or the `pprev` of a hash list leads to what leads back. Timers and work that lie on a stack are
/// linked so.
pub(super) fn linked(
    kernel: &Kernel<'_>,
    slots: &[GuestVirt],
    except: Option<GuestVirt>,
) -> Option<GuestVirt> {
    let word = |at: GuestVirt| kernel.memory.read_u64(at).ok();
    let is_linked = |at: &GuestVirt| {
        let back = at.checked_add(8).and_then(word).map(GuestVirt);
        let back = back.filter(|back| back.is_kernel_half() && back.0 % 8 == 0 && back != at);
        Some(*at) != except && back.and_then(word) == Some(at.0)
    };
    slots.iter().copied().find(is_linked)
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
        Queued::find(&kernel, QueueKind::Mutex, &frame, GuestVirt(TASK))
    }

    #[test]
    fn the_lock_is_in_a_register_or_on_the_stack() {
        let expected =
            Queued { kind: QueueKind::Mutex, lock: GuestVirt(LOCK), entry: GuestVirt(ENTRY) };
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

    fn owner(kind: QueueKind, words: [u64; 2]) -> Option<Owner> {
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
        assert_eq!(owner(QueueKind::Mutex, [TASK | 3, 0]), task);
        assert_eq!(owner(QueueKind::Mutex, [TASK | 4, 0]), None, "it is handed over");
        assert_eq!(owner(QueueKind::Mutex, [1, 0]), None);
        assert_eq!(owner(QueueKind::RwsemWrite, [7, TASK]), task);
        assert_eq!(owner(QueueKind::RwsemWrite, [6, TASK]), None, "it is free");
        assert_eq!(owner(QueueKind::RwsemWrite, [0x102, TASK | 1]), Some(Owner::Readers));
        assert_eq!(owner(QueueKind::RwsemRead, [2, TASK | 1]), None, "the last one has gone");
    }

    /// A wait queue and its head, and entries in it: this task's, and another's, whose stack is elsewhere.
    const WAIT: u64 = DATA + 0x4000;
    const OTHER: u64 = DATA + 0x5000;
    const FUNC: u64 = crate::testing::TEXT + 0x100;

    fn wait_queue(entries: &[u64]) -> Guest {
        let mut guest = Guest::new().types(|types| {
            types
                .with("list_head", "next", 0, 8)
                .with("list_head", "prev", 8, 8)
                .with("wait_queue_head", "lock", 0, 4)
                .with("wait_queue_head", "head", 8, 16)
                .with("wait_queue_entry", "private", 8, 8)
                .with("wait_queue_entry", "func", 0x10, 8)
                .with("wait_queue_entry", "entry", 0x18, 16)
        });
        let ring: Vec<u64> =
            [WAIT + 8].into_iter().chain(entries.iter().map(|at| at + 0x18)).collect();
        for (at, next) in ring.iter().zip(ring.iter().cycle().skip(1)) {
            guest.poke_u64(*at, *next);
            guest.poke_u64(*next + 8, *at);
        }
        for entry in entries {
            guest.poke_u64(entry + 8, if *entry == ENTRY { TASK } else { 0 });
            guest.poke_u64(entry + 0x10, FUNC);
        }
        guest
    }

    fn slots() -> Vec<GuestVirt> {
        (0..0x10).map(|slot| GuestVirt(STACK + slot * 8)).collect()
    }

    fn in_wait_queue(guest: &mut Guest) -> Option<Queued> {
        let image = guest.image();
        let space = guest.machine.space();
        Queued::in_wait_queue(&Kernel::of_memory(&image, &space), &slots(), GuestVirt(TASK))
    }

    #[test]
    fn the_head_of_a_wait_queue_is_what_is_no_entry() {
        let (lock, entry) = (GuestVirt(WAIT), GuestVirt(ENTRY));
        let expected = Some(Queued { kind: QueueKind::WaitQueue, lock, entry });
        for entries in [&[ENTRY][..], &[ENTRY, OTHER], &[OTHER, ENTRY]] {
            assert_eq!(in_wait_queue(&mut wait_queue(entries)), expected, "{entries:x?}");
        }
        let mut guest = wait_queue(&[ENTRY, OTHER]);
        guest.poke_u64(OTHER + 0x10, 0);
        assert_eq!(in_wait_queue(&mut guest), None, "two could be the head");
        let mut guest = wait_queue(&[ENTRY]);
        guest.poke_u64(ENTRY + 8, TASK + 8);
        assert_eq!(in_wait_queue(&mut guest), None, "another task's");
        let mut guest = wait_queue(&[ENTRY]);
        guest.poke_u64(WAIT + 0x10, ENTRY);
        assert_eq!(in_wait_queue(&mut guest), None, "it is being changed");
    }

    #[test]
    fn whatever_leads_back_to_a_stack_is_linked() {
        let linked = |guest: &mut Guest, except| {
            let image = guest.image();
            let space = guest.machine.space();
            super::linked(&Kernel::of_memory(&image, &space), &slots(), except)
        };
        let own = Some(GuestVirt(ENTRY + 0x18));
        assert_eq!(linked(&mut wait_queue(&[ENTRY]), own), None);
        assert_eq!(linked(&mut wait_queue(&[ENTRY]), None), own);
        let mut guest = wait_queue(&[ENTRY]);
        // A timer in a bucket: its pprev is where the bucket's first is.
        guest.poke_u64(STACK + 8, OTHER);
        guest.poke_u64(OTHER, STACK);
        assert_eq!(linked(&mut guest, own), Some(GuestVirt(STACK)));
        // An empty list, and one that was left long ago.
        let mut guest = wait_queue(&[ENTRY]);
        for (at, value) in [(STACK, STACK), (STACK + 8, STACK), (STACK + 0x18, OTHER)] {
            guest.poke_u64(at, value);
        }
        assert_eq!(linked(&mut guest, own), None);
    }
}
