//! crash_irq: a device that interrupts.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::{Hardirq, KernelThread};
use crate::scenario::Resource::{Mutex, Spinlock};
use crate::scenario::Sight;

const IRQ: &str = "crash_irq";

pub(super) const CASES: &[Case] = &[
    Case::new("msi", IRQ, NullDereference, &[])
        .by("idle", "irq")
        .within(Hardirq)
        .sees(Sight::Returned),
    Case::new("msi-spinlock", IRQ, NullDereference, &[Spinlock])
        .by("busy", "irq-spinlock")
        .within(Hardirq)
        .sees(Sight::Returned),
    Case::new("intx-spinlock", IRQ, NullDereference, &[Spinlock])
        .with_parameters("msi=0")
        .by("busy", "irq-spinlock")
        .within(Hardirq)
        .sees(Sight::Returned),
    // In the interrupt's thread. The line is masked until the thread is done, and must not stay so.
    Case::new("msi-thread", IRQ, NullDereference, &[Mutex])
        .with_parameters("threaded=1")
        .by("busy", "irq-thread")
        .within(KernelThread)
        .sees(Sight::Returned),
    Case::new("intx-thread", IRQ, NullDereference, &[Mutex])
        .with_parameters("msi=0 threaded=1")
        .by("busy", "irq-thread")
        .within(KernelThread)
        .sees(Sight::Returned),
    // The line stays raised, so the handler faults again at once, until the driver is quarantined.
    Case::new("intx-storm", IRQ, NullDereference, &[])
        .with_parameters("msi=0")
        .by("busy", "irq-storm")
        .within(Hardirq)
        .sees(Sight::Returned)
        .quarantines(),
];
