//! Which functions to analyse while the guest is still well, and doing so a little at a time. The
//! analysis itself is in `code/`.

use std::time::{Duration, Instant};

use guest::{GuestVirt, VirtMemory};
use repair_image::{RepairImage, Symbol};

use crate::CodeCache;

/// Most functions of the kernel, of all modules together and of one module that are analysed ahead. One
/// takes about 60 KiB and half a millisecond (measured over 777 of a 6.1 kernel).
const MAX_OF_KERNEL: usize = 1024;
const MAX_OF_MODULES: usize = 1024;
const MAX_OF_MODULE: usize = 256;
/// Packed variables of all modules together that are unpacked ahead, bytes: some ten times as many in memory.
const MAX_VARIABLES: usize = 512 << 10;

/// Kernel functions that lie on the way from an entry to a driver, without compiler suffixes. Names that
/// a kernel does not have are passed over.
const NAMES: &[&str] = &[
    // Every spinlock's count.
    "_raw_spin_lock",
    // System calls.
    "do_syscall_64",
    "x64_sys_call",
    "syscall_exit_to_user_mode",
    "exit_to_user_mode_loop",
    "exit_to_user_mode_prepare",
    "task_work_run",
    "____fput",
    "__fput",
    "__fput_sync",
    "filp_close",
    // Files.
    "do_sys_open",
    "do_sys_openat2",
    "do_filp_open",
    "path_openat",
    "do_dentry_open",
    "chrdev_open",
    "misc_open",
    "full_proxy_open",
    "seq_read",
    "seq_read_iter",
    "proc_reg_read_iter",
    "proc_reg_read",
    "proc_reg_write",
    "kernfs_fop_read_iter",
    "kernfs_fop_write_iter",
    "kernfs_seq_show",
    "sysfs_kf_write",
    "sysfs_kf_seq_show",
    "dev_attr_store",
    "dev_attr_show",
    "pipe_read",
    "pipe_write",
    "do_iter_readv_writev",
    "do_readv",
    "do_writev",
    "do_sys_poll",
    "do_select",
    "core_sys_select",
    "do_epoll_ctl",
    "do_epoll_wait",
    "do_vfs_ioctl",
    // Memory.
    "vm_mmap_pgoff",
    "do_mmap",
    "mmap_region",
    "__mmap_region",
    "__mmap_new_vma",
    "handle_mm_fault",
    "__handle_mm_fault",
    "__do_fault",
    "do_user_addr_fault",
    // Timers.
    "call_timer_fn",
    "expire_timers",
    "__run_timers",
    "__run_timer_base",
    "run_timer_softirq",
    "__hrtimer_run_queues",
    "hrtimer_interrupt",
    "hrtimer_run_softirq",
    // Soft interrupts.
    "__do_softirq",
    "handle_softirqs",
    "do_softirq",
    "__local_bh_enable_ip",
    "irq_exit_rcu",
    "__irq_exit_rcu",
    "run_ksoftirqd",
    "tasklet_action",
    "tasklet_action_common",
    "tasklet_hi_action",
    "net_rx_action",
    "__napi_poll",
    // Interrupts.
    "common_interrupt",
    "__common_interrupt",
    "handle_irq_event",
    "handle_irq_event_percpu",
    "__handle_irq_event_percpu",
    "handle_edge_irq",
    "handle_fasteoi_irq",
    "handle_level_irq",
    "irq_thread",
    "irq_thread_fn",
    // Work and threads.
    "process_one_work",
    "process_scheduled_works",
    "worker_thread",
    "rescuer_thread",
    "kthread",
    "ret_from_fork",
    "smpboot_thread_fn",
    // Modules, notifiers, the network's control path.
    "do_one_initcall",
    "do_init_module",
    "notifier_call_chain",
    "raw_notifier_call_chain",
    "blocking_notifier_call_chain",
    "atomic_notifier_call_chain",
    "call_netdevice_notifiers_info",
    "dev_change_flags",
    "__dev_change_flags",
    "__dev_notify_flags",
    "dev_ioctl",
    "dev_ifsioc",
    "sock_ioctl",
    "sock_do_ioctl",
    // Exceptions, as far as they report one: only where there is no call-frame information.
    "page_fault_oops",
    "__bad_area_nosemaphore",
    "bad_area_nosemaphore",
    "kernelmode_fixup_or_oops",
    "handle_bug",
    "do_error_trap",
    "do_trap",
    "die",
    "die_addr",
];

