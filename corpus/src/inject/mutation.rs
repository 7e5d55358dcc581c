//! The changes: what programmers' errors look like in machine code, as in published studies of fault injection into
//! drivers (Ng and Chen's and Nooks' fault models), and where in a function each can be made. Nothing is written here.

use std::collections::BTreeSet;

use capstone::arch::BuildsCapstone;
use capstone::prelude::*;

use super::module_file::{Function, ModuleFile};
use crate::{Error, Result};

/// A kind of error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// A condition is the wrong way round.
    InvertBranch,
    /// A condition is not asked.
    DropBranch,
    /// Source and destination are swapped.
    SwapOperands,
    /// A bound is one off.
    OffByOne,
    /// A pointer that is loaded is NULL.
    NullPointer,
    /// A lock is not released.
    SkipUnlock,
    /// Interrupts are not let in again.
    SkipIrqRestore,
    /// A member or a variable is not set.
    SkipStore,
}

impl Operator {
    /// All, in the order in which they are drawn.
    pub const ALL: [Self; 8] = [
        Self::InvertBranch,
        Self::DropBranch,
        Self::SwapOperands,
        Self::OffByOne,
        Self::NullPointer,
        Self::SkipUnlock,
        Self::SkipIrqRestore,
        Self::SkipStore,
    ];

    /// As it is printed.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::InvertBranch => "branch inverted",
            Self::DropBranch => "branch dropped",
            Self::SwapOperands => "operands swapped",
            Self::OffByOne => "bound off by one",
            Self::NullPointer => "pointer NULLed",
            Self::SkipUnlock => "unlock skipped",
            Self::SkipIrqRestore => "interrupts not restored",
            Self::SkipStore => "store skipped",
        }
    }
}

/// One change of one instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// What kind of error it makes.
    pub operator: Operator,
    /// The function.
    pub function: String,
    /// Offset in the module's `.text`, bytes.
    pub offset: u64,
    /// The instruction's bytes.
    pub old: Vec<u8>,
    /// What they become; as many.
    pub new: Vec<u8>,
    /// The instruction as text, and what it calls.
    pub text: String,
}

impl Mutation {
    /// Whether it is in one of these functions.
    pub(crate) fn is_in(&self, functions: &BTreeSet<String>) -> bool {
        functions.contains(&self.function)
    }
}

/// The recommended no-operations by length (Intel SDM, NOP).
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
    &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    &[0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
];

fn nops(mut length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while length > 0 {
        let nop = NOPS.get(length.min(NOPS.len()) - 1).copied().unwrap_or(&[0x90]);
        bytes.extend_from_slice(nop);
        length -= nop.len();
    }
    bytes
}

/// Every change that can be made in a function. `code` is the module's `.text` as it is in the guest, `base` its
/// address.
///
/// # Errors
/// [`Error::Module`] when the code can't be decoded at all.
pub(crate) fn candidates(
    file: &ModuleFile,
    function: &Function,
    code: &[u8],
    base: u64,
) -> Result<Vec<Mutation>> {
    let bad = |error: capstone::Error| Error::Module {
        name: function.name.clone(),
        reason: error.to_string(),
    };
    let engine = Capstone::new().x86().mode(arch::x86::ArchMode::Mode64).build().map_err(bad)?;
    let (from, to) = (function.offset, function.offset + function.size);
    let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
    let bytes = range.and_then(|(from, to)| code.get(from..to)).unwrap_or_default();
    let instructions = engine.disasm_all(bytes, base + from).map_err(bad)?;
    let mut found = Vec::new();
    for instruction in instructions.iter() {
        let offset = instruction.address() - base;
        let old = instruction.bytes();
        let length = old.len() as u64;
        if file.is_patched(offset, length) {
            continue;
        }
        let called = file.called(offset, length);
        // A relocated field belongs to a call or to an address: the operators below know which they change.
        for (operator, new) in changes(old, called, file.is_relocated(offset, length)) {
            let mut text = instruction.to_string();
            if let Some(name) = called {
                text = format!("{text} <{name}>");
            }
            let text = text.split_once(": ").map_or(text.clone(), |(_, text)| text.to_owned());
            let (old, function) = (old.to_vec(), function.name.clone());
            found.push(Mutation { operator, function, offset, old, new, text });
        }
    }
    Ok(found)
}

