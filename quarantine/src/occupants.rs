//! Who else stands inside a driver at this moment: on another CPU, or switched out. Who merely has a file of it open does
//! not.

use diagnose::tasks::{self, TaskPosition};
use diagnose::unwind::{self, Limits, Start};
use diagnose::{CodeCache, Frame, UnwindEnd};
use guest::Registers;
use repair_image::Module;

use crate::plan::Situation;

/// The first that is found, in words; or why it can't be told that nobody does.
pub(crate) fn first(situation: &Situation<'_>, module: &Module) -> Option<String> {
    let mut cache = CodeCache::default();
    let on_cpu = situation
        .vcpus
        .iter()
        .enumerate()
        .filter(|(index, _)| *index != situation.diagnosis.vcpu.0)
        .find(|(_, registers)| !is_elsewhere(situation, module, registers, &mut cache))
        .map(|(index, _)| format!("vCPU {index}"));
    if on_cpu.is_some() {
        return on_cpu;
    }
    let tasks = match tasks::all(situation.image, situation.memory) {
        Ok(tasks) => tasks,
        Err(error) => return Some(format!("somebody (the tasks were not found: {error})")),
    };
    let crashed = situation.diagnosis.task.as_ref().map(|task| task.at);
    tasks
        .iter()
        // An idle task is switched out in its own loop only; how that was come to is no longer there.
        .filter(|task| task.on_cpu.is_none() && task.pid != 0 && Some(task.task) != crashed)
        .find(|task| !sleeps_elsewhere(situation, module, task, &mut cache))
        .map(|task| format!("{} (pid {})", task.comm, task.pid))
}

/// Whether a CPU is certainly not in the driver.
fn is_elsewhere(
    situation: &Situation<'_>,
    module: &Module,
    registers: &Registers,
    cache: &mut CodeCache,
) -> bool {
    let Some(start) = Start::of(registers) else { return false };
    if !start.pc.lookup().is_kernel_half() {
        return true;
    }
    let (image, memory) = (situation.image, situation.memory);
    is_outside(module, &unwind::walk(image, memory, cache, &start, Limits::default()))
}

/// Whether a task that is switched out is certainly not in the driver.
fn sleeps_elsewhere(
    situation: &Situation<'_>,
    module: &Module,
    task: &TaskPosition,
    cache: &mut CodeCache,
) -> bool {
    let found = tasks::frames_of_sleeping(situation.image, situation.memory, task, cache);
    found.is_ok_and(|found| is_outside(module, &found))
}

/// All frames are known, and none is the driver's.
fn is_outside(module: &Module, (frames, end): &(Vec<Frame>, UnwindEnd)) -> bool {
    matches!(end, UnwindEnd::UserMode | UnwindEnd::Outermost)
        && !frames.iter().any(|frame| module.is_text(frame.pc.lookup()))
}

#[cfg(test)]
mod tests {
    use guest::{CodeAddress, Reg};

    use super::*;
    use crate::testing::{MODULE_TEXT, Scene, TEXT};

    fn found(scene: &Scene, vcpus: &[Registers]) -> Option<String> {
        let (space, diagnosis) = (scene.machine.space(), scene.diagnosis());
        let situation =
            Situation { diagnosis: &diagnosis, image: &scene.image, memory: &space, vcpus };
        first(&situation, &scene.image.modules[0])
    }

    #[test]
    fn frames_decide_and_must_be_all_there() {
        let scene = Scene::new();
        let module = &scene.image.modules[0];
        let frame = |at| {
            let mut frame = scene.diagnosis().frames[0].clone();
            frame.pc = CodeAddress::Exact(at);
            frame
        };
        let outside = |at, end| is_outside(module, &(vec![frame(at)], end));
        assert!(outside(TEXT, UnwindEnd::UserMode));
        assert!(!outside(MODULE_TEXT, UnwindEnd::UserMode));
        assert!(!outside(TEXT, UnwindEnd::NoRow(TEXT)), "there may be more");
    }

    #[test]
    fn a_cpu_in_user_mode_is_elsewhere_and_one_in_the_driver_is_told() {
        let scene = Scene::new();
        let at = |rip: u64| Registers::unknown().with(Reg::Rip, rip);
        let own = scene.diagnosis().vcpu.0;
        let mut vcpus = vec![at(MODULE_TEXT.0); own + 2];
        assert_eq!(found(&scene, &vcpus), Some(format!("vCPU {}", own + 1)));
        vcpus[own + 1] = at(0x40_0000);
        assert!(found(&scene, &vcpus).unwrap().contains("were not found"), "no list of tasks");
    }
}
