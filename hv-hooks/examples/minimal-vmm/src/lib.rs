//! A VMM on KVM in few lines, written to be copied: one file a noun, no `unsafe`, and defib's guard in its
//! own process. What a VMM has to do for the guard is in four places: [`Vmm::guard`] hands the parts over
//! before the vCPUs start, `vcpu.rs` asks the port first when `KVM_RUN` comes back, `vcpu.rs` tells of
//! pvpanic and of the end, and `guard_thread.rs` runs the guard. Leaves out what is not needed for that: PCI,
//! network, snapshots, migration, reboot (a guest that resets ends the VM).

mod acpi;
mod boot;
mod console;
mod cpu;
mod devices;
mod error;
mod event_loop;
mod exit;
pub mod guard_thread;
mod memory;
mod vcpu;
mod virtio_block;
mod virtio_mmio;
mod vmm;

pub use console::SerialEnd;
pub use error::{Error, Result};
pub use exit::Exit;
pub use vmm::{Config, Vmm};
