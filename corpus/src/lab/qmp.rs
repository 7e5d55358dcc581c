//! Just enough QMP for the lab: a command and its answer. The lab has a monitor of its own in each VM,
//! so that the one that a guard would use stays free.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use serde_json::json;

use crate::Error;
use crate::Result;

/// How long QEMU may take to answer a command.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A connected monitor, past the negotiation of capabilities.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a monitor's socket.
    ///
    /// # Errors
    /// [`Error::File`] when there is no such socket, [`Error::Qmp`] when it does not speak QMP.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(Error::file("connect to", path))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(Error::file("set up", path))?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        qmp.line("greeting")?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self, command: &str) -> Result<Value> {
        let mut text = String::new();
        let failed = |reason: String| Error::Qmp { command: command.to_owned(), reason };
        match self.reader.read_line(&mut text) {
            Ok(0) => Err(failed("the connection ended".to_owned())),
            Ok(_) => serde_json::from_str(&text).map_err(|error| failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Sends a command and gives what it returned; events on the way are dropped.
    ///
    /// # Errors
    /// [`Error::Qmp`] with QEMU's description when it refused, or when the connection broke.
    pub fn command(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.reader.get_mut().write_all(text.as_bytes()).map_err(|error| Error::Qmp {
            command: command.to_owned(),
            reason: error.to_string(),
        })?;
        loop {
            let mut answer = self.line(command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let reason = error["desc"].as_str().unwrap_or("no description").to_owned();
                return Err(Error::Qmp { command: command.to_owned(), reason });
            }
        }
    }
}
