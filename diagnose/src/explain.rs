//! The faulting instruction in words: what it does, with which values, and what these values usually
//! mean. A value's meaning is said only where its bits leave no other likely reading.

use guest::{GuestVirt, Reg, Registers};

use crate::access::Access;
use crate::code::{Instruction, OperandKind, call_before, instruction_at};
use crate::expression::{self, Expression};
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::message::Bug;
use crate::names::{display, function};
use crate::{CrashClass, Explanation, Frame};

/// Functions up to this size are searched for writes to an argument's register, bytes.
const SEARCHED_MAX: u64 = 256;

/// What an explanation is made of.
pub(crate) struct Facts<'a> {
    pub(crate) class: Option<&'a CrashClass>,
    pub(crate) instruction: Option<&'a Instruction>,
    pub(crate) access: Option<&'a Access>,
    pub(crate) bug: Option<&'a Bug>,
    pub(crate) message: Option<&'a str>,
}

/// Explains the fault, `None` when its frame is not known.
pub(crate) fn of(kernel: &Kernel<'_>, fault: &Fault, facts: &Facts<'_>) -> Option<Explanation> {
    let frame = fault.frames.get(fault.at).filter(|_| fault.found)?;
    let text = facts.instruction.map(ToString::to_string);
    let operands = facts.instruction.map(|it| operands(it, &frame.registers)).unwrap_or_default();
    let expression = expression(kernel, frame, facts);
    Some(Explanation {
        instruction: text.unwrap_or_else(|| "no readable instruction".to_owned()),
        operands,
        accessed: facts.access.and_then(|access| access.at),
        sentence: sentence(kernel, fault, frame, facts, &expression),
        expression: expression.accessed,
    })
}

/// The accessed operand in the words of the source.
fn expression(kernel: &Kernel<'_>, frame: &Frame, facts: &Facts<'_>) -> Expression {
    let operand = facts.access.and_then(|access| access.operand.as_ref()).zip(facts.instruction);
    let named = operand.map(|(operand, instruction)| {
        expression::of_operand(kernel, frame, instruction.at, instruction.next(), operand)
    });
    named.unwrap_or_default()
}

/// Registers that the instruction uses, each once, with the values they had.
fn operands(instruction: &Instruction, registers: &Registers) -> Vec<(String, String)> {
    let mut used: Vec<Reg> = Vec::new();
    for operand in &instruction.operands {
        match &operand.kind {
            OperandKind::Register { reg, .. } if operand.read => used.push(*reg),
            OperandKind::Memory(memory) => {
                used.extend([memory.base, memory.index].iter().flatten())
            }
            _ => {}
        }
    }
    let mut listed = Vec::new();
    for reg in used.into_iter().filter(|&reg| reg != Reg::Rip) {
        let value =
            registers.get(reg).map_or_else(|| "not known".to_owned(), |v| format!("{v:#x}"));
        let entry = (reg.name().to_owned(), value);
        if !listed.contains(&entry) {
            listed.push(entry);
        }
    }
    listed
}

fn sentence(
    kernel: &Kernel<'_>,
    fault: &Fault,
    frame: &Frame,
    facts: &Facts<'_>,
    expression: &Expression,
) -> String {
    let place = display(frame);
    match facts.class {
        Some(CrashClass::Divide) => divide(kernel, frame, facts.instruction),
        Some(CrashClass::StackOverflow) => overflow(fault),
        Some(CrashClass::SoftLockup | CrashClass::HardLockup | CrashClass::RcuStall) => {
            format!("{place} was executing when the detector gave up on it")
        }
        Some(CrashClass::HungTask) => "the hung-task detector panicked".to_owned(),
        Some(CrashClass::Panic) => match facts.message {
            Some(text) => format!("{place} called panic(): {text}"),
            None => format!("{place} called panic()"),
        },
        Some(CrashClass::InvalidOpcode) => {
            format!("{place} executed an invalid instruction that is no BUG()")
        }
        _ => match (facts.bug, facts.access) {
            (Some(bug), _) => format!("{place} hit {}", bug.text()),
            (None, Some(access)) => accessed(kernel, fault, frame, access, expression),
            (None, None) => match facts.instruction {
                Some(instruction) => format!("{place} failed at `{instruction}`"),
                None => format!("{place} failed"),
            },
        },
    }
}

