//! Stock kernels on hardware KVM: cases of the corpus in the minimal VMM with the guard in its process, by the command
//! that an operator would use. On a host without hardware KVM, the command runs in a nested lab whose processor
//! QEMU emulates: slow, but KVM as real guests see it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use corpus::lab::{Given, Kernel, Nested, kit};
use guard::KnowledgeSources;
use hv_hooks::kvm::HostKind;
use libtest_mimic::{Arguments, Failed, Trial};

/// Cases: a lock in task context, a timer on an idle CPU, a process in the core kernel.
const CASES: &str = "three-locks timer-idle getcwd";
/// For all of them; the nested lab boots a guest in half a minute.
const LIMIT: Duration = Duration::from_secs(400);

/// The minimal VMM's program, which `cargo test --workspace` has built.
fn vmm() -> Result<PathBuf, Failed> {
    let program = Path::new(env!("CARGO_BIN_EXE_defib")).with_file_name("minimal-vmm");
    let hint = "cargo build --release -p minimal-vmm";
    if program.is_file() { Ok(program) } else { Err(format!("not built: {hint}").into()) }
}

/// What the command prints for a case that went well.
fn judge(output: &str) -> Result<(), Failed> {
    println!("{output}");
    let saved = |case: &str| output.lines().any(|line| line.starts_with(case) && line.contains(" saved "));
    let lost: Vec<&str> = CASES.split(' ').filter(|case| !saved(case)).collect();
    let right = output.contains(" 0 wrong; 0 diagnoses not as expected");
    if lost.is_empty() && right { Ok(()) } else { Err(format!("{lost:?}\n{output}").into()) }
}

fn here() -> Result<(), Failed> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_defib"));
    command.args(["corpus", "run", "--on", "vmm", "--vmm"]).arg(vmm()?);
    let output = command.args(CASES.split(' ')).output()?;
    judge(&String::from_utf8_lossy(&output.stdout))
}

fn nested() -> Result<(), Failed> {
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
    let files = [
        given("kit", &kit(&kernel, &cache.path().join("layers"))?),
        given("defib", Path::new(env!("CARGO_BIN_EXE_defib"))),
        given("minimal-vmm", &vmm()?),
        given("mkfs.ext4", Path::new("/sbin/mkfs.ext4")),
        given("e2fsck", Path::new("/sbin/e2fsck")),
    ];
    let mut host = Nested::start(&kernel, &files)?;
    let place = "for f in mkfs.ext4 e2fsck; do ln -sf /w/$f /sbin/$f; done; mkdir -p /run/t";
    let run = format!(
        "{place}; TMPDIR=/run/t DEFIB_LAB_KIT=/w/kit DEFIB_CACHE=/w/kit ./defib corpus run --on vmm {CASES}"
    );
    let ended = host.run(&run, LIMIT)?;
    judge(&ended.output)
}

fn main() {
    let kind = HostKind::detect();
    println!("{kind}");
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let hardware = matches!(kind, HostKind::Hardware { .. });
    let trials = vec![
        Trial::test("stock_kernel_in_the_minimal_vmm", here)
            .with_kind("hardware")
            .with_ignored_flag(!hardware),
        Trial::test("stock_kernel_in_the_minimal_vmm", nested).with_kind("nested"),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}
