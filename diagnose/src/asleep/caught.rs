//! A task that was woken although nothing has come that it sleeps for, and stands where it goes on: what a repair needs
//! to know of it. Its frames are those of an ordinary call into a driver, from which an error can be returned.

use guest::{GuestVirt, PhysMemory, Registers, Vcpu};
use repair_image::RepairImage;
use thiserror::Error;

use super::stranded::sleeps_for_its_caller;
use super::{LOCKING, Queued, Sleeper};
use crate::code::CodeCache;
use crate::driver_call::{DriverCall, NotEnded};
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::names::function;
use crate::unwind::{self, Limits, Start};
use crate::{
    Confirmation, CrashClass, Diagnosis, Frame, FrameEffects, Held, ResourceKind, context,
};

/// Frames at most.
const FRAMES_MAX: usize = 512;
/// Bits of the preempt count that count: bit 31 is the scheduler's.
const COUNT_BITS: u32 = 0x7fff_ffff;

/// A task whose call is to be ended, and what is known of it while it sleeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// The task.
    pub sleeper: Sleeper,
    /// Its place in a queue, if it stands in one.
    pub queued: Option<Queued>,
    /// Where it goes on in the kernel or a driver once it is woken, guest-virtual.
    pub resumes_at: GuestVirt,
    /// The preempt count then, without the flag in bit 31.
    pub preempt_count: u32,
    /// Why it sleeps for ever.
    pub class: CrashClass,
    /// What says so, one fact a line.
    pub evidence: Vec<String>,
}

/// Why a task's call can't be ended where it sleeps.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotCaught {
    /// No driver waits in it.
    #[error("none of the tasks waits on behalf of a driver")]
    NobodyToGiveUp,
    /// It does not stand where it was expected.
    #[error("the task does not stand where it waits")]
    Elsewhere,
    /// The preempt count is not what it is where a task sleeps for a lock.
    #[error("the preempt count is {found:#x}, not {expected:#x}")]
    PreemptCount {
        /// What it is.
        found: u32,
        /// What it must be.
        expected: u32,
    },
    /// Its call can't be ended.
    #[error(transparent)]
    NotEnded(#[from] NotEnded),
}

/// Diagnoses the task, which stands on `vcpu` with these registers where it was woken; the guest stands, and what it
/// sleeps for was found unchanged.
///
/// # Errors
/// It can't be told how to end its call.
pub fn caught(
    image: &RepairImage,
    phys: &dyn PhysMemory,
    registers: &Registers,
    vcpu: Vcpu,
    victim: &Victim,
    cache: &mut CodeCache,
) -> Result<Diagnosis, NotCaught> {
    cache.look_again();
    if registers.rip() != Some(victim.resumes_at) {
        return Err(NotCaught::Elsewhere);
    }
    let space = image.placement.space(phys);
    let kernel = Kernel::new(image, &space, registers);
    let fault = frames(&kernel, registers, cache).ok_or(NotCaught::Elsewhere)?;
    let mut evidence = victim.evidence.clone();
    let cpu = context::cpu(&kernel, registers);
    let context = context::of(&kernel, registers, &cpu, &fault, &mut evidence);
    let found = context.preempt_count.unwrap_or_default() & COUNT_BITS;
    if found != victim.preempt_count {
        return Err(NotCaught::PreemptCount { found, expected: victim.preempt_count });
    }
    let innermost = fault.frames.first().map(|frame| frame.pc.ip());
    let call = DriverCall {
        kernel: &kernel,
        vcpu,
        at: victim.resumes_at,
        class: victim.class.clone(),
        fault,
        context,
        current: cpu.current.filter(|&at| at == victim.sleeper.position.task),
        evidence,
    };
    let mut diagnosis = call.diagnose(cache)?;
    let held = [
        diagnosis.boundary.as_mut().map(|boundary| &mut boundary.effects),
        diagnosis.all_effects.as_mut(),
    ];
    if let Some(at) = innermost {
        held.into_iter().flatten().for_each(|it| add_count(it, victim.preempt_count, at));
    }
    diagnosis.queued = victim.queued;
    Ok(diagnosis)
}

/// The frames from the registers outward. The functions that sleep for a lock or another event hold nothing but the
/// preempt count, so their caller is the innermost frame that counts.
fn frames(kernel: &Kernel<'_>, registers: &Registers, cache: &mut CodeCache) -> Option<Fault> {
    let start = Start::of(registers)?;
    let limits = Limits { frames: FRAMES_MAX };
    let (frames, end) = unwind::walk(kernel.image, kernel.memory, cache, &start, limits);
    let waits = |frame: &&Frame| {
        let locks = frame.module.is_none() && LOCKING.contains(&function(frame));
        locks || sleeps_for_its_caller(frame)
    };
    let at = frames.iter().take_while(waits).count();
    let found = frames.get(at).is_some_and(|frame| at > 0 || frame.module.is_some());
    found.then_some(Fault {
        frames,
        end,
        at,
        regs_at: None,
        exception: None,
        detector: None,
        found,
    })
}

/// What the lock's function added to the preempt count: it is checked to be all there is.
fn add_count(effects: &mut FrameEffects, count: u32, innermost: GuestVirt) {
    if count == 0 {
        return;
    }
    effects.preempt_delta = effects.preempt_delta.saturating_add(i64::from(count));
    effects.held.push(Held {
        kind: ResourceKind::Preemption,
        lock: None,
        name: None,
        frame: 0,
        taken_at: innermost,
        confirmed: Confirmation::NotApplicable,
        saved_interrupts: None,
    });
}
