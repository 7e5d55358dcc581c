//! What code says: single instructions for people, and symbolic execution of whole functions as they
//! stand in the guest's memory (patched alternatives and static keys included). Reads only.

mod analysis;
mod execute;
mod function;
mod instruction;
mod locks;
pub(crate) mod op;
mod resolve;
mod state;
mod value;

pub use analysis::CodeCache;
pub use instruction::{
    Instruction, MemoryOperand, Operand, OperandKind, Segment, call_before, instruction_at,
    instruction_of,
};

pub(crate) use analysis::{SavedPlace, saved_place};
pub(crate) use function::block_before;
#[cfg(test)]
pub(crate) use locks::Effect;
pub(crate) use locks::{Also, Class, Lock, Outcome, SOFTIRQ_DISABLE};
pub(crate) use resolve::Place;
pub(crate) use state::{Fact, Item, Standing, State};
pub(crate) use value::Value;

#[cfg(test)]
mod against_dwarf;
#[cfg(test)]
pub(crate) mod fixture;
