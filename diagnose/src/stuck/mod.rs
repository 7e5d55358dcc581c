//! CPUs that do not get on, without any exception: which of them is the cause, and what a repair needs to know
//! of it. Reads only. That they do not get on was measured by whoever asks; tasks that sleep are not looked at.

mod spot;

use guest::{GuestVirt, Hook, PhysMemory, Reg, Registers, Vcpu, VirtMemory};
use repair_image::RepairImage;
use thiserror::Error;

use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::{CrashClass, Diagnosis, context, signature};
use spot::Spot;

/// Why vCPUs that were suspected are not found to be stuck.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotStuck {
    /// It executes a program, not the kernel.
    #[error("it is in user mode")]
    UserMode,
    /// It serves an interrupt at the moment: another look may tell.
    #[error("it serves an interrupt at the moment")]
    Interrupted,
    /// It is not known what it executes.
    #[error("what it executes could not be determined")]
    Unknown,
    /// No driver's frames are near enough to be the cause.
    #[error("no driver is seen to be the cause: it is in {place}")]
    NoDriver {
        /// The innermost function.
        place: String,
    },
    /// It waits until other CPUs have served an interrupt.
    #[error("it waits for other CPUs in {place}")]
    AwaitsCpus {
        /// The function that waits.
        place: String,
    },
    /// There is no caller of the driver that could be returned to.
    #[error("no caller of {function} was found that can be returned to")]
    NoBoundary {
        /// The driver's function.
        function: String,
    },
    /// It spins for a lock of a kind, or at a place, from which its frames can't be taken away.
    #[error("it waits for a lock in {place}, where the lock cannot be told")]
    OtherLock {
        /// The function that waits.
        place: String,
    },
    /// It stands in a lock's queue, which would be left damaged.
    #[error("it stands in the queue of the lock at {lock} ({word:#x})")]
    Queued {
        /// The lock, guest-virtual.
        lock: GuestVirt,
        /// Its word.
        word: u32,
    },
    /// The lock it waits for is free.
    #[error("the lock at {lock} is free")]
    Free {
        /// The lock, guest-virtual.
        lock: GuestVirt,
    },
    /// It spins for a lock that none of the vCPUs looked at is seen to hold.
    #[error("it waits for the lock at {lock}, and who holds that is not known")]
    UnknownHolder {
        /// The lock, guest-virtual.
        lock: GuestVirt,
    },
}

/// A call into a driver that does not return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The vCPU that executes it.
    pub vcpu: Vcpu,
    /// The task, guest-virtual address of its `task_struct`.
    pub task: GuestVirt,
    /// Where it returns to, guest-virtual.
    pub returns_to: GuestVirt,
    /// Stack pointer after the return, guest-virtual. With `returns_to` and `task` it is the same at two looks at
    /// one call; two calls one after the other may have the same, too.
    pub rsp: GuestVirt,
    /// First instruction of the driver's function that was called, guest-virtual.
    pub entry_at: GuestVirt,
    /// The driver.
    pub module: String,
    /// The driver's function that was called.
    pub entry: String,
    /// The driver's function that executes.
    pub function: String,
}

/// A CPU that is the cause, at one look.
#[derive(Clone, Debug)]
pub struct Found {
    /// The diagnosis, should it be stuck.
    pub diagnosis: Diagnosis,
    /// The call that does not return.
    pub call: Call,
    /// General registers of the innermost frame of the driver, as far as known. A loop that makes headway shows it
    /// in one of them.
    pub values: Vec<(Reg, u64)>,
}

