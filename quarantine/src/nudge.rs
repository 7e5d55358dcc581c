//! Waking one sleeping task by the kernel's own function, from the timer tick of whatever CPU has one next. A
//! wake-up for no reason is always allowed: whoever is not done goes to sleep again. Why is its caller's business.

use guest::{GuestVirt, Machine, RFLAGS_IF, Reg, Registers, Vcpu, VirtMemory};
use repair_image::RepairImage;

use crate::apply::Hand;
use crate::{Error, Journal};

/// The functions of the timer tick with neither arguments nor result (kernel/sched/core.c): `sched_tick()` since
/// v6.10, before that `scheduler_tick()`. They are called from a timer's callback, in which the kernel wakes tasks
/// itself (`hrtimer_wakeup()`): interrupts off, RCU watching, no lock of the scheduler or of timers held.
const TICKS: [&str; 2] = ["sched_tick", "scheduler_tick"];
/// What wakes a task, kernel/sched/core.c.
const WAKE: &str = "wake_up_process";

/// Where a vCPU must stand for [`nudge()`]: the entry of the tick's function, guest-virtual. `None` for a kernel that
/// lacks it or `wake_up_process()`.
#[must_use]
pub fn nudge_at(image: &RepairImage) -> Option<GuestVirt> {
    image.address_of(WAKE)?;
    TICKS.iter().find_map(|name| image.address_of(name))
}

/// Has `vcpu`, which stands at [`nudge_at()`], call `wake_up_process(task)` before it goes on where it stands. The
/// machine stands, and is left standing; the hook must be off before it is resumed.
///
/// # Errors
/// The vCPU does not stand there with interrupts off, or the machine failed: nothing was changed, or it was taken
/// back.
pub fn nudge(
    machine: &mut dyn Machine,
    image: &RepairImage,
    journal: &mut Journal,
    vcpu: Vcpu,
    task: GuestVirt,
) -> Result<(), Error> {
    let registers = machine.registers(vcpu).map_err(Error::machine("reading registers"))?;
    let elsewhere = || Error::NoAbility { ability: "wake a task where the vCPU stands" };
    let (Some(tick), Some(wake)) = (nudge_at(image), image.address_of(WAKE)) else {
        return Err(elsewhere());
    };
    let on = registers.get(Reg::Rflags).is_none_or(|flags| flags & RFLAGS_IF != 0);
    let rsp = registers.rsp().filter(|rsp| rsp.is_kernel_half() && rsp.0 % 8 == 0);
    let (Some(rsp), false) = (rsp.filter(|_| registers.rip() == Some(tick)), on) else {
        return Err(elsewhere());
    };
    // At a function's entry nothing is below its return address, and the kernel has no red zone.
    let slot = GuestVirt(rsp.0.wrapping_sub(8));
    let space = image.placement.space(machine.phys());
    space.read_u64(slot).map_err(|source| Error::memory("the stack", source))?;
    let mark = journal.entries().len();
    let mut hand = Hand { machine, image, journal };
    let call =
        Registers::unknown().with(Reg::Rip, wake.0).with(Reg::Rdi, task.0).with(Reg::Rsp, slot.0);
    let done = hand
        .write_virt(slot, &tick.0.to_le_bytes(), false, "the wake-up returns to the tick")
        .and_then(|()| hand.set_registers(vcpu, &call, "wake the task"));
    done.map_err(|cause| match hand.roll_back(mark) {
        Ok(()) => cause,
        Err(source) => Error::RollbackFailed { cause: Box::new(cause), source: Box::new(source) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::double::{Double, Fail};
    use crate::testing::{STACK, Scene};

    const TASK: GuestVirt = GuestVirt(0xffff_8880_0000_0b00);
    const RSP: u64 = STACK.0 + 0x2000;

    fn nudged(
        rip: Option<GuestVirt>,
        flags: u64,
        fail: Option<Fail>,
    ) -> (Double, Result<(), Error>) {
        let Scene { machine, image, .. } = Scene::new();
        let mut machine = Double::new(machine, fail);
        let at = rip.or(nudge_at(&image)).unwrap();
        let registers = machine.machine.registers_mut();
        registers.set(Reg::Rip, at.0);
        registers.set(Reg::Rflags, flags);
        let mut journal = Journal::open();
        let done = nudge(&mut machine, &image, &mut journal, Vcpu(0), TASK);
        (machine, done)
    }

    fn below(machine: &Double) -> u64 {
        machine.machine.space().read_u64(GuestVirt(RSP - 8)).unwrap()
    }

    #[test]
    fn the_wake_up_returns_to_the_tick() {
        let image = Scene::new().image;
        let (mut machine, done) = nudged(None, 2, None);
        done.unwrap();
        let registers = machine.registers(Vcpu(0)).unwrap();
        assert_eq!(registers.rip(), image.address_of(WAKE));
        assert_eq!(registers.get(Reg::Rdi), Some(TASK.0));
        assert_eq!(registers.get(Reg::Rsp), Some(RSP - 8));
        assert_eq!(Some(GuestVirt(below(&machine))), nudge_at(&image));
    }

    #[test]
    fn nobody_is_woken_from_elsewhere() {
        for (rip, flags) in [(Some(GuestVirt(0x1000)), 2), (None, 2 | RFLAGS_IF)] {
            let (machine, done) = nudged(rip, flags, None);
            assert!(matches!(done, Err(Error::NoAbility { .. })));
            assert_eq!(below(&machine), 0);
        }
    }

    #[test]
    fn what_fails_is_taken_back() {
        let (mut machine, done) = nudged(None, 2, Some(Fail::Registers));
        assert!(matches!(done, Err(Error::Machine { .. })), "{done:?}");
        assert_eq!(below(&machine), 0);
        assert_eq!(machine.registers(Vcpu(0)).unwrap().get(Reg::Rsp), Some(RSP));
    }
}
