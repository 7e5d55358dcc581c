//! How a hook is armed. [`HookPlacement`] is all the rest knows of it; hardware breakpoints of the gdb stub are
//! one way, code that the hypervisor places at the hook would be another.

use guest::{GuestVirt, Hook, Vcpu};

use super::stub::Stub;
use crate::{Error, debug_registers};

/// A way to make the machine stop when a vCPU reaches a hook. The machine stands at each call.
pub(crate) trait HookPlacement: Send {
    /// Arms these hooks. On failure none of them is armed.
    fn arm(&mut self, stub: &mut Stub, hooks: &[Hook]) -> Result<(), Error>;

    /// Takes away what is armed.
    fn disarm(&mut self, stub: &mut Stub) -> Result<(), Error>;

    /// The hook that a vCPU stands on which was stopped by it with this instruction pointer.
    fn hook_at(&self, rip: GuestVirt) -> Option<Hook>;

    /// The hook that is to be without its breakpoint while a call's end has one, if breakpoints are short.
    fn lend(&self) -> Result<Option<Hook>, Error>;

    /// Lets a vCPU that stands on a hook execute the first instruction of the function, the others standing.
    fn pass(&mut self, stub: &mut Stub, vcpu: Vcpu, hook: Hook) -> Result<(), Error>;
}

/// Hardware breakpoints (`Z1`): debug registers under KVM, of which a CPU has four; any number under TCG.
#[derive(Default)]
pub(crate) struct HardwareBreakpoints {
    armed: Vec<Hook>,
}

/// The packet that sets a breakpoint.
pub(crate) fn set(at: GuestVirt) -> String {
    format!("Z1,{:x},1", at.0)
}

/// The packet that removes a breakpoint.
pub(crate) fn clear(at: GuestVirt) -> String {
    format!("z1,{:x},1", at.0)
}

impl HookPlacement for HardwareBreakpoints {
    fn arm(&mut self, stub: &mut Stub, hooks: &[Hook]) -> Result<(), Error> {
        self.disarm(stub)?;
        for hook in hooks {
            match stub.order(&[set(hook.at)]) {
                Ok(()) => self.armed.push(*hook),
                Err(error) => {
                    self.disarm(stub)?;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn disarm(&mut self, stub: &mut Stub) -> Result<(), Error> {
        let packets: Vec<String> = self.armed.iter().map(|hook| clear(hook.at)).collect();
        stub.order(&packets)?;
        self.armed.clear();
        Ok(())
    }

    fn hook_at(&self, rip: GuestVirt) -> Option<Hook> {
        self.armed.iter().find(|hook| hook.at == rip).copied()
    }

    fn lend(&self) -> Result<Option<Hook>, Error> {
        debug_registers::lend(&self.armed)
    }

    /// A vCPU that is resumed on a breakpoint reports it again at once (accel/tcg/cpu-exec.c,
    /// check_for_breakpoints; under KVM, too), so the breakpoint goes away for one step.
    fn pass(&mut self, stub: &mut Stub, vcpu: Vcpu, hook: Hook) -> Result<(), Error> {
        stub.step(&[clear(hook.at)], vcpu)?;
        stub.order(&[set(hook.at)])
    }
}
