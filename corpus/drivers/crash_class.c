// SPDX-License-Identifier: GPL-2.0-only
/*
 * A recorder of readings with mistakes that the kernel's own checks find: allocator, lists, string
 * functions, stack protector, reference counts, and jumps to what is no code. Faults by a plain bad
 * pointer are in crash_chardev.c.
 */
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pgtable.h>
#include <linux/refcount.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <net/net_namespace.h>

#include "crash.h"

struct reading {
	struct list_head entry;
	struct reading *calibration;
	long value;
	char padding[152];                      /* kmalloc-192 */
};

struct recorder {
	struct mutex lock;
	spinlock_t ring_lock;
	struct list_head readings;
	refcount_t users;
	size_t length;                          /* 600: longer than anything here */
	int minus_one;
	int words;                              /* 9 */
	char label[16];                         /* no NUL in it */
	unsigned long registers[4];
	const char __user *user;                /* the buffer of the write under way */
};

static struct recorder recorder;

static int fault_double_free(struct recorder *r)
{
	struct reading *first = kmalloc(sizeof(*first), GFP_KERNEL);
	struct reading *again = first;

	if (!first)
		return -ENOMEM;
	OPTIMIZER_HIDE_VAR(again);
	kfree(first);
	kfree(again); /* CRASH: double-free */
	return 0;
}

/* Freed, handed out again and filled: what was a pointer is somebody else's data by now. */
static int fault_use_after_free(struct recorder *r)
{
	struct reading *stale = kmalloc(sizeof(*stale), GFP_KERNEL);
	struct reading *other, *used = stale;
	int value = 0;

	OPTIMIZER_HIDE_VAR(used);
	kfree(stale);
	other = kmalloc(sizeof(*other), GFP_KERNEL);
	if (other != used) {
		kfree(other);
		return -EAGAIN;
	}
	memset(other, 0x5a, sizeof(*other));
	value = READ_ONCE(used->calibration->value); /* CRASH: use-after-free */
	kfree(other);
	return value;
}

#define SAMPLES 512

/* A cache's objects are merged with others' of the same size, unless it has a constructor. */
static void make_sample(void *sample)
{
	memset(sample, 0, sizeof(struct reading));
}

/*
 * Samples of a cache of their own; one that directly follows another is given back, and overrun by its
 * neighbour: nothing but this cache is broken. Gives the neighbour.
 */
static struct reading *overrun(struct kmem_cache *cache)
{
	static struct reading *samples[SAMPLES];
	unsigned long step = kmem_cache_size(cache), distance = 0;
	int n, m;

	for (n = 0; n < SAMPLES; n++) {
		samples[n] = kmem_cache_alloc(cache, GFP_KERNEL);
		if (!samples[n])
			return NULL;
	}
	for (n = 0; n < SAMPLES; n++) {
		for (m = 0; m < SAMPLES; m++) {
			distance = (unsigned long)samples[m] - (unsigned long)samples[n];
			if (distance >= step && distance < 2 * step)
				break;
		}
		if (m < SAMPLES)
			break;
	}
	if (n == SAMPLES)
		return NULL;
	kmem_cache_free(cache, samples[m]);
	OPTIMIZER_HIDE_VAR(distance);
	memset(samples[n], 0x5a, 2 * distance);
	return samples[n];
}

/* What an overrun has left of a free object is not the address of the next one any more. */
static int fault_free_list(struct recorder *r)
{
	struct kmem_cache *cache;
	struct reading *sample;

	cache = kmem_cache_create("crash_samples", sizeof(*sample), 0, 0, make_sample);
	if (!cache)
		return -ENOMEM;
	sample = overrun(cache);
	if (!sample)
		return -ENOMEM;
	BUG_ON(READ_ONCE(sample->value)); /* CRASH: free-list */
	return 0;
}

static int fault_list_add(struct recorder *r)
{
	struct reading *reading = kzalloc(sizeof(*reading), GFP_KERNEL);
	struct list_head list;

	if (!reading)
		return -ENOMEM;
	/* A neighbour that does not point back. */
	list.next = &reading->entry;
	list.prev = &list;
	reading->entry.prev = &reading->entry;
	list_add(&r->readings, &list); /* CRASH: list-add */
	return 0;
}

static int fault_list_del_twice(struct recorder *r)
{
	struct reading *reading = kzalloc(sizeof(*reading), GFP_KERNEL);

	if (!reading)
		return -ENOMEM;
	list_add(&reading->entry, &r->readings);
	list_del(&reading->entry);
	list_del(&reading->entry); /* CRASH: list-del-twice */
	return 0;
}

static int fault_usercopy_write(struct recorder *r)
{
	char *record = kmalloc(32, GFP_KERNEL);

	if (!record)
		return -ENOMEM;
	OPTIMIZER_HIDE_VAR(record);
	return copy_from_user(record, r->user, READ_ONCE(r->length)); /* CRASH: usercopy-write */
}

