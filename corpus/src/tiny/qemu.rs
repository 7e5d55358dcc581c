//! The tiny guest running in QEMU, with a QMP socket for a guard. What it is and its cases are in `tiny.rs`.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::{Case, Exit, Tiny};
use crate::{Error, Result};

/// How long anything may take that a healthy guest does within a second.
const LIMIT: Duration = Duration::from_secs(30);
/// How long one look at the serial port may take.
const LOOK: Duration = Duration::from_millis(20);

/// A tiny guest that computes and waits for [`Running::crash`]. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    qemu: Child,
    serial: UnixStream,
    text: Vec<u8>,
    folder: tempfile::TempDir,
}

impl Running {
    /// Boots the guest on TCG with two CPUs and room for memory to be added, up to `ready`.
    ///
    /// # Errors
    /// [`Error::Start`] without QEMU; [`Error::QemuEnded`]; [`Error::Timeout`] with the serial text.
    pub fn start(tiny: &Tiny, case: &Case) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("tiny-guest.").tempdir();
        let folder = folder.map_err(Error::file("create a folder in", &std::env::temp_dir()))?;
        let qemu = command(tiny, case, folder.path()).spawn();
        let mut qemu = qemu.map_err(|source| Error::Start { program: QEMU.into(), source })?;
        let serial = match connect(&mut qemu, &folder.path().join("serial")) {
            Ok(serial) => serial,
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                return Err(error);
            }
        };
        let mut running = Self { qemu, serial, text: Vec::new(), folder };
        running.await_text("ready\n")?;
        Ok(running)
    }

    /// The QMP socket: nobody else uses it.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    /// Lets the guest come to its case. Returns at once.
    ///
    /// # Errors
    /// [`Error::File`] when the serial port is gone.
    pub fn crash(&mut self) -> Result<()> {
        let sent = self.serial.write_all(b"g");
        sent.map_err(Error::file("write to", &self.folder.path().join("serial")))
    }

    /// How the guest ended; `None` if not by itself.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it goes on for longer than 30 s.
    pub fn wait(&mut self) -> Result<Option<Exit>> {
        let until = Instant::now() + LIMIT;
        loop {
            self.look()?;
            if let Some(status) = self.ended()? {
                while self.look()? {}
                let code = status.code().and_then(|code| u8::try_from(code / 2).ok());
                return Ok(code.filter(|_| status.code() != Some(0)).and_then(Exit::of_code));
            }
            if Instant::now() > until {
                return Err(self.timeout("its end"));
            }
        }
    }

    /// What it has printed so far, as far as it was waited for.
    #[must_use]
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }

    fn await_text(&mut self, wanted: &str) -> Result<()> {
        let until = Instant::now() + LIMIT;
        while !self.serial().contains(wanted) {
            if !self.look()?
                && let Some(status) = self.ended()?
            {
                return Err(Error::QemuEnded { status, output: self.serial() });
            }
            if Instant::now() > until {
                return Err(self.timeout(wanted.trim_end()));
            }
        }
        Ok(())
    }

    /// Takes what the serial port has; `false` when that was nothing.
    fn look(&mut self) -> Result<bool> {
        let mut bytes = [0; 4096];
        match self.serial.read(&mut bytes) {
            Ok(count) => {
                self.text.extend(bytes.iter().take(count));
                Ok(count > 0)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            // QEMU's end, with bytes of ours that it has not read.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(Error::file("read", &self.folder.path().join("serial"))(error)),
        }
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.qemu.try_wait().map_err(|source| Error::Start { program: QEMU.into(), source })
    }

    fn timeout(&self, what: &str) -> Error {
        Error::Timeout { what: what.to_owned(), limit: LIMIT, console: self.serial() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The program.
const QEMU: &str = "qemu-system-x86_64";

fn command(tiny: &Tiny, case: &Case, folder: &Path) -> Command {
    let socket = |name: &str| format!("unix:{},server=on,wait=off", folder.join(name).display());
    let mut command = Command::new(QEMU);
    command
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-accel", "tcg", "-cpu", "max"])
        .args(["-machine", "q35,memory-backend=ram", "-smp", "2", "-m", "64,slots=4,maxmem=1G"])
        .args(["-object", "memory-backend-memfd,id=ram,size=64M,share=on"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-append", &case.command_line(true)])
        .args(["-serial", &socket("serial"), "-qmp", &socket("qmp")])
        .arg("-kernel")
        .arg(&tiny.kernel)
        .arg("-initrd")
        .arg(&tiny.driver)
        .stdin(Stdio::null());
    command
}

/// The serial port, as soon as QEMU listens.
fn connect(qemu: &mut Child, path: &Path) -> Result<UnixStream> {
    let until = Instant::now() + LIMIT;
    loop {
        let error = match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(LOOK)).map_err(Error::file("use", path))?;
                return Ok(stream);
            }
            Err(error) => error,
        };
        if let Ok(Some(status)) = qemu.try_wait() {
            return Err(Error::QemuEnded { status, output: String::new() });
        }
        if Instant::now() > until {
            return Err(Error::file("connect to", path)(error));
        }
        std::thread::sleep(LOOK);
    }
}
