// SPDX-License-Identifier: GPL-2.0-only
/*
 * Files that are no devices: /proc with operations of its own and as a sequence, debugfs with plain and
 * with simple attributes, sysfs attributes and blobs, module parameters. Each operation has the same
 * mistake. Sequences of the character device's are in crash_chardev.c, its other calls in crash_fops.c.
 */
#include <linux/debugfs.h>
#include <linux/device.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/poll.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>

#include "crash_arm.h"

static ssize_t table_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	if (due("proc-read"))
		return READ_ONCE(settings->limit); /* CRASH: proc-read */
	return simple_read_from_buffer(to, count, at, "table\n", 6);
}

static ssize_t table_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	if (due("proc-write"))
		WRITE_ONCE(settings->limit, count); /* CRASH: proc-write */
	return count;
}

static int table_open(struct inode *inode, struct file *file)
{
	if (due("proc-open"))
		return READ_ONCE(settings->level); /* CRASH: proc-open */
	return 0;
}

static int table_release(struct inode *inode, struct file *file)
{
	if (due("proc-release"))
		return READ_ONCE(settings->level); /* CRASH: proc-release */
	return 0;
}

static long table_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	if (due("proc-ioctl"))
		return READ_ONCE(settings->limit); /* CRASH: proc-ioctl */
	return 0;
}

static __poll_t table_poll(struct file *file, struct poll_table_struct *wait)
{
	if (due("proc-poll"))
		return READ_ONCE(settings->level); /* CRASH: proc-poll */
	return EPOLLIN;
}

static int table_mmap(struct file *file, struct vm_area_struct *area)
{
	if (due("proc-mmap"))
		return READ_ONCE(settings->level); /* CRASH: proc-mmap */
	return -ENODEV;
}

static loff_t table_lseek(struct file *file, loff_t offset, int whence)
{
	if (due("proc-lseek"))
		return READ_ONCE(settings->limit); /* CRASH: proc-lseek */
	return default_llseek(file, offset, whence);
}

static const struct proc_ops table_operations = {
	.proc_open = table_open,
	.proc_release = table_release,
	.proc_read = table_read,
	.proc_write = table_write,
	.proc_ioctl = table_ioctl,
	.proc_poll = table_poll,
	.proc_mmap = table_mmap,
	.proc_lseek = table_lseek,
};

static void *rows_start(struct seq_file *s, loff_t *at)
{
	return *at < 3 ? SEQ_START_TOKEN : NULL;
}

static void *rows_next(struct seq_file *s, void *row, loff_t *at)
{
	if (due("seq-next"))
		return READ_ONCE(settings->table); /* CRASH: seq-next */
	return ++*at < 3 ? row : NULL;
}

static void rows_stop(struct seq_file *s, void *row)
{
	if (due("seq-stop"))
		WRITE_ONCE(settings->level, 0); /* CRASH: seq-stop */
}

static int rows_show(struct seq_file *s, void *row)
{
	seq_puts(s, "row\n");
	return 0;
}

static const struct seq_operations rows = {
	.start = rows_start,
	.next = rows_next,
	.stop = rows_stop,
	.show = rows_show,
};

static int single_row(struct seq_file *s, void *unused)
{
	if (due("proc-single"))
		return READ_ONCE(settings->level); /* CRASH: proc-single */
	seq_puts(s, "single\n");
	return 0;
}

static ssize_t raw_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	if (due("debugfs-read"))
		return READ_ONCE(settings->limit); /* CRASH: debugfs-read */
	return simple_read_from_buffer(to, count, at, "raw\n", 4);
}

static ssize_t raw_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	if (due("debugfs-write"))
		return READ_ONCE(settings->limit); /* CRASH: debugfs-write */
	return count;
}

static int raw_open(struct inode *inode, struct file *file)
{
	if (due("debugfs-open"))
		return READ_ONCE(settings->level); /* CRASH: debugfs-open */
	return 0;
}

static int raw_release(struct inode *inode, struct file *file)
{
	if (due("debugfs-release"))
		return READ_ONCE(settings->level); /* CRASH: debugfs-release */
	return 0;
}

