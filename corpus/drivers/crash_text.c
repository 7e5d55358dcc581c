// SPDX-License-Identifier: GPL-2.0-only
/*
 * Damage to what the kernel never writes: a bit of text, a word of read-only data, a gate of the IDT is
 * changed through a writable alias of its page, as a flipped bit in RAM or a stray write would change it.
 * Whoever executes or uses it next crashes. Static keys switched and a function traced are changes that
 * the kernel makes itself: they must stay.
 */
#include <linux/jump_label.h>
#include <linux/kdebug.h>
#include <linux/kprobes.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>
#include <asm/desc.h>
#include <asm/pgtable.h>
#include <asm/trapnr.h>

#include "crash.h"

/* Opcodes of one byte that are invalid in 64-bit mode (Intel SDM 2D, opcode map). */
static const u8 invalid[] = {
	0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0xea,
};

static const u8 endbr[] = { 0xf3, 0x0f, 0x1e, 0xfa };
static const u8 nop5[] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };

/* Writes to a read-only page through another mapping of it. */
static int write_through_alias(void *at, const void *bytes, size_t count)
{
	struct page *page = pfn_to_page(slow_virt_to_phys(at) >> PAGE_SHIFT);
	char *alias;

	if (offset_in_page(at) + count > PAGE_SIZE)
		return -EINVAL;
	alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	memcpy(alias + offset_in_page(at), bytes, count);
	vunmap(alias);
	return 0;
}

static int flip(u8 *at, u8 bits)
{
	u8 byte = *at ^ bits;

	return write_through_alias(at, &byte, 1);
}

static unsigned long (*lookup)(const char *name);

/* Finds kallsyms_lookup_name(), which is not exported, by a kprobe that is never armed. */
static void *symbol(const char *name)
{
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name", .flags = KPROBE_FLAG_DISABLED };

	if (!lookup && !register_kprobe(&probe)) {
		lookup = (void *)probe.addr;
		if (!memcmp(lookup, nop5, sizeof(nop5)) && !memcmp((u8 *)lookup - 4, endbr, 4))
			lookup = (void *)((u8 *)lookup - 4);
		unregister_kprobe(&probe);
	}
	return lookup ? (void *)lookup(name) : NULL;
}

/* The first instruction that the compiler made of a function: behind endbr64 and the ftrace nop. */
static u8 *first_instruction(u8 *function)
{
	if (!memcmp(function, endbr, sizeof(endbr)))
		function += sizeof(endbr);
	if (!memcmp(function, nop5, sizeof(nop5)))
		function += sizeof(nop5);
	return function;
}

/* Changes as few bits of an opcode as will do to make it invalid. */
static int spoil_opcode(u8 *at)
{
	u8 best = invalid[0] ^ *at;
	int i;

	for (i = 1; i < ARRAY_SIZE(invalid); i++)
		if (hweight8(invalid[i] ^ *at) < hweight8(best))
			best = invalid[i] ^ *at;
	return flip(at, best);
}

/* An opcode of getpriority(), which the process calls next. */
static int damage_system_call(void)
{
	u8 *function = symbol("__x64_sys_getpriority");

	return function ? spoil_opcode(first_instruction(function)) : -ENOENT;
}

/* A pointer in a const table of the core kernel, eventfd's write(): it is no longer canonical. */
static int damage_core_table(void)
{
	struct file_operations *table = symbol("eventfd_fops");

	return table ? flip((u8 *)&table->write + 7, 0x80) : -ENOENT;
}

struct steps {
	int (*first)(int level);
	int (*second)(int level);
};

static int raise(int level)
{
	return level + 7;
}

static int lower(int level)
{
	return level - 3;
}

static const struct steps steps = { .first = raise, .second = lower };
/* The compiler must not look through it. */
static const struct steps *volatile chosen = &steps;

static noinline int walk(const struct steps *table, int level)
{
	level = table->first(level);
	return table->second(level) + level; /* CRASH: ops-table */
}

static int damage_table(void)
{
	void *nothing = NULL;

	return write_through_alias((void *)&steps.second, &nothing, sizeof(nothing));
}

static u64 load[4] = { 11, 22, 33, 44 };
extern u8 crash_text_load[];

/* Loads load[2] by an instruction with a displacement of four bytes, whose place is known. */
static noinline u64 displaced(u64 *from)
{
	u64 value;

	asm volatile(".globl crash_text_load\n" /* CRASH: operand-bit */
		     "crash_text_load: .byte 0x48, 0x8b, 0x87, 0x10, 0, 0, 0"
		     : "=a"(value) : "D"(from) : "memory");
	return value;
}

/* The displacement's sign: the load is now from 2 GiB below. */
static int damage_operand(void)
{
	return flip(crash_text_load + 6, 0x80);
}

