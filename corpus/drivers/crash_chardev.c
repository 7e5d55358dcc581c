// SPDX-License-Identifier: GPL-2.0-only
/*
 * A small gauge as a character device, with one mistake of each class in its write path, and a
 * missing-calibration mistake in every other entry point. No locks are held: see crash_locks.c.
 */
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

#include "crash.h"

struct calibration {
	int offset;
	int gain;
};

struct gauge {
	const struct calibration *calibration;  /* never set: the usual mistake */
	const void *source;                     /* never set */
	size_t length;
	int (*convert)(int raw);                /* never set */
	int steps;                              /* 0 */
	unsigned char samples[64];
	struct list_head readings;
	char armed[CRASH_NAME_MAX];
	const char __user *user;                /* the buffer of the write under way */
};

static struct gauge *the_gauge;

static int corrected(const struct gauge *g)
{
	return READ_ONCE(g->calibration->gain); /* CRASH: null-deref */
}

static int fault_null_deref(struct gauge *g)
{
	return corrected(g);
}

static int fault_memcpy_null(struct gauge *g)
{
	memcpy(g->samples, g->source, READ_ONCE(g->length)); /* CRASH: memcpy-null */
	return g->samples[0];
}

static int fault_null_call(struct gauge *g)
{
	return g->convert(g->samples[0]) + 1; /* CRASH: null-call */
}

static int fault_wild_pointer(struct gauge *g)
{
	const struct calibration *c = (void *)0xffffdead00001000UL;

	return READ_ONCE(c->gain); /* CRASH: wild-pointer */
}

static int fault_non_canonical(struct gauge *g)
{
	/* The pattern list_del() leaves behind: what a use after removal runs into. */
	const struct calibration *c = (void *)LIST_POISON1;

	return READ_ONCE(c->gain); /* CRASH: non-canonical */
}

static int fault_bug(struct gauge *g)
{
	BUG_ON(!g->calibration); /* CRASH: bug */
	return 0;
}

static int fault_list_corruption(struct gauge *g)
{
	struct list_head *reading = kzalloc(sizeof(*reading), GFP_KERNEL);

	if (!reading)
		return -ENOMEM;
	reading->next = reading;
	reading->prev = &g->readings;
	list_del(reading); /* CRASH: list-corruption */
	return 0;
}

static int fault_usercopy(struct gauge *g)
{
	char *record = kmalloc(32, GFP_KERNEL);
	size_t length = READ_ONCE(g->length) * 32;

	if (!record)
		return -ENOMEM;
	OPTIMIZER_HIDE_VAR(record);
	return copy_to_user((char __user *)g->user, record, length); /* CRASH: usercopy */
}

static int fault_divide(struct gauge *g)
{
	return g->samples[0] / READ_ONCE(g->steps); /* CRASH: divide */
}

static int fault_panic(struct gauge *g)
{
	panic("crash_chardev: no calibration"); /* CRASH: panic */
	return 0;
}

/* What touches the guard page first depends on how deep the stack was before. */
static noinline int smooth(volatile unsigned char *before, int depth)
{ /* CRASH: stack-overflow */
	volatile unsigned char window[200]; /* CRASH: stack-overflow */

	if (depth > 100000)
		return 0;
	window[0] = depth + *before;
	return smooth(window, depth + 1) + window[0]; /* CRASH: stack-overflow */
}

static int fault_stack_overflow(struct gauge *g)
{
	return smooth(g->samples, 0);
}

static const struct {
	const char *name;
	int (*run)(struct gauge *g);
} faults[] = {
	{ "null-deref", fault_null_deref },
	{ "memcpy-null", fault_memcpy_null },
	{ "null-call", fault_null_call },
	{ "wild-pointer", fault_wild_pointer },
	{ "non-canonical", fault_non_canonical },
	{ "bug", fault_bug },
	{ "list-corruption", fault_list_corruption },
	{ "usercopy", fault_usercopy },
	{ "divide", fault_divide },
	{ "panic", fault_panic },
	{ "stack-overflow", fault_stack_overflow },
};

/* Whether an entry point is to fault now; it does so once. */
static bool due(struct gauge *g, const char *entry)
{
	if (strcmp(g->armed, entry))
		return false;
	g->armed[0] = 0;
	return true;
}

