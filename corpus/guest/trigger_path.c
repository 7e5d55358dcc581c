/*
 * Operations of the crash command that name a place: "VERB:PATH" does something to a file after the
 * driver was armed, "sh:COMMAND" runs a shell command with + for blanks. What a process sees of them is
 * told by trigger.c.
 */
#define _GNU_SOURCE
#include "agent.h"
#include "trigger.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Opens the place for reading and writing, or for what is allowed of it. */
static int open_place(struct run *r)
{
	int fd = open(r->place, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		fd = open(r->place, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? open(r->place, O_WRONLY | O_CLOEXEC) : fd;
}

static int arm(struct run *r)
{
	return put(r, "arm:") < 0 ? -1 : 0;
}

/* What is done to the open file: arming comes right before it. */
static long path_read(struct run *r, int fd)
{
	char buffer[64];

	return arm(r) ? -1 : read(fd, buffer, sizeof(buffer));
}

static long path_write(struct run *r, int fd)
{
	return arm(r) ? -1 : write(fd, "1", 1);
}

static long path_ioctl(struct run *r, int fd)
{
	return arm(r) ? -1 : ioctl(fd, CRASH_IOC_RUN, 0);
}

static long path_poll(struct run *r, int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	return arm(r) || poll(&p, 1, 3000) < 0 ? -1 : p.revents;
}

static long path_mmap(struct run *r, int fd)
{
	return arm(r) || mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED ? -1 : 0;
}

static long path_lseek(struct run *r, int fd)
{
	return arm(r) ? -1 : lseek(fd, 0, SEEK_SET);
}

static long path_close(struct run *r, int fd)
{
	int copy = fcntl(fd, F_DUPFD, 100);

	/* The caller closes the first one: the last reference must go here. */
	close(fd);
	return arm(r) ? -1 : close(copy);
}

static long path_flush(struct run *r, int fd)
{
	int copy = dup(fd);

	return arm(r) ? -1 : close(copy);
}

static long path_fsync(struct run *r, int fd)
{
	return arm(r) ? -1 : fsync(fd);
}

static long path_fasync(struct run *r, int fd)
{
	return arm(r) ? -1 : fcntl(fd, F_SETFL, O_ASYNC);
}

static sigjmp_buf after_fault;

static void on_bus_error(int signal)
{
	(void)signal;
	siglongjmp(after_fault, 1);
}

/* An access to the mapping: SIGBUS shows as EFAULT. */
static long touch(struct run *r, int fd, int writing)
{
	struct sigaction action = { .sa_handler = on_bus_error };
	volatile char *area = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	sigaction(SIGBUS, &action, NULL);
	if (area == MAP_FAILED || (writing && area[0]) || arm(r))
		return -1;
	if (sigsetjmp(after_fault, 1)) {
		errno = EFAULT;
		return -1;
	}
	if (writing)
		area[0] = 1;
	return writing ? 0 : area[0];
}

static long path_fault(struct run *r, int fd)
{
	return touch(r, fd, 0);
}

static long path_mkwrite(struct run *r, int fd)
{
	return touch(r, fd, 1);
}

/*
 * The kernel reads the mapping for the process. It does so once for a file; for a pipe, what could not be copied is
 * tried again byte by byte.
 */
static long path_fault_write(struct run *r, int fd)
{
	void *area = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	int file = open("/", O_TMPFILE | O_RDWR, 0600);

	return area == MAP_FAILED || file < 0 || arm(r) ? -1 : write(file, area, 64);
}

/*
 * No crash: for twenty seconds every page of a large mapping is touched, by the program and by the kernel for it, which
 * mixes what it reads into its random numbers.
 */
static long path_sweep(struct run *r, int fd)
{
	const size_t size = 64 << 20;
	volatile char *area = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
	int sink = open("/dev/urandom", O_WRONLY);
	time_t end = time(NULL) + 20;
	long wrong = 0;

	if (area == MAP_FAILED || sink < 0 || arm(r))
		return -1;
	while (time(NULL) < end) {
		for (size_t at = 0; at < size; at += 4096)
			wrong += area[at];
		madvise((void *)area, size, MADV_DONTNEED);
		if (write(sink, (void *)area, size) != (ssize_t)size)
			return -1;
		madvise((void *)area, size, MADV_DONTNEED);
	}
	return wrong;
}

/* A second process gets a copy of the mapping. */
static long path_fork(struct run *r, int fd)
{
	void *area = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
	int status = -1;
	pid_t pid;

	if (area == MAP_FAILED || arm(r))
		return -1;
	pid = fork();
	if (pid == 0)
		_exit(0);
	return pid < 0 || waitpid(pid, &status, 0) < 0 ? -1 : status;
}

static long path_munmap(struct run *r, int fd)
{
	void *area = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);

	return area == MAP_FAILED || arm(r) ? -1 : munmap(area, 4096);
}

static long path_splice(struct run *r, int fd)
{
	int ends[2];

	return pipe(ends) < 0 || arm(r) ? -1 : splice(fd, NULL, ends[1], NULL, 64, 0);
}

static long path_unsplice(struct run *r, int fd)
{
	int ends[2];

	if (pipe(ends) < 0 || write(ends[1], "bytes", 5) != 5 || arm(r))
		return -1;
	return splice(ends[0], NULL, fd, NULL, 5, 0);
}

/* ioctl() as a 32-bit process calls it: number 54 by interrupt 0x80. */
static long path_compat(struct run *r, int fd)
{
	long result = 54;

	if (arm(r))
		return -1;
	__asm__ volatile("int $0x80"
			 : "+a"(result)
			 : "b"((long)fd), "c"((long)CRASH_IOC_RUN), "d"(0L)
			 : "memory", "r8", "r9", "r10", "r11");
	if ((int)result < 0) {
		errno = -(int)result;
		return -1;
	}
	return result;
}

static long path_preadv(struct run *r, int fd)
{
	char first[8], second[8];
	struct iovec parts[] = { { first, sizeof(first) }, { second, sizeof(second) } };

	return arm(r) ? -1 : readv(fd, parts, 2);
}

static long path_aio(struct run *r, int fd)
{
	char buffer[64];
	aio_context_t context = 0;
	struct iocb request = { .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (unsigned)fd,
				.aio_buf = (unsigned long)buffer, .aio_nbytes = sizeof(buffer) };
	struct iocb *requests[] = { &request };
	struct timespec limit = { 3, 0 };
	struct io_event event = { 0 };

	if (syscall(SYS_io_setup, 4, &context) < 0 || arm(r) ||
	    syscall(SYS_io_submit, context, 1, requests) < 0)
		return -1;
	if (syscall(SYS_io_getevents, context, 1, 1, &event, &limit) != 1)
		event.res = -ETIME;
	if (event.res < 0) {
		errno = (int)-event.res;
		return -1;
	}
	return event.res;
}

/* One request through a ring of its own; the flags may ask for a worker. */
static long uring(struct run *r, int fd, int opcode, int flags)
{
	static char buffer[64] = "1";
	struct io_uring_params p = { 0 };
	struct io_uring_cqe *done;
	struct io_uring_sqe *requests;
	unsigned *tail, *array, *done_tail;
	char *ring;
	int fd_ring = (int)syscall(SYS_io_uring_setup, 2, &p);

	if (fd_ring < 0)
		return -1;
	ring = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_ring, IORING_OFF_SQ_RING);
	requests = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_ring, IORING_OFF_SQES);
	if (ring == MAP_FAILED || requests == MAP_FAILED || arm(r))
		return -1;
	tail = (unsigned *)(ring + p.sq_off.tail);
	array = (unsigned *)(ring + p.sq_off.array);
	done_tail = (unsigned *)(ring + p.cq_off.tail);
	done = (struct io_uring_cqe *)(ring + p.cq_off.cqes);
	requests[0] = (struct io_uring_sqe){ .opcode = (unsigned char)opcode, .flags = (unsigned char)flags,
					     .fd = fd, .addr = (unsigned long)buffer,
					     .len = opcode == IORING_OP_READ ? sizeof(buffer) : 1 };
	array[0] = 0;
	__atomic_store_n(tail, 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, fd_ring, 1, 0, 0, NULL, 0) < 0)
		return -1;
	for (int tries = 0; tries < 3000 && !__atomic_load_n(done_tail, __ATOMIC_ACQUIRE); tries++)
		usleep(1000);
	if (!__atomic_load_n(done_tail, __ATOMIC_ACQUIRE)) {
		errno = ETIME;
		return -1;
	}
	if (done->res < 0) {
		errno = -done->res;
		return -1;
	}
	return done->res;
}

