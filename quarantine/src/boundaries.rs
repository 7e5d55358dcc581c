//! The table of core-kernel functions that call into drivers: through which member, what they make
//! of the result, and whether interrupts are on there. What a value looks like is in `values.rs`.

/// What a caller is handed, where its type alone does not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fixed {
    /// The caller ignores the result or expects none.
    Nothing,
    /// A number that means "did nothing" or "failed" to this caller, its name, and why.
    Number(i64, &'static str, &'static str),
    /// An enumerator, and why.
    Enumerator(&'static str, &'static str),
    /// The caller checks pointers with `IS_ERR`.
    ErrorPointer,
    /// Whatever the caller is handed, it does harm; why.
    Never(&'static str),
}

/// One caller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rule {
    /// Function without compiler suffixes.
    pub(crate) function: &'static str,
    /// Function-pointer members that it calls through; all of one return type.
    pub(crate) members: &'static [(&'static str, &'static str)],
    /// What it is handed, if not decided by type.
    pub(crate) fixed: Option<Fixed>,
    /// Interrupt flag when it calls, where that is part of its contract.
    pub(crate) interrupts: Option<bool>,
}

impl Rule {
    /// Whether what it calls are operations of an object, each of which may fail on its own.
    pub(crate) fn is_operation(&self) -> bool {
        let typed = !self.members.is_empty() && self.fixed.is_none();
        typed || self.fixed == Some(Fixed::ErrorPointer)
    }
}

pub(crate) const fn typed(
    function: &'static str,
    members: &'static [(&'static str, &'static str)],
) -> Rule {
    Rule { function, members, fixed: None, interrupts: Some(true) }
}

pub(crate) const fn fixed(function: &'static str, fixed: Fixed, interrupts: Option<bool>) -> Rule {
    Rule { function, members: &[], fixed: Some(fixed), interrupts }
}

