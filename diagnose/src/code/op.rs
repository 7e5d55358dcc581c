//! The small instruction set that the symbolic execution runs on, and the way from capstone to it.
//! Everything that is not modelled becomes a `Clobber` that names what it may change.

use capstone::arch::x86::{X86OpMem, X86Operand, X86OperandType, X86Reg};
use capstone::prelude::*;
use guest::Reg;

use super::instruction::general;

/// Numbers of capstone's instruction ids, to match on.
mod ids {
    use capstone::arch::x86::X86Insn;

    macro_rules! ids {
        ($($name:ident $id:ident),* $(,)?) => {
            $(pub(super) const $name: u32 = X86Insn::$id as u32;)*
        };
    }

    ids! {
        ADD X86_INS_ADD, AND X86_INS_AND, CALL X86_INS_CALL, CLI X86_INS_CLI, CMOVE X86_INS_CMOVE,
        CMOVNE X86_INS_CMOVNE, CMP X86_INS_CMP, DEC X86_INS_DEC, ENDBR64 X86_INS_ENDBR64,
        FNOP X86_INS_FNOP, HLT X86_INS_HLT, INC X86_INS_INC, INT3 X86_INS_INT3, IRET X86_INS_IRET,
        IRETD X86_INS_IRETD, IRETQ X86_INS_IRETQ, JA X86_INS_JA, JAE X86_INS_JAE, JB X86_INS_JB,
        JBE X86_INS_JBE, JE X86_INS_JE, JECXZ X86_INS_JECXZ, JG X86_INS_JG, JGE X86_INS_JGE,
        JL X86_INS_JL, JLE X86_INS_JLE, JMP X86_INS_JMP, JNE X86_INS_JNE, JNO X86_INS_JNO,
        JNP X86_INS_JNP, JNS X86_INS_JNS, JO X86_INS_JO, JP X86_INS_JP, JRCXZ X86_INS_JRCXZ,
        JS X86_INS_JS, LEA X86_INS_LEA, LEAVE X86_INS_LEAVE, LFENCE X86_INS_LFENCE,
        LOOP X86_INS_LOOP, LOOPE X86_INS_LOOPE, LOOPNE X86_INS_LOOPNE, MOV X86_INS_MOV,
        MOVABS X86_INS_MOVABS, MOVSB X86_INS_MOVSB, MOVSQ X86_INS_MOVSQ, MOVSW X86_INS_MOVSW,
        MOVSX X86_INS_MOVSX, MOVSXD X86_INS_MOVSXD, MOVZX X86_INS_MOVZX, NOP X86_INS_NOP,
        NOT X86_INS_NOT, POP X86_INS_POP, POPFQ X86_INS_POPFQ, PUSH X86_INS_PUSH,
        PUSHFQ X86_INS_PUSHFQ, RET X86_INS_RET, RETF X86_INS_RETF, RETFQ X86_INS_RETFQ,
        SETE X86_INS_SETE, SETNE X86_INS_SETNE, STI X86_INS_STI, STOSB X86_INS_STOSB,
        STOSD X86_INS_STOSD, STOSQ X86_INS_STOSQ, STOSW X86_INS_STOSW, SUB X86_INS_SUB,
        SYSEXIT X86_INS_SYSEXIT, SYSRET X86_INS_SYSRET, TEST X86_INS_TEST, UD0 X86_INS_UD0,
        UD1 X86_INS_UD1, UD2 X86_INS_UD2, XOR X86_INS_XOR,
    }
}

/// An address expression, as far as it is modelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// `[reg + disp]`
    Based(Reg, i64),
    /// `[disp]` or `[rip + disp]`, already computed.
    Absolute(u64),
    /// `gs:[disp]` or `gs:[rip + disp]`: offset into the per-CPU area.
    PerCpu(u64),
    /// With an index or another segment.
    Unknown,
}

/// An operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Low `size` bytes of a register.
    Reg(Reg, u8),
    /// Bits 8 to 15 of a register (`ah`).
    High(Reg),
    /// Memory of `size` bytes.
    Mem(Address, u8),
    /// A constant.
    Imm(i64),
    /// Not modelled (vector, segment, control register).
    Other,
}

/// Condition of a conditional jump, as far as facts are drawn from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Relation {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Signed less.
    Lt,
    /// Signed greater or equal.
    Ge,
    /// Signed less or equal.
    Le,
    /// Signed greater.
    Gt,
    /// A condition from which nothing is concluded.
    Any,
}

impl Relation {
    /// What holds when the jump is not taken.
    pub(crate) fn negated(self) -> Self {
        match self {
            Self::Eq => Self::Ne,
            Self::Ne => Self::Eq,
            Self::Lt => Self::Ge,
            Self::Ge => Self::Lt,
            Self::Le => Self::Gt,
            Self::Gt => Self::Le,
            Self::Any => Self::Any,
        }
    }