static long path_uring_read(struct run *r, int fd)
{
	return uring(r, fd, IORING_OP_READ, 0);
}

static long path_uring_write(struct run *r, int fd)
{
	return uring(r, fd, IORING_OP_WRITE, 0);
}

static long path_uring_worker(struct run *r, int fd)
{
	return uring(r, fd, IORING_OP_READ, IOSQE_ASYNC);
}

static long path_epoll(struct run *r, int fd)
{
	struct epoll_event event = { .events = EPOLLIN };
	int set = epoll_create1(EPOLL_CLOEXEC);

	if (set < 0 || arm(r) || epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) < 0)
		return -1;
	return epoll_wait(set, &event, 1, 3000) < 0 ? -1 : (long)event.events;
}

static long path_select(struct run *r, int fd)
{
	struct timeval limit = { 3, 0 };
	fd_set set;

	FD_ZERO(&set);
	FD_SET(fd, &set);
	return arm(r) ? -1 : select(fd + 1, &set, NULL, NULL, &limit);
}

static long path_fdinfo(struct run *r, int fd)
{
	char path[64], text[512];
	long n;
	int info;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = open(path, O_RDONLY | O_CLOEXEC);
	if (info < 0 || arm(r))
		return -1;
	n = read(info, text, sizeof(text));
	close(info);
	return n < 0 ? -1 : 0;
}

