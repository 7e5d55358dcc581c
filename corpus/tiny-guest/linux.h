/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What defib takes for granted about a Linux kernel, and nothing else. The tiny guest is no Linux: it shares no line with
 * it. It has what is declared here, by these names, with these meanings, and that is enough for defib to find it in RAM,
 * diagnose its crashes and repair them. So this file is the list of defib's assumptions; a guest that lacks an entry shows
 * which step needs it. Where an order of members or a number is not assumed, it differs from Linux on purpose.
 *
 * Each entry says who needs it (folder/file of defib). "Optional": without it a step knows less, but works; tried by taking
 * the symbol out of the file that the guard reads.
 */
#ifndef TINY_LINUX_H
#define TINY_LINUX_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long ssize_t; /* A typedef's name counts: quarantine/values.rs tells ssize_t from int in open(). */
typedef unsigned long size_t;
typedef long long loff_t;

/* ---- The image: repair-image/locate.rs, guest_layer.rs, compile/vmlinux.rs ----------------------------------------
 * Physically at a multiple of 2 MiB, mapped within 1 GiB from 0xffffffff80000000 on.
 * The file: ELF with .symtab (with sizes and function types: code/function.rs cuts code by them), a GNU build id, DWARF,
 * .BTF, .orc_unwind_ip and .orc_unwind (both must exist; rows may be few), .debug_frame for what ORC does not tell. */
extern const char linux_banner[]; /* Starts with "Linux version ". */
extern char _text[], _stext[], _etext[];
extern char __start_notes[], __stop_notes[];     /* With the build id. Optional: then any build is believed. */
extern char __start_rodata[], __end_rodata[];    /* Optional: hashes for `image verify`. */
extern u64 phys_base;        /* Physical = virtual - 0xffffffff80000000 + phys_base. May be "negative". */
extern u64 init_top_pgt[512]; /* The kernel's page tables, 4 levels (no __pgtable_l5_enabled). */
extern u64 idt_table[512];   /* 256 gates. Optional: `image verify`. */
extern u64 page_offset_base; /* Optional: one more mark of a boot. */
/* The page directory of the last GiB exists and has three empty entries in a row between 299 and 496: the payload's page
 * table is hung in there (repair-image/payload.rs). Every CR3 shares it. */

/* ---- CPUs: guest_layer.rs, image.rs, diagnose/context.rs -----------------------------------------------------------
 * GS base of a CPU in the kernel == __per_cpu_offset[cpu]; the variable's place == that + the symbol's address (the symbol
 * __per_cpu_start exists and is not 0; with 0, the symbol is an offset). */
extern u64 __per_cpu_offset[];
extern u32 nr_cpu_ids;
extern char __per_cpu_start[], __per_cpu_end[];
#define __percpu __attribute__((section(".data..percpu")))
extern struct task_struct *current_task; /* per CPU; or pcpu_hot.current_task (v6.2 to v6.14) */
extern u32 __preempt_count;              /* per CPU; or pcpu_hot.preempt_count */
extern u64 hardirq_stack_ptr;            /* per CPU. Optional: here interrupts use the task's stack. */

/* Fields of the preempt count are numbers in defib (diagnose/context.rs, quarantine/counts.rs), so they are Linux's. Bit 31
 * is nobody's business; here it stays 0. */
#define PREEMPT_OFFSET 0x1
#define SOFTIRQ_OFFSET 0x100
#define HARDIRQ_OFFSET 0x10000

/* ---- Lists: diagnose/tasks.rs takes `next` to be the first word; repair-image/modules.rs asks for its offset. */
struct list_head {
	struct list_head *next, *prev;
};

/* ---- Tasks: diagnose/task.rs, tasks.rs, context.rs ----------------------------------------------------------------- */
#define THREAD_SIZE 8192
union thread_union { /* Its size is that of a stack. Or symbols init_stack, __end_init_stack. */
	u64 stack[THREAD_SIZE / 8];
};
struct thread_struct {
	u64 cr2; /* something before sp */
	u64 sp;  /* of a task that is switched out: points to struct inactive_task_frame */
};
struct inactive_task_frame { /* what __switch_to_asm() pushes; here another order than Linux's */
	u64 bx, bp, r12, r13, r14, r15, ret_addr;
};
struct signal_struct {
	int nr_threads;
	struct list_head thread_head; /* of task_struct.thread_node */
};
struct mm_struct;
#define PF_IDLE 0x2
#define PF_KTHREAD 0x00200000
#define TASK_RUNNING 0
#define TASK_UNINTERRUPTIBLE 2
#define TASK_DEAD 0x80
struct task_struct {
	char comm[16];
	int pid, tgid;             /* pid 0 is idle, and so is a task with PF_IDLE */
	u32 flags;
	struct mm_struct *mm;      /* null: a kernel thread. Rung 3 (a process ends) needs user mode, which is not here. */
	struct list_head tasks;    /* from init_task on */
	struct list_head thread_node;
	struct signal_struct *signal;
	void *stack;               /* lowest address; a guard page below */
	u32 __state;               /* tasks.rs: bit 1 without bit 10 = uninterruptible */
	u64 stack_canary;          /* Optional: one more mark of a boot. */
	struct thread_struct thread;
	/* Of no interest to defib: */
	struct list_head run_list;
	int on_cpu;
	struct signal_struct own_signal;
};
extern struct task_struct init_task; /* Optional: without it nobody can list the tasks, a repair does not need to. */
struct rq {
	u64 clock, nr_switches;
};
extern struct rq runqueues;               /* per CPU. Optional: probation sees that tasks are switched. */
extern struct task_struct *idle_threads;  /* per CPU. Optional: idle tasks are in no list. */

