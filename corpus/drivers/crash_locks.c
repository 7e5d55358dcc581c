// SPDX-License-Identifier: GPL-2.0-only
/*
 * A ledger kept under every kind of lock, with the same mistake (an account that is not there) made
 * while each of them is held. The self-check tells whether every lock can still be taken.
 */
#include <linux/miscdevice.h>
#include <linux/module.h>

#include "crash.h"

struct account {
	long opened;
	long amount;
};

/* One ledger lives in the module's own data, another in a slab object. */
struct ledger {
	struct account *account;        /* never set: the mistake */
	struct mutex lock;
	spinlock_t fast;
	struct rw_semaphore sem;
	rwlock_t rw;
	atomic_t waiters;
};

static struct ledger books = {
	.lock = __MUTEX_INITIALIZER(books.lock),
	.fast = __SPIN_LOCK_UNLOCKED(books.fast),
	.sem = __RWSEM_INITIALIZER(books.sem),
	.rw = __RW_LOCK_UNLOCKED(books.rw),
};
static struct ledger *branch;
static DEFINE_SPINLOCK(index_lock);

static long under_mutex(struct ledger *l)
{
	long sum;

	mutex_lock(&l->lock);
	sum = READ_ONCE(l->account->amount); /* CRASH: mutex */
	mutex_unlock(&l->lock);
	return sum;
}

static long under_slab_mutex(struct ledger *unused)
{
	struct ledger *l = branch;
	long sum;

	mutex_lock(&l->lock);
	sum = READ_ONCE(l->account->amount); /* CRASH: slab-mutex */
	mutex_unlock(&l->lock);
	return sum;
}

static long under_rwsem_read(struct ledger *l)
{
	long sum;

	down_read(&l->sem);
	sum = READ_ONCE(l->account->amount); /* CRASH: rwsem-read */
	up_read(&l->sem);
	return sum;
}

static long under_rwsem_write(struct ledger *l)
{
	down_write(&l->sem);
	WRITE_ONCE(l->account->amount, 1); /* CRASH: rwsem-write */
	up_write(&l->sem);
	return 0;
}

static long under_spinlock(struct ledger *l)
{
	long sum;

	spin_lock(&l->fast);
	sum = READ_ONCE(l->account->amount); /* CRASH: spinlock */
	spin_unlock(&l->fast);
	return sum;
}

static long under_spinlock_irqsave(struct ledger *unused)
{
	struct ledger *l = branch;
	unsigned long flags;
	long sum;

	spin_lock_irqsave(&l->fast, flags);
	sum = READ_ONCE(l->account->amount); /* CRASH: spinlock-irqsave */
	spin_unlock_irqrestore(&l->fast, flags);
	return sum;
}

static long under_spinlock_irq(struct ledger *l)
{
	long sum;

	spin_lock_irq(&l->fast);
	sum = READ_ONCE(l->account->amount); /* CRASH: spinlock-irq */
	spin_unlock_irq(&l->fast);
	return sum;
}

static long under_spinlock_bh(struct ledger *l)
{
	long sum;

	spin_lock_bh(&l->fast);
	sum = READ_ONCE(l->account->amount); /* CRASH: spinlock-bh */
	spin_unlock_bh(&l->fast);
	return sum;
}

static long under_read_lock(struct ledger *l)
{
	long sum;

	read_lock(&l->rw);
	sum = READ_ONCE(l->account->amount); /* CRASH: read-lock */
	read_unlock(&l->rw);
	return sum;
}

static long under_write_lock(struct ledger *l)
{
	write_lock(&l->rw);
	WRITE_ONCE(l->account->amount, 1); /* CRASH: write-lock */
	write_unlock(&l->rw);
	return 0;
}

static long under_three_locks(struct ledger *l)
{
	unsigned long outer, inner;

	mutex_lock(&l->lock);
	spin_lock_irqsave(&index_lock, outer);
	spin_lock_irqsave(&branch->fast, inner);
	BUG_ON(!l->account); /* CRASH: three-locks */
	spin_unlock_irqrestore(&branch->fast, inner);
	spin_unlock_irqrestore(&index_lock, outer);
	mutex_unlock(&l->lock);
	return 0;
}

static long under_rcu(struct ledger *l)
{
	long sum;

	rcu_read_lock();
	sum = READ_ONCE(l->account->amount); /* CRASH: rcu */
	rcu_read_unlock();
	return sum;
}

static long with_irqs_off(struct ledger *l)
{
	long sum;

	local_irq_disable();
	sum = READ_ONCE(l->account->amount); /* CRASH: irqs-off */
	local_irq_enable();
	return sum;
}

static long with_bh_off(struct ledger *l)
{
	long sum;

	local_bh_disable();
	sum = READ_ONCE(l->account->amount); /* CRASH: bh-off */
	local_bh_enable();
	return sum;
}

static long with_preemption_off(struct ledger *l)
{
	long sum;

	preempt_disable();
	sum = READ_ONCE(l->account->amount); /* CRASH: preemption-off */
	preempt_enable();
	return sum;
}

/* Four frames, each of which takes something: all of it must be found. */
static noinline long booked(struct ledger *l, int years)
{
	return READ_ONCE(l->account->amount) * years; /* CRASH: deep */
}

static noinline long with_interest(struct ledger *l, int years)
{
	long sum;

	rcu_read_lock();
	sum = booked(l, years) + years;
	rcu_read_unlock();
	return sum;
}