static long path_lock(struct run *r, int fd)
{
	struct flock lock = { .l_type = F_RDLCK };

	return arm(r) ? -1 : fcntl(fd, F_SETLK, &lock);
}

static long path_readdir(struct run *r, int fd)
{
	char entries[512];

	return arm(r) ? -1 : syscall(SYS_getdents64, fd, entries, sizeof(entries));
}

static long path_statfs(struct run *r, int fd)
{
	struct statfs s;

	return arm(r) ? -1 : fstatfs(fd, &s);
}

static long path_fallocate(struct run *r, int fd)
{
	return arm(r) ? -1 : fallocate(fd, 0, 0, 4096);
}

/* Into the same file, further on. */
static long path_copy(struct run *r, int fd)
{
	off_t from = 0, to = 1 << 20;

	return arm(r) ? -1 : copy_file_range(fd, &from, fd, &to, 4096, 0);
}

static long path_syncfs(struct run *r, int fd)
{
	return arm(r) ? -1 : syncfs(fd);
}

/* What names the place without having it open. */
static long name_open(struct run *r)
{
	int fd = arm(r) ? -1 : open(r->place, O_RDONLY | O_CLOEXEC);

	if (fd >= 0)
		close(fd);
	return fd < 0 ? -1 : 0;
}

static long name_create(struct run *r)
{
	int fd = arm(r) ? -1 : open(r->place, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd >= 0)
		close(fd);
	return fd < 0 ? -1 : 0;
}

static long name_stat(struct run *r)
{
	struct stat s;

	return arm(r) ? -1 : stat(r->place, &s);
}

static long name_chmod(struct run *r)
{
	return arm(r) ? -1 : chmod(r->place, 0644);
}

static long name_unlink(struct run *r)
{
	return arm(r) ? -1 : unlink(r->place);
}

static long name_mkdir(struct run *r)
{
	return arm(r) ? -1 : mkdir(r->place, 0755);
}

static long name_rmdir(struct run *r)
{
	return arm(r) ? -1 : rmdir(r->place);
}

static long name_symlink(struct run *r)
{
	return arm(r) ? -1 : symlink("note", r->place);
}

