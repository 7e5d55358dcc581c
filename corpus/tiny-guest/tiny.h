/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* What the files of the tiny guest share, beyond what defib knows of (that is in linux.h). */
#ifndef TINY_H
#define TINY_H
#include "linux.h"
#include "map.h"

#define NULL ((void *)0)
#define noinline __attribute__((noinline))
#define container_of(p, type, member) ((type *)((char *)(p) - __builtin_offsetof(type, member)))
#define barrier() asm volatile("" : : : "memory")
#define HZ 100

/* Per-CPU variables: %gs:symbol, since GS base is __per_cpu_offset of the CPU. */
#define this_cpu_read(var)                                                                                             \
	({ typeof(var) v_; asm volatile("mov %%gs:%1, %0" : "=r"(v_) : "m"(var)); v_; })
#define this_cpu_write(var, value) asm volatile("mov %1, %%gs:%0" : "+m"(var) : "r"((typeof(var))(value)))
#define per_cpu(var, cpu) (*(typeof(&(var)))((char *)&(var) + __per_cpu_offset[cpu]))
#define current this_cpu_read(current_task)
#define preempt_add(n) asm volatile("addl %1, %%gs:%0" : "+m"(__preempt_count) : "i"(n) : "memory")
#define preempt_sub(n) asm volatile("subl %1, %%gs:%0" : "+m"(__preempt_count) : "i"(n) : "memory")
#define preempt_count() this_cpu_read(__preempt_count)

static inline void cpu_relax(void) { asm volatile("pause" : : : "memory"); }
static inline void outb(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "d"(port)); }
static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "d"(port)); return v; }
static inline void wrmsr(u32 msr, u64 v) { asm volatile("wrmsr" : : "c"(msr), "a"((u32)v), "d"((u32)(v >> 32))); }
static inline u64 rdmsr(u32 msr) { u32 a, d; asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(msr)); return (u64)d << 32 | a; }
static inline u64 rdtsc(void) { u32 a, d; asm volatile("rdtsc" : "=a"(a), "=d"(d)); return (u64)d << 32 | a; }
static inline u64 save_flags(void) { u64 f; asm volatile("pushfq; popq %0" : "=r"(f) : : "memory"); return f; }
static inline void local_irq_disable(void) { asm volatile("cli" : : : "memory"); }
static inline void local_irq_enable(void) { asm volatile("sti" : : : "memory"); }
static inline void restore_flags(u64 f) { if (f & 0x200) local_irq_enable(); }

static inline void list_init(struct list_head *l) { l->next = l->prev = l; }
static inline int list_empty(const struct list_head *l) { return l->next == l; }
static inline void list_add_tail(struct list_head *n, struct list_head *l)
{
	n->next = l;
	n->prev = l->prev;
	l->prev->next = n;
	l->prev = n;
}
static inline void list_del(struct list_head *n)
{
	n->prev->next = n->next;
	n->next->prev = n->prev;
	list_init(n);
}

/* print.c */
void printk(const char *format, ...) __attribute__((format(printf, 1, 2)));
void exit_machine(int code) __attribute__((noreturn));
enum { EXIT_OK, EXIT_BAD, EXIT_STUCK, EXIT_PANIC };
void *memcpy(void *to, const void *from, size_t count);
void *memset(void *to, int byte, size_t count);
int strcmp(const char *a, const char *b);

/* trap.c */
void trap_init(int cpu);
extern u32 boot_info;
extern char ap_trampoline[], ap_trampoline_end[], gdt_high[];
extern u64 gdt[];

/* irq.c */
void apic_init(void);
const char *apic_name(void);
void apic_start_others(void);
void kick_device(void);
int request_irq(irqreturn_t (*handler)(int, void *), void *dev_id);

/* sched.c */
void sched_init(int cpu, struct task_struct *idle, void *stack, const char *comm);
struct task_struct *kthread_create(int (*fn)(void *), void *data, const char *name);
void *new_stack(void);
void schedule(void);
void cpu_idle(void) __attribute__((noreturn));
void wake_up_process(struct task_struct *task);
void sleep_ticks(u64 ticks);
extern u32 need_resched;
extern u64 ap_stack;

/* module.c */
struct module *load_module(const char *file);
#define EXPORT_SYMBOL(name) static const struct export export_##name __attribute__((used, section("__ksymtab"))) = \
	{ &name, #name }
struct export { void *value; const char *name; };

/* The driver's way to the kernel: what it registers, found by vfs_write() and the interrupt. */
void register_chrdev(const struct file_operations *fops);
extern const struct file_operations *chrdev_fops;
#endif
