/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Everything that is not C: the way to 64-bit mode of both CPUs, entries of exceptions, the switch between tasks. */

#include "map.h"

/* ORC rows by hand (the encoding since v6.4): from here on the CFA, or the saved registers, are at rsp + offset. Nothing says
 * more of these few instructions than they do themselves; C has its .debug_frame. */
	.set	ORC_NONE, 0
	.set	ORC_END, 1
	.set	ORC_CALL, 2
	.set	ORC_REGS, 3
	.set	ORC_PARTIAL, 4
.macro ORC type, offset=0
.Lorc_\@:
	.pushsection .orc_unwind_ip, "a"
	.long	.Lorc_\@ - .
	.popsection
	.pushsection .orc_unwind, "a"
	.short	\offset, 0
	.byte	5 /* rsp; rbp unchanged */, \type
	.popsection
.endm

	.section .note.pvh, "a", @note
	.long	4, 8, 18		/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz	"Xen"
	.quad	PHYS(pvh_start)

/* ---- Paging off, flat 32-bit segments. The boot tables map the low 2 GiB at their physical place too. ------------------ */
	.text
	.code32
	.globl	pvh_start
pvh_start:				/* ebx = struct hvm_start_info, physically */
	ORC	ORC_END
	cld
	movl	%ebx, PHYS(boot_info)
	movl	$(boot_cpu - MAP), %esi	/* where to, less the high half */
to_64:	movl	$0x20, %eax		/* PAE */
	movl	%eax, %cr4
	movl	$PHYS(boot_top_pgt), %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	/* EFER: LME */
	rdmsr
	orl	$0x100, %eax
	wrmsr
	lgdt	PHYS(gdt_low)
	movl	$0x80010033, %eax	/* PG WP NE ET MP PE */
	movl	%eax, %cr0
	ljmpl	$KERNEL_CS, $PHYS(1f)
	.code64
1:	movl	$KERNEL_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movq	$MAP, %rax
	addq	%rsi, %rax
	jmp	*%rax

boot_cpu:
	leaq	init_stack + THREAD_SIZE(%rip), %rsp
	xorl	%edi, %edi
	call	start_kernel
other_cpu:
	movq	ap_stack(%rip), %rsp
	call	start_other_cpu

/* Real mode, copied to AP_START. */
	.code16
	.globl	ap_trampoline, ap_trampoline_end
ap_trampoline:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	AP_START + ap_gdt - ap_trampoline
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmpl	$KERNEL_CS32, $PHYS(other_cpu_32)
ap_gdt:	.word	GDT_SIZE - 1
	.long	PHYS(gdt)
ap_trampoline_end:
	.code32
other_cpu_32:
	movl	$KERNEL_DS, %eax
	movl	%eax, %ds
	movl	$(other_cpu - MAP), %esi
	jmp	to_64
	.code64

/* ---- Exceptions and interrupts: struct pt_regs, then a C function with it and the error code or vector --------------- */
.macro SAVE reg
	pushq	%\reg
	.set	pushed, pushed + 8
	ORC	ORC_PARTIAL, pushed
.endm
.macro ENTRY name, error=0, number=0
	.globl	asm_\name
	.type	asm_\name, @function
asm_\name:
	.set	pushed, 0
	.if \error
	.set	pushed, 8
	ORC	ORC_PARTIAL, pushed
	.else
	ORC	ORC_PARTIAL, pushed
	pushq	$\number
	.set	pushed, 8
	ORC	ORC_PARTIAL, pushed
	.endif
	cld
	.irp reg, r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax
	SAVE	\reg
	.endr
	ORC	ORC_REGS
	movq	%rsp, %rdi
	movq	120(%rsp), %rsi
	call	\name
	jmp	error_return
	.size	asm_\name, . - asm_\name
