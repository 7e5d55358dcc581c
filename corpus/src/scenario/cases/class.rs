//! crash_class: faults that the kernel's own checks find, and jumps to what is no code.

use crate::scenario::Case;
use crate::scenario::Class::{
    Bug, Divide, DoubleFree, Fortify, GeneralProtection, InvalidOpcode, ListCorruption, NullCall,
    Panic, StackProtector, UserAccess, Usercopy, Warning,
};
use crate::scenario::Resource::{self, IrqsOff, Mutex, PreemptionOff, Spinlock};
use crate::scenario::Sight;

const CLASS: &str = "crash_class";
/// What a fault holds that lets nothing else run before it.
const ALONE: &[Resource] = &[PreemptionOff, IrqsOff];

pub(super) const CASES: &[Case] = &[
    // The allocator's, the lists' and the string functions' own checks.
    Case::new("double-free", CLASS, DoubleFree, &[]),
    Case::new("use-after-free", CLASS, GeneralProtection, &[]),
    Case::new("list-add", CLASS, ListCorruption, &[]),
    Case::new("list-del-twice", CLASS, ListCorruption, &[]),
    Case::new("usercopy-write", CLASS, Usercopy, &[]),
    Case::new("fortify", CLASS, Fortify, &[]),
    Case::new("stack-canary", CLASS, StackProtector, &[]),
    // Broken by the driver before it faults: put back, or too much to go on.
    Case::new("stack-end", CLASS, Bug, &[]),
    Case::new("task-list", CLASS, Bug, ALONE).refused_for("a link of the task list is broken"),
    Case::new("run-queue", CLASS, Bug, ALONE).refused_for("a node of the run queue is broken"),
    Case::new("page-table", CLASS, Bug, ALONE).refused_for("an entry of the page tables is broken"),
    Case::new("core-list", CLASS, ListCorruption, ALONE)
        .refused_for("a list outside the driver is broken"),
    Case::new("free-list", CLASS, Bug, &[])
        .refused_for("a list of free crash_samples objects is broken"),
    // Jumps to what is no code.
    Case::new("call-data", CLASS, NullCall, &[]),
    Case::new("call-user", CLASS, UserAccess, &[]),
    Case::new("call-noncanonical", CLASS, GeneralProtection, &[]),
    // Instructions that the processor refuses.
    Case::new("divide-overflow", CLASS, Divide, &[]),
    Case::new("invalid-opcode", CLASS, InvalidOpcode, &[]),
    // Checks of a driver's own, with a lock held.
    Case::new("bug-atomic", CLASS, Bug, &[Spinlock]),
    Case::new("panic-locked", CLASS, Panic, &[Mutex]),
    // A warning is only fatal because the guest was told so.
    Case::new("warn", CLASS, Warning, &[Mutex]).by("warn", "warn").sees(Sight::Value(4)),
    Case::new("refcount", CLASS, Warning, &[]).by("warn", "refcount").sees(Sight::Value(8)),
];
