//! The crash corpus: stock Debian kernels in QEMU, drivers that crash them, a workload that verifies
//! every byte, and the list of cases with what is expected of each. Nothing here repairs anything:
//! the corpus states what happens and what must hold afterwards.
//!
//! A case costs under a second to start when its guest is restored from a snapshot:
//!
//! ```no_run
//! use defib_corpus::lab::{Kernel, Snapshot, VmConfig};
//!
//! # fn main() -> Result<(), defib_corpus::Error> {
//! let config = VmConfig::new(Kernel::find("6.1")?);
//! let mut vm = Snapshot::cached(&config)?.restore()?;
//! vm.agent().command("workload start")?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod campaign;
mod error;
pub mod guarded;
mod html;
pub mod inject;
pub mod lab;
pub mod scenario;
pub mod sitting;
pub mod stock;
pub mod tiny;

pub use error::Error;
pub use error::Result;
