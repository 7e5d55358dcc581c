//! Releasing what abandoned frames hold: one call of the kernel's own unlock function a lock,
//! innermost first. The preempt count that remains is `counts.rs`'s.

use diagnose::{Confirmation, Diagnosis, FrameEffects, Held, ResourceKind};
use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;

use crate::Reason;
use crate::action::{Action, Expected};
use crate::guest_struct::Structures;

/// How a resource is released.
struct Release {
    /// Functions that do it, best first. All run with interrupts off and leave them off.
    functions: &'static [(&'static str, Arguments)],
    /// Bytes of the lock that are looked at.
    word: u8,
    /// What it is, in words.
    noun: &'static str,
}

#[derive(Clone, Copy)]
enum Arguments {
    None,
    Lock,
    /// `(lock, flags)` with flags 0: the function restores "interrupts off".
    LockAndNoFlags,
}

/// `None` for what has no function: bottom halves, preemption, interrupts are put right by value.
///
/// The variants for `_bh`, `_irq` and `_irqsave` are released by the plain function: bottom halves
/// and the interrupt flag are part of the final state, and must not change while calls are made.
/// `_raw_spin_unlock` and its like are inlined, thus absent, in kernels without
/// `CONFIG_UNINLINE_SPIN_UNLOCK`; the `_irqrestore` functions are always there.
fn release(kind: ResourceKind) -> Option<Release> {
    use Arguments::{Lock, LockAndNoFlags, None as Nothing};
    let (functions, word, noun): (&'static [(&'static str, Arguments)], u8, _) = match kind {
        ResourceKind::Mutex => (&[("mutex_unlock", Lock)], 8, "mutex"),
        ResourceKind::RwsemWrite => (&[("up_write", Lock)], 8, "rw_semaphore (write)"),
        ResourceKind::RwsemRead => (&[("up_read", Lock)], 8, "rw_semaphore (read)"),
        ResourceKind::Semaphore => (&[("up", Lock)], 8, "semaphore"),
        ResourceKind::Spinlock
        | ResourceKind::SpinlockBh
        | ResourceKind::SpinlockIrq
        | ResourceKind::SpinlockIrqsave => (
            &[("_raw_spin_unlock", Lock), ("_raw_spin_unlock_irqrestore", LockAndNoFlags)],
            4,
            "spinlock",
        ),
        ResourceKind::ReadLock => (
            &[("_raw_read_unlock", Lock), ("_raw_read_unlock_irqrestore", LockAndNoFlags)],
            4,
            "rwlock (read)",
        ),
        ResourceKind::WriteLock => (
            &[("_raw_write_unlock", Lock), ("_raw_write_unlock_irqrestore", LockAndNoFlags)],
            4,
            "rwlock (write)",
        ),
        ResourceKind::Rcu => (&[("__rcu_read_unlock", Nothing)], 0, "RCU read-side section"),
        _ => return None,
    };
    Some(Release { functions, word, noun })
}

/// Refuses unless everything that the frames hold is determined and agrees with memory.
pub(crate) fn check(diagnosis: &Diagnosis, effects: &FrameEffects) -> Result<(), Reason> {
    if !effects.undetermined.is_empty() {
        let name = |&index: &usize| {
            diagnosis
                .frames
                .get(index)
                .and_then(|frame| frame.function.clone())
                .unwrap_or_else(|| format!("frame {index}"))
        };
        return Err(Reason::Undetermined {
            functions: effects.undetermined.iter().map(name).collect(),
        });
    }
    effects.held.iter().try_for_each(check_one)
}

fn check_one(held: &Held) -> Result<(), Reason> {
    match &held.confirmed {
        Confirmation::NotApplicable if held.lock.is_none() => Ok(()),
        Confirmation::Confirmed if held.lock.is_some() => Ok(()),
        Confirmation::Contradicted { word } => {
            Err(Reason::LockNotHeld { lock: describe(held), word: *word })
        }
        _ => Err(Reason::UnknownLock { lock: describe(held) }),
    }
}

fn describe(held: &Held) -> String {
    let noun = release(held.kind).map_or("section", |release| release.noun);
    match (&held.name, held.lock) {
        (Some(name), _) => format!("{noun} {name}"),
        (None, Some(lock)) => format!("{noun} at {lock:#x}"),
        (None, None) => noun.to_owned(),
    }
}

/// The calls that release what `effects` holds, innermost first.
pub(crate) fn release_calls(
    diagnosis: &Diagnosis,
    effects: &FrameEffects,
    image: &RepairImage,
    memory: &dyn VirtMemory,
) -> Result<Vec<Action>, Reason> {
    let mut calls = Vec::new();
    for held in effects.held.iter().rev() {
        if let Some(release) = release(held.kind) {
            calls.push(call(diagnosis, held, &release, image, memory)?);
        }
    }
    Ok(calls)
}

