//! Where the fault is among the frames: unwinds from the hook and steps over the kernel's own crash
//! reporting. Says nothing of what the fault is.

use guest::{GuestVirt, Hook, HookKind, Reg, Registers};

use crate::code::{CodeCache, SavedPlace, call_before, saved_place};
use crate::kernel::Kernel;
use crate::names::{Detector, detector, exception_of, function, is_panic, is_reporting};
use crate::unwind::{self, Limits, Start};
use crate::{Error, Frame, Trust, UnwindEnd};

/// Frames at most: a 16 KiB stack full of the smallest frames, and the exception stacks before it.
const FRAMES_MAX: usize = 1200;
/// In a dump, panic() is looked for in this many frames.
const PANIC_WITHIN: usize = 16;

/// The frames of a crash and where the fault is.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) frames: Vec<Frame>,
    pub(crate) end: UnwindEnd,
    /// Index of the frame that faulted.
    pub(crate) at: usize,
    /// The `pt_regs` that the exception saved.
    pub(crate) regs_at: Option<GuestVirt>,
    /// Handler of the exception: `exc_page_fault`; `None` for a panic without one.
    pub(crate) exception: Option<String>,
    /// The detector that called panic().
    pub(crate) detector: Option<Detector>,
    /// Whether `at` is known to be the fault; else unwinding ended among the reporting frames.
    pub(crate) found: bool,
}

impl Fault {
    /// Whether every frame up to user mode or to the outermost was found.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self.end, UnwindEnd::UserMode | UnwindEnd::Outermost)
    }
}

/// Unwinds and finds the fault.
pub(crate) fn find(
    kernel: &Kernel<'_>,
    registers: &Registers,
    hook: Option<Hook>,
    cache: &mut CodeCache,
) -> Result<Fault, Error> {
    registers.rsp().ok_or(Error::UnknownRegister(Reg::Rsp))?;
    let (frames, end) = walk(kernel, registers, cache)?;
    let kind = hook.map(|hook| hook.kind);
    let fault = match kind {
        Some(HookKind::OopsBegin | HookKind::DoubleFault | HookKind::StackOverflow) => {
            of_exception(frames, end)
        }
        _ => distrusted(kernel, of_panic(frames, end), cache),
    };
    if !fault.found && matches!(kind, Some(HookKind::DoubleFault | HookKind::StackOverflow)) {
        // Both get `struct pt_regs *` as their first argument, and the hook is at their entry.
        let first_argument = registers.get(Reg::Rdi).map(GuestVirt);
        if let Some(other) = first_argument.and_then(|at| from_saved(kernel, at, &fault, cache)) {
            return Ok(other);
        }
    }
    Ok(fault)
}

fn walk(
    kernel: &Kernel<'_>,
    registers: &Registers,
    cache: &mut CodeCache,
) -> Result<(Vec<Frame>, UnwindEnd), Error> {
    let start = Start::of(registers).ok_or(Error::UnknownRegister(Reg::Rip))?;
    let limits = Limits { frames: FRAMES_MAX };
    Ok(unwind::walk(kernel.image, kernel.memory, cache, &start, limits))
}

