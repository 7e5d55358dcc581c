//! Rung 3: the offending process ends through the kernel's own exit path, after what its frames
//! hold was released. Refuses any state that the exit path can't clean up.

use diagnose::{Diagnosis, ExecutionContext, Task};
use guest::{GuestVirt, RFLAGS_IF, Reg, Registers};
use repair_image::base_name;

use crate::action::Action;
use crate::boundaries::STACK_LINKED;
use crate::counts;
use crate::guest_struct::Structures;
use crate::plan::{Situation, Steps};
use crate::{Policy, Reason, error_return, locks};

/// `SIGKILL`, include/uapi/asm-generic/signal.h: as an exit code, "killed by signal 9".
const SIGKILL: u64 = 9;
/// `PF_EXITING`, include/linux/sched.h: the same value since v2.6.
const PF_EXITING: u64 = 4;
/// Largest distance from the lowest stack address to its top that is believed, bytes. THREAD_SIZE
/// is 16 KiB, 32 KiB with KASAN.
const STACK_MAX: u64 = 64 << 10;
/// Bit 1 of rflags is always set.
const RFLAGS_FIXED: u64 = 2;

/// Task members that must be zero, and what it means when they are not.
const MUST_BE_ZERO: &[(&str, &str)] = &[
    ("journal_info", "it is inside a file-system transaction"),
    ("bio_list", "it is submitting block I/O from its stack"),
    ("plug", "it holds back block I/O on its stack"),
    ("reclaim_state", "it is reclaiming memory"),
    ("in_execve", "it is inside execve()"),
    ("__state", "it is about to sleep and may be on a wait queue"),
    ("blocked_on", "it waits for a lock"),
    ("in_iowait", "it waits for I/O"),
];

/// The steps that end the process.
pub(crate) fn steps(situation: &Situation<'_>, policy: &Policy) -> Result<Steps, Reason> {
    let diagnosis = situation.diagnosis;
    error_return::check_hope(diagnosis)?;
    let task = process(diagnosis, policy)?;
    let structures = Structures { image: situation.image, memory: situation.memory };
    check_task(&structures, task.at)?;
    check_fpu(&structures, diagnosis)?;
    check_stack_links(diagnosis, diagnosis.frames.len())?;
    let effects = diagnosis.all_effects.as_ref().ok_or(Reason::NoEffects)?;
    locks::check(diagnosis, effects)?;
    let user_regs = user_registers(&structures, diagnosis, task)?;
    let exit = situation
        .image
        .address_of("do_group_exit")
        .ok_or_else(|| Reason::MissingFunction { name: "do_group_exit".to_owned() })?;
    let actions = locks::release_calls(diagnosis, effects, situation.image, situation.memory)?;
    let mut steps = Steps { actions, ..Steps::default() };
    let outer = diagnose::FrameEffects::default();
    counts::check_rcu(&diagnosis.context, effects, &outer)?;
    let (count, note) = counts::preempt_count(
        &diagnosis.context,
        effects,
        &outer,
        0,
        policy.correct_preempt_count,
    )?;
    steps.notes.extend(note);
    steps.actions.extend(error_return::write_count(diagnosis, count)?);
    steps.actions.extend(enable_page_faults(&structures, task.at)?);
    steps.actions.extend(exit_actions(&structures, diagnosis, user_regs, exit)?);
    steps.notes.push(
        "memory and references that the abandoned frames had in hand are not given back".to_owned(),
    );
    Ok(steps)
}

/// The process to end, if it may be ended.
fn process<'a>(diagnosis: &'a Diagnosis, policy: &Policy) -> Result<&'a Task, Reason> {
    let context = match diagnosis.context.kind {
        ExecutionContext::Task => None,
        ExecutionContext::Softirq => Some("soft interrupt"),
        ExecutionContext::Hardirq => Some("interrupt"),
        ExecutionContext::Nmi => Some("non-maskable interrupt"),
    };
    if let Some(context) = context {
        return Err(Reason::Context { context });
    }
    let task = diagnosis.task.as_ref().ok_or(Reason::NoProcess)?;
    if diagnosis.context.idle || task.kernel_thread || task.pid <= 0 {
        return Err(Reason::NoProcess);
    }
    if task.pid == 1 || task.tgid == 1 || policy.protects_process(&task.comm) {
        return Err(Reason::ProtectedProcess { pid: task.pid, comm: task.comm.clone() });
    }
    Ok(task)
}

/// Refuses a task that is in the middle of something which others rely on.
pub(crate) fn check_task(structures: &Structures<'_>, task: GuestVirt) -> Result<(), Reason> {
    for (member, meaning) in MUST_BE_ZERO {
        if let Some(value) = structures.number(task, "task_struct", member)?
            && value != 0
        {
            return Err(Reason::TaskState { why: format!("{meaning} ({member} = {value:#x})") });
        }
    }
    let flags = structures.need(task, "task_struct", "flags")?;
    if flags & PF_EXITING != 0 {
        return Err(Reason::TaskState { why: "it is exiting already".to_owned() });
    }
    if structures.need(task, "task_struct", "mm")? == 0 {
        return Err(Reason::NoProcess);
    }
    Ok(())
}

