//! What kernel functions do to locks, preemption, interrupts and RCU: one table, with reasons. How the
//! executor applies it is in `execute.rs`; how a lock word looks is in `effects.rs`.

use std::collections::HashMap;

use guest::GuestVirt;
use repair_image::RepairImage;

use crate::ResourceKind;

/// What kind of thing is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Class {
    /// `struct mutex`
    Mutex,
    /// `struct rw_semaphore` for writing.
    RwsemWrite,
    /// `struct rw_semaphore` for reading.
    RwsemRead,
    /// `struct semaphore`
    Semaphore,
    /// `spinlock_t`
    Spin,
    /// `rwlock_t` for reading.
    ReadLock,
    /// `rwlock_t` for writing.
    WriteLock,
    /// RCU read side.
    Rcu,
    /// Preempt count, by an amount that the effect names.
    Preempt,
    /// Interrupt flag.
    Interrupts,
    /// Something that can't be given back from outside: nothing may be concluded while it is held.
    Foreign,
}

/// What a spinning lock switches off besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Also {
    /// Nothing.
    Nothing,
    /// Bottom halves.
    Bh,
    /// Interrupts; the release switches them on.
    Irq,
    /// Interrupts; the release restores what was before.
    IrqSave,
}

/// When the call has taken what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    /// Always.
    Always,
    /// When it returns 0.
    Zero,
    /// When it returns something else than 0.
    NonZero,
    /// When these bits of the result are set.
    Bits(u64),
}

/// Where the lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lock {
    /// None.
    None,
    /// First argument.
    Argument,
    /// Member of the structure that the first argument points to.
    Member(&'static str, &'static str),
    /// A variable of the kernel.
    Symbol(&'static str),
    /// Member of the structure that the result, less these low bits, points to.
    ResultMember(u64, &'static str, &'static str),
}

/// What taking did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Effect {
    pub(crate) class: Class,
    pub(crate) also: Also,
    pub(crate) outcome: Outcome,
    pub(crate) lock: Lock,
    /// For [`Class::Preempt`]: what was added to the preempt count.
    pub(crate) amount: i32,
}

impl Effect {
    pub(crate) const fn plain(class: Class) -> Self {
        Self { class, also: Also::Nothing, outcome: Outcome::Always, lock: Lock::None, amount: 0 }
    }

    pub(crate) const fn preempt(amount: i32) -> Self {
        Self { amount, ..Self::plain(Class::Preempt) }
    }

    const fn lock(class: Class, also: Also) -> Self {
        Self { class, also, outcome: Outcome::Always, lock: Lock::Argument, amount: 0 }
    }

    const fn when(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }

    const fn at(self, lock: Lock) -> Self {
        Self { lock, ..self }
    }

    /// The kind that a diagnosis shows.
    pub(crate) fn kind(&self) -> ResourceKind {
        match (self.class, self.also) {
            (Class::Mutex, _) => ResourceKind::Mutex,
            (Class::RwsemWrite, _) => ResourceKind::RwsemWrite,
            (Class::RwsemRead, _) => ResourceKind::RwsemRead,
            (Class::Semaphore, _) => ResourceKind::Semaphore,
            (Class::Spin, Also::Nothing) => ResourceKind::Spinlock,
            (Class::Spin, Also::Bh) => ResourceKind::SpinlockBh,
            (Class::Spin, Also::Irq) => ResourceKind::SpinlockIrq,
            (Class::Spin, Also::IrqSave) => ResourceKind::SpinlockIrqsave,
            (Class::ReadLock, _) => ResourceKind::ReadLock,
            (Class::WriteLock, _) => ResourceKind::WriteLock,
            (Class::Rcu, _) => ResourceKind::Rcu,
            (Class::Preempt, _) if self.amount & SOFTIRQ_DISABLE != 0 => ResourceKind::BottomHalves,
            (Class::Preempt | Class::Foreign, _) => ResourceKind::Preemption,
            (Class::Interrupts, _) => ResourceKind::Interrupts,
        }
    }
}