static int fault_fortify(struct recorder *r)
{
	memset(r->label, 'x', sizeof(r->label));
	return strlen(r->label); /* CRASH: fortify */
}

/* Writes as many words as it is told to, which is one more than the window holds. */
static noinline long smooth(const unsigned long *from, int words)
{
	unsigned long window[8];
	long sum = 0;
	int n;

	for (n = 0; n < words; n++) {
		window[n] = READ_ONCE(from[n & 3]) + n;
		/* The compiler must believe that this goes somewhere. */
		barrier_data(&window[n]);
	}
	for (n = 0; n < 8; n++)
		sum += READ_ONCE(window[n]);
	return sum;
} /* CRASH: stack-canary */

static int fault_stack_canary(struct recorder *r)
{
	return smooth(r->registers, READ_ONCE(r->words)) & 1;
}

/* The return address itself is overwritten, and no canary guards it. */
static noinline __no_stack_protector int fault_return_address(struct recorder *r)
{
	unsigned long *slot = (unsigned long *)__builtin_frame_address(0) + 1;

	WRITE_ONCE(*slot, (unsigned long)r->label);
	return 0; /* CRASH: return-address */
}

static int fault_call_data(struct recorder *r)
{
	int (*convert)(struct recorder *r) = (void *)r->registers;

	OPTIMIZER_HIDE_VAR(convert);
	return convert(r) + 1; /* CRASH: call-data */
}

static int fault_call_user(struct recorder *r)
{
	int (*convert)(struct recorder *r) = (void *)r->user;

	OPTIMIZER_HIDE_VAR(convert);
	return convert(r) + 1; /* CRASH: call-user */
}

static int fault_call_noncanonical(struct recorder *r)
{
	int (*convert)(struct recorder *r) = (void *)0x5a5a5a5a5a5a5a5aUL;

	OPTIMIZER_HIDE_VAR(convert);
	return convert(r) + 1; /* CRASH: call-noncanonical */
}

static int fault_divide_overflow(struct recorder *r)
{
	int lowest = INT_MIN;

	OPTIMIZER_HIDE_VAR(lowest);
	return lowest / READ_ONCE(r->minus_one); /* CRASH: divide-overflow */
}

static int fault_invalid_opcode(struct recorder *r)
{
	/* What a compiler leaves where it takes the end of a function for unreachable. */
	asm volatile("ud2"); /* CRASH: invalid-opcode */
	unreachable();
}

static int fault_int3(struct recorder *r)
{
	asm volatile("int3"); /* CRASH: int3 */
	return 0;
}

static int fault_bug_atomic(struct recorder *r)
{
	spin_lock(&r->ring_lock);
	BUG_ON(r->minus_one); /* CRASH: bug-atomic */
	spin_unlock(&r->ring_lock);
	return 0;
}

static int fault_panic_locked(struct recorder *r)
{
	mutex_lock(&r->lock);
	if (r->minus_one)
		panic("crash_class: a reading of %d", r->minus_one); /* CRASH: panic-locked */
	mutex_unlock(&r->lock);
	return 0;
}

/* The warnings crash only a guest that has kernel.panic_on_warn set. */
static int fault_warn(struct recorder *r)
{
	mutex_lock(&r->lock);
	WARN_ON(r->minus_one); /* CRASH: warn */
	mutex_unlock(&r->lock);
	return 0;
}

/* The word that marks the end of a stack, overwritten as by an overflow that stopped there. */
static int fault_stack_end(struct recorder *r)
{
	WRITE_ONCE(*(unsigned long *)current->stack, 0x4141414141414141);
	/* A page fault may sleep, and schedule() would panic first. */
	BUG(); /* CRASH: stack-end */
	return 0;
}

/* For half a second at most. */
static void park(void *parked)
{
	int ms;

	atomic_inc(parked);
	for (ms = 0; ms < 500; ms++)
		mdelay(1);
}

/*
 * Nothing else runs from here to the fault: another CPU, or an interrupt of this one, would meet first
 * what is broken for the crash, or write what is right over it.
 */
static __always_inline void be_alone(void)
{
	static atomic_t parked;

	get_cpu();
	atomic_set(&parked, 0);
	smp_call_function(park, &parked, 0);
	while (atomic_read(&parked) < num_online_cpus() - 1)
		cpu_relax();
	local_irq_disable();
}

/* A stray write to the list of all tasks: nothing that walks it would come back. */
static int fault_task_list(struct recorder *r)
{
	be_alone();
	WRITE_ONCE(current->group_leader->tasks.prev, &current->group_leader->tasks);
	BUG(); /* CRASH: task-list */
	return 0;
}

