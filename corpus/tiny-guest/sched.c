/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Locks and tasks: spinlocks, mutexes, one round-robin queue for all CPUs. */
#include "tiny.h"

__percpu struct task_struct *current_task = NULL;
__percpu u32 __preempt_count = 0;
__percpu u64 hardirq_stack_ptr = 0;
__percpu struct rq runqueues = {};
__percpu struct task_struct *idle_threads = NULL;
__percpu u32 need_resched = 0;

/* ---- Spinlocks: interrupts may take them, so holding one means not to be preempted ------------------------------------ */
noinline void _raw_spin_lock(spinlock_t *lock)
{
	preempt_add(PREEMPT_OFFSET);
	while (__atomic_exchange_n(&lock->raw_lock.locked, 1, __ATOMIC_ACQUIRE))
		cpu_relax();
}
EXPORT_SYMBOL(_raw_spin_lock);

noinline void _raw_spin_unlock(spinlock_t *lock)
{
	__atomic_store_n(&lock->raw_lock.locked, 0, __ATOMIC_RELEASE);
	preempt_sub(PREEMPT_OFFSET);
}
EXPORT_SYMBOL(_raw_spin_unlock);

noinline u64 _raw_spin_lock_irqsave(spinlock_t *lock)
{
	u64 flags = save_flags();
	local_irq_disable();
	preempt_add(PREEMPT_OFFSET);
	while (__atomic_exchange_n(&lock->raw_lock.locked, 1, __ATOMIC_ACQUIRE))
		cpu_relax();
	return flags;
}
EXPORT_SYMBOL(_raw_spin_lock_irqsave);

noinline void _raw_spin_unlock_irqrestore(spinlock_t *lock, u64 flags)
{
	__atomic_store_n(&lock->raw_lock.locked, 0, __ATOMIC_RELEASE);
	restore_flags(flags);
	preempt_sub(PREEMPT_OFFSET);
}
EXPORT_SYMBOL(_raw_spin_unlock_irqrestore);

/* ---- The queue ------------------------------------------------------------------------------------------------------ */
static struct list_head queue = { &queue, &queue };
static spinlock_t queue_lock;
void __switch_to_asm(u64 *prev, u64 next);
void ret_from_fork(void);

/* Interrupts off, preemption off, queue_lock held: the same here and in schedule_tail(), whoever comes from where. */
noinline void schedule(void)
{
	u64 flags = save_flags();
	struct task_struct *prev, *next;
	local_irq_disable();
	preempt_add(PREEMPT_OFFSET);
	_raw_spin_lock(&queue_lock);
	prev = current;
	next = this_cpu_read(idle_threads);
	this_cpu_write(need_resched, 0);
	if (prev->__state == TASK_RUNNING && prev != next)
		list_add_tail(&prev->run_list, &queue);
	if (!list_empty(&queue)) {
		next = container_of(queue.next, struct task_struct, run_list);
		list_del(&next->run_list);
	}
	if (next != prev) {
		asm volatile("incq %%gs:%0" : "+m"(runqueues.nr_switches));
		prev->on_cpu = 0;
		next->on_cpu = 1;
		this_cpu_write(current_task, next);
		__switch_to_asm(&prev->thread.sp, next->thread.sp);
	}
	_raw_spin_unlock(&queue_lock);
	preempt_sub(PREEMPT_OFFSET);
	restore_flags(flags);
}
EXPORT_SYMBOL(schedule);

void schedule_tail(void)
{
	_raw_spin_unlock(&queue_lock);
	preempt_sub(PREEMPT_OFFSET);
	local_irq_enable();
}

noinline void wake_up_process(struct task_struct *task)
{
	u64 flags = _raw_spin_lock_irqsave(&queue_lock);
	if (task->__state != TASK_RUNNING && task->__state != TASK_DEAD) {
		task->__state = TASK_RUNNING;
		if (!task->on_cpu)
			list_add_tail(&task->run_list, &queue);
	}
	_raw_spin_unlock_irqrestore(&queue_lock, flags);
}

struct sleeper {
	struct timer_list timer;
	struct task_struct *task;
};

static void wake_sleeper(struct timer_list *timer)
{
	wake_up_process(container_of(timer, struct sleeper, timer)->task);
}

void sleep_ticks(u64 ticks)
{
	struct sleeper sleeper = { { .function = wake_sleeper }, current };
	preempt_add(PREEMPT_OFFSET); /* not to be switched out for good before the timer runs */
	current->__state = TASK_UNINTERRUPTIBLE;
	mod_timer(&sleeper.timer, jiffies_64 + ticks);
	preempt_sub(PREEMPT_OFFSET);
	schedule();
}

/* ---- Mutexes -------------------------------------------------------------------------------------------------------- */
#define WAITERS 1UL
struct waiter {
	struct list_head entry;
	struct task_struct *task;
};

