/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How drivers whose faults lie in callbacks are armed: "arm:CASE", written to the driver's device, makes
 * the next callback of that case fault, once. No faults here, and no self-check.
 */
#ifndef CRASH_ARM_H
#define CRASH_ARM_H

#include "crash.h"

/* What a callback that is armed goes through; nobody ever sets it: the mistake. */
struct settings {
	int level;
	long limit;
	void *table;
	/* One for each of the callbacks in one function, or a compiler would make them one line. */
	int each[16];
};

static struct settings *settings;
static char crash_armed[CRASH_NAME_MAX];
static atomic_t crash_waits;            /* 1 as long as nobody has come for what is armed */

/* Whether a callback is to fault now; it does so once, whichever CPU comes first. */
static bool due(const char *name)
{
	if (likely(strcmp(crash_armed, name)) || atomic_cmpxchg(&crash_waits, 1, 0) != 1)
		return false;
	crash_armed[0] = 0;
	return true;
}

static inline void crash_set(const char *name)
{
	strscpy(crash_armed, name, sizeof(crash_armed));
	atomic_set(&crash_waits, 1);
}

/* Takes "arm:CASE"; anything else is -EINVAL. */
static inline int crash_arm(const char __user *from, size_t count)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	if (strncmp(name, "arm:", 4))
		return -EINVAL;
	crash_set(name + 4);
	return 0;
}

/* write() of a device that is for arming only. */
static __maybe_unused ssize_t crash_arm_write(struct file *file, const char __user *from, size_t count,
					      loff_t *at)
{
	int error = crash_arm(from, count);

	return error ? error : count;
}

/* @wrong, or that what was armed has not been called. */
static inline const char *crash_unarmed(const char *wrong)
{
	return !wrong && crash_armed[0] ? "did-not-fault" : wrong;
}

#endif
