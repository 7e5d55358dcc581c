//! Lab guests: kernels, drivers, boot image, virtual machine, agent, snapshots. What the guests are
//! put through is not here but in [`crate::scenario`].

mod agent;
mod build;
mod cache;
mod disk;
mod drivers;
mod initramfs;
mod kernel;
mod qmp;
mod snapshot;
mod vm;

pub use agent::Agent;
pub use agent::Answer;
pub use drivers::DriverModule;
pub use drivers::driver_source;
pub use drivers::drivers;
pub use kernel::Kernel;
pub use qmp::Qmp;
pub use snapshot::Snapshot;
pub use vm::Backend;
pub use vm::Machine;
pub use vm::Vm;
pub use vm::VmConfig;
pub use vm::stop;
