//! What a crash has left behind, a dump or a console log, and what can be said of it. Nothing here prints.

mod crash;
mod debug;
mod input;
#[cfg(test)]
pub mod sample;

pub use crash::{Crash, Scene, of_dump};
pub use debug::AtHand;
pub use input::Input;
