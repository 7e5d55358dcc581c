//! The host's end of the channel to a guest's agent: one line there, one line back. The guest's end and
//! its commands are in `guest/agent.c`.

use std::io;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use crate::Error;
use crate::Result;

/// How long a command may take if the caller does not say.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// The longest answer line taken, in bytes; the agent's own limit is 16 KiB.
const LINE_LIMIT: usize = 64 << 10;

/// A connection to a guest's agent.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    buffer: Vec<u8>,
    next: u64,
}

impl Agent {
    /// Connects to the socket of a VM's second serial port. The guest need not be up yet. QEMU serves
    /// one connection at a time.
    ///
    /// # Errors
    /// [`Error::File`] when there is no such socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(Error::file("connect to", socket))?;
        Ok(Self { stream, buffer: Vec::new(), next: 1 })
    }

    /// Whether the agent answers within the time.
    pub fn answers(&mut self, limit: Duration) -> bool {
        self.command_within("ping", limit).is_ok()
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// [`Error::Agent`] when the agent answers `err`, [`Error::Timeout`] when it does not answer.
    pub fn command(&mut self, command: &str) -> Result<Answer> {
        self.command_within(command, COMMAND_LIMIT)
    }

    /// As [`Agent::command`], with the time it may take.
    ///
    /// # Errors
    /// As [`Agent::command`].
    pub fn command_within(&mut self, command: &str, limit: Duration) -> Result<Answer> {
        let id = self.next;
        self.next += 1;
        let failed = |reason: String| Error::Agent { command: command.to_owned(), reason };
        self.stream
            .write_all(format!("{id} {command}\n").as_bytes())
            .map_err(|error| failed(error.to_string()))?;
        let end = Instant::now() + limit;
        while let Some(line) = self.line(end).map_err(|error| failed(error.to_string()))? {
            // Answers to commands that were given up, and noise of a starting guest, are passed over.
            let mut parts = line.splitn(3, ' ');
            if parts.next().and_then(|text| text.parse().ok()) != Some(id) {
                continue;
            }
            let word = parts.next().unwrap_or_default();
            let text = parts.next().unwrap_or_default().to_owned();
            match word {
                "ok" => return Ok(Answer { text }),
                "err" => return Err(failed(text)),
                _ => {}
            }
        }
        Err(Error::Timeout {
            what: format!("the guest's answer to {command}"),
            limit,
            console: String::new(),
        })
    }

    /// The next line, or `None` when the time is over.
    fn line(&mut self, end: Instant) -> io::Result<Option<String>> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=at).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if self.buffer.len() > LINE_LIMIT {
                self.buffer.clear();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The text of an `ok` answer, often a row of `key=value` fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    text: String,
}

impl Answer {
    /// The text as it came.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text with the agent's escapes (`\n`, `\\`, `\xHH`) undone.
    pub fn unescaped(&self) -> String {
        let mut out = String::new();
        let mut rest = self.text.as_str();
        while let Some(at) = rest.find('\\') {
            out.push_str(&rest[..at]);
            let escape = &rest[at + 1..];
            let (text, used) = match escape.as_bytes().first() {
                Some(b'n') => ("\n", 1),
                Some(b'\\') => ("\\", 1),
                // Control characters of the console carry nothing that is looked for.
                Some(b'x') => ("?", escape.len().min(3)),
                _ => ("\\", 0),
            };
            out.push_str(text);
            rest = escape.get(used..).unwrap_or_default();
        }
        out + rest
    }

    /// The value of a field, if it is there.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// The value of a field that must be a number.
    ///
    /// # Errors
    /// [`Error::Answer`] when it is not there or no number.
    pub fn number(&self, name: &'static str) -> Result<i64> {
        self.field(name)
            .and_then(|value| value.parse().ok())
            .ok_or_else(|| Error::Answer { field: name, answer: self.text.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Answer {
        Answer { text: text.to_owned() }
    }

    #[test]
    fn fields_are_whole_words() {
        let a = answer("errors=3 value=-1 note=");
        assert_eq!(a.field("errors"), Some("3"));
        assert_eq!(a.number("value").ok(), Some(-1));
        assert_eq!(a.field("error"), None);
        assert_eq!(a.field("note"), Some(""));
        assert!(a.number("note").is_err());
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(answer(r"a\nb\\n\x1b[0m").unescaped(), "a\nb\\n?[0m");
        assert_eq!(answer(r"end\").unescaped(), "end\\");
    }

    #[test]
    fn stale_answers_and_noise_are_passed_over() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut agent = Agent { stream: here, buffer: Vec::new(), next: 7 };
        there.write_all(b"[    0.0] boot\n6 ok old\n7 err no\n8 ok new x=1\n").unwrap();
        assert!(matches!(agent.command("a"), Err(Error::Agent { reason, .. }) if reason == "no"));
        assert_eq!(agent.command("b").unwrap().field("x"), Some("1"));
        let limit = Duration::from_millis(20);
        assert!(matches!(agent.command_within("c", limit), Err(Error::Timeout { .. })));
    }
}
