//! What kind of crash it is, from the exception, the accessed address, the bug table and the function
//! that reported it. Not who is at fault.

use guest::{GuestVirt, Reg, Registers};

use crate::access::{Access, Mapped};
use crate::context::{Cpu, irq_stack_top};
use crate::fault::Fault;
use crate::kernel::Kernel;
use crate::message::Bug;
use crate::names::{Detector, function, functions, is_panic};
use crate::{CrashClass, Frame};

/// An access below this is a NULL dereference: PAGE_SIZE, as the kernel's own message has it
/// (arch/x86/mm/fault.c, show_fault_oops()).
const FIRST_PAGE: u64 = 4096;
/// A guard page's size, include/linux/vmalloc.h.
const GUARD: u64 = 4096;

/// Inputs to the classification besides the frames.
pub(crate) struct Facts<'a> {
    pub(crate) registers: &'a Registers,
    pub(crate) cpu: &'a Cpu,
    pub(crate) access: Option<&'a Access>,
    pub(crate) bug: Option<&'a Bug>,
}

/// The class, `None` when nothing is known that decides.
pub(crate) fn of(
    kernel: &Kernel<'_>,
    fault: &Fault,
    facts: &Facts<'_>,
    evidence: &mut Vec<String>,
) -> Option<CrashClass> {
    if let Some(detector) = fault.detector {
        return Some(of_detector(detector));
    }
    // Both ways to it, exc_double_fault() and page_fault_oops(), have decided already.
    let reporting = fault.frames.get(..fault.at).unwrap_or_default();
    if reporting.iter().any(|frame| function(frame) == "handle_stack_overflow") {
        return Some(CrashClass::StackOverflow);
    }
    if fault.frames.get(fault.at).is_some_and(takes_from_free_list) {
        return Some(CrashClass::SlabCorruption);
    }
    match fault.exception.as_deref() {
        Some("exc_page_fault") => of_page_fault(facts.access?, evidence),
        Some("exc_general_protection") => Some(CrashClass::GeneralProtection),
        Some("exc_divide_error") => Some(CrashClass::Divide),
        Some("exc_invalid_op") => Some(of_invalid_opcode(fault, facts.bug, evidence)),
        Some("exc_double_fault") => Some(of_double_fault(kernel, fault, facts, evidence)),
        Some(other) => Some(CrashClass::Other { reporter: other.to_owned() }),
        None => of_caller(fault),
    }
}

/// Functions of mm/slub.c that follow a free list; they are inlined. `freelist_ptr_decode()` since v6.6.
const FREE_LIST: [&str; 5] = [
    "get_freepointer",
    "get_freepointer_safe",
    "freelist_dereference",
    "freelist_ptr_decode",
    "prefetch_freepointer",
];
/// How the functions are called that hand out objects.
const ALLOCATES: [&str; 6] = [
    "kmem_cache_alloc",
    "__kmem_cache_alloc",
    "__kmalloc",
    "kmalloc",
    "___slab_alloc",
    "__slab_alloc",
];

/// Whether a frame faulted because a free list led it to no object. Whoever wrote there is long gone.
pub(crate) fn takes_from_free_list(frame: &Frame) -> bool {
    let name = function(frame);
    frame.module.is_none()
        && ALLOCATES.iter().any(|prefix| name.starts_with(prefix))
        && functions(frame).any(|name| FREE_LIST.contains(&name))
}

fn of_detector(detector: Detector) -> CrashClass {
    match detector {
        Detector::SoftLockup => CrashClass::SoftLockup,
        Detector::HardLockup => CrashClass::HardLockup,
        Detector::HungTask => CrashClass::HungTask,
        Detector::RcuStall => CrashClass::RcuStall,
    }
}

