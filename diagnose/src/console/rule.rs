//! The kinds of report: by which words a line begins one, and how its title is made. One table; the titles are
//! those that kernel fuzzing dashboards print (syzkaller, pkg/report). Not where in a log reports begin and end.

use memchr::memmem;

use super::skip::Name;
use crate::CrashClass;

/// Where the function of a title stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// The title has none.
    Nowhere,
    /// In the line of the instruction pointer.
    Pointer,
    /// There, else in the call trace.
    PointerThenTrace,
    /// In the call trace.
    Trace,
    /// In the line of the instruction pointer and the frames right after it, else in the call trace: a
    /// warning traps since v4.12 and printed its call trace only before.
    Warning,
    /// In the stack that follows a line with these words, up to the next stack.
    After(&'static [&'static str]),
    /// After these words in the head, else in the call trace.
    Named(&'static str),
    /// After these words in the head, else in the frames that follow.
    NamedThenFrames(&'static str),
    /// In the frames that follow the head.
    Frames,
    /// After ` at: ` in the line that follows one with these words (lockdep); the fallback are further
    /// ` at: ` and the call trace.
    Lock(&'static [&'static str]),
    /// Like it, but only that one line: it has to be there.
    OnlyLock(&'static [&'static str]),
    /// In the first line that is an address and a function, else in the call trace.
    FirstAddress,
    /// Where the function's own words are: after `last function: `.
    LastFunction,
    /// In the stack that the timer interrupt broke into.
    Interrupted,
    /// The words after `corrupted in: `.
    CorruptedIn,
}

/// Which of the frames is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pick {
    /// The first that is not passed over.
    First,
    /// The entry into the code that loops: what comes before a dispatcher.
    Stall,
    /// What a sleeping task waits in.
    Hang,
}

/// What of the head goes into the title as `{1}`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Word {
    /// Nothing.
    None,
    /// The rest of the line after these words.
    RestAfter(&'static str),
    /// Up to the second words, after the first.
    Between(&'static str, &'static str),
    /// Whichever of these stands in the line first.
    OneOf(&'static [&'static str]),
    /// KASAN's kind and `Read` or `Write`, which stands in a later line.
    Access,
}

/// One kind of report.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Words that must follow each other in the line.
    pub(crate) words: &'static [&'static str],
    /// The title, `{f}` for the function, `{1}` for the word.
    pub(crate) title: &'static str,
    pub(crate) word: Word,
    pub(crate) place: Place,
    /// Names passed over besides those of [`super::skip::FUNCTIONS`].
    pub(crate) skip: &'static [Name],
    pub(crate) pick: Pick,
    /// Whether it comes with a stack, so that one without is damaged.
    pub(crate) stack: bool,
    /// It follows a report, so a log where it comes first has lost that.
    pub(crate) lost_head: bool,
    /// Its class, where the head alone tells.
    pub(crate) class: fn() -> Option<CrashClass>,
}

/// Reports that begin with the same words.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    /// The words.
    pub(crate) words: &'static str,
    pub(crate) rules: &'static [Rule],
    /// Lines with these words in order are none.
    pub(crate) not: &'static [&'static [&'static str]],
    /// It goes on with a report that has begun.
    pub(crate) goes_on: bool,
    /// User space and drivers print it, too: without a rule that fits it is a report only with a call trace.
    pub(crate) common: bool,
}

impl Head {
    /// The rule for a line that has the words.
    pub(crate) fn rule(&self, text: &[u8]) -> Option<&'static Rule> {
        self.rules.iter().find(|rule| in_order(text, rule.words))
    }
}

/// Whether the words stand in the text one after the other.
pub(crate) fn in_order(text: &[u8], words: &[&str]) -> bool {
    let mut rest = text;
    words.iter().all(|word| match memmem::find(rest, word.as_bytes()) {
        Some(at) => {
            rest = rest.get(at + word.len()..).unwrap_or_default();
            true
        }
        None => false,
    })
}

/// A rule with a stack in the trace and nothing special: the base of the table's rows.
const BASE: Rule = Rule {
    words: &[],
    title: "",
    word: Word::None,
    place: Place::Trace,
    skip: &[],
    pick: Pick::First,
    stack: true,
    lost_head: false,
    class: unknown,
};

fn unknown() -> Option<CrashClass> {
    None
}

/// A title without a function and without a stack.
const fn bare(words: &'static [&'static str], title: &'static str) -> Rule {
    Rule { words, title, place: Place::Nowhere, stack: false, ..BASE }
}

