//! A lab guest in a QEMU of its own: its options, its start and its end. Restoring one from a snapshot
//! is in [`super::snapshot`].

use std::fs;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use serde_json::json;
use tempfile::TempDir;

use super::agent::Agent;
use super::build;
use super::disk;
use super::initramfs;
use super::kernel::Kernel;
use super::qmp::Qmp;
use super::running;
use super::running::Running;
use crate::Error;
use crate::Result;

/// How long a guest may take to boot under TCG on a loaded machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long QEMU may take to open its sockets.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How much of the console an error shows, in bytes.
const CONSOLE_SHOWN: usize = 2000;

/// Where the guest's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A file that others can map: `memory-backend-file,share=on` in /dev/shm.
    SharedFile,
    /// A memfd, mappable through /proc/PID/fd: `memory-backend-memfd,share=on`.
    Memfd,
    /// QEMU's default: private anonymous memory.
    Anonymous,
}

/// The board that QEMU emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// `pc`: i440FX with PIIX.
    Pc,
    /// `q35`: PCI Express.
    Q35,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU translates them: any host.
    Tcg,
    /// The CPU itself: a host with hardware KVM.
    Kvm,
}

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The kernel to boot.
    pub kernel: Kernel,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Where the memory is.
    pub backend: Backend,
    /// Slots for memory to be added to the running VM (`slots=4,maxmem=` memory + 1 GiB).
    pub slots: bool,
    /// The board.
    pub machine: Machine,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// QEMU's `edu` device, which `crash_irq` drives.
    pub edu: bool,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// `-cpu`, when not QEMU's default.
    pub cpu: Option<String>,
    /// More arguments for QEMU.
    pub extra_args: Vec<String>,
    /// `oops=panic` on the kernel's command line.
    pub panic_on_oops: bool,
    /// `panic=` on the kernel's command line: seconds to the reboot, -1 at once, 0 never.
    pub panic_timeout: i32,
    /// Whether a reboot starts the guest again; otherwise QEMU ends.
    pub reboot: bool,
    /// More words for the kernel's command line.
    pub kernel_args: String,
    /// The data disk's size in MiB.
    pub disk_mib: u64,
}

impl VmConfig {
    /// The usual lab guest: 256 MiB in a shared file, 2 vCPUs, an oops is a panic, a panic stays.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            memory_mib: 256,
            vcpus: 2,
            backend: Backend::SharedFile,
            slots: true,
            machine: Machine::Pc,
            accelerator: Accelerator::Tcg,
            edu: true,
            qemu: PathBuf::from("qemu-system-x86_64"),
            cpu: None,
            extra_args: Vec::new(),
            panic_on_oops: true,
            panic_timeout: 0,
            reboot: false,
            kernel_args: String::new(),
            disk_mib: 64,
        }
    }

    /// The kernel's command line.
    fn command_line(&self) -> String {
        let oops = if self.panic_on_oops { " oops=panic" } else { "" };
        format!("console=ttyS0 quiet{oops} panic={} {}", self.panic_timeout, self.kernel_args)
    }

    /// QEMU's arguments for the board, memory and devices; the run's own files come on top.
    fn arguments(&self, files: &RunFiles) -> Result<Vec<String>> {
        let slots = match self.slots {
            true => format!(",slots=4,maxmem={}M", self.memory_mib + 1024),
            false => String::new(),
        };
        let size = format!("size={}M", self.memory_mib);
        let machine = match self.machine {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
        };
        let memory = match self.backend {
            Backend::SharedFile => Some(format!(
                "memory-backend-file,id=ram,{size},mem-path={},share=on",
                files.ram().display()
            )),
            Backend::Memfd => Some(format!("memory-backend-memfd,id=ram,{size},share=on")),
            Backend::Anonymous => None,
        };
        let backend = if memory.is_some() { ",memory-backend=ram" } else { "" };
        let mut words: Vec<String> = Vec::new();
        let mut add = |text: &[&str]| words.extend(text.iter().map(|word| (*word).to_owned()));
        let accelerator = match self.accelerator {
            Accelerator::Tcg => "tcg,thread=multi",
            Accelerator::Kvm => "kvm",
        };
        add(&["-machine", &format!("{machine}{backend}"), "-accel", accelerator]);
        add(&["-m", &format!("{}M{slots}", self.memory_mib), "-smp", &self.vcpus.to_string()]);
        if let Some(memory) = &memory {
            add(&["-object", memory]);
        }
        if let Some(cpu) = &self.cpu {
            add(&["-cpu", cpu]);
        }
        add(&["-display", "none", "-monitor", "none", "-nic", "none"]);
        let drive =
            format!("if=none,id=data,format=raw,cache=unsafe,file={}", files.disk().display());
        add(&["-drive", &drive, "-device", "virtio-blk-pci,drive=data"]);
        if self.edu {
            add(&["-device", "edu"]);
        }
        if !self.reboot {
            add(&["-no-reboot"]);
        }
        add(&["-kernel", &self.kernel.vmlinuz().to_string_lossy()]);
        add(&["-initrd", &initramfs::path(&self.kernel)?.to_string_lossy()]);
        add(&["-append", &self.command_line()]);
        words.extend(self.extra_args.iter().cloned());
        Ok(words)
    }
}