/// Callers whose contract is known. Names hold for 6.1 to 6.12 unless a line says otherwise; one
/// that a kernel does not have is never looked up.
const RULES: &[Rule] = &[
    // fs/read_write.c, fs/file_table.c, fs/open.c, fs/ioctl.c, fs/sync.c: ->f_op of a character
    // device.
    typed("vfs_write", &[("file_operations", "write")]),
    typed("vfs_read", &[("file_operations", "read")]),
    typed("new_sync_write", &[("file_operations", "write_iter")]),
    typed("new_sync_read", &[("file_operations", "read_iter")]),
    typed("do_iter_readv_writev", &[("file_operations", "read_iter")]),
    typed("vfs_iter_write", &[("file_operations", "write_iter")]),
    typed("vfs_iter_read", &[("file_operations", "read_iter")]),
    typed("vfs_llseek", &[("file_operations", "llseek")]),
    typed("vfs_ioctl", &[("file_operations", "unlocked_ioctl")]),
    typed("__x64_sys_ioctl", &[("file_operations", "unlocked_ioctl")]),
    typed("__do_sys_ioctl", &[("file_operations", "unlocked_ioctl")]),
    typed("__se_sys_ioctl", &[("file_operations", "unlocked_ioctl")]),
    typed("__ia32_compat_sys_ioctl", &[("file_operations", "compat_ioctl")]),
    typed("chrdev_open", &[("file_operations", "open")]),
    typed("misc_open", &[("file_operations", "open")]),
    typed("do_dentry_open", &[("file_operations", "open")]),
    typed("__fput", &[("file_operations", "release")]),
    typed("filp_close", &[("file_operations", "flush")]),
    typed("filp_flush", &[("file_operations", "flush")]),
    typed("vfs_fsync_range", &[("file_operations", "fsync")]),
    typed("iterate_dir", &[("file_operations", "iterate_shared")]),
    typed("mmap_region", &[("file_operations", "mmap")]),
    typed("__mmap_region", &[("file_operations", "mmap")]),
    typed("setfl", &[("file_operations", "fasync")]),
    typed("do_sys_poll", &[("file_operations", "poll")]),
    typed("do_select", &[("file_operations", "poll")]),
    typed("do_fcntl", &[("file_operations", "fasync")]),
    typed("ep_item_poll", &[("file_operations", "poll")]),
    typed("__ep_eventpoll_poll", &[("file_operations", "poll")]),
    typed("io_poll_check_events", &[("file_operations", "poll")]),
    typed("__do_fault", &[("vm_operations_struct", "fault")]),
    typed("do_page_mkwrite", &[("vm_operations_struct", "page_mkwrite")]),
    // net/socket.c, net/ipv4/af_inet.c, net/ipv6/af_inet6.c: ->ops of a socket, ->sk_prot of a protocol.
    // Since v6.5 __sock_sendmsg().
    typed("sock_sendmsg", &[("proto_ops", "sendmsg")]),
    typed("__sock_sendmsg", &[("proto_ops", "sendmsg")]),
    typed("sock_sendmsg_nosec", &[("proto_ops", "sendmsg")]),
    typed("sock_recvmsg", &[("proto_ops", "recvmsg")]),
    typed("sock_recvmsg_nosec", &[("proto_ops", "recvmsg")]),
    typed("inet_sendmsg", &[("proto", "sendmsg")]),
    typed("inet_recvmsg", &[("proto", "recvmsg")]),
    typed("inet6_sendmsg", &[("proto", "sendmsg")]),
    typed("inet6_recvmsg", &[("proto", "recvmsg")]),
    typed("sock_poll", &[("proto_ops", "poll")]),
    typed("sock_ioctl", &[("proto_ops", "ioctl")]),
    // fs/proc/inode.c, since commit d56c0d45f0e2 ("proc: decouple proc from VFS", v5.6).
    typed("proc_reg_write", &[("proc_ops", "proc_write")]),
    typed("proc_reg_read", &[("proc_ops", "proc_read")]),
    typed("proc_reg_read_iter", &[("proc_ops", "proc_read_iter")]),
    typed("proc_reg_open", &[("proc_ops", "proc_open")]),
    typed("proc_reg_release", &[("proc_ops", "proc_release")]),
    typed("close_pdeo", &[("proc_ops", "proc_release")]),
    typed("proc_reg_poll", &[("proc_ops", "proc_poll")]),
    typed("proc_reg_unlocked_ioctl", &[("proc_ops", "proc_ioctl")]),
    typed("proc_reg_mmap", &[("proc_ops", "proc_mmap")]),
    // fs/debugfs/file.c: the proxies.
    typed("full_proxy_write", &[("file_operations", "write")]),
    typed("full_proxy_read", &[("file_operations", "read")]),
    typed("full_proxy_open", &[("file_operations", "open")]),
    typed("full_proxy_unlocked_ioctl", &[("file_operations", "unlocked_ioctl")]),
    typed("full_proxy_poll", &[("file_operations", "poll")]),
    // fs/kernfs/file.c, fs/sysfs/file.c, drivers/base/core.c: attributes.
    typed("kernfs_fop_write_iter", &[("kernfs_ops", "write")]),
    typed("kernfs_seq_show", &[("kernfs_ops", "seq_show")]),
    typed("sysfs_kf_write", &[("sysfs_ops", "store")]),
    typed("sysfs_kf_seq_show", &[("sysfs_ops", "show")]),
    typed("dev_attr_store", &[("device_attribute", "store")]),
    typed("dev_attr_show", &[("device_attribute", "show")]),
    typed("kobj_attr_store", &[("kobj_attribute", "store")]),
    typed("kobj_attr_show", &[("kobj_attribute", "show")]),
    typed("param_attr_store", &[("kernel_param_ops", "set")]),
    typed("param_attr_show", &[("kernel_param_ops", "get")]),
    typed("proc_sys_call_handler", &[("ctl_table", "proc_handler")]),
    // Driver core.
    typed("really_probe", &[("bus_type", "probe")]),
    typed("call_driver_probe", &[("bus_type", "probe")]),
    typed("platform_probe", &[("platform_driver", "probe")]),
    typed("local_pci_probe", &[("pci_driver", "probe")]),
    typed("virtio_dev_probe", &[("virtio_driver", "probe")]),
    typed("pci_device_remove", &[("pci_driver", "remove")]),
    typed("platform_remove", &[("platform_driver", "remove")]),
    // fs/seq_file.c: start() and next() give pointers that are checked with IS_ERR, show() an int:
    // the entry's own prototype must tell which.
    Rule {
        function: "seq_read_iter",
        members: &[],
        fixed: Some(Fixed::ErrorPointer),
        interrupts: Some(true),
    },
    Rule {
        function: "traverse",
        members: &[],
        fixed: Some(Fixed::ErrorPointer),
        interrupts: Some(true),
    },
    // fs/namei.c: lookup() is checked with IS_ERR.
    Rule {
        function: "__lookup_slow",
        members: &[("inode_operations", "lookup")],
        fixed: Some(Fixed::ErrorPointer),
        interrupts: Some(true),
    },
    // fs/fs_context.c: mount() is checked with IS_ERR.
    Rule {
        function: "legacy_get_tree",
        members: &[("file_system_type", "mount")],
        fixed: Some(Fixed::ErrorPointer),
        interrupts: Some(true),
    },
    // Block and network.
    typed("blk_mq_dispatch_rq_list", &[("blk_mq_ops", "queue_rq")]),
    typed("__blk_mq_issue_directly", &[("blk_mq_ops", "queue_rq")]),
    typed("dev_hard_start_xmit", &[("net_device_ops", "ndo_start_xmit")]),
    typed("__dev_open", &[("net_device_ops", "ndo_open")]),
    // net/core/dev.c: ndo_stop() "cannot fail", its result is not looked at; ndo_set_rx_mode() has none.
    fixed("__dev_close_many", Fixed::Nothing, Some(true)),
    fixed("__dev_set_rx_mode", Fixed::Nothing, None),
    fixed(
        "__napi_poll",
        Fixed::Number(
            64,
            "its budget",
            "NAPI stays scheduled and polls again; a driver that did \
                                         less has to take itself off the list, and this one has not",
        ),
        Some(true),
    ),
    // Interrupts and timers.
    Rule {
        function: "__handle_irq_event_percpu",
        members: &[("irqaction", "handler")],
        fixed: Some(Fixed::Enumerator(
            "IRQ_HANDLED",
            "IRQ_NONE would count towards switching the line off",
        )),
        interrupts: Some(false),
    },
    Rule {
        function: "irq_thread_fn",
        members: &[("irqaction", "thread_fn")],
        fixed: Some(Fixed::Enumerator("IRQ_HANDLED", "the threaded handler is done")),
        interrupts: Some(true),
    },
    Rule {
        function: "__hrtimer_run_queues",
        members: &[("hrtimer", "function")],
        fixed: Some(Fixed::Enumerator("HRTIMER_NORESTART", "the timer ends")),
        interrupts: None,
    },
    // call_timer_fn() runs TIMER_IRQSAFE timers with interrupts off, all others with interrupts on.
    fixed("call_timer_fn", Fixed::Nothing, None),
    fixed("tasklet_action_common", Fixed::Nothing, Some(true)),
    fixed("irq_work_single", Fixed::Nothing, None),
    fixed("__flush_smp_call_function_queue", Fixed::Nothing, Some(false)),
    // On the calling CPU itself the function is called directly, with interrupts off.
    fixed("generic_exec_single", Fixed::Nothing, Some(false)),
    fixed("smp_call_function_many_cond", Fixed::Nothing, Some(false)),
    fixed("rcu_do_batch", Fixed::Nothing, Some(true)),
    // __do_softirq() was split by "softirq: Fix suspicious RCU usage in __do_softirq()" (v6.9, also
    // in the 6.1 stable series): both names are there since then.
    fixed("__do_softirq", Fixed::Nothing, Some(true)),
    fixed("handle_softirqs", Fixed::Nothing, Some(true)),
    // Kernel threads.
    fixed("process_one_work", Fixed::Nothing, Some(true)),
    fixed("kthread_worker_fn", Fixed::Nothing, Some(true)),
    fixed("task_work_run", Fixed::Nothing, Some(true)),
    fixed(
        "kthread",
        Fixed::Number(-5, "-EIO", "the thread ends; kthread_stop() reports the number"),
        Some(true),
    ),
    // kernel/notifier.c: a negative errno has bit 15 (NOTIFY_STOP_MASK) set and would stop the
    // chain.
    fixed(
        "notifier_call_chain",
        Fixed::Number(0, "NOTIFY_DONE", "the driver takes no part in this event"),
        None,
    ),
    // mm/vmscan.c: SHRINK_STOP and SHRINK_EMPTY are not zero.
    fixed(
        "do_shrink_slab",
        Fixed::Number(0, "0", "nothing to shrink or nothing shrunk"),
        Some(true),
    ),
];

