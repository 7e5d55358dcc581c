//! Diagnoses and incidents for people: as text for a terminal, as one HTML page. Layout only; nothing is
//! concluded here.

mod escape;
mod html;
mod page;
mod state;
mod text;
mod timeline;
mod words;

pub use html::html;
pub use page::{InstructionLine, Moment, Page, Source, Step, Verdict, Write};
pub use state::{Variables, sections};
pub use text::text;
