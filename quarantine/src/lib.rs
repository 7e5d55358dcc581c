//! A diagnosis goes in; a plan comes out, and is applied to a machine with every write journaled.
//! Writes to a guest only in `apply.rs`; decides nothing about what crashed.
#![forbid(unsafe_code)]

mod action;
mod activity;
mod apply;
mod bit_locks;
mod boundaries;
mod bus_master;
mod bystanders;
mod callbacks;
mod contracts;
mod core_return;
mod counts;
mod driver;
mod entries;
mod error;
mod error_return;
mod free_lists;
mod guest_call;
mod guest_struct;
mod in_hand;
mod invariants;
mod journal;
mod lists;
mod locks;
mod memory_signs;
mod network;
mod nudge;
mod occupants;
mod page_map;
mod page_tables;
mod path_walk;
mod plan;
mod policy;
mod probation;
mod process;
mod queue;
mod refusal;
mod requests;
mod reserved;
mod run_queue;
mod slab;
mod sleepers;
mod stack_end;
mod strikes;
#[cfg(test)]
mod testing;
mod text;
mod text_retry;
mod transmit;
mod values;
mod warning;

pub use action::{Action, Expected, SavedWord};
pub use apply::{Applied, apply};
pub use bystanders::settle;
pub use error::Error;
pub use journal::{Deed, Entry, Journal};
pub use nudge::{nudge, nudge_at};
pub use plan::{Plan, Rung, Situation, plan};
pub use policy::{FreshWay, Policy};
pub use probation::{Probation, Vital};
pub use refusal::{Reason, Refusal};
pub use strikes::Strikes;
pub use values::Value;

pub(crate) use strikes::Standing;
