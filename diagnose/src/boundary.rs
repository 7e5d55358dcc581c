//! Where an error can be returned to: the first core-kernel frame outside the offending driver, if
//! every register that a return to it needs is known.

use std::ops::Range;

use guest::{GuestVirt, Reg};
use repair_image::FrameKind;

use crate::code::CodeCache;
use crate::effects::{self, Around};
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::names::{display, function};
use crate::offender::{module_run, segment};
use crate::{Boundary, Context, ExecutionContext, Frame, FrameEffects, Trust};

/// Registers that must be known in the frame that is returned to.
const NEEDED: [Reg; 8] =
    [Reg::Rip, Reg::Rsp, Reg::Rbx, Reg::Rbp, Reg::R12, Reg::R13, Reg::R14, Reg::R15];

/// What surrounds the frames of one crash, the same for every question about them.
pub(crate) struct Scene<'a> {
    pub(crate) kernel: &'a Kernel<'a>,
    pub(crate) fault: &'a Fault,
    pub(crate) context: &'a Context,
    /// The current task of the CPU.
    pub(crate) current: Option<GuestVirt>,
}

impl Scene<'_> {
    /// What the frames of `range` hold.
    pub(crate) fn effects(
        &self,
        cache: &mut CodeCache,
        range: Range<usize>,
        interrupts_enabled: Option<bool>,
    ) -> FrameEffects {
        let image = self.kernel.image;
        let per_cpu = self.context.cpu.and_then(|cpu| image.placement.per_cpu.get(cpu)).copied();
        let frames = &self.fault.frames;
        let whole = range.end == segment(self.fault).end
            && (range.end < frames.len() || self.fault.is_complete());
        let around = Around { task: self.current, interrupts_enabled, per_cpu, whole };
        let mut found = effects::of(image, self.kernel.memory, cache, frames, range, &around);
        found.undetermined.retain(|&index| !frames.get(index).is_some_and(|it| self.is_entry(it)));
        found
    }

    /// Whether a frame is entry code, in assembly: code analysis can't follow it, and it takes no lock.
    fn is_entry(&self, frame: &Frame) -> bool {
        let row = self.kernel.image.unwind_row(frame.pc.lookup());
        frame.module.is_none() && row.is_some_and(|row| row.kind != FrameKind::Call)
    }

    /// First frame that can hold anything: after a call to a bad address, its caller.
    pub(crate) fn innermost(&self) -> usize {
        let next = self.fault.at.saturating_add(1);
        match self.fault.frames.get(next).map(|frame| frame.trust) {
            Some(Trust::BadCall) => next,
            _ => self.fault.at,
        }
    }
}

/// The boundary of a driver's frames, `None` when there is none that can be returned to.
pub(crate) fn of(
    scene: &Scene<'_>,
    cache: &mut CodeCache,
    evidence: &mut Vec<String>,
) -> Option<Boundary> {
    let fault = scene.fault;
    let segment = segment(fault);
    let run = module_run(&fault.frames, &segment)?;
    let (entry, boundary) = (run.end.checked_sub(1)?, run.end);
    if boundary >= segment.end {
        evidence.push("no core-kernel frame outside the driver was found".to_owned());
        return None;
    }
    let frame = fault.frames.get(boundary)?;
    let missing = missing_registers(frame);
    if !missing.is_empty() {
        evidence.push(format!(
            "a return to {} needs {}, which could not be recovered",
            display(frame),
            missing.join(", ")
        ));
        return None;
    }
    note_outer_modules(fault, boundary..segment.end, evidence);
    let inner = scene.innermost()..run.end;
    let effects = scene.effects(cache, inner, scene.context.interrupts_enabled);
    // When control is back in the boundary, interrupts are as they were before the entry was called.
    let outer = scene.effects(cache, boundary..segment.end, effects.interrupts_before);
    Some(Boundary {
        frame: boundary,
        entry,
        function: function(frame).to_owned(),
        prototype: scene.kernel.image.prototype_at(fault.frames.get(entry)?.pc.lookup()),
        effects,
        outer,
    })
}

/// What everything from the fault outward holds, in task context with all frames known.
pub(crate) fn all_effects(scene: &Scene<'_>, cache: &mut CodeCache) -> Option<FrameEffects> {
    let (fault, context) = (scene.fault, scene.context);
    let complete = fault.found && fault.is_complete() && context.kind == ExecutionContext::Task;
    let range = scene.innermost()..fault.frames.len();
    complete.then(|| scene.effects(cache, range, context.interrupts_enabled))
}

pub(crate) fn missing_registers(frame: &Frame) -> Vec<&'static str> {
    let missing = NEEDED.iter().filter(|&&reg| frame.registers.get(reg).is_none());
    missing.map(|reg| reg.name()).collect()
}

fn note_outer_modules(fault: &Fault, range: Range<usize>, evidence: &mut Vec<String>) {
    let outer = fault.frames.get(range).unwrap_or_default();
    let mut modules: Vec<&str> = outer.iter().filter_map(|frame| frame.module.as_deref()).collect();
    modules.dedup();
    if !modules.is_empty() {
        evidence.push(format!("further out lie frames of {} again", modules.join(", ")));
    }
}