/// The FPU is the kernel's between `kernel_fpu_begin()` and `kernel_fpu_end()`.
pub(crate) fn check_fpu(structures: &Structures<'_>, diagnosis: &Diagnosis) -> Result<(), Reason> {
    let flag = diagnosis.context.cpu.and_then(|cpu| structures.image.per_cpu("in_kernel_fpu", cpu));
    let Some(at) = flag else { return Ok(()) };
    match structures.memory.read_u8(at) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Reason::TaskState { why: "the kernel is using the FPU".to_owned() }),
        Err(_) => Err(Reason::Unreadable { what: "in_kernel_fpu".to_owned(), at }),
    }
}

/// Refuses to leave frames whose variables others may point to: they would be written to when the stack
/// is long used for something else. `end` is the index of the first frame that stays.
pub(crate) fn check_stack_links(diagnosis: &Diagnosis, end: usize) -> Result<(), Reason> {
    let left = diagnosis.frames.get(diagnosis.fault_frame..end).unwrap_or_default();
    let linked = left.iter().find_map(|frame| {
        let name = frame.function.as_deref().map(base_name)?;
        STACK_LINKED.iter().find(|(function, _)| *function == name)
    });
    match linked {
        Some((function, what)) => {
            Err(Reason::TaskState { why: format!("{what} may point into the stack of {function}") })
        }
        None => Ok(()),
    }
}

/// Guest-virtual address of the user-mode registers at the top of the task's stack. The fault must
/// lie on that stack.
fn user_registers(
    structures: &Structures<'_>,
    diagnosis: &Diagnosis,
    task: &Task,
) -> Result<GuestVirt, Reason> {
    let cpu = diagnosis
        .context
        .cpu
        .ok_or_else(|| Reason::Inconsistent { what: "the CPU is not known".to_owned() })?;
    let variable = "cpu_current_top_of_stack";
    let at = structures.hot(cpu, "top_of_stack", variable).ok_or_else(|| {
        Reason::MissingMember { structure: "pcpu_hot".to_owned(), path: "top_of_stack".to_owned() }
    })?;
    let top = structures
        .memory
        .read_u64(at)
        .map(GuestVirt)
        .map_err(|_| Reason::Unreadable { what: variable.to_owned(), at })?;
    let base = GuestVirt(structures.need(task.at, "task_struct", "stack")?);
    let size = structures.image.types.size_of("pt_regs").ok_or_else(|| Reason::MissingMember {
        structure: "pt_regs".to_owned(),
        path: "size".to_owned(),
    })?;
    let other = |what: &str| Reason::TaskState { why: what.to_owned() };
    if top.0 % 16 != 0 || top - base > STACK_MAX || size >= top - base {
        return Err(other("the top of its stack is not where its CPU says"));
    }
    let rsp = diagnosis.frames.get(diagnosis.fault_frame).and_then(|f| f.registers.rsp());
    if !rsp.is_some_and(|rsp| (base..top).contains(&rsp)) {
        return Err(other("it did not crash on its own stack"));
    }
    let regs = GuestVirt(top.0.wrapping_sub(size));
    // Privilege level 3 in the saved code segment: these are user-mode registers.
    if structures.need(regs, "pt_regs", "cs")? & 3 != 3 {
        return Err(other("no user-mode registers lie at the top of its stack"));
    }
    Ok(regs)
}

/// The exit path reads user memory (robust futex list): page faults must be on again.
fn enable_page_faults(
    structures: &Structures<'_>,
    task: GuestVirt,
) -> Result<Option<Action>, Reason> {
    let path = "pagefault_disabled";
    let level = structures.number(task, "task_struct", path)?.unwrap_or(0);
    let Some(at) = structures.member_at(task, "task_struct", path).filter(|_| level != 0) else {
        return Ok(None);
    };
    Ok(Some(Action::WriteWord {
        at,
        size: 4,
        mask: 0xffff_ffff,
        old: level,
        new: 0,
        name: path.to_owned(),
        why: "an abandoned frame had turned page faults off".to_owned(),
    }))
}

