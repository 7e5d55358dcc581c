/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Interrupts: the local APIC, the tick, timers, and the one device, which is the APIC sending itself a vector. */
#include "tiny.h"

enum { APIC_ID = 0x20, APIC_EOI = 0xb0, APIC_SPURIOUS = 0xf0, APIC_COMMAND = 0x300, APIC_TIMER = 0x320,
       APIC_TIMER_COUNT = 0x380, APIC_TIMER_DIVIDE = 0x3e0 };
static int x2apic;

/* QEMU's TCG has x2APIC since 9.0 only. */
static void apic_write(u32 reg, u32 value)
{
	if (x2apic)
		wrmsr(0x800 + (reg >> 4), value);
	else
		*(volatile u32 *)(APIC_MAP + reg) = value;
}

const char *apic_name(void) { return x2apic ? "x2apic" : "xapic"; }

void apic_init(void)
{
	u32 a = 1, b, c, d;
	asm volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
	x2apic = c >> 21 & 1;
	if (x2apic)
		wrmsr(0x1b, rdmsr(0x1b) | 0xc00);
	apic_write(APIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
	apic_write(APIC_TIMER_DIVIDE, 0xb); /* by 1: 1 GHz, in QEMU and in KVM */
	apic_write(APIC_TIMER, 0x20000 | TIMER_VECTOR); /* periodic */
	apic_write(APIC_TIMER_COUNT, 1000000000 / HZ);
}

static void pause_cycles(u64 cycles)
{
	for (u64 end = rdtsc() + cycles; rdtsc() < end;)
		cpu_relax();
}

void apic_start_others(void)
{
	memcpy((void *)(DIRECT_MAP + AP_START), ap_trampoline, ap_trampoline_end - ap_trampoline);
	apic_write(APIC_COMMAND, 0xc4500); /* INIT to all others */
	pause_cycles(100000);
	apic_write(APIC_COMMAND, 0xc4600 | AP_START >> 12);
}

void kick_device(void) { apic_write(APIC_COMMAND, 0x44000 | DEVICE_VECTOR); }
EXPORT_SYMBOL(kick_device);

/* ---- Timers: one list for all CPUs. ------------------------------------------------------------------------------- */
u64 jiffies_64;
static struct list_head timers = { &timers, &timers };
static spinlock_t timer_lock;

int mod_timer(struct timer_list *timer, u64 expires)
{
	u64 flags = _raw_spin_lock_irqsave(&timer_lock);
	timer->expires = expires;
	list_add_tail(&timer->entry, &timers);
	_raw_spin_unlock_irqrestore(&timer_lock, flags);
	return 0;
}
EXPORT_SYMBOL(mod_timer);
EXPORT_SYMBOL(jiffies_64);

static struct timer_list *take_expired(void)
{
	struct timer_list *found = NULL;
	u64 flags = _raw_spin_lock_irqsave(&timer_lock);
	for (struct list_head *l = timers.next; l != &timers && !found; l = l->next) {
		struct timer_list *timer = container_of(l, struct timer_list, entry);
		if (timer->expires <= jiffies_64)
			found = timer;
	}
	if (found)
		list_del(&found->entry);
	_raw_spin_unlock_irqrestore(&timer_lock, flags);
	return found;
}

noinline void call_timer_fn(struct timer_list *timer, void (*fn)(struct timer_list *), u64 baseclk)
{
	fn(timer);
	barrier();
}

static noinline void run_timer_softirq(void)
{
	for (struct timer_list *timer; (timer = take_expired());)
		call_timer_fn(timer, timer->function, jiffies_64);
}

noinline void __do_softirq(void)
{
	preempt_add(SOFTIRQ_OFFSET);
	local_irq_enable();
	run_timer_softirq();
	local_irq_disable();
	preempt_sub(SOFTIRQ_OFFSET);
}

/* ---- From the entries ----------------------------------------------------------------------------------------------- */
struct irq_desc {
	int irq;
	struct irqaction action;
};
static struct irq_desc device_irq = { .irq = 5 };

int request_irq(irqreturn_t (*handler)(int, void *), void *dev_id)
{
	device_irq.action.dev_id = dev_id;
	device_irq.action.handler = handler;
	return 0;
}
EXPORT_SYMBOL(request_irq);

noinline irqreturn_t __handle_irq_event_percpu(struct irq_desc *desc)
{
	irqreturn_t result = desc->action.handler(desc->irq, desc->action.dev_id);
	barrier();
	return result;
}

/* Where every interrupt and exception ends; a crash of the idle task's interrupts is left through here too. */
void irqentry_exit(struct pt_regs *regs, irqentry_state_t state)
{
	if (regs->flags & 0x200 && preempt_count() == 0 && this_cpu_read(need_resched))
		schedule();
}

void common_interrupt(struct pt_regs *regs, u64 vector)
{
	preempt_add(HARDIRQ_OFFSET);
	__handle_irq_event_percpu(&device_irq);
	apic_write(APIC_EOI, 0);
	preempt_sub(HARDIRQ_OFFSET);
	irqentry_exit(regs, (irqentry_state_t){ 0 });
}

void sysvec_apic_timer_interrupt(struct pt_regs *regs, u64 error)
{
	preempt_add(HARDIRQ_OFFSET);
	apic_write(APIC_EOI, 0);
	this_cpu_write(need_resched, 1);
	if (rdmsr(0xc0000101) == __per_cpu_offset[0])
		jiffies_64++;
	preempt_sub(HARDIRQ_OFFSET);
	if (!(preempt_count() & ~0xff))
		__do_softirq();
	irqentry_exit(regs, (irqentry_state_t){ 0 });
}

void spurious_interrupt(struct pt_regs *regs, u64 error) {}
