//! What the VMM's own thread waits for: the end, and input for the console.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::console::SerialEnd;
use crate::devices::Devices;
use crate::exit::{Ending, Exit};
use crate::{Error, Result};

/// Longest time between two looks at the clock, in milliseconds.
const SLICE: u64 = 1000;

/// Sources of events.
const END: u64 = 0;
const STDIN: u64 = 1;
const LISTENER: u64 = 2;
const PEER: u64 = 3;

/// The event loop.
pub struct EventLoop {
    epoll: Epoll,
}

impl EventLoop {
    pub fn new(ending: &Ending, devices: &Devices, serial: &SerialEnd) -> Result<Self> {
        let this = Self { epoll: Epoll::new().map_err(Error::host("epoll_create1"))? };
        this.watch(ending.event.as_raw_fd(), END).map_err(Error::host("epoll_ctl"))?;
        if let Some(listener) = devices.console.listener() {
            this.watch(listener, LISTENER).map_err(Error::host("epoll_ctl"))?;
        }
        if *serial == SerialEnd::Stdio {
            match this.watch(io::stdin().as_raw_fd(), STDIN) {
                // A file or /dev/null, which can't be waited for: a console without input.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
                watched => watched.map_err(Error::host("epoll_ctl"))?,
            }
        }
        Ok(this)
    }

    fn watch(&self, fd: RawFd, source: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, source))
    }

    /// Serves the console until the VM ends, at most `limit`.
    pub fn run(
        &self,
        ending: &Ending,
        devices: &Devices,
        limit: Option<Duration>,
    ) -> Result<Option<Exit>> {
        let start = Instant::now();
        loop {
            if let Some(exit) = ending.exit() {
                return Ok(Some(exit));
            }
            let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let slice = left.map_or(SLICE, |left| (left.as_millis() as u64 + 1).min(SLICE));
            let mut events = [EpollEvent::default(); 4];
            let count = match self.epoll.wait(slice as i32, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                count => count.map_err(Error::host("epoll_wait"))?,
            };
            for event in &events[..count] {
                self.serve(event.data(), devices).map_err(Error::host("serial console"))?;
            }
        }
    }

    fn serve(&self, source: u64, devices: &Devices) -> io::Result<()> {
        match source {
            STDIN => self.feed_from_stdin(devices),
            LISTENER => match devices.console.accept()? {
                Some(peer) => self.watch(peer, PEER),
                None => Ok(()),
            },
            // A peer that is gone leaves the epoll set when its descriptor closes.
            PEER => {
                devices.console.feed_from_peer();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn feed_from_stdin(&self, devices: &Devices) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let size = io::stdin().lock().read(&mut bytes)?;
        if size == 0 {
            let nothing = EpollEvent::default();
            return self.epoll.ctl(ControlOperation::Delete, io::stdin().as_raw_fd(), nothing);
        }
        devices.console.feed(&bytes[..size]);
        Ok(())
    }
}