static const struct file_operations raw_operations = {
	.owner = THIS_MODULE,
	.open = raw_open,
	.release = raw_release,
	.read = raw_read,
	.write = raw_write,
};

static int number_get(void *data, u64 *value)
{
	if (due("debugfs-get"))
		*value = READ_ONCE(settings->level); /* CRASH: debugfs-get */
	else
		*value = 7;
	return 0;
}

static int number_set(void *data, u64 value)
{
	if (due("debugfs-set"))
		WRITE_ONCE(settings->level, value); /* CRASH: debugfs-set */
	return 0;
}

DEFINE_SIMPLE_ATTRIBUTE(number_operations, number_get, number_set, "%llu\n");

static ssize_t limit_show(struct device *device, struct device_attribute *attribute, char *text)
{
	if (due("sysfs-show"))
		return READ_ONCE(settings->limit); /* CRASH: sysfs-show */
	return sysfs_emit(text, "7\n");
}

static DEVICE_ATTR_RO(limit);

static struct attribute *table_attributes[] = {
	&dev_attr_limit.attr,
	NULL,
};

static ssize_t blob_read(struct file *file, struct kobject *object, struct bin_attribute *attribute,
			 char *bytes, loff_t at, size_t count)
{
	if (due("sysfs-bin-read"))
		return READ_ONCE(settings->limit); /* CRASH: sysfs-bin-read */
	return 0;
}

static ssize_t blob_write(struct file *file, struct kobject *object, struct bin_attribute *attribute,
			  char *bytes, loff_t at, size_t count)
{
	if (due("sysfs-bin-write"))
		return READ_ONCE(settings->limit); /* CRASH: sysfs-bin-write */
	return count;
}

static BIN_ATTR_RW(blob, 64);

static struct bin_attribute *table_blobs[] = {
	&bin_attr_blob,
	NULL,
};

static const struct attribute_group table_group = {
	.attrs = table_attributes,
	.bin_attrs = table_blobs,
};

static const struct attribute_group *table_groups[] = {
	&table_group,
	NULL,
};

static int level_set(const char *text, const struct kernel_param *parameter)
{
	if (due("param-set"))
		WRITE_ONCE(settings->level, 1); /* CRASH: param-set */
	return 0;
}

static int level_get(char *text, const struct kernel_param *parameter)
{
	if (due("param-get"))
		return READ_ONCE(settings->level); /* CRASH: param-get */
	return sysfs_emit(text, "0\n");
}

static const struct kernel_param_ops level_operations = {
	.set = level_set,
	.get = level_get,
};
module_param_cb(level, &level_operations, NULL, 0644);
MODULE_PARM_DESC(level, "anything");

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	int error = crash_arm(from, count);

	return error ? error : count;
}

static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();

	/* The lock around all parameters is the core's to give back. */
	if (!wrong) {
		kernel_param_lock(THIS_MODULE);
		kernel_param_unlock(THIS_MODULE);
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
	.name = "crash_proc",
	.fops = &control_operations,
	.groups = table_groups,
	.mode = 0666,
};

static struct dentry *folder;

static int __init texts_init(void)
{
	int error = misc_register(&control);

	if (error)
		return error;
	proc_create("crash_proc", 0666, NULL, &table_operations);
	proc_create_seq("crash_proc_rows", 0444, NULL, &rows);
	proc_create_single("crash_proc_single", 0444, NULL, single_row);
	folder = debugfs_create_dir("crash_proc", NULL);
	debugfs_create_file("raw", 0666, folder, NULL, &raw_operations);
	debugfs_create_file("number", 0666, folder, NULL, &number_operations);
	return 0;
}

static void __exit texts_exit(void)
{
	debugfs_remove_recursive(folder);
	remove_proc_entry("crash_proc_single", NULL);
	remove_proc_entry("crash_proc_rows", NULL);
	remove_proc_entry("crash_proc", NULL);
	misc_deregister(&control);
}

module_init(texts_init);
module_exit(texts_exit);
MODULE_DESCRIPTION("Crash corpus: faults in the operations of proc, debugfs and sysfs files");
MODULE_LICENSE("GPL");
