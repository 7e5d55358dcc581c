// SPDX-License-Identifier: GPL-2.0-only
/*
 * The rarer calls of a character device: mappings and their faults, seeking, syncing, asynchronous
 * notification, flushing, splicing, 32-bit ioctls, iterators as io_uring, aio and vectors use them.
 * The common calls are in crash_chardev.c.
 */
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/seq_file.h>
#include <linux/splice.h>
#include <linux/uio.h>

#include "crash_arm.h"

static struct page *frame;              /* what a mapping shows */

static bool never_there;                /* what is touched in a mapping is to be tried again, for ever */
static bool never_writable;             /* what is written to */
static bool hesitates;                  /* each page takes three tries, which is no crash */
static atomic_t tries;

static vm_fault_t area_fault(struct vm_fault *fault)
{ /* CRASH: fault-loop */
	if (due("vm-fault"))
		return READ_ONCE(settings->level); /* CRASH: vm-fault */
	if (due("fault-loop"))
		WRITE_ONCE(never_there, true);
	if (due("hesitate"))
		WRITE_ONCE(hesitates, true);
	if (READ_ONCE(never_there) || (READ_ONCE(hesitates) && atomic_inc_return(&tries) % 3))
		return VM_FAULT_NOPAGE;
	get_page(frame);
	fault->page = frame;
	return 0;
}

static vm_fault_t area_mkwrite(struct vm_fault *fault)
{ /* CRASH: mkwrite-loop */
	if (due("vm-mkwrite"))
		return READ_ONCE(settings->level); /* CRASH: vm-mkwrite */
	if (due("mkwrite-loop"))
		WRITE_ONCE(never_writable, true);
	if (READ_ONCE(never_writable))
		return VM_FAULT_NOPAGE;
	return 0;
}

static void area_open(struct vm_area_struct *area)
{
	if (due("vm-open"))
		WRITE_ONCE(settings->level, 1); /* CRASH: vm-open */
}

static void area_close(struct vm_area_struct *area)
{
	if (due("vm-close"))
		WRITE_ONCE(settings->level, 0); /* CRASH: vm-close */
	WRITE_ONCE(never_there, false);
	WRITE_ONCE(never_writable, false);
	WRITE_ONCE(hesitates, false);
}

static int area_access(struct vm_area_struct *area, unsigned long at, void *to, int length, int write)
{
	return -EIO;
}

static const struct vm_operations_struct area_operations = {
	.open = area_open,
	.close = area_close,
	.fault = area_fault,
	.page_mkwrite = area_mkwrite,
	.access = area_access,
};

static int scope_mmap(struct file *file, struct vm_area_struct *area)
{
	area->vm_ops = &area_operations;
	return 0;
}

static loff_t scope_llseek(struct file *file, loff_t offset, int whence)
{
	if (due("llseek"))
		return READ_ONCE(settings->limit); /* CRASH: llseek */
	return noop_llseek(file, offset, whence);
}

static int scope_fsync(struct file *file, loff_t from, loff_t to, int datasync)
{
	if (due("fsync"))
		return READ_ONCE(settings->level); /* CRASH: fsync */
	return 0;
}

static struct fasync_struct *listeners;

static int scope_fasync(int fd, struct file *file, int on)
{
	if (due("fasync"))
		return READ_ONCE(settings->level); /* CRASH: fasync */
	return fasync_helper(fd, file, on, &listeners);
}

static int scope_flush(struct file *file, fl_owner_t owner)
{
	if (due("flush"))
		return READ_ONCE(settings->level); /* CRASH: flush */
	return 0;
}

static ssize_t scope_splice_read(struct file *file, loff_t *at, struct pipe_inode_info *pipe, size_t length,
				 unsigned int flags)
{
	if (due("splice-read"))
		return READ_ONCE(settings->limit); /* CRASH: splice-read */
	return 0;
}

