//! A lab guest in the minimal VMM, which has the guard in its own process: one program to start, whose events are the
//! guard's. For hosts with hardware KVM; a guest in QEMU is in [`super::vm`].

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use tempfile::TempDir;

use super::agent::Agent;
use super::disk;
use super::initramfs;
use super::kernel::Kernel;
use super::running;
use super::running::Running;
use crate::Error;
use crate::Result;

/// How long the VMM may take to open its socket, and the guest to boot: a nested host is slow.
const START_LIMIT: Duration = Duration::from_secs(20);
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Size of the data disk, MiB.
const DISK_MIB: u64 = 64;
/// The agent has the serial port, so the kernel's console is nowhere; its log is read by the agent.
const COMMAND_LINE: &str = "quiet oops=panic panic=0 console=null agent=ttyS0";

/// What the guest is made of.
#[derive(Clone, Debug)]
pub struct VmmConfig {
    /// The `minimal-vmm` program.
    pub program: PathBuf,
    /// The kernel to boot; its vmlinux must be there.
    pub kernel: Kernel,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
}

/// A guest that runs. The process is the caller's, since its output is the guard's.
#[derive(Debug)]
pub struct VmmGuest {
    agent: Agent,
    dir: TempDir,
}

impl VmmGuest {
    /// Boots a guest under guard and waits until its agent answers. The process prints the guard's events on its
    /// stdout, which is piped; its messages go to `messages`.
    ///
    /// # Errors
    /// [`Error::Start`]; [`Error::NoKernel`] without vmlinux; [`Error::Timeout`] when the guest does not come up.
    pub fn boot(
        config: &VmmConfig,
        guard_arguments: &[String],
        messages: &Path,
    ) -> Result<(Self, Child, Running)> {
        let dir = tempfile::Builder::new().prefix("defib-vmm.").tempdir();
        let dir = dir.map_err(Error::file("create a folder in", &std::env::temp_dir()))?;
        disk::create(&dir.path().join("disk.img"), DISK_MIB)?;
        let log = File::create(messages).map_err(Error::file("create", messages))?;
        let mut command = command(config, dir.path())?;
        let (mut child, running) =
            running::start(command.args(guard_arguments).stderr(log), vec![dir.path().to_owned()])
                .map_err(|source| Error::Start {
                    program: config.program.display().to_string(),
                    source,
                })?;
        match connect(&mut child, &dir.path().join("agent.sock"), messages) {
            Ok(agent) => Ok((Self { agent, dir }, child, running)),
            Err(error) => {
                // Both fail only when it has ended already.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The channel to the guest's agent.
    pub fn agent(&mut self) -> &mut Agent {
        &mut self.agent
    }

    /// Has the guest write back, switches it off and checks its file system.
    ///
    /// # Errors
    /// [`Error::Agent`] when it can't write back; [`Error::Timeout`] when it stays on; [`Error::Program`] with
    /// e2fsck's findings.
    pub fn finish_and_check_disk(mut self, child: &mut Child) -> Result<()> {
        self.agent.command("quiesce")?;
        // The guest ends before it can answer.
        let _ = self.agent.command_within("exec poweroff -f", Duration::from_secs(5));
        let until = Instant::now() + START_LIMIT;
        while child.try_wait().map_err(Error::file("wait for", self.dir.path()))?.is_none() {
            if Instant::now() > until {
                let what = "the end of the VMM".to_owned();
                return Err(Error::Timeout { what, limit: START_LIMIT, console: String::new() });
            }
            thread::sleep(Duration::from_millis(10));
        }
        disk::check(&self.dir.path().join("disk.img"))
    }
}

fn command(config: &VmmConfig, dir: &Path) -> Result<Command> {
    let kernel = &config.kernel;
    let vmlinux = kernel.needed_vmlinux()?;
    let mut command = Command::new(&config.program);
    command
        // A ^C for the lab's user must reach the lab, which then ends the guest in order.
        .process_group(0)
        .arg("--kernel")
        .arg(vmlinux)
        .arg("--initrd")
        .arg(initramfs::path(kernel)?)
        .args(["--cmdline", COMMAND_LINE, "--memory", &config.memory_mib.to_string()])
        .args(["--vcpus", &config.vcpus.to_string(), "--json"])
        .arg("--disk")
        .arg(dir.join("disk.img"))
        .arg("--serial")
        .arg(format!("unix:{}", dir.join("agent.sock").display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    Ok(command)
}

/// Connects to the serial port and waits for the agent behind it.
fn connect(child: &mut Child, socket: &Path, messages: &Path) -> Result<Agent> {
    let start = Instant::now();
    let said = || std::fs::read_to_string(messages).unwrap_or_default();
    let mut agent: Option<Agent> = None;
    while start.elapsed() < BOOT_LIMIT {
        if let Some(status) = child.try_wait().map_err(Error::file("wait for", socket))? {
            return Err(Error::QemuEnded { status, output: said() });
        }
        match agent.as_mut() {
            Some(up) => {
                if up.answers(Duration::from_millis(500)) {
                    break;
                }
            }
            None if start.elapsed() > START_LIMIT => agent = Some(Agent::connect(socket)?),
            None => {
                agent = Agent::connect(socket).ok();
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    let timeout =
        || Error::Timeout { what: "the agent's answer".into(), limit: BOOT_LIMIT, console: said() };
    agent.filter(|_| start.elapsed() < BOOT_LIMIT).ok_or_else(timeout)
}
