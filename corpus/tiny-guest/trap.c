/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Exceptions: the table of gates, and the way from a fault to panic() that Linux's names tell. Every one is fatal. */
#include "tiny.h"

u64 idt_table[512] __attribute__((aligned(16)));
int oops_in_progress;
u64 tainted_mask;

struct tss { /* Intel SDM 3A 8.7; only the stack of double faults is used */
	u32 reserved0;
	u64 rsp[3], reserved1, ist[7], reserved2;
	u16 reserved3, io_map;
} __attribute__((packed));
static struct tss tss[NR_CPUS];
static u64 double_fault_stack[NR_CPUS][512] __attribute__((aligned(16)));

static noinline void die(const char *what, struct pt_regs *regs, u64 error)
{
	oops_begin();
	panic("%s: %lx, ip %lx, task %s", what, error, regs->ip, current->comm);
}

noinline u64 oops_begin(void)
{
	u64 flags = save_flags();
	local_irq_disable();
	oops_in_progress = 1;
	tainted_mask |= 1 << 7; /* Linux's TAINT_DIE */
	return flags;
}

static u64 read_cr2(void)
{
	u64 address;
	asm volatile("mov %%cr2, %0" : "=r"(address));
	return address;
}

static noinline void page_fault_oops(struct pt_regs *regs, u64 error, u64 address)
{
	oops_begin();
	panic("page fault at %lx: %lx, ip %lx, task %s", address, error, regs->ip, current->comm);
}

void exc_page_fault(struct pt_regs *regs, u64 error) { page_fault_oops(regs, error, read_cr2()); }
void exc_general_protection(struct pt_regs *regs, u64 error) { die("general protection fault", regs, error); }
void exc_divide_error(struct pt_regs *regs, u64 error) { die("divide error", regs, error); }
void exc_invalid_op(struct pt_regs *regs, u64 error) { die("invalid opcode", regs, error); }
void exc_other(struct pt_regs *regs, u64 error) { die("exception", regs, error); }
void exc_other_with_error(struct pt_regs *regs, u64 error) { die("exception with error code", regs, error); }

noinline void handle_stack_overflow(struct pt_regs *regs, u64 address)
{
	panic("stack overflow at %lx, ip %lx, task %s", address, regs->ip, current->comm);
}

noinline void exc_double_fault(struct pt_regs *regs, u64 error)
{
	u64 address = read_cr2();
	if ((u64)current->stack - address - 1 < 4096)
		handle_stack_overflow(regs, address);
	die("double fault", regs, error);
}

static void set_gate(int vector, void (*entry)(void), int stack)
{
	u64 at = (u64)entry;
	idt_table[2 * vector] = (at & 0xffff) | KERNEL_CS << 16 | (u64)stack << 32 | 0x8eUL << 40 | (at >> 16 & 0xffff) << 48;
	idt_table[2 * vector + 1] = at >> 32;
}

#define ENTRIES(do)                                                                                                    \
	do(0, exc_divide_error) do(6, exc_invalid_op) do(8, exc_double_fault) do(13, exc_general_protection)           \
	do(14, exc_page_fault) do(TIMER_VECTOR, sysvec_apic_timer_interrupt) do(DEVICE_VECTOR, common_interrupt)       \
	do(SPURIOUS_VECTOR, spurious_interrupt)
#define DECLARE(vector, name) extern void asm_##name(void);
#define SET(vector, name) set_gate(vector, asm_##name, vector == 8);
ENTRIES(DECLARE)
extern void asm_exc_other(void), asm_exc_other_with_error(void);

/* For each CPU; its per-CPU area is in use already. */
void trap_init(int cpu)
{
	struct { u16 limit; u64 base; } __attribute__((packed)) idt = { sizeof(idt_table) - 1, (u64)idt_table };
	u64 base = (u64)&tss[cpu];
	if (cpu == 0) {
		for (int vector = 0; vector < 32; vector++)
			set_gate(vector, 0x60227d00 >> vector & 1 ? asm_exc_other_with_error : asm_exc_other, 0);
		ENTRIES(SET)
	}
	tss[cpu].ist[0] = (u64)(double_fault_stack[cpu] + 512);
	tss[cpu].io_map = sizeof(struct tss);
	gdt[KERNEL_TSS / 8 + 2 * cpu] =
		(sizeof(struct tss) - 1) | (base & 0xffffff) << 16 | 0x89UL << 40 | (base >> 24 & 0xff) << 56;
	gdt[KERNEL_TSS / 8 + 2 * cpu + 1] = base >> 32;
	asm volatile("lgdt (%0)" : : "r"(gdt_high) : "memory");
	asm volatile("ltr %w0" : : "r"(KERNEL_TSS + 16 * cpu));
	asm volatile("lidt %0" : : "m"(idt));
}
