// SPDX-License-Identifier: GPL-2.0-only
/*
 * A file system in which every name is an empty file, mounted and used by the agent's commands: mounting,
 * looking up, reading, writing, making, removing fault, under the core's locks.
 */
#include <linux/buffer_head.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/statfs.h>
#include <linux/seq_file.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/xattr.h>

#include "crash_arm.h"

/* What operations are handed first: since v6.3 the mount's ids, before that a name space. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
typedef struct mnt_idmap ids;
#else
typedef struct user_namespace ids;
#endif

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

/* A lock that is a bit, with nothing that says whose it is. */
static int under_page_lock(void)
{
	struct page *page = alloc_page(GFP_KERNEL);
	int level;

	if (!page)
		return -ENOMEM;
	lock_page(page);
	level = READ_ONCE(settings->level); /* CRASH: fs-page-lock */
	unlock_page(page);
	put_page(page);
	return level;
}

static int under_buffer_lock(void)
{
	struct page *page = alloc_page(GFP_KERNEL);
	struct buffer_head *buffer = page ? alloc_buffer_head(GFP_KERNEL) : NULL;
	int level = -ENOMEM;

	if (buffer) {
		buffer->b_page = page;
		lock_buffer(buffer);
		level = READ_ONCE(settings->level); /* CRASH: fs-buffer-lock */
		unlock_buffer(buffer);
		free_buffer_head(buffer);
	}
	if (page)
		put_page(page);
	return level;
}

static int note_fsync(struct file *file, loff_t from, loff_t to, int datasync)
{
	if (due("fs-fsync"))
		return READ_ONCE(settings->level); /* CRASH: fs-fsync */
	if (due("fs-page-lock"))
		return under_page_lock();
	if (due("fs-buffer-lock"))
		return under_buffer_lock();
	return 0;
}

static long note_fallocate(struct file *file, int mode, loff_t from, loff_t length)
{
	if (due("fs-fallocate"))
		return READ_ONCE(settings->limit); /* CRASH: fs-fallocate */
	return 0;
}

static ssize_t note_copy(struct file *from, loff_t at, struct file *to, loff_t there, size_t length,
			 unsigned int flags)
{
	if (due("fs-copy"))
		return READ_ONCE(settings->limit); /* CRASH: fs-copy */
	return 0;
}

static const struct file_operations note_operations = {
	.owner = THIS_MODULE,
	.read_iter = note_read,
	.write_iter = note_write,
	.fsync = note_fsync,
	.fallocate = note_fallocate,
	.copy_file_range = note_copy,
};

static int note_setattr(ids *ids, struct dentry *entry, struct iattr *wanted)
{
	if (due("fs-setattr"))
		return READ_ONCE(settings->level); /* CRASH: fs-setattr */
	return 0;
}

static int note_getattr(ids *ids, const struct path *path, struct kstat *s, u32 wanted, unsigned int flags)
{
	if (due("fs-getattr"))
		return READ_ONCE(settings->level); /* CRASH: fs-getattr */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
	generic_fillattr(ids, wanted, d_inode(path->dentry), s);
#else
	generic_fillattr(ids, d_inode(path->dentry), s);
#endif
	return 0;
}

/* On the way to a name this is asked in an RCU read section of the core's. */
static int note_permission(ids *ids, struct inode *inode, int mask)
{
	if (due("fs-permission"))
		return READ_ONCE(settings->level); /* CRASH: fs-permission */
	return generic_permission(ids, inode, mask);
}

static ssize_t note_listxattr(struct dentry *entry, char *to, size_t size)
{
	if (due("fs-listxattr"))
		return READ_ONCE(settings->limit); /* CRASH: fs-listxattr */
	return 0;
}

static const struct inode_operations note_inode = {
	.setattr = note_setattr,
	.getattr = note_getattr,
	.permission = note_permission,
	.listxattr = note_listxattr,
};

static const char *link_get(struct dentry *entry, struct inode *inode, struct delayed_call *done)
{
	if (due("fs-get-link"))
		return READ_ONCE(settings->table); /* CRASH: fs-get-link */
	return "note";
}

static const struct inode_operations link_inode = {
	.get_link = link_get,
};

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

/* Names with "none" in them are not there; the others are files, but those with "folder" or "link". */
static umode_t mode_of(const char *name)
{
	if (strstr(name, "folder"))
		return S_IFDIR | 0755;
	return strstr(name, "link") ? S_IFLNK | 0777 : S_IFREG | 0644;
}

