//! A byte stream with deadlines: no read or write blocks past them. Knows no protocol.

use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::Error;

/// A connected stream socket in non-blocking mode.
pub(crate) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Connects to a Unix socket, or over TCP when the endpoint reads `tcp:HOST:PORT`.
    pub(crate) fn connect(endpoint: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Connect { endpoint: endpoint.to_owned(), source };
        let fd = match endpoint.to_str().and_then(|text| text.strip_prefix("tcp:")) {
            Some(address) => {
                let stream = TcpStream::connect(address).map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                OwnedFd::from(stream)
            }
            None => OwnedFd::from(UnixStream::connect(endpoint).map_err(failed)?),
        };
        Self::from_fd(fd)
    }

    /// Takes over a connected stream.
    pub(crate) fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(Error::os("making a socket non-blocking"))?;
        Ok(Self { fd })
    }

    /// Process and user id of the peer (of a Unix socket).
    pub(crate) fn peer(&self) -> Result<(u32, u32), Error> {
        let cred = rustix::net::sockopt::socket_peercred(&self.fd)
            .map_err(Error::os("asking for the peer of the QMP socket"))?;
        Ok((cred.pid.as_raw_nonzero().get().unsigned_abs(), cred.uid.as_raw()))
    }

    /// Appends what is there to `buffer`, without waiting. Returns the number of bytes, 0 for none yet.
    pub(crate) fn read_ready(&self, buffer: &mut Vec<u8>) -> Result<usize, Error> {
        let mut chunk = [0; 16 << 10];
        match rustix::io::read(&self.fd, &mut chunk) {
            Ok(0) => Err(Error::Gone),
            Ok(len) => {
                buffer.extend_from_slice(chunk.get(..len).unwrap_or_default());
                Ok(len)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(Errno::CONNRESET | Errno::PIPE) => Err(Error::Gone),
            Err(errno) => Err(Error::os("reading from a socket")(errno)),
        }
    }

    /// Appends at least one byte to `buffer`; `false` when none came before the deadline.
    pub(crate) fn read_until(
        &self,
        buffer: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<bool, Error> {
        loop {
            if self.read_ready(buffer)? > 0 {
                return Ok(true);
            }
            if !wait_readable(&[self.as_fd()], deadline)? {
                return Ok(false);
            }
        }
    }

    /// Writes everything.
    pub(crate) fn write_all(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        while !bytes.is_empty() {
            // MSG_NOSIGNAL: a QEMU that died must be an error, not SIGPIPE for the whole process.
            match rustix::net::send(&self.fd, bytes, rustix::net::SendFlags::NOSIGNAL) {
                Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
                    let limit = deadline.saturating_duration_since(Instant::now());
                    if limit.is_zero() {
                        return Err(Error::Timeout { what: "writing to a socket", after: limit });
                    }
                    poll(&mut fds, Some(&timespec(limit))).map_err(Error::os("poll"))?;
                }
                Err(Errno::CONNRESET | Errno::PIPE) => return Err(Error::Gone),
                Err(errno) => return Err(Error::os("writing to a socket")(errno)),
            }
        }
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until one of the sockets has something to read (or was closed); `false` at the deadline.
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<bool, Error> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut polled, Some(&timespec(left))) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(Error::os("poll")(errno)),
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn deadlines_hold_and_a_closed_peer_is_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let socket = Socket::from_fd(ours.into()).unwrap();
        let mut buffer = Vec::new();
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(!socket.read_until(&mut buffer, soon).unwrap());
        theirs.write_all(b"hello").unwrap();
        assert!(socket.read_until(&mut buffer, Instant::now()).unwrap());
        assert_eq!(buffer, b"hello");
        drop(theirs);
        assert!(matches!(socket.read_ready(&mut buffer), Err(Error::Gone)));
        assert!(matches!(socket.write_all(b"x", Instant::now()), Err(Error::Gone)));
    }

    #[test]
    fn a_full_socket_times_out() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let socket = Socket::from_fd(ours.into()).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        let much = vec![0; 32 << 20];
        assert!(matches!(socket.write_all(&much, deadline), Err(Error::Timeout { .. })));
    }
}
