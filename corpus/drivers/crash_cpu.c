// SPDX-License-Identifier: GPL-2.0-only
/*
 * Callbacks when a processor comes and goes, in the thread that the kernel has for it, and probes of a
 * function's return. Other callbacks are in crash_async.c.
 */
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/kprobes.h>
#include <linux/module.h>

#include "crash_arm.h"

static int state, prepare_state;
static bool told[NR_CPUS];

static int processor_comes(unsigned int cpu)
{
	if (due("cpu-prepare"))
		return READ_ONCE(settings->each[0]); /* CRASH: cpu-prepare */
	return 0;
}

static int processor_came(unsigned int cpu)
{
	if (due("cpu-online"))
		return READ_ONCE(settings->each[0]); /* CRASH: cpu-online */
	told[cpu] = true;
	return 0;
}

static int processor_goes(unsigned int cpu)
{
	if (due("cpu-offline"))
		return READ_ONCE(settings->each[0]); /* CRASH: cpu-offline */
	told[cpu] = false;
	return 0;
}

/* What is to be called with each return is noted at the entry. */
static int on_entry(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	if (due("kretprobe-entry"))
		return READ_ONCE(settings->each[0]); /* CRASH: kretprobe-entry */
	return 0;
}

static int on_return(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	if (due("kretprobe"))
		return READ_ONCE(settings->each[0]); /* CRASH: kretprobe */
	return 0;
}

static struct kretprobe probe = {
	.kp.symbol_name = "vfs_fsync_range",
	.entry_handler = on_entry,
	.handler = on_return,
	.maxactive = 8,
};

/* Each processor that is there is one that the driver was told of. */
static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();
	unsigned int cpu;

	cpus_read_lock();
	for_each_online_cpu(cpu)
		if (!wrong && !told[cpu])
			wrong = "processor-unknown";
	cpus_read_unlock();
	return crash_verdict(crash_unarmed(wrong), to, count, at);
}

CRASH_DEVICE(control, "crash_cpu", control_read, crash_arm_write);

static int __init hotplug_init(void)
{
	int error;

	prepare_state = cpuhp_setup_state_nocalls(CPUHP_BP_PREPARE_DYN, "crash_cpu:prepare", processor_comes,
						  NULL);
	if (prepare_state < 0)
		return prepare_state;
	state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "crash_cpu:online", processor_came, processor_goes);
	error = state < 0 ? state : register_kretprobe(&probe);
	if (!error)
		error = misc_register(&control);
	return error;
}

static void __exit hotplug_exit(void)
{
	misc_deregister(&control);
	unregister_kretprobe(&probe);
	cpuhp_remove_state(state);
	cpuhp_remove_state_nocalls(prepare_state);
}

module_init(hotplug_init);
module_exit(hotplug_exit);
MODULE_DESCRIPTION("Crash corpus: faults while processors come and go");
MODULE_LICENSE("GPL");