static ssize_t scope_splice_write(struct pipe_inode_info *pipe, struct file *file, loff_t *at, size_t length,
				  unsigned int flags)
{
	if (due("splice-write"))
		return READ_ONCE(settings->limit); /* CRASH: splice-write */
	return 0;
}

static long scope_compat_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	if (due("compat-ioctl"))
		return READ_ONCE(settings->limit); /* CRASH: compat-ioctl */
	return 0;
}

static int scope_lock(struct file *file, int command, struct file_lock *lock)
{
	if (due("file-lock"))
		return READ_ONCE(settings->level); /* CRASH: file-lock */
	return 0;
}

static void scope_fdinfo(struct seq_file *s, struct file *file)
{
	if (due("fdinfo"))
		seq_printf(s, "level: %d\n", READ_ONCE(settings->level)); /* CRASH: fdinfo */
}

static __poll_t scope_poll(struct file *file, struct poll_table_struct *wait)
{
	if (due("epoll"))
		return READ_ONCE(settings->each[0]); /* CRASH: epoll */
	if (due("select"))
		return READ_ONCE(settings->each[1]); /* CRASH: select */
	return EPOLLIN;
}

/* The self-check too: a read() that is no iterator's goes the same way. */
static ssize_t scope_read_iter(struct kiocb *io, struct iov_iter *to)
{
	static const char verdict[] = "ok\n";
	const char *wrong;

	if (due("read-iter"))
		return READ_ONCE(settings->each[0]); /* CRASH: read-iter */
	if (due("preadv"))
		return READ_ONCE(settings->each[1]); /* CRASH: preadv */
	if (due("uring-read"))
		return READ_ONCE(settings->each[2]); /* CRASH: uring-read */
	if (due("uring-worker"))
		return READ_ONCE(settings->each[3]); /* CRASH: uring-worker */
	if (due("aio-read"))
		return READ_ONCE(settings->each[4]); /* CRASH: aio-read */
	wrong = crash_context();
	if (wrong)
		return copy_to_iter("bad:", 4, to) + copy_to_iter(wrong, strlen(wrong), to);
	return copy_to_iter(verdict, sizeof(verdict) - 1, to);
}

static ssize_t scope_write_iter(struct kiocb *io, struct iov_iter *from)
{
	char name[CRASH_NAME_MAX] = "";
	size_t count = iov_iter_count(from);

	if (due("write-iter"))
		return READ_ONCE(settings->each[0]); /* CRASH: write-iter */
	if (due("uring-write"))
		return READ_ONCE(settings->each[1]); /* CRASH: uring-write */
	if (count >= sizeof(name) || copy_from_iter(name, count, from) != count)
		return -EINVAL;
	if (strncmp(name, "arm:", 4))
		return -EINVAL;
	crash_set(name + 4);
	return count;
}

static const struct file_operations scope_operations = {
	.owner = THIS_MODULE,
	.llseek = scope_llseek,
	.read_iter = scope_read_iter,
	.write_iter = scope_write_iter,
	.poll = scope_poll,
	.compat_ioctl = scope_compat_ioctl,
	.mmap = scope_mmap,
	.flush = scope_flush,
	.fsync = scope_fsync,
	.fasync = scope_fasync,
	.lock = scope_lock,
	.splice_read = scope_splice_read,
	.splice_write = scope_splice_write,
	.show_fdinfo = scope_fdinfo,
};

static struct miscdevice scope = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_fops",
	.fops = &scope_operations,
	.mode = 0666,
};

static int __init scope_init(void)
{
	int error;

	frame = alloc_page(GFP_KERNEL | __GFP_ZERO);
	if (!frame)
		return -ENOMEM;
	error = misc_register(&scope);
	if (error)
		__free_page(frame);
	return error;
}

static void __exit scope_exit(void)
{
	misc_deregister(&scope);
	__free_page(frame);
}

module_init(scope_init);
module_exit(scope_exit);
MODULE_DESCRIPTION("Crash corpus: faults in the rarer calls of a character device");
MODULE_LICENSE("GPL");