static int mutex_take(struct mutex *lock, u64 flags)
{
	u64 old = __atomic_load_n(&lock->owner, __ATOMIC_RELAXED);
	return !(old & ~7UL) &&
	       __atomic_compare_exchange_n(&lock->owner, &old, (u64)current | (old & 7) | flags, 0, __ATOMIC_ACQUIRE,
					   __ATOMIC_RELAXED);
}

noinline void mutex_lock(struct mutex *lock)
{
	struct waiter waiter = { .task = current };
	while (!mutex_take(lock, 0)) {
		_raw_spin_lock(&lock->wait_lock);
		if (!lock->wait_list.next)
			list_init(&lock->wait_list);
		__atomic_or_fetch(&lock->owner, WAITERS, __ATOMIC_RELAXED);
		if (mutex_take(lock, 0)) {
			_raw_spin_unlock(&lock->wait_lock);
			return;
		}
		list_add_tail(&waiter.entry, &lock->wait_list);
		current->__state = TASK_UNINTERRUPTIBLE;
		_raw_spin_unlock(&lock->wait_lock);
		schedule();
	}
}
EXPORT_SYMBOL(mutex_lock);

/* The first waiter is taken off the list and tries again. */
noinline void mutex_unlock(struct mutex *lock)
{
	u64 owner = (u64)current;
	struct task_struct *next = NULL;
	if (__atomic_compare_exchange_n(&lock->owner, &owner, 0, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		return;
	_raw_spin_lock(&lock->wait_lock);
	if (!list_empty(&lock->wait_list)) {
		struct waiter *first = container_of(lock->wait_list.next, struct waiter, entry);
		list_del(&first->entry);
		next = first->task;
	}
	__atomic_store_n(&lock->owner, next && !list_empty(&lock->wait_list) ? WAITERS : 0, __ATOMIC_RELEASE);
	_raw_spin_unlock(&lock->wait_lock);
	if (next)
		wake_up_process(next);
}
EXPORT_SYMBOL(mutex_unlock);

/* ---- Threads -------------------------------------------------------------------------------------------------------- */
#define TASKS 12
struct task_struct init_task;
static struct task_struct tasks[TASKS];
static union thread_union stacks[TASKS] __attribute__((aligned(4096)));
u64 stack_pgt[512] __attribute__((aligned(4096)));
static int task_count, stack_count;

/* Mapped with nothing below and above: a stack that overflows faults. */
void *new_stack(void)
{
	int slot = stack_count++, page = 4 * slot + 1;
	if (slot >= TASKS)
		panic("too many tasks");
	stack_pgt[page] = PHYS((u64)&stacks[slot]) | 3;
	stack_pgt[page + 1] = PHYS((u64)&stacks[slot] + 4096) | 3;
	return (void *)(STACKS + 4096 * page);
}

static void task_init(struct task_struct *task, void *stack, int pid, u32 flags, const char *comm)
{
	task->stack = stack;
	task->pid = task->tgid = pid;
	task->flags = flags;
	for (int i = 0; i < 15 && comm[i]; i++)
		task->comm[i] = comm[i];
	task->signal = &task->own_signal;
	task->stack_canary = rdtsc() | 1;
	list_init(&task->run_list);
	list_init(&task->signal->thread_head);
	list_add_tail(&task->thread_node, &task->signal->thread_head);
}

/* The idle task of a CPU, which is what has run there since its start. Idle tasks run with preemption off. */
void sched_init(int cpu, struct task_struct *idle, void *stack, const char *comm)
{
	task_init(idle, stack, 0, PF_IDLE | PF_KTHREAD, comm);
	if (cpu == 0)
		list_init(&idle->tasks);
	idle->on_cpu = 1;
	this_cpu_write(current_task, idle);
	this_cpu_write(idle_threads, idle);
	this_cpu_write(__preempt_count, PREEMPT_OFFSET);
}

struct task_struct *kthread_create(int (*fn)(void *), void *data, const char *name)
{
	struct task_struct *task = &tasks[task_count++];
	struct inactive_task_frame *frame;
	char *stack = new_stack();
	task_init(task, stack, task_count, PF_KTHREAD, name);
	frame = (void *)(stack + THREAD_SIZE - 16 - sizeof(*frame));
	*frame = (struct inactive_task_frame){ .bx = (u64)fn, .r12 = (u64)data, .ret_addr = (u64)ret_from_fork };
	task->thread.sp = (u64)frame;
	list_add_tail(&task->tasks, &init_task.tasks);
	task->__state = TASK_UNINTERRUPTIBLE;
	wake_up_process(task);
	return task;
}

noinline int kthread(int (*fn)(void *), void *data)
{
	int result = fn(data);
	current->__state = TASK_DEAD;
	schedule();
	return result;
}

void cpu_idle(void)
{
	for (;;) {
		local_irq_disable();
		if (list_empty(&queue) && !this_cpu_read(need_resched)) {
			asm volatile("sti; hlt");
			continue;
		}
		local_irq_enable();
		preempt_sub(PREEMPT_OFFSET);
		schedule();
		preempt_add(PREEMPT_OFFSET);
	}
}