/// The error code is not in `pt_regs` (the entry code puts -1 into orig_ax after passing it on): access
/// kind and page tables tell the same.
fn of_page_fault(access: &Access, evidence: &mut Vec<String>) -> Option<CrashClass> {
    let at = access.at?;
    let user_half = !at.is_kernel_half();
    if at.0 < FIRST_PAGE {
        return Some(if access.fetch { CrashClass::BadCall } else { CrashClass::NullDereference });
    }
    let user_page = matches!(access.mapped, Mapped::Yes(page) if page.user);
    if user_half && user_page {
        evidence.push(format!("{at:#x} is mapped user memory"));
        return Some(CrashClass::UserAccess);
    }
    if access.fetch {
        return Some(CrashClass::BadCall);
    }
    match access.mapped {
        Mapped::Yes(page) if !page.writable && access.write != Some(false) => {
            evidence.push(format!("{at:#x} is mapped read-only"));
            access.write.map(|_| CrashClass::WriteProtection)
        }
        Mapped::Yes(_) => {
            evidence.push(format!("{at:#x} is mapped by now"));
            Some(CrashClass::Other { reporter: "exc_page_fault".to_owned() })
        }
        Mapped::No | Mapped::Unknown => Some(CrashClass::WildPointer),
    }
}

fn of_invalid_opcode(fault: &Fault, bug: Option<&Bug>, evidence: &mut Vec<String>) -> CrashClass {
    let Some(bug) = bug else { return CrashClass::InvalidOpcode };
    let place = bug.file.as_deref().unwrap_or("unknown file");
    evidence.push(format!("the bug table has an entry for it: {place}:{}", bug.line));
    if bug.warning {
        // Only with panic_on_warn or with more warnings than kernel.warn_limit.
        return CrashClass::Warning;
    }
    let frame = fault.frames.get(fault.at).filter(|frame| frame.module.is_none());
    // CONFIG_SLAB_FREELIST_HARDENED, mm/slub.c: an object that would become its own successor.
    if frame.is_some_and(|frame| functions(frame).any(|name| name == "set_freepointer")) {
        return CrashClass::DoubleFree;
    }
    match frame.map(function).unwrap_or_default() {
        // Since v6.6 with the suffix `_or_report`.
        name if name.starts_with("__list_add_valid")
            || name.starts_with("__list_del_entry_valid") =>
        {
            CrashClass::ListCorruption
        }
        "usercopy_abort" => CrashClass::Usercopy,
        // `__fortify_panic` since v6.9.
        "fortify_panic" | "__fortify_panic" => CrashClass::Fortify,
        _ => CrashClass::Bug,
    }
}

/// A stack overflow is a double fault whose CR2 lies in the guard page below a stack (exc_double_fault()
/// decides by that, too), or whose stack pointer does.
fn of_double_fault(
    kernel: &Kernel<'_>,
    fault: &Fault,
    facts: &Facts<'_>,
    evidence: &mut Vec<String>,
) -> CrashClass {
    let rsp = fault.frames.get(fault.at).and_then(|frame| frame.registers.rsp());
    let touched = [facts.registers.get(Reg::Cr2).map(GuestVirt), rsp];
    let stacks = [("task", task_stack(kernel, facts.cpu)), ("irq", irq_stack(kernel, facts.cpu))];
    let hit = stacks.iter().find(|(_, base)| {
        base.is_some_and(|base| {
            touched.iter().flatten().any(|at| base.0.wrapping_sub(at.0.wrapping_add(1)) < GUARD)
        })
    });
    let Some((name, Some(base))) = hit else { return CrashClass::DoubleFault };
    evidence.push(format!("the guard page below the {name} stack at {base:#x} was hit"));
    if facts.access.is_some() {
        return CrashClass::StackOverflow;
    }
    // The interrupt is in service and will never be acknowledged.
    evidence.push(
        "not by the instruction: the processor delivered an interrupt, which is lost".to_owned(),
    );
    CrashClass::DoubleFault
}

fn task_stack(kernel: &Kernel<'_>, cpu: &Cpu) -> Option<GuestVirt> {
    kernel.pointer(cpu.current?, "task_struct", "stack").ok()
}

