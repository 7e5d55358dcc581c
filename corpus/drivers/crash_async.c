// SPDX-License-Identifier: GPL-2.0-only
/*
 * Callbacks that the core calls later or from elsewhere: notifiers, probes, RCU callbacks, the kinds of
 * work, timers and threads that crash_work.c and crash_timer.c do not have, calls on another processor.
 */
#include <linux/async.h>
#include <linux/hrtimer.h>
#include <linux/irq_work.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/shrinker.h>
#include <linux/smp.h>
#include <linux/smpboot.h>
#include <linux/srcu.h>
#include <linux/timer.h>
#include <linux/tracepoint.h>
#include <linux/version.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "crash_arm.h"

static unsigned int done;               /* callbacks that came through */

/* The one mistake, at a line of its own for each callback. */
#define MISTAKE(n) WRITE_ONCE(settings->each[n], 1)

static int on_event(struct notifier_block *block, unsigned long event, void *data)
{
	if (due("notifier-blocking"))
		MISTAKE(0); /* CRASH: notifier-blocking */
	if (due("notifier-atomic"))
		MISTAKE(1); /* CRASH: notifier-atomic */
	if (due("notifier-srcu"))
		MISTAKE(2); /* CRASH: notifier-srcu */
	return NOTIFY_OK;
}

static BLOCKING_NOTIFIER_HEAD(blocking_chain);
static ATOMIC_NOTIFIER_HEAD(atomic_chain);
static struct srcu_notifier_head srcu_chain;
static struct notifier_block blocking_block = { .notifier_call = on_event };
static struct notifier_block atomic_block = { .notifier_call = on_event };
static struct notifier_block srcu_block = { .notifier_call = on_event };

static int on_enter(struct kprobe *probe, struct pt_regs *regs)
{
	if (due("kprobe"))
		MISTAKE(0); /* CRASH: kprobe */
	return 0;
}

static struct kprobe entry_probe = { .symbol_name = "vfs_fsync_range", .pre_handler = on_enter };

static void on_rename(void *data, struct task_struct *task, const char *name)
{
	if (due("tracepoint"))
		MISTAKE(0); /* CRASH: tracepoint */
}

static struct tracepoint *rename_point;

static void find_point(struct tracepoint *point, void *data)
{
	if (!strcmp(point->name, "task_rename"))
		rename_point = point;
}

static void on_grace(struct rcu_head *head)
{
	kfree(head);
	if (due("call-rcu"))
		MISTAKE(0); /* CRASH: call-rcu */
	WRITE_ONCE(done, done + 1);
}

DEFINE_STATIC_SRCU(domain);

static void on_srcu_grace(struct rcu_head *head)
{
	kfree(head);
	if (due("call-srcu"))
		MISTAKE(0); /* CRASH: call-srcu */
	WRITE_ONCE(done, done + 1);
}

static struct workqueue_struct *unbound_queue, *ordered_queue;

static void on_delayed(struct work_struct *work)
{
	if (due("delayed-work"))
		MISTAKE(0); /* CRASH: delayed-work */
	WRITE_ONCE(done, done + 1);
}

static void on_unbound(struct work_struct *work)
{
	if (due("work-unbound"))
		MISTAKE(0); /* CRASH: work-unbound */
	WRITE_ONCE(done, done + 1);
}

static void on_ordered(struct work_struct *work)
{
	if (due("work-ordered"))
		MISTAKE(0); /* CRASH: work-ordered */
	WRITE_ONCE(done, done + 1);
}

static DECLARE_DELAYED_WORK(delayed_work, on_delayed);
static DECLARE_WORK(unbound_work, on_unbound);
static DECLARE_WORK(ordered_work, on_ordered);

/* Queues itself before it faults: it runs again, and is all right then. */
static void on_requeue(struct work_struct *work)
{
	if (!crash_armed[0])
		return;
	schedule_work(work);
	if (due("work-requeue"))
		MISTAKE(0); /* CRASH: work-requeue */
	WRITE_ONCE(done, done + 1);
}

static DECLARE_WORK(requeue_work, on_requeue);

static struct kthread_worker *worker;

static void on_kthread_work(struct kthread_work *work)
{
	if (due("kthread-worker"))
		MISTAKE(0); /* CRASH: kthread-worker */
	WRITE_ONCE(done, done + 1);
}

static DEFINE_KTHREAD_WORK(kthread_work, on_kthread_work);

static void on_irq_work(struct irq_work *work)
{
	if (due("irq-work"))
		MISTAKE(0); /* CRASH: irq-work */
	WRITE_ONCE(done, done + 1);
}

static DEFINE_IRQ_WORK(irq_work, on_irq_work);

static void on_call(void *data)
{
	if (due("ipi"))
		MISTAKE(0); /* CRASH: ipi */
	if (due("ipi-self"))
		MISTAKE(1); /* CRASH: ipi-self */
	if (due("ipi-many"))
		MISTAKE(2); /* CRASH: ipi-many */
	WRITE_ONCE(done, done + 1);
}

