//! Who is told what a guard does. What becomes of it (a line on stdout, a metric) is the observer's business.

use std::io;

use serde_json::Value;

/// Is told each event of a guard, in order. The events and their fields are documented in
/// `docs/incident.md`.
///
/// The guest runs while it is told, unless somebody else paused it; but a crash that comes meanwhile waits
/// for it, so it should not block.
pub trait Observer {
    /// `event` with its fields (a JSON object); `text` is the same for people, empty where there is nothing
    /// to read.
    ///
    /// # Errors
    /// When it can't be passed on. That ends the guard, as a reader that is gone must.
    fn event(&mut self, event: &str, fields: Value, text: &str) -> io::Result<()>;
}