/// Lowest address of the hard-interrupt stack: its top pointer lies one word below its end
/// (arch/x86/kernel/irq_64.c, map_irq_stack()).
fn irq_stack(kernel: &Kernel<'_>, cpu: &Cpu) -> Option<GuestVirt> {
    let top = irq_stack_top(kernel, cpu.number?)?.checked_add(8)?;
    let size = kernel.image.types.size_of("irq_stack")?;
    top.0.checked_sub(size).map(GuestVirt)
}

/// No exception: `panic()` was called, or nothing crashed (a dump of a live guest).
fn of_caller(fault: &Fault) -> Option<CrashClass> {
    let reporting: &[Frame] = fault.frames.get(..fault.at).unwrap_or_default();
    if reporting.iter().any(|frame| function(frame) == "__stack_chk_fail") {
        return Some(CrashClass::StackProtector);
    }
    reporting.iter().any(is_panic).then_some(CrashClass::Panic)
}

#[cfg(test)]
mod tests {
    use guest::fake::PageSize;
    use guest::{CodeAddress, GuestPhys};

    use super::*;
    use crate::testing::{DATA, Guest, TEXT, fault, frame, saved};
    use crate::{UnwindEnd, access, code};

    /// Class and accessed address of a fault at `TEXT` on this instruction.
    fn classify(
        guest: &mut Guest,
        exception: &str,
        code: &[u8],
        registers: Registers,
    ) -> (Option<CrashClass>, Option<u64>) {
        guest.poke(TEXT, code);
        let image = guest.image();
        let space = guest.machine.space();
        let hooked = registers.with(Reg::Cr3, space.root().0).with(Reg::Cr4, 0);
        let kernel = Kernel::new(&image, &space, &hooked);
        let mut at = saved(frame("f", None));
        at.pc = CodeAddress::Exact(GuestVirt(hooked.get(Reg::Rip).unwrap_or(TEXT)));
        at.registers = registers;
        let mut fault = fault(vec![at], 0, UnwindEnd::UserMode);
        fault.exception = Some(exception.to_owned());
        let instruction = code::instruction_at(&space, fault.frames[0].pc.ip());
        let mut said = Vec::new();
        let access = access::of(&kernel, &fault, &hooked, instruction.as_ref(), &mut said);
        let cpu = Cpu::default();
        let facts = Facts { registers: &hooked, cpu: &cpu, access: access.as_ref(), bug: None };
        let class = of(&kernel, &fault, &facts, &mut said);
        (class, access.and_then(|access| access.at).map(|at| at.0))
    }

    /// mov eax, dword ptr [rax+8]
    const LOAD: &[u8] = &[0x8b, 0x40, 0x08];
    /// mov dword ptr [rax+8], eax
    const STORE: &[u8] = &[0x89, 0x40, 0x08];

    fn page_fault(code: &[u8], rax: u64, cr2: Option<u64>) -> (Option<CrashClass>, Option<u64>) {
        let mut guest = Guest::new();
        guest.machine.map(GuestVirt(0x40_0000), GuestPhys(0x70_0000), PageSize::Size4K);
        let registers = Registers::unknown().with(Reg::Rax, rax);
        let registers = cr2.map_or(registers, |cr2| registers.with(Reg::Cr2, cr2));
        classify(&mut guest, "exc_page_fault", code, registers)
    }

    #[test]
    fn page_faults() {
        use CrashClass::{NullDereference, WildPointer};
        assert_eq!(page_fault(LOAD, 0, Some(8)), (Some(NullDereference), Some(8)));
        assert_eq!(page_fault(STORE, 0x100, None), (Some(NullDereference), Some(0x108)));
        let wild = 0xffff_c900_1234_0000;
        assert_eq!(page_fault(LOAD, wild, Some(wild + 8)).0, Some(WildPointer));
        // CR2 of a later fault does not win over an operand that explains the fault.
        assert_eq!(page_fault(LOAD, 0, Some(wild)), (Some(NullDereference), Some(8)));
    }

