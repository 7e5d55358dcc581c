//! Stock kernels on hardware KVM: cases of the corpus in the minimal VMM with the guard in its process, and in QEMU with
//! a guard beside it, by the command that an operator would use. On a host without hardware KVM, the command runs in a
//! nested lab whose processor QEMU emulates: slow, but KVM as real guests see it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use corpus::Error;
use corpus::lab::{Given, Kernel, Nested, kit};
use guard::KnowledgeSources;
use hv_hooks::kvm::HostKind;
use libtest_mimic::{Arguments, Failed, Trial};

/// Cases in the minimal VMM: locks in task context, a timer on an idle CPU, a process in the core kernel.
const IN_VMM: &str = "three-locks timer-idle getcwd";
/// Cases in QEMU, which has to boot and to save its guest first.
const IN_QEMU: &str = "three-locks";
/// For all of them; the nested lab boots a guest in half a minute, where the machine has nothing else to do.
const LIMIT: Duration = Duration::from_secs(1200);

/// The minimal VMM's program, which `cargo test --workspace` has built.
fn vmm() -> Result<PathBuf, Failed> {
    let program = Path::new(env!("CARGO_BIN_EXE_defib")).with_file_name("minimal-vmm");
    let hint = "cargo build --release -p minimal-vmm";
    if program.is_file() { Ok(program) } else { Err(format!("not built: {hint}").into()) }
}

/// What the command prints when all cases went well.
fn judge(cases: &str, output: &str) -> Result<(), Failed> {
    let saved =
        |case: &str| output.lines().any(|line| line.starts_with(case) && line.contains(" saved "));
    let lost: Vec<&str> = cases.split(' ').filter(|case| !saved(case)).collect();
    let right = output.contains(" 0 wrong; 0 diagnoses not as expected");
    if lost.is_empty() && right { Ok(()) } else { Err(format!("{lost:?}\n{output}").into()) }
}

fn here(on: &str, cases: &str) -> Result<(), Failed> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_defib"));
    command.args(["corpus", "run", "--on", on, "--vmm"]).arg(vmm()?);
    let output = command.args(cases.split(' ')).output()?;
    judge(cases, &String::from_utf8_lossy(&output.stdout))
}

fn nested(on: &str, cases: &str) -> Result<(), Failed> {
    let kernel = Kernel::find("6.1")?;
    let cache = tempfile::tempdir()?;
    let sources = KnowledgeSources {
        vmlinux: None,
        debug_dirs: Vec::new(),
        cache: Some(cache.path().to_owned()),
    };
    let vmlinux = kernel.vmlinux().ok_or("no vmlinux; run scripts/setup")?;
    guard::kernel_layer(&vmlinux, &sources)?;
    let given = |name: &str, path: &Path| Given { name: name.into(), path: path.to_owned() };
    let mut files = vec![
        given("kit", &kit(&kernel, &cache.path().join("layers"))?),
        given("defib", Path::new(env!("CARGO_BIN_EXE_defib"))),
        given("minimal-vmm", &vmm()?),
        given("mkfs.ext4", Path::new("/sbin/mkfs.ext4")),
        given("e2fsck", Path::new("/sbin/e2fsck")),
    ];
    if on == "kvm" {
        files.push(given("qemu-system-x86_64", Path::new("/usr/bin/qemu-system-x86_64")));
        files.extend(
            ["qemu", "seabios"].map(|name| given(name, &Path::new("/usr/share").join(name))),
        );
    }
    // QEMU looks for its firmware beside the folder that it lies in.
    let place = "for f in mkfs.ext4 e2fsck qemu-system-x86_64; do ln -sf /w/$f /sbin/$f; done; \
                 mkdir -p /run/t /run/c /dev/shm /share; ln -s /w/kit/layers /run/c/layers; \
                 ln -s /w/qemu /share/qemu; ln -s /w/seabios /share/seabios; export PATH=$PATH:/sbin";
    let lab = "TMPDIR=/run/t DEFIB_LAB_KIT=/w/kit DEFIB_CACHE=/run/c";
    let run = format!("{place}; {lab} ./defib corpus run --on {on} {cases}");
    let in_host = || Nested::start(&kernel, &files)?.run(&run, LIMIT);
    let ended = in_host().or_else(|error| match error {
        // The emulated processor's fault as likely as ours; ours would show again.
        Error::HostSilent { .. } => {
            eprintln!("{error}\nonce more, in a new host");
            in_host()
        }
        other => Err(other),
    });
    judge(cases, &ended?.output)
}

fn main() {
    let kind = HostKind::detect();
    println!("{kind}");
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let hardware = matches!(kind, HostKind::Hardware { .. });
    let mut trials = Vec::new();
    for (on, cases, name) in
        [("vmm", IN_VMM, "in_the_minimal_vmm"), ("kvm", IN_QEMU, "in_qemu_on_kvm")]
    {
        let here = Trial::test(name, move || here(on, cases)).with_kind("hardware");
        trials.push(here.with_ignored_flag(!hardware));
        trials.push(Trial::test(name, move || nested(on, cases)).with_kind("nested"));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
