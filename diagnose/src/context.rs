//! In which context a vCPU crashed: task, softirq, hardirq, NMI; its CPU, its current task, its preempt
//! count. Not who is at fault.

use guest::{GuestVirt, RFLAGS_IF, Reg, Registers};

use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::names::{entered_by_interrupt, function, runs_softirqs};
use crate::{Context, ExecutionContext, Frame, task};

// Bits of the preempt count, include/linux/preempt.h: 8 bits preemption, 8 softirq, 4 hardirq and, since
// commit 69ea03b56ed2 ("hardirq/nmi: Allow nested nmi_enter()", v5.8), 4 NMI.
const SOFTIRQ_SERVING: u32 = 0x0000_0100;
const HARDIRQ: u32 = 0x000f_0000;
const NMI: u32 = 0x00f0_0000;
const HARDIRQ_OFFSET: u32 = 0x0001_0000;
const NMI_OFFSET: u32 = 0x0010_0000;
/// Bit 31 is the inverted `need_resched` flag of x86 (arch/x86/include/asm/preempt.h), no count.
pub(crate) const NEED_RESCHED: u32 = 0x8000_0000;

/// What is known of the vCPU before its frames: CPU, current task, preempt count.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) number: Option<usize>,
    pub(crate) current: Option<GuestVirt>,
    pub(crate) preempt_count: Option<u32>,
    pub(crate) preempt_count_at: Option<GuestVirt>,
}

/// Reads the per-CPU state of the vCPU with these registers.
pub(crate) fn cpu(kernel: &Kernel<'_>, registers: &Registers) -> Cpu {
    let Some(number) = cpu_number(kernel, registers) else { return Cpu::default() };
    let preempt_count_at = preempt_count_at(kernel, number);
    Cpu {
        number: Some(number),
        current: current(kernel, number),
        preempt_count: preempt_count_at.and_then(|at| kernel.memory.read_u32(at).ok()),
        preempt_count_at,
    }
}

/// The CPU by GS base; where that is not known (a dump without it), the one whose current task has the
/// stack that rsp points into.
fn cpu_number(kernel: &Kernel<'_>, registers: &Registers) -> Option<usize> {
    let bases = [Reg::GsBase, Reg::KernelGsBase].into_iter().filter_map(|reg| registers.get(reg));
    let by_base = bases.filter_map(|base| kernel.image.cpu_of_gs_base(base)).next();
    by_base.or_else(|| {
        let rsp = registers.rsp()?;
        (0..kernel.image.placement.per_cpu.len()).find(|&cpu| {
            current(kernel, cpu)
                .and_then(|task| stack_of(kernel, task))
                .is_some_and(|stack| stack.contains(&rsp))
        })
    })
}

/// The stack of a task, guest-virtual.
pub(crate) fn stack_of(kernel: &Kernel<'_>, task: GuestVirt) -> Option<std::ops::Range<GuestVirt>> {
    let base = kernel.pointer(task, "task_struct", "stack").ok()?;
    Some(base..base.checked_add(stack_size(kernel)?)?)
}

/// THREAD_SIZE is no symbol. `union thread_union` has that size, but compilers leave it out of the type
/// information; the init task's stack has it, too: `init_stack` up to `__end_init_task`, since v6.11
/// `__end_init_stack` (include/asm-generic/vmlinux.lds.h).
fn stack_size(kernel: &Kernel<'_>) -> Option<u64> {
    const PLAUSIBLE: std::ops::RangeInclusive<u64> = 4096..=1 << 20;
    let by_symbols = || {
        let start = kernel.image.address_of("init_stack")?;
        let end = ["__end_init_stack", "__end_init_task"]
            .into_iter()
            .find_map(|name| kernel.image.address_of(name))?;
        end.0.checked_sub(start.0)
    };
    let size = kernel.image.types.size_of("thread_union").or_else(by_symbols)?;
    PLAUSIBLE.contains(&size).then_some(size)
}

/// Per-CPU state that moved: since commits e57ef2ed97c1 and 64701838bf05 ("x86: Put hot per CPU variables
/// into a struct", v6.2) in `pcpu_hot`; variables of their own before, and again since v6.15.
fn hot(kernel: &Kernel<'_>, cpu: usize, member: &'static str, variable: &str) -> Option<GuestVirt> {
    if let Some(hot) = kernel.image.per_cpu("pcpu_hot", cpu) {
        return Some(hot + kernel.offset("pcpu_hot", member).ok()?);
    }
    kernel.image.per_cpu(variable, cpu)
}

