//! Why a guard can't begin, has to end, or lets a crash take its stock course. One type for all three: the
//! same failure may mean either, depending on when it comes.

use std::io;
use std::path::PathBuf;

use guest::{MachineError, Vcpu};
use thiserror::Error;

/// Why a guard failed, or a guest was not repaired.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine lacks an ability that no guard can do without.
    #[error("the machine cannot {ability}")]
    NoAbility {
        /// What it can't do.
        ability: &'static str,
    },
    /// The machine could not do what was asked.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A task does not sleep any more for what it slept for.
    #[error("it is not asleep any more, or what it waits for has changed")]
    NotAsleep,
    /// It can't be told how to end the call of a task that sleeps.
    #[error(transparent)]
    NotCaught(diagnose::asleep::NotCaught),
    /// It can't be told how to end a loop of page faults.
    #[error(transparent)]
    NotEnded(diagnose::fault_loop::NotEnded),
    /// The observer could not be told.
    #[error("the guard's events cannot be passed on")]
    Observer(#[from] io::Error),
    /// A file with knowledge of a kernel can't be used.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<repair_image::Error>,
    },
    /// A compiled kernel layer has no types that can be read.
    #[error("types of the kernel layer")]
    Types(#[source] Box<repair_image::Error>),
    /// Guest memory shows no kernel.
    #[error("no Linux kernel in guest memory")]
    NoKernel(#[source] Box<repair_image::Error>),
    /// The guest runs another kernel than the one that is known.
    #[error("the guest does not fit {origin}")]
    OtherKernel {
        /// Where the knowledge came from.
        origin: String,
        /// What does not fit.
        #[source]
        source: Box<repair_image::Error>,
    },
    /// The guest layer can't be taken.
    #[error(transparent)]
    GuestLayer(Box<repair_image::Error>),
    /// A function that is to be hooked does not exist.
    #[error("the kernel has no {function}()")]
    NoHook {
        /// The function.
        function: &'static str,
    },
    /// Its spinlocks sleep and its interrupts are threads: what is known here of contexts and locks is not so there.
    #[error("the kernel is one for real time (PREEMPT_RT), which is not supported: {banner}")]
    RealTime {
        /// What the kernel says of itself.
        banner: String,
    },
    /// No vCPU's page tables map the kernel that was found: it is another boot's, left in memory.
    #[error("no vCPU runs this kernel")]
    NotRunning,
    /// The kernel was found but has not started user space. Try again later.
    #[error("the kernel is still booting")]
    Booting,
    /// The module list can't be read.
    #[error("module list")]
    Modules(#[source] Box<repair_image::Error>),
    /// Registers can't be read.
    #[error("registers")]
    Registers(#[source] MachineError),
    /// The stop names a vCPU that the machine does not have.
    #[error("the vCPU that stopped is unknown")]
    UnknownVcpu(Vcpu),
    /// The vCPU stands at a hook's address but does not execute the kernel that is known.
    #[error("vCPU {} {why}", vcpu.0)]
    NotInKernel {
        /// The vCPU.
        vcpu: Vcpu,
        /// What it does instead.
        why: &'static str,
    },
    /// There is nothing to start a diagnosis from.
    #[error("no diagnosis")]
    Diagnosis(#[source] diagnose::Error),
    /// The other vCPUs could not be brought to where the guest can be judged.
    #[error("the other vCPUs")]
    Unsettled(#[source] quarantine::Error),
    /// Nothing may be done about this crash; the plan says why.
    #[error("every rung is refused")]
    EveryRungRefused,
    /// Nothing was to be written.
    #[error("dry run")]
    DryRun,
    /// The plan was given up.
    #[error("the plan could not be carried out")]
    Apply(#[source] quarantine::Error),
    /// An incident's folder can't be made.
    #[error("cannot make incident folder {}", path.display())]
    IncidentFolder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file of an incident can't be written.
    #[error("cannot write {}", path.display())]
    IncidentFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something can't be told as JSON.
    #[error("{what} as JSON")]
    Json {
        /// What.
        what: &'static str,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
}

/// A guard that could not begin, with the machine that it was to watch: to be detached, or tried again.
#[derive(Debug)]
pub struct Failed<M> {
    /// The machine: no hook is armed, and it runs if it did.
    pub machine: M,
    /// Why.
    pub error: Error,
}

/// Drops the machine.
impl<M> From<Failed<M>> for Error {
    fn from(failed: Failed<M>) -> Self {
        failed.error
    }
}

/// An error and its causes in one line, outermost first.
pub fn in_one_line(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_in_order_and_once() {
        let inner = MachineError::Backend { backend: "fake", source: "no".into() };
        assert_eq!(in_one_line(&Error::Registers(inner)), "registers: fake: no");
        assert_eq!(in_one_line(&Error::Machine(MachineError::Gone)), "the machine is gone");
    }
}
