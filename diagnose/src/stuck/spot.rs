//! What one vCPU does at one look: its frames from the registers alone, the driver among them, the spinlock it
//! waits for. Does not judge whether it is the cause.

use guest::{GuestVirt, Reg, Registers, Vcpu};

use super::{Call, NotStuck};
use crate::boundary::{self, Scene};
use crate::code::CodeCache;
use crate::context;
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::names::{display, entered_by_interrupt, function, runs_softirqs};
use crate::offender::{self, module_run, segment};
use crate::task;
use crate::unwind::{self, Limits, Start};
use crate::{Boundary, Confirmation, Context, FrameEffects, Held, Offender, ResourceKind, Task};

/// Frames at most.
const FRAMES_MAX: usize = 512;

/// Where a CPU spins for a `spinlock_t` (kernel/locking/qspinlock.c). All take the lock as their first argument.
const SPINS: [&str; 3] = [
    "native_queued_spin_lock_slowpath",
    "__pv_queued_spin_lock_slowpath",
    "queued_spin_lock_slowpath",
];
/// Where it spins for a lock of another kind.
const SPINS_OTHERWISE: [&str; 3] =
    ["queued_read_lock_slowpath", "queued_write_lock_slowpath", "osq_lock"];
/// Where it waits for other CPUs to serve an interrupt (kernel/smp.c, kernel/stop_machine.c): whoever does not
/// let them is the cause.
const AWAITS_CPUS: [&str; 6] = [
    "smp_call_function_many_cond",
    "smp_call_function_single",
    "csd_lock_wait",
    "__csd_lock_wait",
    "multi_cpu_stop",
    "flush_tlb_multi",
];

/// `_Q_LOCKED_VAL` (include/asm-generic/qspinlock_types.h): locked, and nobody in the queue. A CPU that waits with
/// this word there is in `virt_spin_lock()` (arch/x86/include/asm/qspinlock.h), which leaves no trace in the lock:
/// the other ways to wait set the pending bit or the tail at once.
const LOCKED_WITHOUT_QUEUE: u32 = 1;

/// One vCPU at one look.
pub(super) struct Spot {
    pub(super) registers: Registers,
    pub(super) fault: Fault,
    /// Index of the innermost frame of the driver.
    pub(super) run: usize,
    pub(super) context: Context,
    pub(super) task: Option<Task>,
    pub(super) offender: Offender,
    pub(super) evidence: Vec<String>,
    pub(super) boundary: Boundary,
    pub(super) all_effects: Option<FrameEffects>,
    pub(super) call: Call,
    pub(super) values: Vec<(Reg, u64)>,
    /// The spinlock that it waits for.
    pub(super) awaits: Option<GuestVirt>,
}

impl Spot {
    /// Looks at a vCPU.
    pub(super) fn look(
        kernel: &Kernel<'_>,
        registers: &Registers,
        vcpu: Vcpu,
        cache: &mut CodeCache,
    ) -> Result<Self, NotStuck> {
        let fault = frames(kernel, registers, cache)?;
        let awaits = awaited(kernel, &fault)?;
        let mut evidence = Vec::new();
        let cpu = context::cpu(kernel, registers);
        let context = context::of(kernel, registers, &cpu, &fault, &mut evidence);
        let mut task = cpu.current.and_then(|at| task::read(kernel, at).ok());
        if let Some(task) = &mut task {
            task.syscall = task::syscall(kernel, &fault.frames, &fault.end);
        }
        let run = driver_run(&fault)?;
        let offender = offender::of(&fault, &context, task.as_ref(), &mut evidence);
        let Some(offender @ Offender::Driver { .. }) = offender else {
            return Err(NotStuck::NoDriver { place: place(&fault) });
        };
        let scene = Scene { kernel, fault: &fault, context: &context, current: cpu.current };
        let no_boundary = || NotStuck::NoBoundary {
            function: fault.frames.get(run).map(display).unwrap_or_default(),
        };
        let boundary = boundary::of(&scene, cache, &mut evidence).ok_or_else(no_boundary)?;
        let all_effects = boundary::all_effects(&scene, cache);
        let current = cpu.current.ok_or(NotStuck::Unknown)?;
        let call = call(&fault, &boundary, run, vcpu, current).ok_or_else(no_boundary)?;
        if let Some(lock) = awaits {
            evidence.push(format!("it spins for the lock at {lock:#x}, which is held"));
        }
        let values = fault.frames.get(run).map(|frame| frame.registers.iter().collect());
        Ok(Self {
            registers: *registers,
            run,
            context,
            task,
            offender,
            evidence,
            boundary,
            all_effects,
            call,
            values: values.unwrap_or_default(),
            awaits,
            fault,
        })
    }