/// The call of `do_group_exit()`, as if made by the system-call entry: the stack is empty but for
/// the user-mode registers. Like `rewind_stack_and_make_dead()` does for an oops, whose return
/// address also stands in for a caller, so that unwinders find the end of the stack.
fn exit_actions(
    structures: &Structures<'_>,
    diagnosis: &Diagnosis,
    user_regs: GuestVirt,
    exit: GuestVirt,
) -> Result<[Action; 2], Reason> {
    // Since commit 0e25498f8cd4 ("exit: Add and use make_task_dead.", v5.17); its last instruction
    // is the call, so its end is the return address.
    let caller = structures
        .image
        .kernel
        .symbol("rewind_stack_and_make_dead")
        .map_or(0, |symbol| structures.image.place(symbol.at).wrapping_add(symbol.size).0);
    // Directly below the user-mode registers, where rewind_stack_and_make_dead() has it too. The
    // kernel is built for stacks aligned to 8 bytes (-mpreferred-stack-boundary=3).
    let slot = user_regs.offset(-8);
    let old = structures
        .memory
        .read_u64(slot)
        .map_err(|_| Reason::Unreadable { what: "the stack".to_owned(), at: slot })?;
    let mut registers = Registers::unknown()
        .with(Reg::Rip, exit.0)
        .with(Reg::Rdi, SIGKILL)
        .with(Reg::Rsp, slot.0)
        .with(Reg::Rflags, RFLAGS_FIXED | RFLAGS_IF);
    for reg in Reg::CALLEE_SAVED {
        registers.set(reg, 0);
    }
    Ok([
        Action::WriteWord {
            at: slot,
            size: 8,
            mask: u64::MAX,
            old,
            new: caller,
            name: "return address".to_owned(),
            why: "do_group_exit() never returns; unwinders find the end of the stack here"
                .to_owned(),
        },
        Action::SetRegisters {
            vcpu: diagnosis.vcpu,
            registers,
            why: "do_group_exit(SIGKILL): the process ends through the kernel's own exit path"
                .to_owned(),
        },
    ])
}

#[cfg(test)]
mod tests {
    use diagnose::ResourceKind;

    use super::*;
    use crate::testing::Scene;

    fn run(scene: &Scene, diagnosis: &Diagnosis) -> Result<Steps, Reason> {
        let space = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        steps(&situation, &Policy::default())
    }

    #[test]
    fn the_process_ends_by_the_kernels_exit_path() {
        let scene = Scene::new();
        let mut diagnosis = scene.core_diagnosis();
        diagnosis.all_effects = Some(scene.effects(&[ResourceKind::Mutex]));
        let steps = run(&scene, &diagnosis).unwrap();
        assert!(matches!(&steps.actions[0],
            Action::CallGuest { function, .. } if function == "mutex_unlock"));
        let Some(Action::SetRegisters { registers, .. }) = steps.actions.last() else { panic!() };
        assert_eq!(registers.rip(), scene.image.address_of("do_group_exit"));
        assert_eq!(registers.get(Reg::Rdi), Some(9));
        assert_eq!(registers.rsp(), Some(scene.user_regs.offset(-8)));
    }

    #[test]
    fn init_kernel_threads_and_interrupts_are_refused() {
        let scene = Scene::new();
        let mut diagnosis = scene.core_diagnosis();
        diagnosis.context.kind = ExecutionContext::Softirq;
        assert!(matches!(run(&scene, &diagnosis), Err(Reason::Context { .. })));
        let mut diagnosis = scene.core_diagnosis();
        diagnosis.task.as_mut().unwrap().pid = 1;
        assert!(matches!(run(&scene, &diagnosis), Err(Reason::ProtectedProcess { pid: 1, .. })));
        let mut diagnosis = scene.core_diagnosis();
        diagnosis.task.as_mut().unwrap().kernel_thread = true;
        assert_eq!(run(&scene, &diagnosis).unwrap_err(), Reason::NoProcess);
    }

    #[test]
    fn a_task_inside_a_transaction_is_refused() {
        let mut scene = Scene::new();
        let diagnosis = scene.core_diagnosis();
        scene.set_member("task_struct", "journal_info", scene.task, 0x1234);
        assert!(matches!(run(&scene, &diagnosis), Err(Reason::TaskState { .. })));
    }

    #[test]
    fn a_stack_that_a_list_of_others_runs_through_stays() {
        let scene = Scene::new();
        let mut diagnosis = scene.core_diagnosis();
        for function in ["__dev_close_many", "do_epoll_wait", "n_tty_write.isra.0"] {
            diagnosis.frames[diagnosis.fault_frame].function = Some(function.to_owned());
            let refused = run(&scene, &diagnosis).unwrap_err();
            assert!(refused.to_string().contains("may point into the stack of"), "{refused}");
        }
    }

    #[test]
    fn page_faults_are_turned_on_again() {
        let mut scene = Scene::new();
        let diagnosis = scene.core_diagnosis();
        scene.set_member("task_struct", "pagefault_disabled", scene.task, 1);
        let steps = run(&scene, &diagnosis).unwrap();
        assert!(steps.actions.iter().any(|action| matches!(action,
            Action::WriteWord { name, new: 0, .. } if name == "pagefault_disabled")));
    }
}