static long name_readlink(struct run *r)
{
	char to[64];

	return arm(r) ? -1 : readlink(r->place, to, sizeof(to));
}

static long name_listxattr(struct run *r)
{
	char names[256];

	return arm(r) ? -1 : listxattr(r->place, names, sizeof(names));
}

static long name_tmpfile(struct run *r)
{
	int fd = arm(r) ? -1 : open(r->place, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (fd >= 0)
		close(fd);
	return fd < 0 ? -1 : 0;
}

/* Another name beside the place, which nothing has yet. */
static long name_beside(struct run *r, int (*make)(const char *, const char *))
{
	char other[128];

	snprintf(other, sizeof(other), "%s-none", r->place);
	return arm(r) ? -1 : make(r->place, other);
}

static long name_link(struct run *r)
{
	return name_beside(r, link);
}

static long name_move(struct run *r)
{
	return name_beside(r, rename);
}

/* A place that the kernel remembers. */
static long name_stat_again(struct run *r)
{
	struct stat s;

	return stat(r->place, &s) < 0 ? -1 : name_stat(r);
}

static long name_remount(struct run *r)
{
	return arm(r) ? -1 : mount(NULL, r->place, NULL, MS_REMOUNT, NULL);
}

static long name_mounts(struct run *r)
{
	char text[4096];
	int fd = open("/proc/self/mounts", O_RDONLY | O_CLOEXEC);
	long n = fd < 0 || arm(r) ? -1 : read(fd, text, sizeof(text));

	if (fd >= 0)
		close(fd);
	return n;
}

/* Mounts or unmounts the driver's file system, which has the driver's name. */
static long name_mount(struct run *r)
{
	return arm(r) ? -1 : mount("none", r->place, r->device, 0, NULL);
}

static long name_umount(struct run *r)
{
	return arm(r) ? -1 : umount(r->place);
}

/* The process takes another name; the place does not matter. */
static long name_rename(struct run *r)
{
	return arm(r) ? -1 : prctl(PR_SET_NAME, "renamed");
}

static int shell(const char *place);

/* A packet of an experimental protocol out of the interface that the place names, which is put up. */
static long name_send(struct run *r)
{
	struct sockaddr to = { .sa_family = AF_PACKET };
	static const char packet[64] = "\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\1\x88\xb5";
	int fd = socket(AF_PACKET, SOCK_PACKET | SOCK_CLOEXEC, 0);
	char command[96];
	long n;

	snprintf(command, sizeof(command), "ip+link+set+%s+up", r->place);
	snprintf(to.sa_data, sizeof(to.sa_data), "%s", r->place);
	if (fd < 0 || shell(command))
		return -1;
	n = arm(r) ? -1 : sendto(fd, packet, sizeof(packet), 0, &to, sizeof(to));
	usleep(50000);
	return n;
}

/* Packets out of the interface that the place names, until it has no carrier any more: 0 then. */
static long name_unplugged(struct run *r)
{
	char path[96];

	snprintf(path, sizeof(path), "/sys/class/net/%s/carrier", r->place);
	for (int i = 0; i < 40; i++) {
		char carrier = '?';
		int fd;

		if (name_send(r) < 0 && errno != ENETDOWN && errno != ENOBUFS)
			return -1;
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || read(fd, &carrier, 1) != 1)
			return -1;
		close(fd);
		if (carrier == '0')
			return 0;
	}
	errno = ETIMEDOUT;
	return -1;
}

/* The interface goes up unharmed, and then down. */
static long name_down(struct run *r)
{
	char command[96];

	snprintf(command, sizeof(command), "ip+link+set+%s+up", r->place);
	if (shell(command) || arm(r))
		return -1;
	snprintf(command, sizeof(command), "ip+link+set+%s+down", r->place);
	return shell(command);
}

/* A datagram to the discard port of an address. */
static long name_datagram(struct run *r)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(9) };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	inet_pton(AF_INET, r->place, &to.sin_addr);
	return fd < 0 || arm(r) ? -1 : sendto(fd, "x", 1, 0, (struct sockaddr *)&to, sizeof(to));
}

