//! Machines that can be attached to. Knows hypervisors; knows nothing of kernels, of debug information or
//! of what is wrong with a guest. Backends: [`qemu`].

mod error;
pub mod qemu;

pub use error::Error;
