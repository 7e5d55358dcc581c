//! The kinds of report whose line has `BUG:`. Those of other heads are in `warning_rules.rs` and `heads.rs`.

use super::rule::{BASE, Pick, Place, Rule, Word, bare, fault, lock, lost, trace};
use super::skip::Name;
use super::skip::Name::{Ends, Has, Starts};
use crate::CrashClass;

pub(super) const NULL: &str = "BUG: unable to handle kernel NULL pointer dereference in {f}";
pub(super) const PAGING: &str = "BUG: unable to handle kernel paging request in {f}";

pub(super) const BUG: &[Rule] = &[
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
