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

/// Preempt counts with which a function calls drivers in task context, where that is part of its contract.
const PREEMPT_COUNTS: &[(&str, &[i64])] = &[
    // net/core/dev.c: bottom halves are off (rcu_read_lock_bh(), local_bh_disable()), and the queue's lock
    // is held unless the device does its own locking (HARD_TX_LOCK()).
    ("dev_hard_start_xmit", &[0x200, 0x201]),
    ("__dev_direct_xmit", &[0x200, 0x201]),
    ("netdev_start_xmit", &[0x200, 0x201]),
];

/// The preempt counts with which `function` may call a driver; empty if that is not known.
pub(crate) fn preempt_counts(function: &str) -> &'static [i64] {
    PREEMPT_COUNTS.iter().find(|(name, _)| *name == function).map_or(&[], |(_, counts)| counts)
}

#[cfg(test)]
mod tests {
    use super::preempt_counts;
    use crate::boundaries::{Fixed, rule};

    #[test]
    fn packets_are_sent_with_bottom_halves_off() {
        assert!(preempt_counts("dev_hard_start_xmit").contains(&0x201));
        assert!(preempt_counts("vfs_write").is_empty());
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
