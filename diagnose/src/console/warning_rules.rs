//! The kinds of report whose line has `WARNING:`, `INFO:` or `Kernel panic`. Those with `BUG:` are in
//! `bug_rules.rs`.

use super::rule::{BASE, Pick, Place, Rule, Word, bare, lock, lost, trace, warning};
use super::skip::Name;
use super::skip::Name::Has;
use crate::CrashClass;

const ACQUIRE: &[&str] = &["is trying to acquire lock"];
const DEADLOCK: &str = "possible deadlock in {f}";
const USB: &[Name] = &[
    Has("usb_submit_urb"),
    Has("usb_start_wait_urb"),
    Has("usb_bulk_msg"),
    Has("usb_interrupt_msg"),
    Has("usb_control_msg"),
];

pub(super) const WARNING: &[Rule] = &[
    warning(
        &["WARNING: ", "lib/debugobjects.c", "debug_print"],
        "WARNING: ODEBUG bug in {f}",
        ODEBUG,
    ),
    warning(&["WARNING: ", "lib/debugobjects.c", " at"], "WARNING: ODEBUG bug in {f}", ODEBUG),
    warning(
        &["WARNING: ", "mm/usercopy.c", " "],
        "WARNING: bad usercopy in {f}",
        &[Has("usercopy"), Has("__check")],
    ),
    warning(
        &["WARNING: ", "lib/kobject.c", " "],
        "WARNING: kobject bug in {f}",
        &[Has("kobject_")],
    ),
    warning(
        &["WARNING: ", "fs/proc/generic.c", "proc_register"],
        "WARNING: proc registration bug in {f}",
        &[Has("proc_")],
    ),
    warning(
        &["WARNING: ", "lib/refcount.c", " "],
        "WARNING: refcount bug in {f}",
        &[Has("refcount"), Has("kobject_")],
    ),
    warning(
        &["WARNING: ", "kernel/locking/lockdep.c", "lock_"],
        "WARNING: locking bug in {f}",
        &[Has("lock_sock"), Has("release_sock")],
    ),
    lock(&["WARNING: ", "still has locks held!"], "WARNING: still has locks held in {f}", &[""]),
    warning(
        &["WARNING: Nested lock was not taken"],
        "WARNING: nested lock was not taken in {f}",
        &[],
    ),
    Rule {
        stack: false,
        ..lock(
            &["WARNING: lock held when returning to user space"],
            "WARNING: lock held when returning to user space in {f}",
            &["leaving the kernel with locks still held"],
        )
    },
    warning(
        &["WARNING: ", "mm/vmalloc.c", "__vmalloc_node"],
        "WARNING: zero-size vmalloc in {f}",
        &[],
    ),
    warning(&["WARNING: ", "mm/", ".c", " kmalloc"], KMALLOC, ALLOCATORS),
    warning(&["WARNING: ", "mm/", ".c", " kvmalloc"], KMALLOC, ALLOCATORS),
    warning(&["WARNING: ", "mm/", ".c", " vmalloc"], KMALLOC, ALLOCATORS),
    warning(&["WARNING: ", " usb_submit_urb"], "WARNING in {f}/usb_submit_urb", USB),
    Rule {
        place: Place::Lock(ACQUIRE),
        ..trace(
            &["WARNING: possible circular locking dependency detected"],
            DEADLOCK,
            &[
                Has("process_one_work"),
                Has("flush_workqueue"),
                Has("drain_workqueue"),
                Has("destroy_workqueue"),
            ],
        )
    },
    lock(
        &["WARNING: possible irq lock inversion dependency detected"],
        DEADLOCK,
        &["just changed the state of lock"],
    ),
    Rule {
        place: Place::After(&["which became ", " at:"]),
        ..trace(&["WARNING: ", "-safe -> ", "-unsafe lock order detected"], DEADLOCK, &[])
    },
    lock(&["WARNING: possible recursive locking detected"], DEADLOCK, ACQUIRE),
    trace(&["WARNING: inconsistent lock state"], "inconsistent lock state in {f}", &[]),
    trace(
        &["WARNING: suspicious RCU usage"],
        "WARNING: suspicious RCU usage in {f}",
        &[Has("rcu"), Has("kmem"), Has("slab")],
    ),
    Rule {
        word: Word::Between("has bad '", "' value"),
        ..bare(
            &["WARNING: kernel stack regs at ", "has bad '", "' value"],
            "WARNING: kernel stack regs has bad '{1}' value",
        )
    },
    bare(
        &["WARNING: kernel stack frame pointer at ", "has bad value"],
        "WARNING: kernel stack frame pointer has bad value",
    ),
    Rule {
        place: Place::FirstAddress,
        ..trace(
            &["WARNING: bad unlock balance detected!"],
            "WARNING: bad unlock balance in {f}",
            &[],
        )
    },
    lock(&["WARNING: held lock freed!"], "WARNING: held lock freed in {f}", &[""]),
    // Last: `WARNING: CPU: 0 PID: 1 at f.c:2 g+0x1/0x2`, and since v6.19 `WARNING: f.c:2 at g+0x1/0x2, CPU#0`.
    warning(&["WARNING: ", " at ", "+0x"], "WARNING in {f}", &[]),
    warning(&["WARNING: ", " at 0x", "CPU#"], "WARNING in {f}", &[]),
];