static enum hrtimer_restart on_soft_timer(struct hrtimer *timer)
{
	if (due("hrtimer-soft"))
		MISTAKE(0); /* CRASH: hrtimer-soft */
	WRITE_ONCE(done, done + 1);
	return HRTIMER_NORESTART;
}

static struct hrtimer soft_timer;

static void on_irqsafe(struct timer_list *timer)
{
	if (due("timer-irqsafe"))
		MISTAKE(0); /* CRASH: timer-irqsafe */
	WRITE_ONCE(done, done + 1);
}

static struct timer_list irqsafe_timer;

static DECLARE_WAIT_QUEUE_HEAD(waiters);

static int on_wake(struct wait_queue_entry *entry, unsigned int mode, int flags, void *key)
{
	if (due("wait-function"))
		MISTAKE(0); /* CRASH: wait-function */
	return 0;
}

static struct wait_queue_entry wait_entry;

static void on_async(void *data, async_cookie_t cookie)
{
	if (due("async"))
		MISTAKE(0); /* CRASH: async */
	WRITE_ONCE(done, done + 1);
}

static ASYNC_DOMAIN_EXCLUSIVE(async_domain);

static unsigned long on_count(struct shrinker *shrinker, struct shrink_control *control)
{
	if (due("shrinker-count"))
		return READ_ONCE(settings->limit); /* CRASH: shrinker-count */
	return 1;
}

static unsigned long on_scan(struct shrinker *shrinker, struct shrink_control *control)
{
	if (due("shrinker-scan"))
		return READ_ONCE(settings->limit); /* CRASH: shrinker-scan */
	return SHRINK_STOP;
}

static struct shrinker *shrinker;

static int cache_register(void)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	shrinker = shrinker_alloc(0, "crash_async");
	if (!shrinker)
		return -ENOMEM;
#else
	static struct shrinker only;

	shrinker = &only;
#endif
	shrinker->count_objects = on_count;
	shrinker->scan_objects = on_scan;
	shrinker->seeks = DEFAULT_SEEKS;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	shrinker_register(shrinker);
	return 0;
#else
	return register_shrinker(shrinker, "crash_async");
#endif
}

static void cache_unregister(void)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	shrinker_free(shrinker);
#else
	unregister_shrinker(shrinker);
#endif
}

static DEFINE_PER_CPU(struct task_struct *, percpu_task);
static DEFINE_PER_CPU(bool, percpu_wanted);

static int percpu_should_run(unsigned int cpu)
{
	return per_cpu(percpu_wanted, cpu);
}

static void on_percpu(unsigned int cpu)
{
	per_cpu(percpu_wanted, cpu) = false;
	if (due("smpboot"))
		MISTAKE(0); /* CRASH: smpboot */
	WRITE_ONCE(done, done + 1);
}

static struct smp_hotplug_thread percpu_threads = {
	.store = &percpu_task,
	.thread_should_run = percpu_should_run,
	.thread_fn = on_percpu,
	.thread_comm = "crash/%u",
};

/* Starts every callback that is not called by somebody else; all but the armed one are harmless. */
static void start_all(void)
{
	struct rcu_head *head = kzalloc(sizeof(*head), GFP_KERNEL);
	struct rcu_head *srcu_head = kzalloc(sizeof(*srcu_head), GFP_KERNEL);

	blocking_notifier_call_chain(&blocking_chain, 1, NULL);
	atomic_notifier_call_chain(&atomic_chain, 1, NULL);
	srcu_notifier_call_chain(&srcu_chain, 1, NULL);
	if (head)
		call_rcu(head, on_grace);
	if (srcu_head)
		call_srcu(&domain, srcu_head, on_srcu_grace);
	schedule_delayed_work(&delayed_work, msecs_to_jiffies(20));
	queue_work(unbound_queue, &unbound_work);
	queue_work(ordered_queue, &ordered_work);
	kthread_queue_work(worker, &kthread_work);
	irq_work_queue(&irq_work);
	hrtimer_start(&soft_timer, ms_to_ktime(20), HRTIMER_MODE_REL_SOFT);
	mod_timer(&irqsafe_timer, jiffies + msecs_to_jiffies(20));
	wake_up(&waiters);
	async_schedule_domain(on_async, NULL, &async_domain);
	per_cpu(percpu_wanted, 0) = true;
	wake_up_process(per_cpu(percpu_task, 0));
}

static bool busy;

/* An idle processor that polls takes a call from its idle loop, without an interrupt: so let it not be idle. */
static int be_busy(void *data)
{
	WRITE_ONCE(busy, true);
	while (!kthread_should_stop())
		cpu_relax();
	WRITE_ONCE(busy, false);
	return 0;
}