/// System calls that may be left as a whole, without the prefix `__x64_sys_`, and why. They change nothing
/// of the kernel's that outlives them but reference counts, which stay too high: that leaks, and damages
/// nothing. Anything that may have put its stack into a list of others is not here.
const SYSCALLS: &[(&str, &str)] = &[
    ("getcwd", "it copies names out, under RCU"),
    ("newuname", "it copies names out, under uts_sem"),
    ("uname", "it copies names out, under uts_sem"),
    ("sysinfo", "it sums up counters"),
    ("newstat", "it looks a file up; the file system may stay busy"),
    ("newlstat", "it looks a file up; the file system may stay busy"),
    ("newfstat", "it copies a file's numbers out; the file may stay open"),
    ("newfstatat", "it looks a file up; the file system may stay busy"),
    ("statx", "it looks a file up; the file system may stay busy"),
    ("access", "it looks a file up; the file system may stay busy"),
    ("faccessat", "it looks a file up; the file system may stay busy"),
    ("readlink", "it looks a file up; the file system may stay busy"),
    ("readlinkat", "it looks a file up; the file system may stay busy"),
    ("statfs", "it looks a file up; the file system may stay busy"),
    ("fstatfs", "it copies numbers out; the file may stay open"),
    ("getsockname", "it copies an address out; the socket may stay open"),
    ("getpeername", "it copies an address out; the socket may stay open"),
    ("times", "it sums up times"),
    ("getrusage", "it sums up times"),
    ("sched_getaffinity", "it copies a mask out"),
    ("sched_getparam", "it copies numbers out"),
    ("getpriority", "it looks processes up, under RCU"),
];

