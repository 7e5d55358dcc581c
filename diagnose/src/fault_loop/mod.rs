//! A process that takes the same page fault again and again, because a driver's function says each time that it may
//! be tried again and maps nothing: which function that is, and what a repair needs to know where it is entered once
//! more. Reads only. How often and for how long is measured by whoever asks.

mod area;
mod visit;

pub use area::{Area, Handler, area};
use guest::{PhysMemory, Registers, Vcpu};
use repair_image::RepairImage;
pub use visit::{Visit, asks_again, user_registers};

use crate::code::CodeCache;
use crate::driver_call::DriverCall;
pub use crate::driver_call::NotEnded;
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::unwind::{self, Limits, Start};
use crate::{CrashClass, Diagnosis, context};

/// Frames at most.
const FRAMES_MAX: usize = 512;

/// Diagnoses the loop from a vCPU that stands on the first instruction of the driver's function with these registers;
/// `evidence` is what was seen of the loop so far.
///
/// # Errors
/// It can't be told how to end it.
pub fn caught(
    image: &RepairImage,
    phys: &dyn PhysMemory,
    registers: &Registers,
    vcpu: Vcpu,
    mut evidence: Vec<String>,
    cache: &mut CodeCache,
) -> Result<Diagnosis, NotEnded> {
    cache.look_again();
    let space = image.placement.space(phys);
    let kernel = Kernel::new(image, &space, registers);
    let start = Start::of(registers).ok_or(NotEnded::Unknown)?;
    let limits = Limits { frames: FRAMES_MAX };
    let (frames, end) = unwind::walk(image, &space, cache, &start, limits);
    let fault =
        Fault { frames, end, at: 0, regs_at: None, exception: None, detector: None, found: true };
    let cpu = context::cpu(&kernel, registers);
    let context = context::of(&kernel, registers, &cpu, &fault, &mut evidence);
    let call = DriverCall {
        kernel: &kernel,
        vcpu,
        at: start.pc.ip(),
        class: CrashClass::FaultLoop,
        fault,
        context,
        current: cpu.current,
        evidence,
    };
    call.diagnose(cache)
}

#[cfg(test)]
mod tests {
    use guest::{GuestVirt, Reg};
    use repair_image::{CfaRule, FrameKind, RowSource, SavedRule, UnwindRow};

    use super::*;
    use crate::testing::{DATA, Guest, MODULE, TEXT};

    const STACK: u64 = DATA + 0x1_0000;

    fn row(kind: FrameKind) -> UnwindRow {
        let cfa = CfaRule::Offset { reg: Reg::Rsp, offset: 8 };
        UnwindRow { kind, cfa, saved: [SavedRule::Same; 6], source: RowSource::Cfi }
    }

    /// A vCPU at `pc`, called by __do_fault.
    fn of(pc: u64) -> Result<Diagnosis, NotEnded> {
        let mut guest = Guest::new()
            .function("__do_fault", TEXT + 0x100, 0x40)
            .function("kthread", TEXT + 0x200, 0x40)
            .function("serve", MODULE + 0x100, 0x40)
            .function("filemap_fault", TEXT + 0x300, 0x40)
            .object("current_task", 0x40)
            .cpu(DATA + 0x5000)
            .row(TEXT + 0x100..TEXT + 0x140, row(FrameKind::Call))
            .row(TEXT + 0x200..TEXT + 0x240, row(FrameKind::End))
            .row(TEXT + 0x300..TEXT + 0x340, row(FrameKind::Call))
            .row(MODULE + 0x100..MODULE + 0x140, row(FrameKind::Call));
        guest.poke_task(DATA + 0x1000, 42, "dd");
        guest.poke_u64(DATA + 0x5040, DATA + 0x1000);
        guest.poke_u64(STACK, TEXT + 0x110);
        guest.poke_u64(STACK + 8, TEXT + 0x210);
        let registers = Reg::CALLEE_SAVED
            .into_iter()
            .fold(Registers::unknown(), |registers, reg| registers.with(reg, 1))
            .with(Reg::Rip, pc)
            .with(Reg::Rsp, STACK)
            .with(Reg::GsBase, DATA + 0x5000);
        let image = guest.image();
        let space = guest.machine.space();
        let mut cache = CodeCache::default();
        caught(&image, space.physical(), &registers, Vcpu(1), vec!["seen".to_owned()], &mut cache)
    }

    #[test]
    fn the_function_that_is_entered_is_to_blame() {
        let found = of(MODULE + 0x100).unwrap();
        assert_eq!(found.title, "page fault loop in serve [m]");
        assert_eq!((found.class, found.vcpu), (Some(CrashClass::FaultLoop), Vcpu(1)));
        assert_eq!(found.evidence.first().map(String::as_str), Some("seen"));
        let boundary = found.boundary.unwrap();
        assert_eq!((boundary.function.as_str(), boundary.frame), ("__do_fault", 1));
        assert_eq!(found.hook.unwrap().at, GuestVirt(MODULE + 0x100));
    }

    #[test]
    fn the_core_kernel_is_not() {
        assert_eq!(of(TEXT + 0x300).unwrap_err(), NotEnded::NoDriver);
    }
}