    /// Whether frames of this CPU hold the spinlock.
    pub(super) fn holds(&self, lock: GuestVirt) -> bool {
        let of = |effects: &FrameEffects| effects.held.iter().any(|held| is_spinlock(held, lock));
        of(&self.boundary.effects)
            || of(&self.boundary.outer)
            || self.all_effects.as_ref().is_some_and(of)
    }
}

fn is_spinlock(held: &Held, lock: GuestVirt) -> bool {
    let spins = matches!(
        held.kind,
        ResourceKind::Spinlock
            | ResourceKind::SpinlockBh
            | ResourceKind::SpinlockIrq
            | ResourceKind::SpinlockIrqsave
    );
    spins && held.lock == Some(lock) && held.confirmed == Confirmation::Confirmed
}

/// The frames from the registers outward. Code that waits for a lock holds nothing itself, so the caller of the
/// waiting function is the innermost frame that counts.
fn frames(
    kernel: &Kernel<'_>,
    registers: &Registers,
    cache: &mut CodeCache,
) -> Result<Fault, NotStuck> {
    // Requested privilege level 3 in cs: user mode.
    if registers.get(Reg::Cs).is_some_and(|cs| cs & 3 == 3) {
        return Err(NotStuck::UserMode);
    }
    let start = Start::of(registers).ok_or(NotStuck::Unknown)?;
    let limits = Limits { frames: FRAMES_MAX };
    let (frames, end) = unwind::walk(kernel.image, kernel.memory, cache, &start, limits);
    let spins = frames.first().is_some_and(|frame| SPINS.contains(&function(frame)));
    let at = usize::from(spins);
    let found = frames.len() > at;
    Ok(Fault { frames, end, at, regs_at: None, exception: None, detector: None, found })
}

/// The lock that the innermost frame spins for, if it does.
fn awaited(kernel: &Kernel<'_>, fault: &Fault) -> Result<Option<GuestVirt>, NotStuck> {
    let Some(frame) = fault.frames.first() else { return Err(NotStuck::Unknown) };
    let place = || display(frame);
    if SPINS_OTHERWISE.contains(&function(frame)) {
        return Err(NotStuck::OtherLock { place: place() });
    }
    if !SPINS.contains(&function(frame)) {
        return Ok(None);
    }
    // The loop of virt_spin_lock() calls nothing, so the argument is still where it was passed; whether that is a
    // lock shows when frames are found that hold it.
    let lock = frame.registers.get(Reg::Rdi).map(GuestVirt);
    let lock = lock.filter(|at| at.is_kernel_half() && at.0 % 4 == 0);
    let lock = lock.ok_or_else(|| NotStuck::OtherLock { place: place() })?;
    let word = kernel.memory.read_u32(lock);
    match word.map_err(|_| NotStuck::OtherLock { place: place() })? {
        LOCKED_WITHOUT_QUEUE => Ok(Some(lock)),
        0 => Err(NotStuck::Free { lock }),
        word => Err(NotStuck::Queued { lock, word }),
    }
}

