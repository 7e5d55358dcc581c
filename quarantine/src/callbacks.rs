//! Callers of drivers' callbacks that are no operations of an object: probes, hooks, wake-ups, module
//! loading. The same kind of table as in `boundaries.rs`, which has the operations and looks a name up in
//! both.

use crate::boundaries::{Fixed, Rule, fixed, typed};

/// Functions without compiler suffixes; 6.1 to 6.12 unless a line says otherwise.
pub(crate) const RULES: &[Rule] = &[
    // arch/x86/kernel/kprobes: any other value of a pre-handler means that it has changed where the
    // probed code goes on, and the probe is then not ended.
    fixed("kprobe_ftrace_handler", PROBE_GOES_ON, None),
    fixed("kprobe_int3_handler", PROBE_GOES_ON, None),
    fixed("aggr_pre_handler", PROBE_GOES_ON, None),
    fixed("opt_pre_handler", PROBE_GOES_ON, None),
    fixed("optimized_callback", PROBE_GOES_ON, None),
    // kernel/kprobes.c: an entry handler that fails takes the probe off this one return.
    fixed("pre_handler_kretprobe", Fixed::Number(1, "1", "this return is not probed"), None),
    fixed("kretprobe_rethook_handler", Fixed::Number(0, "0", "the result is not looked at"), None),
    // kernel/sched/wait.c: a negative value ends the walk, and the waiters behind would sleep on.
    fixed(
        "__wake_up_common",
        Fixed::Number(0, "0", "nobody was woken by this entry; the others are asked"),
        Some(false),
    ),
    // net/netfilter/core.c.
    fixed("nf_hook_slow", Fixed::Number(0, "NF_DROP", "the packet is dropped, as by a rule"), None),
    // block/blk-mq.c: the request waits for as long again.
    typed("blk_mq_rq_timed_out", &[("blk_mq_ops", "timeout")]),
    typed("blk_mq_handle_expired", &[("blk_mq_ops", "timeout")]),
    typed("blk_mq_check_expired", &[("blk_mq_ops", "timeout")]),
    // block/bdev.c, block/ioctl.c. Since v6.5 blkdev_put_whole() and bdev_release(), before it blkdev_put_whole().
    typed("blkdev_get_whole", &[("block_device_operations", "open")]),
    typed("blkdev_put_whole", &[("block_device_operations", "release")]),
    typed("blkdev_ioctl", &[("block_device_operations", "ioctl")]),
    typed("compat_blkdev_ioctl", &[("block_device_operations", "compat_ioctl")]),
    // kernel/cpu.c: an error of what is called on the way up takes the steps before it back.
    typed("cpuhp_invoke_callback", &[("cpuhp_step", "startup.single")]),
    // kernel/async.c.
    fixed("async_run_entry_fn", Fixed::Nothing, Some(true)),
    // kernel/rcu/srcutree.c.
    fixed("srcu_invoke_callbacks", Fixed::Nothing, Some(true)),
    // kernel/smpboot.c.
    fixed("smpboot_thread_fn", Fixed::Nothing, Some(true)),
    // init/main.c: after an error do_init_module() frees the module's memory, to which whatever was
    // registered before the fault still points.
    fixed(
        "do_one_initcall",
        Fixed::Never("the module's memory would be freed, and what it has registered points there"),
        None,
    ),
    // kernel/module/main.c: what the exit function has not taken back yet points into the memory that is
    // freed next.
    fixed("__do_sys_delete_module", EXIT, None),
    fixed("__se_sys_delete_module", EXIT, None),
    fixed("__x64_sys_delete_module", EXIT, None),
    fixed("__ia32_sys_delete_module", EXIT, None),
    // block/blk-core.c: submit_bio() of a driver returns nothing; a bio that nobody ends is waited for
    // without end.
    fixed("__submit_bio", BIO, None),
    fixed("__submit_bio_noacct", BIO, None),
    fixed("submit_bio_noacct_nocheck", BIO, None),
    // block/bio.c, block/blk-mq.c: who is told here that I/O is over has to tell others.
    fixed("bio_endio", BIO, None),
    fixed("blk_complete_reqs", BIO, None),
    fixed("blk_mq_complete_request", BIO, None),
    fixed("blk_mq_complete_request_remote", BIO, None),
    fixed("__blk_mq_complete_request_remote", BIO, None),
    fixed("__blk_mq_end_request", BIO, None),
    // drivers/base/dd.c, drivers/base/bus.c.
    typed("device_remove", &[("bus_type", "remove")]),
    typed("drv_attr_store", &[("driver_attribute", "store")]),
    typed("drv_attr_show", &[("driver_attribute", "show")]),
    typed("bus_attr_store", &[("bus_attribute", "store")]),
    typed("bus_attr_show", &[("bus_attribute", "show")]),
    typed("class_attr_store", &[("class_attribute", "store")]),
    typed("class_attr_show", &[("class_attribute", "show")]),
];

const PROBE_GOES_ON: Fixed = Fixed::Number(0, "0", "the probed code goes on where it was");
const EXIT: Fixed = Fixed::Never(
    "the module's memory would be freed, and what it has left registered points there",
);
const BIO: Fixed = Fixed::Never("the I/O would never end, and it is waited for without end");

/// Functions that hand a packet to a network driver, net/core/dev.c: bottom halves are off there
/// (`rcu_read_lock_bh()`, `local_bh_disable()`), and a lock of the queue is held unless the device does its own
/// locking (`HARD_TX_LOCK()`). Which of the two, `transmit.rs` finds out.
const SENDERS: &[&str] = &["dev_hard_start_xmit", "__dev_direct_xmit", "netdev_start_xmit"];

/// Whether a function hands packets to a network driver.
pub(crate) fn sends_packets(function: &str) -> bool {
    SENDERS.contains(&function)
}

#[cfg(test)]
mod tests {
    use super::sends_packets;
    use crate::boundaries::{Fixed, rule};

    #[test]
    fn senders_are_known() {
        assert!(sends_packets("dev_hard_start_xmit"));
        assert!(!sends_packets("vfs_write"));
    }

    #[test]
    fn wakers_and_probes_are_told_nothing_unusual() {
        for function in ["kprobe_ftrace_handler", "__wake_up_common", "nf_hook_slow"] {
            let found = rule(function).and_then(|rule| rule.fixed);
            assert!(matches!(found, Some(Fixed::Number(0, ..))), "{function}: {found:?}");
        }
    }

    #[test]
    fn a_module_half_registered_is_not_freed() {
        for function in ["do_one_initcall", "__do_sys_delete_module"] {
            let found = rule(function).and_then(|rule| rule.fixed);
            assert!(matches!(found, Some(Fixed::Never(_))), "{function}: {found:?}");
        }
    }
}
