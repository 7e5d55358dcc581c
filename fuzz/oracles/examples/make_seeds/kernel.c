/* A kernel of nothing but what is read of one, for seeds: structures, one module, text. Layouts are not real. */
typedef unsigned long u64;
typedef unsigned int u32;

struct list_head { struct list_head *next, *prev; };
enum module_state { MODULE_STATE_LIVE, MODULE_STATE_COMING, MODULE_STATE_GOING, MODULE_STATE_UNFORMED };
enum mod_mem_type { MOD_TEXT, MOD_DATA, MOD_INIT_TEXT };
struct module_memory { void *base; u32 size; };
struct mod_arch { u32 num_orcs; int *orc_unwind_ip; struct orc_entry *orc_unwind; };
struct orc_entry {
	short sp_offset, bp_offset;
	unsigned sp_reg : 4, bp_reg : 4, type : 3, signal : 1;
} __attribute__((packed));
struct elf64_sym { u32 name; unsigned char info, other; unsigned short shndx; u64 value, size; };
struct mod_kallsyms { struct elf64_sym *symtab; u32 num_symtab; char *strtab; char *typetab; };
struct attribute { const char *name; unsigned short mode; };
struct bin_attribute { struct attribute attr; u64 size; void *private; };
struct attribute_group { const char *name; struct bin_attribute **bin_attrs; };
struct module_sect_attr { struct bin_attribute battr; u64 address; };
struct module_sect_attrs { struct attribute_group grp; u32 nsections; };
struct module {
	enum module_state state;
	struct list_head list;
	char name[56];
	u64 taints;
	struct mod_kallsyms *kallsyms;
	struct module_sect_attrs *sect_attrs;
	struct module_memory mem[3];
	struct mod_arch arch;
};
struct btf { void *data; u32 data_size; };
struct btf_module { struct list_head list; struct module *module; struct btf *btf; };
struct task_struct { struct { u64 sp; } thread; union { u64 stack_canary; int pid; }; long : 5, bit : 3; };
typedef long ssize_t;
struct file_operations { ssize_t (*write)(struct module *, const char *, u64); };

char linux_banner[] = "Linux version 9.9.9 (seed)\n";
u64 phys_base = -0x1000000ul, page_offset_base = 0xffff888000000000;
u32 nr_cpu_ids = 2;
u64 __per_cpu_offset[2] = { 0xffffffff81002000, 0xffffffff81002100 };
struct { u32 words[9]; } __start_notes = { { 4, 20, 3, 0x554e47, 1, 2, 3, 4, 5 } };
u32 __stop_notes;
u64 idt_table[4] = { 0x81008e0000100000, 0xffffffff };

__attribute__((section(".text"))) ssize_t bw(struct module *m, const char *text, u64 len)
{
	if (m->taints & 1)
		return -(ssize_t)len;
	for (; len; len--)
		m->name[len % 56] = text[len];
	return m->list.next != 0;
}

static struct elf64_sym syms[2] = { { 0 }, { 1, 2, 0, 1, (u64)bw, 64 } };
static char strs[] = "\0bw";
static struct mod_kallsyms kallsyms = { syms, 2, strs, 0 };
static struct module_sect_attr text_attr = { { { ".text", 0400 }, 0, 0 }, (u64)bw };
static struct bin_attribute *attrs[2] = { &text_attr.battr, 0 };
static struct module_sect_attrs sect_attrs = { { "sections", attrs }, 1 };
static int ips[1];
static struct orc_entry orcs[1] = { { 8, 0, 5, 0, 2, 0 } };
extern struct list_head modules;
struct module mod = {
	MODULE_STATE_LIVE, { &modules, &modules }, "m", 0, &kallsyms, &sect_attrs,
	{ { (void *)bw, 256 }, { syms, 64 } }, { 1, ips, orcs },
};
struct list_head modules = { &mod.list, &mod.list };
static struct btf btf = { strs, 4 };
static struct btf_module btf_module;
struct list_head btf_modules = { &btf_module.list, &btf_module.list };
static struct btf_module btf_module = { { &btf_modules, &btf_modules }, &mod, &btf };
struct task_struct init_task = { { 7 }, { 0x1234567890 } };
struct file_operations fops = { bw };
u64 sys_call_table[2] = { (u64)bw, (u64)bw };