    /// Whether `left (relation) right` holds.
    pub(crate) fn holds(self, left: i64, right: i64) -> bool {
        match self {
            Self::Eq => left == right,
            Self::Ne => left != right,
            Self::Lt => left < right,
            Self::Ge => left >= right,
            Self::Le => left <= right,
            Self::Gt => left > right,
            Self::Any => true,
        }
    }
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing that matters.
    Nop,
    /// `to = from`; flags stay.
    Move(Place, Place),
    /// `reg = address`, operand size in bytes.
    Lea(Reg, u8, Address),
    /// `to += constant`
    Add(Place, i64),
    /// `to &= constant`
    And(Place, i64),
    /// `reg = 0`
    Zero(Reg),
    /// Push.
    Push(Place),
    /// Pop.
    Pop(Place),
    /// `pushfq`
    PushFlags,
    /// `popfq`
    PopFlags,
    /// `rsp = rbp; pop rbp`
    Leave,
    /// `cli`
    Cli,
    /// `sti`
    Sti,
    /// Flags from `place & mask` compared with 0 (`test`); no mask: the place with itself.
    Test(Place, Option<i64>),
    /// Flags from `place` compared with a constant.
    Compare(Place, i64),
    /// Call; `None`: indirect.
    Call(Option<u64>),
    /// Jump; `None`: indirect.
    Jump(Option<u64>),
    /// Conditional jump.
    Branch(Relation, u64),
    /// `ret`, `iret`, `hlt`, `int3` and what else does not go on.
    Stop,
    /// `ud2`: goes on only if it is a `WARN()`.
    Trap,
    /// Registers (bit = encoding) and one piece of memory change; flags too unless `keeps_flags`.
    Clobber {
        /// Bit set of general-purpose registers.
        regs: u16,
        /// Memory written.
        stores: Option<(Address, u8)>,
        /// Whether the flags stay.
        keeps_flags: bool,
    },
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    /// Length in bytes.
    pub(crate) len: u8,
    /// What it does.
    pub(crate) action: Action,
}

impl Op {
    /// Whether the next instruction may follow.
    pub(crate) fn falls_through(&self) -> bool {
        !matches!(self.action, Action::Jump(_) | Action::Stop)
    }

    /// Target of a direct jump.
    pub(crate) fn jump_target(&self) -> Option<u64> {
        match self.action {
            Action::Jump(target) => target,
            Action::Branch(_, target) => Some(target),
            _ => None,
        }
    }
}

/// Size given to stores of string instructions: the length is in a register.
const STRING_STORE: u8 = u8::MAX;

/// Decodes the first instruction of `bytes`.
pub(crate) fn decode(disassembler: &Capstone, bytes: &[u8], at: u64) -> Option<Op> {
    let mut instructions = disassembler.disasm_iter(bytes, at).ok()?;
    let insn = instructions.next()?;
    let len = u8::try_from(insn.len()).ok()?;
    let detail = disassembler.insn_detail(&insn).ok()?;
    let arch = detail.arch_detail();
    let x86 = arch.x86()?;
    let mut operands = [const { None }; 3];
    for (slot, operand) in operands.iter_mut().zip(x86.operands()) {
        *slot = Some(operand);
    }
    let next = at.wrapping_add(u64::from(len));
    let locked = x86.prefix()[0] != 0;
    let known = modelled(insn.id().0, &operands, next, locked);
    let action = known.unwrap_or_else(|| clobber(insn.id().0, &detail, &operands, next));
    Some(Op { len, action })
}

fn address(memory: &X86OpMem, next: u64) -> Address {
    let disp = memory.disp();
    let base = general(memory.base());
    let base_named = memory.base() != RegId::INVALID_REG;
    if memory.index() != RegId::INVALID_REG || base_named && base.is_none() {
        return Address::Unknown;
    }
    let absolute = match base {
        Some(Reg::Rip) => Some(next.wrapping_add_signed(disp)),
        None => Some(disp.cast_unsigned()),
        Some(_) => None,
    };
    match (u32::from(memory.segment().0), base, absolute) {
        (X86Reg::X86_REG_GS, _, Some(offset)) => Address::PerCpu(offset),
        (X86Reg::X86_REG_GS | X86Reg::X86_REG_FS, ..) => Address::Unknown,
        (_, _, Some(at)) => Address::Absolute(at),
        (_, Some(reg), None) => Address::Based(reg, disp),
        (_, None, None) => Address::Unknown,
    }
}

fn place(operand: &X86Operand, next: u64) -> Place {
    match &operand.op_type {
        X86OperandType::Reg(reg) => match (general(*reg), u32::from(reg.0)) {
            (
                Some(reg),
                X86Reg::X86_REG_AH | X86Reg::X86_REG_BH | X86Reg::X86_REG_CH | X86Reg::X86_REG_DH,
            ) => Place::High(reg),
            (Some(Reg::Rip) | None, _) => Place::Other,
            (Some(reg), _) => Place::Reg(reg, operand.size),
        },
        X86OperandType::Imm(value) => Place::Imm(*value),
        X86OperandType::Mem(memory) => Place::Mem(address(memory, next), operand.size),
        X86OperandType::Invalid => Place::Other,
    }
}

