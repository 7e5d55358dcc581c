/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* The loader of modules: a relocatable ELF file is laid out in the module area, relocated, entered in the list. There is
 * room for one. */
#include "tiny.h"

struct elf_header { u8 ident[16]; u16 type, machine; u32 version; u64 entry, phoff, shoff; u32 flags; u16 ehsize, phentsize,
		    phnum, shentsize, shnum, shstrndx; };
struct elf_section { u32 name, type; u64 flags, addr, offset, size; u32 link, info; u64 addralign, entsize; };
struct elf64_sym { u32 name; u8 info, other; u16 shndx; u64 value, size; };
struct elf_rela { u64 offset; u32 type, symbol; long addend; };
enum { SHT_SYMTAB = 2, SHT_STRTAB, SHT_RELA, SHT_NOBITS = 8, SHF_WRITE = 1, SHF_ALLOC = 2, SHF_EXEC = 4 };
enum { R_64 = 1, R_PC32, R_PLT32 = 4, R_32 = 10, R_32S };

#define PAGES 16
#define SECTIONS 24
struct list_head modules = { &modules, &modules };
struct module __this_module;
EXPORT_SYMBOL(__this_module);
u64 module_pgt[512] __attribute__((aligned(4096)));
static char module_pages[PAGES * 4096] __attribute__((aligned(4096)));
static struct module_sect_attrs attrs;
static struct bin_attribute section_attr[SECTIONS], *section_list[SECTIONS + 1];
static struct mod_kallsyms kallsyms;
extern const struct export __start___ksymtab[], __stop___ksymtab[];
static u64 placed[64];

static u64 exported(const char *name)
{
	for (const struct export *e = __start___ksymtab; e < __stop___ksymtab; e++)
		if (!strcmp(e->name, name))
			return (u64)e->value;
	panic("module: no symbol %s", name);
}

static int kind_of(u64 flags)
{
	return flags & SHF_EXEC ? MOD_TEXT : flags & SHF_WRITE ? MOD_DATA : MOD_RODATA;
}

/* Places and copies the sections of one kind, in pages of their own; returns where the next may begin. */
static u64 lay_out(const char *file, const struct elf_section *sections, int count, const char *names, int kind, u64 at)
{
	static int listed;
	u64 start = at;
	for (int i = 1; i < count; i++) {
		const struct elf_section *s = &sections[i];
		if (!(s->flags & SHF_ALLOC) || !s->size || kind_of(s->flags) != kind)
			continue;
		at = (at + s->addralign - 1) & -s->addralign;
		placed[i] = at;
		if (s->type != SHT_NOBITS)
			memcpy((void *)at, file + s->offset, s->size);
		at += s->size;
		if (!strcmp(names + s->name, "__bug_table")) {
			__this_module.bug_table = (void *)placed[i];
			__this_module.num_bugs = s->size / sizeof(struct bug_entry);
		}
		if (listed < SECTIONS) {
			section_attr[listed] = (struct bin_attribute){ (void *)placed[i], { 0400, names + s->name } };
			section_list[listed] = &section_attr[listed];
			listed++;
		}
	}
	__this_module.mem[kind] = (struct module_memory){ (u32)(at - start), (void *)start };
	return (at + 4095) & -4096UL;
}

static void relocate(const struct elf_section *s, const struct elf_rela *rela, const struct elf64_sym *symbols)
{
	for (u64 i = 0; i < s->size / sizeof(*rela); i++, rela++) {
		char *at = (char *)placed[s->info] + rela->offset;
		u64 value = symbols[rela->symbol].value + rela->addend;
		if (rela->type == R_64)
			*(u64 *)at = value;
		else if (rela->type == R_32 || rela->type == R_32S)
			*(u32 *)at = value;
		else if (rela->type == R_PC32 || rela->type == R_PLT32)
			*(u32 *)at = value - (u64)at;
		else
			panic("module: relocation %u", rela->type);
	}
}

/* Values of a module's symbols become addresses; those it lacks are the kernel's. */
static void resolve(struct elf64_sym *symbols, u64 count, const char *names)
{
	for (u64 i = 1; i < count; i++) {
		if (symbols[i].shndx == 0)
			symbols[i].value = exported(names + symbols[i].name);
		else if (symbols[i].shndx < 64)
			symbols[i].value += placed[symbols[i].shndx];
		if (!strcmp(names + symbols[i].name, "init_module"))
			__this_module.init = (void *)symbols[i].value;
	}
}

/* `file` stays where it is: the symbol table and names are used in place. */
struct module *load_module(const char *file)
{
	const struct elf_header *header = (const void *)file;
	const struct elf_section *sections = (const void *)(file + header->shoff);
	const char *names = file + sections[header->shstrndx].offset;
	struct module *module = &__this_module;
	u64 at = MODULES;
	for (int i = 0; i < PAGES; i++)
		module_pgt[i] = PHYS((u64)module_pages + 4096 * i) | 3;
	for (int kind = MOD_DATA; kind <= MOD_TEXT; kind++)
		at = lay_out(file, sections, header->shnum, names, kind, at);
	for (int i = 1; i < header->shnum; i++) {
		const struct elf_section *s = &sections[i];
		if (s->type == SHT_SYMTAB) {
			kallsyms = (struct mod_kallsyms){ s->size / sizeof(struct elf64_sym), (void *)(file + s->offset),
							  (void *)(file + sections[s->link].offset) };
			resolve(kallsyms.symtab, kallsyms.num_symtab, kallsyms.strtab);
		}
		if (!strcmp(names + s->name, ".modinfo")) /* begins with name= */
			for (int k = 0; k < 31 && (module->name[k] = file[s->offset + 5 + k]); k++)
				;
	}
	for (int i = 1; i < header->shnum; i++)
		if (sections[i].type == SHT_RELA && placed[sections[i].info])
			relocate(&sections[i], (const void *)(file + sections[i].offset), kallsyms.symtab);
	attrs.grp.bin_attrs = section_list;
	module->sect_attrs = &attrs;
	module->kallsyms = &kallsyms;
	module->state = MODULE_STATE_LIVE;
	module->refcnt = 1;
	list_add_tail(&module->list, &modules);
	return module;
}