/* ---- Vital signs of probation.rs. Optional, each. */
extern u64 jiffies_64;      /* no change for 4 s is a bad sign */
extern int oops_in_progress; /* not 0 is one too */
extern u64 tainted_mask;
extern enum system_states { SYSTEM_BOOTING, SYSTEM_RUNNING } system_state; /* src/guard: booted again after a reset */

/* ---- Registers on the stack: diagnose/unwind.rs --------------------------------------------------------------------
 * ORC rows of type REGS lead to it. The last five are the hardware's; a row of type REGS_PARTIAL leads to `ip`. */
struct pt_regs {
	u64 ax, bx, cx, dx, si, di, bp, r8, r9, r10, r11, r12, r13, r14, r15, orig_ax, ip, cs, flags, sp, ss;
};
struct orc_entry { /* `signal` without `end` says: the encoding since v6.4 (repair-image/orc.rs) */
	short sp_offset, bp_offset;
	unsigned sp_reg : 4, bp_reg : 4, type : 3, signal : 1;
} __attribute__((packed));

/* ---- Crashes: where the hooks are (guest/hook), and how the way there is read (diagnose/fault.rs, class.rs, names.rs) ----
 * The frames between hook and fault are skipped up to the first saved registers. The innermost frame named exc_* or
 * asm_exc_* before them tells the class. */
u64 oops_begin(void);                                   /* hook: an exception that nobody can handle */
void panic(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2))); /* hook */
void exc_double_fault(struct pt_regs *regs, u64 error); /* hook; first argument at its entry */
void handle_stack_overflow(struct pt_regs *regs, u64 address) __attribute__((noreturn)); /* hook; the same */
void exc_page_fault(struct pt_regs *regs, u64 error);   /* CR2 is still that of the fault at the hook */
void exc_general_protection(struct pt_regs *regs, u64 error);
void exc_divide_error(struct pt_regs *regs, u64 error);
void exc_invalid_op(struct pt_regs *regs, u64 error);
struct bug_entry { /* diagnose/message.rs; displacements count from their own places */
	u16 line, flags;
	int file_disp, bug_addr_disp;
};
extern struct bug_entry __start___bug_table[], __stop___bug_table[];
#define BUG()                                                                                                          \
	do {                                                                                                           \
		asm volatile("1: ud2\n\t.pushsection __bug_table, \"aw\"\n\t"                                          \
			     ".word %c1, 0\n\t.long %c0 - .\n\t.long 1b - .\n\t.popsection"                            \
			     : : "i"(__FILE__), "i"(__LINE__));                                                        \
		__builtin_unreachable();                                                                               \
	} while (0)
/* A crash while the idle task is interrupted leaves through these two (quarantine/error_return.rs): irqentry_exit() is
 * given saved registers and a state of one byte in a register, and returns to error_return, which pops the registers. */
typedef struct {
	u8 exit_rcu;
} irqentry_state_t;
void irqentry_exit(struct pt_regs *regs, irqentry_state_t state);
extern char error_return[];

/* ---- Interrupts: a frame named asm_sysvec_* or asm_common_interrupt* is hardirq, __do_softirq is softirq; the preempt count
 * must say the same (diagnose/context.rs, offender.rs). Frames beyond were only interrupted. */
void sysvec_apic_timer_interrupt(struct pt_regs *regs, u64 error);
void common_interrupt(struct pt_regs *regs, u64 vector);
void __do_softirq(void);

