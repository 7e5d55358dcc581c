/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Where things are in memory: shared by C and assembly. */
#define MAP 0xffffffff80000000
#define TEXT 0xffffffff81000000
#define IMAGE 0x200000
#define PHYS(x) ((x) - (TEXT - IMAGE))
#define DIRECT_MAP 0xffff888000000000
#define APIC_MAP 0xffffffffbe800000
#define MODULES 0xffffffffc0000000
#define STACKS 0xffffffffc0200000
#define AP_START 0x8000
#define NR_CPUS 2
#define KERNEL_CS 8
#define KERNEL_DS 16
#define KERNEL_CS32 24
#define KERNEL_TSS 32
#define TIMER_VECTOR 0xec
#define DEVICE_VECTOR 0x41
#define SPURIOUS_VECTOR 0xff
#ifdef __ASSEMBLER__
#define THREAD_SIZE 8192
#endif
