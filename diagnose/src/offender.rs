//! Who is at fault: driver, process or the core kernel, and the facts that say so. A frame that merely
//! was interrupted is never looked at; core code is at fault unless it only did what it was asked to.

use std::ops::Range;

use repair_image::SourceFrame;

use crate::class::takes_from_free_list;
use crate::fault::Fault;
use crate::names::{
    Detector, display, entered_by_interrupt, function, helper_reason, runs_softirqs,
};
use crate::{Context, ExecutionContext, Frame, Offender, Task, UnwindEnd};

/// Core frames that are no helpers and may lie between the fault and the driver that is blamed: a
/// kernel function which the driver called with bad arguments, and two that it called itself. Further
/// in, the core kernel's own state is as likely the cause.
const API_DEPTH: usize = 3;

/// Frames from the fault outward that ran in the fault's context: up to the entry that interrupted
/// something else.
pub(crate) fn segment(fault: &Fault) -> Range<usize> {
    let from_fault = fault.frames.iter().enumerate().skip(fault.at);
    let mut ends = from_fault
        .filter(|(_, frame)| runs_softirqs(frame) || entered_by_interrupt(frame).is_some());
    let end = ends.next().map_or(fault.frames.len(), |(index, _)| index + 1);
    fault.at..end
}

/// The innermost run of module frames of a segment.
pub(crate) fn module_run(frames: &[Frame], segment: &Range<usize>) -> Option<Range<usize>> {
    let part = frames.get(segment.clone())?;
    let first = part.iter().position(|frame| frame.module.is_some())?;
    let run = part.iter().skip(first).take_while(|frame| frame.module.is_some()).count();
    let start = segment.start + first;
    Some(start..start + run)
}

/// Names the offender; evidence gets one line a fact.
pub(crate) fn of(
    fault: &Fault,
    context: &Context,
    task: Option<&Task>,
    evidence: &mut Vec<String>,
) -> Option<Offender> {
    if !fault.found {
        evidence.push("unwinding ended before the faulting frame".to_owned());
        return None;
    }
    if let Some(reason) = watches_others(fault) {
        evidence.push(reason.to_owned());
        return None;
    }
    if fault.frames.get(fault.at).is_some_and(takes_from_free_list) {
        evidence.push(
            "a free list of the allocator leads to no object: whoever wrote there is not among these \
             frames, which only allocate"
                .to_owned(),
        );
        return None;
    }
    let segment = segment(fault);
    let run = module_run(&fault.frames, &segment);
    let core = fault.at..run.as_ref().map_or(segment.end, |run| run.start);
    let core = fault.frames.get(core).unwrap_or_default();
    let blamed = core.iter().find(|frame| !passes_blame(frame));
    let depth = core.iter().filter(|frame| !passes_blame(frame)).count();
    if let Some(frame) = run.as_ref().and_then(|run| fault.frames.get(run.start)) {
        if depth <= API_DEPTH {
            return driver(frame, core, depth, evidence);
        }
        evidence.push(format!(
            "{} is {depth} core-kernel frames away from the fault: not blamed",
            display(frame)
        ));
    }
    let frame = match blamed {
        Some(frame) => frame,
        None if segment_ended(fault, &segment) => core.last()?,
        None => {
            evidence.push(format!(
                "frames end at {} before any caller that could be blamed",
                core.last().map(display).unwrap_or_default()
            ));
            return None;
        }
    };
    passed_over(core, evidence);
    core_offender(frame, context, task, evidence)
}

/// Detectors whose interrupted frame is not the culprit.
fn watches_others(fault: &Fault) -> Option<&'static str> {
    let reporting = fault.frames.get(..fault.at).unwrap_or_default();
    let by = |name: &str| {
        reporting.iter().any(|frame| crate::names::functions(frame).any(|f| f == name))
    };
    match fault.detector? {
        Detector::HungTask => {
            Some("the hung-task detector found another task; its frames are not these")
        }
        Detector::RcuStall if by("print_other_cpu_stall") => {
            Some("the RCU stall is another CPU's; these frames are of the CPU that reported it")
        }
        Detector::HardLockup if by("watchdog_timer_fn") => {
            Some("the hard lockup is another CPU's; these frames are of the CPU that reported it")
        }
        _ => None,
    }
}

/// Whether a core frame leaves the blame to its caller.
fn passes_blame(frame: &Frame) -> bool {
    // A frame in no function: a call through a bad pointer, and the caller chose the pointer.
    helper_reason(frame).is_some() || (frame.module.is_none() && frame.function.is_none())
}

fn segment_ended(fault: &Fault, segment: &Range<usize>) -> bool {
    segment.end < fault.frames.len()
        || matches!(fault.end, UnwindEnd::UserMode | UnwindEnd::Outermost)
}

fn passed_over(core: &[Frame], evidence: &mut Vec<String>) {
    for frame in core {
        if let Some(reason) = helper_reason(frame) {
            evidence.push(format!("{} is not blamed: {reason}", display(frame)));
        } else if frame.function.is_none() {
            evidence.push(format!("{:#x} is no code: its caller called it", frame.pc.ip()));
        }
    }
}