fn accessed(
    kernel: &Kernel<'_>,
    fault: &Fault,
    frame: &Frame,
    access: &Access,
    expression: &Expression,
) -> String {
    let Some(at) = access.at else { return "the accessed address is not known".to_owned() };
    if access.fetch {
        return bad_call(kernel, fault, at);
    }
    let verb = match access.write {
        Some(true) => "writes",
        Some(false) => "reads",
        None => "accesses",
    };
    let size = match access.size {
        Some(1) => " 1 byte".to_owned(),
        Some(size) => format!(" {size} bytes"),
        None => String::new(),
    };
    let mut said = format!("{verb}{size} at {at:#x}");
    if let Some(accessed) = &expression.accessed {
        said += &format!(", `{accessed}`");
    }
    if let Some(cause) = cause(kernel, frame, access, expression) {
        said += &format!(": {cause}");
    } else if let Some(meaning) = meaning(at.0, kernel.image.placement.five_level) {
        let value = format!("{at:#x}, ");
        said += &format!(": that is {}", meaning.strip_prefix(&value).unwrap_or(&meaning));
    }
    said
}

/// The registers of the operand, by the pointers they hold where these are known, with what their values mean.
fn cause(
    kernel: &Kernel<'_>,
    frame: &Frame,
    access: &Access,
    expression: &Expression,
) -> Option<String> {
    let operand = access.operand?;
    let five_level = kernel.image.placement.five_level;
    let mut said = Vec::new();
    for reg in [operand.base, operand.index].into_iter().flatten().filter(|&reg| reg != Reg::Rip) {
        let value = frame.registers.get(reg)?;
        let mut one = match &expression.pointer {
            Some((own, pointer)) if *own == reg => format!("`{pointer}`"),
            _ => reg.name().to_owned(),
        };
        if let Some(argument) = argument(kernel, frame, reg) {
            one += &match &expression.pointer {
                Some((own, pointer)) if *own == reg && *pointer == argument => {
                    format!(" (argument of {})", function(frame))
                }
                _ => format!(" (argument {argument} of {})", function(frame)),
            };
        }
        match meaning(value, five_level) {
            Some(meaning) => one += &format!(" is {meaning}"),
            None => one += &format!(" is {value:#x}"),
        }
        said.push(one);
    }
    (!said.is_empty()).then(|| said.join(", "))
}

/// What a pointer of this value most likely is. Values of include/linux/poison.h with the x86-64 offset
/// CONFIG_ILLEGAL_POINTER_VALUE, and of include/linux/err.h.
fn meaning(value: u64, five_level: bool) -> Option<String> {
    const MAX_ERRNO: u64 = 4095;
    Some(match value {
        0 => "NULL".to_owned(),
        0xdead_0000_0000_0100 => "LIST_POISON1: a list entry that was removed before".to_owned(),
        0xdead_0000_0000_0122 => "LIST_POISON2: a list entry that was removed before".to_owned(),
        0x6b6b_6b6b_6b6b_6b6b | 0xa56b_6b6b_6b6b_6b6b => {
            "slab poison: the object was freed".to_owned()
        }
        0x5a5a_5a5a_5a5a_5a5a => "slab poison: the object was never initialised".to_owned(),
        _ if value >= 0_u64.wrapping_sub(MAX_ERRNO) => {
            format!("an error pointer ({})", value as i64)
        }
        _ if value < 4096 => format!("{value:#x}, NULL plus an offset"),
        _ if value >> 32 == 0x6b6b_6b6b => {
            format!("{value:#x}, slab poison plus an offset: the object was freed")
        }
        _ if value >> 32 == 0xdead_0000 => format!("{value:#x}, list poison plus an offset"),
        _ if !GuestVirt(value).is_canonical(five_level) => {
            format!("{value:#x}, no canonical address")
        }
        _ => return None,
    })
}