    #[test]
    fn a_call_to_no_code() {
        let registers = Registers::unknown().with(Reg::Rip, 0).with(Reg::Cr2, 0);
        let found = classify(&mut Guest::new(), "exc_page_fault", &[], registers);
        assert_eq!(found, (Some(CrashClass::BadCall), Some(0)));
        let registers = Registers::unknown().with(Reg::Rip, DATA).with(Reg::Cr2, DATA);
        let found = classify(&mut Guest::new(), "exc_page_fault", &[], registers);
        assert_eq!(found.0, Some(CrashClass::BadCall));
    }

    #[test]
    fn other_exceptions() {
        let class =
            |exception: &str| classify(&mut Guest::new(), exception, LOAD, Registers::unknown()).0;
        assert_eq!(class("exc_divide_error"), Some(CrashClass::Divide));
        assert_eq!(class("exc_invalid_op"), Some(CrashClass::InvalidOpcode));
        let other = CrashClass::Other { reporter: "exc_stack_segment".to_owned() };
        assert_eq!(class("exc_stack_segment"), Some(other));
        let registers = Registers::unknown().with(Reg::Rax, 0xdead_0000_0000_0100);
        let found = classify(&mut Guest::new(), "exc_general_protection", LOAD, registers);
        assert_eq!(found, (Some(CrashClass::GeneralProtection), Some(0xdead_0000_0000_0108)));
    }

    #[test]
    fn list_checks_are_told_from_other_bugs() {
        let bug = Bug { file: None, line: 1, warning: false };
        let class = |name: &str, module: Option<&str>| {
            let fault = fault(vec![frame(name, module)], 0, UnwindEnd::UserMode);
            of_invalid_opcode(&fault, Some(&bug), &mut Vec::new())
        };
        assert_eq!(class("__list_add_valid", None), CrashClass::ListCorruption);
        assert_eq!(class("__list_del_entry_valid_or_report", None), CrashClass::ListCorruption);
        assert_eq!(class("usercopy_abort", None), CrashClass::Usercopy);
        assert_eq!(class("__fortify_panic", None), CrashClass::Fortify);
        assert_eq!(class("usercopy_abort", Some("m")), CrashClass::Bug);
    }

    fn double_fault(cr2: u64, by_instruction: bool) -> CrashClass {
        const TASK: u64 = DATA + 0x1000;
        let mut guest = Guest::new();
        guest.poke_u64(TASK + 0x38, 0xffff_c900_0001_0000);
        let image = guest.image();
        let space = guest.machine.space();
        let registers = Registers::unknown().with(Reg::Cr2, cr2);
        let cpu = Cpu { current: Some(GuestVirt(TASK)), ..Cpu::default() };
        let access = Access {
            at: Some(GuestVirt(cr2)),
            fetch: false,
            write: Some(true),
            size: Some(8),
            operand: None,
            mapped: Mapped::No,
        };
        let access = by_instruction.then_some(&access);
        let facts = Facts { registers: &registers, cpu: &cpu, access, bug: None };
        let fault = fault(vec![frame("f", Some("m"))], 0, UnwindEnd::UserMode);
        of_double_fault(&Kernel::of_memory(&image, &space), &fault, &facts, &mut Vec::new())
    }

    #[test]
    fn the_guard_page_makes_a_stack_overflow() {
        assert_eq!(double_fault(0xffff_c900_0000_fff8, true), CrashClass::StackOverflow);
        assert_eq!(double_fault(0xffff_c900_0000_f000, true), CrashClass::StackOverflow);
        for outside in [0xffff_c900_0000_efff, 0xffff_c900_0001_0000, 0, u64::MAX] {
            assert_eq!(double_fault(outside, true), CrashClass::DoubleFault, "{outside:#x}");
        }
    }

    #[test]
    fn an_interrupt_that_found_no_stack_is_lost() {
        assert_eq!(double_fault(0xffff_c900_0000_fff8, false), CrashClass::DoubleFault);
    }
}