static int waits_for_cpu(void *unused)
{
	while (!kthread_should_stop())
		schedule_timeout_interruptible(HZ);
	return 0;
}

/* A stray write to a task that waits for this CPU: the next change of the run queue would follow it. */
static int fault_run_queue(struct recorder *r)
{
	struct task_struct *waiter = kthread_create(waits_for_cpu, NULL, "crash_waiter");

	if (IS_ERR(waiter))
		return PTR_ERR(waiter);
	get_cpu();
	kthread_bind(waiter, smp_processor_id());
	be_alone();
	put_cpu();
	wake_up_process(waiter);
	WRITE_ONCE(waiter->se.run_node.__rb_parent_color, 0x1000);
	BUG(); /* CRASH: run-queue */
	return 0;
}

/* A stray write to the process's page tables: nothing that looks at a page's description would come back. */
static int fault_page_table(struct recorder *r)
{
	pgd_t *entry = current->mm->pgd + pgd_index((unsigned long)vmemmap);

	be_alone();
	WRITE_ONCE(entry->pgd, 0);
	BUG(); /* CRASH: page-table */
	return 0;
}

/* A stray write to the list of all network devices: no more could be added, and none taken off. */
static int fault_core_list(struct recorder *r)
{
	struct list_head *devices = &init_net.dev_base_head;
	static struct list_head entry;

	be_alone();
	WRITE_ONCE(devices->next->prev, devices->next);
	list_add(&entry, devices); /* CRASH: core-list */
	return 0;
}

static int fault_refcount(struct recorder *r)
{
	refcount_set(&r->users, 0);
	refcount_inc(&r->users); /* CRASH: refcount */
	return 0;
}

static int fault_refcount_underflow(struct recorder *r)
{
	refcount_set(&r->users, 0);
	if (refcount_dec_and_test(&r->users)) /* CRASH: refcount-underflow */
		return -EINVAL;
	return 0;
}

static const struct {
	const char *name;
	int (*run)(struct recorder *r);
} faults[] = {
	{ "double-free", fault_double_free },
	{ "stack-end", fault_stack_end },
	{ "task-list", fault_task_list },
	{ "run-queue", fault_run_queue },
	{ "page-table", fault_page_table },
	{ "core-list", fault_core_list },
	{ "use-after-free", fault_use_after_free },
	{ "free-list", fault_free_list },
	{ "list-add", fault_list_add },
	{ "list-del-twice", fault_list_del_twice },
	{ "usercopy-write", fault_usercopy_write },
	{ "fortify", fault_fortify },
	{ "stack-canary", fault_stack_canary },
	{ "return-address", fault_return_address },
	{ "call-data", fault_call_data },
	{ "call-user", fault_call_user },
	{ "call-noncanonical", fault_call_noncanonical },
	{ "divide-overflow", fault_divide_overflow },
	{ "invalid-opcode", fault_invalid_opcode },
	{ "int3", fault_int3 },
	{ "bug-atomic", fault_bug_atomic },
	{ "panic-locked", fault_panic_locked },
	{ "warn", fault_warn },
	{ "refcount", fault_refcount },
	{ "refcount-underflow", fault_refcount_underflow },
};

static ssize_t recorder_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	struct recorder *r = &recorder;
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);
	int n;

	if (error)
		return error;
	r->user = from;
	for (n = 0; n < ARRAY_SIZE(faults); n++) {
		if (strcmp(faults[n].name, name))
			continue;
		error = faults[n].run(r);
		return error < 0 ? error : count;
	}
	return -EINVAL;
}

static ssize_t recorder_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	struct recorder *r = &recorder;
	const char *wrong = NULL;

	if (!crash_trylock(mutex_trylock(&r->lock)))
		wrong = "lock";
	else
		mutex_unlock(&r->lock);
	if (!crash_trylock(spin_trylock(&r->ring_lock)))
		wrong = "ring-lock";
	else
		spin_unlock(&r->ring_lock);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations recorder_operations = {
	.owner = THIS_MODULE,
	.read = recorder_read,
	.write = recorder_write,
};

static struct miscdevice recorder_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_class",
	.fops = &recorder_operations,
	.mode = 0666,
};

static int __init recorder_init(void)
{
	mutex_init(&recorder.lock);
	spin_lock_init(&recorder.ring_lock);
	INIT_LIST_HEAD(&recorder.readings);
	recorder.length = 600;
	recorder.minus_one = -1;
	recorder.words = 9;
	return misc_register(&recorder_device);
}

static void __exit recorder_exit(void)
{
	misc_deregister(&recorder_device);
}

module_init(recorder_init);
module_exit(recorder_exit);
MODULE_DESCRIPTION("Crash corpus: faults that the kernel's own checks find");
MODULE_LICENSE("GPL");
