/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What all crash drivers share: how a case is named, and the self-check. No faults here.
 *
 * Writing a case's name to the device runs the case; writing "arm:CASE" makes the next operation of
 * the case's kind run it. Reading the device gives one line of self-check: "ok", or what is wrong.
 * The line that faults carries a comment with the word CRASH, a colon and the case's name.
 */
#ifndef CRASH_H
#define CRASH_H

#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/ioctl.h>
#include <linux/kernel.h>
#include <linux/miscdevice.h>
#include <linux/mutex.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/rwlock.h>
#include <linux/rwsem.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#define CRASH_IOC_RUN _IO('c', 1)
#define CRASH_IOC_DAMAGE_PIPE _IOW('c', 2, int)
#define CRASH_IOC_DAMAGE_FILE _IOW('c', 3, int)
#define CRASH_NAME_MAX 48

/* How long a lock may be busy with honest users before the self-check calls it lost. */
#define CRASH_PATIENCE_MS 500

/* Takes the name a process wrote, without a newline at its end. */
static inline int crash_name(char *name, const char __user *from, size_t count)
{
	if (count >= CRASH_NAME_MAX)
		return -EINVAL;
	if (copy_from_user(name, from, count))
		return -EFAULT;
	name[count] = 0;
	strim(name);
	return 0;
}

/* Retries a trylock expression for as long as the self-check is patient; whether it succeeded. */
#define crash_trylock(trylock) ({                                               \
	int got_, left_ = CRASH_PATIENCE_MS;                                    \
	while (!(got_ = (trylock)) && left_-- > 0)                              \
		msleep(1);                                                      \
	got_;                                                                   \
})

/* What a process in a system call must find: interrupts on, nothing nested. NULL when it is so. */
static inline const char *crash_context(void)
{
	if (irqs_disabled())
		return "irqs-off";
	if (preempt_count() & ~PREEMPT_NEED_RESCHED)
		return "preempt-count";
#ifdef CONFIG_PREEMPT_RCU
	if (current->rcu_read_lock_nesting)
		return "rcu-nesting";
#endif
	return NULL;
}

/* Answers a read with the self-check's verdict: @wrong is NULL or the first thing found wrong. */
static inline ssize_t crash_verdict(const char *wrong, char __user *to, size_t count, loff_t *at)
{
	char line[64];
	int n;

	if (!wrong)
		wrong = crash_context();
	n = scnprintf(line, sizeof(line), "%s%s\n", wrong ? "bad:" : "ok", wrong ? wrong : "");
	return simple_read_from_buffer(to, count, at, line, n);
}

/* The driver's device in /dev: what reading and writing it does. */
#define CRASH_DEVICE(variable, name_, read_, write_)                            \
	static const struct file_operations variable##_operations = {           \
		.owner = THIS_MODULE,                                           \
		.read = read_,                                                  \
		.write = write_,                                                \
	};                                                                      \
	static struct miscdevice variable = {                                   \
		.minor = MISC_DYNAMIC_MINOR,                                    \
		.name = name_,                                                  \
		.fops = &variable##_operations,                                 \
		.mode = 0666,                                                   \
	}

#endif
