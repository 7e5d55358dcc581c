//! How the guard's events name what cases expect: classes, contexts, held resources, rungs.

use serde_json::Value;

use crate::scenario::{Class, Context, Resource, Rung};

/// A string in an event; empty when it is not there.
pub(crate) fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The kinds of the held resources listed at `pointer`, sorted. What functions of the kernel further in than the
/// place of the fault added by themselves is no part of a case: it differs by version.
pub(crate) fn held(diagnosis: &Value, pointer: &str) -> String {
    let list = diagnosis.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64);
    let fault = number(diagnosis, "fault_frame").unwrap_or(0);
    let own = list.iter().filter(|held| number(held, "frame").is_none_or(|frame| frame >= fault));
    let mut kinds: Vec<String> = own.map(|held| text(held, "/kind")).collect();
    kinds.sort();
    kinds.join(" ")
}

/// Those of `held` that are in `expected`, each as often as there at most.
pub(crate) fn common(held: &str, expected: &str) -> String {
    let mut left: Vec<&str> = expected.split_whitespace().collect();
    let both = held.split_whitespace().filter(|kind| {
        let place = left.iter().position(|other| other == kind);
        place.map(|place| left.swap_remove(place)).is_some()
    });
    both.collect::<Vec<_>>().join(" ")
}

/// The same of the resources that a case expects.
pub(crate) fn resources(held: &[Resource]) -> String {
    let mut kinds: Vec<&str> = held.iter().map(|&held| resource(held)).collect();
    kinds.sort_unstable();
    kinds.join(" ")
}

/// A class.
pub(crate) fn class(class: Class) -> &'static str {
    match class {
        Class::NullDereference => "null_dereference",
        Class::WildDereference => "wild_pointer",
        Class::GeneralProtection => "general_protection",
        Class::NullCall => "bad_call",
        Class::Bug => "bug",
        Class::ListCorruption => "list_corruption",
        Class::Usercopy => "usercopy",
        Class::Divide => "divide",
        Class::StackOverflow => "stack_overflow",
        Class::Panic => "panic",
        Class::EndlessLoop => "endless_loop",
        Class::EndlessLoopIrqsOff => "endless_loop_irqs_off",
        Class::SpinlockSelfDeadlock => "spinlock_self_deadlock",
        Class::SpinlockCycle => "spinlock_cycle",
        Class::LockSelfDeadlock => "lock_self_deadlock",
        Class::LockCycle => "lock_cycle",
        Class::FaultLoop => "fault_loop",
        Class::DoubleFree => "double_free",
        Class::Fortify => "fortify",
        Class::StackProtector => "stack_protector",
        Class::UserAccess => "user_access",
        Class::InvalidOpcode => "invalid_opcode",
        Class::Warning => "warning",
        Class::TextCorruption => "text_corruption",
        Class::RodataCorruption => "read_only_data_corruption",
        Class::IdtCorruption => "idt_corruption",
    }
}

/// A context.
pub(crate) fn context(context: Context) -> &'static str {
    match context {
        Context::Task | Context::KernelThread | Context::Work => "task",
        Context::Softirq => "softirq",
        Context::Hardirq => "hardirq",
    }
}

fn resource(resource: Resource) -> &'static str {
    match resource {
        Resource::Mutex => "mutex",
        Resource::RwsemRead => "rwsem_read",
        Resource::RwsemWrite => "rwsem_write",
        Resource::Spinlock => "spinlock",
        Resource::SpinlockIrqsave => "spinlock_irqsave",
        Resource::SpinlockIrq => "spinlock_irq",
        Resource::SpinlockBh => "spinlock_bh",
        Resource::ReadLock => "read_lock",
        Resource::WriteLock => "write_lock",
        Resource::Rcu => "rcu",
        Resource::IrqsOff => "interrupts",
        Resource::BhOff => "bottom_halves",
        Resource::PreemptionOff => "preemption",
    }
}

/// A rung.
pub(crate) fn rung(rung: Rung) -> u64 {
    match rung {
        Rung::ReturnError => 1,
        Rung::EndProcess => 3,
        Rung::RepairKernel => 4,
    }
}
