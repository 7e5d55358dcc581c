// SPDX-License-Identifier: GPL-2.0-only
/*
 * Damage to a process's own kernel objects: the core kernel runs into it later, in a system call of
 * that process, with no frame of this module on the stack. Nothing shared is damaged, and the damage is
 * such that the kernel's exit path gets over it: ending the process leaves everything else healthy.
 */
#include <linux/file.h>
#include <linux/fs_struct.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/nsproxy.h>
#include <linux/net.h>
#include <linux/pipe_fs_i.h>
#include <linux/seq_file.h>
#include <linux/utsname.h>
#include <net/sock.h>

#include "crash.h"

/*
 * getcwd() then faults on the missing dentry inside an RCU read section. exit_fs() drops a NULL dentry
 * without a word.
 */
static int damage_working_directory(void)
{
	struct fs_struct *fs = current->fs;

	if (fs->users != 1)
		return -EBUSY;
	spin_lock(&fs->lock);
	fs->pwd.dentry = NULL;
	spin_unlock(&fs->lock);
	return 0;
}

/*
 * uname() then faults with uts_sem, of which the system has only one, held for reading. The namespaces
 * must be the process's own (unshare); free_nsproxy() passes over a missing one.
 */
static int damage_uts_namespace(void)
{
	bool shared;

	rcu_read_lock();
	shared = current->nsproxy == rcu_dereference(current->real_parent)->nsproxy;
	rcu_read_unlock();
	if (shared)
		return -EBUSY;
	current->nsproxy->uts_ns = NULL;
	return 0;
}

/*
 * read() and write() of the pipe then fault with the pipe's mutex held. free_pipe_info() passes over
 * buffers without operations.
 */
static int damage_pipe(int fd)
{
	struct file *file = fget(fd);
	struct pipe_inode_info *pipe;
	int error = -EINVAL;

	if (!file)
		return -EBADF;
	if (S_ISFIFO(file_inode(file)->i_mode)) {
		pipe = file->private_data;
		mutex_lock(&pipe->mutex);
		if (pipe->head != pipe->tail) {
			pipe->bufs[(pipe->head - 1) & (pipe->ring_size - 1)].ops = NULL;
			error = 0;
		}
		mutex_unlock(&pipe->mutex);
	}
	fput(file);
	return error;
}

/* Operations of one file and one socket, changed at one place. */
static struct file_operations changed_operations;
static struct proto changed_protocol;
static unsigned long no_code[4];
static char armed[CRASH_NAME_MAX];

/* read() then calls data. Everything else of the file works as before. */
static int damage_operations_of(struct file *file)
{
	changed_operations = *file->f_op;
	changed_operations.read_iter = NULL;
	changed_operations.read = (void *)no_code;
	file->f_op = &changed_operations;
	return 0;
}

/* The file's show() in /proc then runs without the inode that it is about. */
static int damage_sequence(struct file *file)
{
	struct seq_file *seq = file->private_data;

	mutex_lock(&seq->lock);
	seq->private = NULL;
	mutex_unlock(&seq->lock);
	return 0;
}

/* recvmsg() then calls through a missing pointer. */
static int damage_protocol(struct file *file)
{
	struct socket *socket = sock_from_file(file);

	if (!socket)
		return -ENOTSOCK;
	changed_protocol = *socket->sk->sk_prot;
	changed_protocol.recvmsg = NULL;
	WRITE_ONCE(socket->sk->sk_prot, &changed_protocol);
	return 0;
}

static int damage_file(int fd)
{
	struct file *file = fget(fd);
	int error = -EINVAL;

	if (!file)
		return -EBADF;
	if (!strcmp(armed, "file-operations"))
		error = damage_operations_of(file);
	else if (!strcmp(armed, "proc-show"))
		error = damage_sequence(file);
	else if (!strcmp(armed, "socket"))
		error = damage_protocol(file);
	fput(file);
	return error;
}

static ssize_t damage_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	if (!strncmp(name, "arm:", 4)) {
		strscpy(armed, name + 4, sizeof(armed));
		return count;
	}
	if (!strcmp(name, "getcwd"))
		error = damage_working_directory();
	else if (!strcmp(name, "uname"))
		error = damage_uts_namespace();
	else
		error = -EINVAL;
	return error ? error : count;
}

static long damage_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	int fd;

	if (command != CRASH_IOC_DAMAGE_PIPE && command != CRASH_IOC_DAMAGE_FILE)
		return -ENOTTY;
	if (copy_from_user(&fd, (int __user *)argument, sizeof(fd)))
		return -EFAULT;
	return command == CRASH_IOC_DAMAGE_PIPE ? damage_pipe(fd) : damage_file(fd);
}

static ssize_t damage_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	return crash_verdict(NULL, to, count, at);
}

static const struct file_operations damage_operations = {
	.owner = THIS_MODULE,
	.read = damage_read,
	.write = damage_write,
	.unlocked_ioctl = damage_ioctl,
};

static struct miscdevice damage_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_core",
	.fops = &damage_operations,
	.mode = 0666,
};

module_misc_device(damage_device);
MODULE_DESCRIPTION("Crash corpus: the core kernel faults on behalf of a process");
MODULE_LICENSE("GPL");