static int shell(const char *place)
{
	char command[256];
	int status;

	snprintf(command, sizeof(command), "%s", place);
	for (char *blank = command; (blank = strchr(blank, '+')); blank++)
		*blank = ' ';
	status = system(command);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* The command must find the driver unused: its device is closed first. */
static long name_shell(struct run *r)
{
	if (r->fd >= 0 && arm(r))
		return -1;
	close(r->fd);
	return shell(r->place);
}

static const struct {
	const char *verb;
	long (*open)(struct run *r, int fd); /* on the open file */
	long (*named)(struct run *r);        /* or on its name */
} verbs[] = {
	{ "read", path_read, NULL },           { "write", path_write, NULL },
	{ "ioctl", path_ioctl, NULL },         { "poll", path_poll, NULL },
	{ "mmap", path_mmap, NULL },           { "lseek", path_lseek, NULL },
	{ "close", path_close, NULL },         { "flush", path_flush, NULL },
	{ "fsync", path_fsync, NULL },         { "fasync", path_fasync, NULL },
	{ "fault", path_fault, NULL },         { "mkwrite", path_mkwrite, NULL },
	{ "fault-write", path_fault_write, NULL }, { "sweep", path_sweep, NULL },
	{ "fork", path_fork, NULL },           { "munmap", path_munmap, NULL },
	{ "splice", path_splice, NULL },       { "unsplice", path_unsplice, NULL },
	{ "compat", path_compat, NULL },       { "preadv", path_preadv, NULL },
	{ "aio", path_aio, NULL },             { "uring-read", path_uring_read, NULL },
	{ "uring-write", path_uring_write, NULL }, { "uring-worker", path_uring_worker, NULL },
	{ "epoll", path_epoll, NULL },         { "select", path_select, NULL },
	{ "fdinfo", path_fdinfo, NULL },       { "lock", path_lock, NULL },
	{ "readdir", path_readdir, NULL },     { "statfs", path_statfs, NULL },
	{ "open", NULL, name_open },           { "create", NULL, name_create },
	{ "stat", NULL, name_stat },           { "chmod", NULL, name_chmod },
	{ "unlink", NULL, name_unlink },       { "mkdir", NULL, name_mkdir },
	{ "mount", NULL, name_mount },         { "umount", NULL, name_umount },
	{ "send", NULL, name_send },           { "down", NULL, name_down },
	{ "unplugged", NULL, name_unplugged },
	{ "datagram", NULL, name_datagram },   { "sh", NULL, name_shell },
	{ "rename", NULL, name_rename },
	{ "fallocate", path_fallocate, NULL }, { "copy", path_copy, NULL },
	{ "syncfs", path_syncfs, NULL },       { "rmdir", NULL, name_rmdir },
	{ "symlink", NULL, name_symlink },     { "readlink", NULL, name_readlink },
	{ "listxattr", NULL, name_listxattr }, { "tmpfile", NULL, name_tmpfile },
	{ "link", NULL, name_link },           { "move", NULL, name_move },
	{ "stat-again", NULL, name_stat_again }, { "remount", NULL, name_remount },
	{ "mounts", NULL, name_mounts },
};

long run_verb(struct run *r)
{
	size_t length = strcspn(r->verb, ":");
	long result;
	int fd;

	/* "in-VERB": with the driver's file system mounted there, which has the driver's name. */
	if (!strncmp(r->verb, "in-", 3)) {
		if (mount("none", "/run", r->device, 0, NULL) < 0)
			return -1;
		r->verb += 3;
		length -= 3;
	}
	for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		if (strlen(verbs[i].verb) != length || strncmp(verbs[i].verb, r->verb, length))
			continue;
		if (verbs[i].named)
			return verbs[i].named(r);
		fd = open_place(r);
		if (fd < 0)
			return -1;
		result = verbs[i].open(r, fd);
		/* What was seen is not to be covered by what close() says. */
		int error = errno;
		close(fd);
		errno = error;
		return result;
	}
	errno = ENOSYS;
	return -1;
}
