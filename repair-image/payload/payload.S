# Runs in the guest's kernel, from memory the guest does not know: calls the functions listed in the
# mailbox, one after another, and waits at payload_finish for the host. Position-independent. Layout of
# the mailbox: ../src/payload.rs, which also puts this code, the mailbox and the stack into pages.
#
# At entry: rdi = mailbox, rsp = top of the payload's stack (16-byte aligned), IF = 0.
# Registers need not be kept: the host sets all of them afterwards.

        .set    MAGIC_LOW, 0x66696265           # first half of the mailbox's magic number
        .set    COUNT, 0x0c                     # u32: calls wanted
        .set    PREEMPT_COUNT, 0x10             # u64: address of the CPU's preempt count, or 0
        .set    DONE, 0x18                      # u32: calls that came back
        .set    STARTED, 0x1c                   # u32: calls begun
        .set    ENTRIES, 0x40
        .set    FUNCTION, 0x00                  # u64, then six u64 arguments
        .set    ARGUMENTS, 0x08
        .set    RESULT, 0x38                    # u64: rax
        .set    STATUS, 0x40                    # u64: 0 not begun, 1 begun, 2 came back
        .set    ENTRY_SIZE, 0x48

        .text
        .globl  payload_entry, payload_finish
payload_entry:
        endbr64
        cld
        cli
        movq    %rdi, %rbx
        cmpl    $MAGIC_LOW, (%rbx)              # a mailbox that is not one: nothing is called
        jne     payload_finish
        movq    PREEMPT_COUNT(%rbx), %r14
        testq   %r14, %r14
        jz      1f
        incl    (%r14)                          # nothing reschedules while on this stack
1:      xorl    %r12d, %r12d
        leaq    ENTRIES(%rbx), %r13

2:      cmpl    COUNT(%rbx), %r12d
        jae     4f
        incl    %r12d
        movl    %r12d, STARTED(%rbx)
        movq    $1, STATUS(%r13)
        movq    ARGUMENTS+0x00(%r13), %rdi
        movq    ARGUMENTS+0x08(%r13), %rsi
        movq    ARGUMENTS+0x10(%r13), %rdx
        movq    ARGUMENTS+0x18(%r13), %rcx
        movq    ARGUMENTS+0x20(%r13), %r8
        movq    ARGUMENTS+0x28(%r13), %r9
        xorl    %eax, %eax                      # variadic functions: no vector registers used
        xorl    %ebp, %ebp                      # frame-pointer unwinders end here
        leaq    3f(%rip), %r11
        # Called by a return: with indirect-branch tracking, a call through a register must land on an
        # endbr64, and the kernel removes those of functions whose address it never takes.
        pushq   %r11
        pushq   FUNCTION(%r13)
        ret
        int3

3:      endbr64
        cli                                     # the function may have enabled interrupts
        cld
        movq    %rax, RESULT(%r13)
        movq    $2, STATUS(%r13)
        movl    %r12d, DONE(%rbx)
        addq    $ENTRY_SIZE, %r13
        jmp     2b

4:      testq   %r14, %r14
        jz      payload_finish
        decl    (%r14)                          # only the count: no rescheduling from here

payload_finish:
        pause
        jmp     payload_finish

        .section .note.GNU-stack, "", @progbits
