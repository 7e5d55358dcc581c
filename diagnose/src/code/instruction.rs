//! One instruction for people and for address computation: text, operands, access. Not the form that
//! the symbolic execution runs on: that is `op.rs`.

use std::fmt;

use capstone::arch::x86::{ArchMode, ArchSyntax, X86Operand, X86OperandType, X86Reg};
use capstone::prelude::*;
use guest::{CodeAddress, GuestVirt, Reg, Registers, VirtMemory};

/// Longest x86 instruction, in bytes (Intel SDM 2A 2.3.11).
pub(crate) const MAX_INSTRUCTION: usize = 15;

/// Segment register that a memory operand names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// `fs`: address is relative to [`Reg::FsBase`].
    Fs,
    /// `gs`: address is relative to [`Reg::GsBase`] (the per-CPU base in the kernel).
    Gs,
    /// Another one: base 0 in 64-bit mode.
    Flat,
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOperand {
    /// Base register; [`Reg::Rip`] for instruction-relative operands.
    pub base: Option<Reg>,
    /// Index register.
    pub index: Option<Reg>,
    /// Factor of the index: 1, 2, 4 or 8.
    pub scale: u8,
    /// Displacement, signed bytes.
    pub disp: i64,
    /// Segment, where one is named.
    pub segment: Option<Segment>,
}

impl MemoryOperand {
    /// Guest-virtual address of the operand of an instruction that ends at `next`, with registers as
    /// they are before it; `None` when a register that it needs is not known.
    #[must_use]
    pub fn address(&self, registers: &Registers, next: GuestVirt) -> Option<GuestVirt> {
        let base = match self.base {
            Some(Reg::Rip) => next.0,
            Some(reg) => registers.get(reg)?,
            None => 0,
        };
        let index = match self.index {
            Some(reg) => registers.get(reg)?.wrapping_mul(u64::from(self.scale)),
            None => 0,
        };
        let segment = match self.segment {
            Some(Segment::Fs) => registers.get(Reg::FsBase)?,
            Some(Segment::Gs) => registers.get(Reg::GsBase)?,
            Some(Segment::Flat) | None => 0,
        };
        let sum = base.wrapping_add(index).wrapping_add_signed(self.disp);
        Some(GuestVirt(sum.wrapping_add(segment)))
    }
}

/// What an operand is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OperandKind {
    /// A general-purpose register or a part of one.
    Register {
        /// The 64-bit register.
        reg: Reg,
        /// The name in the instruction: `eax`, `dil`.
        name: String,
    },
    /// A constant, sign-extended; a branch's target is its absolute address.
    Immediate(i64),
    /// Memory.
    Memory(MemoryOperand),
    /// Any other register (vector, control, segment), by name.
    Other(String),
}

/// One operand, in the order of the text (destination first).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operand {
    /// What.
    pub kind: OperandKind,
    /// Size in bytes of the value.
    pub size: u8,
    /// Whether the instruction reads it. `lea` and multi-byte `nop` name memory and access nothing.
    pub read: bool,
    /// Whether the instruction writes it.
    pub write: bool,
}

/// A decoded instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Guest-virtual address.
    pub at: GuestVirt,
    /// Length in bytes.
    pub len: u8,
    /// Mnemonic with prefixes: `rep movsb`.
    pub mnemonic: String,
    /// Text, Intel syntax.
    pub text: String,
    /// Operands.
    pub operands: Vec<Operand>,
}

impl Instruction {
    /// Address of the next instruction.
    #[must_use]
    pub fn next(&self) -> GuestVirt {
        self.at + u64::from(self.len)
    }

    /// The memory operands that are really accessed, with their sizes and whether they are written.
    pub fn accesses(&self) -> impl Iterator<Item = (&Operand, &MemoryOperand)> {
        self.operands.iter().filter(|operand| operand.read || operand.write).filter_map(|operand| {
            match &operand.kind {
                OperandKind::Memory(memory) => Some((operand, memory)),
                _ => None,
            }
        })
    }

