//! DWARF, ORC, BTF and symbol tables of an object file, turned into knowledge, ahead of any crash. What is done with
//! the knowledge is elsewhere.

pub(crate) mod elf;
mod layouts;
mod lines;
mod module;
pub(crate) mod relocate;
pub(crate) mod scopes;
pub(crate) mod types;
pub(crate) mod units;
mod unwind;
pub(crate) mod variables;
mod vmlinux;

pub use module::module;
pub use vmlinux::vmlinux;
pub(crate) use vmlinux::{Compiled, dwarf as linked_dwarf};

use gimli::{EndianSlice, LittleEndian};

/// How DWARF sections are read: in place.
pub(crate) type Slice<'d> = EndianSlice<'d, LittleEndian>;