/// `SOFTIRQ_DISABLE_OFFSET`: what `local_bh_disable()` adds to the preempt count. Part of the count's
/// layout in include/linux/preempt.h, the same since commit 75e1056f5c57 (v2.6.37).
pub(crate) const SOFTIRQ_DISABLE: i32 = 0x200;

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Does {
    /// Takes something.
    Take(Effect),
    /// Gives something back.
    Give(Effect),
    /// Does not return.
    NoReturn,
}

const fn take(class: Class, also: Also) -> Does {
    Does::Take(Effect::lock(class, also))
}

const fn try_take(class: Class, also: Also, outcome: Outcome) -> Does {
    Does::Take(Effect::lock(class, also).when(outcome))
}

const fn give(class: Class, also: Also) -> Does {
    Does::Give(Effect::lock(class, also))
}

use Also::{Bh, Irq, IrqSave, Nothing};
use Class::{Mutex, ReadLock, RwsemRead, RwsemWrite, Semaphore, Spin, WriteLock};

/// Sleeping locks. `inode_lock()` and the like are inlined calls of these. The interruptible and
/// killable forms return 0 or -EINTR.
const SLEEPING: &[(&str, Does)] = &[
    ("mutex_lock", take(Mutex, Nothing)),
    ("mutex_lock_io", take(Mutex, Nothing)),
    ("mutex_lock_nested", take(Mutex, Nothing)),
    ("mutex_lock_interruptible", try_take(Mutex, Nothing, Outcome::Zero)),
    ("mutex_lock_killable", try_take(Mutex, Nothing, Outcome::Zero)),
    ("mutex_trylock", try_take(Mutex, Nothing, Outcome::NonZero)),
    ("atomic_dec_and_mutex_lock", {
        // int atomic_dec_and_mutex_lock(atomic_t *cnt, struct mutex *lock): the lock is the second
        // argument, which the table has no form for.
        Does::Take(Effect::plain(Class::Foreign).when(Outcome::NonZero))
    }),
    ("mutex_unlock", give(Mutex, Nothing)),
    ("down_write", take(RwsemWrite, Nothing)),
    ("down_write_nested", take(RwsemWrite, Nothing)),
    ("down_write_killable", try_take(RwsemWrite, Nothing, Outcome::Zero)),
    ("down_write_trylock", try_take(RwsemWrite, Nothing, Outcome::NonZero)),
    ("up_write", give(RwsemWrite, Nothing)),
    ("down_read", take(RwsemRead, Nothing)),
    ("down_read_nested", take(RwsemRead, Nothing)),
    ("down_read_interruptible", try_take(RwsemRead, Nothing, Outcome::Zero)),
    ("down_read_killable", try_take(RwsemRead, Nothing, Outcome::Zero)),
    ("down_read_trylock", try_take(RwsemRead, Nothing, Outcome::NonZero)),
    ("up_read", give(RwsemRead, Nothing)),
    ("down", take(Semaphore, Nothing)),
    ("down_interruptible", try_take(Semaphore, Nothing, Outcome::Zero)),
    ("down_killable", try_take(Semaphore, Nothing, Outcome::Zero)),
    ("down_timeout", try_take(Semaphore, Nothing, Outcome::Zero)),
    // Unlike the other trylocks this one returns 0 when it got the semaphore.
    ("down_trylock", try_take(Semaphore, Nothing, Outcome::Zero)),
    ("up", give(Semaphore, Nothing)),
];

