//! A guest that panics on warnings: the warning's report goes on as if it did not. The crash's class says
//! that it is one; nothing is abandoned, so no lock and no count is looked at.

use diagnose::{CrashClass, Diagnosis};
use guest::{HookKind, Reg};
use repair_image::base_name;

use crate::action::Action;
use crate::plan::{Situation, Steps};
use crate::{Reason, error_return};

/// Decides whether a warning is a panic, kernel/panic.c. A function of its own since commit 79cc1ba7badf
/// ("panic: Consolidate open-coded panic_on_warn checks", v6.2 and 6.1 stable).
const CHECK: &str = "check_panic_on_warn";

/// Whether the crash is a warning that became a panic.
pub(crate) fn is_one(diagnosis: &Diagnosis) -> bool {
    diagnosis.class == Some(CrashClass::Warning)
}

/// `check_panic_on_warn()` returns to its caller. It is void, has no lock, and stands at its call of
/// `panic()`, which has done nothing yet.
pub(crate) fn steps(situation: &Situation<'_>) -> Result<Steps, Reason> {
    let diagnosis = situation.diagnosis;
    let missing = || Reason::MissingFunction { name: CHECK.to_owned() };
    let panics = diagnosis.hook.is_some_and(|hook| hook.kind == HookKind::Panic);
    let [panic, check, caller, ..] = diagnosis.frames.as_slice() else { return Err(missing()) };
    if !panics || check.function.as_deref().map(base_name) != Some(CHECK) {
        return Err(missing());
    }
    let mut registers = error_return::continued(situation, caller, check)?;
    let flags = panic.registers.get(Reg::Rflags).ok_or_else(|| Reason::UnknownRegister {
        register: Reg::Rflags.name(),
        function: "panic".to_owned(),
    })?;
    registers.set(Reg::Rflags, flags);
    let why =
        "the report of the warning goes on as if kernel.panic_on_warn were not set".to_owned();
    let notes = vec![
        "kernel.panic_on_warn stays set; the warning is in the kernel's log; nothing is lost"
            .to_owned(),
    ];
    let actions = vec![Action::SetRegisters { vcpu: diagnosis.vcpu, registers, why }];
    Ok(Steps { actions, notes, ..Steps::default() })
}

#[cfg(test)]
mod tests {
    use guest::{GuestVirt, Hook};

    use super::*;
    use crate::testing::Scene;

    /// panic < check_panic_on_warn < __warn, with the frames of the scene's driver and its caller.
    fn diagnosis(scene: &Scene) -> Diagnosis {
        let mut diagnosis = scene.diagnosis();
        let entry = diagnosis.boundary.take().unwrap().entry;
        diagnosis.frames.drain(..entry);
        diagnosis.frames[0].function = Some(CHECK.to_owned());
        let mut panic = diagnosis.frames[0].clone();
        panic.function = Some("panic".to_owned());
        panic.registers.set(Reg::Rflags, 0x46);
        diagnosis.frames.insert(0, panic);
        diagnosis.class = Some(CrashClass::Warning);
        diagnosis.hook = Some(Hook { kind: HookKind::Panic, at: GuestVirt(0) });
        diagnosis
    }

    #[test]
    fn the_report_goes_on_with_its_own_flags() {
        let scene = Scene::new();
        let diagnosis = diagnosis(&scene);
        let space = scene.machine.space();
        let run = |diagnosis: &Diagnosis| {
            steps(&Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] })
        };
        let found = run(&diagnosis).unwrap();
        let [Action::SetRegisters { registers, .. }] = found.actions.as_slice() else { panic!() };
        assert_eq!(registers.rip(), Some(scene.return_address));
        assert_eq!(registers.get(Reg::Rflags), Some(0x46));
        let mut other = diagnosis.clone();
        other.frames[1].function = Some("nmi_panic".to_owned());
        assert!(matches!(run(&other), Err(Reason::MissingFunction { .. })));
    }
}
