/*
 * Workloads of the drivers whose code is changed while it is in use: each uses one real driver without pause,
 * checks every byte that comes back, and tells errors that it was told of from data that is silently wrong.
 * The workload that has nothing to do with these drivers is workload.c.
 *
 * inject start DRIVER | hold | go | look | stop MILLISECONDS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <dirent.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define FRAME 1024
#define BOARD "/run/inject"

struct board {
	volatile uint32_t stop, finished;
	volatile uint32_t hold;   /* do nothing for now */
	volatile uint64_t ops;    /* done and verified */
	volatile uint64_t errors; /* the driver said so, or a frame did not come */
	volatile uint64_t wrong;  /* bytes that nobody wrote, without an error */
	volatile uint64_t deaths; /* workers that were killed */
	volatile int32_t worker;
	char error[160], harm[160];
};

static struct board *board;

static void failed(const char *format, ...)
{
	va_list arguments;

	if (board->errors++)
		return;
	va_start(arguments, format);
	vsnprintf(board->error, sizeof(board->error), format, arguments);
	va_end(arguments);
}

static void harmed(const char *format, ...)
{
	va_list arguments;

	if (board->wrong++)
		return;
	va_start(arguments, format);
	vsnprintf(board->harm, sizeof(board->harm), format, arguments);
	va_end(arguments);
}

static long long now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* A breath between operations; a long one while the workload is held. */
static void rest(unsigned int us)
{
	do
		usleep(us);
	while (board->hold && !board->stop);
}

static void fill(void *bytes, size_t size, uint64_t number)
{
	uint64_t x = number * 0x9e3779b97f4a7c15ULL + 1, *words = bytes;

	for (size_t i = 0; i < size / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		words[i] = x;
	}
}

static int differs(const void *bytes, size_t size, uint64_t number)
{
	static uint64_t expected[BLOCK / 8];
	const uint64_t *words = bytes;

	fill(expected, size, number);
	for (size_t i = 0; i < size / 8; i++)
		if (words[i] != expected[i])
			return (int)i * 8;
	return -1;
}

static char page[BLOCK] __attribute__((aligned(BLOCK)));

/* A block device: what was written last to each block must come back, past the page cache. */
static void blocks(const char *path)
{
	enum { COUNT = 256 };
	uint64_t numbers[COUNT] = { 0 };
	int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	struct stat s;

	if (fd < 0) {
		failed("open %s: %s", path, strerror(errno));
		usleep(20000);
		return;
	}
	for (uint64_t n = 1; !board->stop; n++) {
		int slot = (int)(n * 37 % COUNT), at;

		fill(page, BLOCK, n);
		if (pwrite(fd, page, BLOCK, (off_t)slot * BLOCK) != BLOCK) {
			failed("write block %d: %s", slot, strerror(errno));
			numbers[slot] = 0; /* nobody knows what is there now */
		} else {
			numbers[slot] = n;
		}
		if (n % 16 == 0 && fsync(fd) < 0)
			failed("fsync: %s", strerror(errno));
		slot = (int)(n * 101 % COUNT);
		memset(page, 0, BLOCK);
		if (pread(fd, page, BLOCK, (off_t)slot * BLOCK) != BLOCK)
			failed("read block %d: %s", slot, strerror(errno));
		else if (numbers[slot] && (at = differs(page, BLOCK, numbers[slot])) >= 0)
			harmed("block %d differs at %d", slot, at);
		if (n % 64 == 0 && fstat(fd, &s) < 0)
			failed("stat: %s", strerror(errno));
		board->ops++;
		rest(1000);
	}
	close(fd);
}

static int put(const char *path, uint64_t number, int count)
{
	int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600), bad = fd < 0;

	for (int i = 0; i < count && !bad; i++) {
		fill(page, BLOCK, number + (uint64_t)i);
		bad = write(fd, page, BLOCK) != BLOCK;
	}
	bad = bad || fsync(fd) < 0;
	if (bad)
		failed("put %s: %s", path, strerror(errno));
	if (fd >= 0)
		close(fd);
	return bad;
}

