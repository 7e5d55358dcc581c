//! What function names of the core kernel mean to a diagnosis: crash reporting, detectors, interrupt
//! entries, helpers. Names only, no addresses; valid for v6.1 to v6.12 unless a line says otherwise.

use repair_image::base_name;

use crate::{ExecutionContext, Frame};

/// Function of a frame without compiler suffixes, empty when not known.
pub(crate) fn function(frame: &Frame) -> &str {
    frame.function.as_deref().map(base_name).unwrap_or_default()
}

/// The function of a frame as people read it, `[module]` appended.
pub(crate) fn display(frame: &Frame) -> String {
    let function = match function(frame) {
        "" => format!("{:#x}", frame.pc.ip()),
        name => name.to_owned(),
    };
    match &frame.module {
        Some(module) => format!("{function} [{module}]"),
        None => function,
    }
}

/// Every function that executes in a frame: its own and those inlined at that place.
pub(crate) fn functions(frame: &Frame) -> impl Iterator<Item = &str> {
    let inlined = frame.source.iter().filter_map(|level| level.function.as_deref());
    inlined.chain([function(frame)])
}

/// Functions between a crash and the hook: exception handlers, oops and panic code.
const REPORTING: &[&str] = &[
    "panic",
    // Since v6.15 panic() is a wrapper.
    "vpanic",
    "nmi_panic",
    "check_panic_on_warn",
    "__warn",
    "__warn_printk",
    "warn_slowpath_fmt",
    "report_bug",
    "__report_bug",
    "handle_bug",
    "oops_begin",
    "oops_end",
    "die",
    "die_addr",
    "__die",
    "page_fault_oops",
    "pgtable_bad",
    "bad_area",
    "__bad_area",
    "bad_area_nosemaphore",
    "__bad_area_nosemaphore",
    "bad_area_access_error",
    "kernelmode_fixup_or_oops",
    "do_kern_addr_fault",
    "do_user_addr_fault",
    "handle_page_fault",
    "do_trap",
    "do_error_trap",
    "math_error",
    "gp_try_fixup_and_notify",
    "handle_stack_overflow",
    "make_task_dead",
    "rewind_stack_and_make_dead",
    "__stack_chk_fail",
    "mce_panic",
    "do_machine_check",
    // In dumps, and in guests that were stopped after the panic.
    "crash_kexec",
    "__crash_kexec",
    "machine_kexec",
    "crash_setup_regs",
];

/// Whether a frame belongs to the kernel's own reporting of a crash. The kernel proper only: a module
/// may have a function `die`.
pub(crate) fn is_reporting(frame: &Frame) -> bool {
    let name = function(frame);
    frame.module.is_none()
        && (REPORTING.contains(&name) || exception_of(frame).is_some() || name == "error_entry")
}

/// Whether a stop in or under this function means that the kernel has given up.
pub(crate) fn is_panic(frame: &Frame) -> bool {
    let names =
        ["panic", "vpanic", "oops_begin", "oops_end", "handle_stack_overflow", "crash_kexec"];
    frame.module.is_none() && names.contains(&function(frame))
}

/// The exception handler (`exc_page_fault`) that a frame is or enters.
pub(crate) fn exception_of(frame: &Frame) -> Option<&str> {
    let name = function(frame);
    let name = name.strip_prefix("asm_").unwrap_or(name);
    (frame.module.is_none() && name.starts_with("exc_")).then_some(name)
}

/// Context that the entry in this frame starts, for entries that interrupt whatever runs.
pub(crate) fn entered_by_interrupt(frame: &Frame) -> Option<ExecutionContext> {
    if frame.module.is_some() {
        return None;
    }
    let name = function(frame);
    if name.starts_with("asm_sysvec_") || name.starts_with("asm_common_interrupt") {
        return Some(ExecutionContext::Hardirq);
    }
    // asm_spurious_interrupt_bug is an exception, asm_spurious_interrupt is not.
    match name {
        "asm_spurious_interrupt" => Some(ExecutionContext::Hardirq),
        "asm_exc_nmi" | "asm_exc_machine_check" | "end_repeat_nmi" => Some(ExecutionContext::Nmi),
        _ => None,
    }
}

