//! Every case of the corpus on a real guest: crashed, repaired by a real `defib guard`, and verified.
//! What a failed case left, the folder of its incidents, is kept. One test a case; `cargo test --test corpus -- NAME`
//! runs one. Needs what `scripts/setup` installs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use corpus::campaign::{self, Outcome, Stand};
use corpus::guarded::GuardConfig;
use corpus::lab::{Kernel, Snapshot, VmConfig};
use corpus::scenario::{Case, cases};
use libtest_mimic::{Arguments, Failed, Trial};

/// Cases that also run on 6.12: another ORC layout, other offsets, other per-CPU places.
const ON_6_12: &[&str] = &[
    "null-deref",
    "panic",
    "stack-overflow",
    "three-locks",
    "rcu",
    "timer-idle",
    "hrtimer-busy",
    "msi-spinlock",
    "work-mutex",
    "pipe-write",
    "fortify",
    "stack-canary",
    "list-add",
    "warn",
    "loop-irqs-off",
    "spinlock-twice",
    "spinlock-abba",
    "mutex-abba",
    "fault-loop",
    "fault-loop-syscall",
    "rwsem-read-write",
    "stack-end",
    "task-list",
    "run-queue",
    "page-table",
    "core-list",
    "free-list",
    "asleep-ioctl",
    "asleep-poll",
    "disk-dies",
    "asleep-event",
    "asleep-completion",
    "asleep-kthread",
    "uring-worker",
    "queue-rq",
    "msi-thread",
    "opcode",
    "ops-table",
    "idt-gate",
    "static-key",
    "uring-read",
    "napi-poll",
    "kprobe",
    "call-rcu",
    "sysrq",
    "getcwd",
    "sethostname",
];
/// Cases that also run without any debug file: symbols, types and ORC out of guest memory.
const WITHOUT_FILES: &[&str] = &[
    "null-deref",
    "three-locks",
    "timer-busy",
    "getcwd",
    "pipe-read",
    "napi-poll",
    "loop",
    "spinlock-twice",
    "mutex-abba",
    "opcode",
    "idt-gate",
    "free-list",
    "core-list",
];

/// A kind of guest and how it is guarded.
struct Bench {
    kernel: &'static str,
    files: bool,
    incidents: PathBuf,
}

impl Bench {
    fn run(&self, case: &'static Case) -> Result<(), Failed> {
        let kernel = Kernel::find(self.kernel)?;
        let incidents = self.incidents.join(case.name);
        self.verify(case, kernel, incidents.clone())?;
        // What is kept is what failed.
        std::fs::remove_dir_all(incidents)?;
        Ok(())
    }

    fn verify(
        &self,
        case: &'static Case,
        kernel: Kernel,
        incidents: PathBuf,
    ) -> Result<(), Failed> {
        let program = env!("CARGO_BIN_EXE_defib");
        let guard = if self.files {
            kernel.vmlinux().ok_or("no vmlinux; run scripts/setup")?;
            GuardConfig::with_debug_files(program, &kernel, incidents)?
        } else {
            let arguments = vec!["--cache".into(), self.incidents.display().to_string()];
            GuardConfig { program: program.into(), incidents, arguments }
        };
        let stand = Stand::Qemu(Snapshot::cached(&VmConfig::new(kernel))?);
        let verdict = campaign::run(case, &stand, &guard)?;
        match verdict.outcome {
            Outcome::Saved if case.refused.is_some() => return Err("repaired".into()),
            Outcome::Saved => {}
            Outcome::Refused(reason)
                if case.refused.is_some_and(|words| reason.contains(words)) => {}
            Outcome::Refused(reason) => return Err(format!("refused: {reason}").into()),
            Outcome::Wrong(reasons) => return Err(format!("WRONG: {}", reasons.join("; ")).into()),
        }
        // Without lines, the place of the offender can't be known.
        let place = |difference: &String| self.files || !difference.starts_with("place");
        let differences: Vec<_> = verdict.differences.into_iter().filter(place).collect();
        if differences.is_empty() { Ok(()) } else { Err(differences.join("; ").into()) }
    }
}

fn trials(root: &Path) -> Vec<Trial> {
    let bench =
        |kernel, files, name: &str| Arc::new(Bench { kernel, files, incidents: root.join(name) });
    let (old, new, bare) =
        (bench("6.1", true, "6.1"), bench("6.12", true, "6.12"), bench("6.1", false, "bare"));
    let mut trials = Vec::new();
    let mut add = |bench: &Arc<Bench>, kind: &str, case: &'static Case| {
        let bench = Arc::clone(bench);
        let trial = Trial::test(case.name, move || bench.run(case)).with_kind(kind);
        trials.push(trial);
    };
    for case in cases() {
        add(&old, "6.1", case);
    }
    for case in cases().filter(|case| ON_6_12.contains(&case.name)) {
        add(&new, "6.12", case);
    }
    for case in cases().filter(|case| WITHOUT_FILES.contains(&case.name)) {
        add(&bare, "6.1 without files", case);
    }
    trials
}

fn main() {
    let mut arguments = Arguments::from_args();
    // Two guests at a time: cases allow for a host that has other work, and mostly wait.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    let root = tempfile::tempdir().expect("folder for incidents");
    let conclusion = libtest_mimic::run(&arguments, trials(root.path()));
    if conclusion.has_failed() {
        eprintln!("incidents of failed cases: {}", root.keep().display());
    }
    conclusion.exit();
}
