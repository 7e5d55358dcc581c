//! Rung 1 for a fault of the core kernel itself: a call on the way out that may fail fails. Which may is
//! knowledge of `boundaries.rs`; how an error is returned is `error_return.rs`'s.

use diagnose::{Boundary, Diagnosis, ExecutionContext, Offender, Trust, syscall_of};
use guest::GuestVirt;
use repair_image::base_name;

use crate::action::Action;
use crate::boundaries::{LEFT_BEHIND, rule, syscall};
use crate::guest_struct::Structures;
use crate::plan::{Situation, Steps};
use crate::{Policy, Reason, error_return, process};

/// The steps that make the innermost call fail that may.
pub(crate) fn steps(situation: &Situation<'_>, policy: &Policy) -> Result<Steps, Reason> {
    let diagnosis = situation.diagnosis;
    let mut exits = diagnosis.core_exits.iter();
    let (exit, why) = exits
        .find_map(|exit| Some((exit, why_safe(diagnosis, exit)?)))
        .ok_or_else(|| Reason::NoSafeReturn { function: offender(diagnosis) })?;
    let structures = Structures { image: situation.image, memory: situation.memory };
    if !never_ran(diagnosis, exit) {
        let task = diagnosis.task.as_ref().ok_or(Reason::NoProcess)?;
        process::check_task(&structures, task.at)?;
        process::check_fpu(&structures, diagnosis)?;
        process::check_stack_links(diagnosis, exit.frame)?;
        check_page_faults(&structures, task.at)?;
    }
    let mut changed = diagnosis.clone();
    changed.boundary = Some(exit.clone());
    let changed = Situation { diagnosis: &changed, ..*situation };
    let mut steps = error_return::steps(&changed, policy)?;
    let left = left_behind(&structures, diagnosis, exit)?;
    steps.actions.splice(0..0, left);
    steps.notes.push(why);
    Ok(steps)
}

/// Why a call may be made to fail; `None` if nothing is known that says so.
fn why_safe(diagnosis: &Diagnosis, exit: &Boundary) -> Option<String> {
    let caller = exit.function.as_str();
    let contract = rule(caller);
    if never_ran(diagnosis, exit) {
        return contract.map(|_| format!("what {caller} called is no code: nothing of it ran"));
    }
    // A kernel thread or an interrupt has nobody who would be told.
    let process = matches!(diagnosis.offender, Some(Offender::Process { .. }));
    if !process || diagnosis.context.kind != ExecutionContext::Task {
        return None;
    }
    let callee = diagnosis.frames.get(exit.entry)?.function.as_deref().map(base_name)?;
    if let Some(name) = syscall_of(callee) {
        return syscall(name).map(|why| format!("{name}() may fail as a whole: {why}"));
    }
    contract
        .filter(|contract| contract.is_operation())
        .map(|_| format!("{callee} is an operation that {caller} lets fail"))
}

/// Whether the exit's callee was no code, so that its caller was left by nothing but a call.
fn never_ran(diagnosis: &Diagnosis, exit: &Boundary) -> bool {
    diagnosis.frames.get(exit.frame).is_some_and(|frame| frame.trust == Trust::BadCall)
}

fn offender(diagnosis: &Diagnosis) -> String {
    match &diagnosis.offender {
        Some(Offender::Process { function, .. } | Offender::Kernel { function, .. }) => {
            function.clone()
        }
        _ => "the core kernel".to_owned(),
    }
}

/// The caller may count on page faults, which an abandoned frame may have turned off.
fn check_page_faults(structures: &Structures<'_>, task: GuestVirt) -> Result<(), Reason> {
    match structures.number(task, "task_struct", "pagefault_disabled")? {
        Some(0) | None => Ok(()),
        Some(level) => {
            Err(Reason::TaskState { why: format!("page faults are off ({level} levels)") })
        }
    }
}

