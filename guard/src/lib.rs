//! Standing guard over one machine: what is known of its kernel, the way of one crash through the house,
//! probation afterwards. Knows no particular hypervisor, prints only by [`EventLines`], handles no signals.
//!
//! A VMM hands over its machine and is told what happens:
//!
//! ```no_run
//! use guard::{Guard, Observer, Options};
//! # use defib_guard as guard;
//!
//! struct Log;
//!
//! impl Observer for Log {
//!     fn event(&mut self, event: &str, _: serde_json::Value, text: &str) -> std::io::Result<()> {
//!         eprintln!("{event}: {text}");
//!         Ok(())
//!     }
//! }
//!
//! fn stand<M: guest::Machine>(machine: M, ending: &dyn Fn() -> bool) -> Result<M, guard::Error> {
//!     let mut guard = Guard::begin(machine, Options::default(), Box::new(Log))?;
//!     guard.run(ending)?;
//!     Ok(guard.into_machine())
//! }
//! ```
//!
//! A guest that crashes stands until [`Guard::step`] or [`Guard::run`] has looked at it: call them from a
//! thread of their own, without long breaks. Whatever fails in them, an error or a panic, the hooks are taken
//! off and a guest that stood for the guard's sake runs on.
#![forbid(unsafe_code)]

mod asleep;
mod chase;
mod core_file;
mod crash;
mod error;
mod event_lines;
mod fault_loop;
mod guard;
mod incident;
mod knowledge;
mod observer;
mod page;
mod progress;
mod refaults;
mod report;
mod session;
mod stranded;
mod stuck;
#[cfg(test)]
mod testing;
mod watch;
mod whole_file;

pub use error::{Error, Failed, in_one_line};
pub use event_lines::EventLines;
pub use guard::{Guard, Options, POLL};
pub use knowledge::{Kernel, KnowledgeSources, Learned, kernel_layer, learn, learn_dump};
pub use observer::Observer;