fn driver(
    frame: &Frame,
    core: &[Frame],
    depth: usize,
    evidence: &mut Vec<String>,
) -> Option<Offender> {
    let module = frame.module.clone()?;
    passed_over(core, evidence);
    match core.first() {
        None => evidence.push(format!("the fault is in {}", display(frame))),
        Some(_) if depth == 0 => {
            evidence.push(format!("{} is the innermost frame of a module", display(frame)));
        }
        Some(first) => evidence.push(format!(
            "{} was reached from {} through {depth} core-kernel function(s) that are no plain helpers: \
             bad arguments are likelier than a bug of theirs",
            display(first),
            display(frame)
        )),
    }
    Some(Offender::Driver {
        module,
        function: function(frame).to_owned(),
        source: own_place(frame),
    })
}

fn core_offender(
    frame: &Frame,
    context: &Context,
    task: Option<&Task>,
    evidence: &mut Vec<String>,
) -> Option<Offender> {
    let function = match function(frame) {
        "" => return None,
        name => name.to_owned(),
    };
    let source = own_place(frame);
    let user = task.filter(|task| {
        context.kind == ExecutionContext::Task && !context.idle && !task.kernel_thread
    });
    match user {
        Some(task) => {
            evidence
                .push(format!("no driver at fault; in task context on behalf of {}", task.comm));
            Some(Offender::Process {
                pid: task.pid,
                tgid: task.tgid,
                comm: task.comm.clone(),
                function,
                source,
            })
        }
        None => {
            evidence.push("no driver at fault, and no process that could be".to_owned());
            Some(Offender::Kernel { function, source })
        }
    }
}

/// The innermost place of a frame that lies in the object's own source, not in a header that it
/// includes: `list_del()` inlined into a driver is in the driver.
pub(crate) fn own_place(frame: &Frame) -> Option<SourceFrame> {
    let own = frame.source.iter().find(|level| !level.file.ends_with(".h"));
    own.or(frame.source.last()).cloned()
}

#[cfg(test)]
mod tests {
    use guest::GuestVirt;

    use super::*;
    use crate::testing::{context, fault, frame, level, saved, task};

    fn blame(names: &[(&str, Option<&str>)], end: UnwindEnd) -> (Option<Offender>, Vec<String>) {
        let frames = names.iter().map(|(name, module)| frame(name, *module)).collect();
        let mut evidence = Vec::new();
        let offender = of(
            &fault(frames, 0, end),
            &context(ExecutionContext::Task),
            Some(&task(7, "dd")),
            &mut evidence,
        );
        (offender, evidence)
    }

    fn module_of(offender: Option<Offender>) -> Option<String> {
        match offender {
            Some(Offender::Driver { module, .. }) => Some(module),
            _ => None,
        }
    }

    #[test]
    fn a_helper_puts_the_blame_on_its_caller() {
        let (offender, evidence) = blame(
            &[("__memcpy", None), ("bw", Some("m")), ("vfs_write", None)],
            UnwindEnd::UserMode,
        );
        assert_eq!(module_of(offender), Some("m".to_owned()));
        assert!(evidence.iter().any(|line| line.contains("__memcpy is not blamed")));
    }

    #[test]
    fn the_stack_above_a_driver_far_away_is_not_its_fault() {
        let (offender, _) = blame(
            &[
                ("tcp_ack", None),
                ("tcp_rcv_established", None),
                ("tcp_v4_do_rcv", None),
                ("ip_rcv", None),
                ("poll", Some("virtio_net")),
                ("net_rx_action", None),
            ],
            UnwindEnd::UserMode,
        );
        let Some(Offender::Process { function, pid, .. }) = offender else {
            panic!("{offender:?}")
        };
        assert_eq!((function.as_str(), pid), ("tcp_ack", 7));
    }

    #[test]
    fn what_was_interrupted_is_not_looked_at() {
        let mut frames = vec![
            frame("tick_sched_timer", None),
            frame("asm_sysvec_apic_timer_interrupt", None),
            frame("bw", Some("m")),
        ];
        frames[2] = saved(frames[2].clone());
        let mut context = context(ExecutionContext::Hardirq);
        context.idle = false;
        let fault = fault(frames, 0, UnwindEnd::UserMode);
        assert_eq!(segment(&fault), 0..2);
        let offender = of(&fault, &context, Some(&task(7, "dd")), &mut Vec::new());
        let Some(Offender::Kernel { function, .. }) = offender else { panic!("{offender:?}") };
        assert_eq!(function, "tick_sched_timer");
    }

    #[test]
    fn nothing_is_said_when_only_helpers_were_found() {
        let end = UnwindEnd::NoRow(GuestVirt(1));
        assert_eq!(blame(&[("strlen", None)], end.clone()).0, None);
        assert!(blame(&[("strlen", None), ("vfs_write", None)], end).0.is_some());
    }

    #[test]
    fn a_header_is_not_the_place() {
        let mut one = frame("bw", Some("m"));
        one.source = vec![level("list_del", "include/linux/list.h", 9), level("bw", "m.c", 5)];
        assert_eq!(own_place(&one).map(|level| level.line), Some(5));
    }
}