static void call_others(bool many)
{
	struct task_struct *task;
	int other;

	migrate_disable();
	other = cpumask_any_but(cpu_online_mask, raw_smp_processor_id());
	task = other < nr_cpu_ids ?
		kthread_create_on_cpu(be_busy, NULL, other, "crash_busy/%u") : NULL;
	if (IS_ERR_OR_NULL(task))
		goto out;
	wake_up_process(task);
	while (!READ_ONCE(busy))
		cpu_relax();
	preempt_disable();
	if (many)
		smp_call_function_many(cpu_online_mask, on_call, NULL, true);
	else
		smp_call_function_single(other, on_call, NULL, 1);
	preempt_enable();
	kthread_stop(task);
out:
	migrate_enable();
}

/* Calls a function on the other processor, on this one, or on all but this one. */
static void call_processors(const char *name)
{
	if (strcmp(name, "ipi-self")) {
		call_others(!strcmp(name, "ipi-many"));
		return;
	}
	smp_call_function_single(get_cpu(), on_call, NULL, 1);
	put_cpu();
}

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	/* Armed for a callback that others call. */
	if (!strncmp(name, "arm:", 4)) {
		crash_set(name + 4);
		return count;
	}
	crash_set(name);
	if (!strcmp(name, "work-requeue")) {
		schedule_work(&requeue_work);
		return count;
	}
	if (strncmp(name, "ipi", 3))
		start_all();
	else
		call_processors(name);
	return count;
}

/* Everything that can be waited for must still come to an end, and new callbacks must run. */
static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();
	unsigned int before = READ_ONCE(done);

	if (!wrong) {
		start_all();
		msleep(60);
		flush_delayed_work(&delayed_work);
		flush_work(&unbound_work);
		flush_work(&ordered_work);
		flush_work(&requeue_work);
		kthread_flush_worker(worker);
		irq_work_sync(&irq_work);
		async_synchronize_full_domain(&async_domain);
		rcu_barrier();
		srcu_barrier(&domain);
		if (crash_armed[0])
			wrong = "did-not-fault";
		else if (READ_ONCE(done) - before < 9)
			wrong = "callbacks-missing";
	}
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations control_operations = {
	.owner = THIS_MODULE,
	.read = control_read,
	.write = control_write,
};

static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_async",
	.fops = &control_operations,
	.mode = 0666,
};

/* No way back: what was registered stays, and a lab guest without all of it is no lab guest. */
static int __init callbacks_init(void)
{
	int error;

	unbound_queue = alloc_workqueue("crash_unbound", WQ_UNBOUND, 0);
	ordered_queue = alloc_ordered_workqueue("crash_ordered", 0);
	worker = kthread_create_worker(0, "crash_worker");
	if (!unbound_queue || !ordered_queue || IS_ERR(worker))
		return -ENOMEM;
	hrtimer_init(&soft_timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_SOFT);
	soft_timer.function = on_soft_timer;
	timer_setup(&irqsafe_timer, on_irqsafe, TIMER_IRQSAFE);
	init_waitqueue_func_entry(&wait_entry, on_wake);
	add_wait_queue(&waiters, &wait_entry);
	srcu_init_notifier_head(&srcu_chain);
	blocking_notifier_chain_register(&blocking_chain, &blocking_block);
	atomic_notifier_chain_register(&atomic_chain, &atomic_block);
	srcu_notifier_chain_register(&srcu_chain, &srcu_block);
	for_each_kernel_tracepoint(find_point, NULL);
	error = rename_point ? tracepoint_probe_register(rename_point, on_rename, NULL) : -ENOENT;
	if (!error)
		error = register_kprobe(&entry_probe);
	if (!error)
		error = smpboot_register_percpu_thread(&percpu_threads);
	if (!error)
		error = cache_register();
	return error ? error : misc_register(&control);
}

static void __exit callbacks_exit(void)
{
	misc_deregister(&control);
	cache_unregister();
	smpboot_unregister_percpu_thread(&percpu_threads);
	unregister_kprobe(&entry_probe);
	tracepoint_probe_unregister(rename_point, on_rename, NULL);
	tracepoint_synchronize_unregister();
	srcu_notifier_chain_unregister(&srcu_chain, &srcu_block);
	atomic_notifier_chain_unregister(&atomic_chain, &atomic_block);
	blocking_notifier_chain_unregister(&blocking_chain, &blocking_block);
	srcu_cleanup_notifier_head(&srcu_chain);
	remove_wait_queue(&waiters, &wait_entry);
	del_timer_sync(&irqsafe_timer);
	hrtimer_cancel(&soft_timer);
	cancel_delayed_work_sync(&delayed_work);
	cancel_work_sync(&requeue_work);
	kthread_destroy_worker(worker);
	destroy_workqueue(ordered_queue);
	destroy_workqueue(unbound_queue);
	async_synchronize_full_domain(&async_domain);
	irq_work_sync(&irq_work);
	rcu_barrier();
	srcu_barrier(&domain);
}

module_init(callbacks_init);
module_exit(callbacks_exit);
MODULE_DESCRIPTION("Crash corpus: faults in callbacks of every kind");
MODULE_LICENSE("GPL");
