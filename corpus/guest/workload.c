/*
 * The verifying workload of a lab guest: each member uses one service of the kernel without pause
 * and checks every byte or number that comes back. A fault is an error count, a member that no longer
 * gets on is visible as progress that stands still. No control channel here: see supervise.c.
 */
#define _GNU_SOURCE
#include "workload.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define FILES 16
#define FILE_BLOCKS 8

static struct board *board;

static void mistake(struct member *m, const char *format, ...)
{
	va_list arguments;

	if (m->errors++)
		return;
	va_start(arguments, format);
	vsnprintf(m->note, sizeof(m->note), format, arguments);
	va_end(arguments);
}

/* A breath between operations: the guest's processors are emulated and shared. */
static void breathe(int milliseconds)
{
	usleep((useconds_t)milliseconds * 1000);
}

/* Fills a block so that every word depends on the number and on its place. */
static void fill(uint64_t *words, uint64_t number)
{
	uint64_t x = number * 0x9e3779b97f4a7c15ULL + 1;

	for (int i = 0; i < BLOCK / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		words[i] = x;
	}
}

/* Byte offset of the first difference from fill(number), or -1. */
static int first_difference(const uint64_t *words, uint64_t number)
{
	uint64_t expected[BLOCK / 8];

	fill(expected, number);
	for (int i = 0; i < BLOCK / 8; i++)
		if (words[i] != expected[i])
			return i * 8;
	return -1;
}

static int transfer(int fd, void *bytes, size_t length, int writing)
{
	char *p = bytes;

	while (length) {
		ssize_t n = writing ? write(fd, p, length) : read(fd, p, length);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -ENODATA;
		p += n;
		length -= (size_t)n;
	}
	return 0;
}

static void write_file(struct member *m, const char *path, uint64_t number)
{
	static uint64_t block[BLOCK / 8] __attribute__((aligned(BLOCK)));
	int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600), e = 0;

	if (fd < 0) {
		mistake(m, "open %s: %s", path, strerror(errno));
		return;
	}
	for (int i = 0; i < FILE_BLOCKS && !e; i++) {
		fill(block, number + (uint64_t)i);
		e = transfer(fd, block, BLOCK, 1);
	}
	if (!e && fsync(fd) < 0)
		e = -errno;
	if (close(fd) < 0 && !e)
		e = -errno;
	if (e)
		mistake(m, "write %s: %s", path, strerror(-e));
}

/* Reads the file past the page cache: what is compared is what the disk has. */
static void read_file(struct member *m, const char *path, uint64_t number)
{
	static uint64_t block[BLOCK / 8] __attribute__((aligned(BLOCK)));
	int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC), e = 0, wrong;

	if (fd < 0) {
		mistake(m, "open %s: %s", path, strerror(errno));
		return;
	}
	for (int i = 0; i < FILE_BLOCKS; i++) {
		e = transfer(fd, block, BLOCK, 0);
		wrong = e ? -1 : first_difference(block, number + (uint64_t)i);
		if (e || wrong >= 0) {
			mistake(m, "%s block %d: %s at %d", path, i, e ? strerror(-e) : "wrong bytes", wrong);
			break;
		}
	}
	close(fd);
}

static void files(struct member *m)
{
	uint64_t numbers[FILES] = { 0 };
	char path[64], old[64];

	for (uint64_t n = 1; !board->stop; n++) {
		int slot = (int)(n % FILES);

		/* Rename over the old file: directory operations belong to the work too. */
		snprintf(old, sizeof(old), "/data/new.%d", slot);
		snprintf(path, sizeof(path), "/data/file.%d", slot);
		write_file(m, old, n << 16);
		if (rename(old, path) < 0)
			mistake(m, "rename %s: %s", old, strerror(errno));
		numbers[slot] = n << 16;
		read_file(m, path, n << 16);
		m->progress++;
		breathe(10);
	}
	for (int slot = 0; slot < FILES; slot++) {
		snprintf(path, sizeof(path), "/data/file.%d", slot);
		if (numbers[slot])
			read_file(m, path, numbers[slot]);
	}
}

