//! A lab guest with `defib guard` beside it, as an operator would run it: a process of its own whose
//! JSON events are read from its stdout. What the events mean is for the caller.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::running;
use crate::lab::{Kernel, Running, VmmConfig, VmmGuest, drivers};
use crate::{Error, Result};

/// How long a guard may take to detach after SIGTERM.
const DETACH_LIMIT: Duration = Duration::from_secs(20);

/// How a guard is started.
#[derive(Clone, Debug)]
pub struct GuardConfig {
    /// The `defib` program.
    pub program: PathBuf,
    /// Where incidents go.
    pub incidents: PathBuf,
    /// More arguments of `defib guard`.
    pub arguments: Vec<String>,
}

impl GuardConfig {
    /// A guard that knows a lab kernel and the corpus' drivers by their debug files.
    ///
    /// # Errors
    /// When the drivers can't be built.
    pub fn with_debug_files(
        program: impl Into<PathBuf>,
        kernel: &Kernel,
        incidents: impl Into<PathBuf>,
    ) -> Result<Self> {
        let mut arguments = Vec::new();
        let mut add = |flag: &str, path: &Path| {
            arguments.extend([flag.to_owned(), path.display().to_string()]);
        };
        if let Some(vmlinux) = kernel.vmlinux() {
            add("--vmlinux", &vmlinux);
        }
        let built = drivers(kernel)?;
        if let Some(folder) = built.first().and_then(|driver| driver.with_debug.parent()) {
            add("--debug-dir", folder);
        }
        Ok(Self { program: program.into(), incidents: incidents.into(), arguments })
    }
}

/// A running guard. Dropped, it is asked to detach, and killed if it does not.
pub struct Guard {
    child: Child,
    _running: Running,
    events: Receiver<Value>,
    stderr: PathBuf,
}

impl Guard {
    /// Starts a guard on the VM behind a QMP socket. Its messages go to `guard.log` in the incidents'
    /// folder.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(config: &GuardConfig, qmp: &Path) -> Result<Self> {
        let incidents = &config.incidents;
        std::fs::create_dir_all(incidents).map_err(Error::file("cannot make", incidents))?;
        let stderr = incidents.join("guard.log");
        let log = std::fs::File::create(&stderr).map_err(Error::file("cannot write", &stderr))?;
        let mut command = Command::new(&config.program);
        command
            .arg("guard")
            .arg("--json")
            .arg("--qmp")
            .arg(qmp)
            .arg("--incidents")
            .arg(&config.incidents)
            .args(&config.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        let (child, running) = running::start(&mut command, Vec::new())
            .map_err(Error::file("cannot start", &config.program))?;
        Ok(Self::of(child, running, stderr))
    }

    /// Boots a guest in the minimal VMM, whose guard is in its own process. Its messages go to `guard.log` in the
    /// incidents' folder.
    ///
    /// # Errors
    /// As [`VmmGuest::boot`].
    pub fn start_in_vmm(config: &GuardConfig, vmm: &VmmConfig) -> Result<(VmmGuest, Self)> {
        let incidents = &config.incidents;
        std::fs::create_dir_all(incidents).map_err(Error::file("cannot make", incidents))?;
        let stderr = incidents.join("guard.log");
        let mut arguments = vec!["--incidents".to_owned(), incidents.display().to_string()];
        arguments.extend(config.arguments.iter().cloned());
        let (guest, child, running) = VmmGuest::boot(vmm, &arguments, &stderr)?;
        Ok((guest, Self::of(child, running, stderr)))
    }

    /// Reads the events of a process that prints them on its stdout.
    fn of(mut child: Child, running: Running, stderr: PathBuf) -> Self {
        let (sender, events) = channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(std::result::Result::ok);
                for event in lines.filter_map(|line| serde_json::from_str(&line).ok()) {
                    if sender.send(event).is_err() {
                        return;
                    }
                }
            });
        }
        Self { child, _running: running, events, stderr }
    }

    /// The process.
    pub fn process(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The next event of that name; events before it are dropped.
    ///
    /// # Errors
    /// [`Error::Timeout`] when it does not come in time or the guard ends; the guard's messages are in
    /// the error.
    pub fn await_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        self.await_any(&[name], limit)
    }

    /// The next event of one of these names; events before it are dropped.
    ///
    /// # Errors
    /// As [`Guard::await_event`].
    pub fn await_any(&mut self, names: &[&str], limit: Duration) -> Result<Value> {
        let until = Instant::now() + limit;
        loop {
            match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    let name = event.get("event").and_then(Value::as_str).unwrap_or_default();
                    if names.contains(&name) {
                        return Ok(event);
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(Error::Guard {
                        waited_for: names.join(" or "),
                        said: std::fs::read_to_string(&self.stderr).unwrap_or_default(),
                    });
                }
            }
        }
    }

    /// The events that have come so far.
    pub fn drain(&mut self) -> Vec<Value> {
        self.events.try_iter().collect()
    }

    /// Process id of the guard.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to detach and waits for its end.
    ///
    /// # Errors
    /// [`Error::Guard`] when it does not end in time.
    pub fn detach(mut self) -> Result<ExitStatus> {
        self.end()
    }

    fn end(&mut self) -> Result<ExitStatus> {
        // One that has ended may have given its number to another process.
        if let Ok(Some(status)) = self.child.try_wait() {
            return Ok(status);
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let until = Instant::now() + DETACH_LIMIT;
        while Instant::now() < until {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        Err(Error::Guard {
            waited_for: "its end".into(),
            said: std::fs::read_to_string(&self.stderr).unwrap_or_default(),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.end();
        }
    }
}
