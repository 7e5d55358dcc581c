//! crash_work: work items and kernel threads.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::{KernelThread, Work};
use crate::scenario::Resource::Mutex;
use crate::scenario::Sight;

const WORK: &str = "crash_work";

pub(super) const CASES: &[Case] = &[
    // Kernel threads.
    Case::new("work", WORK, NullDereference, &[])
        .by("idle", "work")
        .within(Work)
        .sees(Sight::Returned),
    Case::new("work-mutex", WORK, NullDereference, &[Mutex])
        .by("idle", "work-mutex")
        .within(Work)
        .sees(Sight::Returned),
    Case::new("kthread", WORK, NullDereference, &[])
        .by("idle", "kthread")
        .within(KernelThread)
        .sees(Sight::Returned),
    Case::new("kthread-mutex", WORK, NullDereference, &[Mutex])
        .by("idle", "kthread-mutex")
        .within(KernelThread)
        .sees(Sight::Returned),
];