/// Why a system call may be left as a whole; `None` if that is not known.
pub(crate) fn syscall(name: &str) -> Option<&'static str> {
    SYSCALLS.iter().find(|(known, _)| *known == name).map(|(_, why)| *why)
}

/// Functions that put something of their own stack where others find it, and where that is. Whether they
/// have already is not known, so they are never left.
pub(crate) const STACK_LINKED: &[(&str, &str)] = &[
    // fs/select.c: struct poll_wqueues.
    ("do_sys_poll", "a wait queue"),
    ("do_select", "a wait queue"),
    ("core_sys_select", "a wait queue"),
    // kernel/exit.c: the entry in wait_chldexit.
    ("do_wait", "a wait queue"),
    // kernel/futex/waitwake.c, kernel/futex/pi.c: struct futex_q in a hash bucket.
    ("futex_wait", "a futex hash bucket"),
    // Since v6.7.
    ("__futex_wait", "a futex hash bucket"),
    ("futex_wait_requeue_pi", "a futex hash bucket"),
    ("futex_lock_pi", "a futex hash bucket"),
    // fs/namei.c: the queue that other lookups of the same name sleep on (d_alloc_parallel()).
    ("__lookup_slow", "a directory entry"),
    ("lookup_open", "a directory entry"),
    // kernel/time: timers on the stack.
    ("schedule_timeout", "the timer wheel"),
    ("schedule_hrtimeout_range_clock", "a timer queue"),
    ("do_nanosleep", "a timer queue"),
    // ipc/sem.c, ipc/msg.c: queues of waiting operations.
    ("__do_semtimedop", "a semaphore's queue"),
    ("do_semtimedop", "a semaphore's queue"),
    ("do_msgrcv", "a message queue"),
    // fs/eventpoll.c: the ready items wait in a list of ep_send_events() while each one's driver is asked, and the
    // sleeper's entry in ep_poll(); both are mostly inlined.
    ("ep_send_events", "an epoll instance"),
    ("ep_poll", "an epoll instance"),
    ("do_epoll_wait", "an epoll instance"),
    ("__ep_eventpoll_poll", "an epoll instance"),
    // io_uring/io_uring.c: struct io_wait_queue.
    ("io_cqring_wait", "a wait queue"),
    // drivers/tty/n_tty.c: on the terminal's wait queue while its driver is called.
    ("n_tty_read", "a wait queue"),
    ("n_tty_write", "a wait queue"),
    // net/core/sock.c, net/core/stream.c: on the socket's wait queue while its backlog is worked off.
    ("sk_wait_data", "a wait queue"),
    ("sk_stream_wait_connect", "a wait queue"),
    ("sk_stream_wait_close", "a wait queue"),
    ("sk_stream_wait_memory", "a wait queue"),
    // net/core/dev.c, net/core/rtnetlink.c: heads of the lists of devices that are closed or go, by their members
    // close_list and unreg_list. The head is the caller's, which may be inlined.
    ("__dev_close_many", "a network device's close_list"),
    ("dev_close_many", "a network device's close_list"),
    ("unregister_netdevice_many", "a network device's unreg_list"),
    // Since v6.2, and in Debian's 6.1.
    ("unregister_netdevice_many_notify", "a network device's unreg_list"),
    ("rtnl_delete_link", "a network device's unreg_list"),
    ("netdev_run_todo", "a network device's todo_list"),
    // fs/dcache.c, fs/inode.c: lists of what is disposed of, by d_lru and i_lru.
    ("shrink_dentry_list", "a directory entry"),
    ("shrink_dcache_parent", "a directory entry"),
    ("dispose_list", "an inode"),
    // block/blk-mq.c, block/blk-mq-sched.c: lists of requests; the completion of one that is waited for.
    ("blk_mq_dispatch_rq_list", "a block request"),
    ("blk_execute_rq", "a block request"),
];

