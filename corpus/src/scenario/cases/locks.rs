//! crash_locks: faults with locks held, and within sections.

use crate::scenario::Case;
use crate::scenario::Class::{Bug, NullDereference};
use crate::scenario::Resource::{
    BhOff, IrqsOff, Mutex, PreemptionOff, Rcu, ReadLock, RwsemRead, RwsemWrite, Spinlock,
    SpinlockBh, SpinlockIrq, SpinlockIrqsave, WriteLock,
};

const LOCKS: &str = "crash_locks";

pub(super) const CASES: &[Case] = &[
    // Every kind of lock and section.
    Case::new("mutex", LOCKS, NullDereference, &[Mutex]),
    Case::new("slab-mutex", LOCKS, NullDereference, &[Mutex]),
    Case::new("rwsem-read", LOCKS, NullDereference, &[RwsemRead]),
    Case::new("rwsem-write", LOCKS, NullDereference, &[RwsemWrite]),
    Case::new("spinlock", LOCKS, NullDereference, &[Spinlock]),
    Case::new("spinlock-irqsave", LOCKS, NullDereference, &[SpinlockIrqsave]),
    Case::new("spinlock-irq", LOCKS, NullDereference, &[SpinlockIrq]),
    Case::new("spinlock-bh", LOCKS, NullDereference, &[SpinlockBh]),
    Case::new("read-lock", LOCKS, NullDereference, &[ReadLock]),
    Case::new("write-lock", LOCKS, NullDereference, &[WriteLock]),
    Case::new("three-locks", LOCKS, Bug, &[Mutex, SpinlockIrqsave, SpinlockIrqsave]),
    Case::new("rcu", LOCKS, NullDereference, &[Rcu]),
    Case::new("irqs-off", LOCKS, NullDereference, &[IrqsOff]),
    Case::new("bh-off", LOCKS, NullDereference, &[BhOff]),
    Case::new("preemption-off", LOCKS, NullDereference, &[PreemptionOff]),
    Case::new("deep", LOCKS, NullDereference, &[Mutex, RwsemRead, SpinlockIrqsave, Rcu]),
    Case::new("mutex-waited", LOCKS, NullDereference, &[Mutex])
        .by("pair", "mutex-waited,wait-mutex")
        .waited_for(),
    Case::new("spinlock-waited", LOCKS, NullDereference, &[Spinlock])
        .by("pair", "spinlock-waited,wait-spinlock")
        .waited_for(),
];
