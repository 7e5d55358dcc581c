//! Memory, registers and a repair image go in; a `Diagnosis` comes out. Reads only. Dumps and live
//! machines look the same from here.
#![forbid(unsafe_code)]

mod access;
pub mod asleep;
mod boundary;
mod class;
pub mod code;
pub mod console;
mod context;
mod core_exits;
mod core_notes;
mod diagnosis;
mod driver_call;
pub mod dump;
pub mod effects;
mod error;
mod explain;
mod expression;
mod fault;
pub mod fault_loop;
mod hung;
mod kernel;
pub mod live_core;
mod message;
mod names;
mod offender;
pub mod report;
mod reporting;
mod signature;
pub mod state;
pub mod stuck;
mod task;
pub mod tasks;
#[cfg(test)]
mod testing;
mod text;
pub mod triage;
pub mod unwind;
mod warm;

use boundary::Scene;
pub use code::CodeCache;
pub use core_exits::syscall_of;
pub use dump as vmcore;
use guest::{Hook, HookKind, PhysMemory, Registers, Vcpu};
use repair_image::RepairImage;

pub use diagnosis::{
    Boundary, Confirmation, Context, CrashClass, Diagnosis, ExecutionContext, Explanation, Frame,
    FrameEffects, Held, Offender, ResourceKind, Task, Trust, UnwindEnd,
};
pub use error::Error;
pub use warm::warm;

use fault::Fault;
use kernel::Kernel;

/// Diagnoses the crash of a vCPU that stands at `hook` (`None` for a dump) with these registers.
///
/// # Errors
/// Only when there is nothing to start from: rip or rsp is not known. What can't be determined is
/// `None` in the diagnosis.
pub fn diagnose(
    image: &RepairImage,
    phys: &dyn PhysMemory,
    registers: &Registers,
    hook: Option<Hook>,
    vcpu: Vcpu,
    cache: &mut CodeCache,
) -> Result<Diagnosis, Error> {
    cache.look_again();
    let space = image.placement.space(phys);
    let kernel = Kernel::new(image, &space, registers);
    let mut evidence = Vec::new();
    let fault = fault::find(&kernel, registers, hook, cache)?;
    let cpu = context::cpu(&kernel, registers);
    let context = context::of(&kernel, registers, &cpu, &fault, &mut evidence);
    let mut task = cpu.current.and_then(|at| task::read(&kernel, at).ok());
    if let Some(task) = &mut task {
        task.syscall = task::syscall(&kernel, &fault.frames, &fault.end);
    }
    let mut finding = find(&kernel, &fault, registers, hook, &cpu, &mut evidence);
    let text = text::find(&kernel, phys, &fault, finding.class.as_ref(), &mut evidence);
    finding.class = text.class.or(finding.class);
    if finding.class == Some(CrashClass::HungTask) {
        hung::evidence(&kernel, cache, &mut evidence);
    }
    let offender = offender::of(&fault, &context, task.as_ref(), &mut evidence);
    let scene = Scene { kernel: &kernel, fault: &fault, context: &context, current: cpu.current };
    // The kernel has not yet reported anything where a hook is.
    let reported = match hook {
        Some(_) => None,
        None => reporting::taken_off(&scene, registers, cache, &mut evidence),
    };
    let context = reported.as_ref().unwrap_or(&context);
    let scene = Scene { context, ..scene };
    let boundary = match offender {
        Some(Offender::Driver { .. }) => boundary::of(&scene, cache, &mut evidence),
        _ => None,
    };
    let core_exits = core_exits::of(&scene, cache, offender.as_ref());
    let all_effects = boundary::all_effects(&scene, cache);
    let class = finding.class.as_ref();
    Ok(Diagnosis {
        hook,
        vcpu,
        title: signature::title(class, &fault, offender.as_ref(), finding.message.as_deref()),
        signature: signature::id(class, &fault),
        class: finding.class,
        context: context.clone(),
        task,
        fault_frame: fault.at,
        fault_regs_at: fault.regs_at,
        unwind_end: fault.end,
        frames: fault.frames,
        offender,
        evidence,
        explanation: finding.explanation,
        boundary,
        core_exits,
        all_effects,
        damage: text.damage,
        message: finding.message,
        queued: None,
    })
}

/// What the fault itself is, whoever is to blame.
struct Finding {
    class: Option<CrashClass>,
    explanation: Option<Explanation>,
    message: Option<String>,
}

fn find(
    kernel: &Kernel<'_>,
    fault: &Fault,
    registers: &Registers,
    hook: Option<Hook>,
    cpu: &context::Cpu,
    evidence: &mut Vec<String>,
) -> Finding {
    let frame = fault.frames.get(fault.at).filter(|_| fault.found);
    let instruction = frame.and_then(|frame| code::instruction_of(kernel.memory, frame.pc));
    let instruction = instruction.as_ref();
    let access = access::of(kernel, fault, registers, instruction, evidence);
    let trapped = fault.exception.as_deref() == Some("exc_invalid_op");
    let bug = frame.filter(|_| trapped).and_then(|frame| message::bug_at(kernel, frame.pc.ip()));
    let facts = class::Facts { registers, cpu, access: access.as_ref(), bug: bug.as_ref() };
    let class = class::of(kernel, fault, &facts, evidence);
    let panics = hook.is_some_and(|hook| hook.kind == HookKind::Panic);
    let text = if panics { message::panic_text(kernel, registers) } else { None };
    let message = text.or_else(|| bug.as_ref().map(message::Bug::text));
    let facts = explain::Facts {
        class: class.as_ref(),
        instruction,
        access: access.as_ref(),
        bug: bug.as_ref(),
        message: message.as_deref(),
    };
    let explanation = explain::of(kernel, fault, &facts);
    Finding { class, explanation, message }
}

