// SPDX-License-Identifier: GPL-2.0-only
/*
 * A spooler that leaves its jobs to kernel threads: faults in a work item and in a thread of its own,
 * with a mutex held. No process is at fault, and none may be blamed.
 */
#include <linux/completion.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/workqueue.h>

#include "crash.h"

struct page_queue {
	unsigned long printed;
};

static struct spooler {
	struct page_queue *pages;       /* never set: the mistake */
	struct mutex lock;
	struct workqueue_struct *queue;
	struct work_struct job, locked_job, probe;
	struct completion probed;
} spooler;

static void run_job(struct work_struct *work)
{
	struct spooler *s = container_of(work, struct spooler, job);

	WRITE_ONCE(s->pages->printed, 1); /* CRASH: work */
}

static void run_locked_job(struct work_struct *work)
{
	struct spooler *s = container_of(work, struct spooler, locked_job);

	mutex_lock(&s->lock);
	WRITE_ONCE(s->pages->printed, 1); /* CRASH: work-mutex */
	mutex_unlock(&s->lock);
}

static void run_probe(struct work_struct *work)
{
	complete(&spooler.probed);
}

static int thread_main(void *data)
{
	struct spooler *s = data;

	msleep(20);
	return READ_ONCE(s->pages->printed) != 0; /* CRASH: kthread */
}

static int locked_thread_main(void *data)
{
	struct spooler *s = data;
	int printed;

	msleep(20);
	mutex_lock(&s->lock);
	printed = READ_ONCE(s->pages->printed); /* CRASH: kthread-mutex */
	mutex_unlock(&s->lock);
	return printed;
}

static int start(struct spooler *s, const char *name)
{
	if (!strcmp(name, "work"))
		queue_work(s->queue, &s->job);
	else if (!strcmp(name, "work-mutex"))
		queue_work(s->queue, &s->locked_job);
	else if (!strcmp(name, "kthread"))
		return PTR_ERR_OR_ZERO(kthread_run(thread_main, s, "spooler"));
	else if (!strcmp(name, "kthread-mutex"))
		return PTR_ERR_OR_ZERO(kthread_run(locked_thread_main, s, "spooler"));
	else
		return -EINVAL;
	return 0;
}

static ssize_t spooler_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (!error)
		error = start(&spooler, name);
	return error ? error : count;
}

static ssize_t spooler_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	struct spooler *s = &spooler;
	const char *wrong = crash_context();

	/* The queue must still work, and the mutex must be free. */
	reinit_completion(&s->probed);
	queue_work(s->queue, &s->probe);
	if (!wrong && !wait_for_completion_timeout(&s->probed, HZ))
		wrong = "queue-dead";
	if (!wrong && !crash_trylock(mutex_trylock(&s->lock)))
		wrong = "mutex";
	else if (!wrong)
		mutex_unlock(&s->lock);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations spooler_operations = {
	.owner = THIS_MODULE,
	.read = spooler_read,
	.write = spooler_write,
};

static struct miscdevice spooler_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_work",
	.fops = &spooler_operations,
	.mode = 0666,
};

static int __init spooler_init(void)
{
	struct spooler *s = &spooler;
	int error;

	mutex_init(&s->lock);
	init_completion(&s->probed);
	INIT_WORK(&s->job, run_job);
	INIT_WORK(&s->locked_job, run_locked_job);
	INIT_WORK(&s->probe, run_probe);
	s->queue = alloc_workqueue("crash_work", 0, 0);
	if (!s->queue)
		return -ENOMEM;
	error = misc_register(&spooler_device);
	if (error)
		destroy_workqueue(s->queue);
	return error;
}

static void __exit spooler_exit(void)
{
	misc_deregister(&spooler_device);
	destroy_workqueue(spooler.queue);
}

module_init(spooler_init);
module_exit(spooler_exit);
MODULE_DESCRIPTION("Crash corpus: faults in work items and kernel threads");
MODULE_LICENSE("GPL");
