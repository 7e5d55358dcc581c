//! One call of a driver's function that serves page faults: for whom and what it is called, and what its answer comes
//! to. Does not judge whether there were too many.

use guest::{AddressSpace, GuestVirt, MemoryError, PhysMemory, Reg, Registers, VirtMemory};
use repair_image::{RepairImage, Types};

use crate::kernel::Kernel;
use crate::stuck::current_task;
use crate::{Error, context, unwind};

/// Bytes that may lie between the saved registers of user mode and the end of the stack: `TOP_OF_KERNEL_STACK_PADDING`,
/// 16 with CONFIG_X86_FRED since v6.9 (arch/x86/include/asm/thread_info.h).
const PADDINGS: [u64; 2] = [0, 16];
/// Answers that end a fault with an error: `VM_FAULT_ERROR`, include/linux/mm_types.h (a macro).
const ERRORS: [&str; 6] = [
    "VM_FAULT_OOM",
    "VM_FAULT_SIGBUS",
    "VM_FAULT_SIGSEGV",
    "VM_FAULT_HWPOISON",
    "VM_FAULT_HWPOISON_LARGE",
    "VM_FAULT_FALLBACK",
];
/// Answers after which the access is tried again without the kernel having mapped anything.
const AGAIN: [&str; 2] = ["VM_FAULT_NOPAGE", "VM_FAULT_RETRY"];

/// A call that begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The task, guest-virtual address of its `task_struct`.
    pub task: GuestVirt,
    /// The mapping, guest-virtual address of its `vm_area_struct`.
    pub area: GuestVirt,
    /// The address that was touched, in the process's user space; the kernel may round it down to a page.
    pub address: GuestVirt,
    /// Whether it is to be written to.
    pub write: bool,
    /// As [`user_registers`].
    pub user: Registers,
    /// Where the function returns to, guest-virtual.
    pub returns_to: GuestVirt,
    /// The stack pointer then, guest-virtual.
    pub rsp: GuestVirt,
}

impl Visit {
    /// Reads the visit of a vCPU that stands on the function's first instruction. All such functions take a `vm_fault`
    /// as their first argument.
    ///
    /// # Errors
    /// A register or structure member is missing or can't be read.
    pub fn read(
        image: &RepairImage,
        memory: &dyn VirtMemory,
        registers: &Registers,
    ) -> Result<Self, Error> {
        let kernel = Kernel::of_memory(image, memory);
        let get = |reg| registers.get(reg).map(GuestVirt).ok_or(Error::UnknownRegister(reg));
        let (fault, rsp) = (get(Reg::Rdi)?, get(Reg::Rsp)?);
        let task = current_task(image, memory, registers);
        let task = task.ok_or(Error::UnknownRegister(Reg::GsBase))?;
        let flag = "FAULT_FLAG_WRITE";
        let writes = image.types.enumerator(flag).ok_or(Error::MissingSymbol(flag))? as u64;
        Ok(Self {
            task,
            area: kernel.pointer(fault, "vm_fault", "vma")?,
            address: kernel.pointer(fault, "vm_fault", "address")?,
            write: kernel.number(fault, "vm_fault", "flags")? & writes != 0,
            user: user_registers(image, memory, task).ok_or(Error::UnknownRegister(Reg::Rip))?,
            returns_to: kernel.pointer_at(rsp, "the return address")?,
            rsp: rsp + 8,
        })
    }

    /// Whether both are for the same access to the same page, and the program has not gone on in between.
    #[must_use]
    pub fn is_again(&self, before: &Self) -> bool {
        let key = |it: &Self| (it.task, it.area, it.address, it.write, it.user);
        key(self) == key(before)
    }

