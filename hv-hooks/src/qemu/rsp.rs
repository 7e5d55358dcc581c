//! gdb-remote packets on the wire: framing, checksums, escapes, run lengths, stop replies; and a client that
//! sends several packets in one write. Knows nothing of registers or of QEMU.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::socket::Socket;
use crate::Error;

/// Longest packet that is accepted, decoded. QEMU's stub sends at most 4 KiB.
const MAX_PACKET: usize = 64 << 10;
/// The byte that stops a running target.
const INTERRUPT: u8 = 3;

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PacketError {
    /// The sum at its end is not the sum of its bytes.
    #[error("checksum {got:#04x}, but the bytes sum up to {sum:#04x}")]
    Checksum {
        /// Sum at the end of the packet.
        got: u8,
        /// Sum of the bytes.
        sum: u8,
    },
    /// The two characters after `#` are no hex digits.
    #[error("its checksum is not hex")]
    ChecksumDigits,
    /// An escape at the end, or a run length with nothing to repeat.
    #[error("its escapes or run lengths are broken")]
    Encoding,
    /// Longer than any packet should be.
    #[error("longer than {MAX_PACKET} bytes")]
    TooLong,
    /// Text that should be hex digits is not.
    #[error("hex digits expected")]
    Hex,
    /// Not a stop reply.
    #[error("not a stop reply")]
    StopReply,
}

/// Frames a payload: `$payload#sum`, with the four special characters escaped.
#[must_use]
pub fn encode(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 4);
    out.push(b'$');
    let mut sum = 0u8;
    for &byte in payload {
        let escaped = matches!(byte, b'$' | b'#' | b'}' | b'*');
        let pair = [b'}', byte ^ 0x20];
        for &sent in if escaped { &pair[..] } else { std::slice::from_ref(&byte) } {
            sum = sum.wrapping_add(sent);
            out.push(sent);
        }
    }
    out.extend_from_slice(format!("#{sum:02x}").as_bytes());
    out
}

/// Takes the first complete packet out of `buffer`; what stands before it (acknowledgements) is dropped.
/// `None` when more bytes are needed.
///
/// # Errors
/// The packet is malformed; it has been taken out.
pub fn decode(buffer: &mut Vec<u8>) -> Result<Option<Vec<u8>>, PacketError> {
    let Some(start) = buffer.iter().position(|&byte| byte == b'$') else {
        buffer.clear();
        return Ok(None);
    };
    let body = buffer.get(start + 1..).unwrap_or_default();
    let Some(len) = body.iter().position(|&byte| byte == b'#') else {
        return if body.len() > MAX_PACKET { Err(PacketError::TooLong) } else { Ok(None) };
    };
    let (Some(raw), Some(digits)) = (body.get(..len), body.get(len + 1..len + 3)) else {
        return Ok(None);
    };
    let sum = raw.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
    let packet = match parse_hex_u64(digits) {
        Ok(got) if got == u64::from(sum) => expand(raw),
        Ok(got) => Err(PacketError::Checksum { got: got as u8, sum }),
        Err(_) => Err(PacketError::ChecksumDigits),
    };
    buffer.drain(..start + 1 + len + 3);
    packet.map(Some)
}

/// Undoes escapes (`}` x) and run lengths (x `*` n).
fn expand(raw: &[u8]) -> Result<Vec<u8>, PacketError> {
    let mut out = Vec::with_capacity(raw.len());
    let mut bytes = raw.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'}' => out.push(bytes.next().ok_or(PacketError::Encoding)? ^ 0x20),
            b'*' => {
                let last = *out.last().ok_or(PacketError::Encoding)?;
                let count =
                    bytes.next().and_then(|n| n.checked_sub(29)).ok_or(PacketError::Encoding)?;
                out.resize(out.len() + usize::from(count), last);
            }
            plain => out.push(plain),
        }
        if out.len() > MAX_PACKET {
            return Err(PacketError::TooLong);
        }
    }
    Ok(out)
}

/// A report that the target stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReply {
    /// It stands, with a signal number of gdb's (2 interrupted, 5 trapped...) and the thread if told.
    Signal {
        /// gdb's signal number.
        signal: u8,
        /// gdb's thread number.
        thread: Option<u64>,
    },
    /// It ended.
    Exited,
}

/// gdb's number for "trapped": a breakpoint or a single step.
pub const SIGNAL_TRAP: u8 = 5;

