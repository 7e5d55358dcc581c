//! The guard's thread: waits until the guest's kernel can be understood, stands guard, and gives the machine
//! back when the VM ends.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guard::{Guard, Observer, Options};
use hv_hooks::kvm::KvmMachine;

use crate::memory::Ram;
use crate::{Error, Result};

/// Time between two looks at a guest that boots.
const RETRY: Duration = Duration::from_millis(250);
/// How long a kernel may look like another one than it is.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How a guard's work ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Crashes, and deaths that no hook announced.
    pub incidents: u32,
    /// How many of them the guest did not survive.
    pub lost: u32,
}

/// Starts a guard over `machine` until `ending` says so. `observer` makes the one who is told of events;
/// more than one is made when the guest takes its time to boot.
pub fn start(
    machine: KvmMachine<Ram>,
    options: Options,
    observer: impl Fn() -> Box<dyn Observer + Send> + Send + 'static,
    ending: impl Fn() -> bool + Send + 'static,
) -> Result<JoinHandle<std::result::Result<Tally, guard::Error>>> {
    thread::Builder::new()
        .name("guard".to_owned())
        .spawn(move || stand(machine, &options, &observer, &ending))
        .map_err(Error::host("guard thread"))
}

fn stand(
    mut machine: KvmMachine<Ram>,
    options: &Options,
    observer: &dyn Fn() -> Box<dyn Observer + Send>,
    ending: &dyn Fn() -> bool,
) -> std::result::Result<Tally, guard::Error> {
    let start = Instant::now();
    while !ending() {
        match Guard::begin(machine, options.clone(), observer()) {
            Ok(mut guard) => {
                let result = guard.run(ending);
                let tally = Tally { incidents: guard.incidents(), lost: guard.lost() };
                detach(guard.into_machine())?;
                return result.map(|()| tally);
            }
            Err(failed) if is_booting(&failed.error, start.elapsed()) => machine = failed.machine,
            Err(failed) => {
                detach(failed.machine)?;
                return Err(failed.error);
            }
        }
        thread::sleep(RETRY);
    }
    detach(machine)?;
    Ok(Tally::default())
}

/// Whether the kernel may be understood later. Half set up, it can look like another one than it is; one that
/// does so for long is.
fn is_booting(error: &guard::Error, waited: Duration) -> bool {
    use guard::Error::{Booting, GuestLayer, Modules, NoKernel, NotRunning, OtherKernel};
    match error {
        NoKernel(_) | Booting => true,
        OtherKernel { .. } | GuestLayer(_) | Modules(_) | NotRunning => waited < BOOT_LIMIT,
        _ => false,
    }
}

fn detach(machine: KvmMachine<Ram>) -> std::result::Result<(), guard::Error> {
    machine.detach().map_err(|error| guard::Error::Observer(io::Error::other(error)))
}
