/*
 * Operations of the crash command by which the core kernel executes what a driver damaged of its text
 * or read-only data.
 */
#define _GNU_SOURCE
#include "trigger.h"

#include <errno.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

/* Its first instruction is damaged; the niceness is what it was. */
long run_getpriority(struct run *r)
{
	long before, n;

	errno = 0;
	before = getpriority(PRIO_PROCESS, 0);
	if (errno || put(r, "") < 0)
		return -1;
	n = getpriority(PRIO_PROCESS, 0);
	if (n != before) {
		errno = EBADMSG;
		return -1;
	}
	return errno ? -1 : 0;
}

/* The pointer to its write() is damaged; the counter is what it was set to. */
long run_eventfd(struct run *r)
{
	int fd = eventfd(0, EFD_CLOEXEC);
	uint64_t value = 7;
	long n;

	if (fd < 0 || put(r, "") < 0)
		return -1;
	n = write(fd, &value, sizeof(value));
	if (n == sizeof(value)) {
		value = 0;
		n = read(fd, &value, sizeof(value));
	}
	close(fd);
	if (n >= 0 && value != 7) {
		errno = EBADMSG;
		return -1;
	}
	return n;
}
