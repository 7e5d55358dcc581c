//! Vocabulary of defib: address types, registers, the memory and machine traits, page-table walk.
//! Knows x86-64; knows nothing of Linux, of debug information or of any hypervisor.
#![forbid(unsafe_code)]

mod addr;
pub mod fake;
mod machine;
mod memory;
mod paging;
mod regs;

pub use addr::{CodeAddress, GuestPhys, GuestVirt, HostVirt, LinkAddr};
pub use machine::{
    Call, CallOutcome, Control, FreshKind, FreshMemory, FreshRegion, Hook, HookKind, Hooks,
    Machine, MachineError, Stop, StopReason, Vcpu, WriteMemory,
};
pub use memory::{MemoryError, PhysMemory, VirtMemory};
pub use paging::{AddressSpace, Mapping};
pub use regs::{RFLAGS_AC, RFLAGS_DF, RFLAGS_IF, RFLAGS_TF, Reg, Registers};