fn relation(id: u32) -> Option<Relation> {
    use ids as I;
    Some(match id {
        I::JE => Relation::Eq,
        I::JNE => Relation::Ne,
        I::JL => Relation::Lt,
        I::JGE => Relation::Ge,
        I::JLE => Relation::Le,
        I::JG => Relation::Gt,
        I::JA
        | I::JAE
        | I::JB
        | I::JBE
        | I::JNO
        | I::JNP
        | I::JNS
        | I::JO
        | I::JP
        | I::JS
        | I::JRCXZ
        | I::JECXZ
        | I::LOOP
        | I::LOOPE
        | I::LOOPNE => Relation::Any,
        _ => return None,
    })
}

/// The instructions that are understood.
fn modelled(
    id: u32,
    operands: &[Option<X86Operand>; 3],
    next: u64,
    locked: bool,
) -> Option<Action> {
    use ids as I;
    let at = |index: usize| operands.get(index)?.as_ref().map(|operand| place(operand, next));
    let target = || match at(0) {
        Some(Place::Imm(target)) => Some(target.cast_unsigned()),
        _ => None,
    };
    if let Some(relation) = relation(id) {
        return Some(Action::Branch(relation, target()?));
    }
    Some(match id {
        I::NOP | I::FNOP | I::ENDBR64 | I::LFENCE => Action::Nop,
        I::MOV | I::MOVABS => match at(0)? {
            Place::Other => return None,
            to => Action::Move(to, at(1)?),
        },
        I::LEA => match (at(0)?, at(1)?) {
            (Place::Reg(reg, size), Place::Mem(address, _)) => Action::Lea(reg, size, address),
            _ => return None,
        },
        I::ADD | I::SUB if !locked => match at(1)? {
            Place::Imm(by) if id == I::ADD => Action::Add(at(0)?, by),
            Place::Imm(by) => Action::Add(at(0)?, by.wrapping_neg()),
            _ => return None,
        },
        I::INC if !locked => Action::Add(at(0)?, 1),
        I::DEC if !locked => Action::Add(at(0)?, -1),
        I::AND if !locked => match at(1)? {
            Place::Imm(mask) => Action::And(at(0)?, mask),
            _ => return None,
        },
        I::XOR => match (at(0)?, at(1)?) {
            (Place::Reg(a, 4 | 8), Place::Reg(b, _)) if a == b => Action::Zero(a),
            _ => return None,
        },
        I::PUSH => Action::Push(at(0)?),
        I::POP => Action::Pop(at(0)?),
        I::PUSHFQ => Action::PushFlags,
        I::POPFQ => Action::PopFlags,
        I::LEAVE => Action::Leave,
        I::CLI => Action::Cli,
        I::STI => Action::Sti,
        I::TEST => match (at(0)?, at(1)?) {
            (a, b) if a == b => Action::Test(a, None),
            (a, Place::Imm(mask)) => Action::Test(a, Some(mask)),
            _ => return None,
        },
        I::CMP => match (at(0)?, at(1)?) {
            (a, Place::Imm(with)) => Action::Compare(a, with),
            _ => return None,
        },
        I::CALL => Action::Call(target()),
        I::JMP => Action::Jump(target()),
        I::UD2 | I::UD1 | I::UD0 => Action::Trap,
        I::RET
        | I::RETF
        | I::RETFQ
        | I::IRET
        | I::IRETD
        | I::IRETQ
        | I::SYSRET
        | I::SYSEXIT
        | I::HLT
        | I::INT3 => Action::Stop,
        _ => return None,
    })
}

/// Anything else: which registers and which memory it writes.
fn clobber(
    id: u32,
    detail: &InsnDetail<'_>,
    operands: &[Option<X86Operand>; 3],
    next: u64,
) -> Action {
    use ids as I;
    let mut regs = 0;
    for reg in detail.regs_write().iter().filter_map(|&reg| general(reg)) {
        if Reg::GENERAL.contains(&reg) {
            regs |= 1 << reg as u8;
        }
    }
    let written = operands.iter().flatten().find(|operand| {
        operand.access.is_some_and(capstone::AccessType::is_writable)
            && matches!(operand.op_type, X86OperandType::Mem(_))
    });
    let string =
        matches!(id, I::STOSB | I::STOSW | I::STOSD | I::STOSQ | I::MOVSB | I::MOVSW | I::MOVSQ);
    let stores = written.and_then(|operand| match place(operand, next) {
        Place::Mem(address, _) if string => Some((address, STRING_STORE)),
        Place::Mem(address, size) => Some((address, size)),
        _ => None,
    });
    // Vector moves and the like do not touch flags either, but only these stand between a test and its
    // jump in compiled code.
    let keeps_flags = matches!(
        id,
        I::MOVZX | I::MOVSX | I::MOVSXD | I::CMOVE | I::CMOVNE | I::SETE | I::SETNE | I::NOT
    );
    Action::Clobber { regs, stores, keeps_flags }
}