const KMALLOC: &str = "WARNING: kmalloc bug in {f}";
const ALLOCATORS: &[Name] = &[Has("kmalloc"), Has("krealloc"), Has("slab"), Has("kmem")];
const ODEBUG: &[Name] = &[
    Has("debug_"),
    Has("rcu"),
    Has("hrtimer_"),
    Has("timer_"),
    Has("work_"),
    Has("percpu_"),
    Has("vunmap"),
    Has("vfree"),
    Has("__free_"),
    Has("kobject_"),
];

pub(super) const INFO: &[Rule] = &[
    // Before v4.11 lockdep said INFO.
    lock(&["INFO: possible circular locking dependency detected"], DEADLOCK, ACQUIRE),
    lock(
        &["INFO: possible irq lock inversion dependency detected"],
        DEADLOCK,
        &["just changed the state of lock"],
    ),
    lock(
        &["INFO: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected"],
        DEADLOCK,
        &["is trying to acquire"],
    ),
    lock(&["INFO: possible recursive locking detected"], DEADLOCK, ACQUIRE),
    lock(&["INFO: inconsistent lock state"], "inconsistent lock state in {f}", &["takes"]),
    Rule {
        words: &["INFO: rcu_", "detected", "stall"],
        title: "INFO: rcu detected stall in {f}",
        place: Place::Interrupted,
        skip: &[Has("apic_timer_interrupt"), Has("rcu")],
        pick: Pick::Stall,
        class: || Some(CrashClass::RcuStall),
        ..BASE
    },
    trace(
        &["INFO: trying to register non-static key"],
        "INFO: trying to register non-static key in {f}",
        &[Has("stack"), Has("lock"), Has("IRQ")],
    ),
    trace(
        &["INFO: suspicious RCU usage"],
        "INFO: suspicious RCU usage in {f}",
        &[Has("rcu"), Has("kmem"), Has("slab")],
    ),
    Rule {
        pick: Pick::Hang,
        class: || Some(CrashClass::HungTask),
        ..trace(
            &["INFO: task ", " blocked for more than ", " seconds"],
            "INFO: task hung in {f}",
            &[],
        )
    },
    trace(
        &["INFO: task ", " can't die for more than ", " seconds"],
        "INFO: task can't die in {f}",
        &[Has("schedule")],
    ),
    Rule { word: Word::RestAfter("INFO: "), ..lost(&["INFO: Freed in "], "INFO: {1}") },
    Rule { word: Word::RestAfter("INFO: "), ..lost(&["INFO: Allocated in "], "INFO: {1}") },
];

pub(super) const PANIC: &[Rule] = &[
    Rule {
        place: Place::CorruptedIn,
        skip: &[Has("stack_chk")],
        stack: false,
        ..trace(
            &["Kernel panic - not syncing: stack-protector:", "corrupted in: "],
            "kernel panic: stack is corrupted in {f}",
            &[],
        )
    },
    Rule {
        pick: Pick::Stall,
        ..trace(
            &["Kernel panic - not syncing: corrupted stack end detected inside scheduler"],
            "kernel panic: corrupted stack end in {f}",
            &[Has("schedule"), Has("retint_kernel")],
        )
    },
    Rule {
        pick: Pick::Stall,
        class: || Some(CrashClass::StackOverflow),
        ..trace(
            &["Kernel panic - not syncing: kernel stack overflow"],
            "kernel stack overflow in {f}",
            &[Has("bad_stack")],
        )
    },
    panic(
        &["Kernel panic - not syncing: Attempted to kill init!"],
        "kernel panic: Attempted to kill init!",
    ),
    panic(
        &["Kernel panic - not syncing: Couldn't open N_TTY ldisc for "],
        "kernel panic: Couldn't open N_TTY ldisc",
    ),
    Rule {
        lost_head: true,
        ..panic(&["Kernel panic - not syncing: Fatal exception"], "kernel panic: Fatal exception")
    },
    Rule {
        lost_head: true,
        ..panic(
            &["Kernel panic - not syncing: ", "panic_on_warn set"],
            "kernel panic: panic_on_warn set",
        )
    },
    Rule {
        lost_head: true,
        ..panic(
            &["Kernel panic - not syncing: hung_task: blocked tasks"],
            "kernel panic: hung_task: blocked tasks",
        )
    },
    Rule {
        words: &["Kernel panic - not syncing: "],
        title: "kernel panic: {1}",
        word: Word::RestAfter("Kernel panic - not syncing: "),
        place: Place::Nowhere,
        class: || Some(CrashClass::Panic),
        ..BASE
    },
];

/// A panic with a title of its own.
const fn panic(words: &'static [&'static str], title: &'static str) -> Rule {
    Rule { words, title, place: Place::Nowhere, class: || Some(CrashClass::Panic), ..BASE }
}
