//! What each CPU does: who executes there, and its frames from the registers outward.

use guest::{Reg, Registers};
use serde::Serialize;

use super::locals::Locals;
use super::{Backtrace, Section};
use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::unwind::{self, Limits, Start};
use crate::{Diagnosis, Task, context, task};

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Doing {
    /// It crashed.
    Crashed,
    /// It has nothing to do.
    Idle,
    /// It executes a program.
    UserMode,
    /// It executes the kernel.
    Kernel,
    /// Not determined.
    Unknown,
}

/// A CPU.
#[derive(Clone, Debug, Serialize)]
pub struct Cpu {
    /// vCPU, in the order of the dump.
    pub vcpu: usize,
    /// The kernel's number of it.
    pub cpu: Option<usize>,
    /// What it does.
    pub doing: Doing,
    /// Its current task.
    pub task: Section<Task>,
    /// Its preempt count, with the inverted NEED_RESCHED bit (31) as it stands.
    pub preempt_count: Option<u32>,
    /// Its frames; those of the crash, if it crashed.
    pub backtrace: Section<Backtrace>,
}

pub(super) fn of(
    kernel: &Kernel<'_>,
    locals: &Locals<'_>,
    registers: &Registers,
    vcpu: usize,
    crashed: Option<&Diagnosis>,
    cache: &mut CodeCache,
) -> Cpu {
    let found = context::cpu(kernel, registers);
    let task = found.current.map(|at| task::read(kernel, at));
    let idle = found.current.and_then(|at| task::is_idle(kernel, at).ok()).unwrap_or(false);
    let user = in_user_mode(registers);
    let doing = match (crashed, user) {
        (Some(_), _) => Doing::Crashed,
        (None, Some(true)) => Doing::UserMode,
        (None, _) if idle => Doing::Idle,
        (None, Some(false)) => Doing::Kernel,
        (None, None) => Doing::Unknown,
    };
    Cpu {
        vcpu,
        cpu: found.number,
        doing,
        task: match task {
            Some(task) => task.into(),
            None => Section::Unknown("which CPU it is could not be determined".to_owned()),
        },
        preempt_count: found.preempt_count,
        backtrace: match crashed {
            Some(it) => {
                let end = it.unwind_end.clone();
                Section::Known(Backtrace::new(&it.frames, end, locals))
            }
            None => backtrace(kernel, locals, registers, user, cache),
        },
    }
}

/// Whether a program executes: the requested privilege level in cs, else the half of the address space.
fn in_user_mode(registers: &Registers) -> Option<bool> {
    let rip = registers.rip()?;
    Some(registers.get(Reg::Cs).map_or(!rip.is_kernel_half(), |cs| cs & 3 == 3))
}

fn backtrace(
    kernel: &Kernel<'_>,
    locals: &Locals<'_>,
    registers: &Registers,
    user: Option<bool>,
    cache: &mut CodeCache,
) -> Section<Backtrace> {
    if user == Some(true) {
        return Section::Unknown("it executes a program, whose frames are not followed".to_owned());
    }
    let (Some(start), Some(_)) = (Start::of(registers), registers.rsp()) else {
        return Section::Unknown("its registers are not in the dump".to_owned());
    };
    let (frames, end) = unwind::walk(kernel.image, kernel.memory, cache, &start, Limits::default());
    Section::Known(Backtrace::new(&frames, end, locals))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest};

    #[test]
    fn a_program_is_not_unwound_and_missing_registers_are_said() {
        let mut guest = Guest::new().object("current_task", 0x40).cpu(DATA + 0x5000);
        guest.poke_task(DATA + 0x1000, 7, "cat");
        guest.poke_u64(DATA + 0x5040, DATA + 0x1000);
        let image = guest.image();
        let space = guest.machine.space();
        let look = |registers: Registers| {
            let kernel = Kernel::new(&image, &space, &registers);
            let locals = Locals::new(kernel, None);
            of(&kernel, &locals, &registers, 3, None, &mut CodeCache::default())
        };
        let user = Registers::unknown()
            .with(Reg::Rip, 0x40_0000)
            .with(Reg::Rsp, 0x7fff_0000)
            .with(Reg::Cs, 0x33)
            .with(Reg::KernelGsBase, DATA + 0x5000);
        let cpu = look(user);
        assert_eq!((cpu.vcpu, cpu.cpu, cpu.doing), (3, Some(0), Doing::UserMode));
        assert_eq!(cpu.task.known().map(|task| task.pid), Some(7));
        assert!(cpu.backtrace.known().is_none());
        let cpu = look(Registers::unknown());
        assert_eq!(cpu.doing, Doing::Unknown);
        assert!(matches!(cpu.task, Section::Unknown(_)));
        assert!(matches!(cpu.backtrace, Section::Unknown(_)));
    }
}