#[cfg(test)]
mod tests {
    use guest::{GuestVirt, Reg};
    use proptest::prelude::*;
    use repair_image::{CfaRule, FrameKind, RowSource, SavedRule, UnwindRow};

    use super::*;
    use crate::testing::{DATA, Guest, MODULE, TEXT};

    const STACK: u64 = DATA + 0x1_0000;
    const REGS: u64 = STACK + 0x100;

    fn row(kind: FrameKind, offset: i32) -> UnwindRow {
        let cfa = CfaRule::Offset { reg: Reg::Rsp, offset };
        UnwindRow { kind, cfa, saved: [SavedRule::Same; 6], source: RowSource::Cfi }
    }

    /// oops_begin < asm_exc_page_fault < bw [m] < vfs_write < kthread, in softirq-free task context.
    fn guest() -> Guest {
        let names = [("oops_begin", 0x100), ("asm_exc_page_fault", 0x200), ("vfs_write", 0x300)];
        let mut guest = names
            .into_iter()
            .fold(Guest::new(), |guest, (name, at)| guest.function(name, TEXT + at, 0x40))
            .function("kthread", TEXT + 0x400, 0x40)
            .function("bw", MODULE + 0x100, 0x40)
            .object("current_task", 0x40)
            .object("__preempt_count", 0x80)
            .cpu(DATA + 0x5000)
            .row(TEXT + 0x100..TEXT + 0x140, row(FrameKind::Call, 8))
            .row(TEXT + 0x200..TEXT + 0x240, row(FrameKind::Regs, 0))
            .row(TEXT + 0x300..TEXT + 0x340, row(FrameKind::Call, 8))
            .row(TEXT + 0x400..TEXT + 0x440, row(FrameKind::End, 8))
            .row(MODULE + 0x100..MODULE + 0x140, row(FrameKind::Call, 8));
        guest.poke_task(DATA + 0x1000, 42, "dd");
        guest.poke_u64(DATA + 0x5040, DATA + 0x1000);
        // oops_begin was called by the entry, whose pt_regs lie above the return address.
        guest.poke_u64(REGS - 8, TEXT + 0x210);
        for (word, value) in
            [(10, 8), (16, MODULE + 0x110), (17, 0x10), (18, 0x202), (19, STACK + 0x200)]
        {
            guest.poke_u64(REGS + word * 8, value);
        }
        guest.poke_u64(STACK + 0x200, TEXT + 0x310);
        guest.poke_u64(STACK + 0x208, TEXT + 0x410);
        // mov eax, dword ptr [rax+8]
        guest.poke(MODULE + 0x110, &[0x8b, 0x40, 0x08]);
        guest
    }

    fn of(guest: &mut Guest) -> Result<Diagnosis, Error> {
        let image = guest.image();
        let registers = [Reg::Rbx, Reg::Rbp, Reg::R12, Reg::R13, Reg::R14, Reg::R15]
            .into_iter()
            .fold(Registers::unknown(), |registers, reg| registers.with(reg, 1))
            .with(Reg::Rip, TEXT + 0x100)
            .with(Reg::Rsp, REGS - 8)
            .with(Reg::GsBase, DATA + 0x5000)
            .with(Reg::Cr2, 0x10);
        let hook = Hook { kind: HookKind::OopsBegin, at: GuestVirt(TEXT + 0x100) };
        let mut cache = CodeCache::default();
        diagnose(
            &image,
            guest.machine.space().physical(),
            &registers,
            Some(hook),
            Vcpu(0),
            &mut cache,
        )
    }

    #[test]
    fn a_driver_that_dereferences_null() {
        let found = of(&mut guest()).unwrap();
        assert_eq!(found.class, Some(CrashClass::NullDereference));
        assert_eq!(found.title, "BUG: unable to handle kernel NULL pointer dereference in bw [m]");
        assert_eq!((found.fault_frame, found.fault_regs_at), (2, Some(GuestVirt(REGS))));
        let boundary = found.boundary.expect("a boundary");
        assert_eq!((boundary.entry, boundary.frame), (2, 3));
        assert_eq!(boundary.function, "vfs_write");
        let sentence = found.explanation.map(|it| it.sentence);
        assert_eq!(
            sentence.as_deref(),
            Some("reads 4 bytes at 0x10: rax is 0x8, NULL plus an offset")
        );
        assert_eq!(found.task.map(|task| task.comm).as_deref(), Some("dd"));
    }

    #[test]
    fn without_a_stack_pointer_there_is_no_diagnosis() {
        let image = guest().image();
        let machine = guest().machine;
        let space = machine.space();
        let phys = space.physical();
        let registers = Registers::unknown().with(Reg::Rip, TEXT);
        let found = diagnose(&image, phys, &registers, None, Vcpu(0), &mut CodeCache::default());
        assert!(matches!(found, Err(Error::UnknownRegister(Reg::Rsp))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn hostile_memory_never_panics(
            words in proptest::collection::vec((0_u64..0x400, any::<u64>(), any::<bool>()), 1..40),
        ) {
            let mut guest = guest();
            for (slot, value, near) in words {
                // Half of the values lead back into mapped memory, where circles can be built.
                let value = if near { DATA + (value & 0xffff) } else { value };
                let base = if slot & 1 == 0 { STACK } else { DATA + 0x1000 };
                guest.poke_u64(base + (slot & !7), value);
            }
            if let Ok(found) = of(&mut guest) {
                prop_assert!(report::text(&found).lines().all(|line| line.chars().count() <= 120));
            }
        }
    }
}
