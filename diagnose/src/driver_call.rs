//! The diagnosis of a driver's call that was found by looking: no exception, no hook, and a vCPU that stands where the call
//! is to end. What is wrong with the call is its finder's to say.

use guest::{GuestVirt, Hook, HookKind, Vcpu};
use thiserror::Error;

use crate::boundary::{self, Scene};
use crate::code::CodeCache;
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::{Context, CrashClass, Diagnosis, Offender, Task, offender, signature, task};

/// Why such a call can't be ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NotEnded {
    /// It is not known where the vCPU stands.
    #[error("what it executes could not be determined")]
    Unknown,
    /// No driver is seen to be the cause.
    #[error("no driver is seen to be the cause")]
    NoDriver,
    /// There is no caller of the driver that could be returned to.
    #[error("no caller of the driver was found that can be returned to")]
    NoBoundary,
}

/// What its finder knows.
pub(crate) struct DriverCall<'a> {
    pub(crate) kernel: &'a Kernel<'a>,
    pub(crate) vcpu: Vcpu,
    /// Where the vCPU stands, guest-virtual.
    pub(crate) at: GuestVirt,
    pub(crate) class: CrashClass,
    /// Its frames.
    pub(crate) fault: Fault,
    pub(crate) context: Context,
    /// The current task of the CPU, guest-virtual.
    pub(crate) current: Option<GuestVirt>,
    pub(crate) evidence: Vec<String>,
}

impl DriverCall<'_> {
    /// All of it, as of a crash.
    pub(crate) fn diagnose(mut self, cache: &mut CodeCache) -> Result<Diagnosis, NotEnded> {
        let (kernel, fault, context) = (self.kernel, self.fault, self.context);
        let task = self.current.and_then(|at| with_system_call(kernel, at, &fault));
        let offender = offender::of(&fault, &context, task.as_ref(), &mut self.evidence);
        let offender = offender.filter(|it| matches!(it, Offender::Driver { .. }));
        let offender = offender.ok_or(NotEnded::NoDriver)?;
        let scene = Scene { kernel, fault: &fault, context: &context, current: self.current };
        let boundary = boundary::of(&scene, cache, &mut self.evidence);
        let boundary = boundary.ok_or(NotEnded::NoBoundary)?;
        let all_effects = boundary::all_effects(&scene, cache);
        let class = Some(self.class);
        Ok(Diagnosis {
            hook: Some(Hook { kind: HookKind::Stuck, at: self.at }),
            vcpu: self.vcpu,
            title: signature::title(class.as_ref(), &fault, Some(&offender), None),
            signature: signature::id(class.as_ref(), &fault),
            class,
            context,
            task,
            fault_frame: fault.at,
            fault_regs_at: None,
            unwind_end: fault.end,
            frames: fault.frames,
            offender: Some(offender),
            evidence: self.evidence,
            explanation: None,
            boundary: Some(boundary),
            core_exits: Vec::new(),
            all_effects,
            damage: Vec::new(),
            message: None,
            queued: None,
        })
    }
}

/// A task and its system call; `None` when it can't be read.
fn with_system_call(kernel: &Kernel<'_>, at: GuestVirt, fault: &Fault) -> Option<Task> {
    let mut task = task::read(kernel, at).ok()?;
    task.syscall = task::syscall(kernel, &fault.frames, &fault.end);
    Some(task)
}
