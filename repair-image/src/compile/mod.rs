//! DWARF, ORC, BTF and symbol tables of an object file, turned into knowledge, ahead of any crash. What is done with
//! the knowledge is elsewhere.

mod elf;
mod layouts;
mod lines;
mod module;
mod relocate;
mod scopes;
mod types;
mod units;
mod unwind;
mod variables;
mod vmlinux;

pub use module::module;
pub(crate) use vmlinux::Compiled;
pub use vmlinux::vmlinux;

use gimli::{EndianSlice, LittleEndian};

/// How DWARF sections are read: in place.
type Slice<'d> = EndianSlice<'d, LittleEndian>;