.endm
	ENTRY	exc_divide_error
	ENTRY	exc_invalid_op
	ENTRY	exc_double_fault, error=1
	ENTRY	exc_general_protection, error=1
	ENTRY	exc_page_fault, error=1
	ENTRY	exc_other
	ENTRY	exc_other_with_error, error=1
	ENTRY	sysvec_apic_timer_interrupt
	ENTRY	common_interrupt, number=DEVICE_VECTOR
	ENTRY	spurious_interrupt

	.globl	error_return
	.type	error_return, @function
error_return:
	ORC	ORC_REGS
	.irp reg, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
	popq	%\reg
	.endr
	addq	$8, %rsp
	ORC	ORC_PARTIAL
	iretq
	.size	error_return, . - error_return

/* ---- Tasks -------------------------------------------------------------------------------------------------------- */
	.globl	__switch_to_asm
	.type	__switch_to_asm, @function
__switch_to_asm:			/* rdi = &prev->thread.sp, rsi = next's sp; struct inactive_task_frame */
	ORC	ORC_CALL, 8
	pushq	%r15
	pushq	%r14
	pushq	%r13
	pushq	%r12
	pushq	%rbp
	pushq	%rbx
	ORC	ORC_CALL, 56
	movq	%rsp, (%rdi)
	movq	%rsi, %rsp
	popq	%rbx
	popq	%rbp
	popq	%r12
	popq	%r13
	popq	%r14
	popq	%r15
	ORC	ORC_CALL, 8
	ret
	.size	__switch_to_asm, . - __switch_to_asm

	.globl	ret_from_fork
	.type	ret_from_fork, @function
ret_from_fork:				/* a new thread's first instruction: rbx = function, r12 = its argument */
	ORC	ORC_END
	call	schedule_tail
	movq	%rbx, %rdi
	movq	%r12, %rsi
	call	kthread
	ud2
	.size	ret_from_fork, . - ret_from_fork
	ORC	ORC_NONE

	.data
	.balign	16
	.globl	gdt
gdt:	.quad	0
	.quad	0x00af9b000000ffff	/* KERNEL_CS */
	.quad	0x00cf93000000ffff	/* KERNEL_DS */
	.quad	0x00cf9b000000ffff	/* KERNEL_CS32 */
	.fill	2 * NR_CPUS, 8, 0	/* a TSS each */
	.set	GDT_SIZE, . - gdt
gdt_low:
	.word	GDT_SIZE - 1
	.long	PHYS(gdt)
	.globl	gdt_high, boot_info
gdt_high:
	.word	GDT_SIZE - 1
	.quad	gdt
	.balign	4
boot_info: .long 0

	.balign	4096
boot_top_pgt:				/* the low and the high half */
	.quad	PHYS(level3_low) + 3
	.fill	510, 8, 0
	.quad	PHYS(level3_high) + 3
	.globl	init_top_pgt
init_top_pgt:				/* nothing at 0: a null pointer faults */
	.fill	273, 8, 0
	.quad	PHYS(level3_low) + 3	/* DIRECT_MAP */
	.fill	237, 8, 0
	.quad	PHYS(level3_high) + 3
level3_low:
	.quad	PHYS(level2_low) + 3
	.fill	511, 8, 0
level3_high:
	.fill	510, 8, 0
	.quad	PHYS(level2_kernel) + 3
	.quad	PHYS(level2_modules) + 3
level2_low:				/* 1 GiB */
	.set	at, 0
	.rept	512
	.quad	at + 0x83
	.set	at, at + 0x200000
	.endr
level2_kernel:				/* 8 MiB from TEXT on; the APIC at APIC_MAP */
	.fill	8, 8, 0
	.set	at, IMAGE
	.rept	4
	.quad	at + 0x83
	.set	at, at + 0x200000
	.endr
	.fill	488, 8, 0
	.quad	0xfee00000 + 0x93
	.fill	11, 8, 0
level2_modules:
	.quad	PHYS(module_pgt) + 3	/* MODULES */
	.quad	PHYS(stack_pgt) + 3	/* STACKS */
	.fill	510, 8, 0
	.section .note.GNU-stack, "", @progbits