/// Whether a frame runs soft interrupts. Stable kernels of 2024 and v6.11 moved the loop to
/// `handle_softirqs()`, called by `__do_softirq()` and ksoftirqd.
pub(crate) fn runs_softirqs(frame: &Frame) -> bool {
    frame.module.is_none() && ["handle_softirqs", "__do_softirq"].contains(&function(frame))
}

/// A watcher of the kernel that panics about somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detector {
    SoftLockup,
    HardLockup,
    HungTask,
    RcuStall,
}

const DETECTORS: &[(&str, Detector)] = &[
    ("watchdog_overflow_callback", Detector::HardLockup),
    // Since v6.5; with the buddy detector it is called for another CPU.
    ("watchdog_hardlockup_check", Detector::HardLockup),
    ("watchdog_timer_fn", Detector::SoftLockup),
    ("check_hung_uninterruptible_tasks", Detector::HungTask),
    // kernel/hung_task.c: the thread function, into which the check is inlined.
    ("watchdog", Detector::HungTask),
    ("panic_on_rcu_stall", Detector::RcuStall),
    ("print_cpu_stall", Detector::RcuStall),
    ("print_other_cpu_stall", Detector::RcuStall),
    ("check_cpu_stall", Detector::RcuStall),
    ("rcu_sched_clock_irq", Detector::RcuStall),
];

/// The detector that a frame belongs to.
pub(crate) fn detector(frame: &Frame) -> Option<Detector> {
    if frame.module.is_some() {
        return None;
    }
    // The innermost names first: watchdog_hardlockup_check() may be inlined into watchdog_timer_fn().
    functions(frame).find_map(|name| {
        DETECTORS.iter().find(|(known, _)| *known == name).map(|(_, detector)| *detector)
    })
}

/// Why a core-kernel function is not at fault when it crashes, but whoever called it.
pub(crate) fn helper_reason(frame: &Frame) -> Option<&'static str> {
    if frame.module.is_some() {
        return None;
    }
    by_function(function(frame)).or_else(|| {
        let outermost = frame.source.last()?;
        by_file(&outermost.file)
    })
}

const PREFIXES: &[(&str, &str)] = &[
    ("__x86_indirect_", "an indirect call's thunk"),
    ("__x86_return_", "a return thunk"),
    ("__memcpy", "it copies what it is given"),
    ("memcpy", "it copies what it is given"),
    ("__memmove", "it copies what it is given"),
    ("memmove", "it copies what it is given"),
    ("__memset", "it fills what it is given"),
    ("memset", "it fills what it is given"),
    ("memcmp", "it reads what it is given"),
    ("memchr", "it reads what it is given"),
    ("memscan", "it reads what it is given"),
    ("str", "it reads the strings it is given"),
    ("kstrto", "it reads the strings it is given"),
    ("kstrdup", "it reads the strings it is given"),
    ("kmemdup", "it copies what it is given"),
    ("sscanf", "it reads the strings it is given"),
    ("vsscanf", "it reads the strings it is given"),
    ("vsnprintf", "it formats what it is given"),
    ("__list_", "it checks the list it is given"),
    ("rb_", "it changes the tree it is given"),
    ("__rb_", "it changes the tree it is given"),
    ("kfree", "it frees what it is given"),
    ("__kfree", "it frees what it is given"),
    ("kvfree", "it frees what it is given"),
    ("vfree", "it frees what it is given"),
    ("kmem_cache_", "it works on the cache or object it is given"),
    ("__kmem_cache_", "it works on the cache or object it is given"),
    ("__kmalloc", "it hands out what a free list holds"),
    ("kmalloc", "it hands out what a free list holds"),
    ("__slab_", "it works on the object it is given"),
    ("copy_user_", "it copies what it is given"),
    ("rep_movs_", "it copies what it is given"),
    ("_copy_", "it copies what it is given"),
    ("__copy_", "it copies what it is given"),
    ("__check_object_size", "it checks what it is given"),
    ("__check_heap_object", "it checks what it is given"),
    ("usercopy_abort", "it reports a check"),
    ("fortify_", "it reports a check"),
    ("__fortify_", "it reports a check"),
    ("refcount_", "it counts what it is given"),
    ("kref_", "it counts what it is given"),
    ("mutex_", "it locks what it is given"),
    ("__mutex_", "it locks what it is given"),
    ("down_", "it locks what it is given"),
    ("__down", "it locks what it is given"),
    ("up_", "it unlocks what it is given"),
    ("rwsem_", "it locks what it is given"),
    ("_raw_", "it locks what it is given"),
    ("native_queued_", "it locks what it is given"),
    ("queued_", "it locks what it is given"),
    ("__wake_up", "it wakes whom it is given"),
    ("wake_up_", "it wakes whom it is given"),
    ("try_to_wake_up", "it wakes whom it is given"),
    ("complete", "it wakes whom it is given"),
    ("queue_work", "it queues what it is given"),
    ("__queue_work", "it queues what it is given"),
    ("queue_delayed_work", "it queues what it is given"),
    ("mod_timer", "it starts what it is given"),
    ("add_timer", "it starts what it is given"),
    ("del_timer", "it stops what it is given"),
    ("__mod_timer", "it starts what it is given"),
    ("hrtimer_start", "it starts what it is given"),
    ("kobject_", "it works on the object it is given"),
    ("get_device", "it works on the device it is given"),
    ("put_device", "it works on the device it is given"),
    ("dev_err", "it prints what it is given"),
    ("_dev_", "it prints what it is given"),
    ("_printk", "it prints what it is given"),
    ("idr_", "it works on the structure it is given"),
    ("xa_", "it works on the structure it is given"),
    ("xas_", "it works on the structure it is given"),
    ("radix_tree_", "it works on the structure it is given"),
    ("bitmap_", "it works on the bits it is given"),
    ("__bitmap_", "it works on the bits it is given"),
    ("_find_", "it works on the bits it is given"),
    ("csum_", "it reads what it is given"),
    ("ioread", "it reads the register it is given"),
    ("iowrite", "it writes the register it is given"),
];

