//! The layout of the notes of a core file of a machine: what those who read it and those who write it share.

use guest::Reg;

/// `NT_PRSTATUS`
pub(crate) const PRSTATUS: u32 = 1;
/// Offset of `pr_pid` in `struct elf_prstatus` on x86-64 (Linux uapi, stable ABI).
pub(crate) const PRSTATUS_PID: usize = 32;
/// Offset of `pr_reg`.
pub(crate) const PRSTATUS_REGISTERS: usize = 112;
/// Order of `struct user_regs_struct` (Linux uapi `asm/user_64.h`); `None` = not a register of a vCPU.
pub(crate) const USER_REGISTERS: [Option<Reg>; 23] = [
    Some(Reg::R15),
    Some(Reg::R14),
    Some(Reg::R13),
    Some(Reg::R12),
    Some(Reg::Rbp),
    Some(Reg::Rbx),
    Some(Reg::R11),
    Some(Reg::R10),
    Some(Reg::R9),
    Some(Reg::R8),
    Some(Reg::Rax),
    Some(Reg::Rcx),
    Some(Reg::Rdx),
    Some(Reg::Rsi),
    Some(Reg::Rdi),
    None,
    Some(Reg::Rip),
    Some(Reg::Cs),
    Some(Reg::Rflags),
    Some(Reg::Rsp),
    Some(Reg::Ss),
    Some(Reg::FsBase),
    Some(Reg::GsBase),
];
/// Order of the 64-bit registers in QEMU's own note (`QEMUCPUState` in QEMU's target/i386/arch_dump.c),
/// after version and size (4 bytes each).
pub(crate) const QEMU_GENERAL: [Reg; 18] = [
    Reg::Rax,
    Reg::Rbx,
    Reg::Rcx,
    Reg::Rdx,
    Reg::Rsi,
    Reg::Rdi,
    Reg::Rsp,
    Reg::Rbp,
    Reg::R8,
    Reg::R9,
    Reg::R10,
    Reg::R11,
    Reg::R12,
    Reg::R13,
    Reg::R14,
    Reg::R15,
    Reg::Rip,
    Reg::Rflags,
];