/// Parts of an instruction without legacy prefixes; those with prefixes are left alone.
struct Parts<'a> {
    /// REX, or 0.
    rex: u8,
    /// Place of the opcode.
    at: usize,
    opcode: u8,
    /// What follows the opcode.
    rest: &'a [u8],
}

fn parts(bytes: &[u8]) -> Option<Parts<'_>> {
    let (rex, at) = match bytes.first()? {
        rex @ 0x40..=0x4f => (*rex, 1),
        _ => (0, 0),
    };
    Some(Parts { rex, at, opcode: *bytes.get(at)?, rest: bytes.get(at + 1..)? })
}

/// What can be made of an instruction; `called` is the symbol that it refers to.
fn changes(old: &[u8], called: Option<&str>, relocated: bool) -> Vec<(Operator, Vec<u8>)> {
    let mut found = Vec::new();
    let Some(Parts { rex, at, opcode, rest }) = parts(old) else { return found };
    let mod_rm = rest.first().copied().unwrap_or(0);
    let in_memory = mod_rm >> 6 != 3;
    let flipped = |place: usize, bits: u8| {
        let mut new = old.to_vec();
        if let Some(byte) = new.get_mut(place) {
            *byte ^= bits;
        }
        new
    };
    match opcode {
        // jcc rel8, and jcc rel32 within the function.
        0x70..=0x7f => {
            found.push((Operator::InvertBranch, flipped(at, 1)));
            found.push((Operator::DropBranch, nops(old.len())));
        }
        0x0f if matches!(rest.first(), Some(0x80..=0x8f)) => {
            found.push((Operator::InvertBranch, flipped(at + 1, 1)));
            found.push((Operator::DropBranch, nops(old.len())));
        }
        // add, sub, cmp, mov: r/m, r <-> r, r/m. Of two registers, mov of one onto itself is no change.
        0x01 | 0x03 | 0x29 | 0x2b | 0x39 | 0x3b | 0x89 | 0x8b if !relocated => {
            found.push((Operator::SwapOperands, flipped(at, 2)));
        }
        // cmp r/m, imm8; cmp r/m, imm32; cmp al, imm8; cmp eax, imm32.
        0x80 | 0x81 | 0x83 if (mod_rm >> 3) & 7 == 7 && !relocated => {
            let size = if opcode == 0x81 { 4 } else { 1 };
            found.extend(off_by_one(old, size).map(|new| (Operator::OffByOne, new)));
        }
        0x3c | 0x3d if !relocated => {
            let size = if opcode == 0x3d { 4 } else { 1 };
            found.extend(off_by_one(old, size).map(|new| (Operator::OffByOne, new)));
        }
        // call rel32.
        0xe8 => found.extend(called.and_then(skipped).map(|it| (it, nops(old.len())))),
        // popf, sti.
        0x9d | 0xfb => found.push((Operator::SkipIrqRestore, nops(old.len()))),
        // mov m, imm.
        0xc6 | 0xc7 if in_memory => found.push((Operator::SkipStore, nops(old.len()))),
        _ => {}
    }
    match opcode {
        0x89 | 0x88 if in_memory => found.push((Operator::SkipStore, nops(old.len()))),
        // mov r64, m: xor r32, r32 clears all 64 bits. Off the stack (rsp, rbp) it is no pointer's load.
        0x8b if rex & 8 != 0 && in_memory && !relocated && mod_rm & 7 != 4 && mod_rm & 7 != 5 => {
            let reg = (mod_rm >> 3) & 7;
            let mut new = Vec::new();
            if rex & 4 != 0 {
                new.push(0x45);
            }
            new.extend([0x31, 0xc0 | reg << 3 | reg]);
            new.extend(nops(old.len().saturating_sub(new.len())));
            found.push((Operator::NullPointer, new));
        }
        _ => {}
    }
    found.retain(|(_, new)| new.len() == old.len() && new != old);
    found
}