/// The current task of a CPU.
pub(crate) fn current(kernel: &Kernel<'_>, cpu: usize) -> Option<GuestVirt> {
    let at = hot(kernel, cpu, "current_task", "current_task")?;
    kernel.memory.read_u64(at).ok().map(GuestVirt).filter(|task| task.is_kernel_half())
}

fn preempt_count_at(kernel: &Kernel<'_>, cpu: usize) -> Option<GuestVirt> {
    hot(kernel, cpu, "preempt_count", "__preempt_count")
}

/// Top of a CPU's hard-interrupt stack, guest-virtual.
pub(crate) fn irq_stack_top(kernel: &Kernel<'_>, cpu: usize) -> Option<GuestVirt> {
    let at = hot(kernel, cpu, "hardirq_stack_ptr", "hardirq_stack_ptr")?;
    kernel.memory.read_u64(at).ok().map(GuestVirt)
}

/// The context of the fault.
pub(crate) fn of(
    kernel: &Kernel<'_>,
    registers: &Registers,
    cpu: &Cpu,
    fault: &Fault,
    evidence: &mut Vec<String>,
) -> Context {
    let own = reporting_count(fault.frames.get(..fault.at).unwrap_or_default());
    let by_count =
        cpu.preempt_count.map(|count| kind_of_count((count & !NEED_RESCHED).wrapping_sub(own)));
    let from_fault = fault.frames.get(fault.at..).unwrap_or_default();
    let by_frames = kind_of_frames(from_fault);
    if let Some(by_count) =
        by_count.filter(|by_count| fault.is_complete() && *by_count != by_frames)
    {
        evidence.push(format!(
            "the preempt count says {} but the frames say {}",
            name(by_count),
            name(by_frames)
        ));
    }
    // A count is kept by the kernel at each entry; frames end where unwinding ends.
    let kind = by_count.unwrap_or(by_frames);
    let idle = cpu.current.and_then(|task| task::is_idle(kernel, task).ok()).unwrap_or(false);
    if kind != ExecutionContext::Task {
        let comm = cpu.current.and_then(|task| kernel.text(task, "task_struct", "comm").ok());
        let comm = comm.unwrap_or_else(|| "the current task".to_owned());
        evidence.push(format!("in {} context: {comm} was only interrupted", name(kind)));
    }
    let flags_known = from_fault.first().and_then(|frame| frame.registers.get(Reg::Rflags));
    let flags = if fault.regs_at.is_some() { flags_known } else { registers.get(Reg::Rflags) };
    Context {
        kind,
        cpu: cpu.number,
        preempt_count: cpu.preempt_count,
        preempt_count_at: cpu.preempt_count_at,
        interrupts_enabled: flags.map(|flags| flags & RFLAGS_IF != 0),
        // Only with CONFIG_PREEMPT_RCU.
        rcu_nesting: cpu
            .current
            .and_then(|task| kernel.int(task, "task_struct", "rcu_read_lock_nesting").ok()),
        idle,
    }
}

fn kind_of_count(count: u32) -> ExecutionContext {
    if count & NMI != 0 {
        ExecutionContext::Nmi
    } else if count & HARDIRQ != 0 {
        ExecutionContext::Hardirq
    } else if count & SOFTIRQ_SERVING != 0 {
        ExecutionContext::Softirq
    } else {
        ExecutionContext::Task
    }
}

/// What the entries among the reporting frames added to the preempt count themselves:
/// `irqentry_nmi_enter()` and `irq_enter_rcu()`.
fn reporting_count(frames: &[Frame]) -> u32 {
    frames.iter().enumerate().fold(0, |count, (index, frame)| {
        let name = function(frame);
        let added = match name {
            // The hook at its entry is before irqentry_nmi_enter().
            "exc_double_fault" if index == 0 => 0,
            "exc_double_fault" | "exc_nmi" | "exc_machine_check" => NMI_OFFSET + HARDIRQ_OFFSET,
            _ if name.starts_with("asm_sysvec_") || name.starts_with("asm_common_interrupt") => {
                HARDIRQ_OFFSET
            }
            _ => 0,
        };
        count.wrapping_add(added)
    })
}

fn kind_of_frames(frames: &[Frame]) -> ExecutionContext {
    for frame in frames {
        if runs_softirqs(frame) {
            return ExecutionContext::Softirq;
        }
        match entered_by_interrupt(frame) {
            Some(ExecutionContext::Task) | None => {}
            Some(kind) => return kind,
        }
    }
    ExecutionContext::Task
}