/* The far end of pipe and TCP: checks blocks 1, 2, 3… and answers each with its number. */
static void echo(struct member *m, int in, int out)
{
	uint64_t block[BLOCK / 8];

	for (uint64_t n = 1;; n++) {
		int e = transfer(in, block, BLOCK, 0), wrong;

		if (e == -ENODATA)
			return;
		wrong = e ? -1 : first_difference(block, n);
		if (e || wrong >= 0)
			mistake(m, "block %llu: %s at %d", (unsigned long long)n, e ? strerror(-e) : "wrong", wrong);
		if (e || (e = transfer(out, &n, sizeof(n), 1)))
			return;
	}
}

/* The near end: sends blocks in order; every one must be confirmed, also the last. */
static void converse(struct member *m, int in, int out)
{
	uint64_t block[BLOCK / 8], sent = 0, confirmed = 0, got;

	while (!board->stop || confirmed < sent) {
		int e = 0;

		if (!board->stop) {
			fill(block, ++sent);
			e = transfer(out, block, BLOCK, 1);
		}
		/* Up to four blocks are on their way at a time. */
		if (!e && (sent - confirmed >= 4 || board->stop)) {
			e = transfer(in, &got, sizeof(got), 0);
			if (!e && got != ++confirmed)
				mistake(m, "confirmed %llu for %llu", (unsigned long long)got,
					(unsigned long long)confirmed);
			m->progress++;
		}
		if (e) {
			mistake(m, "after block %llu: %s", (unsigned long long)sent, strerror(-e));
			break;
		}
		breathe(2);
	}
}

static void pipes(struct member *m)
{
	int there[2], back[2];
	pid_t child;

	if (pipe(there) < 0 || pipe(back) < 0) {
		mistake(m, "pipe: %s", strerror(errno));
		return;
	}
	child = fork();
	if (child == 0) {
		close(there[1]);
		close(back[0]);
		echo(m, there[0], back[1]);
		_exit(0);
	}
	close(there[0]);
	close(back[1]);
	converse(m, back[0], there[1]);
	close(there[1]);
	waitpid(child, NULL, 0);
}

static void tcp(struct member *m)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t size = sizeof(a);
	int listener = socket(AF_INET, SOCK_STREAM, 0), s;
	pid_t child;

	if (bind(listener, (struct sockaddr *)&a, size) < 0 || listen(listener, 1) < 0 ||
	    getsockname(listener, (struct sockaddr *)&a, &size) < 0) {
		mistake(m, "listen: %s", strerror(errno));
		return;
	}
	child = fork();
	if (child == 0) {
		s = accept(listener, NULL, NULL);
		if (s >= 0)
			echo(m, s, s);
		_exit(0);
	}
	s = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(s, (struct sockaddr *)&a, size) < 0)
		mistake(m, "connect: %s", strerror(errno));
	else
		converse(m, s, s);
	close(s);
	close(listener);
	waitpid(child, NULL, 0);
}

static int64_t nanoseconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* No expiry may be lost however late it is read, none may come early, time must not run backwards. */
static void timers(struct member *m)
{
	const int64_t period = 20000000;
	struct itimerspec every = { { 0, period }, { 0, period } };
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	int64_t start = nanoseconds(), last = start;
	uint64_t seen = 0, n;

	if (fd < 0 || timerfd_settime(fd, 0, &every, NULL) < 0) {
		mistake(m, "timerfd: %s", strerror(errno));
		return;
	}
	while (!board->stop) {
		struct timespec nap = { 0, 5000000 };
		int64_t now, before;

		if (read(fd, &n, sizeof(n)) != sizeof(n)) {
			mistake(m, "timerfd read: %s", strerror(errno));
			continue;
		}
		before = nanoseconds();
		seen += n;
		if (before < last || (int64_t)seen * period > before - start)
			mistake(m, "timer ahead: %llu expiries in %lld ns", (unsigned long long)seen,
				(long long)(before - start));
		nanosleep(&nap, NULL);
		now = nanoseconds();
		if (now - before < nap.tv_nsec)
			mistake(m, "slept %lld ns", (long long)(now - before));
		last = now;
		m->progress++;
	}
	/* All that are due must have been counted, save those of the last reading's own time. */
	if (read(fd, &n, sizeof(n)) == sizeof(n))
		seen += n;
	if ((nanoseconds() - start) / period > (int64_t)seen + 50)
		mistake(m, "only %llu expiries in %lld ns", (unsigned long long)seen,
			(long long)(nanoseconds() - start));
}