/// A damaged head.
const fn lost(words: &'static [&'static str], title: &'static str) -> Rule {
    Rule { words, title, place: Place::Nowhere, lost_head: true, ..BASE }
}

const fn fault(
    words: &'static [&'static str],
    title: &'static str,
    class: fn() -> Option<CrashClass>,
) -> Rule {
    Rule { words, title, place: Place::PointerThenTrace, class, ..BASE }
}

const fn trace(words: &'static [&'static str], title: &'static str, skip: &'static [Name]) -> Rule {
    Rule { words, title, skip, ..BASE }
}

const fn warning(
    words: &'static [&'static str],
    title: &'static str,
    skip: &'static [Name],
) -> Rule {
    Rule { words, title, skip, place: Place::Warning, ..BASE }
}

const fn lock(
    words: &'static [&'static str],
    title: &'static str,
    after: &'static [&'static str],
) -> Rule {
    Rule { words, title, place: Place::OnlyLock(after), ..BASE }
}

use Name::{Ends, Has, Starts};

const ACQUIRE: &[&str] = &["is trying to acquire lock"];
const DEADLOCK: &str = "possible deadlock in {f}";
const USB: &[Name] = &[
    Has("usb_submit_urb"),
    Has("usb_start_wait_urb"),
    Has("usb_bulk_msg"),
    Has("usb_interrupt_msg"),
    Has("usb_control_msg"),
];
const NULL: &str = "BUG: unable to handle kernel NULL pointer dereference in {f}";
const PAGING: &str = "BUG: unable to handle kernel paging request in {f}";