fn by_function(name: &str) -> Option<&'static str> {
    PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix)).map(|(_, reason)| *reason)
}

const FILES: &[(&str, &str)] = &[
    ("lib/", "library code works on what it is given"),
    ("arch/x86/lib/", "library code works on what it is given"),
    ("mm/slab", "the allocator works on what it is given"),
    ("mm/slub.c", "the allocator works on what it is given"),
    ("mm/util.c", "library code works on what it is given"),
    ("mm/usercopy.c", "it checks what it is given"),
    ("mm/maccess.c", "it copies what it is given"),
    ("mm/mempool.c", "the allocator works on what it is given"),
    ("mm/dmapool.c", "the allocator works on what it is given"),
    ("kernel/locking/", "locking code works on the lock it is given"),
    ("kernel/sched/wait", "it wakes whom it is given"),
    ("kernel/sched/swait.c", "it wakes whom it is given"),
    ("kernel/sched/completion.c", "it wakes whom it is given"),
];

fn by_file(path: &str) -> Option<&'static str> {
    let path = path.trim_start_matches("./");
    FILES.iter().find(|(prefix, _)| path.starts_with(prefix)).map(|(_, reason)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::frame;

    #[test]
    fn reporting_frames_are_of_the_kernel_proper() {
        assert!(is_reporting(&frame("die", None)));
        assert!(is_reporting(&frame("asm_exc_page_fault", None)));
        assert!(!is_reporting(&frame("die", Some("m"))));
        assert!(!is_reporting(&frame("vfs_write", None)));
    }

    #[test]
    fn suffixes_do_not_hide_a_detector() {
        assert_eq!(detector(&frame("watchdog_timer_fn.cold", None)), Some(Detector::SoftLockup));
        assert_eq!(detector(&frame("watchdog_timer_fn", Some("m"))), None);
    }

    #[test]
    fn helpers_by_name_and_by_file() {
        assert!(helper_reason(&frame("__memcpy", None)).is_some());
        assert!(helper_reason(&frame("strlen", None)).is_some());
        assert!(helper_reason(&frame("vfs_write", None)).is_none());
        let mut in_lib = frame("iov_iter_advance", None);
        assert!(helper_reason(&in_lib).is_none());
        in_lib.source = vec![crate::testing::level("iov_iter_advance", "lib/iov_iter.c", 1)];
        assert!(helper_reason(&in_lib).is_some());
        in_lib.module = Some("m".to_owned());
        assert!(helper_reason(&in_lib).is_none());
    }
}
