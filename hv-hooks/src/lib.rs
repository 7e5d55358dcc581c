//! Machines that can be attached to. Knows hypervisors; knows nothing of kernels, of debug information or
//! of what is wrong with a guest. Backends: [`qemu`],
//! attached to from outside, and [`kvm`], for VMMs that hold KVM's file descriptors themselves.

mod deadline;
mod debug_registers;
mod error;
pub mod kvm;
mod mapping;
pub mod qemu;

pub use error::Error;
