/* What the parts of the guest's agent share: the answer under construction. No commands here. */
#ifndef AGENT_H
#define AGENT_H

#include <stddef.h>

/* One answer line. Text beyond the capacity is dropped and the line ends in "…truncated". */
struct answer {
	char text[16384];
	size_t length;
	int failed; /* sent as "err" instead of "ok" */
};

/* Appends formatted text. */
void say(struct answer *a, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Appends bytes with newline, backslash and control characters escaped, so that a line stays one. */
void say_escaped(struct answer *a, const char *bytes, size_t length);
/* Makes the answer an error with this text. */
void fail(struct answer *a, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Name of an errno value, as in errno.h. */
const char *errno_name(int error);
/* Microseconds of the monotonic clock. */
long long now_us(void);

/* trigger.c: lets a process run into a driver's fault and tells what the process saw. */
void command_crash(struct answer *a, int argc, char **argv);
void command_check(struct answer *a, int argc, char **argv);
/* system.c: modules, kernel log, processes, shell. */
void command_load(struct answer *a, int argc, char **argv);
void command_unload(struct answer *a, int argc, char **argv);
void command_dmesg(struct answer *a, int argc, char **argv);
void command_splats(struct answer *a, int argc, char **argv);
void command_ps(struct answer *a, int argc, char **argv);
void command_uptime(struct answer *a, int argc, char **argv);
void command_exec(struct answer *a, int argc, char **argv);
void command_quiesce(struct answer *a, int argc, char **argv);
/* supervise.c: the workload's start, verification and end. */
void command_workload(struct answer *a, int argc, char **argv);

#endif
