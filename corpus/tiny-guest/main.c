/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The start of the kernel, files and work, and what the guest computes: tasks whose checksums show at the end whether a
 * step was lost or done twice. */
#include "tiny.h"

struct start_info { /* hvm_start_info of PVH */
	u32 magic, version, flags, nr_modules;
	u64 modlist, cmdline, rsdp;
};
struct start_module { u64 paddr, size, cmdline, reserved; };

u64 phys_base = IMAGE - (TEXT - MAP);
u64 page_offset_base = DIRECT_MAP;
u64 __per_cpu_offset[NR_CPUS];
u32 nr_cpu_ids = NR_CPUS;
enum system_states system_state;
union thread_union init_stack __attribute__((aligned(4096)));
u64 ap_stack;
static char per_cpu_area[NR_CPUS][1024] __attribute__((aligned(64)));
static struct task_struct other_idle;
static volatile int cpus_online = 1;
static const char *command_line, *driver_file;
static int start(void *unused);

static void cpu_init(int cpu)
{
	asm volatile("mov %0, %%cr3" : : "r"(PHYS((u64)init_top_pgt)) : "memory");
	memcpy(per_cpu_area[cpu], __per_cpu_start, __per_cpu_end - __per_cpu_start);
	__per_cpu_offset[cpu] = (u64)per_cpu_area[cpu] - (u64)__per_cpu_start;
	wrmsr(0xc0000101, __per_cpu_offset[cpu]);
	trap_init(cpu);
}

noinline void start_kernel(void)
{
	struct start_info *info;
	cpu_init(0);
	sched_init(0, &init_task, &init_stack, "swapper/0");
	info = (void *)(DIRECT_MAP + boot_info);
	command_line = (char *)(DIRECT_MAP + info->cmdline);
	if (info->nr_modules)
		driver_file = (char *)(DIRECT_MAP + ((struct start_module *)(DIRECT_MAP + info->modlist))->paddr);
	outb(0x21, 0xff); /* the old interrupt controllers stay out of it */
	outb(0xa1, 0xff);
	apic_init();
	ap_stack = (u64)new_stack() + THREAD_SIZE;
	apic_start_others();
	for (u64 end = rdtsc() + 200000000; cpus_online < NR_CPUS && rdtsc() < end;)
		cpu_relax();
	kthread_create(start, NULL, "start");
	cpu_idle();
}

noinline void start_other_cpu(void)
{
	cpu_init(1);
	sched_init(1, &other_idle, (void *)(ap_stack - THREAD_SIZE), "swapper/1");
	apic_init();
	cpus_online = 2;
	cpu_idle();
}

/* The value of an option, up to a space, or null. */
static const char *option(const char *name, char *value, int room)
{
	for (const char *at = command_line; *at; at++) {
		int n = 0;
		while (name[n] && at[n] == name[n])
			n++;
		if (name[n] || (at != command_line && at[-1] != ' '))
			continue;
		int k = 0;
		for (at += n; at[k] && at[k] != ' ' && k < room - 1; k++)
			value[k] = at[k];
		value[k] = 0;
		return value;
	}
	return NULL;
}

/* ---- Files and work: what calls the driver --------------------------------------------------------------------------- */
const struct file_operations *chrdev_fops;
void register_chrdev(const struct file_operations *fops) { chrdev_fops = fops; }
EXPORT_SYMBOL(register_chrdev);

noinline ssize_t vfs_write(struct file *file, const char *data, size_t count, loff_t *pos)
{
	ssize_t result = file->f_op->write(file, data, count, pos);
	if (result > 0)
		file->f_pos += result;
	return result;
}

noinline ssize_t vfs_read(struct file *file, char *data, size_t count, loff_t *pos)
{
	ssize_t result = file->f_op->read(file, data, count, pos);
	barrier();
	return result;
}

noinline int do_one_initcall(int (*fn)(void))
{
	int result = fn();
	barrier();
	return result;
}

static struct list_head work_list = { &work_list, &work_list };
static spinlock_t work_lock;
static struct task_struct *worker_task;

int queue_work(struct work_struct *work)
{
	u64 flags = _raw_spin_lock_irqsave(&work_lock);
	list_add_tail(&work->entry, &work_list);
	_raw_spin_unlock_irqrestore(&work_lock, flags);
	wake_up_process(worker_task);
	return 1;
}
EXPORT_SYMBOL(queue_work);

noinline void process_one_work(struct worker *worker, struct work_struct *work)
{
	work->func(work);
	barrier();
}

static int __attribute__((noreturn)) worker_thread(void *unused)
{
	for (;;) {
		struct work_struct *work = NULL;
		u64 flags = _raw_spin_lock_irqsave(&work_lock);
		if (!list_empty(&work_list)) {
			work = container_of(work_list.next, struct work_struct, entry);
			list_del(&work->entry);
		} else {
			current->__state = TASK_UNINTERRUPTIBLE;
		}
		_raw_spin_unlock_irqrestore(&work_lock, flags);
		if (work)
			process_one_work(NULL, work);
		else
			schedule();
	}
}