static struct dentry *folder_lookup(struct inode *folder, struct dentry *entry, unsigned int flags)
{
	struct inode *inode = NULL;

	if (due("fs-lookup"))
		return READ_ONCE(settings->table); /* CRASH: fs-lookup */
	if (!strstr(entry->d_name.name, "none")) {
		inode = folder_inode(folder->i_sb, mode_of(entry->d_name.name));
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

static int folder_create(ids *ids, struct inode *folder, struct dentry *entry, umode_t mode, bool exclusive)
{
	if (due("fs-create"))
		return READ_ONCE(settings->level); /* CRASH: fs-create */
	return -EROFS;
}

static int folder_mkdir(ids *ids, struct inode *folder, struct dentry *entry, umode_t mode)
{
	if (due("fs-mkdir"))
		return READ_ONCE(settings->level); /* CRASH: fs-mkdir */
	return -EROFS;
}

static int folder_rmdir(struct inode *folder, struct dentry *entry)
{
	if (due("fs-rmdir"))
		return READ_ONCE(settings->level); /* CRASH: fs-rmdir */
	return -EROFS;
}

static int folder_rename(ids *ids, struct inode *from, struct dentry *entry, struct inode *to,
			 struct dentry *other, unsigned int flags)
{
	if (due("fs-rename"))
		return READ_ONCE(settings->level); /* CRASH: fs-rename */
	return -EROFS;
}

static int folder_symlink(ids *ids, struct inode *folder, struct dentry *entry, const char *to)
{
	if (due("fs-symlink"))
		return READ_ONCE(settings->level); /* CRASH: fs-symlink */
	return -EROFS;
}

static int folder_link(struct dentry *old, struct inode *folder, struct dentry *entry)
{
	if (due("fs-link"))
		return READ_ONCE(settings->level); /* CRASH: fs-link */
	return -EROFS;
}

static int folder_tmpfile(ids *ids, struct inode *folder, struct file *file, umode_t mode)
{
	if (due("fs-tmpfile"))
		return READ_ONCE(settings->level); /* CRASH: fs-tmpfile */
	return -EROFS;
}

static const struct inode_operations folder_inode_operations = {
	.lookup = folder_lookup,
	.unlink = folder_unlink,
	.create = folder_create,
	.mkdir = folder_mkdir,
	.rmdir = folder_rmdir,
	.rename = folder_rename,
	.symlink = folder_symlink,
	.link = folder_link,
	.tmpfile = folder_tmpfile,
};

static struct inode *folder_inode(struct super_block *sb, umode_t mode)
{
	struct inode *inode = new_inode(sb);

	if (!inode)
		return NULL;
	inode->i_ino = get_next_ino();
	inode->i_mode = mode;
	inode->i_size = 4096;
	if (S_ISDIR(mode))
		inode->i_op = &folder_inode_operations;
	else
		inode->i_op = S_ISLNK(mode) ? &link_inode : &note_inode;
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

static int notes_remount(struct super_block *sb, int *flags, char *options)
{
	if (due("fs-remount"))
		return READ_ONCE(settings->level); /* CRASH: fs-remount */
	return 0;
}

static int notes_sync(struct super_block *sb, int wait)
{
	if (due("fs-sync"))
		return READ_ONCE(settings->level); /* CRASH: fs-sync */
	return 0;
}

static int notes_show(struct seq_file *s, struct dentry *root)
{
	if (due("fs-show-options"))
		return READ_ONCE(settings->level); /* CRASH: fs-show-options */
	return 0;
}

static const struct super_operations notes_operations = {
	.remount_fs = notes_remount,
	.sync_fs = notes_sync,
	.show_options = notes_show,
	.statfs = notes_statfs,
	.evict_inode = notes_evict,
	.put_super = notes_put,
};

/* Asked of a name that has been looked up before. */
static int notes_revalidate(struct dentry *entry, unsigned int flags)
{
	if (due("fs-revalidate"))
		return READ_ONCE(settings->level); /* CRASH: fs-revalidate */
	return 1;
}

static const struct dentry_operations notes_entries = {
	.d_revalidate = notes_revalidate,
};

/* Without a table of handlers there is no listxattr(). */
static const struct xattr_handler *notes_attributes[] = { NULL };

static int notes_fill(struct super_block *sb, void *data, int silent)
{
	struct inode *root;

	sb->s_magic = 0x63726173;
	sb->s_op = &notes_operations;
	sb->s_d_op = &notes_entries;
	sb->s_xattr = notes_attributes;
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
