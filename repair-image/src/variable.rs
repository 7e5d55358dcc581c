//! A variable of the source and where it is kept at one address of code. What its type has inside is in `layout.rs`, how
//! many of them are stored in `variables.rs`.

use guest::{GuestVirt, Reg};

use crate::TypeShape;

/// Where a variable is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum VariableLocation {
    /// The register holds its value.
    Register(Reg),
    /// It lies in memory at the register's value plus this many bytes.
    AtRegister(Reg, i32),
    /// It lies on the stack at the CFA (rsp before the call of the function) plus this many bytes.
    AtCfa(i32),
    /// It lies at this guest-virtual address.
    Address(GuestVirt),
}

/// A variable or parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Its type; what a dereference yields is the `to` of a pointer.
    pub shape: TypeShape,
    /// Where it is kept.
    pub location: VariableLocation,
}