/// The same, by how a name starts.
const PREFIXES: &[&str] = &["vfs_", "ksys_", "__x64_sys_", "__do_sys_", "sysvec_", "exc_"];

/// Analyses functions ahead of a crash for about as long as `budget` says: those of modules, then those
/// of the kernel that usually lie between an entry and a driver. Goes on where the last call ended; says
/// whether all is done. The first call also lists them, which walks over the kernel's symbols once.
///
/// The guest may run meanwhile: a function whose code has changed by the time of the crash is analysed
/// again then.
pub fn warm(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    cache: &mut CodeCache,
    budget: Duration,
) -> bool {
    let started = Instant::now();
    let mut wanted = cache.take_wanted().unwrap_or_else(|| {
        unpack(image);
        list(image)
    });
    while started.elapsed() < budget {
        let Some(at) = wanted.pop() else { break };
        cache.warm(image, memory, at);
        // These unpack the part of a table that they look in.
        let _ = (image.source(at), image.unwind_row(at));
    }
    let done = wanted.is_empty();
    cache.put_wanted(wanted);
    done
}

/// Has prototypes and variables unpacked, which a crash would otherwise wait for: 5 ms for a small driver.
fn unpack(image: &RepairImage) {
    image.kernel.unpack_ahead(0);
    let mut left = MAX_VARIABLES;
    for module in &image.modules {
        left = left.saturating_sub(module.knowledge.unpack_ahead(left));
    }
}

/// What is to be analysed, last one first.
fn list(image: &RepairImage) -> Vec<GuestVirt> {
    let of_modules = image.modules.iter().flat_map(|module| {
        let functions = module.knowledge.functions().map(|symbol| GuestVirt(symbol.at.0));
        functions.filter(|&at| module.is_text(at)).take(MAX_OF_MODULE)
    });
    let usual = image.kernel.functions().filter(is_usual).map(|symbol| image.place(symbol.at));
    // The kernel's list begins with the module that was loaded last.
    usual.take(MAX_OF_KERNEL).chain(of_modules.take(MAX_OF_MODULES)).collect()
}

fn is_usual(symbol: &Symbol<'_>) -> bool {
    // `f.cold` comes with f, whose own suffixes (`.isra.0`, `.constprop.0`) depend on the build.
    let base = symbol.name.split('.').next().unwrap_or_default();
    let prefixed = || PREFIXES.iter().any(|prefix| base.starts_with(prefix));
    !symbol.name.contains(".cold") && (NAMES.contains(&base) || prefixed())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::code::fixture::{self, TEXT};

    #[test]
    fn goes_on_where_it_ended_until_all_is_done() {
        let (mut image, machine) = fixture::kernel();
        image.modules = vec![repair_image::Module {
            name: "m".to_owned(),
            at: GuestVirt(0),
            text: vec![GuestVirt(TEXT)..GuestVirt(TEXT + 0x100)],
            ranges: Vec::new(),
            sections: Vec::new(),
            knowledge: Arc::clone(&image.kernel),
        }];
        let space = machine.space();
        let mut cache = CodeCache::new();
        assert!(!warm(&image, &space, &mut cache, Duration::ZERO));
        assert!(cache.is_empty());
        assert!(warm(&image, &space, &mut cache, Duration::from_secs(60)));
        // `_raw_spin_lock`, and the module's seven, of which one is another's cold part.
        assert_eq!(cache.len(), 8);
        assert!(warm(&image, &space, &mut cache, Duration::ZERO));
    }

    #[test]
    fn suffixes_and_prefixes() {
        let usual = |name| {
            let kind = repair_image::SymbolKind::Function;
            is_usual(&Symbol { name, at: guest::LinkAddr(0), size: 1, kind })
        };
        assert!(usual("tasklet_action_common.isra.0") && usual("vfs_write") && usual("kthread"));
        assert!(!usual("kthread.cold") && !usual("kthreadd") && !usual("tcp_ack"));
    }
}
