//! QMP client: greeting, commands (also many in one write), events. The event set is open: an event that a
//! newer QEMU adds is a name and data like any other. Knows no command's meaning.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::socket::Socket;
use crate::Error;
use crate::error::excerpt;

/// Longest line that is accepted. `info mtree -f` of a large VM is some 100 KiB.
const MAX_LINE: usize = 16 << 20;
/// Events kept until they are taken; the oldest go first.
const MAX_EVENTS: usize = 1024;
/// Commands in flight: QEMU queues 8 per monitor and stops reading then (monitor/qmp.c).
const MAX_IN_FLIGHT: usize = 8;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// QEMU's name: `STOP`, `RESET`, `GUEST_PANICKED`...
    pub name: String,
    /// What comes with it; `Null` for nothing.
    pub data: Value,
}

/// One line from QEMU.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The greeting, with QEMU's version: major, minor, micro.
    Greeting([u64; 3]),
    /// A command succeeded.
    Return(Value),
    /// A command failed.
    Error {
        /// QEMU's error class.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// An event.
    Event(Event),
}

/// Understands one line.
///
/// # Errors
/// [`Error::QmpSyntax`] when it is not JSON or none of the four kinds of message.
pub fn parse_line(line: &[u8]) -> Result<Message, Error> {
    let syntax = |what| Error::QmpSyntax { what, line: excerpt(line) };
    let value: Value = serde_json::from_slice(line).map_err(|_| syntax("not JSON"))?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(result) = value.get("return") {
        return Ok(Message::Return(result.clone()));
    }
    if let Some(error) = value.get("error") {
        return Ok(Message::Error {
            class: text(error.get("class")),
            desc: text(error.get("desc")),
        });
    }
    if let Some(name) = value.get("event").and_then(Value::as_str) {
        let data = value.get("data").cloned().unwrap_or_default();
        return Ok(Message::Event(Event { name: name.to_owned(), data }));
    }
    let version = value.pointer("/QMP/version/qemu").ok_or_else(|| syntax("no message"))?;
    let number = |name| version.get(name).and_then(Value::as_u64).unwrap_or_default();
    Ok(Message::Greeting([number("major"), number("minor"), number("micro")]))
}

/// A command: its name and its arguments.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    name: &'static str,
    arguments: Value,
}

impl Command {
    /// A QMP command.
    pub(crate) fn new(name: &'static str, arguments: Value) -> Self {
        Self { name, arguments }
    }

    /// A command of the human monitor. Its answer is a string; most failures are just text in it.
    pub(crate) fn hmp(line: impl Into<String>) -> Self {
        Self::new("human-monitor-command", json!({ "command-line": line.into() }))
    }

    /// What to call it in an error: the human monitor's command where it is one.
    fn label(&self) -> String {
        match self.arguments.get("command-line").and_then(Value::as_str) {
            Some(line) => format!("HMP {line}"),
            None => self.name.to_owned(),
        }
    }

    fn to_line(&self) -> Vec<u8> {
        let mut object = Map::new();
        object.insert("execute".into(), self.name.into());
        if !self.arguments.is_null() {
            object.insert("arguments".into(), self.arguments.clone());
        }
        let mut line = Value::Object(object).to_string().into_bytes();
        line.push(b'\n');
        line
    }
}

/// A connection to QEMU's machine protocol.
pub(crate) struct Qmp {
    socket: Socket,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
    /// Major, minor, micro.
    version: [u64; 3],
    limit: Duration,
}