/// Spinning locks.
const SPINNING: &[(&str, Does)] = &[
    ("_raw_spin_lock", take(Spin, Nothing)),
    ("_raw_spin_lock_nested", take(Spin, Nothing)),
    ("_raw_spin_lock_bh", take(Spin, Bh)),
    ("_raw_spin_lock_irq", take(Spin, Irq)),
    ("_raw_spin_lock_irqsave", take(Spin, IrqSave)),
    ("_raw_spin_trylock", try_take(Spin, Nothing, Outcome::NonZero)),
    ("_raw_spin_trylock_bh", try_take(Spin, Bh, Outcome::NonZero)),
    ("_raw_spin_unlock", give(Spin, Nothing)),
    ("_raw_spin_unlock_bh", give(Spin, Bh)),
    ("_raw_spin_unlock_irq", give(Spin, Irq)),
    ("_raw_spin_unlock_irqrestore", give(Spin, IrqSave)),
    ("_raw_read_lock", take(ReadLock, Nothing)),
    ("_raw_read_lock_bh", take(ReadLock, Bh)),
    ("_raw_read_lock_irq", take(ReadLock, Irq)),
    ("_raw_read_lock_irqsave", take(ReadLock, IrqSave)),
    ("_raw_read_trylock", try_take(ReadLock, Nothing, Outcome::NonZero)),
    ("_raw_read_unlock", give(ReadLock, Nothing)),
    ("_raw_read_unlock_bh", give(ReadLock, Bh)),
    ("_raw_read_unlock_irq", give(ReadLock, Irq)),
    ("_raw_read_unlock_irqrestore", give(ReadLock, IrqSave)),
    ("_raw_write_lock", take(WriteLock, Nothing)),
    ("_raw_write_lock_bh", take(WriteLock, Bh)),
    ("_raw_write_lock_irq", take(WriteLock, Irq)),
    ("_raw_write_lock_irqsave", take(WriteLock, IrqSave)),
    ("_raw_write_trylock", try_take(WriteLock, Nothing, Outcome::NonZero)),
    ("_raw_write_unlock", give(WriteLock, Nothing)),
    ("_raw_write_unlock_bh", give(WriteLock, Bh)),
    ("_raw_write_unlock_irq", give(WriteLock, Irq)),
    ("_raw_write_unlock_irqrestore", give(WriteLock, IrqSave)),
];

/// Read-side sections and counters that are functions in some configurations.
const SECTIONS: &[(&str, Does)] = &[
    ("__rcu_read_lock", Does::Take(Effect::plain(Class::Rcu))),
    ("__rcu_read_unlock", Does::Give(Effect::plain(Class::Rcu))),
    ("__local_bh_disable_ip", Does::Take(Effect::preempt(SOFTIRQ_DISABLE))),
    ("__local_bh_enable_ip", Does::Give(Effect::preempt(SOFTIRQ_DISABLE))),
    // A reader of an SRCU domain left behind blocks synchronize_srcu() for good.
    ("__srcu_read_lock", Does::Take(Effect::plain(Class::Foreign))),
    ("__srcu_read_unlock", Does::Give(Effect::plain(Class::Foreign))),
];

/// Functions that return with a lock held for their caller, and their counterparts.
const WRAPPERS: &[(&str, Does)] = &[
    // unsigned long __fdget_pos(unsigned int): FDPUT_POS_UNLOCK (2) in the result says that it locked
    // f_pos_lock of the file that the other bits point to.
    (
        "__fdget_pos",
        Does::Take(Effect::lock(Mutex, Nothing).when(Outcome::Bits(2)).at(Lock::ResultMember(
            3,
            "file",
            "f_pos_lock",
        ))),
    ),
    // Since v6.12 `struct fd` is one word with the same bits ("struct fd: representation change"),
    // returned by fdget_pos().
    (
        "fdget_pos",
        Does::Take(Effect::lock(Mutex, Nothing).when(Outcome::Bits(2)).at(Lock::ResultMember(
            3,
            "file",
            "f_pos_lock",
        ))),
    ),
    (
        "__f_unlock_pos",
        Does::Give(Effect::lock(Mutex, Nothing).at(Lock::Member("file", "f_pos_lock"))),
    ),
    (
        "pipe_lock",
        Does::Take(Effect::lock(Mutex, Nothing).at(Lock::Member("pipe_inode_info", "mutex"))),
    ),
    (
        "pipe_unlock",
        Does::Give(Effect::lock(Mutex, Nothing).at(Lock::Member("pipe_inode_info", "mutex"))),
    ),
    ("rtnl_lock", Does::Take(Effect::lock(Mutex, Nothing).at(Lock::Symbol("rtnl_mutex")))),
    (
        "rtnl_trylock",
        Does::Take(
            Effect::lock(Mutex, Nothing).when(Outcome::NonZero).at(Lock::Symbol("rtnl_mutex")),
        ),
    ),
    ("rtnl_unlock", Does::Give(Effect::lock(Mutex, Nothing).at(Lock::Symbol("rtnl_mutex")))),
    // A socket is owned by sk_lock.owned with a wait queue, not by a lock word with an owner.
    ("lock_sock_nested", Does::Take(Effect::plain(Class::Foreign))),
    ("release_sock", Does::Give(Effect::plain(Class::Foreign))),
    // Page and buffer locks are bits of the object and may be given back by an interrupt.
    ("__folio_lock", Does::Take(Effect::plain(Class::Foreign))),
    ("folio_unlock", Does::Give(Effect::plain(Class::Foreign))),
    ("ww_mutex_lock", Does::Take(Effect::plain(Class::Foreign).when(Outcome::Zero))),
    ("ww_mutex_unlock", Does::Give(Effect::plain(Class::Foreign))),
    // PREEMPT_RT: these locks are rt_mutex based, whose owner word has other bits.
    ("rt_spin_lock", Does::Take(Effect::plain(Class::Foreign))),
    ("rt_spin_unlock", Does::Give(Effect::plain(Class::Foreign))),
    ("rt_mutex_lock", Does::Take(Effect::plain(Class::Foreign))),
    ("rt_mutex_unlock", Does::Give(Effect::plain(Class::Foreign))),
    ("rt_read_lock", Does::Take(Effect::plain(Class::Foreign))),
    ("rt_read_unlock", Does::Give(Effect::plain(Class::Foreign))),
    ("rt_write_lock", Does::Take(Effect::plain(Class::Foreign))),
    ("rt_write_unlock", Does::Give(Effect::plain(Class::Foreign))),
];