static void get(const char *path, uint64_t number, int count)
{
	int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC), at;

	if (fd < 0) {
		failed("open %s: %s", path, strerror(errno));
		return;
	}
	for (int i = 0; i < count; i++) {
		ssize_t n = read(fd, page, BLOCK);

		if (n != BLOCK) {
			failed("read %s: %zd %s", path, n, n < 0 ? strerror(errno) : "");
			break;
		}
		at = differs(page, BLOCK, number + (uint64_t)i);
		if (at >= 0) {
			harmed("%s block %d differs at %d", path, i, at);
			break;
		}
	}
	close(fd);
}

static int listed(const char *folder)
{
	DIR *d = opendir(folder);
	int n = 0;

	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

/* A file system: contents, names, sizes. */
static void files(const char *folder)
{
	enum { COUNT = 12 };
	uint64_t numbers[COUNT] = { 0 };
	char path[96], other[96];
	struct statvfs v;
	struct stat s;

	for (uint64_t n = 1; !board->stop; n++) {
		int slot = (int)(n % COUNT), size = 1 + (int)(n % 5);

		snprintf(other, sizeof(other), "%s/a new file %d", folder, slot);
		snprintf(path, sizeof(path), "%s/file.%d", folder, slot);
		if (put(other, n << 16, size)) {
			unlink(other);
		} else if (rename(other, path) < 0) {
			failed("rename %s: %s", other, strerror(errno));
			numbers[slot] = 0;
		} else {
			numbers[slot] = n;
		}
		slot = (int)(n * 7 % COUNT);
		snprintf(path, sizeof(path), "%s/file.%d", folder, slot);
		if (numbers[slot])
			get(path, numbers[slot] << 16, 1 + (int)(numbers[slot] % 5));
		if (numbers[slot] && stat(path, &s) == 0 &&
		    s.st_size != (off_t)BLOCK * (1 + (off_t)(numbers[slot] % 5)))
			harmed("%s has %lld bytes", path, (long long)s.st_size);
		if (n % 8 == 0 && listed(folder) < 1)
			failed("list: %s", strerror(errno));
		if (n % 16 == 3) {
			snprintf(other, sizeof(other), "%s/folder", folder);
			if (mkdir(other, 0700) < 0 || rmdir(other) < 0)
				failed("mkdir, rmdir: %s", strerror(errno));
		}
		if (n % 16 == 5 && numbers[slot]) {
			if (truncate(path, BLOCK) < 0)
				failed("truncate: %s", strerror(errno));
			else
				get(path, numbers[slot] << 16, 1);
			numbers[slot] = 0;
			if (unlink(path) < 0)
				failed("unlink: %s", strerror(errno));
		}
		if (n % 32 == 9 && statvfs(folder, &v) < 0)
			failed("statfs: %s", strerror(errno));
		board->ops++;
		rest(2000);
	}
}

static int raw_socket(const char *name)
{
	struct sockaddr_ll a = { .sll_family = AF_PACKET, .sll_protocol = htons(0x88b5) };
	int s = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(0x88b5));

	a.sll_ifindex = (int)if_nametoindex(name);
	if (s < 0 || !a.sll_ifindex || bind(s, (struct sockaddr *)&a, sizeof(a)) < 0) {
		failed("%s: %s", name, strerror(errno));
		if (s >= 0)
			close(s);
		return -1;
	}
	return s;
}

static void set_up(const char *name, int up)
{
	struct ifreq r = { 0 };
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(r.ifr_name, IFNAMSIZ, "%s", name);
	if (ioctl(s, SIOCGIFFLAGS, &r) < 0)
		failed("flags of %s: %s", name, strerror(errno));
	r.ifr_flags = (short)(up ? r.ifr_flags | IFF_UP : r.ifr_flags & ~IFF_UP);
	if (ioctl(s, SIOCSIFFLAGS, &r) < 0)
		failed("%s %s: %s", name, up ? "up" : "down", strerror(errno));
	close(s);
}

