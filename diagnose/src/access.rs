//! Which address the faulting instruction accessed, how, and what the page tables say of it. The
//! replacement for the error code, which the entry code does not keep.

use guest::{GuestVirt, Mapping, MemoryError, Reg, Registers};

use crate::Frame;
use crate::code::{Instruction, MemoryOperand};
use crate::fault::Fault;
use crate::kernel::Kernel;

/// Longest x86 instruction, bytes (Intel SDM 2A 2.3.11).
const INSTRUCTION_MAX: u64 = 15;
/// `rep` string instructions fault on the element that they are at, whatever its size.
const WORD: u8 = 8;

/// What page tables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    /// There is a page.
    Yes(Mapping),
    /// There is none.
    No,
    /// The tables could not be walked.
    Unknown,
}

/// An access of the faulting instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// Guest-virtual address, `None` when a register that it needs is not known.
    pub(crate) at: Option<GuestVirt>,
    /// Whether it was the fetch of the instruction itself.
    pub(crate) fetch: bool,
    /// Whether it wrote, `None` when not determined.
    pub(crate) write: Option<bool>,
    /// Bytes, where known.
    pub(crate) size: Option<u8>,
    /// The operand that made it, where it is written in the instruction.
    pub(crate) operand: Option<MemoryOperand>,
    /// What is mapped there now.
    pub(crate) mapped: Mapped,
}

impl Access {
    fn of_address(kernel: &Kernel<'_>, at: GuestVirt) -> Self {
        let mapped = mapped(kernel, at);
        Self { at: Some(at), fetch: false, write: None, size: None, operand: None, mapped }
    }
}

/// The access that faulted: of a page fault by CR2, where it agrees with the instruction; of a general
/// protection fault the one that is not canonical; of a double fault the one that is not mapped. `None` when the exception is of neither kind.
pub(crate) fn of(
    kernel: &Kernel<'_>,
    fault: &Fault,
    registers: &Registers,
    instruction: Option<&Instruction>,
    evidence: &mut Vec<String>,
) -> Option<Access> {
    let frame = fault.frames.get(fault.at)?;
    let computed = computed(kernel, frame, instruction);
    match fault.exception.as_deref()? {
        "exc_page_fault" => {
            let cr2 = registers.get(Reg::Cr2).map(GuestVirt);
            Some(of_page_fault(kernel, frame, cr2, instruction, &computed, evidence))
        }
        "exc_general_protection" => {
            let five_level = kernel.image.placement.five_level;
            computed
                .into_iter()
                .find(|access| access.at.is_some_and(|at| !at.is_canonical(five_level)))
        }
        // CR2 is of the frame that the processor could not push.
        "exc_double_fault" => computed.into_iter().find(|access| access.mapped == Mapped::No),
        _ => None,
    }
}

fn of_page_fault(
    kernel: &Kernel<'_>,
    frame: &Frame,
    cr2: Option<GuestVirt>,
    instruction: Option<&Instruction>,
    computed: &[Access],
    evidence: &mut Vec<String>,
) -> Access {
    let ip = frame.pc.ip();
    // An instruction may begin on a mapped page and end on one that is not.
    let fetch = |at: GuestVirt| instruction.is_none() && at - ip < INSTRUCTION_MAX || at == ip;
    if let Some(cr2) = cr2.filter(|&cr2| fetch(cr2)) {
        return Access { fetch: true, write: Some(false), ..Access::of_address(kernel, cr2) };
    }
    let unmapped = computed.iter().find(|access| access.mapped == Mapped::No);
    let Some(cr2) = cr2 else {
        let unknown =
            Access { mapped: Mapped::Unknown, at: None, ..Access::of_address(kernel, ip) };
        return unmapped.or(computed.first()).copied().unwrap_or(unknown);
    };
    if let Some(agreeing) = computed.iter().find(|access| covers(access, cr2)) {
        return Access { at: Some(cr2), ..*agreeing };
    }
    match unmapped {
        // Interrupts may be on from exc_page_fault() to the hook; a fault that was handled meanwhile
        // leaves its own CR2 behind.
        Some(access) => {
            evidence.push(format!(
                "CR2 ({cr2:#x}) is of a later fault: the instruction does not access it"
            ));
            *access
        }
        None => Access::of_address(kernel, cr2),
    }
}

fn covers(access: &Access, at: GuestVirt) -> bool {
    let size = u64::from(access.size.unwrap_or(WORD));
    access.at.is_some_and(|start| at - start < size.max(1))
}

/// The accesses that the instruction makes with the registers of its frame, in its own order.
fn computed(kernel: &Kernel<'_>, frame: &Frame, instruction: Option<&Instruction>) -> Vec<Access> {
    let Some(instruction) = instruction else { return Vec::new() };
    let written = instruction.accesses().filter_map(|(operand, memory)| {
        let at = memory.address(&frame.registers, instruction.next())?;
        Some(Access {
            write: Some(operand.write),
            size: Some(operand.size),
            operand: Some(*memory),
            ..Access::of_address(kernel, at)
        })
    });
    written.chain(on_stack(kernel, frame, instruction)).collect()
}

/// The access to the stack that push, pop, call and ret make without an operand for it.
fn on_stack(kernel: &Kernel<'_>, frame: &Frame, instruction: &Instruction) -> Option<Access> {
    let rsp = frame.registers.rsp()?;
    let (at, write) = match instruction.mnemonic.as_str() {
        "push" | "call" | "pushfq" => (rsp.offset(-8), true),
        "pop" | "ret" | "popfq" => (rsp, false),
        _ => return None,
    };
    Some(Access { write: Some(write), size: Some(8), ..Access::of_address(kernel, at) })
}

fn mapped(kernel: &Kernel<'_>, at: GuestVirt) -> Mapped {
    match kernel.space_of(at).map(|space| space.walk(at)) {
        Some(Ok(mapping)) => Mapped::Yes(mapping),
        Some(Err(MemoryError::NotMapped { .. } | MemoryError::NotCanonical { .. })) => Mapped::No,
        Some(Err(_)) | None => Mapped::Unknown,
    }
}
