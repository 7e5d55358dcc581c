// SPDX-License-Identifier: GPL-2.0-only
/*
 * A sampler driven by timers: faults in softirq (timer, tasklet) and in hard interrupt context (high
 * resolution timer), with and without a lock held. Whether a task or the idle loop is interrupted is
 * up to who starts them: they run on the processor that started them.
 */
#include <linux/completion.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/timer.h>

#include "crash.h"

#define DELAY_MS 100

struct buffer {
	unsigned long filled;
	unsigned long lost;
};

static struct sampler {
	struct buffer *buffer;          /* never set: the mistake */
	spinlock_t lock;
	struct timer_list timer, locked_timer, probe;
	struct hrtimer precise, locked_precise;
	struct tasklet_struct tasklet;
	struct completion probed;
} sampler;

static void sample_on_timer(struct timer_list *timer)
{
	struct sampler *s = &sampler;

	WRITE_ONCE(s->buffer->filled, jiffies); /* CRASH: timer */
}

static void sample_locked_on_timer(struct timer_list *timer)
{
	struct sampler *s = &sampler;

	spin_lock(&s->lock);
	WRITE_ONCE(s->buffer->filled, jiffies); /* CRASH: timer-spinlock */
	spin_unlock(&s->lock);
}

static enum hrtimer_restart sample_precisely(struct hrtimer *timer)
{
	struct sampler *s = &sampler;

	WRITE_ONCE(s->buffer->lost, jiffies); /* CRASH: hrtimer */
	return HRTIMER_NORESTART;
}

static enum hrtimer_restart sample_locked_precisely(struct hrtimer *timer)
{
	struct sampler *s = &sampler;

	spin_lock(&s->lock);
	WRITE_ONCE(s->buffer->lost, jiffies); /* CRASH: hrtimer-spinlock */
	spin_unlock(&s->lock);
	return HRTIMER_NORESTART;
}

static void sample_in_tasklet(struct tasklet_struct *tasklet)
{
	struct sampler *s = &sampler;

	WRITE_ONCE(s->buffer->filled, jiffies + 1); /* CRASH: tasklet */
}

static void start_timer(struct timer_list *timer)
{
	timer->expires = jiffies + msecs_to_jiffies(DELAY_MS);
	add_timer_on(timer, raw_smp_processor_id());
}

static int start(const char *name)
{
	struct sampler *s = &sampler;
	ktime_t delay = ms_to_ktime(DELAY_MS);

	if (!strcmp(name, "timer")) {
		start_timer(&s->timer);
	} else if (!strcmp(name, "timer-spinlock")) {
		start_timer(&s->locked_timer);
	} else if (!strcmp(name, "hrtimer")) {
		hrtimer_start(&s->precise, delay, HRTIMER_MODE_REL_PINNED_HARD);
	} else if (!strcmp(name, "hrtimer-spinlock")) {
		hrtimer_start(&s->locked_precise, delay, HRTIMER_MODE_REL_PINNED_HARD);
	} else if (!strcmp(name, "tasklet")) {
		/* Outside of softirq it is ksoftirqd that runs it. */
		tasklet_schedule(&s->tasklet);
	} else {
		return -EINVAL;
	}
	return 0;
}

static ssize_t sampler_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (!error)
		error = start(name);
	return error ? error : count;
}

static void probe_fired(struct timer_list *timer)
{
	complete(&sampler.probed);
}

static ssize_t sampler_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	struct sampler *s = &sampler;
	const char *wrong = crash_context();

	/* Timers must still fire, and the lock that the faulting ones held must be free. */
	reinit_completion(&s->probed);
	mod_timer(&s->probe, jiffies + 2);
	if (!wrong && !wait_for_completion_timeout(&s->probed, HZ))
		wrong = "timers-dead";
	if (!wrong && !crash_trylock(spin_trylock_bh(&s->lock)))
		wrong = "spinlock";
	else if (!wrong)
		spin_unlock_bh(&s->lock);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations sampler_operations = {
	.owner = THIS_MODULE,
	.read = sampler_read,
	.write = sampler_write,
};

static struct miscdevice sampler_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_timer",
	.fops = &sampler_operations,
	.mode = 0666,
};

static int __init sampler_init(void)
{
	struct sampler *s = &sampler;

	spin_lock_init(&s->lock);
	init_completion(&s->probed);
	timer_setup(&s->timer, sample_on_timer, TIMER_PINNED);
	timer_setup(&s->locked_timer, sample_locked_on_timer, TIMER_PINNED);
	timer_setup(&s->probe, probe_fired, 0);
	hrtimer_init(&s->precise, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	s->precise.function = sample_precisely;
	hrtimer_init(&s->locked_precise, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	s->locked_precise.function = sample_locked_precisely;
	tasklet_setup(&s->tasklet, sample_in_tasklet);
	return misc_register(&sampler_device);
}

static void __exit sampler_exit(void)
{
	struct sampler *s = &sampler;

	misc_deregister(&sampler_device);
	hrtimer_cancel(&s->precise);
	hrtimer_cancel(&s->locked_precise);
	del_timer_sync(&s->timer);
	del_timer_sync(&s->locked_timer);
	del_timer_sync(&s->probe);
	tasklet_kill(&s->tasklet);
}

module_init(sampler_init);
module_exit(sampler_exit);
MODULE_DESCRIPTION("Crash corpus: faults in timers and tasklets");
MODULE_LICENSE("GPL");
