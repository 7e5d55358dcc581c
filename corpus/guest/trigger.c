/*
 * The agent's commands about a crash driver: one or two processes do what makes it fault, and what
 * they saw is told. The faults themselves are in the drivers.
 *
 * A driver is a device /dev/NAME. Writing a case's name to it runs that case or, for "arm:CASE",
 * makes the next operation of the right kind run it; reading it gives its self-check.
 */
#define _GNU_SOURCE
#include "agent.h"
#include "trigger.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

/* What one process saw; it goes through a pipe to the agent. */
struct sight {
	long value;       /* the call's return value */
	int error;        /* its errno, 0 when it succeeded */
	long long us;     /* how long it took */
	char self[96];    /* the driver's self-check, done by the same process afterwards */
};

long put(struct run *r, const char *prefix)
{
	char text[96];
	int n = snprintf(text, sizeof(text), "%s%s", prefix, r->test);

	return write(r->fd, text, (size_t)n);
}

static long run_write(struct run *r)
{
	return put(r, "");
}

static long run_ioctl(struct run *r)
{
	return put(r, "arm:") < 0 ? -1 : ioctl(r->fd, CRASH_IOC_RUN, 0);
}

static long run_read(struct run *r)
{
	char buffer[64];

	return put(r, "arm:") < 0 ? -1 : read(r->fd, buffer, sizeof(buffer));
}

static long run_open(struct run *r)
{
	char path[64];
	int fd;

	if (put(r, "arm:") < 0)
		return -1;
	snprintf(path, sizeof(path), "/dev/%s", r->device);
	fd = open(path, O_RDONLY);
	if (fd >= 0)
		close(fd);
	return fd < 0 ? -1 : 0;
}

/* The result is that of close(), which the kernel gives whatever the driver says. */
static long run_release(struct run *r)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/dev/%s", r->device);
	fd = open(path, O_RDONLY);
	if (fd < 0 || put(r, "arm:") < 0)
		return -1;
	return close(fd);
}

/* Gives the events, so that POLLERR of a failed driver shows as value 8. */
static long run_poll(struct run *r)
{
	struct pollfd p = { .fd = r->fd, .events = POLLIN };

	if (put(r, "arm:") < 0 || poll(&p, 1, 3000) < 0)
		return -1;
	return p.revents;
}

/* The same, for as long as it takes. */
static long run_wait(struct run *r)
{
	struct pollfd p = { .fd = r->fd, .events = POLLIN };

	return poll(&p, 1, -1) < 0 ? -1 : p.revents;
}

static long run_mmap(struct run *r)
{
	void *area;

	if (put(r, "arm:") < 0)
		return -1;
	area = mmap(NULL, 4096, PROT_READ, MAP_SHARED, r->fd, 0);
	return area == MAP_FAILED ? -1 : 0;
}

/* Reads the driver's file in /proc. */
static long run_seq(struct run *r)
{
	char path[64], buffer[64];
	long n;
	int fd;

	if (put(r, "arm:") < 0)
		return -1;
	snprintf(path, sizeof(path), "/proc/%s", r->device);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return -1;
	n = read(fd, buffer, sizeof(buffer));
	close(fd);
	return n;
}

/* Writes the driver's attribute in /sys. */
static long run_sysfs(struct run *r)
{
	char path[96];
	int fd;
	long n;

	if (put(r, "arm:") < 0)
		return -1;
	snprintf(path, sizeof(path), "/sys/class/misc/%s/level", r->device);
	fd = open(path, O_WRONLY);
	if (fd < 0)
		return -1;
	n = write(fd, "1", 1);
	close(fd);
	return n;
}

/* Changes the loopback's MTU, of which the driver is notified under the core's lock. */
static long run_netdev(struct run *r)
{
	int status;

	if (put(r, "arm:") < 0)
		return -1;
	status = system("ip link set lo mtu 65000 2>/dev/null && ip link set lo mtu 65536");
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
}

/* Starts something that faults later, and computes meanwhile: a bystander must come through. */
static long run_busy(struct run *r)
{
	unsigned long long x = 1, sum = 0;
	long long end = now_us() + 400000;
	long n;

	pin(1);
	n = put(r, "");
	while (n >= 0 && now_us() < end) {
		sum = 0;
		for (int i = 0; i < 1000; i++) {
			x = x * 6364136223846793005ULL + 1442695040888963407ULL;
			sum += x;
		}
		/* The same thousand steps again from the other side: the inverse generator. */
		for (int i = 0; i < 1000; i++) {
			sum -= x;
			x = (x - 1442695040888963407ULL) * 0xc097ef87329e28a5ULL;
		}
		if (sum || x != 1) {
			errno = EBADMSG;
			return -1;
		}
	}
	return n;
}

