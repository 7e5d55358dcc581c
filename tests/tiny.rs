//! The tiny guest, crashed and repaired on two machines by the same code: in QEMU with `defib guard` beside it, and on
//! real KVM in the minimal VMM with the guard in its process. What must be the same is: diagnosis, rung, what the
//! guest's own checksums say. Without /dev/kvm the latter show as ignored.

mod tiny_vmm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use corpus::guarded::{Guard, GuardConfig};
use corpus::tiny::{CASES, Case, Exit, Running, Tiny};
use hv_hooks::kvm::HostKind;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

/// For what takes a fraction of a second on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What a repair must have come to.
fn judge(
    case: &Case,
    diagnosis: &Value,
    end: &Value,
    serial: &str,
    code: Option<Exit>,
) -> Result<(), Failed> {
    let mut wrong = case.differences(diagnosis, end)?;
    wrong
        .extend(case.missing(serial).iter().map(|line| format!("the guest does not say {line:?}")));
    if code != Some(Exit::ChecksumOk) {
        wrong.push(format!("the guest ended with {code:?}"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(format!("{}\n{serial}", wrong.join("; ")).into()) }
}

fn in_qemu(case: &Case, root: &Path) -> Result<(), Failed> {
    let tiny = Tiny::build()?;
    let mut guest = Running::start(&tiny, case)?;
    let text = |path: &Path| path.display().to_string();
    let mut guard = Guard::start(
        &GuardConfig {
            program: env!("CARGO_BIN_EXE_defib").into(),
            incidents: root.join(case.name),
            arguments: vec![
                "--vmlinux".into(),
                text(&tiny.kernel),
                "--debug-dir".into(),
                text(&tiny.debug_dir),
                "--cache".into(),
                text(root),
            ],
        },
        &guest.qmp(),
    )?;
    guard.await_event("armed", LIMIT)?;
    guest.crash()?;
    let diagnosis = guard.await_event("diagnosis", LIMIT)?;
    let end = guard.await_any(&["repaired", "refused"], LIMIT)?;
    let code = guest.wait()?;
    judge(case, &diagnosis, &end, &guest.serial(), code)
}

fn in_the_minimal_vmm(case: &Case, root: &Path) -> Result<(), Failed> {
    let told = tiny_vmm::run(case, root)?;
    judge(case, &told.diagnosis, &told.end, &told.serial, told.code)
}

fn trials(root: &Path, kind: &HostKind) -> Vec<Trial> {
    type Run = fn(&Case, &Path) -> Result<(), Failed>;
    let on = |name: &'static str, run: Run, there: bool| {
        let root: PathBuf = root.join(name);
        CASES.iter().map(move |case| {
            let root = root.clone();
            let trial = Trial::test(case.name, move || run(case, &root));
            trial.with_kind(name).with_ignored_flag(!there)
        })
    };
    on("qemu", in_qemu, true).chain(on("kvm", in_the_minimal_vmm, kind.is_usable())).collect()
}

fn main() {
    let kind = HostKind::detect();
    println!("{kind}");
    let mut arguments = Arguments::from_args();
    // The guests need both cores: one at a time.
    arguments.test_threads = Some(1);
    let root = tempfile::tempdir().expect("folder for incidents");
    let conclusion = libtest_mimic::run(&arguments, trials(root.path(), &kind));
    drop(root);
    conclusion.exit();
}
