/*
 * The lab's agent in a guest: reads command lines from a serial port, answers each with one line.
 * Only the protocol and the command table are here. The agent is rigging of the lab; defib itself
 * never uses it.
 *
 * Protocol: "ID COMMAND [ARGUMENT…]\n" -> "ID ok TEXT\n" or "ID err TEXT\n". The ID is the caller's
 * and comes back unchanged, so that answers to a caller that gave up are told apart.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAX_ARGUMENTS 16

struct command {
	const char *name;
	void (*run)(struct answer *a, int argc, char **argv);
};

static void command_ping(struct answer *a, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	say(a, "pong");
}

static const struct command commands[] = {
	{ "ping", command_ping },         { "crash", command_crash },   { "check", command_check },
	{ "load", command_load },         { "unload", command_unload }, { "dmesg", command_dmesg },
	{ "splats", command_splats },     { "ps", command_ps },         { "uptime", command_uptime },
	{ "workload", command_workload }, { "exec", command_exec },     { "quiesce", command_quiesce },
};

static void append(struct answer *a, const char *format, va_list arguments)
{
	size_t room = sizeof(a->text) - a->length;
	int n = vsnprintf(a->text + a->length, room, format, arguments);

	if (n > 0)
		a->length += (size_t)n < room ? (size_t)n : room - 1;
}

void say(struct answer *a, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	append(a, format, arguments);
	va_end(arguments);
}

void fail(struct answer *a, const char *format, ...)
{
	va_list arguments;

	a->failed = 1;
	a->length = 0;
	va_start(arguments, format);
	append(a, format, arguments);
	va_end(arguments);
}

void say_escaped(struct answer *a, const char *bytes, size_t length)
{
	for (size_t i = 0; i < length; i++) {
		unsigned char c = (unsigned char)bytes[i];

		if (c == '\n')
			say(a, "\\n");
		else if (c == '\\')
			say(a, "\\\\");
		else if (c < 0x20 || c >= 0x7f)
			say(a, "\\x%02x", c);
		else
			say(a, "%c", c);
	}
}

const char *errno_name(int error)
{
	const char *name = error ? strerrorname_np(error) : "0";

	return name ? name : "?";
}

long long now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void run(char *line, struct answer *a)
{
	char *argv[MAX_ARGUMENTS + 1] = { 0 };
	int argc = 0;

	/* The last argument takes the rest of the line: a shell command keeps its blanks. */
	while (argc < MAX_ARGUMENTS && *line) {
		argv[argc++] = line;
		if (argc == 2 && !strcmp(argv[0], "exec"))
			break;
		line += strcspn(line, " ");
		if (*line)
			*line++ = 0;
		line += strspn(line, " ");
	}
	for (size_t i = 0; argc && i < sizeof(commands) / sizeof(commands[0]); i++) {
		if (!strcmp(argv[0], commands[i].name)) {
			commands[i].run(a, argc, argv);
			return;
		}
	}
	fail(a, "no such command");
}

static void write_all(int fd, const char *bytes, size_t length)
{
	while (length) {
		ssize_t n = write(fd, bytes, length);

		if (n < 0 && errno != EINTR)
			exit(1);
		if (n > 0) {
			bytes += n;
			length -= (size_t)n;
		}
	}
}

static void serve(int fd, char *line)
{
	static struct answer a;
	char head[64];
	char *rest = strchr(line, ' ');
	int n;

	if (!rest)
		return;
	*rest++ = 0;
	memset(&a, 0, sizeof(a));
	run(rest, &a);
	n = snprintf(head, sizeof(head), "%.20s %s ", line, a.failed ? "err" : "ok");
	write_all(fd, head, (size_t)n);
	write_all(fd, a.text, a.length);
	write_all(fd, "\n", 1);
}

static int open_port(const char *path)
{
	struct termios t;
	int fd = open(path, O_RDWR | O_NOCTTY);

	if (fd < 0 || tcgetattr(fd, &t) < 0)
		return -1;
	cfmakeraw(&t);
	cfsetspeed(&t, B115200);
	t.c_cflag |= CLOCAL;
	t.c_cc[VMIN] = 1;
	t.c_cc[VTIME] = 0;
	return tcsetattr(fd, TCSANOW, &t) < 0 ? -1 : fd;
}

int main(int argc, char **argv)
{
	static char buffer[4096];
	size_t filled = 0;
	int fd = argc > 1 ? open_port(argv[1]) : -1;

	if (fd < 0)
		return 1;
	/* The agent must answer while the guest is short of memory or its file cache is damaged. */
	mlockall(MCL_CURRENT);
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		char *end;
		ssize_t n = read(fd, buffer + filled, sizeof(buffer) - filled);

		if (n <= 0 && errno != EINTR)
			return 1;
		filled += n > 0 ? (size_t)n : 0;
		while ((end = memchr(buffer, '\n', filled))) {
			size_t used = (size_t)(end - buffer) + 1;

			*end = 0;
			serve(fd, buffer);
			memmove(buffer, buffer + used, filled - used);
			filled -= used;
		}
		if (filled == sizeof(buffer))
			filled = 0; /* no command is that long */
	}
}