/* ---- Locks: diagnose/code/locks.rs knows functions by name, effects.rs the words, quarantine/locks.rs how to give back -- */
struct qspinlock {
	u8 pending, locked; /* not 0: held */
	u16 tail;
};
typedef struct raw_spinlock {
	struct qspinlock raw_lock;
} spinlock_t;
void _raw_spin_lock(spinlock_t *lock); /* its own code shows whether preemption is counted */
void _raw_spin_unlock(spinlock_t *lock);
u64 _raw_spin_lock_irqsave(spinlock_t *lock);
void _raw_spin_unlock_irqrestore(spinlock_t *lock, u64 flags);
struct mutex { /* its first 8 bytes (a spinlock's first 4) must still be what they were when the plan was made */
	struct list_head wait_list;
	spinlock_t wait_lock;
	u64 owner; /* task; the low 3 bits are flags */
};
void mutex_lock(struct mutex *lock);
void mutex_unlock(struct mutex *lock); /* is called from fresh memory, on a strange stack, with preemption off */

/* ---- Ways into a driver: quarantine/boundaries.rs knows these callers by name and what each makes of a result ------------- */
struct file;
struct module;
struct file_operations { /* quarantine/entries.rs: a table whose owner is the module */
	ssize_t (*write)(struct file *, const char *, size_t, loff_t *);
	ssize_t (*read)(struct file *, char *, size_t, loff_t *);
	struct module *owner;
};
struct file {
	const struct file_operations *f_op;
	loff_t f_pos;
};
ssize_t vfs_write(struct file *file, const char *data, size_t count, loff_t *pos); /* write fails: -EIO */
ssize_t vfs_read(struct file *file, char *data, size_t count, loff_t *pos);
struct timer_list {
	u64 expires;
	void (*function)(struct timer_list *);
	struct list_head entry;
};
void call_timer_fn(struct timer_list *timer, void (*fn)(struct timer_list *), u64 baseclk); /* nothing is returned */
int mod_timer(struct timer_list *timer, u64 expires);
struct worker;
struct work_struct {
	struct list_head entry;
	void (*func)(struct work_struct *);
};
void process_one_work(struct worker *worker, struct work_struct *work); /* nothing is returned */
int queue_work(struct work_struct *work);
enum irqreturn { IRQ_HANDLED = 1, IRQ_NONE = 0 }; /* the enumerator is looked up by name */
typedef enum irqreturn irqreturn_t;
struct irq_desc;
struct irqaction {
	void *dev_id;
	irqreturn_t (*handler)(int, void *);
};
irqreturn_t __handle_irq_event_percpu(struct irq_desc *desc); /* an interrupt handler: IRQ_HANDLED, interrupts off */
int kthread(int (*fn)(void *), void *data); /* outermost frame of a kernel thread, called by ret_from_fork */
int do_one_initcall(int (*fn)(void));       /* module.init */

/* ---- Modules: repair-image/modules.rs ------------------------------------------------------------------------------- */
enum module_state { MODULE_STATE_UNFORMED, MODULE_STATE_COMING, MODULE_STATE_LIVE, MODULE_STATE_GOING };
enum mod_mem_type { MOD_DATA, MOD_RODATA, MOD_TEXT, MOD_INIT_TEXT, MOD_MEM_NUM_TYPES }; /* since v6.4; by name */
struct module_memory {
	u32 size;
	void *base;
};
struct attribute {
	u16 mode;
	const char *name;
};
struct bin_attribute { /* since v6.14 `private` is the section's address */
	void *private;
	struct attribute attr;
};
struct attribute_group {
	const char *name;
	struct bin_attribute **bin_attrs; /* ends with null */
};
struct module_sect_attrs {
	struct attribute_group grp;
};
struct mod_kallsyms {
	u32 num_symtab;
	struct elf64_sym *symtab; /* values are run-time addresses */
	char *strtab;
};
struct module {
	struct module_memory mem[MOD_MEM_NUM_TYPES];
	char name[32];
	enum module_state state;
	struct list_head list;                /* from `modules` on */
	u64 taints;
	struct module_sect_attrs *sect_attrs; /* Optional: without it no DWARF of the module's file can be placed. */
	struct mod_kallsyms *kallsyms;        /* Optional: names without the file. */
	struct bug_entry *bug_table;
	u32 num_bugs;
	struct {                              /* Optional: unwinding without the module's file. Empty here: it is needed. */
		u32 num_orcs;
		int *orc_unwind_ip;
		struct orc_entry *orc_unwind;
	} arch;
	int (*init)(void);
	int refcnt;                           /* Optional: raised when the driver is quarantined. */
};
extern struct list_head modules;
extern struct module __this_module; /* the module that this code is in */
/* A driver's functions begin with the 5-byte no-operation that Linux keeps for tracing: rung 2 puts its stubs there
 * (quarantine/driver.rs). -mfentry -mnop-mcount makes it. */

#endif