    /// Whether the process's page tables allow the access.
    ///
    /// # Errors
    /// They can't be read.
    pub fn is_served(&self, image: &RepairImage, phys: &dyn PhysMemory) -> Result<bool, Error> {
        let space = image.placement.space(phys);
        let kernel = Kernel::of_memory(image, &space);
        let mm = kernel.pointer(self.area, "vm_area_struct", "vm_mm")?;
        let root = kernel.pointer(mm, "mm_struct", "pgd")?;
        let unreadable = |source| Error::Guest { what: "the page tables", at: root, source };
        let root_at = space.translate(root).map_err(unreadable)?;
        let own = AddressSpace::new(phys, root_at, image.placement.five_level);
        match own.walk(self.address) {
            Ok(mapping) => Ok(mapping.writable || !self.write),
            Err(MemoryError::NotMapped { .. }) => Ok(false),
            Err(source) => Err(unreadable(source)),
        }
    }
}

/// Whether an answer lets the access be tried again, without any page or error to go with it; `None` where this
/// kernel's answers are not known.
#[must_use]
pub fn asks_again(types: &dyn Types, answer: u64) -> Option<bool> {
    let any = |names: &[&str]| {
        names.iter().try_fold(0, |bits, name| Some(bits | types.enumerator(name)? as u64))
    };
    let (again, errors) = (any(&AGAIN)?, any(&ERRORS)?);
    Some(answer & again != 0 && answer & errors == 0)
}

/// What user mode's registers were when the task last entered the kernel, without its flags: an exception and an
/// interrupt at the same instruction save them with different ones (RF, Intel SDM 3B, "Instruction-Breakpoint
/// Exception Condition"). `None` for a task that has never been there. The guest may run meanwhile.
#[must_use]
pub fn user_registers(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    task: GuestVirt,
) -> Option<Registers> {
    let kernel = Kernel::of_memory(image, memory);
    let size = image.types.size_of("pt_regs")?;
    let end = context::stack_of(&kernel, task)?.end;
    let mut found = PADDINGS.into_iter().filter_map(|padding| {
        let at = GuestVirt(end.0.checked_sub(padding.checked_add(size)?)?);
        unwind::read_pt_regs(image, memory, at).filter(is_of_user_mode)
    });
    let mut registers = found.next()?;
    registers.forget(Reg::Rflags);
    Some(registers)
}

/// Privilege level 3 in both selectors.
fn is_of_user_mode(registers: &Registers) -> bool {
    [Reg::Cs, Reg::Ss].iter().all(|&reg| registers.get(reg).is_some_and(|value| value & 3 == 3))
}

#[cfg(test)]
mod tests {
    use guest::GuestPhys;
    use guest::fake::PageSize;

    use super::*;
    use crate::testing::{DATA, FakeTypes, Guest, TEXT};

    const CPU: u64 = DATA + 0x100;
    const TASK: u64 = DATA + 0x1000;
    const MM: u64 = DATA + 0x2000;
    const AREA: u64 = DATA + 0x3000;
    const FAULT: u64 = DATA + 0x4000;
    const STACK: u64 = DATA + 0x10000;
    const ADDRESS: u64 = 0x7f00_0000_1000;

    fn types(types: FakeTypes) -> FakeTypes {
        let errors = ERRORS.iter().enumerate();
        let types = errors.fold(types, |types, (bit, name)| types.valued(name, 1 << bit));
        types
            .valued("VM_FAULT_NOPAGE", 0x100)
            .valued("VM_FAULT_RETRY", 0x400)
            .valued("FAULT_FLAG_WRITE", 0x20)
            .with("vm_fault", "vma", 8, 8)
            .with("vm_fault", "address", 0x18, 8)
            .with("vm_fault", "flags", 0x28, 4)
            .with("vm_area_struct", "vm_mm", 0x30, 8)
            .with("mm_struct", "pgd", 0x48, 8)
    }