const BUG: &[Rule] = &[
    invalid_free(&["BUG: KASAN: double-free or invalid-free in "]),
    invalid_free(&["BUG: KASAN: double-free in "]),
    invalid_free(&["BUG: KASAN: invalid-free in "]),
    Rule {
        words: &["BUG: KASAN: ", " in "],
        title: "KASAN: {1} in {f}",
        word: Word::Access,
        place: Place::Named(" in "),
        // KASAN_HW_TAGS
        skip: &[
            Has("kernel_fault"),
            Has("tag_check"),
            Has("mem_abort"),
            Starts("el1_"),
            Starts("el1h_"),
        ],
        ..BASE
    },
    Rule {
        words: &["BUG: KASAN: ", " on address"],
        title: "KASAN: {1}",
        word: Word::Access,
        place: Place::Nowhere,
        ..BASE
    },
    Rule { word: Word::RestAfter("BUG: KASAN: "), ..lost(&["BUG: KASAN: "], "KASAN: {1}") },
    Rule {
        words: &["BUG: KMSAN: kernel-usb-infoleak in "],
        title: "KMSAN: kernel-usb-infoleak in {f}",
        place: Place::Frames,
        skip: &[
            Has("alloc_skb"),
            Has("usb_submit_urb"),
            Has("usb_start_wait_urb"),
            Has("usb_bulk_msg"),
            Has("usb_interrupt_msg"),
            Has("usb_control_msg"),
        ],
        stack: false,
        ..BASE
    },
    Rule {
        words: &["BUG: KMSAN: ", " in "],
        title: "KMSAN: {1} in {f}",
        word: Word::Between("BUG: KMSAN: ", " in "),
        place: Place::Frames,
        skip: &[
            Has("alloc_skb"),
            Has("netlink_ack"),
            Has("netlink_rcv_skb"),
            Ends("_encrypt"),
            Starts("crypto_"),
            Starts("cipher_"),
            Starts("drbg_"),
            Starts("rng_"),
        ],
        stack: false,
        ..BASE
    },
    Rule { word: Word::RestAfter("BUG: KCSAN: "), ..bare(&["BUG: KCSAN: "], "KCSAN: {1}") },
    Rule {
        words: &["BUG: KFENCE: invalid free in "],
        title: "KFENCE: invalid free in {f}",
        place: Place::NamedThenFrames(" in "),
        stack: false,
        ..BASE
    },
    Rule {
        words: &["BUG: KFENCE: memory corruption in "],
        title: "KFENCE: memory corruption in {f}",
        place: Place::NamedThenFrames(" in "),
        stack: false,
        ..BASE
    },
    Rule {
        words: &["BUG: KFENCE: ", " in "],
        title: "KFENCE: {1} in {f}",
        word: Word::Between("BUG: KFENCE: ", " in "),
        place: Place::NamedThenFrames(" in "),
        stack: false,
        ..BASE
    },
    fault(&["BUG: unable to handle kernel paging request"], PAGING, || {
        Some(CrashClass::WildPointer)
    }),
    fault(&["BUG: unable to handle page fault for address"], PAGING, || {
        Some(CrashClass::WildPointer)
    }),
    fault(&["BUG: Unable to handle kernel data access"], PAGING, || Some(CrashClass::WildPointer)),
    fault(&["BUG: unable to handle kernel NULL pointer dereference"], NULL, || {
        Some(CrashClass::NullDereference)
    }),
    fault(&["BUG: kernel NULL pointer dereference"], NULL, || Some(CrashClass::NullDereference)),
    fault(&["BUG: Kernel NULL pointer dereference"], NULL, || Some(CrashClass::NullDereference)),
    lost(&["BUG: unable to handle kernel"], "BUG: unable to handle kernel"),
    lost(&["BUG: Unable to handle kernel"], "BUG: unable to handle kernel"),
    Rule {
        word: Word::OneOf(LOCK_BUGS),
        ..trace(&["BUG: spinlock "], "BUG: spinlock {1} in {f}", LOCKS)
    },
    Rule {
        word: Word::OneOf(LOCK_BUGS),
        ..trace(&["BUG: rwlock "], "BUG: rwlock {1} in {f}", LOCKS)
    },
    Rule {
        pick: Pick::Stall,
        ..fault(&["BUG: soft lockup"], "BUG: soft lockup in {f}", || Some(CrashClass::SoftLockup))
    },
    Rule {
        place: Place::FirstAddress,
        ..trace(&["BUG: ", "still has locks held!"], "BUG: still has locks held in {f}", &[])
    },
    trace(
        &["BUG: scheduling while atomic"],
        "BUG: scheduling while atomic in {f}",
        &[Has("schedule")],
    ),
    Rule {
        stack: false,
        ..lock(
            &["BUG: lock held when returning to user space"],
            "BUG: lock held when returning to user space in {f}",
            &["leaving the kernel with locks still held"],
        )
    },
    Rule {
        place: Place::FirstAddress,
        ..trace(&["BUG: bad unlock balance detected!"], "BUG: bad unlock balance in {f}", &[])
    },
    Rule {
        place: Place::FirstAddress,
        ..trace(&["BUG: held lock freed!"], "BUG: held lock freed in {f}", &[])
    },
    bare(&["BUG: Bad rss-counter state"], "BUG: Bad rss-counter state"),
    bare(&["BUG: non-zero nr_ptes on freeing mm"], "BUG: non-zero nr_ptes on freeing mm"),
    bare(&["BUG: non-zero nr_pmds on freeing mm"], "BUG: non-zero nr_pmds on freeing mm"),
    Rule {
        stack: true,
        ..bare(
            &["BUG: Dentry ", "still in use", "[unmount of "],
            "BUG: Dentry still in use in unmount",
        )
    },
    Rule { stack: true, ..bare(&["BUG: Bad page map"], "BUG: Bad page map") },
    Rule {
        word: Word::OneOf(&["state", "cache"]),
        place: Place::After(&["page last allocated"]),
        skip: &[
            Has("free_page"),
            Has("put_page"),
            Has("get_page"),
            Has("update_page"),
            Has("release_page"),
            Has("free_unref"),
            Starts("folio"),
            Starts("_folio"),
            Starts("__folio"),
            Has("truncate_inode_pages"),
            Has("page_frag_free"),
            Has("alloc"),
            Has("vmap"),
            Has("page_owner"),
        ],
        ..trace(&["BUG: Bad page "], "BUG: Bad page {1} in {f}", &[])
    },
    bare(&["BUG: workqueue lockup"], "BUG: workqueue lockup"),
    trace(
        &["BUG: sleeping function called from invalid context at "],
        "BUG: sleeping function called from invalid context in {f}",
        &[],
    ),
    Rule {
        word: Word::Between("BUG: using ", "()"),
        ..trace(
            &["BUG: using ", "() in preemptible"],
            "BUG: using {1}() in preemptible code in {f}",
            &[
                Has("dump_stack"),
                Has("preempt"),
                Has("debug_"),
                Has("processor_id"),
                Has("this_cpu"),
            ],
        )
    },
    Rule {
        place: Place::LastFunction,
        stack: false,
        ..trace(
            &["BUG: workqueue leaked lock or atomic"],
            "BUG: workqueue leaked lock or atomic in {f}",
            &[],
        )
    },
    Rule {
        place: Place::After(&["backtrace"]),
        ..trace(
            &["BUG: memory leak"],
            "memory leak in {f}",
            &[
                Has("kmemleak"),
                Has("mmap"),
                Has("kmem"),
                Has("slab"),
                Has("alloc"),
                Has("create_object"),
                Has("idr_get"),
                Has("list_lru_init"),
                Has("kasprintf"),
                Has("kvasprintf"),
                Has("pcpu_create"),
                Has("strdup"),
                Has("strndup"),
                Has("memdup"),
            ],
        )
    },
    Rule {
        pick: Pick::Stall,
        ..fault(
            &["BUG: ", "stack guard page was hit at"],
            "BUG: stack guard page was hit in {f}",
            || Some(CrashClass::StackOverflow),
        )
    },
    // arm and arm64 print it so; the title is x86's.
    trace(
        &["BUG: Invalid wait context"],
        "WARNING: locking bug in {f}",
        &[Has("lock_sock"), Has("release_sock")],
    ),
];