static void set_mtu(const char *name, int mtu)
{
	struct ifreq r = { .ifr_mtu = mtu };
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	snprintf(r.ifr_name, IFNAMSIZ, "%s", name);
	if (ioctl(s, SIOCSIFMTU, &r) < 0)
		failed("mtu of %s: %s", name, strerror(errno));
	close(s);
}

/* Waits until a link carries again: the kernel tells of links once a second at most (linkwatch_schedule_work()). */
static void await_link(const char *name)
{
	long long end = now_ms() + 1500;
	char path[96], state[32];
	FILE *f;

	snprintf(path, sizeof(path), "/sys/class/net/%s/operstate", name);
	do {
		state[0] = 0;
		f = fopen(path, "re");
		if (f && !fgets(state, sizeof(state), f))
			state[0] = 0;
		if (f)
			fclose(f);
		if (!strstr(state, "down"))
			return;
		usleep(10000);
	} while (now_ms() < end);
}

/* Waits for frame number n; others that come before are late ones. */
static void expect(int s, uint64_t n)
{
	static uint64_t frame[2048 / 8];
	long long end = now_ms() + 300;

	for (;;) {
		struct pollfd p = { .fd = s, .events = POLLIN };
		ssize_t size;
		uint64_t number;
		int at;

		if (now_ms() > end || poll(&p, 1, 100) < 0) {
			failed("frame %llu did not come", (unsigned long long)n);
			return;
		}
		if (!(p.revents & POLLIN))
			continue;
		size = read(s, frame, sizeof(frame));
		if (size < 0) {
			failed("receive: %s", strerror(errno));
			return;
		}
		/* Ours have our type; the kernel has things of its own to say on a new link. */
		if (size < 24 || memcmp((char *)frame + 12, "\x88\xb5", 2))
			continue;
		memcpy(&number, (char *)frame + 16, 8);
		if (number > n || size != FRAME + 24) {
			harmed("frame %llu of %zd bytes for %llu", (unsigned long long)number, size,
			       (unsigned long long)n);
			return;
		}
		if (number < n)
			continue;
		at = differs(frame + 3, FRAME, n);
		if (at >= 0)
			harmed("frame %llu differs at %d", (unsigned long long)n, at);
		return;
	}
}

static void send_frame(int s, uint64_t n)
{
	static uint64_t frame[(FRAME + 24) / 8];

	memset(frame, 0xff, 12);
	memcpy((char *)frame + 12, "\x88\xb5", 2);
	memcpy((char *)frame + 16, &n, 8);
	fill(frame + 3, FRAME, n);
	if (write(s, frame, sizeof(frame)) != (ssize_t)sizeof(frame))
		failed("send: %s", strerror(errno));
}

/* Frames with numbers, from one end to the other and back. */
static void frames(const char *a, const char *b, int tap)
{
	int near = raw_socket(a), far = tap >= 0 ? tap : raw_socket(b), pending;
	socklen_t size = sizeof(pending);

	for (uint64_t n = 1; near >= 0 && far >= 0 && !board->stop; n++) {
		send_frame(near, n);
		expect(far, n);
		send_frame(far, n);
		expect(near, n);
		if (n % 64 == 20) {
			set_up(a, 0);
			set_up(a, 1);
			usleep(20000);
			await_link(a);
			if (b)
				await_link(b);
			/* packet_notifier() leaves ENETDOWN in the socket. */
			getsockopt(near, SOL_SOCKET, SO_ERROR, &pending, &size);
		}
		if (n % 64 == 40)
			set_mtu(a, n % 128 < 64 ? 1400 : 1500);
		if (n % 64 == 50 && listed("/sys/class/net") < 3)
			failed("no interfaces");
		if (n % 64 == 60) {
			FILE *f = fopen("/proc/net/dev", "re");
			char line[256];

			while (f && fgets(line, sizeof(line), f))
				;
			if (f)
				fclose(f);
		}
		board->ops++;
		rest(1000);
	}
	if (near >= 0)
		close(near);
	if (far >= 0 && far != tap)
		close(far);
	if (near < 0 || far < 0)
		usleep(20000);
}