    /// A task in a driver's function for an access to `ADDRESS`; padding before its user registers' end.
    fn guest(flags: u32, padding: u64) -> Guest {
        let mut guest = Guest::new().types(types).object("current_task", 0x40).cpu(CPU);
        let root = guest.machine.space().root();
        guest.machine.map(GuestVirt(DATA + 0x20_0000), root, PageSize::Size4K);
        guest.poke_u64(CPU + 0x40, TASK);
        guest.poke_u64(TASK + 0x38, STACK);
        guest.poke_u64(AREA + 0x30, MM);
        guest.poke_u64(MM + 0x48, DATA + 0x20_0000);
        guest.poke_u64(FAULT + 8, AREA);
        guest.poke_u64(FAULT + 0x18, ADDRESS);
        guest.poke_u32(FAULT + 0x28, flags);
        guest.poke_u64(STACK + 0x3000, TEXT + 0x123);
        let saved = STACK + 0x4000 - padding - 168;
        for (word, value) in [(5, 7), (16, 0x40_1000), (17, 0x33), (18, 0x1_0202), (20, 0x2b)] {
            guest.poke_u64(saved + word * 8, value);
        }
        guest
    }

    fn visit(guest: &mut Guest) -> (RepairImage, Visit) {
        let registers = Registers::unknown()
            .with(Reg::Rdi, FAULT)
            .with(Reg::Rsp, STACK + 0x3000)
            .with(Reg::GsBase, CPU);
        let image = guest.image();
        let visit = Visit::read(&image, &guest.machine.space(), &registers).unwrap();
        (image, visit)
    }

    #[test]
    fn who_touched_what_is_read() {
        for padding in PADDINGS {
            let (_, visit) = visit(&mut guest(0x20, padding));
            assert_eq!((visit.task.0, visit.area.0, visit.address.0), (TASK, AREA, ADDRESS));
            assert_eq!((visit.returns_to.0, visit.rsp.0), (TEXT + 0x123, STACK + 0x3008));
            assert!(visit.write);
            assert_eq!(visit.user.rip(), Some(GuestVirt(0x40_1000)));
            assert_eq!((visit.user.get(Reg::Rbx), visit.user.get(Reg::Rflags)), (Some(7), None));
        }
    }

    #[test]
    fn another_address_or_instruction_is_another_access() {
        let (_, first) = visit(&mut guest(0, 0));
        assert!(first.is_again(&first));
        let moved = Visit { address: GuestVirt(ADDRESS + 4096), ..first.clone() };
        assert!(!moved.is_again(&first));
        let gone_on = Visit { user: first.user.with(Reg::Rip, 0x40_1004), ..first.clone() };
        assert!(!gone_on.is_again(&first));
        let counts = Visit { user: first.user.with(Reg::Rbx, 8), ..first.clone() };
        assert!(!counts.is_again(&first));
    }

    #[test]
    fn the_page_tables_tell_whether_it_is_served() {
        let mut guest = guest(0x20, 0);
        let (image, visit) = visit(&mut guest);
        let served =
            |guest: &Guest, visit: &Visit| visit.is_served(&image, guest.machine.memory()).unwrap();
        assert!(!served(&guest, &visit));
        guest.machine.map(GuestVirt(ADDRESS), GuestPhys(0x70_0000), PageSize::Size4K);
        assert!(served(&guest, &visit));
        let entry = guest.machine.space().walk(GuestVirt(ADDRESS)).unwrap();
        guest.machine.poke(entry.entry_at, &(entry.entry & !2).to_le_bytes());
        assert!(!served(&guest, &visit), "it is not writable");
        assert!(served(&guest, &Visit { write: false, ..visit }));
    }

    #[test]
    fn only_some_answers_ask_for_another_try() {
        let types = types(FakeTypes::kernel());
        for (answer, again) in [(0x100, true), (0x400, true), (0, false), (0x200, false)] {
            assert_eq!(asks_again(&types, answer), Some(again), "{answer:#x}");
        }
        assert_eq!(asks_again(&types, 0x102), Some(false), "an error goes with it");
        assert_eq!(asks_again(&FakeTypes::kernel(), 0x100), None);
    }

    #[test]
    fn a_task_that_never_was_in_user_mode_has_no_registers_there() {
        let mut guest = guest(0, 0);
        guest.poke_u64(STACK + 0x4000 - 168 + 17 * 8, 0x10);
        let image = guest.image();
        assert_eq!(user_registers(&image, &guest.machine.space(), GuestVirt(TASK)), None);
    }
}
