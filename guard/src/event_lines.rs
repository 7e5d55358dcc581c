//! An observer that prints: JSON lines on stdout, or plain lines for people on stderr. What there is to say is the
//! guard's.

use std::io::Write;
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::Observer;

/// Prints events, one a line.
#[derive(Clone, Debug)]
pub struct EventLines {
    json: bool,
    start: Instant,
}

impl EventLines {
    /// JSON lines when `json`, else text.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self { json, start: Instant::now() }
    }

    /// Says `event` with its fields; `text` is what a person reads instead.
    ///
    /// # Errors
    /// When stdout can't be written.
    pub fn say(&self, event: &str, fields: Value, text: &str) -> std::io::Result<()> {
        if !self.json {
            if !text.is_empty() {
                eprintln!("[{:>10.3} s] {text}", self.start.elapsed().as_secs_f64());
            }
            return Ok(());
        }
        let mut object = Map::new();
        object.insert("event".into(), json!(event));
        object.insert(
            "t_us".into(),
            json!(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)),
        );
        if let Value::Object(fields) = fields {
            object.extend(fields);
        }
        let mut stdout = std::io::stdout().lock();
        serde_json::to_writer(&mut stdout, &Value::Object(object))?;
        stdout.write_all(b"\n")?;
        stdout.flush()
    }
}

impl Observer for EventLines {
    fn event(&mut self, event: &str, fields: Value, text: &str) -> std::io::Result<()> {
        self.say(event, fields, text)
    }
}
