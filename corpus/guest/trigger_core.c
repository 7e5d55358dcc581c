/*
 * Operations of the crash command by which the core kernel faults, or by which the system is set so that
 * something counts as a crash. What a process sees of them is told by trigger.c.
 */
#define _GNU_SOURCE
#include "trigger.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int put_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), error;
	long n;

	if (fd < 0)
		return -1;
	n = write(fd, text, strlen(text));
	error = errno;
	close(fd);
	errno = error;
	return n < 0 ? -1 : 0;
}

/* With kernel.panic_on_warn set, for as long as it takes. */
long run_warn(struct run *r)
{
	long n;
	int error;

	if (put_text("/proc/sys/kernel/panic_on_warn", "1") < 0)
		return -1;
	n = put(r, "");
	error = errno;
	if (put_text("/proc/sys/kernel/panic_on_warn", "0") < 0)
		return -1;
	errno = error;
	return n;
}

/* The driver damages this process's private UTS namespace, whose name is then to be changed. */
long run_sethostname(struct run *r)
{
	return unshare(CLONE_NEWUTS) < 0 || put(r, "") < 0 ? -1 : sethostname("x", 1);
}

/* What an administrator does to see a crash dump. */
long run_sysrq(struct run *r)
{
	(void)r;
	return put_text("/proc/sysrq-trigger", "c");
}

/* All memory there is, where an administrator has asked for a panic then. */
long run_out_of_memory(struct run *r)
{
	enum { PART = 1 << 20 };
	char *part;

	(void)r;
	if (put_text("/proc/sys/vm/panic_on_oom", "2") < 0)
		return -1;
	while ((part = malloc(PART)))
		memset(part, 1, PART);
	return 0;
}

/* The driver damages the open file named, in the way that the test says; then it is read. */
static long read_damaged(struct run *r, int fd)
{
	char buffer[64];
	long n;
	int error;

	if (fd < 0 || put(r, "arm:") < 0 || ioctl(r->fd, CRASH_IOC_DAMAGE_FILE, &fd) < 0)
		return -1;
	n = read(fd, buffer, sizeof(buffer));
	error = errno;
	close(fd);
	errno = error;
	return n;
}

long run_damaged_file(struct run *r)
{
	return read_damaged(r, open("/proc/self/status", O_RDONLY | O_CLOEXEC));
}

long run_damaged_socket(struct run *r)
{
	struct sockaddr_in to = { .sin_family = AF_INET };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (fd < 0 || bind(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
		return -1;
	return read_damaged(r, fd);
}