/// Variables that the abandoned functions would have put back.
fn left_behind(
    structures: &Structures<'_>,
    diagnosis: &Diagnosis,
    exit: &Boundary,
) -> Result<Vec<Action>, Reason> {
    let abandoned = diagnosis.frames.get(diagnosis.fault_frame..exit.frame).unwrap_or_default();
    let names = abandoned.iter().filter_map(|frame| frame.function.as_deref()).map(base_name);
    let mut actions = Vec::new();
    for name in names {
        for left in LEFT_BEHIND.iter().filter(|left| left.function == name) {
            let Some(at) = structures.image.address_of(left.variable) else { continue };
            let word = structures.memory.read_u32(at);
            let old =
                word.map_err(|_| Reason::Unreadable { what: left.variable.to_owned(), at })?;
            if old == left.set {
                actions.push(Action::WriteWord {
                    at,
                    size: 4,
                    mask: u64::from(u32::MAX),
                    old: u64::from(old),
                    new: u64::from(left.back),
                    name: left.variable.to_owned(),
                    why: left.why.to_owned(),
                });
            }
        }
    }
    Ok(actions)
}

#[cfg(test)]
mod tests {
    use guest::Reg;

    use super::*;
    use crate::testing::{Scene, int, prototype};

    fn run(scene: &Scene, diagnosis: &Diagnosis) -> Result<Steps, Reason> {
        let space = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        steps(&situation, &Policy::default())
    }

    /// The core function `callee`, called by `caller`, faults on behalf of a process.
    fn fault(scene: &Scene, callee: &str, caller: &str) -> Diagnosis {
        let boundary = scene.diagnosis().boundary;
        let mut diagnosis = scene.core_diagnosis();
        let mut exit = boundary.unwrap();
        exit.function = caller.to_owned();
        exit.prototype = Some(prototype(int("ssize_t", 8, true)));
        diagnosis.frames[exit.entry].function = Some(callee.to_owned());
        diagnosis.core_exits = vec![exit];
        diagnosis
    }

    fn refuses(found: &Result<Steps, Reason>) -> bool {
        matches!(found, Err(Reason::NoSafeReturn { .. }))
    }

    #[test]
    fn an_operation_of_a_file_fails() {
        let scene = Scene::new();
        let steps = run(&scene, &fault(&scene, "pipe_read", "vfs_read")).unwrap();
        let Some(Action::SetRegisters { registers, .. }) = steps.actions.last() else { panic!() };
        assert_eq!(registers.get(Reg::Rax), Some(-5i64 as u64));
        assert!(steps.notes.iter().any(|note| note.contains("lets fail")), "{:?}", steps.notes);
    }

    #[test]
    fn a_system_call_fails_only_if_it_is_in_the_table() {
        let scene = Scene::new();
        assert!(run(&scene, &fault(&scene, "__x64_sys_getcwd", "x64_sys_call")).is_ok());
        assert!(refuses(&run(&scene, &fault(&scene, "__x64_sys_clone", "x64_sys_call"))));
        assert!(refuses(&run(&scene, &fault(&scene, "anything", "somebody"))));
    }

    #[test]
    fn work_that_was_begun_in_a_thread_is_not_left() {
        let scene = Scene::new();
        let mut diagnosis = fault(&scene, "wb_workfn", "process_one_work");
        assert!(refuses(&run(&scene, &diagnosis)));
        let function = "process_one_work".to_owned();
        diagnosis.offender = Some(Offender::Kernel { function, source: None });
        assert!(refuses(&run(&scene, &diagnosis)));
        // But a call that led nowhere began nothing.
        let frame = diagnosis.core_exits[0].frame;
        diagnosis.frames[frame].trust = Trust::BadCall;
        assert!(run(&scene, &diagnosis).is_ok());
    }

    #[test]
    fn a_task_about_to_sleep_is_refused() {
        let mut scene = Scene::new();
        let diagnosis = fault(&scene, "pipe_read", "vfs_read");
        scene.set_member("task_struct", "__state", diagnosis.task.as_ref().unwrap().at, 1);
        assert!(matches!(run(&scene, &diagnosis), Err(Reason::TaskState { .. })));
    }
}
