// SPDX-License-Identifier: GPL-2.0-only
/*
 * A queue whose readers sleep in it while its writers fault: what becomes of those who are inside a driver when it is
 * quarantined. Nothing is ever put into the queue, so nobody but the quarantine ends their wait.
 */
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/semaphore.h>
#include <linux/wait.h>

#include "crash.h"

struct queue {
	struct mutex lock;
	struct mutex gate;              /* held by who waits for more than one reader may have */
	wait_queue_head_t readers;
	struct completion filled;
	struct semaphore entries_left;
	int length;
	int *entries;                   /* never allocated: the mistake */
};

static struct queue queue = {
	.lock = __MUTEX_INITIALIZER(queue.lock),
	.gate = __MUTEX_INITIALIZER(queue.gate),
	.readers = __WAIT_QUEUE_HEAD_INITIALIZER(queue.readers),
	.filled = COMPLETION_INITIALIZER(queue.filled),
	.entries_left = __SEMAPHORE_INITIALIZER(queue.entries_left, 0),
};

/* How the next ioctl() is to wait. */
static char way[CRASH_NAME_MAX];

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
	if (!strncmp(name, "arm:", 4)) {
		strscpy(way, name + 4, sizeof(way));
		return count;
	}
	append(&queue, 1);
	return count;
}

static noinline long drain(struct queue *q)
{
	mutex_lock(&q->gate);
	wait_event(q->readers, READ_ONCE(q->length));
	q->length = 0;
	mutex_unlock(&q->gate);
	return 0;
}

static int refill(void *data)
{
	struct queue *q = data;

	wait_for_completion(&q->filled);
	return 0;
}

/* Waits for its thread, which waits for the queue. */
static long stop_refill(void)
{
	struct task_struct *thread = kthread_run(refill, &queue, "crash_refill");

	if (IS_ERR(thread))
		return PTR_ERR(thread);
	msleep(50);
	return kthread_stop(thread);
}

static long queue_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	if (!strcmp(way, "gate"))
		return drain(&queue);
	if (!strcmp(way, "filled"))
		wait_for_completion(&queue.filled);
	else if (!strcmp(way, "killable"))
		return wait_event_killable(queue.readers, READ_ONCE(queue.length));
	else if (!strcmp(way, "left"))
		down(&queue.entries_left);
	else if (!strcmp(way, "refill"))
		return stop_refill();
	else
		return wait_event_interruptible(queue.readers, READ_ONCE(queue.length));
	return 0;
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
