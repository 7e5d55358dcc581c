//! A vCPU's hardware breakpoints and single step, as `KVM_SET_GUEST_DEBUG` takes them. Which of them a vCPU is to have
//! is decided in `shared.rs`.
//!
//! While a vCPU has any, the breakpoints that the guest itself sets in its debug registers have no effect, and every
//! #DB comes to userspace; those that are the guest's own (a debugger in the guest that steps) are given back to it.

use guest::GuestVirt;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, kvm_debug_exit_arch, kvm_guest_debug,
};
use kvm_ioctls::VcpuFd;

use crate::Error;
use crate::debug_registers::DEBUG_REGISTERS;

/// DR6: a breakpoint of DR0 to DR3 was met (Intel SDM 3B 18.2.3).
const DR6_BREAKPOINTS: u64 = 0xf;
/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;
/// DR6: all that a debug exception reports and that is not always one.
const DR6_REPORTED: u64 = 0xe00f;
/// DR7: bit 10 is always one, bit 9 (GE) is set for old processors' sake; the rest is off (Intel SDM 3B 18.2.4).
const DR7_BASE: u64 = 0x600;

/// What a vCPU has, or is to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Program {
    breakpoints: [Option<GuestVirt>; DEBUG_REGISTERS],
    /// Come back after one instruction.
    step: bool,
}

/// What a `KVM_EXIT_DEBUG` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A breakpoint of ours, here.
    Hit(GuestVirt),
    /// The step that was ordered is done.
    Stepped,
    /// A #DB of the guest's own.
    Guests,
    /// Nothing was ordered: the VMM debugs the guest.
    Vmms,
}

impl Program {
    /// Execution breakpoints at these addresses. Those past the fourth are left out; callers count.
    pub(super) fn breakpoints(places: impl IntoIterator<Item = GuestVirt>) -> Self {
        let mut program = Self::default();
        for (slot, at) in program.breakpoints.iter_mut().zip(places) {
            *slot = Some(at);
        }
        program
    }

    /// The same, but for a vCPU that stands at `at` and is to get past it: without that breakpoint, for one step.
    pub(super) fn passing(mut self, at: GuestVirt) -> Self {
        for slot in &mut self.breakpoints {
            *slot = slot.filter(|&place| place != at);
        }
        Self { step: true, ..self }
    }

    /// Whether a vCPU with this program stops at an address.
    pub(super) fn has(&self, at: GuestVirt) -> bool {
        self.breakpoints.contains(&Some(at))
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What an exit means to a vCPU with this program.
    pub(super) fn meaning(&self, arch: &kvm_debug_exit_arch) -> Meaning {
        if self.is_empty() {
            return Meaning::Vmms;
        }
        let at = GuestVirt(arch.pc);
        if arch.dr6 & DR6_BREAKPOINTS != 0 && self.has(at) {
            Meaning::Hit(at)
        } else if self.step && arch.dr6 & DR6_STEP != 0 {
            Meaning::Stepped
        } else {
            Meaning::Guests
        }
    }

    /// Gives the program to a vCPU. `block_interrupts`: KVM can keep them back during a step.
    pub(super) fn install(&self, vcpu: &VcpuFd, block_interrupts: bool) -> Result<(), Error> {
        self.set(vcpu, block_interrupts, 0)
    }

    fn set(&self, vcpu: &VcpuFd, block_interrupts: bool, more: u32) -> Result<(), Error> {
        let mut debug = kvm_guest_debug::default();
        if !self.is_empty() {
            debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        }
        if self.step {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
            debug.control |= if block_interrupts { KVM_GUESTDBG_BLOCKIRQ } else { 0 };
        }
        debug.control |= more;
        let mut control = DR7_BASE;
        for (index, at) in self.breakpoints.iter().enumerate() {
            if let (Some(at), Some(register)) = (at, debug.arch.debugreg.get_mut(index)) {
                *register = at.0;
                // Gn; the type (execute) and the length are zero.
                control |= 2 << (2 * index);
            }
        }
        if let Some(register) = debug.arch.debugreg.get_mut(7) {
            *register = control;
        }
        vcpu.set_guest_debug(&debug).map_err(Error::kvm("KVM_SET_GUEST_DEBUG"))
    }

    /// Gives a #DB back to the guest, with what DR6 tells of it, as the processor would have delivered it. Another
    /// exception that is to be delivered goes first, and the #DB is lost; the instruction that caused it is executed
    /// once either way.
    pub(super) fn give_back(
        &self,
        vcpu: &VcpuFd,
        arch: &kvm_debug_exit_arch,
        block_interrupts: bool,
    ) -> Result<(), Error> {
        let mut registers = vcpu.get_debug_regs().map_err(Error::kvm("KVM_GET_DEBUGREGS"))?;
        registers.dr6 = (registers.dr6 & !DR6_BREAKPOINTS) | (arch.dr6 & DR6_REPORTED);
        vcpu.set_debug_regs(&registers).map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        match self.set(vcpu, block_interrupts, KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_ENABLE) {
            Err(Error::Kvm { errno, .. }) if errno.errno() == libc::EBUSY => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(pc: u64, dr6: u64) -> kvm_debug_exit_arch {
        kvm_debug_exit_arch { exception: 1, pc, dr6, ..Default::default() }
    }

    #[test]
    fn exits_are_told_apart() {
        let hooks = Program::breakpoints([GuestVirt(0x1000), GuestVirt(0x2000)]);
        assert_eq!(hooks.meaning(&exit(0x2000, 0xffff_0ff2)), Meaning::Hit(GuestVirt(0x2000)));
        assert_eq!(hooks.meaning(&exit(0x3000, 0xffff_4ff0)), Meaning::Guests);
        let passing = hooks.passing(GuestVirt(0x2000));
        assert_eq!(passing.meaning(&exit(0x2001, 0xffff_4ff0)), Meaning::Stepped);
        assert_eq!(passing.meaning(&exit(0x1000, 0xffff_4ff1)), Meaning::Hit(GuestVirt(0x1000)));
        assert_eq!(Program::default().meaning(&exit(0x1000, 0xffff_0ff1)), Meaning::Vmms);
    }

    #[test]
    fn passing_takes_one_breakpoint_out() {
        let one = Program::breakpoints([GuestVirt(0x1000)]);
        let passing = one.passing(GuestVirt(0x1000));
        assert!(passing.step && passing.breakpoints == [None; 4]);
        assert_eq!(one.passing(GuestVirt(0x5000)).breakpoints, one.breakpoints);
    }
}
