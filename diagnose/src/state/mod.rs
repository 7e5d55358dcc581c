//! What a machine was doing, beside the crash itself: CPUs, tasks, who waits for whom, modules, kernel log, memory.
//! Each section is known or says why not. Reads only; who is at fault is not judged here.

mod cpus;
mod kernel_log;
mod locals;
mod memory;
mod modules;
mod pending;
mod place;
mod section;
mod variables;
mod waiting;

use guest::{PhysMemory, Registers};
use repair_image::{LoadedModule, RepairImage};
use serde::Serialize;

pub use cpus::{Cpu, Doing};
pub use kernel_log::{KernelLog, Record, newest};
pub use locals::DebugFiles;
pub use memory::Memory;
pub use modules::ModuleInfo;
pub use pending::{Pending, PendingKind};
pub use place::{Backtrace, Place};
pub use section::Section;
pub use variables::{Content, FrameVariables, Value};
pub use waiting::{Blocked, Lock, LockKind, Waiting, Who};

use locals::Locals;

use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::tasks::{self, TaskPosition};
use crate::{Diagnosis, Offender};

/// What a machine was doing.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// One for each vCPU whose registers are there; empty when no registers are.
    pub cpus: Vec<Cpu>,
    /// Parameters and variables of the frames of the crash, as far as debug information places them.
    pub variables: Section<Vec<FrameVariables>>,
    /// Tasks that sleep and that no signal wakes, the locks they wait for, and circles of waiting.
    pub waiting: Section<Waiting>,
    /// Timers and work of the driver at fault that the kernel would still run.
    pub pending: Section<Vec<Pending>>,
    /// Every task, idle tasks included.
    pub tasks: Section<Vec<TaskPosition>>,
    /// Modules, in the kernel's order.
    pub modules: Vec<ModuleInfo>,
    /// The kernel's memory, in pages.
    pub memory: Section<Memory>,
    /// The end of the kernel log.
    pub log: Section<KernelLog>,
}

/// What the state is read from.
pub struct Sources<'a> {
    /// The repair image of the kernel in the machine.
    pub image: &'a RepairImage,
    /// Its memory.
    pub phys: &'a dyn PhysMemory,
    /// Registers of all vCPUs, by number.
    pub vcpus: &'a [Registers],
    /// Modules, as its memory tells of them.
    pub modules: &'a [LoadedModule],
    /// The diagnosis of its crash, if there is one.
    pub diagnosis: Option<&'a Diagnosis>,
    /// Files with debug information, where they are at hand: variables of frames are read from them.
    pub debug: Option<&'a dyn DebugFiles>,
}

/// Reads the state. What can't be read says so; there is no error.
#[must_use]
pub fn of(sources: &Sources<'_>, cache: &mut CodeCache) -> State {
    let Sources { image, phys, vcpus, diagnosis, .. } = *sources;
    cache.look_again();
    let space = image.placement.space(phys);
    let kernel = Kernel::of_memory(image, &space);
    let locals = Locals::new(kernel, sources.debug);
    // First of all: those of others are left out where there are too many.
    let variables = variables::of(&kernel, diagnosis, &locals);
    let cpus = vcpus.iter().enumerate().map(|(vcpu, registers)| {
        let crashed = diagnosis.filter(|it| it.vcpu.0 == vcpu && it.class.is_some());
        let kernel = Kernel::new(image, &space, registers);
        cpus::of(&kernel, &locals, registers, vcpu, crashed, cache)
    });
    let cpus = cpus.collect();
    let tasks = tasks::all(image, &space);
    let waiting = match &tasks {
        Ok(tasks) => Section::Known(waiting::of(&kernel, tasks, &locals, cache)),
        Err(error) => Section::unknown(error),
    };
    State {
        cpus,
        variables,
        waiting,
        pending: pending::of(&kernel, driver(diagnosis)),
        tasks: tasks.map_or_else(|error| Section::unknown(&error), Section::Known),
        modules: sources.modules.iter().map(modules::of).collect(),
        memory: memory::of(&kernel).into(),
        log: kernel_log::of(&kernel).into(),
    }
}

/// The module at fault.
fn driver(diagnosis: Option<&Diagnosis>) -> Option<&str> {
    match diagnosis?.offender.as_ref()? {
        Offender::Driver { module, .. } => Some(module),
        _ => None,
    }
}