/* ---- What is computed -------------------------------------------------------------------------------------------------- */
#define SUMMERS 3
#define A 6364136223846793005UL
#define C 1442695040888963407UL
struct summer {
	u64 state, rounds, writes;
	int done;
};
static struct summer summers[SUMMERS];
static struct mutex shared_mutex;
static u64 shared_rounds;
static spinlock_t sum_lock;
static u64 sum_of_states;
static volatile int stop;

static long write_text(const char *text)
{
	struct file file = { .f_op = chrdev_fops };
	size_t count = 0;
	while (text[count])
		count++;
	return vfs_write(&file, text, count, &file.f_pos);
}

/* A word of the driver: 0 is the total of all "add", 1 whether its case was reached; `otherwise` if it is quarantined. */
static u64 read_word(loff_t which, u64 otherwise)
{
	struct file file = { .f_op = chrdev_fops };
	u64 word;
	return vfs_read(&file, (char *)&word, sizeof(word), &which) > 0 ? word : otherwise;
}

/* One step of a linear congruence a round; the locks are there to be waited for, the driver to be called by everybody. */
static int sum_thread(void *data)
{
	struct summer *own = data;
	while (!stop) {
		u64 flags;
		mutex_lock(&shared_mutex);
		shared_rounds++;
		mutex_unlock(&shared_mutex);
		own->state = own->state * A + C;
		flags = _raw_spin_lock_irqsave(&sum_lock);
		sum_of_states += own->state;
		_raw_spin_unlock_irqrestore(&sum_lock, flags);
		if (++own->rounds % 8 == 0 && write_text("add") == 3)
			own->writes++;
	}
	own->done = 1;
	return 0;
}

/* n steps from `state` on and the sum of all states on the way: again by doubling, another way than it was computed. */
static u64 many_steps(u64 state, u64 n, u64 *sum)
{
	/* x -> a x + c, and sum += s x + t over the steps so far doubled */
	u64 a = A, c = C, s = A, t = C;
	*sum = 0;
	for (; n; n >>= 1) {
		if (n & 1) {
			*sum += s * state + t;
			state = a * state + c;
		}
		t = t + s * c + t;
		s = s + s * a;
		c = a * c + c;
		a = a * a;
	}
	return state;
}

static int is_right(void)
{
	u64 rounds = 0, writes = 0, sums = 0, sum, good = 1;
	for (int i = 0; i < SUMMERS; i++) {
		good &= many_steps(i, summers[i].rounds, &sum) == summers[i].state;
		rounds += summers[i].rounds;
		writes += summers[i].writes;
		sums += sum;
	}
	printk("rounds %lu, writes %lu\n", rounds, writes);
	return good && rounds == shared_rounds && sums == sum_of_states && writes == read_word(0, writes);
}

/* Until every task has done `more` rounds, or is stuck. */
static void wait_for_rounds(u64 more)
{
	for (int i = 0; i < SUMMERS; i++) {
		u64 from = summers[i].rounds, end = jiffies_64 + 10 * HZ;
		while (summers[i].rounds < from + more) {
			if (jiffies_64 > end) {
				printk("stuck: task %d\n", i);
				exit_machine(EXIT_STUCK);
			}
			sleep_ticks(1);
		}
	}
}

/* Waits for the driver's word to become other than 0: the timer, interrupt or work was there. */
static void wait_for_hit(void)
{
	for (u64 end = jiffies_64 + 10 * HZ; !read_word(1, 1);) {
		if (jiffies_64 > end) {
			printk("stuck: the driver was not called back\n");
			exit_machine(EXIT_STUCK);
		}
		sleep_ticks(1);
	}
}

static void load_driver(void)
{
	struct module *module;
	if (!driver_file)
		panic("no driver: give it as the first boot module");
	module = load_module(driver_file);
	printk("module %s at %lx\n", module->name, (u64)module->mem[MOD_TEXT].base);
	if (do_one_initcall(module->init))
		panic("the driver refuses to start");
}

static int start(void *unused)
{
	char name[32], value[4];
	long result;
	printk("%s%d CPUs, %s\n", linux_banner, cpus_online, apic_name());
	worker_task = kthread_create(worker_thread, NULL, "kworker");
	load_driver();
	for (int i = 0; i < SUMMERS; i++) {
		summers[i].state = i;
		kthread_create(sum_thread, &summers[i], "sum");
	}
	wait_for_rounds(16);
	system_state = SYSTEM_RUNNING;
	printk("ready\n");
	if (option("wait", value, sizeof(value))) /* for a byte on the serial line: time for a guard to come */
		while (!(inb(0x3fd) & 1))
			sleep_ticks(1);
	if (!option("case=", name, sizeof(name)))
		memcpy(name, "none", 5);
	result = write_text(name);
	printk("case %s: write returned %ld\n", name, result);
	wait_for_hit();
	wait_for_rounds(16);
	result = write_text("check");
	printk("check: write returned %ld\n", result);
	stop = 1;
	for (int i = 0; i < SUMMERS; i++)
		while (!summers[i].done)
			sleep_ticks(1);
	result = is_right();
	printk("checksum %s\n", result ? "ok" : "BAD");
	exit_machine(result ? EXIT_OK : EXIT_BAD);
}
