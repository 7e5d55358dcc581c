/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The driver: a device that counts what is written to it, and crashes when it is told how. Built and loaded as a module. */
#include "linux.h"

static const char name[] __attribute__((used, section(".modinfo"))) = "name=tiny_driver";

void printk(const char *format, ...);
int strcmp(const char *a, const char *b);
void register_chrdev(const struct file_operations *fops);
int request_irq(irqreturn_t (*handler)(int, void *), void *dev_id);
void kick_device(void);

struct device {
	struct mutex mutex;
	spinlock_t lock;
	u64 total;          /* of "add" */
	volatile u64 hit;   /* the case was reached */
	struct timer_list timer;
	struct work_struct work;
	u64 *data;          /* null */
	u64 *wild, *non_canonical;
	int zero;
	ssize_t (*nothing)(u64);
};
static struct device device = { .wild = (u64 *)0xffffffffdead0000, .non_canonical = (u64 *)0xdead000000000100 };

#define noinline __attribute__((noinline))

static noinline ssize_t null_mutex(struct device *dev)
{
	mutex_lock(&dev->mutex);
	dev->hit = 1;
	*dev->data += 1; /* crash: null-mutex */
	mutex_unlock(&dev->mutex);
	return 0;
}

static noinline ssize_t null_spinlock(struct device *dev)
{
	u64 flags = _raw_spin_lock_irqsave(&dev->lock);
	dev->hit = 1;
	*dev->data += 1; /* crash: null-spinlock */
	_raw_spin_unlock_irqrestore(&dev->lock, flags);
	return 0;
}

static noinline ssize_t bug(struct device *dev)
{
	if (dev->data == 0)
		BUG(); /* crash: bug */
	return 1;
}

static noinline ssize_t divide(struct device *dev)
{
	return 100 / dev->zero; /* crash: divide */
}

static noinline ssize_t wild(struct device *dev)
{
	return *dev->wild; /* crash: wild */
}

static noinline ssize_t non_canonical(struct device *dev)
{
	return *dev->non_canonical; /* crash: non-canonical */
}

static noinline ssize_t null_call(struct device *dev)
{
	return dev->nothing(1) + 1; /* crash: null-call */
}

/* It is meant to. */
#pragma GCC diagnostic ignored "-Winfinite-recursion"
static noinline u64 stack_overflow(volatile u64 *outer)
{
	volatile u64 frame[32] = { outer[0] + 1 }; /* crash: stack-overflow */
	return stack_overflow(frame) + frame[1];
}

static noinline ssize_t overflow(struct device *dev)
{
	u64 frame[32] = {};
	mutex_lock(&dev->mutex);
	dev->total += stack_overflow(frame);
	mutex_unlock(&dev->mutex);
	return 0;
}

static noinline ssize_t panics(struct device *dev)
{
	mutex_lock(&dev->mutex);
	panic("tiny_driver gives up: %d", dev->zero); /* crash: panic */
}

static void on_timer(struct timer_list *timer)
{
	struct device *dev = &device;
	_raw_spin_lock(&dev->lock);
	dev->hit = 1;
	*dev->data += 1; /* crash: null-timer */
	_raw_spin_unlock(&dev->lock);
}

static ssize_t null_timer(struct device *dev)
{
	dev->hit = 0;
	dev->timer.function = on_timer;
	mod_timer(&dev->timer, 0);
	return 0;
}

static irqreturn_t on_interrupt(int irq, void *dev_id)
{
	struct device *dev = dev_id;
	dev->hit = 1;
	*dev->data += 1; /* crash: null-irq */
	return IRQ_HANDLED;
}

static ssize_t null_irq(struct device *dev)
{
	dev->hit = 0;
	kick_device();
	return 0;
}

static void on_work(struct work_struct *work)
{
	struct device *dev = &device;
	mutex_lock(&dev->mutex);
	dev->hit = 1;
	*dev->data += 1; /* crash: null-work */
	mutex_unlock(&dev->mutex);
}

static ssize_t null_work(struct device *dev)
{
	dev->hit = 0;
	dev->work.func = on_work;
	queue_work(&dev->work);
	return 0;
}

static const struct {
	const char *name;
	ssize_t (*crash)(struct device *dev);
} cases[] = {
	{ "null-mutex", null_mutex }, { "null-spinlock", null_spinlock }, { "null-timer", null_timer },
	{ "null-irq", null_irq }, { "null-work", null_work }, { "bug", bug }, { "divide", divide }, { "wild", wild },
	{ "non-canonical", non_canonical }, { "null-call", null_call }, { "stack-overflow", overflow }, { "panic", panics },
};

static ssize_t tiny_write(struct file *file, const char *text, size_t count, loff_t *pos)
{
	struct device *dev = &device;
	if (!strcmp(text, "add")) {
		mutex_lock(&dev->mutex);
		dev->total++;
		mutex_unlock(&dev->mutex);
		return count;
	}
	if (!strcmp(text, "check")) { /* every lock can be had again */
		mutex_lock(&dev->mutex);
		_raw_spin_lock(&dev->lock);
		_raw_spin_unlock(&dev->lock);
		mutex_unlock(&dev->mutex);
		return count;
	}
	dev->hit = 1;
	for (unsigned long i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		if (!strcmp(text, cases[i].name))
			return cases[i].crash(dev) + count;
	return count;
}

static ssize_t tiny_read(struct file *file, char *data, size_t count, loff_t *pos)
{
	*(u64 *)data = *pos ? device.hit : device.total;
	return count;
}

static const struct file_operations fops = { .owner = &__this_module, .read = tiny_read, .write = tiny_write };

int init_module(void)
{
	request_irq(on_interrupt, &device);
	register_chrdev(&fops);
	return 0;
}
