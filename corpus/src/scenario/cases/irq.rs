//! crash_irq: a device that interrupts.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::Hardirq;
use crate::scenario::Resource::Spinlock;
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
];
