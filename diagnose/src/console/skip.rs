//! Which functions and files are not to blame, each with the reason: one table of names, one of files. The
//! names are those that kernel fuzzing dashboards pass over, so that titles come out the same. Not who is to
//! blame then.

use memchr::memmem;

/// A set of function names.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Name {
    /// Contains this.
    Has(&'static str),
    /// Starts with this.
    Starts(&'static str),
    /// Ends with this.
    Ends(&'static str),
    /// Is this.
    Is(&'static str),
    /// Starts with this, and a digit follows.
    Numbered(&'static str),
    /// Contains the first and, after it, the second.
    Both(&'static str, &'static str),
    /// `atomic_` or `atomic64_` and one of the operations.
    Atomic,
}

impl Name {
    pub(crate) fn matches(self, name: &[u8]) -> bool {
        match self {
            Name::Has(part) => memmem::find(name, part.as_bytes()).is_some(),
            Name::Starts(part) => name.starts_with(part.as_bytes()),
            Name::Ends(part) => name.ends_with(part.as_bytes()),
            Name::Is(whole) => name == whole.as_bytes(),
            Name::Numbered(part) => name
                .strip_prefix(part.as_bytes())
                .and_then(<[u8]>::first)
                .is_some_and(u8::is_ascii_digit),
            Name::Both(first, second) => memmem::find(name, first.as_bytes())
                .and_then(|at| name.get(at + first.len()..))
                .is_some_and(|rest| memmem::find(rest, second.as_bytes()).is_some()),
            Name::Atomic => ["atomic_", "atomic64_"].iter().any(|part| {
                let at = memmem::find(name, part.as_bytes());
                let rest = at.and_then(|at| name.get(at + part.len()..)).unwrap_or_default();
                ATOMIC.iter().any(|operation| rest.starts_with(operation.as_bytes()))
            }),
        }
    }
}

const ATOMIC: &[&str] = &[
    "dec", "inc", "read", "set", "or", "xor", "and", "add", "sub", "fetch", "xchg", "cmpxchg",
    "try",
];

/// Why a group of functions is passed over, and the group.
pub(crate) type Group = (&'static str, &'static [Name]);

use Name::{Atomic, Both, Ends, Has, Is, Numbered, Starts};

/// Functions that are never the one to blame.
pub(crate) const FUNCTIONS: &[Group] = &[
    (
        "a sanitizer's own code",
        &[
            Has("__sanitizer"),
            Has("__asan"),
            Has("kasan"),
            Has("hwasan"),
            Has("__msan"),
            Has("kmsan"),
            Has("kcsan_setup_watchpoint"),
            Has("check_memory_region"),
            Has("check_heap_object"),
            Has("check_object"),
            Has("read_word_at_a_time"),
            Both("read_once_", "nocheck"),
            Both("write_once_", "nocheck"),
            Has("print_address_description"),
            Has("print_report"),
        ],
    ),
    (
        "it reports the crash",
        &[
            Has("panic"),
            Has("invalid_op"),
            Has("report_bug"),
            Has("fixup_bug"),
            Has("print_usage_bug"),
            Has("do_error"),
            Ends("_trap"),
            Has("do_trap"),
            Has("show_stack"),
            Has("dump_stack"),
            Has("walk_stack"),
            Has("dump_backtrace"),
            Has("warn_slowpath"),
            Has("warn_alloc"),
            Has("warn_bogus"),
            Has("__warn"),
            Has("print_unlock"),
            Has("imbalance_bug"),
            Has("assertfail"),
            Has("program_check_exception"),
            Has("program_check_common"),
            Has("print_tainted"),
            Is("get_taint"),
            Has("__fortify_report"),
            Has("stack_trace_consume_entry"),
            Has("arch_stack_walk"),
            Has("stack_trace_save"),
        ],
    ),
    (
        "arm64's way from a translation fault to its report",
        &[
            Has("do_kernel_fault"),
            Has("do_translation_fault"),
            Has("do_mem_abort"),
            Has("el1_abort"),
            Has("el1h_64_sync"),
        ],
    ),
    (
        "it allocates for somebody else",
        &[
            Has("alloc_page"),
            Has("malloc"),
            Has("zalloc"),
            Has("calloc"),
            Has("krealloc"),
            Has("kmem_cache"),
            Has("allocate_slab"),
            Has("__alloc_frozen_pages_noprof"),
            Has("folio_alloc"),
            Has("folio_unlock"),
            Has("filemap_alloc_folio"),
            Has("__filemap_get_folio"),
            Has("find_or_create_page"),
            Has("do_read_cache_folio"),
            Has("read_cache_page"),
            Has("pagecache_get_page"),
            Has("grab_cache_page_write_begin"),
            Has("slab_"),
            Is("kfree"),
            Is("kvfree"),
            Has("kfree_skb"),
            Has("ida_free"),
        ],
    ),
    (
        "a debugging check of an object that its caller owns",
        &[
            Has("debug_object"),
            Has("timer_is_static_object"),
            Has("work_is_static_object"),
            Has("ref_tracker"),
            Has("seqprop_assert"),
        ],
    ),
    (
        "a check whether sleeping is allowed here",
        &[Has("__might_fault"), Has("might_fault"), Has("might_sleep"), Has("__might_resched")],
    ),
    (
        "locking: the lock is its caller's",
        &[
            Has("lockdep"),
            Has("bh_enable"),
            Has("bh_disable"),
            Has("perf_trace"),
            Has("lock_acquire"),
            Has("lock_release"),
            Has("lock_class"),
            Has("mark_lock"),
            Has("reacquire_held_locks"),
            Has("mark_held_locks"),
            Has("raw_spin_rq"),
            Has("spin_lock"),
            Has("spin_trylock"),
            Has("spin_unlock"),
            Has("read_lock"),
            Has("read_trylock"),
            Has("write_lock"),
            Has("write_trylock"),
            Has("read_unlock"),
            Has("write_unlock"),
            Is("down"),
            Has("down_read"),
            Has("down_write"),
            Has("down_trylock"),
            Has("up_read"),
            Has("up_write"),
            Starts("mutex_"),
            Starts("__mutex_"),
            Starts("rt_mutex_"),
            Has("owner_on_cpu"),
            Has("osq_lock"),
            Has("osq_unlock"),
            Both("trace_", "hardirq"),
            Both("trace_", "softirq"),
            Both("lockdep_", "hardirq"),
            Starts("lock_page"),
            Starts("unlock_page"),
            Has("cleanup_srcu_struct"),
            Has("lock_timer_base"),
        ],
    ),
    (
        "one operation on a counter or bit of its caller",
        &[
            Atomic,
            Has("set_bit"),
            Has("clear_bit"),
            Has("change_bit"),
            Has("test_bit"),
            Starts("refcount_"),
            Starts("kref_"),
            Has("drop_nlink"),
            Is("ihold"),
        ],
    ),
    (
        "it copies, compares or prints what it is given",
        &[
            Has("memcpy"),
            Has("memcmp"),
            Has("memset"),
            Has("memchr"),
            Has("memmove"),
            Has("memdup"),
            Has("strcmp"),
            Has("strncmp"),
            Has("strcpy"),
            Has("strlcpy"),
            Has("strncpy"),
            Has("strscpy"),
            Has("strlen"),
            Has("strstr"),
            Has("strnstr"),
            Has("strnlen"),
            Has("strchr"),
            Has("strdup"),
            Has("strndup"),
            Has("copy_to_user"),
            Has("copy_from_user"),
            Has("copy_to_iter"),
            Has("copy_from_iter"),
            Has("copy_page_to_iter"),
            Has("copy_page_from_iter"),
            Has("copy_folio_to_iter"),
            Is("copyin"),
            Is("copyout"),
            Has("put_user"),
            Has("get_user"),
            Has("string"),
            Has("pointer"),
            Has("snprintf"),
            Has("scnprintf"),
            Has("kasprintf"),
            Has("kvasprintf"),
            Has("printk"),
            Has("va_format"),
            Has("dev_info"),
            Has("dev_notice"),
            Has("dev_warn"),
            Has("dev_err"),
            Has("dev_alert"),
            Has("dev_crit"),
            Has("dev_emerg"),
            Has("hex_dump_to_buffer"),
            Has("print_hex_dump"),
            Numbered("crc"),
            Has("crc_itu_t"),
            Has("extract_user_to_sg"),
            Has("extract_iter_to_sg"),
        ],
    ),
    (
        "it changes the list, tree or table it is given",
        &[
            Has("list_add"),
            Has("list_del"),
            Has("list_replace"),
            Has("list_move"),
            Has("list_splice"),
            Starts("rb_"),
            Starts("__rb_"),
            Starts("klist_"),
            Has("xas_start"),
            Has("xas_load"),
            Has("xas_find"),
            Has("rhashtable_lookup"),
            Has("find_lock_entries"),
            Has("truncate_inode_pages_range"),
        ],
    ),
    ("a thunk of an indirect call", &[Has("_indirect_thunk_")]),
    (
        "it reads or writes the register it is given",
        &[
            Ends("readb"),
            Ends("readw"),
            Ends("readl"),
            Ends("readq"),
            Ends("writeb"),
            Ends("writew"),
            Ends("writel"),
            Ends("writeq"),
            Has("logic_in"),
            Has("logic_out"),
            Has("__phys_addr"),
        ],
    ),
    (
        "it queues, waits for, wakes or cancels what it is given",
        &[
            Has("__wake_up"),
            Has("del_timer"),
            Has("flush_work"),
            Has("__cancel_work_timer"),
            Has("cancel_work_sync"),
            Has("try_to_grab_pending"),
            Has("flush_workqueue"),
            Has("drain_workqueue"),
            Has("destroy_workqueue"),
            Has("queue_work"),
            Has("insert_work"),
            Has("__queue_delayed_work"),
            Has("queue_delayed_work_on"),
            Has("finish_wait"),
            Has("kthread_stop"),
            Is("complete"),
            Has("wait_for_completion"),
            Has("__timer_delete_sync"),
            Has("sk_stop_timer_sync"),
            Has("__mod_timer"),
        ],
    ),
    (
        "it registers or takes down a device for its driver",
        &[
            Has("kobject_"),
            Has("add_uevent_var"),
            Has("get_device_parent"),
            Has("device_add"),
            Has("device_del"),
            Has("device_unregister"),
            Has("device_destroy"),
            Has("device_release"),
            Has("devres_release_all"),
            Has("hwrng_unregister"),
            Has("i2c_del_adapter"),
            Has("__unregister_client"),
            Has("device_for_each_child"),
            Has("rollback_registered"),
            Has("unregister_netdev"),
            Has("sysfs_remove"),
            Has("device_remove_file"),
            Has("tty_unregister_device"),
            Is("put_device"),
        ],
    ),
    (
        "it submits or kills a request for its driver",
        &[
            Has("dummy_urb_enqueue"),
            Has("usb_kill_urb"),
            Has("usb_kill_anchored_urbs"),
            Has("usb_control_msg"),
            Has("usb_hcd_submit_urb"),
            Has("usb_submit_urb"),
        ],
    ),
    (
        "it drops a reference to an inode or dentry",
        &[Is("iput"), Is("iput_final"), Has("fast_dput"), Has("dput")],
    ),
];

/// Why a function is passed over, `None` when it may be to blame.
pub(crate) fn reason(function: &[u8]) -> Option<&'static str> {
    let group = FUNCTIONS.iter().find(|(_, names)| names.iter().any(|name| name.matches(function)));
    group.map(|(reason, _)| *reason)
}

/// A set of paths in the kernel's tree: starts with the first and contains the second after it.
type Path = (&'static str, &'static str);

/// Files that are never the guilty one.
const FILES: &[(&str, &[Path])] = &[
    ("a header is where code was written, not where it runs", &[("", ".h")]),
    (
        "library code works on what it is given",
        &[
            ("lib/", ""),
            ("virt/lib/", ""),
            ("arch/", "/lib/crc"),
            ("fs/proc/generic.c", ""),
            ("mm/util.c", ""),
        ],
    ),
    ("a sanitizer's own code", &[("mm/kasan/", ""), ("mm/kmsan/", ""), ("kernel/kcov.c", "")]),
    (
        "the allocators and the page cache work for somebody else",
        &[
            ("mm/slab.c", ""),
            ("mm/slob.c", ""),
            ("mm/slub.c", ""),
            ("mm/filemap.c", ""),
            ("mm/folio-compat.c", ""),
            ("mm/truncate.c", ""),
            ("mm/memory.c", ""),
            ("mm/percpu", ""),
            ("mm/vmalloc.c", ""),
            ("mm/page_alloc.c", ""),
            ("mm/mempool.c", ""),
        ],
    ),
    (
        "it reports the crash",
        &[
            ("arch/", "/kernel/traps.c"),
            ("arch/", "/kernel/unwind"),
            ("arch/", "/mm/fault.c"),
            ("arch/", "/mm/physaddr.c"),
            ("arch/", "/kernel/stacktrace.c"),
            ("arch/arm64/kernel/entry", ".c"),
            ("arch/arm64/kernel/process.c", ""),
            ("kernel/panic.c", ""),
            ("kernel/printk/printk", ""),
            ("kernel/stacktrace.c", ""),
        ],
    ),
    (
        "it runs what others gave it to run",
        &[
            ("kernel/rcu/", ""),
            ("kernel/softirq.c", ""),
            ("kernel/kthread.c", ""),
            ("kernel/sched/", ".c"),
            ("kernel/time/timer.c", ""),
            ("kernel/workqueue.c", ""),
            ("arch/", "/kernel/apic/apic.c"),
        ],
    ),
    ("locking: the lock is its caller's", &[("kernel/locking/", "")]),
    (
        "the network core passes on what protocols and drivers did",
        &[("net/core/dev.c", ""), ("net/core/sock.c", ""), ("net/core/skbuff.c", "")],
    ),
    ("a warning in it means a bug in a USB driver", &[("drivers/usb/core/urb.c", "")]),
    ("not of the kernel's tree", &[("trusty/", "")]),
];

/// Why a file is passed over, `None` when it may be guilty.
pub(crate) fn file_reason(path: &[u8]) -> Option<&'static str> {
    let fits = |(start, part): &Path| {
        let rest = path.strip_prefix(start.as_bytes());
        rest.is_some_and(|rest| memmem::find(rest, part.as_bytes()).is_some())
    };
    FILES.iter().find(|(_, paths)| paths.iter().any(fits)).map(|(reason, _)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helpers_have_a_reason() {
        for name in [
            "dump_stack_lvl",
            "__kasan_check_read",
            "kmalloc_trace",
            "_raw_spin_lock_irqsave",
            "atomic64_inc_return",
            "crc32_le",
            "iput",
            "down",
            "__x86_indirect_thunk_rax",
            "__list_add_valid",
            "mutex_lock_nested",
        ] {
            assert!(reason(name.as_bytes()).is_some(), "{name}");
        }
        for name in
            ["vfs_write", "ext4_iput", "shutdown", "crc_x", "downgrade", "atomic_open", "bw"]
        {
            assert_eq!(reason(name.as_bytes()), None, "{name}");
        }
    }

    #[test]
    fn files() {
        for path in [
            "include/net/sock.h",
            "lib/list_debug.c",
            "arch/x86/kernel/traps.c",
            "mm/slub.c",
            "kernel/sched/core.c",
        ] {
            assert!(file_reason(path.as_bytes()).is_some(), "{path}");
        }
        for path in ["net/ipv4/tcp.c", "fs/lib/x.c", "mm/mmap.c", "arch/x86/kernel/process.c"] {
            assert_eq!(file_reason(path.as_bytes()), None, "{path}");
        }
    }
}
