//! What `defib guard` says while it runs: JSON lines on stdout, or plain lines for people on stderr.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

/// Where events go.
pub struct Events {
    json: bool,
    start: Instant,
}

impl Events {
    /// JSON lines when `json`, else text.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self { json, start: Instant::now() }
    }

    /// Time since the start, on the monotonic clock.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
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
            json!(u64::try_from(self.elapsed().as_micros()).unwrap_or(u64::MAX)),
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
