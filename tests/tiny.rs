//! The tiny guest, crashed and repaired on two machines by the same code: in QEMU with `defib guard` beside it, and on
//! real KVM in the minimal VMM with the guard in its process. What must be the same is: diagnosis, rung, what the
//! guest's own checksums say. Without /dev/kvm the latter show as ignored.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use corpus::guarded::{Guard, GuardConfig};
use corpus::tiny::{CASES, Case, Exit, Running, Tiny};
use guard::{KnowledgeSources, Observer, Options};
use hv_hooks::kvm::HostKind;
use libtest_mimic::{Arguments, Failed, Trial};
use minimal_vmm::{Config, SerialEnd, Vmm, guard_thread};
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

/// Passes a guard's events on to the test.
struct ToTest(Sender<(String, Value)>);

impl Observer for ToTest {
    fn event(&mut self, event: &str, fields: Value, _text: &str) -> io::Result<()> {
        self.0.send((event.to_owned(), fields)).map_err(io::Error::other)
    }
}

/// The next event of one of these names, the guest running meanwhile.
fn await_event(
    vmm: &mut Vmm,
    events: &Receiver<(String, Value)>,
    names: &[&str],
) -> Result<Value, Failed> {
    let until = Instant::now() + LIMIT;
    while Instant::now() < until {
        match events.try_recv() {
            Ok((name, fields)) if names.contains(&name.as_str()) => return Ok(fields),
            Ok(_) => {}
            Err(_) => drop(vmm.wait(Some(Duration::from_millis(5)))?),
        }
    }
    let serial = String::from_utf8_lossy(&vmm.serial_output()).into_owned();
    Err(format!("no event {names:?} within {LIMIT:?}; the guest said: {serial}").into())
}

fn in_the_minimal_vmm(case: &Case, root: &Path) -> Result<(), Failed> {
    let tiny = Tiny::build()?;
    let mut vmm = Vmm::new(&Config {
        kernel: tiny.kernel.clone(),
        initrd: Some(tiny.driver.clone()),
        cmdline: case.command_line(true),
        memory_mib: 64,
        vcpus: 2,
        disk: None,
        serial: SerialEnd::Memory,
    })?;
    let options = Options {
        knowledge: KnowledgeSources {
            vmlinux: Some(tiny.kernel),
            debug_dirs: vec![tiny.debug_dir],
            cache: Some(root.to_owned()),
        },
        incidents: Some(root.join(format!("kvm-{}", case.name))),
        ..Options::default()
    };
    let (sender, events) = channel();
    let observer = move || Box::new(ToTest(sender.clone())) as Box<dyn Observer + Send>;
    let machine = vmm.guard()?;
    let guard = guard_thread::start(machine, options, observer, vmm.has_ended())?;
    vmm.start()?;
    await_event(&mut vmm, &events, &["armed"])?;
    vmm.serial_input(b"g");
    let diagnosis = await_event(&mut vmm, &events, &["diagnosis"])?;
    let end = await_event(&mut vmm, &events, &["repaired", "refused"])?;
    let exit = vmm.wait(Some(LIMIT))?;
    let serial = String::from_utf8_lossy(&vmm.serial_output()).into_owned();
    vmm.stop()?;
    let tally = guard.join().map_err(|_| "the guard's thread panicked")??;
    if (tally.incidents, tally.lost) != (1, 0) {
        return Err(format!("{tally:?}").into());
    }
    let code = match exit {
        Some(minimal_vmm::Exit::Code(code)) => Exit::of_code(code),
        _ => None,
    };
    judge(case, &diagnosis, &end, &serial, code)
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