/// Finds the cause among the vCPUs `suspects`, whose registers are in `vcpus` by number. A CPU that waits for a
/// lock is a cause only if its own frames hold the lock, or if it is part of a circle. CPUs that are not suspect are
/// never called the cause, but may be what closes a circle: nobody may want a CPU that stands, so it can take long
/// until it is suspect, too.
///
/// # Errors
/// None of them can be called the cause; the reason is the first one's.
pub fn find(
    image: &RepairImage,
    phys: &dyn PhysMemory,
    vcpus: &[Registers],
    suspects: &[Vcpu],
    cache: &mut CodeCache,
) -> Result<Found, NotStuck> {
    cache.look_again();
    let space = image.placement.space(phys);
    let mut look = |vcpu: Vcpu, registers: &Registers| {
        Spot::look(&Kernel::new(image, &space, registers), registers, vcpu, cache)
    };
    let mut spots = Vec::new();
    let mut first = None;
    for &vcpu in suspects {
        let Some(registers) = vcpus.get(vcpu.0) else { continue };
        match look(vcpu, registers) {
            Ok(spot) => spots.push(spot),
            Err(why) => first = first.or(Some(why)),
        }
    }
    let suspected = spots.len();
    let mut interrupted = false;
    // Who waits for nobody is the cause already.
    if spots.iter().all(|spot| spot.awaits.is_some()) && suspected > 0 {
        let others = vcpus.iter().enumerate().map(|(index, it)| (Vcpu(index), it));
        for (vcpu, registers) in others.filter(|(vcpu, _)| !suspects.contains(vcpu)) {
            match look(vcpu, registers) {
                Ok(spot) => spots.push(spot),
                Err(why) => interrupted |= why == NotStuck::Interrupted,
            }
        }
    }
    let awaits: Vec<_> = spots.iter().map(|spot| spot.awaits).collect();
    let holder = |lock| spots.iter().position(|spot| spot.holds(lock));
    let (index, cause) = cause(&awaits, suspected, holder).map_err(|why| match why {
        // The holder may be the one that serves an interrupt now.
        NotStuck::UnknownHolder { .. } if interrupted => NotStuck::Interrupted,
        why => first.unwrap_or(why),
    })?;
    if index >= spots.len() {
        return Err(NotStuck::Unknown);
    }
    let spot = spots.swap_remove(index);
    let class = class(&spot, cause);
    Ok(found(spot, class))
}

/// Why a CPU is the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// It waits for nobody.
    Loop,
    /// It waits for itself.
    Itself,
    /// It waits for others that wait for it.
    Circle,
}

/// Which of the first `suspected` is the cause, and why: from what each waits for and who is seen to hold it.
fn cause(
    awaits: &[Option<GuestVirt>],
    suspected: usize,
    holder: impl Fn(GuestVirt) -> Option<usize>,
) -> Result<(usize, Cause), NotStuck> {
    if let Some(index) = awaits.iter().take(suspected).position(Option::is_none) {
        return Ok((index, Cause::Loop));
    }
    let mut unknown = None;
    for (start, lock) in awaits.iter().enumerate().take(suspected) {
        let Some(lock) = *lock else { continue };
        let mut next = holder(lock);
        unknown = unknown.or(next.is_none().then_some(lock));
        // From the holders of its lock on, does it come back to itself?
        for steps in 0..awaits.len() {
            match next {
                Some(at) if at == start && steps == 0 => return Ok((start, Cause::Itself)),
                Some(at) if at == start => return Ok((start, Cause::Circle)),
                Some(at) => next = awaits.get(at).and_then(|lock| holder((*lock)?)),
                None => break,
            }
        }
    }
    Err(unknown.map_or(NotStuck::Unknown, |lock| NotStuck::UnknownHolder { lock }))
}

fn class(spot: &Spot, cause: Cause) -> CrashClass {
    match cause {
        Cause::Loop if spot.context.interrupts_enabled == Some(false) => {
            CrashClass::EndlessLoopIrqsOff
        }
        Cause::Loop => CrashClass::EndlessLoop,
        Cause::Itself => CrashClass::SpinlockSelfDeadlock,
        Cause::Circle => CrashClass::SpinlockCycle,
    }
}