/// The immediate at the end, one more; one less where one more would not fit.
fn off_by_one(old: &[u8], size: usize) -> Option<Vec<u8>> {
    let at = old.len().checked_sub(size)?;
    let (head, immediate) = old.split_at(at);
    let mut word = [0; 4];
    word.get_mut(..size)?.copy_from_slice(immediate);
    let value = u32::from_le_bytes(word);
    let greatest = if size == 1 { 0x7f } else { 0x7fff_ffff };
    let changed = if value == greatest { value - 1 } else { value.wrapping_add(1) };
    let mut new = head.to_vec();
    new.extend_from_slice(changed.to_le_bytes().get(..size)?);
    Some(new)
}

/// Which error it is to leave a call out; `None` when it is none of ours.
fn skipped(name: &str) -> Option<Operator> {
    let restores = ["_irqrestore", "_unlock_irq", "_unlock_bh", "local_bh_enable"];
    if restores.iter().any(|end| name.contains(end)) {
        return Some(Operator::SkipIrqRestore);
    }
    let unlocks = ["unlock", "up_write", "up_read", "_release_sock", "release_sock"];
    unlocks.iter().any(|part| name.contains(part)).then_some(Operator::SkipUnlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(old: &[u8], called: Option<&str>) -> Vec<(Operator, Vec<u8>)> {
        changes(old, called, called.is_some())
    }

    #[test]
    fn a_branch_is_inverted_or_dropped() {
        let je = [0x74, 0x05];
        assert_eq!(
            made(&je, None),
            [(Operator::InvertBranch, vec![0x75, 0x05]), (Operator::DropBranch, vec![0x66, 0x90])]
        );
        let jae = [0x0f, 0x83, 1, 2, 3, 4];
        assert_eq!(made(&jae, None)[0].1, [0x0f, 0x82, 1, 2, 3, 4]);
    }

    #[test]
    fn a_pointer_is_loaded_as_null_into_the_same_register() {
        // mov rdi, [rax+8]; mov r12, [rdi+0x10].
        let new = made(&[0x48, 0x8b, 0x78, 8], None);
        assert!(new.contains(&(Operator::NullPointer, vec![0x31, 0xff, 0x66, 0x90])), "{new:?}");
        let new = made(&[0x4c, 0x8b, 0x67, 0x10], None);
        assert!(new.contains(&(Operator::NullPointer, vec![0x45, 0x31, 0xe4, 0x90])), "{new:?}");
    }

    #[test]
    fn a_bound_is_one_off_and_keeps_its_size() {
        let cmp = [0x48, 0x83, 0xf8, 0x7f];
        assert_eq!(made(&cmp, None), [(Operator::OffByOne, vec![0x48, 0x83, 0xf8, 0x7e])]);
        let cmp = [0x3d, 0xff, 0, 0, 0];
        assert_eq!(made(&cmp, None), [(Operator::OffByOne, vec![0x3d, 0, 1, 0, 0])]);
    }

    #[test]
    fn only_calls_that_release_are_left_out() {
        let call = [0xe8, 0, 0, 0, 0];
        let only = |name| made(&call, Some(name)).first().map(|it| it.0);
        assert_eq!(only("mutex_unlock"), Some(Operator::SkipUnlock));
        assert_eq!(only("_raw_spin_unlock_irqrestore"), Some(Operator::SkipIrqRestore));
        assert_eq!(only("kfree"), None);
    }

    #[test]
    fn nothing_changes_its_length() {
        for length in 1..16 {
            assert_eq!(nops(length).len(), length);
        }
        // mov rax, rax has no other way round.
        assert!(made(&[0x48, 0x8b, 0xc0], None).iter().all(|(_, new)| new.len() == 3));
    }
}
