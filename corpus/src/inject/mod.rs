//! Fault injection: one instruction of a real driver is changed while a workload uses it, and what comes of it under
//! guard is judged. The same seed gives the same changes.

mod bench;
mod module_file;
mod mutation;
mod page;
mod run;
mod tally;
mod target;

pub use bench::Bench;
pub(crate) use bench::scatter;
pub use mutation::{Mutation, Operator};
pub use page::page;
pub use run::{Effect, Injection, run};
pub use tally::Tally;
pub use target::{TARGETS, Target, target};

/// The change with this number in a series: of which bench, and which. Benches take turns.
#[must_use]
pub fn draw(benches: &[Bench], seed: u64, index: u64) -> Option<(&Bench, &Mutation)> {
    let turn = usize::try_from(index % benches.len().max(1) as u64).ok()?;
    let bench = benches.get(turn)?;
    let number = scatter(scatter(seed).wrapping_add(index));
    Some((bench, bench.draw(number)?))
}