/// `__noreturn` functions that code calls: what follows such a call belongs to another path. A part of
/// the list that objtool keeps (tools/objtool/noreturns.h).
const NO_RETURN: &[&str] = &[
    "panic",
    "__stack_chk_fail",
    "do_exit",
    "do_group_exit",
    "do_task_dead",
    "make_task_dead",
    "rewind_stack_and_make_dead",
    "kthread_exit",
    "kthread_complete_and_exit",
    "__kthread_exit",
    "module_put_and_kthread_exit",
    "__module_put_and_kthread_exit",
    "fortify_panic",
    "__fortify_panic",
    "usercopy_abort",
    "__ubsan_handle_builtin_unreachable",
    "stop_this_cpu",
    "machine_real_restart",
    "x86_64_start_kernel",
    "cpu_startup_entry",
    "rest_init",
    "start_kernel",
    "sev_es_terminate",
    "snp_abort",
    "ex_handler_msr_mce",
];

/// The table, by address in one guest.
#[derive(Debug, Default)]
pub(crate) struct LockTable {
    by_address: HashMap<u64, Does>,
    /// Offset of the preempt count in the per-CPU area.
    pub(crate) preempt_count: Option<u64>,
}

impl LockTable {
    pub(crate) fn new(image: &RepairImage) -> Self {
        let mut by_address = HashMap::new();
        for list in [SLEEPING, SPINNING, SECTIONS, WRAPPERS] {
            for (name, does) in list {
                if let Some(at) = image.address_of(name) {
                    by_address.insert(at.0, *does);
                }
            }
        }
        for name in NO_RETURN {
            if let Some(at) = image.address_of(name) {
                by_address.insert(at.0, Does::NoReturn);
            }
        }
        Self { by_address, preempt_count: preempt_count_offset(image) }
    }

    pub(crate) fn call(&self, target: GuestVirt) -> Option<Does> {
        self.by_address.get(&target.0).copied()
    }
}

/// Per-CPU offset of the preempt count. A variable of its own; in `struct pcpu_hot` since commit
/// 64701838bf05 ("x86/percpu: Move preempt_count next to current_task", v6.2) until commit 46e8fff6d45f
/// ("x86/preempt: Move preempt count to percpu hot section", v6.15).
pub(crate) fn preempt_count_offset(image: &RepairImage) -> Option<u64> {
    image.per_cpu_offset("__preempt_count").or_else(|| {
        let member = image.types.member("pcpu_hot", "preempt_count")?;
        Some(image.per_cpu_offset("pcpu_hot")?.wrapping_add(member.offset))
    })
}
