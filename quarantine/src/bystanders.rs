//! What other CPUs hold in the moment of a crash over what `invariants.rs` looks at: they are let run until it is given
//! back, for what is being changed can't be judged. Decides nothing else.

use std::time::Duration;

use diagnose::Diagnosis;
use guest::{Machine, Vcpu};
use repair_image::RepairImage;

use crate::guest_struct::Structures;
use crate::invariants::{self, Current};
use crate::{Error, run_queue};

/// How long the others run at a time. Such locks are held for microseconds, but a vCPU may wait for a core of the host.
const TURN: Duration = Duration::from_millis(2);
/// Turns after which a lock counts as one that the crashed CPU holds itself.
const TURNS: usize = 20;

/// Lets other CPUs give back what they hold, before a crash is planned for. `true` when they ran: what was read of the
/// guest before is then old. Whatever is taken still may be the crashed CPU's own.
///
/// # Errors
/// [`Error::OtherCrash`] when the one that holds it has crashed too; [`Error::Machine`].
pub fn settle(
    machine: &mut dyn Machine,
    image: &RepairImage,
    diagnosis: &Diagnosis,
) -> Result<bool, Error> {
    match Current::of(diagnosis) {
        Some(current) => wait(machine, image, diagnosis.vcpu, current),
        None => Ok(false),
    }
}

/// The same for a place that is known.
pub(crate) fn wait(
    machine: &mut dyn Machine,
    image: &RepairImage,
    vcpu: Vcpu,
    current: Current,
) -> Result<bool, Error> {
    let mut met = false;
    for turn in 0..TURNS {
        let memory = image.placement.space(machine.phys());
        let Some(lock) = taken(&Structures { image, memory: &memory }, current) else {
            return Ok(turn > 0);
        };
        if met {
            return Err(Error::OtherCrash { lock });
        }
        if machine.vcpu_count() < 2 {
            return Ok(false);
        }
        let Some(caller) = machine.caller() else { return Ok(false) };
        met = caller.run_others(vcpu, TURN).map_err(Error::machine("letting other vCPUs run"))?;
    }
    Ok(true)
}

/// A lock that is taken, in words.
fn taken(kernel: &Structures<'_>, current: Current) -> Option<&'static str> {
    if invariants::task_list_is_taken(kernel) {
        return Some("the lock of the task list");
    }
    run_queue::is_taken(kernel, current).then_some("the lock of the crashed CPU's run queue")
}

#[cfg(test)]
mod tests {
    use guest::GuestVirt;

    use super::*;
    use crate::testing::Scene;
    use crate::testing::double::{Double, Fail};

    /// Where the run queue's lock is taken; what is done, and how often the others ran for it.
    fn settled(
        vcpus: usize,
        fail: impl Fn(GuestVirt) -> Option<Fail>,
    ) -> (Result<bool, Error>, usize) {
        let mut scene = Scene::new();
        let queue = scene.image.per_cpu("runqueues", 0).unwrap();
        scene.set_member("rq", "__lock", queue, 1);
        let lock = queue + scene.image.types.member("rq", "__lock").unwrap().offset;
        let current = Current { task: scene.task, cpu: Some(0) };
        let mut machine = Double::new(scene.machine, fail(lock)).with_vcpus(vcpus);
        let result = wait(&mut machine, &scene.image, Vcpu(0), current);
        (result, machine.turns)
    }

    #[test]
    fn nobody_runs_when_nothing_is_taken() {
        let scene = Scene::new();
        let current = Current { task: scene.task, cpu: Some(0) };
        let mut machine = Double::new(scene.machine, None).with_vcpus(2);
        assert!(matches!(wait(&mut machine, &scene.image, Vcpu(0), current), Ok(false)));
        assert_eq!(machine.turns, 0);
    }

    #[test]
    fn others_run_until_the_queue_is_given_back() {
        let given_back = settled(2, |at| Some(Fail::LockGivenBack { after: 3, at }));
        assert!(matches!(given_back, (Ok(true), 3)), "{given_back:?}");
        // Nobody else can hold it, or nobody gives it back: it is the crashed CPU's own.
        assert!(matches!(settled(1, |_| None), (Ok(false), 0)));
        assert!(matches!(settled(2, |_| None), (Ok(true), TURNS)));
    }

    #[test]
    fn a_holder_that_crashes_never_gives_it_back() {
        let (result, turns) = settled(2, |_| Some(Fail::OtherCrash));
        assert!(matches!(result, Err(Error::OtherCrash { .. })), "{result:?}");
        assert_eq!(turns, 1);
    }
}