/* Starts something that faults later, and sleeps meanwhile: the processor is idle then. */
static long run_idle(struct run *r)
{
	long n;

	pin(1);
	n = put(r, "");
	usleep(400000);
	return n;
}

/* The driver damages this process's working directory; the core then runs into it. */
static long run_getcwd(struct run *r)
{
	char buffer[256];

	return put(r, "") < 0 ? -1 : getcwd(buffer, sizeof(buffer)) ? 0 : -1;
}

/* The driver damages this process's private UTS namespace. */
static long run_uname(struct run *r)
{
	struct utsname u;

	if (unshare(CLONE_NEWUTS) < 0 || put(r, "") < 0)
		return -1;
	return uname(&u);
}

static int damaged_pipe(struct run *r, int ends[2])
{
	if (pipe(ends) < 0 || write(ends[1], "bytes", 5) != 5)
		return -1;
	return ioctl(r->fd, CRASH_IOC_DAMAGE_PIPE, &ends[0]);
}

static long run_pipe_read(struct run *r)
{
	char buffer[16];
	int ends[2];

	return damaged_pipe(r, ends) < 0 ? -1 : read(ends[0], buffer, sizeof(buffer));
}

static long run_pipe_write(struct run *r)
{
	int ends[2];

	return damaged_pipe(r, ends) < 0 ? -1 : write(ends[1], "more", 4);
}

/* As often as a quarantine takes, and once more; the last call's answer. */
static long run_again(struct run *r)
{
	long n = -1;

	for (int i = 0; i < 4; i++)
		n = put(r, "");
	return n;
}

static const struct {
	const char *name;
	long (*run)(struct run *r);
} operations[] = {
	{ "write", run_write },           { "again", run_again },     { "wait", run_wait },     { "ioctl", run_ioctl },     { "read", run_read },
	{ "open", run_open },             { "poll", run_poll },       { "mmap", run_mmap },
	{ "seq", run_seq },               { "sysfs", run_sysfs },     { "netdev", run_netdev },
	{ "busy", run_busy },             { "idle", run_idle },       { "getcwd", run_getcwd },
	{ "release", run_release },       { "uname", run_uname },     { "pipe-read", run_pipe_read },
	{ "pipe-write", run_pipe_write },
	{ "getpriority", run_getpriority }, { "eventfd", run_eventfd }, { "warn", run_warn },       { "sysrq", run_sysrq },
	{ "out-of-memory", run_out_of_memory },
	{ "sethostname", run_sethostname },
	{ "damaged-file", run_damaged_file }, { "damaged-socket", run_damaged_socket },
	/* The operation of a name with a colon. */
	{ ":", run_verb },
};

static void self_check(const char *device, char *text, size_t size)
{
	char path[64];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/dev/%s", device);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	n = fd < 0 ? -1 : read(fd, text, size - 1);
	if (n < 0)
		snprintf(text, size, "%s:%s", fd < 0 ? "open" : "read", errno_name(errno));
	else
		text[n] = 0;
	text[strcspn(text, "\n")] = 0;
	if (fd >= 0)
		close(fd);
}

/* In the child: the operation, and then the self-check by the same task. */
static void act(size_t operation, struct run *r, int out)
{
	struct sight s = { 0 };
	char path[64];
	long long start;

	snprintf(path, sizeof(path), "/dev/%s", r->device);
	r->fd = open(path, O_RDWR);
	start = now_us();
	errno = 0;
	/* A shell command may be what brings the device. */
	s.value = r->fd < 0 && !r->place ? -1 : operations[operation].run(r);
	s.error = s.value < 0 ? errno : 0;
	s.us = now_us() - start;
	self_check(r->device, s.self, sizeof(s.self));
	if (write(out, &s, sizeof(s)) != sizeof(s))
		_exit(1);
	_exit(0);
}

static int find_operation(const char *name)
{
	if (strchr(name, ':'))
		name = ":";
	for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
		if (!strcmp(operations[i].name, name))
			return (int)i;
	return -1;
}

struct child {
	pid_t pid;
	int in;           /* reads the sight */
};

static struct child begin(const char *name, const char *device, const char *test, int cpu)
{
	size_t operation = (size_t)find_operation(name);
	const char *colon = strchr(name, ':');
	struct child c = { -1, -1 };
	int ends[2];

