//! Arguments of the `defib` command, as typed. Checking them against the world is each command's job.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Exit codes, printed under `--help`.
const EXIT_CODES: &str = "Exit codes:
  0  done
  1  the guest could not be saved (rung 5 and up), or a check found something
  2  usage or set-up error";

/// Exit codes of `defib triage`, printed under its `--help`.
const TRIAGE_EXIT_CODES: &str = "Exit codes:
  0  all inputs were read
  1  some could not be read; the others are in the buckets
  2  usage or set-up error";

/// Exit codes of `defib diagnose`, printed under its `--help`.
const DIAGNOSE_EXIT_CODES: &str = "Exit codes:
  0  a crash was diagnosed, or the kernel log of a dump reports one
  1  the input was read and tells of no crash; what the machine was doing is printed all the same
  2  usage or set-up error: no dump and no log, damaged beyond reading, another kernel than the vmlinux's";

/// Brings crashed guests of a KVM host back in place.
#[derive(Debug, Parser)]
#[command(name = "defib", version, about, after_help = EXIT_CODES)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Sub-commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Stand beside a running VM and repair its kernel when it crashes.
    Guard(GuardArguments),
    /// Build, print or check a repair image.
    Image(ImageArguments),
    /// Diagnose the crash in a dump or console log, and tell what the machine was doing.
    Diagnose(DiagnoseArguments),
    /// Say what would be done about the crash in a dump, and why not more.
    Plan(PlanArguments),
    /// Sort many dumps and console logs into buckets, one a cause.
    Triage(TriageArguments),
    /// The crash corpus: list cases, or run them on lab VMs and print what was saved.
    Corpus(CorpusArguments),
    /// The main job, start to end, on a lab VM.
    Demo(DemoArguments),
}

/// Which VM.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Target {
    /// QMP socket of a running QEMU.
    #[arg(long, value_name = "SOCK")]
    pub qmp: Option<PathBuf>,
    /// Name of a VM (`-name`) running on this host.
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// Process id of a running QEMU.
    #[arg(long)]
    pub pid: Option<u32>,
}

/// Where knowledge of kernels comes from.
#[derive(Clone, Debug, Default, Args)]
pub struct KnowledgeSources {
    /// vmlinux with DWARF of the guest's kernel; its build id must be the guest's.
    #[arg(long, value_name = "FILE")]
    pub vmlinux: Option<PathBuf>,
    /// Directory with debug files (.build-id tree, vmlinux-*, *.ko, *.ko.debug); may be repeated.
    #[arg(long = "debug-dir", value_name = "DIR")]
    pub debug_dirs: Vec<PathBuf>,
    /// Directory that keeps compiled kernel layers, by build id.
    #[arg(long, value_name = "DIR", env = "DEFIB_CACHE")]
    pub cache: Option<PathBuf>,
}

/// What stands under `defib guard --help`.
fn guard_help() -> String {
    format!(
        "A policy file holds any of these keys; shown are the defaults:\n\n{}\n{EXIT_CODES}",
        quarantine::Policy::defaults_text()
    )
}