fn found(spot: Spot, class: CrashClass) -> Found {
    let Spot { mut fault, .. } = spot;
    let (fault_frame, class) = (fault.at, Some(class));
    // The instruction that a loop is met at is chance: what it is called starts with the driver's frame.
    fault.at = spot.run;
    let title = signature::title(class.as_ref(), &fault, Some(&spot.offender), None);
    let signature = signature::id(class.as_ref(), &fault);
    let at = spot.registers.rip().unwrap_or_default();
    let diagnosis = Diagnosis {
        hook: Some(Hook { kind: guest::HookKind::Stuck, at }),
        vcpu: spot.call.vcpu,
        class,
        title,
        signature,
        context: spot.context,
        task: spot.task,
        fault_frame,
        fault_regs_at: None,
        unwind_end: fault.end,
        frames: fault.frames,
        offender: Some(spot.offender),
        evidence: spot.evidence,
        explanation: None,
        boundary: Some(spot.boundary),
        core_exits: Vec::new(),
        damage: Vec::new(),
        all_effects: spot.all_effects,
        message: None,
        queued: None,
    };
    Found { diagnosis, call: spot.call, values: spot.values }
}

/// The kernel's number of the CPU that a vCPU is, by its registers.
#[must_use]
pub fn cpu_of(image: &RepairImage, registers: &Registers) -> Option<usize> {
    let bases = [Reg::GsBase, Reg::KernelGsBase].into_iter().filter_map(|reg| registers.get(reg));
    bases.filter_map(|base| image.cpu_of_gs_base(base)).next()
}

/// The task that a vCPU executes, by its registers: guest-virtual address of its `task_struct`.
#[must_use]
pub fn current_task(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    registers: &Registers,
) -> Option<GuestVirt> {
    context::current(&Kernel::of_memory(image, memory), cpu_of(image, registers)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: GuestVirt = GuestVirt(0xffff_8880_0000_1000);
    const B: GuestVirt = GuestVirt(0xffff_8880_0000_2000);

    #[test]
    fn whoever_waits_for_nobody_is_the_cause() {
        let found = cause(&[Some(A), None], 2, |_| Some(1));
        assert_eq!(found, Ok((1, Cause::Loop)));
    }

    #[test]
    fn a_lock_taken_twice_is_told_from_a_circle() {
        assert_eq!(cause(&[Some(A)], 1, |_| Some(0)), Ok((0, Cause::Itself)));
        let holder = |lock| Some(usize::from(lock == A));
        assert_eq!(cause(&[Some(A), Some(B)], 2, holder), Ok((0, Cause::Circle)));
        // The first only waits for the second, which waits for itself.
        assert_eq!(cause(&[Some(A), Some(A)], 2, |_| Some(1)), Ok((1, Cause::Itself)));
    }

    #[test]
    fn a_cpu_that_is_not_suspect_closes_a_circle_and_is_never_the_cause() {
        let holder = |lock| Some(usize::from(lock == A));
        assert_eq!(cause(&[Some(A), Some(B)], 1, holder), Ok((0, Cause::Circle)));
        // It may give the lock back any moment: it waits for nobody, or for somebody unseen.
        assert_eq!(cause(&[Some(A), None], 1, |_| Some(1)), Err(NotStuck::Unknown));
        let holder = |lock| (lock == A).then_some(1);
        assert_eq!(cause(&[Some(A), Some(B)], 1, holder), Err(NotStuck::Unknown));
        // A circle of others that does not pass the suspect.
        assert_eq!(cause(&[Some(A), Some(A)], 1, |_| Some(1)), Err(NotStuck::Unknown));
    }

    #[test]
    fn nobody_is_the_cause_when_the_holder_is_not_seen() {
        let unknown = Err(NotStuck::UnknownHolder { lock: A });
        assert_eq!(cause(&[Some(A)], 1, |_| None), unknown);
        let holder = |lock| (lock == B).then_some(0);
        assert_eq!(cause(&[Some(A), Some(B)], 2, holder), unknown);
        assert_eq!(cause(&[], 0, |_| None), Err(NotStuck::Unknown));
    }
}