    /// Target of a direct call or jump.
    #[must_use]
    pub fn branch_target(&self) -> Option<GuestVirt> {
        let branches = self.mnemonic == "call" || self.mnemonic.starts_with('j');
        match self.operands.first()?.kind {
            OperandKind::Immediate(target) if branches => Some(GuestVirt(target.cast_unsigned())),
            _ => None,
        }
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A disassembler. Not `Send`, so it is made where it is used and not kept.
pub(crate) fn disassembler() -> Option<Capstone> {
    let builder = Capstone::new().x86().mode(ArchMode::Mode64).syntax(ArchSyntax::Intel);
    builder.detail(true).build().ok()
}

/// The general-purpose register (or rip) that a register of capstone is or is a part of.
pub(crate) fn general(reg: RegId) -> Option<Reg> {
    use X86Reg as X;
    let reg = u32::from(reg.0);
    Some(match reg {
        X::X86_REG_RAX | X::X86_REG_EAX | X::X86_REG_AX | X::X86_REG_AL | X::X86_REG_AH => Reg::Rax,
        X::X86_REG_RCX | X::X86_REG_ECX | X::X86_REG_CX | X::X86_REG_CL | X::X86_REG_CH => Reg::Rcx,
        X::X86_REG_RDX | X::X86_REG_EDX | X::X86_REG_DX | X::X86_REG_DL | X::X86_REG_DH => Reg::Rdx,
        X::X86_REG_RBX | X::X86_REG_EBX | X::X86_REG_BX | X::X86_REG_BL | X::X86_REG_BH => Reg::Rbx,
        X::X86_REG_RSP | X::X86_REG_ESP | X::X86_REG_SP | X::X86_REG_SPL => Reg::Rsp,
        X::X86_REG_RBP | X::X86_REG_EBP | X::X86_REG_BP | X::X86_REG_BPL => Reg::Rbp,
        X::X86_REG_RSI | X::X86_REG_ESI | X::X86_REG_SI | X::X86_REG_SIL => Reg::Rsi,
        X::X86_REG_RDI | X::X86_REG_EDI | X::X86_REG_DI | X::X86_REG_DIL => Reg::Rdi,
        X::X86_REG_R8 | X::X86_REG_R8D | X::X86_REG_R8W | X::X86_REG_R8B => Reg::R8,
        X::X86_REG_R9 | X::X86_REG_R9D | X::X86_REG_R9W | X::X86_REG_R9B => Reg::R9,
        X::X86_REG_R10 | X::X86_REG_R10D | X::X86_REG_R10W | X::X86_REG_R10B => Reg::R10,
        X::X86_REG_R11 | X::X86_REG_R11D | X::X86_REG_R11W | X::X86_REG_R11B => Reg::R11,
        X::X86_REG_R12 | X::X86_REG_R12D | X::X86_REG_R12W | X::X86_REG_R12B => Reg::R12,
        X::X86_REG_R13 | X::X86_REG_R13D | X::X86_REG_R13W | X::X86_REG_R13B => Reg::R13,
        X::X86_REG_R14 | X::X86_REG_R14D | X::X86_REG_R14W | X::X86_REG_R14B => Reg::R14,
        X::X86_REG_R15 | X::X86_REG_R15D | X::X86_REG_R15W | X::X86_REG_R15B => Reg::R15,
        X::X86_REG_RIP | X::X86_REG_EIP => Reg::Rip,
        _ => return None,
    })
}

/// Reads up to the longest instruction's bytes; fewer where memory ends at a page boundary.
pub(crate) fn code_bytes(memory: &dyn VirtMemory, at: GuestVirt) -> Vec<u8> {
    let mut bytes = vec![0; MAX_INSTRUCTION];
    if memory.read(at, &mut bytes).is_ok() {
        return bytes;
    }
    let to_page_end = 4096 - (at.0 & 4095) as usize;
    bytes.truncate(to_page_end.min(MAX_INSTRUCTION));
    if memory.read(at, &mut bytes).is_err() {
        bytes.clear();
    }
    bytes
}

/// Decodes the instruction at a guest-virtual address; `None` when it can't be read or is none.
#[must_use]
pub fn instruction_at(memory: &dyn VirtMemory, at: GuestVirt) -> Option<Instruction> {
    let bytes = code_bytes(memory, at);
    let disassembler = disassembler()?;
    let decoded = disassembler.disasm_count(&bytes, at.0, 1).ok()?;
    let insn = decoded.first()?;
    let detail = disassembler.insn_detail(insn).ok()?;
    let mnemonic = insn.mnemonic()?.to_owned();
    let text = match insn.op_str() {
        Some(operands) if !operands.is_empty() => format!("{mnemonic} {operands}"),
        _ => mnemonic.clone(),
    };
    let arch = detail.arch_detail();
    // Capstone says "read" for operands of instructions that only compute an address.
    let touches = mnemonic != "lea" && !mnemonic.starts_with("nop");
    let operands = arch.x86()?.operands().map(|it| operand(&disassembler, &it, touches)).collect();
    Some(Instruction { at, len: u8::try_from(insn.len()).ok()?, mnemonic, text, operands })
}

/// The instruction that a frame is in: at an exact address the one there; at a return address the call
/// before it, found by decoding backwards is ambiguous, so the longest call that ends there is taken.
#[must_use]
pub fn instruction_of(memory: &dyn VirtMemory, pc: CodeAddress) -> Option<Instruction> {
    match pc {
        CodeAddress::Exact(at) => instruction_at(memory, at),
        CodeAddress::Return(end) => call_before(memory, end),
    }
}

/// The call instruction that ends at `end`: direct calls have 5 bytes, indirect ones 2 to 8.
#[must_use]
pub fn call_before(memory: &dyn VirtMemory, end: GuestVirt) -> Option<Instruction> {
    [5, 2, 3, 6, 7, 4, 8].into_iter().find_map(|len| {
        let found = instruction_at(memory, GuestVirt(end.0.wrapping_sub(len)))?;
        (found.mnemonic.ends_with("call") && u64::from(found.len) == len).then_some(found)
    })
}

fn operand(disassembler: &Capstone, it: &X86Operand, touches: bool) -> Operand {
    let name = |reg| disassembler.reg_name(reg).unwrap_or_default();
    let kind = match &it.op_type {
        X86OperandType::Reg(reg) => match general(*reg) {
            Some(known) => OperandKind::Register { reg: known, name: name(*reg) },
            None => OperandKind::Other(name(*reg)),
        },
        X86OperandType::Imm(value) => OperandKind::Immediate(*value),
        X86OperandType::Mem(memory) => {
            let segment = match u32::from(memory.segment().0) {
                X86Reg::X86_REG_INVALID => None,
                X86Reg::X86_REG_FS => Some(Segment::Fs),
                X86Reg::X86_REG_GS => Some(Segment::Gs),
                _ => Some(Segment::Flat),
            };
            OperandKind::Memory(MemoryOperand {
                base: general(memory.base()),
                index: general(memory.index()),
                scale: u8::try_from(memory.scale()).unwrap_or(1),
                disp: memory.disp(),
                segment,
            })
        }
        X86OperandType::Invalid => OperandKind::Other(String::new()),
    };
    let access = it.access.filter(|_| touches || !matches!(kind, OperandKind::Memory(_)));
    let read = access.is_some_and(capstone::AccessType::is_readable);
    let write = access.is_some_and(capstone::AccessType::is_writable);
    Operand { kind, size: it.size, read, write }
}

#[cfg(test)]
mod tests {
    use guest::GuestPhys;
    use guest::fake::{FakeMachine, PageSize};

    use super::*;

    fn decode(bytes: &[u8]) -> Option<Instruction> {
        let mut machine = FakeMachine::new(4 << 20, false);
        machine.map(GuestVirt(0xffff_ffff_8100_0000), GuestPhys(0), PageSize::Size4K);
        machine.poke(GuestPhys(4096 - bytes.len() as u64), bytes);
        let at = GuestVirt(0xffff_ffff_8100_1000 - bytes.len() as u64);
        instruction_at(&machine.space(), at)
    }

    #[test]
    fn a_store_at_the_end_of_mapped_memory() {
        // mov dword ptr [rax+rcx*4+0x10], 7
        let found = decode(&[0xc7, 0x44, 0x88, 0x10, 7, 0, 0, 0]).unwrap();
        assert_eq!(found.to_string(), "mov dword ptr [rax + rcx*4 + 0x10], 7");
        let (operand, memory) = found.accesses().next().unwrap();
        assert!(operand.write && !operand.read && operand.size == 4);
        let regs = Registers::unknown().with(Reg::Rax, 0x1000).with(Reg::Rcx, u64::MAX);
        assert_eq!(memory.address(&regs, found.next()), Some(GuestVirt(0x100c)));
        assert_eq!(memory.address(&Registers::unknown(), found.next()), None);
    }

    #[test]
    fn an_address_computation_accesses_nothing() {
        // lea rdi, [rip+0x10]
        let found = decode(&[0x48, 0x8d, 0x3d, 0x10, 0, 0, 0]).unwrap();
        assert_eq!(found.accesses().count(), 0);
        let OperandKind::Memory(memory) = &found.operands[1].kind else { panic!("{found:?}") };
        assert_eq!(
            memory.address(&Registers::unknown(), found.next()),
            Some(GuestVirt(0xffff_ffff_8100_1010))
        );
    }

    #[test]
    fn per_cpu_operands_add_the_segment_base() {
        // inc dword ptr gs:[0x1fb10]
        let found = decode(&[0x65, 0xff, 0x04, 0x25, 0x10, 0xfb, 0x01, 0x00]).unwrap();
        let (operand, memory) = found.accesses().next().unwrap();
        assert!(operand.read && operand.write);
        let regs = Registers::unknown().with(Reg::GsBase, 0xffff_8880_0000_0000);
        assert_eq!(memory.address(&regs, found.next()), Some(GuestVirt(0xffff_8880_0001_fb10)));
    }

    #[test]
    fn bytes_that_are_no_instruction() {
        assert_eq!(decode(&[0x06]), None);
        assert_eq!(decode(&[]), None);
    }
}