/// The innermost frame of the driver, which must not merely have been interrupted.
fn driver_run(fault: &Fault) -> Result<usize, NotStuck> {
    let segment = segment(fault);
    let Some(run) = module_run(&fault.frames, &segment) else {
        let interrupted = segment.end < fault.frames.len()
            || fault
                .frames
                .get(segment)
                .unwrap_or_default()
                .iter()
                .any(|frame| entered_by_interrupt(frame).is_some() || runs_softirqs(frame));
        return Err(match interrupted {
            true => NotStuck::Interrupted,
            false => NotStuck::NoDriver { place: place(fault) },
        });
    };
    let inner = fault.frames.get(fault.at..run.start).unwrap_or_default();
    match inner.iter().find(|frame| AWAITS_CPUS.contains(&function(frame))) {
        Some(frame) => Err(NotStuck::AwaitsCpus { place: display(frame) }),
        None => Ok(run.start),
    }
}

fn place(fault: &Fault) -> String {
    fault.frames.get(fault.at).map(display).unwrap_or_default()
}

fn call(
    fault: &Fault,
    boundary: &Boundary,
    run: usize,
    vcpu: Vcpu,
    task: GuestVirt,
) -> Option<Call> {
    let caller = fault.frames.get(boundary.frame)?;
    let entry = fault.frames.get(boundary.entry)?;
    let inner = fault.frames.get(run)?;
    Some(Call {
        vcpu,
        task,
        returns_to: caller.pc.ip(),
        rsp: caller.registers.rsp()?,
        entry_at: entry.function_start?,
        module: inner.module.clone()?,
        entry: function(entry).to_owned(),
        function: function(inner).to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UnwindEnd;
    use crate::testing::{DATA, Guest, fault, frame};

    fn run(names: &[(&str, Option<&str>)]) -> Result<usize, NotStuck> {
        let frames = names.iter().map(|(name, module)| frame(name, *module)).collect();
        driver_run(&fault(frames, 0, UnwindEnd::UserMode))
    }

    #[test]
    fn the_innermost_frame_of_the_driver_is_found() {
        assert_eq!(run(&[("delay_tsc", None), ("poll", Some("m")), ("vfs_write", None)]), Ok(1));
    }

    #[test]
    fn an_interrupted_driver_is_looked_at_again() {
        let names =
            [("tick", None), ("asm_sysvec_apic_timer_interrupt", None), ("poll", Some("m"))];
        assert_eq!(run(&names), Err(NotStuck::Interrupted));
        let place = "vfs_write".to_owned();
        assert_eq!(run(&[("vfs_write", None)]), Err(NotStuck::NoDriver { place }));
    }

    #[test]
    fn whoever_waits_for_other_cpus_is_not_the_cause() {
        let names = [("smp_call_function_many_cond", None), ("poll", Some("m"))];
        let place = "smp_call_function_many_cond".to_owned();
        assert_eq!(run(&names), Err(NotStuck::AwaitsCpus { place }));
    }

    fn lock(function: &str, word: u32) -> Result<Option<GuestVirt>, NotStuck> {
        let mut guest = Guest::new();
        guest.poke_u32(DATA, word);
        let image = guest.image();
        let space = guest.machine.space();
        let mut spinning = frame(function, None);
        spinning.registers.set(Reg::Rdi, DATA);
        let fault = fault(vec![spinning], 0, UnwindEnd::UserMode);
        awaited(&Kernel::of_memory(&image, &space), &fault)
    }

    #[test]
    fn only_a_lock_without_a_queue_can_be_left() {
        let at = GuestVirt(DATA);
        assert_eq!(lock(SPINS[0], 1), Ok(Some(at)));
        assert_eq!(lock(SPINS[0], 0), Err(NotStuck::Free { lock: at }));
        for word in [0x101, 0x0004_0001, 3] {
            assert_eq!(lock(SPINS[0], word), Err(NotStuck::Queued { lock: at, word }));
        }
        assert_eq!(lock("poll", 1), Ok(None));
        assert!(matches!(lock(SPINS_OTHERWISE[0], 1), Err(NotStuck::OtherLock { .. })));
    }
}
