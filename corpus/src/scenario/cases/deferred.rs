//! crash_async: callbacks that the core calls later, or in passing.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::{Hardirq, KernelThread, Softirq, Work};
use crate::scenario::Sight;

const ASYNC: &str = "crash_async";

/// A callback in the writing process's own call, which comes back as if nothing had been.
const fn called(name: &'static str) -> Case {
    Case::new(name, ASYNC, NullDereference, &[]).sees(Sight::Returned)
}

/// A callback that comes while the processor has nothing to do.
const fn later(name: &'static str) -> Case {
    called(name).by("idle", name)
}

/// A callback while somebody else is at work, who must not notice.
const fn amid(name: &'static str) -> Case {
    called(name).by("busy", name)
}

/// A callback that one of the core's own operations makes.
const fn on(name: &'static str, operation: &'static str) -> Case {
    called(name).by(operation, name)
}

pub(super) const CASES: &[Case] = &[
    called("notifier-blocking"),
    called("notifier-atomic"),
    called("notifier-srcu"),
    called("wait-function"),
    // The probed call itself must not notice either.
    on("kprobe", "fsync:/data").sees(Sight::Value(0)),
    on("tracepoint", "rename:/data").sees(Sight::Value(0)),
    later("call-rcu").within(Softirq),
    later("call-srcu").within(Work),
    later("delayed-work").within(Work),
    later("work-unbound").within(Work),
    later("work-ordered").within(Work),
    later("work-requeue").within(Work),
    later("async").within(Work),
    later("kthread-worker").within(KernelThread),
    later("smpboot").within(KernelThread),
    amid("irq-work").within(Hardirq),
    amid("ipi").within(Hardirq),
    called("ipi-self"),
    amid("ipi-many").within(Hardirq),
    later("hrtimer-soft").within(Softirq),
    amid("timer-irqsafe").within(Softirq),
    on("shrinker-count", "sh:echo+2+>/proc/sys/vm/drop_caches").sees(Sight::Value(0)),
    on("shrinker-scan", "sh:echo+2+>/proc/sys/vm/drop_caches").sees(Sight::Value(0)),
];
