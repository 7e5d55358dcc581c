//! What a variable holds in one frame: its DWARF expression, evaluated against the frame's registers and memory. What
//! can't be known gives the reason, never a guess. Evaluation is bounded.

use gimli::{
    AttributeValue, EvaluationResult, Expression, Location, Operation, Piece, Unit, UnitOffset,
    Value, ValueType,
};
use guest::{GuestVirt, Reg, Registers, VirtMemory};

use super::function::{FrameVariable, MAX_ORIGINS, Place};
use super::type_name::ValueKind;
use crate::cfi;
use crate::compile::Slice;
use crate::compile::units::Units;
use crate::compile::variables::{FrameBase, single};

/// Operations of one expression at most; compilers write some ten.
const MAX_OPERATIONS: u32 = 256;
/// Bytes of a value at most.
const MAX_SIZE: u64 = 8;
/// Parts of a structure at most.
const MAX_PARTS: usize = 16;

/// One frame.
#[derive(Clone, Copy)]
pub struct FrameState<'a> {
    /// Its registers, as far as known.
    pub registers: &'a Registers,
    /// Value of rsp before the call that made it.
    pub cfa: Option<GuestVirt>,
    /// The guest's memory.
    pub memory: &'a dyn VirtMemory,
    /// Run-time address minus the address in the debug information, wrapping.
    pub slide: u64,
    /// What the function was called with, if that is known.
    pub passed: &'a dyn Fn(Argument<'_>) -> Option<u64>,
}

/// What a function was called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument<'n> {
    /// What a register held when it was entered.
    In(Reg),
    /// A parameter by its name, which is passed in no register: the compiler has made a copy of the function without it.
    Named(&'n str),
}

/// What a variable holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Guest-virtual address where it is kept; `None` for one in registers, or one that is only computed.
    pub at: Option<GuestVirt>,
    /// Its bits, from the lowest, as many as its type has; `None` for what has no value: a structure, an array.
    pub bits: Option<u64>,
    /// A structure that lies in registers: the values of its parts in the order of its bytes, `None` for those not known.
    pub parts: Vec<Option<u64>>,
}

/// Why it is not known what a variable holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Absent {
    /// The compiler keeps it nowhere at that address.
    OptimisedOut,
    /// It was in a register that has been overwritten since.
    Overwritten,
    /// Its memory can't be read.
    Unreadable,
    /// It is kept in a way that is not followed.
    NotFollowed,
}

/// What a variable holds.
pub(super) fn variable<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    variable: &FrameVariable<'d>,
    state: &FrameState<'_>,
) -> Result<Held, Absent> {
    let of = &variable.value_type;
    let expression = match variable.place {
        Place::Nowhere => return Err(Absent::OptimisedOut),
        Place::Constant(bits) if of.kind != ValueKind::Whole => {
            return Ok(Held { bits: Some(cut(bits, of.size)), ..Held::default() });
        }
        Place::Constant(_) => return Err(Absent::NotFollowed),
        Place::Told(expression) => expression,
    };
    let whole = of.kind == ValueKind::Whole || of.size == 0 || of.size > MAX_SIZE;
    let pieces = evaluate(units, unit, expression, variable.base, state)?;
    match pieces.as_slice() {
        [Piece { size_in_bits: None, location: Location::Address { address }, .. }] => {
            let at = GuestVirt(*address);
            if whole {
                return Ok(Held { at: Some(at), ..Held::default() });
            }
            let bits = state.memory.read_uint(at, of.size).map_err(|_| Absent::Unreadable)?;
            let bits = cut(bits, of.size);
            Ok(Held { at: Some(at), bits: Some(bits), parts: Vec::new() })
        }
        pieces if whole => parts(pieces, of.size, state),
        pieces => Ok(Held { bits: Some(joined(pieces, of.size, state)?), ..Held::default() }),
    }
}

