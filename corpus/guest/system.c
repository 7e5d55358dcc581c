/* The agent's commands about the guest as a whole: modules, kernel log, processes, shell, disk. */
#define _GNU_SOURCE
#include "agent.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

void command_load(struct answer *a, int argc, char **argv)
{
	char path[256], parameters[256] = "";
	int fd;

	if (argc < 2) {
		fail(a, "load MODULE [PARAMETER…]");
		return;
	}
	for (int i = 2; i < argc; i++) {
		strncat(parameters, argv[i], sizeof(parameters) - strlen(parameters) - 2);
		strcat(parameters, " ");
	}
	snprintf(path, sizeof(path), "/modules/%s.ko", argv[1]);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || syscall(SYS_finit_module, fd, parameters, 0) < 0)
		fail(a, "%s: %s", path, errno_name(errno));
	if (fd >= 0)
		close(fd);
}

void command_unload(struct answer *a, int argc, char **argv)
{
	if (argc < 2 || syscall(SYS_delete_module, argv[1], O_NONBLOCK) < 0)
		fail(a, "%s", argc < 2 ? "unload MODULE" : errno_name(errno));
}

/* The kernel log, in one buffer that the caller frees. */
static char *kernel_log(size_t *length)
{
	int size = klogctl(10 /* SYSLOG_ACTION_SIZE_BUFFER */, NULL, 0);
	char *log = size > 0 ? malloc((size_t)size + 1) : NULL;
	int n = log ? klogctl(3 /* SYSLOG_ACTION_READ_ALL */, log, size) : -1;

	if (n < 0) {
		free(log);
		return NULL;
	}
	log[n] = 0;
	*length = (size_t)n;
	return log;
}

/* dmesg [BYTES]: the end of the kernel log, escaped. */
void command_dmesg(struct answer *a, int argc, char **argv)
{
	size_t length = 0, want = argc > 1 ? strtoul(argv[1], NULL, 10) : 4000;
	char *log = kernel_log(&length);

	if (!log) {
		fail(a, "klogctl: %s", errno_name(errno));
		return;
	}
	if (want > 12000)
		want = 12000;
	if (want > length)
		want = length;
	say_escaped(a, log + length - want, want);
	free(log);
}

/* Texts by which the kernel says that something is wrong with itself. */
static const char *const splats[] = {
	"BUG:", "kernel BUG at", "WARNING:", "Oops", "general protection fault", "Kernel panic",
	"scheduling while atomic", "sleeping function called", "rcu: INFO", "rcu_preempt detected",
	"blocked for more than", "soft lockup", "hard LOCKUP", "stack guard", "double fault",
	"Voluntary context switch within RCU", "bad: scheduling", "preempt_count", "EXT4-fs error",
	"I/O error", "list_del corruption", "list_add corruption", "Bad page", "nobody cared",
	"invalid opcode", "divide error", "self-detected stall", "possible recursive locking",
};

/* What the block layer says of the corpus' own disks, whose requests are meant to fail. */
static const char expected[] = "dev crash_";

/* splats: how many lines of the kernel log tell of trouble, and the first of them. */
void command_splats(struct answer *a, int argc, char **argv)
{
	size_t length = 0, count = 0;
	char *log = kernel_log(&length), *state = NULL, first[200] = "";

	(void)argc;
	(void)argv;
	if (!log) {
		fail(a, "klogctl: %s", errno_name(errno));
		return;
	}
	for (char *line = strtok_r(log, "\n", &state); line; line = strtok_r(NULL, "\n", &state)) {
		if (strstr(line, expected))
			continue;
		for (size_t i = 0; i < sizeof(splats) / sizeof(splats[0]); i++) {
			if (!strstr(line, splats[i]))
				continue;
			if (!count++)
				snprintf(first, sizeof(first), "%s", line);
			break;
		}
	}
	say(a, "splats=%zu first=", count);
	say_escaped(a, first, strlen(first));
	free(log);
}

/* ps: "PID:COMM:STATE" of every process that is not a kernel thread, or of all with "ps all". */
void command_ps(struct answer *a, int argc, char **argv)
{
	DIR *d = opendir("/proc");
	struct dirent *e;

	(void)argv;
	while (d && (e = readdir(d))) {
		char path[300], line[512], *comm, *end;
		FILE *f;
		int parent = 0;
		char state = '?';

		if (!isdigit((unsigned char)e->d_name[0]))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/stat", e->d_name);
		f = fopen(path, "re");
		if (!f)
			continue;
		if (fgets(line, sizeof(line), f) && (comm = strchr(line, '(')) && (end = strrchr(line, ')'))) {
			*end = 0;
			sscanf(end + 2, "%c %d", &state, &parent);
			if (argc > 1 || (parent != 2 && atoi(e->d_name) != 2))
				say(a, "%s:%s:%c ", e->d_name, comm + 1, state);
		}
		fclose(f);
	}
	if (d)
		closedir(d);
}

void command_uptime(struct answer *a, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	say(a, "%.3f", (double)now_us() / 1e6);
}

#define EXEC_LIMIT_US 20000000

/* Reads what the command prints until it closes its end, the buffer is full or the time is over. */
static size_t collect(int fd, char *out, size_t size)
{
	long long end = now_us() + EXEC_LIMIT_US;
	size_t n = 0;

	while (n < size && now_us() < end) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		ssize_t got;

		if (poll(&p, 1, 100) <= 0)
			continue;
		got = read(fd, out + n, size - n);
		if (got <= 0)
			break;
		n += (size_t)got;
	}
	return n;
}

/* exec COMMAND LINE: runs it in a shell; exit status and the start of its output. */
void command_exec(struct answer *a, int argc, char **argv)
{
	static char out[12000];
	int ends[2], status = 0;
	long long end;
	size_t n;
	pid_t pid, ended = 0;

	if (argc < 2 || pipe2(ends, O_CLOEXEC) < 0) {
		fail(a, "exec COMMAND");
		return;
	}
	pid = fork();
	if (pid == 0) {
		dup2(ends[1], 1);
		dup2(ends[1], 2);
		execl("/bin/sh", "sh", "-c", argv[1], (char *)NULL);
		_exit(127);
	}
	close(ends[1]);
	n = collect(ends[0], out, sizeof(out));
	close(ends[0]);
	/* What hangs in the kernel is told, not waited for. */
	end = now_us() + 1000000;
	while (pid > 0 && !(ended = waitpid(pid, &status, WNOHANG)) && now_us() < end)
		usleep(1000);
	if (ended != pid) {
		kill(pid, SIGKILL);
		fail(a, "pid %d does not end, output=", pid);
	} else {
		say(a, "status=%d output=", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
	}
	say_escaped(a, out, n);
}

/* quiesce: the data disk is written back and made read-only, so that the host may check it. */
void command_quiesce(struct answer *a, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	sync();
	if (mount(NULL, "/data", NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
		fail(a, "remount: %s", errno_name(errno));
	sync();
}