const fn invalid_free(words: &'static [&'static str]) -> Rule {
    Rule {
        words,
        title: "KASAN: invalid-free in {f}",
        place: Place::Named(" in "),
        skip: &[Has("slab_"), Has("kfree"), Has("vunmap"), Has("vfree")],
        ..BASE
    }
}

const LOCK_BUGS: &[&str] = &[
    "lockup suspected",
    "already unlocked",
    "cpu recursion",
    "recursion",
    "bad magic",
    "wrong owner",
    "wrong CPU",
    "trylock failure on UP",
];
const LOCKS: &[Name] = &[Has("spin_"), Has("_lock"), Has("_unlock")];

const WARNING: &[Rule] = &[
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

const INFO: &[Rule] = &[
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

const PANIC: &[Rule] = &[
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

const OVERFLOW: &[Name] = &[Has("ubsan"), Has("overflow")];

/// Every head. Where a line has several, the first of the table counts.
pub(crate) const HEADS: &[Head] = &[
    Head { not: &[&["DEBUG:"], &["xlog_status:"]], ..head("BUG:", BUG) },
    Head {
        not: &[
            &["WARNING: /etc/ssh/moduli does not exist"],
            &["WARNING: workqueue cpumask: online intersect"],
            &["WARNING: ", "he mand mount option"],
            &["WARNING: Unprivileged eBPF is enabled"],
            &["WARNING: fbcon: Driver "],
            &["WARNING: See http", "for mitigation options"],
            &["WARNING: kernel not compiled with CPU_SRSO"],
            &["EXT4-fs"],
            &["EXT4-FS"],
            &["XFS (", "): WARNING"],
            &["uses deprecated v2 capabilities"],
            &["uses wireless extensions"],
        ],
        common: true,
        ..head("WARNING:", WARNING)
    },
    Head {
        not: &[
            &["INFO: lockdep is turned off"],
            &["INFO: Stall ended before state dump start"],
            &["INFO: NMI handler"],
            &["INFO: recovery required on readonly filesystem"],
            &["took too long"],
            &["is not present in /proc/kallsyms"],
            &["_INFO:"],
        ],
        common: true,
        ..head("INFO:", INFO)
    },
    head(
        "Unable to handle kernel",
        &[
            fault(&["Unable to handle kernel paging request"], PAGING, || {
                Some(CrashClass::WildPointer)
            }),
            fault(&["Unable to handle kernel NULL pointer dereference"], NULL, || {
                Some(CrashClass::NullDereference)
            }),
            fault(
                &["Unable to handle kernel access to user memory"],
                "BUG: unable to handle kernel access to user memory in {f}",
                || Some(CrashClass::UserAccess),
            ),
        ],
    ),
    Head {
        // user space: `traps: a.out[1] general protection fault ip:1 sp:2 error:0 in a.out[3+4]`
        not: &[&["general protection fault", " error:", " in "]],
        ..head(
            "general protection fault",
            &[fault(&["general protection fault", ":"], "general protection fault in {f}", || {
                Some(CrashClass::GeneralProtection)
            })],
        )
    },
    head(
        "stack segment: ",
        &[fault(&["stack segment: "], "stack segment fault in {f}", || {
            Some(CrashClass::Other { reporter: "exc_stack_segment".to_owned() })
        })],
    ),
    Head { goes_on: true, ..head("Kernel panic", PANIC) },
    Head {
        goes_on: true,
        ..head(
            "PANIC: double fault",
            &[pointer(&["PANIC: double fault"], "PANIC: double fault in {f}", || {
                Some(CrashClass::DoubleFault)
            })],
        )
    },
    head(
        "kernel BUG",
        &[
            Rule {
                class: || Some(CrashClass::Usercopy),
                ..trace(
                    &["kernel BUG at mm/usercopy.c"],
                    "BUG: bad usercopy in {f}",
                    &[Has("usercopy"), Has("__check")],
                )
            },
            Rule {
                class: || Some(CrashClass::ListCorruption),
                ..trace(&["kernel BUG at lib/list_debug.c"], "BUG: corrupted list in {f}", &[])
            },
            Rule {
                skip: &[Starts("skb_")],
                ..fault(&["kernel BUG at "], "kernel BUG in {f}", || Some(CrashClass::Bug))
            },
        ],
    ),
    head(
        "Kernel BUG",
        &[Rule {
            word: Word::RestAfter("Kernel BUG "),
            stack: true,
            class: || Some(CrashClass::Bug),
            ..bare(&["Kernel BUG "], "kernel BUG {1}")
        }],
    ),
    head(
        "BUG kmalloc-",
        &[Rule {
            stack: true,
            ..bare(&["BUG kmalloc-", ": Object already free"], "BUG: Object already free")
        }],
    ),
    head(
        "divide error:",
        &[pointer(&["divide error:"], "divide error in {f}", || Some(CrashClass::Divide))],
    ),
    // v5.8 only: 9d06c4027f21 ("x86/entry: Convert Divide Error to IDTENTRY") misspelt it.
    head(
        "divide_error:",
        &[pointer(&["divide_error:"], "divide error in {f}", || Some(CrashClass::Divide))],
    ),
    Head {
        goes_on: true,
        ..head(
            "invalid opcode:",
            &[pointer(&["invalid opcode:"], "invalid opcode in {f}", || {
                Some(CrashClass::InvalidOpcode)
            })],
        )
    },
    head(
        "UBSAN:",
        &[
            // Before v5.10.
            trace(
                &["UBSAN: Undefined behaviour in"],
                "UBSAN: undefined-behaviour in {f}",
                OVERFLOW,
            ),
            Rule {
                word: Word::Between("UBSAN: ", " in"),
                ..trace(&["UBSAN: ", " in"], "UBSAN: {1} in {f}", OVERFLOW)
            },
        ],
    ),
    Head {
        goes_on: true,
        ..head(
            "unregister_netdevice: waiting for",
            &[bare(
                &["unregister_netdevice: waiting for ", " to become free"],
                "unregister_netdevice: waiting for DEV to become free",
            )],
        )
    },
    head(
        "VFS: Close: file count is 0",
        &[bare(&["VFS: Close"], "VFS: Close: file count is zero (use-after-free)")],
    ),
    head(
        "VFS: Busy inodes after unmount",
        &[bare(&["VFS: Busy"], "VFS: Busy inodes after unmount (use-after-free)")],
    ),
    Head {
        goes_on: true,
        ..head("Internal error:", &[fault(&["Internal error:"], "Internal error in {f}", unknown)])
    },
    head("Unhandled fault:", &[fault(&["Unhandled fault:"], "Unhandled fault in {f}", unknown)]),
    head("Alignment trap:", &[fault(&["Alignment trap:"], "Alignment trap in {f}", unknown)]),
    // The dashboards have no title for these.
    head(
        "hard LOCKUP",
        &[Rule {
            pick: Pick::Stall,
            ..fault(&["hard LOCKUP"], "hard lockup in {f}", || Some(CrashClass::HardLockup))
        }],
    ),
    Head {
        goes_on: true,
        ..head("Oops: ", &[Rule { lost_head: true, ..fault(&["Oops: "], "Oops in {f}", unknown) }])
    },
];

const fn pointer(
    words: &'static [&'static str],
    title: &'static str,
    class: fn() -> Option<CrashClass>,
) -> Rule {
    Rule { words, title, place: Place::Pointer, class, ..BASE }
}

const fn head(words: &'static str, rules: &'static [Rule]) -> Head {
    Head { words, rules, not: &[], goes_on: false, common: false }
}