/// Name of the parameter that a register still holds: at the function's first instruction, or when no
/// instruction of a small function writes it.
fn argument(kernel: &Kernel<'_>, frame: &Frame, reg: Reg) -> Option<String> {
    let index = Reg::ARGUMENTS.iter().position(|&argument| argument == reg)?;
    let start = frame.function_start?;
    let at = frame.pc.lookup();
    if at != start && written_in_function(kernel, start, reg)? {
        return None;
    }
    let prototype = kernel.image.prototype_at(at)?;
    let name = &prototype.parameters.get(index)?.name;
    (!name.is_empty()).then(|| name.clone())
}

/// Whether an instruction of the function may change `reg`; `None` when that can't be told.
fn written_in_function(kernel: &Kernel<'_>, start: GuestVirt, reg: Reg) -> Option<bool> {
    // String instructions move rsi, rdi and rcx, calls and multiplications change what they like:
    // none of these is an operand.
    const IMPLICIT: [&str; 9] =
        ["call", "movs", "stos", "lods", "cmps", "scas", "mul", "div", "cpuid"];
    let size = kernel.image.locate(start)?.symbol.size;
    if size > SEARCHED_MAX {
        return None;
    }
    let end = start.checked_add(size)?;
    let mut at = start;
    while at < end {
        let instruction = instruction_at(kernel.memory, at)?;
        let implicit = IMPLICIT.iter().any(|name| instruction.mnemonic.contains(name));
        let writes = instruction.operands.iter().any(|operand| {
            operand.write
                && matches!(&operand.kind, OperandKind::Register { reg: other, .. } if *other == reg)
        });
        if implicit || writes {
            return Some(true);
        }
        at = instruction.next();
    }
    Some(false)
}

fn bad_call(kernel: &Kernel<'_>, fault: &Fault, at: GuestVirt) -> String {
    let target = meaning(at.0, kernel.image.placement.five_level)
        .unwrap_or_else(|| format!("{at:#x}, which is no code"));
    let caller = fault.at.checked_add(1).and_then(|index| fault.frames.get(index));
    let Some(caller) = caller else { return format!("executes {target}") };
    match call_before(kernel.memory, caller.pc.ip()) {
        Some(call) => {
            let place = display(caller);
            match pointer_called(kernel, caller, &call) {
                Some(pointer) => format!("{place} calls {target}, by `{pointer}`"),
                None => format!("{place} calls {target}, by {}", named(kernel, &call)),
            }
        }
        None => format!("{} calls {target}", display(caller)),
    }
}

/// The function pointer of an indirect call.
fn pointer_called(kernel: &Kernel<'_>, caller: &Frame, call: &Instruction) -> Option<String> {
    match &call.operands.first()?.kind {
        OperandKind::Register { reg, .. } => expression::of_register(kernel, caller, call.at, *reg),
        OperandKind::Memory(memory) => {
            let next = call.next();
            expression::of_operand(kernel, caller, call.at, next, memory).accessed
        }
        _ => None,
    }
}

/// A call with the name of its target instead of the address.
fn named(kernel: &Kernel<'_>, call: &Instruction) -> String {
    let target = call.branch_target().and_then(|at| kernel.image.locate(at));
    match target.filter(|found| found.offset == 0) {
        // The thunks of all registers share one more name, so that the register can't be told from it.
        Some(found) if found.symbol.name.starts_with("__x86_indirect_") => {
            "an indirect call".to_owned()
        }
        Some(found) => format!("`{} {}`", call.mnemonic, found.symbol.name),
        None => format!("`{call}`"),
    }
}

fn divide(kernel: &Kernel<'_>, frame: &Frame, instruction: Option<&Instruction>) -> String {
    let divisor = instruction.and_then(|it| it.operands.first().map(|operand| (it, operand)));
    let value = divisor.and_then(|(it, operand)| match &operand.kind {
        OperandKind::Register { reg, .. } => frame.registers.get(*reg),
        OperandKind::Memory(memory) => {
            let at = memory.address(&frame.registers, it.next())?;
            kernel.memory.read_uint(at, u64::from(operand.size)).ok()
        }
        _ => None,
    });
    let bits = divisor.map_or(64, |(_, operand)| u32::from(operand.size).saturating_mul(8).min(64));
    let value = value.map(|value| value << (64 - bits.max(8)) >> (64 - bits.max(8)));
    match value {
        Some(0) => "divides by zero".to_owned(),
        Some(value) => format!("divides by {value:#x}, and the quotient does not fit"),
        None => "divides by zero, or the quotient does not fit".to_owned(),
    }
}

