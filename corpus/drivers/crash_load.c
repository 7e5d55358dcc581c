// SPDX-License-Identifier: GPL-2.0-only
/*
 * A queue whose readers sleep in it while its writers fault: what becomes of those who are inside a driver when it is
 * quarantined. Nothing is ever put into the queue, so nobody but the quarantine ends their wait.
 */
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/wait.h>

#include "crash.h"

struct queue {
	struct mutex lock;
	wait_queue_head_t readers;
	int length;
	int *entries;                   /* never allocated: the mistake */
};

static struct queue queue = {
	.lock = __MUTEX_INITIALIZER(queue.lock),
	.readers = __WAIT_QUEUE_HEAD_INITIALIZER(queue.readers),
};

static noinline void append(struct queue *q, int entry)
{
	mutex_lock(&q->lock);
	q->entries[q->length] = entry; /* CRASH: asleep */
	q->length++;
	mutex_unlock(&q->lock);
}

static ssize_t queue_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	/* Who is to sleep says so before, and goes to sleep by another call. */
	if (!strncmp(name, "arm:", 4))
		return count;
	append(&queue, 1);
	return count;
}

static long queue_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	return wait_event_interruptible(queue.readers, READ_ONCE(queue.length));
}

static __poll_t queue_poll(struct file *file, poll_table *wait)
{
	poll_wait(file, &queue.readers, wait);
	return READ_ONCE(queue.length) ? EPOLLIN : 0;
}

static ssize_t queue_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = NULL;

	if (!crash_trylock(mutex_trylock(&queue.lock)))
		wrong = "mutex";
	else
		mutex_unlock(&queue.lock);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations queue_operations = {
	.owner = THIS_MODULE,
	.read = queue_read,
	.write = queue_write,
	.poll = queue_poll,
	.unlocked_ioctl = queue_ioctl,
};

static struct miscdevice queue_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_load",
	.fops = &queue_operations,
	.mode = 0666,
};

module_misc_device(queue_device);
MODULE_DESCRIPTION("Crash corpus: a driver that is quarantined while others sleep in it");
MODULE_LICENSE("GPL");
