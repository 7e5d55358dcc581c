// SPDX-License-Identifier: GPL-2.0-only
/*
 * A module whose beginning or end faults, with its device registered: its memory must not be reused while
 * others point there. The device has no owner, so that it can be opened after both.
 */
#include <linux/miscdevice.h>
#include <linux/module.h>

#include "crash_arm.h"

static char *when = "never";
module_param(when, charp, 0444);
MODULE_PARM_DESC(when, "init: fault while loading");

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	int error = crash_arm(from, count);

	return error ? error : count;
}

static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	return crash_verdict(NULL, to, count, at);
}

static const struct file_operations control_operations = {
	.read = control_read,
	.write = control_write,
};

static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_init",
	.fops = &control_operations,
	.mode = 0666,
};

static int __init unit_init(void)
{
	int error = misc_register(&control);

	if (!error && !strcmp(when, "init"))
		return READ_ONCE(settings->level); /* CRASH: module-init */
	return error;
}

static void __exit unit_exit(void)
{
	if (due("module-exit"))
		WRITE_ONCE(settings->level, 0); /* CRASH: module-exit */
	misc_deregister(&control);
}

module_init(unit_init);
module_exit(unit_exit);
MODULE_DESCRIPTION("Crash corpus: a module that faults while it comes and while it goes");
MODULE_LICENSE("GPL");
