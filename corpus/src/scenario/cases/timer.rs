//! crash_timer: timers and tasklets, which interrupt somebody.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::{Hardirq, Softirq};
use crate::scenario::Resource::Spinlock;
use crate::scenario::Sight;

const TIMER: &str = "crash_timer";

pub(super) const CASES: &[Case] = &[
    // Interrupt contexts: nobody is told, and whoever was interrupted must not notice.
    Case::new("timer-busy", TIMER, NullDereference, &[])
        .by("busy", "timer")
        .within(Softirq)
        .sees(Sight::Returned),
    Case::new("timer-idle", TIMER, NullDereference, &[])
        .by("idle", "timer")
        .within(Softirq)
        .sees(Sight::Returned),
    Case::new("timer-spinlock", TIMER, NullDereference, &[Spinlock])
        .by("idle", "timer-spinlock")
        .within(Softirq)
        .sees(Sight::Returned),
    Case::new("hrtimer-busy", TIMER, NullDereference, &[])
        .by("busy", "hrtimer")
        .within(Hardirq)
        .sees(Sight::Returned),
    Case::new("hrtimer-idle", TIMER, NullDereference, &[])
        .by("idle", "hrtimer")
        .within(Hardirq)
        .sees(Sight::Returned),
    Case::new("hrtimer-spinlock", TIMER, NullDereference, &[Spinlock])
        .by("busy", "hrtimer-spinlock")
        .within(Hardirq)
        .sees(Sight::Returned),
    Case::new("tasklet", TIMER, NullDereference, &[])
        .by("idle", "tasklet")
        .within(Softirq)
        .sees(Sight::Returned),
];