/// A structure in parts; why the first of them is not known, if none is.
fn parts(pieces: &[Piece<Slice<'_>>], size: u64, state: &FrameState<'_>) -> Result<Held, Absent> {
    let value = |piece: &Piece<Slice<'_>>| {
        let own = piece.size_in_bits.unwrap_or(size.saturating_mul(8));
        let whole_bytes = own.is_multiple_of(8) && piece.bit_offset.unwrap_or(0) == 0;
        if !whole_bytes || own == 0 || own / 8 > MAX_SIZE {
            return Err(Absent::NotFollowed);
        }
        value_of(piece, own / 8, state).map(|bits| cut(bits, own / 8))
    };
    let values: Vec<_> = pieces.iter().take(MAX_PARTS).map(value).collect();
    match values.iter().find_map(|value| value.as_ref().err()) {
        Some(why) if values.iter().all(Result::is_err) => Err(*why),
        _ => Ok(Held { parts: values.into_iter().map(Result::ok).collect(), ..Held::default() }),
    }
}

/// The number that an expression yields.
pub(super) fn number<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    expression: Expression<Slice<'d>>,
    base: FrameBase,
    state: &FrameState<'_>,
) -> Option<u64> {
    let pieces = evaluate(units, unit, expression, base, state).ok()?;
    match pieces.as_slice() {
        // What an expression leaves on the stack is the number itself here.
        [Piece { size_in_bits: None, location: Location::Address { address }, .. }] => {
            Some(*address)
        }
        pieces => joined(pieces, MAX_SIZE, state).ok(),
    }
}

/// The lowest `size` bytes.
fn cut(bits: u64, size: u64) -> u64 {
    match size {
        1..MAX_SIZE => bits & ((1 << (8 * size)) - 1),
        _ => bits,
    }
}