/// The files of one running VM, by their names in its run folder.
#[derive(Clone, Debug)]
pub(crate) struct RunFiles {
    dir: PathBuf,
    ram_dir: PathBuf,
}

impl RunFiles {
    pub(crate) fn ram(&self) -> PathBuf {
        self.ram_dir.join("ram")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    fn serial(&self) -> PathBuf {
        self.dir.join("serial.log")
    }

    fn messages(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn channels(&self) -> Vec<String> {
        let qmp = |name: &str| format!("unix:{},server=on,wait=off", self.socket(name).display());
        let chardev = format!(
            "socket,id=agent,path={},server=on,wait=off",
            self.socket("agent.sock").display()
        );
        [
            "-qmp",
            &qmp("qmp.sock"),
            "-qmp",
            &qmp("lab.sock"),
            "-serial",
            &format!("file:{}", self.serial().display()),
            "-chardev",
            &chardev,
            "-serial",
            "chardev:agent",
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

/// The folders of one VM; they go when this is dropped.
#[derive(Debug)]
pub(crate) struct Run {
    dir: TempDir,
    ram_dir: TempDir,
}

impl Run {
    pub(crate) fn new() -> Result<Self> {
        let folder = |parent: &Path| {
            tempfile::Builder::new()
                .prefix("defib-vm.")
                .tempdir_in(parent)
                .map_err(Error::file("create a folder in", parent))
        };
        let run =
            Self { dir: folder(&std::env::temp_dir())?, ram_dir: folder(Path::new("/dev/shm"))? };
        // A later process that is to remove the run finds its memory through this.
        let link = run.dir.path().join("ram");
        std::os::unix::fs::symlink(run.ram_dir.path(), &link)
            .map_err(Error::file("link", &link))?;
        Ok(run)
    }

    pub(crate) fn files(&self) -> RunFiles {
        RunFiles { dir: self.dir.path().to_owned(), ram_dir: self.ram_dir.path().to_owned() }
    }
}

/// A running guest. Dropping it kills its QEMU and removes its files.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    /// Goes with this VM, so that one that is left to itself outlives the lab's end.
    _running: Running,
    run: Option<Run>,
    files: RunFiles,
    agent: Agent,
    control: Qmp,
    config: VmConfig,
    took: Duration,
}

impl Vm {
    /// Boots a guest and waits until its agent answers.
    ///
    /// # Errors
    /// [`Error::QemuEnded`] with QEMU's messages, [`Error::Timeout`] with the console's end, or what
    /// went wrong while the boot image was built.
    pub fn boot(config: &VmConfig) -> Result<Self> {
        let run = Run::new()?;
        disk::create(&run.files().disk(), config.disk_mib)?;
        let mut vm = Self::start(config, run, &[])?;
        let guest = vm.wait_for_agent(BOOT_LIMIT)?;
        vm.took += guest;
        Ok(vm)
    }

    /// Starts QEMU on a prepared run and connects to it.
    pub(crate) fn start(config: &VmConfig, run: Run, more: &[&str]) -> Result<Self> {
        let files = run.files();
        let messages = files.messages();
        let log = File::create(&messages).map_err(Error::file("create", &messages))?;
        let begin = Instant::now();
        let mut command = Command::new(&config.qemu);
        command
            .args(config.arguments(&files)?)
            .args(files.channels())
            .args(more)
            // A ^C for the lab's user must reach the lab, which then ends QEMU in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let folders = vec![run.dir.path().to_owned(), run.ram_dir.path().to_owned()];
        let (mut child, running) = running::start(&mut command, folders).map_err(|source| {
            Error::Start { program: config.qemu.display().to_string(), source }
        })?;
        match connect(&mut child, &files) {
            Ok((control, agent)) => Ok(Self {
                child,
                _running: running,
                run: Some(run),
                files,
                agent,
                control,
                config: config.clone(),
                took: begin.elapsed(),
            }),
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    /// Waits until the agent answers: after the start, or after the guest rebooted by itself. Gives how
    /// long that took.
    ///
    /// # Errors
    /// [`Error::Timeout`] with the console's end, [`Error::QemuEnded`] when there is nothing to wait for.
    pub fn wait_for_agent(&mut self, limit: Duration) -> Result<Duration> {
        let begin = Instant::now();
        while begin.elapsed() < limit {
            if self.agent.answers(Duration::from_millis(500)) {
                return Ok(begin.elapsed());
            }
            still_runs(&mut self.child, &self.files)?;
        }
        Err(Error::Timeout {
            what: "the agent's answer".to_owned(),
            limit,
            console: self.console_end(),
        })
    }

    /// The socket of the monitor that is free for a guard.
    pub fn qmp(&self) -> PathBuf {
        self.files.socket("qmp.sock")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The channel to the guest's agent.
    pub fn agent(&mut self) -> &mut Agent {
        &mut self.agent
    }

    /// The lab's own monitor.
    pub fn control(&mut self) -> &mut Qmp {
        &mut self.control
    }

    /// The file with what the guest printed on its console.
    pub fn serial_log(&self) -> PathBuf {
        self.files.serial()
    }

    /// What the guest printed on its console so far.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.files.serial()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The file of the guest's memory, for [`Backend::SharedFile`].
    pub fn ram_file(&self) -> Option<PathBuf> {
        (self.config.backend == Backend::SharedFile).then(|| self.files.ram())
    }

    /// The run folder: sockets, logs, disk.
    pub fn run_dir(&self) -> &Path {
        &self.files.dir
    }

    /// What the VM is made of.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// From the start of QEMU, or of the restore, to the agent's first answer.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// For a guest whose way to its first answer is not only QEMU's.
    pub(crate) fn set_took(&mut self, time: Duration) {
        self.took = time;
    }

    pub(crate) fn files(&self) -> &RunFiles {
        &self.files
    }

    pub(crate) fn console_end(&self) -> String {
        build::tail(&self.console(), CONSOLE_SHOWN).to_owned()
    }

    /// Waits for QEMU's own end, as after a panic with `panic=-1` and no reboot.
    ///
    /// # Errors
    /// [`Error::File`] when the process cannot be waited for.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            let status =
                self.child.try_wait().map_err(Error::file("wait for", &self.config.qemu))?;
            if status.is_some() || Instant::now() > end {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the guest in order (disk written back and read-only) and checks its file system.
    ///
    /// # Errors
    /// [`Error::Agent`] when the guest cannot write back, [`Error::Program`] with e2fsck's findings.
    pub fn finish_and_check_disk(mut self) -> Result<()> {
        self.agent.command("quiesce")?;
        // QEMU may end before it has answered.
        let _ = self.control.command("quit", json!({}));
        self.wait_exit(START_LIMIT)?;
        disk::check(&self.files.disk())
    }

    /// Lets a guest run that stands.
    ///
    /// # Errors
    /// [`Error::Qmp`] when QEMU does not.
    pub fn go_on(&mut self) -> Result<()> {
        self.control.command("cont", json!({})).map(drop)
    }

    /// Leaves the VM running on its own; [`stop`] ends it later. Gives its run folder.
    pub fn leave(mut self) -> PathBuf {
        if let Some(run) = self.run.take() {
            let _ = run.dir.keep();
            let _ = run.ram_dir.keep();
        }
        self.files.dir.clone()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Without its run folder the VM was left to itself.
        if self.run.is_some() {
            end(&mut self.child);
        }
    }
}

fn end(child: &mut Child) {
    // Both fail only when it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

fn still_runs(child: &mut Child, files: &RunFiles) -> Result<()> {
    let status = child.try_wait().map_err(Error::file("wait for", &files.dir))?;
    match status {
        None => Ok(()),
        Some(status) => {
            let output = fs::read_to_string(files.messages()).unwrap_or_default();
            Err(Error::QemuEnded { status, output: build::tail(&output, CONSOLE_SHOWN).to_owned() })
        }
    }
}

fn connect(child: &mut Child, files: &RunFiles) -> Result<(Qmp, Agent)> {
    let limit = Instant::now() + START_LIMIT;
    let socket = files.socket("lab.sock");
    loop {
        // QEMU makes the sockets in the order of its arguments, then serves them.
        match Agent::connect(&files.socket("agent.sock")) {
            Ok(agent) => match Qmp::connect(&socket) {
                Ok(control) => return Ok((control, agent)),
                Err(error) => {
                    // A QEMU that does not like its arguments says why, and is about to end.
                    thread::sleep(Duration::from_millis(200));
                    still_runs(child, files)?;
                    return Err(error);
                }
            },
            Err(error) if Instant::now() > limit => return Err(error),
            Err(_) => still_runs(child, files)?,
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Ends a VM that was left running, by its run folder, and removes its files.
///
/// # Errors
/// [`Error::File`] when the folder is not a run folder or cannot be removed.
pub fn stop(run_dir: &Path) -> Result<()> {
    let link = run_dir.join("ram");
    let ram_dir = fs::read_link(&link).map_err(Error::file("read", &link))?;
    if let Ok(mut control) = Qmp::connect(&run_dir.join("lab.sock")) {
        let _ = control.command("quit", json!({}));
    }
    fs::remove_dir_all(&ram_dir).map_err(Error::file("remove", &ram_dir))?;
    fs::remove_dir_all(run_dir).map_err(Error::file("remove", run_dir))
}
