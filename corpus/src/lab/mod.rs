//! Lab guests: kernels, drivers, boot image, virtual machine, agent, snapshots. What the guests are
//! put through is not here but in [`crate::scenario`].

mod agent;
pub(crate) mod build;
pub(crate) mod cache;
mod disk;
mod drivers;
pub(crate) mod initramfs;
mod kernel;
mod kit;
mod nested;
mod qmp;
pub(crate) mod running;
mod snapshot;
mod vm;
mod vmm;

pub use agent::Agent;
pub use agent::Answer;
pub use drivers::DriverModule;
pub use drivers::driver_source;
pub use drivers::drivers;
pub use kernel::Kernel;
pub use kit::kit;
pub use nested::Ended;
pub use nested::Given;
pub use nested::Nested;
pub use qmp::Qmp;
pub use running::Running;
pub use running::end_all;
pub use running::temporary;
pub use snapshot::Snapshot;
pub use vm::Accelerator;
pub use vm::Backend;
pub use vm::Machine;
pub use vm::Vm;
pub use vm::VmConfig;
pub use vm::stop;
pub use vmm::VmmConfig;
pub use vmm::VmmGuest;
