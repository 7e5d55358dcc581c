//! The serial console: the UART, and where its bytes go to and come from. Waiting for input is the event
//! loop's job.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::{Error, Result};

/// Bytes of output that are kept for [`Console::output`]; older ones are forgotten.
const KEPT_OUTPUT: usize = 1 << 20;
/// Bytes of input that may wait for the guest; more is not taken.
const WAITING_INPUT: usize = 1 << 16;

/// Where the console's other end is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SerialEnd {
    /// This process' standard input and output.
    Stdio,
    /// A Unix socket that this VMM listens on, one peer at a time. A peer that reads too slowly loses output.
    Unix(PathBuf),
    /// Nowhere: [`crate::Vmm::serial_output`] and [`crate::Vmm::serial_input`].
    Memory,
}

/// The serial console. One lock: a UART is slow.
pub struct Console {
    uart: Mutex<Uart>,
}

struct Uart {
    chip: Serial<Line, NoEvents, Wire>,
    waiting: VecDeque<u8>,
}

/// The UART's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The other end.
struct Wire {
    end: SerialEnd,
    listener: Option<UnixListener>,
    peer: Option<UnixStream>,
    kept: VecDeque<u8>,
}

impl Write for Wire {
    /// Takes everything: a guest must not stand still because nobody reads its console.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let over = (self.kept.len() + bytes.len()).saturating_sub(KEPT_OUTPUT);
        self.kept.drain(..over.min(self.kept.len()));
        self.kept.extend(bytes);
        let sent = match (&self.end, &mut self.peer) {
            (SerialEnd::Stdio, _) => io::stdout().write_all(bytes),
            (_, Some(peer)) => peer.write_all(bytes),
            _ => Ok(()),
        };
        match sent {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.peer = None,
            _ => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.end == SerialEnd::Stdio {
            // A closed stdout is no reason to stop the guest, see above.
            let _ = io::stdout().flush();
        }
        Ok(())
    }
}

impl Console {
    /// A console whose interrupts are told to `line`.
    pub fn new(end: &SerialEnd, line: EventFd) -> Result<Self> {
        let listener = match end {
            SerialEnd::Unix(path) => {
                let listener = UnixListener::bind(path).map_err(Error::file(path))?;
                listener.set_nonblocking(true).map_err(Error::file(path))?;
                Some(listener)
            }
            _ => None,
        };
        let wire = Wire { end: end.clone(), listener, peer: None, kept: VecDeque::new() };
        let chip = Serial::new(Line(line), wire);
        Ok(Self { uart: Mutex::new(Uart { chip, waiting: VecDeque::new() }) })
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes a register.
    pub fn write(&self, register: u8, value: u8) {
        // The wire takes everything; what is left to fail is an interrupt that is pending already.
        let _ = self.lock().chip.write(register, value);
    }

    /// The guest reads a register.
    pub fn read(&self, register: u8) -> u8 {
        let mut uart = self.lock();
        let value = uart.chip.read(register);
        uart.refill();
        value
    }

    /// Gives bytes to the guest, which reads them in its own time; returns how many were taken.
    pub fn feed(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let taken = bytes.len().min(WAITING_INPUT.saturating_sub(uart.waiting.len()));
        uart.waiting.extend(bytes.iter().take(taken));
        uart.refill();
        taken
    }

    /// The last bytes that the guest wrote.
    pub fn output(&self) -> Vec<u8> {
        self.lock().chip.writer().kept.iter().copied().collect()
    }

    /// The descriptor that is readable when a peer connects.
    pub fn listener(&self) -> Option<RawFd> {
        self.lock().chip.writer().listener.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Takes the peer that has connected; returns its descriptor. One that was there is dropped.
    pub fn accept(&self) -> io::Result<Option<RawFd>> {
        let mut uart = self.lock();
        let wire = uart.chip.writer_mut();
        let Some(listener) = &wire.listener else { return Ok(None) };
        let (peer, _) = listener.accept()?;
        peer.set_nonblocking(true)?;
        Ok(Some(wire.peer.insert(peer).as_raw_fd()))
    }

    /// Feeds what the peer has sent; drops a peer that is gone.
    pub fn feed_from_peer(&self) {
        let mut bytes = [0; 4096];
        let read = match &mut self.lock().chip.writer_mut().peer {
            Some(peer) => peer.read(&mut bytes),
            None => return,
        };
        match read {
            Ok(size @ 1..) => _ = self.feed(&bytes[..size]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.lock().chip.writer_mut().peer = None,
        }
    }
}

impl Uart {
    /// Moves waiting input into the chip's FIFO as far as there is room.
    fn refill(&mut self) {
        let room = self.chip.fifo_capacity().min(self.waiting.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.waiting.iter().take(room).copied().collect();
        // In loop mode, when the guest probes the chip, nothing is taken.
        if let Ok(taken) = self.chip.enqueue_raw_bytes(&bytes) {
            self.waiting.drain(..taken);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let SerialEnd::Unix(path) = &self.end {
            // Ours since bind() succeeded; who removed it first has done it for us.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const LINE_STATUS: u8 = 5;

    fn console() -> Console {
        Console::new(&SerialEnd::Memory, EventFd::new(0).unwrap()).unwrap()
    }

    #[test]
    fn output_is_kept() {
        let console = console();
        b"hello".iter().for_each(|byte| console.write(DATA, *byte));
        assert_eq!(console.output(), b"hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_in_order() {
        let console = console();
        let sent: Vec<u8> = (0..200).collect();
        assert_eq!(console.feed(&sent), 200);
        let mut got = Vec::new();
        while console.read(LINE_STATUS) & 1 != 0 {
            got.push(console.read(DATA));
        }
        assert_eq!(got, sent);
    }
}
