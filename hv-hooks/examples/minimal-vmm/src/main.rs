//! The `minimal-vmm` command: arguments, and a guard whose events go to the screen.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::JoinHandle;

use clap::Parser;
use guard::{EventLines, KnowledgeSources, Observer, Options, in_one_line};
use minimal_vmm::guard_thread::{self, Tally};
use minimal_vmm::{Config, Exit, Result, SerialEnd, Vmm};

/// Exit codes, printed under `--help`.
const EXIT_CODES: &str = "Exit codes:
  0  the guest switched itself off or reset itself
  1  KVM could not run the guest on, or a crash was not survived
  2  usage or set-up error; /dev/kvm is missing or not permitted
  n  the guest wrote c to port 0xf4: c * 2 + 1, as QEMU's isa-debug-exit";

/// Boots a kernel on KVM, with a guard inside that repairs it when it crashes.
#[derive(Debug, Parser)]
#[command(name = "minimal-vmm", version, after_help = EXIT_CODES)]
struct Arguments {
    /// Uncompressed vmlinux with a PVH entry point.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// initrd.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    cmdline: String,
    /// RAM.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u8,
    /// File that becomes a virtio block device.
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// The serial console: `stdio`, or `unix:PATH` to listen on.
    #[arg(long, value_name = "END", default_value = "stdio", value_parser = serial_end)]
    serial: SerialEnd,
    /// Run without guard: crashes take their stock course.
    #[arg(long)]
    no_guard: bool,
    /// vmlinux with DWARF of the guest's kernel, for the guard.
    #[arg(long, value_name = "FILE")]
    vmlinux: Option<PathBuf>,
    /// Directory with debug files, for the guard; may be repeated.
    #[arg(long, value_name = "DIR")]
    debug_dir: Vec<PathBuf>,
    /// Directory that keeps compiled kernel layers, by build id.
    #[arg(long, value_name = "DIR", env = "DEFIB_CACHE")]
    cache: Option<PathBuf>,
    /// Directory that incidents are written to; without it they are only told.
    #[arg(long, value_name = "DIR")]
    incidents: Option<PathBuf>,
    /// Events as JSON lines on stdout instead of text on stderr.
    #[arg(long)]
    json: bool,
}

fn serial_end(text: &str) -> std::result::Result<SerialEnd, String> {
    match (text, text.strip_prefix("unix:")) {
        ("stdio", _) => Ok(SerialEnd::Stdio),
        (_, Some(path)) if !path.is_empty() => Ok(SerialEnd::Unix(path.into())),
        _ => Err("neither stdio nor unix:PATH".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("minimal-vmm: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut vmm = Vmm::new(&Config {
        kernel: arguments.kernel.clone(),
        initrd: arguments.initrd.clone(),
        cmdline: arguments.cmdline.clone(),
        memory_mib: arguments.memory,
        vcpus: arguments.vcpus,
        disk: arguments.disk.clone(),
        serial: arguments.serial.clone(),
    })?;
    let guard = if arguments.no_guard { None } else { Some(start_guard(arguments, &mut vmm)?) };
    vmm.start()?;
    let waited = vmm.wait(None);
    let exit = vmm.stop()?;
    let tally = guard.map(end_of_guard).unwrap_or_default();
    waited?;
    eprintln!("minimal-vmm: {exit}");
    Ok(match exit {
        Exit::Code(code) => ExitCode::from(code.wrapping_mul(2) | 1),
        Exit::PowerOff | Exit::Reset if tally.lost == 0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

type GuardThread = JoinHandle<std::result::Result<Tally, guard::Error>>;

fn start_guard(arguments: &Arguments, vmm: &mut Vmm) -> Result<GuardThread> {
    let machine = vmm.guard()?;
    let cache = arguments.cache.clone().unwrap_or_else(KnowledgeSources::default_cache);
    let options = Options {
        knowledge: KnowledgeSources {
            vmlinux: arguments.vmlinux.clone(),
            debug_dirs: arguments.debug_dir.clone(),
            cache: Some(cache),
        },
        incidents: arguments.incidents.clone(),
        ..Options::default()
    };
    let lines = EventLines::new(arguments.json);
    let observer = move || Box::new(lines.clone()) as Box<dyn Observer + Send>;
    guard_thread::start(machine, options, observer, vmm.has_ended())
}

/// What the guard did; a guard that failed is told and loses nothing: the guest ran on without it.
fn end_of_guard(guard: GuardThread) -> Tally {
    match guard.join() {
        Ok(Ok(tally)) => return tally,
        Ok(Err(error)) => eprintln!("minimal-vmm: the guard gave up: {}", in_one_line(&error)),
        Err(_) => eprintln!("minimal-vmm: the guard's thread panicked"),
    }
    Tally::default()
}
