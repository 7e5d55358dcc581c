// SPDX-License-Identifier: GPL-2.0-only
/*
 * A mailbox whose handlers wait for an answer that never comes, or for locks that they hold themselves: nothing
 * faults, but a processor makes no progress any more. The self-check tells whether every lock can be taken,
 * whether timers still come through, and whether every reader of RCU ends.
 */
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/timer.h>

#include "crash.h"

struct mailbox {
	int answered;                   /* never set: the mistake */
	spinlock_t fast, other;
	struct mutex lock, second;
	struct rw_semaphore sem, twin;
	atomic_t partners;
	struct timer_list timer, probe;
	struct completion probed;
};

static struct mailbox box = {
	.fast = __SPIN_LOCK_UNLOCKED(box.fast),
	.other = __SPIN_LOCK_UNLOCKED(box.other),
	.lock = __MUTEX_INITIALIZER(box.lock),
	.second = __MUTEX_INITIALIZER(box.second),
	.sem = __RWSEM_INITIALIZER(box.sem),
	.twin = __RWSEM_INITIALIZER(box.twin),
};

static long poll_answer(struct mailbox *b)
{
	while (!READ_ONCE(b->answered)) /* CRASH: loop */
		;
	return 0;
}

static long poll_with_irqs_off(struct mailbox *b)
{
	unsigned long flags;

	local_irq_save(flags);
	while (!READ_ONCE(b->answered)) /* CRASH: loop-irqs-off */
		;
	local_irq_restore(flags);
	return 0;
}

static long poll_under_spinlock(struct mailbox *b)
{
	spin_lock(&b->fast);
	while (!READ_ONCE(b->answered)) /* CRASH: loop-spinlock */
		;
	spin_unlock(&b->fast);
	return 0;
}

static long poll_under_mutex(struct mailbox *b)
{
	mutex_lock(&b->lock);
	while (!READ_ONCE(b->answered)) /* CRASH: loop-mutex */
		;
	mutex_unlock(&b->lock);
	return 0;
}

/* What stock kernels tell as an RCU stall, once for the reader and once for the processor. */
static long poll_as_reader(struct mailbox *b)
{
	rcu_read_lock();
	while (!READ_ONCE(b->answered)) /* CRASH: loop-rcu */
		;
	rcu_read_unlock();
	return 0;
}

static long poll_as_reader_without_preemption(struct mailbox *b)
{
	preempt_disable();
	rcu_read_lock();
	while (!READ_ONCE(b->answered)) /* CRASH: loop-rcu-preempt-off */
		;
	rcu_read_unlock();
	preempt_enable();
	return 0;
}

static long wait_for_spinlock(struct mailbox *b)
{
	spin_lock(&b->fast);
	spin_unlock(&b->fast);
	return 0;
}

static long wait_for_mutex(struct mailbox *b)
{
	mutex_lock(&b->lock);
	mutex_unlock(&b->lock);
	return 0;
}

static void poll_on_timer(struct timer_list *timer)
{
	while (!READ_ONCE(box.answered)) /* CRASH: loop-timer */
		;
}

static long arm_timer(struct mailbox *b)
{
	b->timer.expires = jiffies + msecs_to_jiffies(100);
	add_timer_on(&b->timer, raw_smp_processor_id());
	return 0;
}

static int poll_in_thread(void *data)
{
	struct mailbox *b = data;

	while (!READ_ONCE(b->answered)) /* CRASH: loop-kthread */
		;
	return 0;
}

static long spawn_thread(struct mailbox *b)
{
	struct task_struct *thread;

	thread = kthread_create(poll_in_thread, b, "crash_hang");
	if (IS_ERR(thread))
		return PTR_ERR(thread);
	kthread_bind(thread, raw_smp_processor_id());
	wake_up_process(thread);
	return 0;
}

static long spinlock_twice(struct mailbox *b)
{
	spin_lock(&b->fast);
	spin_lock(&b->fast); /* CRASH: spinlock-twice */
	b->answered = 0;
	spin_unlock(&b->fast);
	spin_unlock(&b->fast);
	return 0;
}