/// Understands a stop reply: `T05thread:01;...`, `S05`, `W00`, `X09`.
///
/// # Errors
/// [`PacketError::StopReply`].
pub fn parse_stop(packet: &[u8]) -> Result<StopReply, PacketError> {
    let (kind, rest) = packet.split_first().ok_or(PacketError::StopReply)?;
    match kind {
        b'W' | b'X' => return Ok(StopReply::Exited),
        b'S' | b'T' => {}
        _ => return Err(PacketError::StopReply),
    }
    let (digits, pairs) = rest.split_at_checked(2).ok_or(PacketError::StopReply)?;
    let signal = parse_hex_u64(digits).map_err(|_| PacketError::StopReply)? as u8;
    let thread = pairs.split(|&byte| byte == b';').find_map(|pair| {
        let id = pair.strip_prefix(b"thread:")?;
        // With the multiprocess extension: pPID.TID.
        let id = id.rsplit(|&byte| byte == b'.').next().unwrap_or(id);
        parse_hex_u64(id).ok()
    });
    Ok(StopReply::Signal { signal, thread })
}

/// A big-endian hex number of at most 16 digits.
///
/// # Errors
/// [`PacketError::Hex`] for no digits, too many, or others.
pub fn parse_hex_u64(digits: &[u8]) -> Result<u64, PacketError> {
    if digits.is_empty() || digits.len() > 16 {
        return Err(PacketError::Hex);
    }
    digits.iter().try_fold(0, |sum, &digit| Ok(sum << 4 | u64::from(nibble(digit)?)))
}

/// Pairs of hex digits to bytes.
///
/// # Errors
/// [`PacketError::Hex`] for an odd number of digits or others than hex digits.
pub fn parse_hex_bytes(digits: &[u8]) -> Result<Vec<u8>, PacketError> {
    let (pairs, []) = digits.as_chunks::<2>() else {
        return Err(PacketError::Hex);
    };
    pairs.iter().map(|[high, low]| Ok(nibble(*high)? << 4 | nibble(*low)?)).collect()
}

fn nibble(digit: u8) -> Result<u8, PacketError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(PacketError::Hex),
    }
}