static noinline int doubled(int value)
{
	return (value ^ READ_ONCE(value)) + 2 * value; /* CRASH: opcode */
}

static int damage_opcode(void)
{
	return spoil_opcode(first_instruction((u8 *)doubled));
}

extern u8 crash_text_earlier[];

/*
 * The first of these two loads is damaged, the second faults: what was read wrong is in use already, and
 * the call can't be taken up again where it stopped.
 */
static noinline u64 chained(u64 **from)
{
	u64 value;

	asm volatile(".globl crash_text_earlier\n" /* CRASH: earlier-instruction */
		     "crash_text_earlier: .byte 0x48, 0x8b, 0x47, 0x08\n\t" /* mov 8(%rdi),%rax */
		     ".byte 0x48, 0x8b, 0x00" /* mov (%rax),%rax */
		     : "=a"(value) : "D"(from) : "memory");
	return value;
}

static u64 *chain[4];

/* Now it loads chain[3], which is NULL: 8 becomes 0x18. */
static int damage_earlier(void)
{
	return flip(crash_text_earlier + 3, 0x10);
}

extern u8 crash_text_ud2[];

/* An exception that somebody asked for: the driver steps over its own undefined instruction. */
static int on_die(struct notifier_block *block, unsigned long event, void *data)
{
	struct die_args *args = data;

	if (event != DIE_TRAP || args->trapnr != X86_TRAP_UD ||
	    args->regs->ip != (unsigned long)crash_text_ud2)
		return NOTIFY_DONE;
	args->regs->ip += 2;
	return NOTIFY_STOP;
}

static struct notifier_block die_block = { .notifier_call = on_die };

static noinline int undefined(int one)
{
	asm volatile("test %0, %0\n\t" /* CRASH: idt-gate */
		     "jz 1f\n"
		     ".globl crash_text_ud2\n"
		     "crash_text_ud2: ud2\n"
		     "1:" : : "r"(one) : "cc", "memory");
	return one;
}

/* The present bit of the gate of the undefined-instruction exception. */
static int damage_gate(void)
{
	struct desc_ptr table;

	store_idt(&table);
	return flip((u8 *)table.address + X86_TRAP_UD * sizeof(gate_desc) + 5, 0x80);
}

static DEFINE_STATIC_KEY_FALSE(key);

/* Text that was changed for a good reason, and a bug in the same function. */
static noinline int keyed(int *value)
{
	if (static_branch_unlikely(&key))
		return *value; /* CRASH: static-key */
	return 0;
}

static int run(const char *name)
{
	int error;

	if (!strcmp(name, "system-call"))
		return damage_system_call();
	if (!strcmp(name, "core-table"))
		return damage_core_table();
	if (!strcmp(name, "ops-table"))
		return damage_table() ?: walk(chosen, 1) == 13 ? 0 : -EBADMSG;
	if (!strcmp(name, "operand-bit"))
		return damage_operand() ?: displaced(load) == 33 ? 0 : -EBADMSG;
	if (!strcmp(name, "opcode"))
		return damage_opcode() ?: doubled(21) == 42 ? 0 : -EBADMSG;
	if (!strcmp(name, "earlier-instruction")) {
		chain[1] = &load[1];
		return damage_earlier() ?: chained(chain) == 22 ? 0 : -EBADMSG;
	}
	if (!strcmp(name, "idt-gate")) {
		register_die_notifier(&die_block);
		error = damage_gate() ?: undefined(1) == 1 ? 0 : -EBADMSG;
		unregister_die_notifier(&die_block);
		return error;
	}
	if (!strcmp(name, "static-key")) {
		static_branch_enable(&key);
		return keyed(NULL);
	}
	return -EINVAL;
}

static ssize_t text_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (!error)
		error = run(name);
	return error < 0 ? error : count;
}

/* Everything that can be damaged here does its work, and what the kernel changed itself is still so. */
static ssize_t text_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = NULL;
	int zero = 0;

	chain[1] = &load[1];
	if (walk(chosen, 1) != 13)
		wrong = "table";
	else if (displaced(load) != 33)
		wrong = "operand";
	else if (doubled(21) != 42)
		wrong = "opcode";
	else if (chained(chain) != 22)
		wrong = "chain";
	else if (static_key_enabled(&key) && keyed(&zero))
		wrong = "key";
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations text_operations = {
	.owner = THIS_MODULE,
	.read = text_read,
	.write = text_write,
};

static struct miscdevice text_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_text",
	.fops = &text_operations,
	.mode = 0666,
};

module_misc_device(text_device);
MODULE_DESCRIPTION("Crash corpus: damaged text, read-only data and IDT");
MODULE_LICENSE("GPL");