/// The kind in words.
pub(crate) fn name(kind: ExecutionContext) -> &'static str {
    match kind {
        ExecutionContext::Task => "task",
        ExecutionContext::Softirq => "softirq",
        ExecutionContext::Hardirq => "hardirq",
        ExecutionContext::Nmi => "NMI",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::UnwindEnd;
    use crate::testing::{DATA, Guest, fault, frame, saved};

    const CPU: u64 = DATA + 0x5000;
    const TASK: u64 = DATA + 0x1000;

    fn read(guest: &mut Guest, registers: &Registers) -> Cpu {
        let image = guest.image();
        cpu(&Kernel::of_memory(&image, &guest.machine.space()), registers)
    }

    #[test]
    fn per_cpu_state_before_and_after_v6_2() {
        let old = Guest::new().object("current_task", 0x40).object("__preempt_count", 0x80);
        let new = Guest::new().object("pcpu_hot", 0x40).types(|types| {
            types.with("pcpu_hot", "current_task", 0, 8).with("pcpu_hot", "preempt_count", 0x40, 4)
        });
        for guest in [old, new] {
            let mut guest = guest.cpu(0xffff_8880_0000_0000).cpu(CPU);
            guest.poke_u64(CPU + 0x40, TASK);
            guest.poke_u32(CPU + 0x80, 0x8000_0102);
            let found = read(&mut guest, &Registers::unknown().with(Reg::GsBase, CPU));
            assert_eq!(found.number, Some(1));
            assert_eq!(found.current, Some(GuestVirt(TASK)));
            assert_eq!(found.preempt_count, Some(0x8000_0102));
            assert_eq!(found.preempt_count_at, Some(GuestVirt(CPU + 0x80)));
        }
    }

    #[test]
    fn without_gs_base_the_stack_tells_the_cpu() {
        let mut guest = Guest::new().object("current_task", 0x40).cpu(1).cpu(CPU);
        guest.poke_u64(CPU + 0x40, TASK);
        guest.poke_u64(TASK + 0x38, DATA + 0x8000);
        let found = read(&mut guest, &Registers::unknown().with(Reg::Rsp, DATA + 0xbff8));
        assert_eq!(found.number, Some(1));
        let mut guest = Guest::new().object("current_task", 0x40).cpu(CPU);
        let found = read(&mut guest, &Registers::unknown().with(Reg::Rsp, DATA + 0xc000));
        assert_eq!(found.number, None);
    }

    fn kind(count: u32, names: &[&str], at: usize) -> (ExecutionContext, Vec<String>) {
        let mut frames: Vec<Frame> = names.iter().map(|name| frame(name, None)).collect();
        frames[at] = saved(frames[at].clone());
        let mut guest = Guest::new();
        let image = guest.image();
        let space = guest.machine.space();
        let kernel = Kernel::of_memory(&image, &space);
        let cpu = Cpu { preempt_count: Some(count), ..Cpu::default() };
        let mut evidence = Vec::new();
        let fault = fault(frames, at, UnwindEnd::Outermost);
        let found = of(&kernel, &Registers::unknown(), &cpu, &fault, &mut evidence);
        (found.kind, evidence)
    }

    #[test]
    fn the_entry_of_a_detector_does_not_count() {
        let names = ["panic", "watchdog_timer_fn", "asm_sysvec_apic_timer_interrupt", "vfs_write"];
        assert_eq!(kind(0x0001_0000, &names, 3), (ExecutionContext::Task, vec![]));
        let names =
            ["oops_begin", "asm_exc_page_fault", "isr", "asm_common_interrupt", "vfs_write"];
        assert_eq!(kind(0x0001_0000, &names, 2).0, ExecutionContext::Hardirq);
        let names = ["panic", "nmi_panic", "exc_nmi", "asm_exc_nmi", "handle_softirqs"];
        assert_eq!(kind(0x0011_0101, &names, 4).0, ExecutionContext::Softirq);
        let names = ["exc_double_fault", "asm_exc_double_fault", "vfs_write"];
        assert_eq!(kind(0x8000_0000, &names, 2), (ExecutionContext::Task, vec![]));
    }

    #[test]
    fn disagreement_is_said() {
        let (kind, evidence) = kind(0x100, &["oops_begin", "vfs_write"], 1);
        assert_eq!(kind, ExecutionContext::Softirq);
        assert!(evidence[0].contains("says softirq but the frames say task"), "{evidence:?}");
    }
}