/// Appends bytes as hex digits.
pub(crate) fn push_hex(out: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// A connection to a gdb stub.
///
/// QEMU's stub takes any byte that arrives while the guest runs for a request to stop it, so nothing is sent
/// then: an acknowledgement is kept back until the next packet, which the stub accepts.
pub(crate) struct Rsp {
    socket: Socket,
    buffer: Vec<u8>,
    owes_ack: bool,
    limit: Duration,
}

impl Rsp {
    /// Takes over a connected socket. `limit` holds for each exchange.
    pub(crate) fn new(socket: Socket, limit: Duration) -> Self {
        Self { socket, buffer: Vec::new(), owes_ack: false, limit }
    }

    /// Sends packets in one write; no answer is read. Without packets nothing is sent: an acknowledgement alone
    /// would wake QEMU's main loop for nothing.
    pub(crate) fn send(&mut self, packets: &[&str]) -> Result<(), Error> {
        if packets.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(256);
        if std::mem::take(&mut self.owes_ack) {
            bytes.push(b'+');
        }
        bytes.extend(packets.iter().flat_map(|packet| encode(packet.as_bytes())));
        self.socket.write_all(&bytes, Instant::now() + self.limit)
    }

    /// Sends packets in one write and reads one answer for each.
    pub(crate) fn exchange(&mut self, packets: &[&str]) -> Result<Vec<Vec<u8>>, Error> {
        self.send(packets)?;
        self.answers(packets.len())
    }

    /// Reads the next `count` answers.
    pub(crate) fn answers(&mut self, count: usize) -> Result<Vec<Vec<u8>>, Error> {
        let deadline = Instant::now() + self.limit;
        let late = Error::Timeout { what: "an answer of the gdb stub", after: self.limit };
        let mut answers = Vec::with_capacity(count);
        while answers.len() < count {
            match self.receive(deadline)? {
                Some(packet) => answers.push(packet),
                None => return Err(late),
            }
        }
        Ok(answers)
    }

    /// Sends one packet and reads its answer.
    pub(crate) fn ask(&mut self, packet: &str) -> Result<Vec<u8>, Error> {
        Ok(self.exchange(&[packet])?.pop().unwrap_or_default())
    }

    /// Sends packets that are to be answered `OK`. The first that is not is the error.
    pub(crate) fn order(&mut self, packets: &[&str]) -> Result<(), Error> {
        let answers = self.exchange(packets)?;
        expect_ok(packets, &answers)
    }

    /// The next packet, `None` when there is none before the deadline.
    pub(crate) fn receive(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>, Error> {
        loop {
            if let Some(packet) = self.receive_ready()? {
                return Ok(Some(packet));
            }
            if !self.socket.read_until(&mut self.buffer, deadline)? {
                return Ok(None);
            }
        }
    }

    /// A packet that is already there.
    pub(crate) fn receive_ready(&mut self) -> Result<Option<Vec<u8>>, Error> {
        if let Some(packet) = self.take()? {
            return Ok(Some(packet));
        }
        self.socket.read_ready(&mut self.buffer)?;
        self.take()
    }

    fn take(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let packet = decode(&mut self.buffer)?;
        self.owes_ack |= packet.is_some();
        Ok(packet)
    }

    /// Asks a running target to stop. As long as QEMU waits for an acknowledgement it takes the request for a
    /// wrong one, so that goes first.
    pub(crate) fn interrupt(&mut self) -> Result<(), Error> {
        let owed: &[u8] = if std::mem::take(&mut self.owes_ack) { b"+" } else { b"" };
        let bytes = [owed, &[INTERRUPT]].concat();
        self.socket.write_all(&bytes, Instant::now() + self.limit)
    }
}

/// Checks that each answer is `OK`.
pub(crate) fn expect_ok(packets: &[&str], answers: &[Vec<u8>]) -> Result<(), Error> {
    match packets.iter().zip(answers).find(|(_, answer)| answer.as_slice() != b"OK") {
        Some((packet, answer)) => {
            Err(Error::answer(format!("gdb packet {}", packet.get(..40).unwrap_or(packet)), answer))
        }
        None => Ok(()),
    }
}

impl AsFd for Rsp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_packets() {
        assert_eq!(encode(b"OK"), b"$OK#9a");
        // The example of gdb's manual: "0* " is "0000".
        assert_eq!(decode(&mut b"$0* #7a".to_vec()), Ok(Some(b"0000".to_vec())));
        assert!(matches!(
            decode(&mut b"$OK#9b".to_vec()),
            Err(PacketError::Checksum { sum: 0x9a, .. })
        ));
        let mut stream = b"++$T02thread:01;#04$OK#9a".to_vec();
        let stop = decode(&mut stream).unwrap().unwrap();
        assert_eq!(parse_stop(&stop), Ok(StopReply::Signal { signal: 2, thread: Some(1) }));
        assert_eq!(stream, b"$OK#9a");
    }

    #[test]
    fn stop_replies() {
        let threaded = parse_stop(b"T05hwbreak:;thread:p1.0a;").unwrap();
        assert_eq!(threaded, StopReply::Signal { signal: 5, thread: Some(10) });
        assert_eq!(parse_stop(b"W00"), Ok(StopReply::Exited));
        assert_eq!(parse_stop(b"OK"), Err(PacketError::StopReply));
        assert_eq!(parse_stop(b"T"), Err(PacketError::StopReply));
    }

    #[test]
    fn acknowledgements_wait_for_the_next_packet() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut rsp = Rsp::new(Socket::from_fd(ours.into()).unwrap(), Duration::from_millis(200));
        theirs.write_all(b"$OK#9a").unwrap();
        rsp.order(&["Z1,10,1"]).unwrap();
        rsp.order(&[]).unwrap();
        theirs.write_all(b"$E22#a9").unwrap();
        assert!(matches!(rsp.order(&["Z1,20,1"]), Err(Error::Answer { .. })));
        drop(rsp);
        let mut sent = String::new();
        theirs.read_to_string(&mut sent).unwrap();
        assert!(sent.starts_with("$Z1,10,1#") && sent.contains("+$Z1,20,1#"), "{sent}");
        assert!(!sent.ends_with('+'));
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes(payload in proptest::collection::vec(any::<u8>(), 0..500)) {
            prop_assert_eq!(decode(&mut encode(&payload)), Ok(Some(payload)));
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(
            prop_oneof![Just(b'$'), Just(b'#'), Just(b'*'), Just(b'}'), any::<u8>()], 0..200)) {
            let mut buffer = bytes.clone();
            // Each round consumes a packet, asks for more, or fails.
            for _ in 0..bytes.len() {
                if let Ok(Some(packet)) = decode(&mut buffer) {
                    let _ = parse_stop(&packet);
                    let _ = parse_hex_bytes(&packet);
                }
            }
        }

        #[test]
        fn hex_round_trips(bytes in proptest::collection::vec(any::<u8>(), 0..50)) {
            let mut text = String::new();
            push_hex(&mut text, &bytes);
            prop_assert_eq!(parse_hex_bytes(text.as_bytes()), Ok(bytes));
        }
    }
}
