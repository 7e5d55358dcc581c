//! crash_text: a driver that damages text, read-only data and the IDT, of itself and of the core kernel.

use crate::scenario::Class::{IdtCorruption, NullDereference, RodataCorruption, TextCorruption};
use crate::scenario::Sight::{Errno, Value};
use crate::scenario::{Case, Class};

const TEXT: &str = "crash_text";

/// A case in which nobody notices anything: what was damaged is put back, and the fault retried.
const fn retried(name: &'static str, class: Class, returns: i64) -> Case {
    Case::new(name, TEXT, class, &[]).sees(Value(returns)).repairs_kernel()
}

pub(super) const CASES: &[Case] = &[
    // The driver's own text.
    retried("opcode", TextCorruption, 6),
    retried("operand-bit", TextCorruption, 11),
    // The damaged instruction had been executed when its result faulted: only the call is lost.
    Case::new("earlier-instruction", TEXT, TextCorruption, &[]).sees(Errno("EIO")).repairs_kernel(),
    // A zeroed pointer in the driver's const table, an unmapped gate.
    retried("ops-table", RodataCorruption, 9),
    retried("idt-gate", IdtCorruption, 8),
    // The core kernel's.
    retried("system-call", TextCorruption, 0)
        .by("getpriority", "system-call")
        .in_core("__x64_sys_getpriority"),
    retried("core-table", RodataCorruption, 8).by("eventfd", "core-table").in_core("vfs_write"),
    // Text that the kernel changed itself is no damage: an ordinary crash beside it.
    Case::new("static-key", TEXT, NullDereference, &[]),
];
