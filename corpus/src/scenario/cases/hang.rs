//! crash_hang: nothing faults, but a processor makes no progress any more.

use crate::scenario::Case;
use crate::scenario::Class::{
    EndlessLoop, EndlessLoopIrqsOff, LockCycle, LockSelfDeadlock, SpinlockCycle,
    SpinlockSelfDeadlock,
};
use crate::scenario::Context::{KernelThread, Softirq};
use crate::scenario::Resource::{
    IrqsOff, Mutex, PreemptionOff, Rcu, RwsemRead, RwsemWrite, Spinlock, SpinlockIrqsave,
};
use crate::scenario::Sight;

const HANG: &str = "crash_hang";

pub(super) const CASES: &[Case] = &[
    // A processor that does not leave the driver.
    Case::new("loop", HANG, EndlessLoop, &[]),
    Case::new("loop-irqs-off", HANG, EndlessLoopIrqsOff, &[IrqsOff]),
    Case::new("loop-timer", HANG, EndlessLoop, &[])
        .by("idle", "loop-timer")
        .within(Softirq)
        .sees(Sight::Returned),
    Case::new("loop-timer-busy", HANG, EndlessLoop, &[])
        .by("busy", "loop-timer")
        .within(Softirq)
        .sees(Sight::Returned),
    Case::new("loop-kthread", HANG, EndlessLoop, &[])
        .by("idle", "loop-kthread")
        .within(KernelThread)
        .sees(Sight::Returned),
    Case::new("loop-spinlock-waited", HANG, EndlessLoop, &[Spinlock])
        .by("pair", "loop-spinlock,wait-spinlock")
        .waited_for(),
    Case::new("loop-mutex-waited", HANG, EndlessLoop, &[Mutex])
        .by("pair", "loop-mutex,wait-mutex")
        .waited_for(),
    // What stock kernels tell as an RCU stall.
    Case::new("loop-rcu", HANG, EndlessLoop, &[Rcu]),
    Case::new("loop-rcu-preempt-off", HANG, EndlessLoop, &[Rcu, PreemptionOff]),
    // A processor that waits for itself, or two for each other. The lock that is waited for counts as taken once;
    // on the way to it, preemption (and interrupts) went off already.
    Case::new("spinlock-twice", HANG, SpinlockSelfDeadlock, &[Spinlock, PreemptionOff]),
    Case::new(
        "irqsave-twice",
        HANG,
        SpinlockSelfDeadlock,
        &[SpinlockIrqsave, PreemptionOff, IrqsOff],
    ),
    Case::new("spinlock-abba", HANG, SpinlockCycle, &[Spinlock, PreemptionOff])
        .by("pair", "spinlock-abba,spinlock-baab")
        .waited_for()
        .either_way(),
    // The same with locks that are slept for: no processor is kept busy.
    Case::new("mutex-twice", HANG, LockSelfDeadlock, &[Mutex]),
    Case::new("mutex-abba", HANG, LockCycle, &[Mutex])
        .by("pair", "mutex-abba,mutex-baab")
        .waited_for(),
    Case::new("rwsem-twice", HANG, LockSelfDeadlock, &[RwsemWrite]),
    Case::new("rwsem-write-read", HANG, LockSelfDeadlock, &[RwsemWrite]),
    Case::new("rwsem-read-write", HANG, LockSelfDeadlock, &[RwsemRead]),
    Case::new("rwsem-abba", HANG, LockCycle, &[RwsemWrite])
        .by("pair", "rwsem-abba,rwsem-baab")
        .waited_for(),
];
