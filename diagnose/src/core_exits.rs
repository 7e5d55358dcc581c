//! Places on the way out of a fault of the core kernel where a call could be made to fail: calls through
//! a pointer, and the system call itself. Whether one may be, is not decided here.

use std::ops::Range;

use guest::CodeAddress;

use crate::boundary::{Scene, missing_registers};
use crate::code::{CodeCache, call_before};
use crate::names::{function, helper_reason};
use crate::offender::segment;
use crate::{Boundary, Frame, Offender, Trust};

/// Most places that are listed: real stacks have three or four.
const EXITS_MAX: usize = 8;
/// What the functions of a system call are called, arch/x86/include/asm/syscall_wrapper.h: that of the table, and the
/// one with its body, to which the other may jump.
const SYSCALL: [&str; 2] = ["__x64_sys_", "__do_sys_"];

/// The system call that a function implements, as in `newuname`.
#[must_use]
pub fn syscall_of(function: &str) -> Option<&str> {
    SYSCALL.iter().find_map(|prefix| function.strip_prefix(prefix))
}

/// The places, innermost first; none unless the core kernel is at fault and no driver's frame is among
/// those that would be left.
pub(crate) fn of(
    scene: &Scene<'_>,
    cache: &mut CodeCache,
    offender: Option<&Offender>,
) -> Vec<Boundary> {
    if !matches!(offender, Some(Offender::Process { .. } | Offender::Kernel { .. })) {
        return Vec::new();
    }
    let segment = segment(scene.fault);
    let Some(first) = scene.fault.at.checked_add(1) else { return Vec::new() };
    let frames = &scene.fault.frames;
    let callees = frames.iter().skip(scene.fault.at);
    let pairs = (first..segment.end).zip(callees.zip(frames.iter().skip(first)));
    pairs
        .take_while(|(_, (callee, _))| callee.module.is_none())
        .filter(|(_, (callee, caller))| is_exit(scene, callee, caller))
        .take(EXITS_MAX)
        .map(|(index, (callee, caller))| exit(scene, cache, index, (callee, caller), &segment))
        .collect()
}

/// Whether the caller's call of the callee is one that may be listed.
fn is_exit(scene: &Scene<'_>, callee: &Frame, caller: &Frame) -> bool {
    let CodeAddress::Return(back) = caller.pc else { return false };
    if caller.module.is_some() || !missing_registers(caller).is_empty() {
        return false;
    }
    if caller.trust == Trust::BadCall || syscall_of(function(callee)).is_some() {
        return true;
    }
    // A helper may be called through a pointer, too, but what it is part of is not over.
    if helper_reason(callee).is_some() {
        return false;
    }
    call_before(scene.kernel.memory, back).is_some_and(|call| match call.branch_target() {
        None => true,
        // Retpolines, where the kernel has not replaced them.
        Some(target) => scene
            .kernel
            .image
            .locate(target)
            .is_some_and(|at| at.symbol.name.starts_with("__x86_indirect_")),
    })
}

fn exit(
    scene: &Scene<'_>,
    cache: &mut CodeCache,
    index: usize,
    (callee, caller): (&Frame, &Frame),
    segment: &Range<usize>,
) -> Boundary {
    let inner = scene.innermost()..index;
    let effects = scene.effects(cache, inner, scene.context.interrupts_enabled);
    let outer = scene.effects(cache, index..segment.end, effects.interrupts_before);
    Boundary {
        frame: index,
        entry: index.saturating_sub(1),
        function: function(caller).to_owned(),
        prototype: scene.kernel.image.prototype_at(callee.pc.lookup()),
        effects,
        outer,
    }
}