static noinline long nested_irqsave(struct mailbox *b)
{
	unsigned long flags;

	spin_lock_irqsave(&b->fast, flags); /* CRASH: irqsave-twice */
	b->answered = 0;
	spin_unlock_irqrestore(&b->fast, flags);
	return 1;
}

static long irqsave_twice(struct mailbox *b)
{
	unsigned long flags;
	long sum;

	spin_lock_irqsave(&b->fast, flags);
	sum = nested_irqsave(b) - 1;
	spin_unlock_irqrestore(&b->fast, flags);
	return sum;
}

/* Returns once both of a pair are here. */
static void meet(struct mailbox *b)
{
	int patience = 10000;

	atomic_inc(&b->partners);
	while (atomic_read(&b->partners) < 2 && patience-- > 0)
		mdelay(1);
}

static noinline long both_spinlocks(struct mailbox *b, spinlock_t *first, spinlock_t *second)
{
	spin_lock(first);
	meet(b);
	spin_lock(second); /* CRASH: spinlock-abba */
	b->answered = 0;
	spin_unlock(second);
	spin_unlock(first);
	return 0;
}

static long spinlocks_in_order(struct mailbox *b)
{
	return both_spinlocks(b, &b->fast, &b->other);
}

static long spinlocks_reversed(struct mailbox *b)
{
	return both_spinlocks(b, &b->other, &b->fast);
}

/* The same without keeping a processor. */
static void rest_until_met(struct mailbox *b)
{
	int patience = 1000;

	atomic_inc(&b->partners);
	while (atomic_read(&b->partners) < 2 && patience-- > 0)
		msleep(1);
}

static long mutex_twice(struct mailbox *b)
{
	mutex_lock(&b->lock);
	mutex_lock(&b->lock); /* CRASH: mutex-twice */
	b->answered = 0;
	mutex_unlock(&b->lock);
	mutex_unlock(&b->lock);
	return 0;
}

/* The last to lock: its partner sleeps already. */
static long mutexes_in_order(struct mailbox *b)
{
	mutex_lock(&b->lock);
	rest_until_met(b);
	msleep(200);
	mutex_lock(&b->second); /* CRASH: mutex-abba */
	b->answered = 0;
	mutex_unlock(&b->second);
	mutex_unlock(&b->lock);
	return 0;
}

static long mutexes_reversed(struct mailbox *b)
{
	mutex_lock(&b->second);
	rest_until_met(b);
	mutex_lock(&b->lock);
	b->answered = 0;
	mutex_unlock(&b->lock);
	mutex_unlock(&b->second);
	return 0;
}

static long write_twice(struct mailbox *b)
{
	down_write(&b->sem);
	down_write(&b->sem); /* CRASH: rwsem-twice */
	b->answered = 0;
	up_write(&b->sem);
	up_write(&b->sem);
	return 0;
}

static long read_what_it_writes(struct mailbox *b)
{
	down_write(&b->sem);
	down_read(&b->sem); /* CRASH: rwsem-write-read */
	b->answered = 0;
	up_read(&b->sem);
	up_write(&b->sem);
	return 0;
}

static long write_what_it_reads(struct mailbox *b)
{
	down_read(&b->sem);
	down_write(&b->sem); /* CRASH: rwsem-read-write */
	b->answered = 0;
	up_write(&b->sem);
	up_read(&b->sem);
	return 0;
}

static long writers_in_order(struct mailbox *b)
{
	down_write(&b->sem);
	rest_until_met(b);
	msleep(200);
	down_write(&b->twin); /* CRASH: rwsem-abba */
	b->answered = 0;
	up_write(&b->twin);
	up_write(&b->sem);
	return 0;
}

static long writers_reversed(struct mailbox *b)
{
	down_write(&b->twin);
	rest_until_met(b);
	down_write(&b->sem);
	b->answered = 0;
	up_write(&b->sem);
	up_write(&b->twin);
	return 0;
}