/// The function that fills the stack.
fn overflow(fault: &Fault) -> String {
    let frames = fault.frames.get(fault.at..).unwrap_or_default();
    let mut counts: Vec<(String, usize)> = Vec::new();
    for name in frames.iter().map(display) {
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    match counts.into_iter().max_by_key(|(_, count)| *count) {
        Some((name, count)) if count > 3 => {
            format!("the kernel stack is used up: {count} of {} frames are {name}", frames.len())
        }
        _ => format!("the kernel stack is used up by {} frames", frames.len()),
    }
}

#[cfg(test)]
mod tests {
    use guest::CodeAddress;

    use super::*;
    use crate::UnwindEnd;
    use crate::access::Mapped;
    use crate::testing::{Guest, MODULE, fault, frame, saved};

    #[test]
    fn values_that_tell_their_story() {
        let said = |value| meaning(value, false).unwrap_or_default();
        assert_eq!(said(0), "NULL");
        assert!(said(8).starts_with("0x8, NULL plus"));
        assert!(said((-5_i64) as u64).contains("error pointer (-5)"));
        assert!(said(0xdead_0000_0000_0122).contains("LIST_POISON2"));
        assert!(said(0x6b6b_6b6b_6b6b_6b6b).contains("freed"));
        assert_eq!(meaning(0xffff_8880_0000_0000, false), None);
        assert!(said(0x0001_0000_0000_0000).contains("no canonical"));
    }

    #[test]
    fn a_pointer_of_the_source_stands_for_its_register() {
        let mut guest = Guest::new()
            .function("f", MODULE, 8)
            .pointer("g", "gauge", Reg::Rdi, MODULE..MODULE + 8)
            .types(|types| {
                let types = types.with("calibration", "gain", 4, 4);
                types.pointer("gauge", "calibration", 8, "calibration")
            });
        // mov rax, [rdi+8]; mov eax, [rax+4]; ret
        guest.poke(MODULE, &[0x48, 0x8b, 0x47, 8, 0x8b, 0x40, 4, 0xc3]);
        let registers = Registers::unknown().with(Reg::Rax, 0);
        let mut at_fault = saved(frame("f", Some("m")));
        at_fault.pc = CodeAddress::Exact(GuestVirt(MODULE + 4));
        at_fault.registers = registers;
        let fault = fault(vec![at_fault], 0, UnwindEnd::Outermost);
        let image = guest.image();
        let space = guest.machine.space();
        let kernel = Kernel::new(&image, &space, &registers);
        let instruction = instruction_at(kernel.memory, GuestVirt(MODULE + 4)).unwrap();
        let access = Access {
            at: Some(GuestVirt(4)),
            fetch: false,
            write: Some(false),
            size: Some(4),
            operand: instruction.accesses().next().map(|(_, memory)| *memory),
            mapped: Mapped::No,
        };
        let facts = Facts {
            class: Some(&CrashClass::NullDereference),
            instruction: Some(&instruction),
            access: Some(&access),
            bug: None,
            message: None,
        };
        let said = of(&kernel, &fault, &facts).unwrap();
        assert_eq!(said.expression.as_deref(), Some("g->calibration->gain"));
        assert_eq!(
            said.sentence,
            "reads 4 bytes at 0x4, `g->calibration->gain`: `g->calibration` is NULL"
        );
    }

    #[test]
    fn recursion_is_named() {
        let mut frames = vec![frame("printk", None)];
        frames.extend((0..9).map(|_| frame("deeper", Some("m"))));
        let said = overflow(&fault(frames, 0, UnwindEnd::Outermost));
        assert_eq!(said, "the kernel stack is used up: 9 of 10 frames are deeper [m]");
    }
}