	if (pipe2(ends, O_CLOEXEC) < 0)
		return c;
	c.pid = fork();
	if (c.pid == 0) {
		struct run r = { device, test, colon ? colon + 1 : NULL, name, -1 };

		signal(SIGPIPE, SIG_DFL);
		pin(cpu);
		act(operation, &r, ends[1]);
	}
	close(ends[1]);
	c.in = ends[0];
	return c;
}

static char state_of(pid_t pid)
{
	char path[64], line[256], *end;
	char state = '?';
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	f = fopen(path, "re");
	if (f && fgets(line, sizeof(line), f) && (end = strrchr(line, ')')))
		state = end[2];
	if (f)
		fclose(f);
	return state;
}

/* Waits for the child and says, each key with the prefix, what became of it. */
static void finish(struct answer *a, const char *prefix, struct child c, long long deadline)
{
	struct sight s;
	int status = 0;
	pid_t ended = 0;

	while (c.pid > 0 && !(ended = waitpid(c.pid, &status, WNOHANG)) && now_us() < deadline)
		usleep(1000);
	if (c.pid <= 0)
		say(a, "%soutcome=unstarted ", prefix);
	else if (!ended)
		say(a, "%soutcome=stuck %spid=%d %sstate=%c ", prefix, prefix, c.pid, prefix, state_of(c.pid));
	else if (WIFSIGNALED(status))
		say(a, "%soutcome=signal %ssignal=%d ", prefix, prefix, WTERMSIG(status));
	else if (WEXITSTATUS(status) || read(c.in, &s, sizeof(s)) != sizeof(s))
		say(a, "%soutcome=exit %sstatus=%d ", prefix, prefix, WEXITSTATUS(status));
	else
		say(a, "%soutcome=returned %svalue=%ld %serrno=%s %sus=%lld %sself=%s ", prefix, prefix, s.value,
		    prefix, errno_name(s.error), prefix, s.us, prefix, s.self);
	if (c.in >= 0)
		close(c.in);
}

/*
 * crash DEVICE OPERATION CASE [MS] | crash DEVICE pair CASE,CASE2 [MS]: two processes, one lock.
 * crash DEVICE asleep:OPERATION CASE,CASE2 [MS]: the second sleeps in that operation while the first crashes again
 * and again.
 */
void command_crash(struct answer *a, int argc, char **argv)
{
	long long deadline = now_us() + 1000 * (argc > 4 ? atoll(argv[4]) : 10000);
	struct child first, second;
	char *comma;

	if (argc < 4) {
		fail(a, "crash DEVICE OPERATION CASE [MS]");
		return;
	}
	comma = strchr(argv[3], ',');
	if (!strcmp(argv[2], "pair") && comma) {
		*comma++ = 0;
		/* The first may keep its processor to itself, and the second is still to be started. */
		pin(1);
		first = begin("write", argv[1], argv[3], 0);
		usleep(50000);
		second = begin("write", argv[1], comma, 1);
		finish(a, "", first, deadline);
		finish(a, "waiter_", second, deadline);
		return;
	}
	if (!strncmp(argv[2], "asleep:", 7) && comma) {
		*comma++ = 0;
		second = begin(argv[2] + 7, argv[1], comma, 0);
		usleep(200000);
		first = begin("again", argv[1], argv[3], 1);
		finish(a, "", first, deadline);
		finish(a, "waiter_", second, deadline);
		return;
	}
	if (find_operation(argv[2]) < 0) {
		fail(a, "no operation %s", argv[2]);
		return;
	}
	/* The agent's own looking after the child must not keep the other processor from being idle. */
	pin(0);
	first = begin(argv[2], argv[1], argv[3], 0);
	finish(a, "", first, deadline);
}

/* check DEVICE: the driver's self-check, by a process of its own that may not come back. */
void command_check(struct answer *a, int argc, char **argv)
{
	char text[96] = "";
	int ends[2];
	long long deadline = now_us() + 5000000;
	pid_t pid, ended = 0;
	ssize_t n;

	if (argc < 2 || pipe2(ends, O_CLOEXEC) < 0) {
		fail(a, "check DEVICE");
		return;
	}
	pid = fork();
	if (pid == 0) {
		self_check(argv[1], text, sizeof(text));
		_exit(write(ends[1], text, strlen(text)) < 0);
	}
	close(ends[1]);
	while (pid > 0 && !(ended = waitpid(pid, NULL, WNOHANG)) && now_us() < deadline)
		usleep(1000);
	n = ended == pid ? read(ends[0], text, sizeof(text) - 1) : -1;
	if (n <= 0)
		fail(a, "no answer, pid %d state %c", pid, state_of(pid));
	else
		say(a, "%.*s", (int)n, text);
	close(ends[0]);
}
