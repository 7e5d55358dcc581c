//! One case of the tiny guest in the minimal VMM, with the guard in this process. What it must come to is for the
//! test, how long it took for the benchmark.

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use corpus::tiny::{Case, Exit, Tiny};
use guard::{KnowledgeSources, Observer, Options};
use minimal_vmm::{Config, SerialEnd, Vmm, guard_thread};
use serde_json::Value;

/// For what takes a fraction of a second on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What guard and guest told.
pub struct Told {
    /// The `diagnosis` event.
    pub diagnosis: Value,
    /// The `repaired` or `refused` event.
    pub end: Value,
    /// The guest's serial text.
    pub serial: String,
    /// The code it ended with.
    pub code: Option<Exit>,
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
) -> Result<Value, Box<dyn Error>> {
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

/// Boots the guest on two vCPUs, lets it crash under guard and waits for its end.
///
/// # Errors
/// No KVM, or guard or guest do not come to an end.
pub fn run(case: &Case, root: &Path) -> Result<Told, Box<dyn Error>> {
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
        return Err(format!("{tally:?}: {serial}").into());
    }
    let code = match exit {
        Some(minimal_vmm::Exit::Code(code)) => Exit::of_code(code),
        _ => None,
    };
    Ok(Told { diagnosis, end, serial, code })
}