static ssize_t gauge_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	struct gauge *g = the_gauge;
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);
	int n;

	if (error)
		return error;
	if (!strncmp(name, "arm:", 4)) {
		strscpy(g->armed, name + 4, sizeof(g->armed));
		return count;
	}
	g->user = from;
	for (n = 0; n < ARRAY_SIZE(faults); n++) {
		if (strcmp(faults[n].name, name))
			continue;
		error = faults[n].run(g);
		return error < 0 ? error : count;
	}
	return -EINVAL;
}

static ssize_t gauge_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	struct gauge *g = the_gauge;

	if (due(g, "read"))
		count = g->calibration->gain; /* CRASH: read */
	return crash_verdict(NULL, to, count, at);
}

static int gauge_open(struct inode *inode, struct file *file)
{
	struct gauge *g = the_gauge;

	if (due(g, "open"))
		return READ_ONCE(g->calibration->offset); /* CRASH: open */
	return 0;
}

static int gauge_release(struct inode *inode, struct file *file)
{
	struct gauge *g = the_gauge;

	if (due(g, "release"))
		return READ_ONCE(g->calibration->offset); /* CRASH: release */
	return 0;
}

static long gauge_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct gauge *g = the_gauge;

	if (command != CRASH_IOC_RUN)
		return -ENOTTY;
	if (due(g, "ioctl"))
		return READ_ONCE(g->calibration->gain); /* CRASH: ioctl */
	return 0;
}

static __poll_t gauge_poll(struct file *file, poll_table *wait)
{
	struct gauge *g = the_gauge;

	if (due(g, "poll") && READ_ONCE(g->calibration->gain)) /* CRASH: poll */
		return 0;
	return EPOLLIN | EPOLLRDNORM;
}

static int gauge_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct gauge *g = the_gauge;

	if (due(g, "mmap"))
		return READ_ONCE(g->calibration->offset); /* CRASH: mmap */
	return -ENODEV;
}

static void *readings_start(struct seq_file *s, loff_t *at)
{
	struct gauge *g = the_gauge;

	if (due(g, "seq-start"))
		return (void *)(long)READ_ONCE(g->calibration->gain); /* CRASH: seq-start */
	return *at ? NULL : g;
}

static void *readings_next(struct seq_file *s, void *item, loff_t *at)
{
	++*at;
	return NULL;
}

static void readings_stop(struct seq_file *s, void *item)
{
}

static int readings_show(struct seq_file *s, void *item)
{
	struct gauge *g = item;

	if (due(g, "seq-show"))
		seq_printf(s, "%d\n", READ_ONCE(g->calibration->gain)); /* CRASH: seq-show */
	seq_printf(s, "%d\n", g->samples[0]);
	return 0;
}

static const struct seq_operations readings = {
	.start = readings_start,
	.next = readings_next,
	.stop = readings_stop,
	.show = readings_show,
};

static const struct file_operations gauge_operations = {
	.owner = THIS_MODULE,
	.open = gauge_open,
	.release = gauge_release,
	.read = gauge_read,
	.write = gauge_write,
	.unlocked_ioctl = gauge_ioctl,
	.poll = gauge_poll,
	.mmap = gauge_mmap,
};

static struct miscdevice gauge_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_chardev",
	.fops = &gauge_operations,
	.mode = 0666,
};

static int __init gauge_init(void)
{
	int error;

	the_gauge = kzalloc(sizeof(*the_gauge), GFP_KERNEL);
	if (!the_gauge)
		return -ENOMEM;
	INIT_LIST_HEAD(&the_gauge->readings);
	the_gauge->length = 16;
	error = misc_register(&gauge_device);
	if (!error && !proc_create_seq("crash_chardev", 0444, NULL, &readings)) {
		misc_deregister(&gauge_device);
		error = -ENOMEM;
	}
	if (error)
		kfree(the_gauge);
	return error;
}

static void __exit gauge_exit(void)
{
	remove_proc_entry("crash_chardev", NULL);
	misc_deregister(&gauge_device);
	kfree(the_gauge);
}

module_init(gauge_init);
module_exit(gauge_exit);
MODULE_DESCRIPTION("Crash corpus: every class of fault in a character device");
MODULE_LICENSE("GPL");