static void forks(struct member *m)
{
	for (unsigned int n = 0; !board->stop; n++) {
		char text[16];
		int status = -1;
		pid_t child = fork();

		if (child == 0) {
			snprintf(text, sizeof(text), "%u", n);
			execl("/proc/self/exe", "workload", "child", text, (char *)NULL);
			_exit(255);
		}
		if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) ||
		    (unsigned int)WEXITSTATUS(status) != (n * 7 + 3) % 251)
			mistake(m, "child %u: pid %d status %x", n, child, status);
		m->progress++;
		breathe(40);
	}
}

struct pingpong {
	pthread_mutex_t lock;
	pthread_cond_t turn_changed;
	uint64_t turn, total[2];
	int ending;
	struct member *m;
};

static void *partner(void *argument)
{
	struct pingpong *p = argument;

	pthread_mutex_lock(&p->lock);
	while (!p->ending) {
		if (p->turn % 2 == 1) {
			p->total[1]++;
			p->turn++;
			pthread_cond_signal(&p->turn_changed);
		}
		pthread_cond_wait(&p->turn_changed, &p->lock);
	}
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

static void threads(struct member *m)
{
	struct pingpong p = { .lock = PTHREAD_MUTEX_INITIALIZER, .turn_changed = PTHREAD_COND_INITIALIZER,
			      .m = m };
	pthread_t other;

	if (pthread_create(&other, NULL, partner, &p)) {
		mistake(m, "pthread_create");
		return;
	}
	while (!board->stop) {
		pthread_mutex_lock(&p.lock);
		while (p.turn % 2 == 1)
			pthread_cond_wait(&p.turn_changed, &p.lock);
		if (p.total[0] + p.total[1] != p.turn)
			mistake(m, "turns %llu + %llu of %llu", (unsigned long long)p.total[0],
				(unsigned long long)p.total[1], (unsigned long long)p.turn);
		p.total[0]++;
		p.turn++;
		pthread_cond_signal(&p.turn_changed);
		pthread_mutex_unlock(&p.lock);
		m->progress++;
		breathe(3);
	}
	pthread_mutex_lock(&p.lock);
	p.ending = 1;
	pthread_cond_signal(&p.turn_changed);
	pthread_mutex_unlock(&p.lock);
	pthread_join(other, NULL);
}

/* Anonymous memory keeps what was put there; one page is renewed at each step. */
static void memory(struct member *m)
{
	enum { PAGES = 256 };
	char *area = mmap(NULL, PAGES * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t numbers[PAGES] = { 0 };

	if (area == MAP_FAILED) {
		mistake(m, "mmap: %s", strerror(errno));
		return;
	}
	for (uint64_t n = 1;; n++) {
		int page = (int)(n * 37 % PAGES), last = board->stop;
		int from = last ? 0 : page, to = last ? PAGES : page + 1;

		for (int i = from; i < to; i++) {
			if (numbers[i] && first_difference((uint64_t *)(area + i * BLOCK), numbers[i]) >= 0)
				mistake(m, "page %d changed", i);
		}
		if (last)
			return;
		fill((uint64_t *)(area + page * BLOCK), n);
		numbers[page] = n;
		m->progress++;
		breathe(5);
	}
}

static const struct {
	const char *name;
	void (*work)(struct member *m);
} kinds[] = {
	{ "files", files },   { "pipes", pipes },     { "tcp", tcp },       { "timers", timers },
	{ "forks", forks },   { "threads", threads }, { "memory", memory },
};

static void start(uint32_t i)
{
	struct member *m = &board->members[i];

	snprintf(m->name, sizeof(m->name), "%s", kinds[i].name);
	m->pid = fork();
	if (m->pid == 0) {
		prctl(PR_SET_NAME, m->name);
		kinds[i].work(m);
		m->finished = 1;
		_exit(0);
	}
}

int main(int argc, char **argv)
{
	int fd;

	if (argc == 3 && !strcmp(argv[1], "child"))
		return (int)((strtoul(argv[2], NULL, 10) * 7 + 3) % 251);
	fd = open(BOARD_PATH ".new", O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, sizeof(*board)) < 0)
		return 1;
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (board == MAP_FAILED || rename(BOARD_PATH ".new", BOARD_PATH) < 0)
		return 1;
	board->count = sizeof(kinds) / sizeof(kinds[0]);
	for (uint32_t i = 0; i < board->count; i++)
		start(i);
	board->magic = BOARD_MAGIC;
	while (wait(NULL) > 0 || errno == EINTR)
		;
	return 0;
}