/// After the stack protector: what overwrote the canary of a frame may have gone on to the registers that
/// the frame saved, and to its return address, in this order. The return address is believed if it
/// follows a call of the function; registers that the function saved are not.
fn distrusted(kernel: &Kernel<'_>, mut fault: Fault, cache: &mut CodeCache) -> Fault {
    let by_canary = |frame: &Frame| frame.module.is_none() && function(frame) == "__stack_chk_fail";
    let reporting = fault.frames.get(..fault.at).unwrap_or_default();
    if !reporting.last().is_some_and(by_canary) {
        return fault;
    }
    let (Some(frame), Some(outer)) = (fault.frames.get(fault.at), fault.at.checked_add(1)) else {
        return fault;
    };
    let kept = unsaved(kernel, frame, cache);
    let start = fault.frames.get(outer).and_then(|caller| {
        let call = call_before(kernel.memory, caller.pc.ip())?;
        let target = call.branch_target();
        if target.is_some() && target != frame.function_start {
            return None;
        }
        let mut registers = caller.registers;
        let lost = Reg::CALLEE_SAVED.into_iter().filter(|reg| !kept.contains(reg));
        lost.for_each(|reg| registers.forget(reg));
        Some(Start { registers, pc: caller.pc })
    });
    let trust = fault.frames.get(outer).map(|caller| caller.trust);
    let ip = frame.pc.ip();
    fault.frames.truncate(outer);
    let Some(start) = start else {
        fault.end = UnwindEnd::NoRow(ip);
        return fault;
    };
    let limits = Limits { frames: FRAMES_MAX };
    let (mut frames, end) = unwind::walk(kernel.image, kernel.memory, cache, &start, limits);
    if let (Some(first), Some(trust)) = (frames.first_mut(), trust) {
        first.trust = trust;
    }
    fault.frames.extend(frames);
    fault.end = end;
    fault
}

/// Callee-saved registers that the function of a frame leaves alone, on every way to where it is.
fn unsaved(kernel: &Kernel<'_>, frame: &Frame, cache: &mut CodeCache) -> Vec<Reg> {
    let table = cache.table(kernel.image);
    let Some(analysis) = cache.analysis(kernel.image, kernel.memory, frame.pc.lookup()) else {
        return Vec::new();
    };
    let states = analysis.at(&table, frame.pc).states;
    let same = |reg: &Reg| {
        !states.is_empty()
            && states.iter().all(|state| saved_place(state, *reg) == Some(SavedPlace::Same))
    };
    Reg::CALLEE_SAVED.into_iter().filter(same).collect()
}

/// An exception always saved registers: the fault is the first frame read from them.
fn of_exception(frames: Vec<Frame>, end: UnwindEnd) -> Fault {
    let saved = first_saved(&frames, 0);
    build(frames, end, saved, None)
}

/// `panic()`: the fault is its caller, unless that is reporting, too, or a detector that interrupted
/// the culprit.
fn of_panic(frames: Vec<Frame>, end: UnwindEnd) -> Fault {
    let start = frames.iter().take(PANIC_WITHIN).position(is_panic).unwrap_or(0);
    let past = frames.iter().enumerate().skip(start).find(|(index, frame)| {
        (*index > start && frame.trust == Trust::SavedRegisters) || !is_reporting(frame)
    });
    let past = past.map(|(index, _)| index);
    let detector = past.and_then(|index| frames.get(index)).and_then(detector);
    // The hung-task detector is a thread and interrupts nobody.
    let interrupted = match detector {
        Some(Detector::HungTask) | None => None,
        Some(_) => past.and_then(|index| first_saved(&frames, index)),
    };
    build(frames, end, interrupted.or(past), detector)
}

fn first_saved(frames: &[Frame], from: usize) -> Option<usize> {
    let after = from.checked_add(1)?;
    let mut later = frames.iter().enumerate().skip(after);
    later.find(|(_, frame)| frame.trust == Trust::SavedRegisters).map(|(index, _)| index)
}

fn build(
    frames: Vec<Frame>,
    end: UnwindEnd,
    at: Option<usize>,
    detector: Option<Detector>,
) -> Fault {
    let found = at.is_some();
    let at = at.unwrap_or_else(|| frames.len().saturating_sub(1));
    let fault = frames.get(at).filter(|_| found);
    let regs_at =
        fault.filter(|frame| frame.trust == Trust::SavedRegisters).and_then(|frame| frame.saved_at);
    let reporting = frames.get(..at).unwrap_or_default();
    let exception = reporting.iter().rev().find_map(exception_of).map(str::to_owned);
    let exception = exception.filter(|_| detector.is_none());
    Fault { frames, end, at, regs_at, exception, detector, found }
}