/// Pieces put together, the first one lowest.
fn joined(pieces: &[Piece<Slice<'_>>], size: u64, state: &FrameState<'_>) -> Result<u64, Absent> {
    let (mut bits, mut filled) = (0, 0);
    for piece in pieces {
        let own = match piece.size_in_bits {
            None if pieces.len() == 1 => size,
            Some(own) if own.is_multiple_of(8) && own > 0 => own / 8,
            _ => return Err(Absent::NotFollowed),
        };
        if piece.bit_offset.unwrap_or(0) != 0 || filled + own > MAX_SIZE {
            return Err(Absent::NotFollowed);
        }
        bits |= cut(value_of(piece, own, state)?, own) << (8 * filled);
        filled += own;
    }
    if filled < size { Err(Absent::NotFollowed) } else { Ok(cut(bits, size)) }
}

fn value_of(piece: &Piece<Slice<'_>>, size: u64, state: &FrameState<'_>) -> Result<u64, Absent> {
    match piece.location {
        Location::Register { register } => register_of(register, state),
        Location::Address { address } => {
            state.memory.read_uint(GuestVirt(address), size).map_err(|_| Absent::Unreadable)
        }
        Location::Value { value } => value.to_u64(u64::MAX).map_err(|_| Absent::NotFollowed),
        Location::Bytes { value } => {
            let bytes = value.slice();
            let mut word = [0; 8];
            let part = word.get_mut(..bytes.len()).ok_or(Absent::NotFollowed)?;
            part.copy_from_slice(bytes);
            Ok(u64::from_le_bytes(word))
        }
        Location::Empty | Location::ImplicitPointer { .. } => Err(Absent::OptimisedOut),
    }
}

fn register_of(register: gimli::Register, state: &FrameState<'_>) -> Result<u64, Absent> {
    let reg = cfi::register(register).ok_or(Absent::NotFollowed)?;
    state.registers.get(reg).ok_or(Absent::Overwritten)
}

/// Address of link time -> of run time. Per-CPU symbols below the kernel half are offsets: they have no address here.
fn placed(address: u64, state: &FrameState<'_>) -> Result<u64, Absent> {
    let is_address = GuestVirt(address).is_kernel_half();
    is_address.then(|| address.wrapping_add(state.slide)).ok_or(Absent::NotFollowed)
}

fn evaluate<'d>(
    units: &Units<'d>,
    unit: &Unit<Slice<'d>>,
    expression: Expression<Slice<'d>>,
    base: FrameBase,
    state: &FrameState<'_>,
) -> Result<Vec<Piece<Slice<'d>>>, Absent> {
    if expression.0.slice().is_empty() {
        return Err(Absent::OptimisedOut);
    }
    let mut evaluation = expression.evaluation(unit.encoding());
    evaluation.set_max_iterations(MAX_OPERATIONS);
    let mut next = evaluation.evaluate();
    loop {
        next = match next.map_err(|_| Absent::NotFollowed)? {
            EvaluationResult::Complete => return Ok(evaluation.result()),
            EvaluationResult::RequiresRegister { register, base_type } => {
                let bits = register_of(register, state)?;
                evaluation.resume_with_register(typed(unit, base_type, bits)?)
            }
            EvaluationResult::RequiresMemory { address, size, space: None, base_type } => {
                let bits = state.memory.read_uint(GuestVirt(address), u64::from(size));
                let bits = cut(bits.map_err(|_| Absent::Unreadable)?, u64::from(size));
                evaluation.resume_with_memory(typed(unit, base_type, bits)?)
            }
            EvaluationResult::RequiresFrameBase => {
                evaluation.resume_with_frame_base(frame_base(base, state)?)
            }
            EvaluationResult::RequiresCallFrameCfa => {
                evaluation.resume_with_call_frame_cfa(state.cfa.ok_or(Absent::Overwritten)?.0)
            }
            EvaluationResult::RequiresEntryValue(expression) => {
                let bits = at_entry(unit, expression, state)?;
                evaluation.resume_with_entry_value(Value::Generic(bits))
            }
            EvaluationResult::RequiresParameterRef(at) => {
                let reference = AttributeValue::UnitRef(at);
                let name =
                    units.name_at(unit, reference, MAX_ORIGINS).ok_or(Absent::NotFollowed)?;
                let bits = (state.passed)(Argument::Named(name)).ok_or(Absent::Overwritten)?;
                evaluation.resume_with_parameter_ref(bits)
            }
            EvaluationResult::RequiresRelocatedAddress(address) => {
                evaluation.resume_with_relocated_address(placed(address, state)?)
            }
            EvaluationResult::RequiresBaseType(at) => {
                evaluation.resume_with_base_type(base_type(unit, at)?)
            }
            _ => return Err(Absent::NotFollowed),
        };
    }
}

fn at_entry(
    unit: &Unit<Slice<'_>>,
    expression: Expression<Slice<'_>>,
    state: &FrameState<'_>,
) -> Result<u64, Absent> {
    let Some(Operation::Register { register }) = single(unit, expression) else {
        return Err(Absent::NotFollowed);
    };
    let reg = cfi::register(register).ok_or(Absent::NotFollowed)?;
    (state.passed)(Argument::In(reg)).ok_or(Absent::Overwritten)
}

fn frame_base(base: FrameBase, state: &FrameState<'_>) -> Result<u64, Absent> {
    match base {
        FrameBase::Cfa => state.cfa.map(|cfa| cfa.0),
        FrameBase::Register(reg) => state.registers.get(reg),
        FrameBase::Unknown => return Err(Absent::NotFollowed),
    }
    .ok_or(Absent::Overwritten)
}

fn typed(unit: &Unit<Slice<'_>>, at: UnitOffset, bits: u64) -> Result<Value, Absent> {
    let of = base_type(unit, at)?;
    Value::from_u64(of, bits).map_err(|_| Absent::NotFollowed)
}

fn base_type(unit: &Unit<Slice<'_>>, at: UnitOffset) -> Result<ValueType, Absent> {
    // Offset 0 is the generic type: as wide as an address.
    if at == UnitOffset(0) {
        return Ok(ValueType::Generic);
    }
    let entry = unit.entry(at).map_err(|_| Absent::NotFollowed)?;
    ValueType::from_entry(&entry).ok().flatten().ok_or(Absent::NotFollowed)
}
