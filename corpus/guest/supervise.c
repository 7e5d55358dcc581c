/* The agent's view of the workload: starts it, tells whether every member gets on, stops it. */
#define _GNU_SOURCE
#include "agent.h"
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static struct board *board;
static pid_t runner;

static int attach_board(void)
{
	int fd = open(BOARD_PATH, O_RDWR | O_CLOEXEC);

	if (fd < 0)
		return -1;
	if (board)
		munmap(board, sizeof(*board));
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (board == MAP_FAILED)
		board = NULL;
	return board && board->magic == BOARD_MAGIC ? 0 : -1;
}

/* Waits until test() holds or the time is over; whether it held. */
static int wait_for(int (*test)(const uint64_t *), const uint64_t *argument, long long milliseconds)
{
	long long end = now_us() + milliseconds * 1000;

	while (!test(argument)) {
		if (now_us() > end)
			return 0;
		usleep(10000);
	}
	return 1;
}

static int board_up(const uint64_t *unused)
{
	(void)unused;
	return attach_board() == 0;
}

static int all_advanced(const uint64_t *before)
{
	for (uint32_t i = 0; i < board->count; i++)
		if (board->members[i].progress < before[i] + 2)
			return 0;
	return 1;
}

static int all_finished(const uint64_t *unused)
{
	(void)unused;
	for (uint32_t i = 0; i < board->count; i++)
		if (!board->members[i].finished)
			return 0;
	return 1;
}

/* errors=N stalled=M NAME=PROGRESS… and the first error's text. */
static void report(struct answer *a, const uint64_t *before)
{
	uint64_t errors = 0, stalled = 0;
	const char *note = "";

	for (uint32_t i = 0; i < board->count; i++) {
		struct member *m = &board->members[i];

		errors += m->errors;
		if (m->errors && !*note)
			note = m->note;
		stalled += before ? m->progress < before[i] + 2 : !m->finished;
	}
	say(a, "errors=%llu stalled=%llu", (unsigned long long)errors, (unsigned long long)stalled);
	for (uint32_t i = 0; i < board->count; i++)
		say(a, " %s=%llu%s", board->members[i].name, (unsigned long long)board->members[i].progress,
		    before && board->members[i].progress < before[i] + 2 ? "!" : "");
	say(a, " note=");
	say_escaped(a, note, strnlen(note, sizeof(board->members[0].note)));
}

static void start(struct answer *a)
{
	if (runner > 0 && waitpid(runner, NULL, WNOHANG) == 0) {
		fail(a, "it runs already");
		return;
	}
	unlink(BOARD_PATH);
	runner = fork();
	if (runner == 0) {
		execl("/bin/workload", "workload", (char *)NULL);
		_exit(127);
	}
	if (!wait_for(board_up, NULL, 10000))
		fail(a, "it does not start");
}

/* workload start | verify [MS] | stop [MS] */
void command_workload(struct answer *a, int argc, char **argv)
{
	long long milliseconds = argc > 2 ? atoll(argv[2]) : 10000;
	uint64_t before[MAX_MEMBERS];

	if (argc > 1 && !strcmp(argv[1], "start")) {
		start(a);
		return;
	}
	if (argc < 2 || attach_board() < 0) {
		fail(a, argc < 2 ? "workload start|verify|stop" : "it does not run");
		return;
	}
	if (!strcmp(argv[1], "verify")) {
		for (uint32_t i = 0; i < board->count; i++)
			before[i] = board->members[i].progress;
		wait_for(all_advanced, before, milliseconds);
		report(a, before);
	} else if (!strcmp(argv[1], "stop")) {
		board->stop = 1;
		wait_for(all_finished, NULL, milliseconds);
		if (runner > 0 && all_finished(NULL))
			waitpid(runner, NULL, 0);
		runner = 0;
		report(a, NULL);
	} else {
		fail(a, "workload start|verify|stop");
	}
}