static void tap(void)
{
	struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	strcpy(r.ifr_name, "tap0");
	if (fd < 0 || ioctl(fd, TUNSETIFF, &r) < 0) {
		failed("tap: %s", strerror(errno));
		usleep(20000);
	} else {
		set_up("tap0", 1);
		frames("tap0", NULL, fd);
	}
	if (fd >= 0)
		close(fd);
}

static void work(const char *driver)
{
	while (!board->stop) {
		if (!strcmp(driver, "loop"))
			blocks("/dev/loop0");
		else if (!strcmp(driver, "fat"))
			files("/run/fat");
		else if (!strcmp(driver, "veth"))
			frames("v0", "veth0", -1);
		else if (!strcmp(driver, "virtio_net"))
			frames("eth0", "eth1", -1);
		else if (!strcmp(driver, "tun"))
			tap();
		else
			exit(2);
	}
}

static int attach(int create)
{
	int fd = open(BOARD, create ? O_RDWR | O_CREAT | O_TRUNC : O_RDWR, 0600);

	if (fd < 0 || (create && ftruncate(fd, sizeof(*board)) < 0))
		return -1;
	board = mmap(NULL, sizeof(*board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	return board == MAP_FAILED ? -1 : 0;
}

/* A worker that was killed is replaced: the driver goes on being used. */
static void supervise(const char *driver)
{
	for (int i = 0; i < 64 && !board->stop; i++) {
		int status = 0;
		pid_t pid = fork();

		if (pid == 0) {
			work(driver);
			_exit(0);
		}
		board->worker = pid;
		if (pid > 0 && waitpid(pid, &status, 0) == pid && WIFSIGNALED(status))
			board->deaths++;
		usleep(10000);
	}
	board->finished = 1;
}

static void start(const char *driver)
{
	pid_t pid;

	if (attach(1) < 0)
		exit(1);
	pid = fork();
	if (pid == 0) {
		int null = open("/dev/null", O_RDWR);

		setsid();
		dup2(null, 0);
		dup2(null, 1);
		dup2(null, 2);
		supervise(driver);
		_exit(0);
	}
}

static char state_of(int pid)
{
	char path[64], line[256] = "", *end;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	f = fopen(path, "re");
	if (!f)
		return '-';
	if (!fgets(line, sizeof(line), f))
		line[0] = 0;
	fclose(f);
	end = strrchr(line, ')');
	return end && end[1] ? end[2] : '?';
}

static void look(void)
{
	uint64_t before = board->ops;

	usleep(250000);
	printf("ops=%llu more=%llu errors=%llu wrong=%llu deaths=%llu state=%c finished=%u error=%.150s harm=%.150s",
	       (unsigned long long)board->ops, (unsigned long long)(board->ops - before),
	       (unsigned long long)board->errors, (unsigned long long)board->wrong,
	       (unsigned long long)board->deaths, state_of(board->worker), board->finished,
	       board->errors ? board->error : "-", board->wrong ? board->harm : "-");
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "start")) {
		start(argv[2]);
		return 0;
	}
	if (argc < 2 || attach(0) < 0)
		return 1;
	if (!strcmp(argv[1], "hold") || !strcmp(argv[1], "go")) {
		board->hold = !strcmp(argv[1], "hold");
		return 0;
	}
	if (!strcmp(argv[1], "stop")) {
		long long end = now_ms() + (argc > 2 ? atoll(argv[2]) : 2000);

		board->stop = 1;
		while (!board->finished && now_ms() < end)
			usleep(5000);
	}
	look();
	return 0;
}