/* Legitimate: long, in one call, without a break for four seconds; then with breaks. */
static long work_hard(struct mailbox *b)
{
	int i;

	for (i = 0; i < 4000; i++)
		mdelay(1);
	for (i = 0; i < 8000; i++) {
		mdelay(1);
		cond_resched();
	}
	return 0;
}

static const struct {
	const char *name;
	long (*run)(struct mailbox *b);
} entries[] = {
	{ "loop", poll_answer },
	{ "loop-irqs-off", poll_with_irqs_off },
	{ "loop-spinlock", poll_under_spinlock },
	{ "loop-mutex", poll_under_mutex },
	{ "loop-rcu", poll_as_reader },
	{ "loop-rcu-preempt-off", poll_as_reader_without_preemption },
	{ "wait-spinlock", wait_for_spinlock },
	{ "wait-mutex", wait_for_mutex },
	{ "loop-timer", arm_timer },
	{ "loop-kthread", spawn_thread },
	{ "spinlock-twice", spinlock_twice },
	{ "irqsave-twice", irqsave_twice },
	{ "spinlock-abba", spinlocks_in_order },
	{ "spinlock-baab", spinlocks_reversed },
	{ "mutex-twice", mutex_twice },
	{ "mutex-abba", mutexes_in_order },
	{ "mutex-baab", mutexes_reversed },
	{ "rwsem-twice", write_twice },
	{ "rwsem-write-read", read_what_it_writes },
	{ "rwsem-read-write", write_what_it_reads },
	{ "rwsem-abba", writers_in_order },
	{ "rwsem-baab", writers_reversed },
	{ "busy", work_hard },
};

static ssize_t mailbox_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);
	int n;

	if (error)
		return error;
	for (n = 0; n < ARRAY_SIZE(entries); n++) {
		if (!strcmp(entries[n].name, name))
			return entries[n].run(&box) < 0 ? -EIO : count;
	}
	return -EINVAL;
}

static void probe_fired(struct timer_list *timer)
{
	complete(&box.probed);
}

/* NULL, or what does not work any more. */
static const char *lost(struct mailbox *b)
{
	if (!crash_trylock(spin_trylock(&b->fast)))
		return "spinlock";
	spin_unlock(&b->fast);
	if (!crash_trylock(spin_trylock(&b->other)))
		return "other-spinlock";
	spin_unlock(&b->other);
	if (!crash_trylock(mutex_trylock(&b->lock)))
		return "mutex";
	mutex_unlock(&b->lock);
	if (!crash_trylock(mutex_trylock(&b->second)))
		return "second-mutex";
	mutex_unlock(&b->second);
	if (!crash_trylock(down_write_trylock(&b->sem)))
		return "rwsem";
	up_write(&b->sem);
	if (!crash_trylock(down_write_trylock(&b->twin)))
		return "twin-rwsem";
	up_write(&b->twin);
	reinit_completion(&b->probed);
	mod_timer(&b->probe, jiffies + 1);
	if (!wait_for_completion_timeout(&b->probed, HZ))
		return "timer";
	/* A reader that never ends would keep this process here. */
	synchronize_rcu();
	return NULL;
}

static ssize_t mailbox_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();

	if (!wrong)
		wrong = lost(&box);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations mailbox_operations = {
	.owner = THIS_MODULE,
	.read = mailbox_read,
	.write = mailbox_write,
};

static struct miscdevice mailbox_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_hang",
	.fops = &mailbox_operations,
	.mode = 0666,
};

static int __init mailbox_init(void)
{
	init_completion(&box.probed);
	timer_setup(&box.timer, poll_on_timer, 0);
	timer_setup(&box.probe, probe_fired, 0);
	return misc_register(&mailbox_device);
}

static void __exit mailbox_exit(void)
{
	misc_deregister(&mailbox_device);
}

module_init(mailbox_init);
module_exit(mailbox_exit);
MODULE_DESCRIPTION("Crash corpus: no progress without a fault");
MODULE_LICENSE("GPL");