/// Unwinds anew from a `pt_regs`, keeping the reporting frame that the hook is in.
fn from_saved(
    kernel: &Kernel<'_>,
    regs_at: GuestVirt,
    failed: &Fault,
    cache: &mut CodeCache,
) -> Option<Fault> {
    let registers = unwind::read_pt_regs(kernel.image, kernel.memory, regs_at)?;
    let (outer, end) = walk(kernel, &registers, cache).ok()?;
    let mut frames: Vec<Frame> = failed.frames.iter().take(1).cloned().collect();
    let at = frames.len();
    frames.extend(outer);
    let fault = frames.get_mut(at)?;
    fault.trust = Trust::SavedRegisters;
    fault.saved_at = Some(regs_at);
    Some(build(frames, end, Some(at), None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{frame, saved};

    /// Frames by name; `*` marks one whose registers came from a `pt_regs`, `m:` one of a module.
    fn frames(names: &str) -> Vec<Frame> {
        let of = |name: &str| {
            let bare = name.trim_start_matches('*');
            let found = match bare.strip_prefix("m:") {
                Some(function) => frame(function, Some("m")),
                None => frame(bare, None),
            };
            if bare == name { found } else { saved(found) }
        };
        names.split(" < ").map(of).collect()
    }

    fn panic(names: &str) -> (usize, Option<Detector>, Option<String>, bool) {
        let fault = of_panic(frames(names), UnwindEnd::UserMode);
        (fault.at, fault.detector, fault.exception, fault.regs_at.is_some())
    }

    #[test]
    fn an_exception_is_where_registers_were_saved() {
        let names = "oops_begin < page_fault_oops < exc_page_fault < asm_exc_page_fault < *m:bw < vfs_write";
        let fault = of_exception(frames(names), UnwindEnd::UserMode);
        assert_eq!((fault.at, fault.found), (4, true));
        assert_eq!(fault.exception.as_deref(), Some("exc_page_fault"));
        assert!(fault.regs_at.is_some());
        let lost = of_exception(frames("oops_begin < die"), UnwindEnd::TooDeep);
        assert!(!lost.found && lost.at == 1);
    }

    #[test]
    fn panic_blames_its_caller() {
        assert_eq!(panic("panic < m:bw < vfs_write"), (1, None, None, false));
        // In an interrupt handler the interrupted code is not at fault.
        let names = "panic < m:isr < __handle_irq_event_percpu < asm_common_interrupt < *m:bw";
        assert_eq!(panic(names), (1, None, None, false));
    }

    #[test]
    fn panic_after_an_oops_or_a_warning_is_the_exception() {
        let names =
            "panic < oops_end < page_fault_oops < exc_page_fault < asm_exc_page_fault < *m:bw";
        assert_eq!(panic(names), (5, None, Some("exc_page_fault".to_owned()), true));
        let names = "panic < check_panic_on_warn < __warn < report_bug < handle_bug < exc_invalid_op \
                     < asm_exc_invalid_op < *m:bw";
        assert_eq!(panic(names), (7, None, Some("exc_invalid_op".to_owned()), true));
    }

    #[test]
    fn a_detector_leads_to_what_it_interrupted() {
        let names = "panic < watchdog_timer_fn.cold < __hrtimer_run_queues < \
                     asm_sysvec_apic_timer_interrupt < *m:bw < vfs_write";
        assert_eq!(panic(names), (4, Some(Detector::SoftLockup), None, true));
        let names =
            "panic < nmi_panic < watchdog_overflow_callback < exc_nmi < asm_exc_nmi < *m:bw";
        assert_eq!(panic(names), (5, Some(Detector::HardLockup), None, true));
        let names = "panic < watchdog < kthread < ret_from_fork";
        assert_eq!(panic(names), (1, Some(Detector::HungTask), None, false));
    }

    #[test]
    fn a_dump_may_stand_behind_the_panic() {
        let names = "machine_kexec < __crash_kexec < panic < sysrq_handle_crash < vfs_write";
        assert_eq!(panic(names), (3, None, None, false));
        let names = "delay_tsc < panic < m:bw < vfs_write";
        assert_eq!(panic(names), (2, None, None, false));
    }
}