/// Arguments of `defib guard`.
#[derive(Debug, Args)]
#[command(after_long_help = guard_help())]
pub struct GuardArguments {
    /// Which VM.
    #[command(flatten)]
    pub target: Target,
    /// gdb stub socket that the VM's owner already switched on, to be taken over.
    #[arg(long, value_name = "SOCK")]
    pub gdb: Option<PathBuf>,
    /// Knowledge of the guest's kernel.
    #[command(flatten)]
    pub knowledge: KnowledgeSources,
    /// Policy file (TOML).
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Directory that incidents are written to.
    #[arg(long, value_name = "DIR", default_value = "incidents")]
    pub incidents: PathBuf,
    /// Diagnose and plan, but write nothing to the guest: crashes take their stock course.
    #[arg(long)]
    pub dry_run: bool,
    /// Leave after the first incident.
    #[arg(long)]
    pub once: bool,
    /// One JSON object a line on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `defib image`.
#[derive(Debug, Args)]
pub struct ImageArguments {
    /// What to do with the image.
    #[command(subcommand)]
    pub action: ImageAction,
}

/// Actions of `defib image`.
#[derive(Debug, Subcommand)]
pub enum ImageAction {
    /// Compile a kernel layer from a vmlinux, or take a whole image from a running VM.
    Build {
        /// Running VM to take the guest layer from.
        #[arg(long, value_name = "SOCK")]
        qmp: Option<PathBuf>,
        /// Knowledge of the kernel.
        #[command(flatten)]
        knowledge: KnowledgeSources,
        /// File to write.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Print what an image holds.
    Inspect {
        /// Image file.
        image: PathBuf,
        /// Symbolize these link addresses (hex) too.
        #[arg(long, value_name = "ADDR")]
        address: Vec<String>,
    },
    /// Compare an image with a running VM: build id, text and read-only data.
    Verify {
        /// Image file, with a guest layer.
        image: PathBuf,
        /// QMP socket of the VM.
        #[arg(long, value_name = "SOCK")]
        qmp: PathBuf,
    },
}

/// Arguments of `defib diagnose`.
#[derive(Debug, Args)]
#[command(after_long_help = DIAGNOSE_EXIT_CODES)]
pub struct DiagnoseArguments {
    /// Dump of any known format (all parts of a split one), or a console log.
    #[arg(required = true, value_name = "DUMP|LOG")]
    pub inputs: Vec<PathBuf>,
    /// Knowledge of the kernel in the dump; a console log needs none.
    #[command(flatten)]
    pub knowledge: KnowledgeSources,
    /// Policy file (TOML) for the repair that would have been made.
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Output format.
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    pub format: ReportFormat,
    /// File to write instead of stdout.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Output formats of `defib diagnose`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// For people.
    Text,
    /// For scripts: docs/diagnose.md.
    Json,
    /// A page for a browser.
    Html,
}

/// Arguments of `defib plan`.
#[derive(Debug, Args)]
pub struct PlanArguments {
    /// A dump in any of the formats that `defib diagnose` reads.
    pub dump: PathBuf,
    /// Knowledge of the kernel in the dump.
    #[command(flatten)]
    pub knowledge: KnowledgeSources,
    /// Policy file (TOML).
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// Arguments of `defib triage`.
#[derive(Debug, Args)]
#[command(after_long_help = TRIAGE_EXIT_CODES)]
pub struct TriageArguments {
    /// Dumps, console logs, and directories that are searched for both.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Knowledge of the kernels in the dumps; console logs need none.
    #[command(flatten)]
    pub knowledge: KnowledgeSources,
    /// Keep in this file what was read, and don't read it again.
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Output format.
    #[arg(long, value_enum, default_value_t = TriageFormat::Text)]
    pub format: TriageFormat,
    /// File to write instead of stdout.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Output formats of `defib triage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TriageFormat {
    /// For people.
    Text,
    /// For scripts: docs/triage.md.
    Json,
    /// A page for a browser.
    Html,
}

/// Arguments of `defib corpus`.
#[derive(Debug, Args)]
pub struct CorpusArguments {
    /// What to do.
    #[command(subcommand)]
    pub action: CorpusAction,
}

/// Actions of `defib corpus`.
#[derive(Debug, Subcommand)]
pub enum CorpusAction {
    /// List the cases.
    List,
    /// Run cases on lab VMs under guard and print what was saved.
    Run(RunArguments),
    /// Change instructions of loaded drivers while a workload uses them, and print what came of each change.
    Inject(InjectArguments),
    /// Many crashes one after the other on one VM under one guard.
    Sitting(SittingArguments),
}

/// What a lab guest is made of.
#[derive(Clone, Debug, Args)]
pub struct LabArguments {
    /// Kernel of the guest: 6.1, 6.12, or what else `scripts/setup` was asked for (6.1-generic, 6.12-generic).
    #[arg(long, default_value = "6.1")]
    pub kernel: String,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=4))]
    pub vcpus: u32,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(256..=16384))]
    pub memory: u64,
}

/// Arguments of `defib corpus run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Names of cases; all when none is given.
    pub cases: Vec<String>,
    /// The guest.
    #[command(flatten)]
    pub lab: LabArguments,
    /// What the guests run on.
    #[arg(long, value_enum, default_value_t = On::Auto)]
    pub on: On,
    /// The minimal VMM's program, for `--on vmm`; else it is looked for beside this one.
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// Run each case without guard too, with kernel.panic_on_oops=1 and =0.
    #[arg(long)]
    pub stock: bool,
    /// Guests that run at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub jobs: u8,
    /// One JSON object per case on stdout, and one with the sums.
    #[arg(long)]
    pub json: bool,
    /// Write the results as a page.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Arguments of `defib corpus inject`.
#[derive(Debug, Args)]
pub struct InjectArguments {
    /// The guest.
    #[command(flatten)]
    pub lab: LabArguments,
    /// Which changes: the same seed gives the same ones.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How many changes.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub count: u64,
    /// Number of the first one, to go on with a series.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub from: u64,
    /// Only this driver; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub driver: Vec<String>,
    /// One JSON object per change on stdout, and one with the sums.
    #[arg(long)]
    pub json: bool,
    /// Write the results as a page.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Arguments of `defib corpus sitting`.
#[derive(Debug, Args)]
pub struct SittingArguments {
    /// Names of cases to draw from; all that can happen again when none is given.
    pub cases: Vec<String>,
    /// The guest.
    #[command(flatten)]
    pub lab: LabArguments,
    /// Which crashes, in which order: the same seed gives the same ones.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How many crashes.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub count: u64,
    /// One JSON object per crash on stdout, and one with the sums.
    #[arg(long)]
    pub json: bool,
    /// Write the results as a page.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// What the corpus' guests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// QEMU with hardware KVM where there is one, else with TCG.
    Auto,
    /// QEMU, translating.
    Tcg,
    /// QEMU on hardware KVM.
    Kvm,
    /// The minimal VMM on hardware KVM, with the guard in its process.
    Vmm,
}

/// Arguments of `defib demo`.
#[derive(Debug, Args)]
pub struct DemoArguments {
    /// Directory that the incident reports are written to.
    #[arg(long, value_name = "DIR", default_value = "target/demo/incidents")]
    pub incidents: PathBuf,
    /// Kernel of the guest.
    #[arg(long, default_value = "6.1")]
    pub kernel: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