impl Qmp {
    /// Reads the greeting and negotiates. `limit` holds for each command from then on.
    pub(crate) fn negotiate(socket: Socket, limit: Duration) -> Result<Self, Error> {
        let (buffer, events) = (Vec::new(), VecDeque::new());
        let mut qmp = Self { socket, buffer, events, version: [0; 3], limit };
        let greeting = match qmp.read_message(Instant::now() + limit) {
            Err(Error::Timeout { after, .. }) => return Err(Error::QmpBusy { after }),
            Err(Error::QmpSyntax { line, .. }) => return Err(Error::NotQmp { got: line }),
            other => other?,
        };
        let Message::Greeting(version) = greeting else {
            return Err(Error::NotQmp { got: excerpt(format!("{greeting:?}").as_bytes()) });
        };
        qmp.version = version;
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// QEMU's version: major, minor, micro.
    pub(crate) fn version(&self) -> [u64; 3] {
        self.version
    }

    /// Runs one command.
    pub(crate) fn execute(&mut self, name: &'static str, arguments: Value) -> Result<Value, Error> {
        self.run(Command::new(name, arguments))
    }

    /// Runs one command of the human monitor and returns what it prints.
    pub(crate) fn hmp(&mut self, line: impl Into<String>) -> Result<String, Error> {
        let command = Command::hmp(line);
        let label = command.label();
        hmp_text(self.run(command)?, &label)
    }

    fn run(&mut self, command: Command) -> Result<Value, Error> {
        match self.run_all(std::slice::from_ref(&command)).pop() {
            Some(result) => result,
            None => Err(Error::Gone),
        }
    }

    /// Runs commands one after another, sent in one write: one round trip for all. Each has its own
    /// result, and a failed one does not keep QEMU from the next.
    pub(crate) fn run_all(&mut self, commands: &[Command]) -> Vec<Result<Value, Error>> {
        commands.chunks(MAX_IN_FLIGHT).flat_map(|chunk| self.run_chunk(chunk)).collect()
    }

    fn run_chunk(&mut self, commands: &[Command]) -> Vec<Result<Value, Error>> {
        let deadline = Instant::now() + self.limit;
        let bytes: Vec<u8> = commands.iter().flat_map(Command::to_line).collect();
        if let Err(error) = self.socket.write_all(&bytes, deadline) {
            return vec![Err(error)];
        }
        let mut results = Vec::with_capacity(commands.len());
        for command in commands {
            let result = self.read_result(command, deadline);
            // After a lost connection or a late answer no later answer can be told apart.
            let broken =
                matches!(result, Err(Error::Gone | Error::Timeout { .. } | Error::Io { .. }));
            results.push(result);
            if broken {
                break;
            }
        }
        results
    }

    fn read_result(&mut self, command: &Command, deadline: Instant) -> Result<Value, Error> {
        loop {
            match self.read_message(deadline)? {
                Message::Return(value) => return Ok(value),
                Message::Error { class, desc } => {
                    return Err(Error::Qmp { command: command.label(), class, desc });
                }
                Message::Event(event) => self.keep(event),
                Message::Greeting(_) => {}
            }
        }
    }

    /// Takes the oldest event that has been read.
    pub(crate) fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Reads the events that are there, without waiting.
    pub(crate) fn read_events(&mut self) -> Result<(), Error> {
        loop {
            while let Some(message) = self.take_line()? {
                if let Message::Event(event) = message {
                    self.keep(event);
                }
            }
            if self.socket.read_ready(&mut self.buffer)? == 0 {
                return Ok(());
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn read_message(&mut self, deadline: Instant) -> Result<Message, Error> {
        loop {
            if let Some(message) = self.take_line()? {
                return Ok(message);
            }
            if !self.socket.read_until(&mut self.buffer, deadline)? {
                return Err(Error::Timeout { what: "a QMP command", after: self.limit });
            }
        }
    }

    fn take_line(&mut self) -> Result<Option<Message>, Error> {
        let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') else {
            if self.buffer.len() > MAX_LINE {
                return Err(Error::QmpSyntax { what: "too long", line: excerpt(&self.buffer) });
            }
            return Ok(None);
        };
        let rest = self.buffer.split_off(end + 1);
        let line = std::mem::replace(&mut self.buffer, rest);
        parse_line(line.trim_ascii()).map(Some)
    }
}

impl AsFd for Qmp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The text a human-monitor command printed.
pub(crate) fn hmp_text(value: Value, label: &str) -> Result<String, Error> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(Error::answer(label, other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}"#;

    /// A QEMU that answers each line of input with the next of `answers`, after `first`.
    fn scripted(
        first: &'static str,
        answers: Vec<String>,
    ) -> (Socket, thread::JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut got = Vec::new();
            theirs.write_all(first.as_bytes()).unwrap();
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            for answer in answers {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                got.push(line);
                theirs.write_all(answer.as_bytes()).unwrap();
            }
            got
        });
        (Socket::from_fd(ours.into()).unwrap(), server)
    }

    const LIMIT: Duration = Duration::from_millis(200);

    #[test]
    fn commands_events_and_errors() {
        let greeting = Box::leak(format!("{GREETING}\r\n").into_boxed_str());
        let (socket, server) = scripted(
            greeting,
            vec![
                "{\"return\": {}}\r\n".into(),
                "{\"event\": \"BRAND_NEW\", \"data\": {\"x\": 1}}\r\n{\"return\": \"one\"}\r\n"
                    .into(),
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n".into(),
            ],
        );
        let mut qmp = Qmp::negotiate(socket, LIMIT).unwrap();
        assert_eq!(qmp.version(), [7, 2, 22]);
        let results = qmp.run_all(&[Command::hmp("info x"), Command::new("stop", Value::Null)]);
        assert!(matches!(&results[0], Ok(Value::String(text)) if text == "one"));
        assert!(matches!(&results[1], Err(Error::Qmp { command, .. }) if command == "stop"));
        assert_eq!(qmp.next_event().unwrap().name, "BRAND_NEW");
        assert!(qmp.next_event().is_none());
        let got = server.join().unwrap();
        assert!(got[1].contains("\"command-line\":\"info x\""), "{got:?}");
        assert!(!got[2].contains("arguments"), "{got:?}");
    }

    #[test]
    fn other_sockets_and_busy_ones_are_told_apart() {
        let (socket, _server) = scripted("SSH-2.0-OpenSSH_9.2\r\n", vec![]);
        assert!(
            matches!(Qmp::negotiate(socket, LIMIT), Err(Error::NotQmp { got }) if got.contains("SSH"))
        );
        let (ours, _silent) = UnixStream::pair().unwrap();
        let socket = Socket::from_fd(ours.into()).unwrap();
        assert!(matches!(Qmp::negotiate(socket, LIMIT), Err(Error::QmpBusy { .. })));
    }

    proptest! {
        #[test]
        fn any_line_is_an_answer_or_an_error(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_line(&line);
        }

        #[test]
        fn any_json_is_an_answer_or_an_error(key in "(return|error|event|QMP|x)", number: i64) {
            let _ = parse_line(json!({ key: number }).to_string().as_bytes());
        }
    }
}