/// Functions after whose panic going on makes no sense, and why.
pub(crate) const HOPELESS: &[(&str, &str)] = &[
    // mm/oom_kill.c: vm.panic_on_oom, or nobody is left who could be killed.
    ("out_of_memory", "memory has run out, and whatever went on would ask for more at once"),
];

/// A variable that a function changes for as long as it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeftBehind {
    pub(crate) function: &'static str,
    /// An `int`.
    pub(crate) variable: &'static str,
    /// While it runs.
    pub(crate) set: u32,
    /// Before, if it is `set` now.
    pub(crate) back: u32,
    pub(crate) why: &'static str,
}

/// What abandoned functions leave changed, where it matters.
pub(crate) const LEFT_BEHIND: &[LeftBehind] = &[LeftBehind {
    // drivers/tty/sysrq.c: rcu_sysrq_start() writes 2 over 0 only, rcu_sysrq_end() 0 over 2 only.
    function: "__handle_sysrq",
    variable: "rcu_cpu_stall_suppress",
    set: 2,
    back: 0,
    why: "the RCU stall detector was off while the request ran",
}];

/// What is known of a caller.
pub(crate) fn rule(function: &str) -> Option<&'static Rule> {
    RULES.iter().chain(crate::callbacks::RULES).find(|rule| rule.function == function)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_function_has_one_rule() {
        let all = || RULES.iter().chain(crate::callbacks::RULES);
        let names: HashSet<_> = all().map(|rule| rule.function).collect();
        assert_eq!(names.len(), all().count());
    }

    #[test]
    fn hard_interrupts_return_with_interrupts_off() {
        assert_eq!(rule("__handle_irq_event_percpu").unwrap().interrupts, Some(false));
        assert_eq!(rule("vfs_write").unwrap().interrupts, Some(true));
        assert!(rule("no_such_function").is_none());
    }
}
