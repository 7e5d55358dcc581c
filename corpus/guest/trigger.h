/* What the sources of the agent's crash command share: one run of one operation. */
#ifndef TRIGGER_H
#define TRIGGER_H

/* ioctl numbers of the drivers: see drivers/crash.h. */
#include <sys/ioctl.h>
#define CRASH_IOC_RUN _IO('c', 1)
#define CRASH_IOC_DAMAGE_PIPE _IOW('c', 2, int)
#define CRASH_IOC_DAMAGE_FILE _IOW('c', 3, int)

struct run {
	const char *device;
	const char *test;
	const char *place; /* of an operation "VERB:PLACE"; NULL for others */
	const char *verb;  /* the same operation's, not ended */
	int fd;            /* the open device */
};

/* Writes the prefix and the test's name to the device. */
long put(struct run *r, const char *prefix);

/* trigger_core.c */
long run_warn(struct run *r);
long run_sysrq(struct run *r);
long run_out_of_memory(struct run *r);
long run_sethostname(struct run *r);
long run_damaged_file(struct run *r);
long run_damaged_socket(struct run *r);

/* trigger_text.c */
long run_getpriority(struct run *r);
long run_eventfd(struct run *r);

/* trigger_path.c: the operation "VERB:PLACE". */
long run_verb(struct run *r);

#endif
