// SPDX-License-Identifier: GPL-2.0-only
/*
 * A file system in which every name is an empty file, mounted and used by the agent's commands: mounting,
 * looking up, reading, writing, removing fault, under the core's locks.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/statfs.h>
#include <linux/uio.h>

#include "crash_arm.h"

static ssize_t note_read(struct kiocb *io, struct iov_iter *to)
{
	if (due("fs-read"))
		return READ_ONCE(settings->limit); /* CRASH: fs-read */
	return 0;
}

static ssize_t note_write(struct kiocb *io, struct iov_iter *from)
{
	ssize_t n = iov_iter_count(from);

	inode_lock(file_inode(io->ki_filp));
	if (due("fs-write"))
		n = READ_ONCE(settings->limit); /* CRASH: fs-write */
	inode_unlock(file_inode(io->ki_filp));
	return n;
}

static int note_fsync(struct file *file, loff_t from, loff_t to, int datasync)
{
	if (due("fs-fsync"))
		return READ_ONCE(settings->level); /* CRASH: fs-fsync */
	return 0;
}

static const struct file_operations note_operations = {
	.owner = THIS_MODULE,
	.read_iter = note_read,
	.write_iter = note_write,
	.fsync = note_fsync,
};

static const struct inode_operations note_inode = { };

static int folder_iterate(struct file *file, struct dir_context *context)
{
	if (due("fs-readdir"))
		return READ_ONCE(settings->level); /* CRASH: fs-readdir */
	if (!dir_emit_dots(file, context))
		return 0;
	return 0;
}

static const struct file_operations folder_operations = {
	.owner = THIS_MODULE,
	.iterate_shared = folder_iterate,
	.read = generic_read_dir,
};

static struct inode *folder_inode(struct super_block *sb, umode_t mode);

/* Every name but those with "none" in them is a file. */
static struct dentry *folder_lookup(struct inode *folder, struct dentry *entry, unsigned int flags)
{
	struct inode *inode = NULL;

	if (due("fs-lookup"))
		return READ_ONCE(settings->table); /* CRASH: fs-lookup */
	if (!strstr(entry->d_name.name, "none")) {
		inode = folder_inode(folder->i_sb, S_IFREG | 0644);
		if (!inode)
			return ERR_PTR(-ENOMEM);
	}
	d_add(entry, inode);
	return NULL;
}

static int folder_unlink(struct inode *folder, struct dentry *entry)
{
	if (due("fs-unlink"))
		return READ_ONCE(settings->level); /* CRASH: fs-unlink */
	drop_nlink(d_inode(entry));
	return 0;
}

static const struct inode_operations folder_inode_operations = {
	.lookup = folder_lookup,
	.unlink = folder_unlink,
};

static struct inode *folder_inode(struct super_block *sb, umode_t mode)
{
	struct inode *inode = new_inode(sb);

	if (!inode)
		return NULL;
	inode->i_ino = get_next_ino();
	inode->i_mode = mode;
	inode->i_op = S_ISDIR(mode) ? &folder_inode_operations : &note_inode;
	inode->i_fop = S_ISDIR(mode) ? &folder_operations : &note_operations;
	return inode;
}

static int notes_statfs(struct dentry *entry, struct kstatfs *s)
{
	if (due("fs-statfs"))
		return READ_ONCE(settings->level); /* CRASH: fs-statfs */
	return simple_statfs(entry, s);
}

static void notes_evict(struct inode *inode)
{
	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
	if (due("fs-evict"))
		WRITE_ONCE(settings->level, 0); /* CRASH: fs-evict */
}

static void notes_put(struct super_block *sb)
{
	if (due("fs-put-super"))
		WRITE_ONCE(settings->each[0], 0); /* CRASH: fs-put-super */
}

static const struct super_operations notes_operations = {
	.statfs = notes_statfs,
	.evict_inode = notes_evict,
	.put_super = notes_put,
};

static int notes_fill(struct super_block *sb, void *data, int silent)
{
	struct inode *root;

	sb->s_magic = 0x63726173;
	sb->s_op = &notes_operations;
	if (due("fs-fill-super"))
		return READ_ONCE(settings->level); /* CRASH: fs-fill-super */
	root = folder_inode(sb, S_IFDIR | 0755);
	sb->s_root = d_make_root(root);
	return sb->s_root ? 0 : -ENOMEM;
}

static struct dentry *notes_mount(struct file_system_type *type, int flags, const char *name, void *data)
{
	if (due("fs-mount"))
		return READ_ONCE(settings->table); /* CRASH: fs-mount */
	return mount_nodev(type, flags, data, notes_fill);
}

static struct file_system_type notes = {
	.owner = THIS_MODULE,
	.name = "crash_fs",
	.mount = notes_mount,
	.kill_sb = kill_anon_super,
};

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	int error = crash_arm(from, count);

	return error ? error : count;
}

static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	return crash_verdict(crash_armed[0] ? "did-not-fault" : NULL, to, count, at);
}

static const struct file_operations control_operations = {
	.owner = THIS_MODULE,
	.read = control_read,
	.write = control_write,
};

static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_fs",
	.fops = &control_operations,
	.mode = 0666,
};

static int __init notes_init(void)
{
	int error = register_filesystem(&notes);

	if (!error)
		error = misc_register(&control);
	return error;
}

static void __exit notes_exit(void)
{
	misc_deregister(&control);
	unregister_filesystem(&notes);
}

module_init(notes_init);
module_exit(notes_exit);
MODULE_DESCRIPTION("Crash corpus: faults in a file system");
MODULE_LICENSE("GPL");