static noinline long in_index(struct ledger *l, int years)
{
	unsigned long flags;
	long sum;

	spin_lock_irqsave(&index_lock, flags);
	sum = with_interest(l, years) - 1;
	spin_unlock_irqrestore(&index_lock, flags);
	return sum;
}

static noinline long audited(struct ledger *l, int years)
{
	long sum;

	down_read(&l->sem);
	sum = in_index(l, years + 1) + 1;
	up_read(&l->sem);
	return sum;
}

static long through_four_frames(struct ledger *l)
{
	long sum;

	mutex_lock(&branch->lock);
	sum = audited(l, 3);
	mutex_unlock(&branch->lock);
	return sum;
}

/* Returns when somebody says that he is about to wait, and gives him time to do so. */
static void await_waiter(struct ledger *l)
{
	int patience = 2000;

	while (!atomic_read(&l->waiters) && patience-- > 0)
		mdelay(1);
	mdelay(20);
}

static long mutex_with_waiter(struct ledger *l)
{
	long sum;

	mutex_lock(&l->lock);
	await_waiter(l);
	sum = READ_ONCE(l->account->amount); /* CRASH: mutex-waited */
	mutex_unlock(&l->lock);
	return sum;
}

static long spinlock_with_waiter(struct ledger *l)
{
	long sum;

	spin_lock(&l->fast);
	await_waiter(l);
	sum = READ_ONCE(l->account->amount); /* CRASH: spinlock-waited */
	spin_unlock(&l->fast);
	return sum;
}

static long wait_for_mutex(struct ledger *l)
{
	atomic_inc(&l->waiters);
	mutex_lock(&l->lock);
	mutex_unlock(&l->lock);
	atomic_dec(&l->waiters);
	return 0;
}

static long wait_for_spinlock(struct ledger *l)
{
	atomic_inc(&l->waiters);
	spin_lock(&l->fast);
	spin_unlock(&l->fast);
	atomic_dec(&l->waiters);
	return 0;
}

static const struct {
	const char *name;
	long (*run)(struct ledger *l);
} entries[] = {
	{ "mutex", under_mutex },
	{ "slab-mutex", under_slab_mutex },
	{ "rwsem-read", under_rwsem_read },
	{ "rwsem-write", under_rwsem_write },
	{ "spinlock", under_spinlock },
	{ "spinlock-irqsave", under_spinlock_irqsave },
	{ "spinlock-irq", under_spinlock_irq },
	{ "spinlock-bh", under_spinlock_bh },
	{ "read-lock", under_read_lock },
	{ "write-lock", under_write_lock },
	{ "three-locks", under_three_locks },
	{ "rcu", under_rcu },
	{ "irqs-off", with_irqs_off },
	{ "bh-off", with_bh_off },
	{ "preemption-off", with_preemption_off },
	{ "deep", through_four_frames },
	{ "mutex-waited", mutex_with_waiter },
	{ "spinlock-waited", spinlock_with_waiter },
	{ "wait-mutex", wait_for_mutex },
	{ "wait-spinlock", wait_for_spinlock },
};

static ssize_t ledger_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);
	int n;

	if (error)
		return error;
	for (n = 0; n < ARRAY_SIZE(entries); n++) {
		if (!strcmp(entries[n].name, name))
			return entries[n].run(&books) < 0 ? -EIO : count;
	}
	return -EINVAL;
}

/* NULL, or which lock of the ledger cannot be had. */
static const char *lost_lock(struct ledger *l)
{
	if (!crash_trylock(mutex_trylock(&l->lock)))
		return "mutex";
	mutex_unlock(&l->lock);
	if (!crash_trylock(spin_trylock(&l->fast)))
		return "spinlock";
	spin_unlock(&l->fast);
	if (!crash_trylock(down_write_trylock(&l->sem)))
		return "rwsem";
	up_write(&l->sem);
	if (!crash_trylock(write_trylock(&l->rw)))
		return "rwlock";
	write_unlock(&l->rw);
	return NULL;
}

static ssize_t ledger_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	/* First what this task brought along: taking locks would be wrong on top of it. */
	const char *wrong = crash_context();

	if (!wrong)
		wrong = lost_lock(&books);
	if (!wrong)
		wrong = lost_lock(branch);
	if (!wrong && !crash_trylock(spin_trylock(&index_lock)))
		wrong = "index-lock";
	else if (!wrong)
		spin_unlock(&index_lock);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations ledger_operations = {
	.owner = THIS_MODULE,
	.read = ledger_read,
	.write = ledger_write,
};

static struct miscdevice ledger_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_locks",
	.fops = &ledger_operations,
	.mode = 0666,
};

static int __init ledger_init(void)
{
	int error;

	branch = kzalloc(sizeof(*branch), GFP_KERNEL);
	if (!branch)
		return -ENOMEM;
	mutex_init(&branch->lock);
	spin_lock_init(&branch->fast);
	init_rwsem(&branch->sem);
	rwlock_init(&branch->rw);
	error = misc_register(&ledger_device);
	if (error)
		kfree(branch);
	return error;
}

static void __exit ledger_exit(void)
{
	misc_deregister(&ledger_device);
	kfree(branch);
}

module_init(ledger_init);
module_exit(ledger_exit);
MODULE_DESCRIPTION("Crash corpus: a fault while something is held");
MODULE_LICENSE("GPL");