fn call(
    diagnosis: &Diagnosis,
    held: &Held,
    release: &Release,
    image: &RepairImage,
    memory: &dyn VirtMemory,
) -> Result<Action, Reason> {
    let found = release
        .functions
        .iter()
        .find_map(|(name, arguments)| Some((*name, *arguments, image.address_of(name)?)));
    let (name, arguments, at) = found.ok_or_else(|| Reason::MissingFunction {
        name: release.functions.first().map_or("", |function| function.0).to_owned(),
    })?;
    let lock = || held.lock.ok_or_else(|| Reason::UnknownLock { lock: describe(held) });
    let arguments = match arguments {
        Arguments::None => Vec::new(),
        Arguments::Lock => vec![lock()?.0],
        Arguments::LockAndNoFlags => vec![lock()?.0, 0],
    };
    let expected = match held.lock {
        Some(at) if release.word > 0 => vec![unchanged(memory, at, release.word, held)?],
        _ => Vec::new(),
    };
    let taken_by = diagnosis
        .frames
        .get(held.frame)
        .and_then(|frame| frame.function.as_deref())
        .unwrap_or("an abandoned frame");
    let why = format!("{} was taken by {taken_by}, which is abandoned", describe(held));
    Ok(Action::CallGuest { function: name.to_owned(), at, arguments, expected, why })
}

/// Whether the task still owns a lock that a plan has released. Others may have taken it since; where the lock does not
/// name its owner, or is gone with what it was part of, there is nothing to see.
pub(crate) fn given_back(
    kernel: &Structures<'_>,
    actions: &[Action],
    task: GuestVirt,
) -> Result<(), Reason> {
    for action in actions {
        let Action::CallGuest { function, arguments, .. } = action else { continue };
        let owned = match function.as_str() {
            "mutex_unlock" => "mutex",
            "up_write" => "rw_semaphore",
            _ => continue,
        };
        let Some(lock) = arguments.first().copied().map(GuestVirt) else { continue };
        let Some(at) = kernel.member_at(lock, owned, "owner") else { continue };
        let owner = kernel.memory.read_u64(at).unwrap_or(0);
        // The low three bits are flags, of both.
        if owner & !7 == task.0 {
            let what = "the owner of a lock that was released";
            return Err(Reason::Broken { what, at, found: owner, expected: 0 });
        }
    }
    Ok(())
}

fn unchanged(
    memory: &dyn VirtMemory,
    at: GuestVirt,
    size: u8,
    held: &Held,
) -> Result<Expected, Reason> {
    let value = memory
        .read_uint(at, u64::from(size))
        .map_err(|_| Reason::Unreadable { what: describe(held), at })?;
    let mask = if size >= 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
    Ok(Expected { at, size, mask, value })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn innermost_is_released_first() {
        let scene = testing::Scene::new();
        let mut diagnosis = scene.diagnosis();
        let effects = testing::effects(&[
            ResourceKind::Mutex,
            ResourceKind::Rcu,
            ResourceKind::SpinlockIrqsave,
            ResourceKind::Interrupts,
        ]);
        diagnosis.boundary.as_mut().unwrap().effects = effects.clone();
        let calls =
            release_calls(&diagnosis, &effects, &scene.image, &scene.machine.space()).unwrap();
        let names: Vec<_> = calls
            .iter()
            .map(|action| match action {
                Action::CallGuest { function, .. } => function.as_str(),
                _ => "?",
            })
            .collect();
        assert_eq!(names, ["_raw_spin_unlock", "__rcu_read_unlock", "mutex_unlock"]);
    }

    #[test]
    fn a_lock_that_is_still_owned_was_not_given_back() {
        let mut scene = testing::Scene::new();
        let effects = testing::effects(&[ResourceKind::Mutex]);
        let diagnosis = scene.diagnosis();
        let calls =
            release_calls(&diagnosis, &effects, &scene.image, &scene.machine.space()).unwrap();
        let lock = effects.held[0].lock.unwrap();
        let look = |scene: &testing::Scene, task| {
            let memory = scene.machine.space();
            given_back(&Structures { image: &scene.image, memory: &memory }, &calls, task)
        };
        let (task, other) = (scene.task, scene.task + 0x4000);
        scene.set_member("mutex", "owner", lock, task.0 | 1);
        assert!(matches!(look(&scene, task), Err(Reason::Broken { .. })));
        assert_eq!(look(&scene, other), Ok(()), "a waiter got it");
        scene.set_member("mutex", "owner", lock, 0);
        assert_eq!(look(&scene, task), Ok(()));
    }

    #[test]
    fn only_confirmed_locks_are_released() {
        let scene = testing::Scene::new();
        let diagnosis = scene.diagnosis();
        let mut effects = testing::effects(&[ResourceKind::Mutex]);
        assert_eq!(check(&diagnosis, &effects), Ok(()));
        effects.held[0].confirmed = Confirmation::Unknown;
        assert!(matches!(check(&diagnosis, &effects), Err(Reason::UnknownLock { .. })));
        effects.held[0].confirmed = Confirmation::Contradicted { word: 7 };
        assert!(matches!(check(&diagnosis, &effects), Err(Reason::LockNotHeld { word: 7, .. })));
        effects.held.clear();
        effects.undetermined = vec![0];
        assert!(matches!(check(&diagnosis, &effects), Err(Reason::Undetermined { .. })));
    }
}
