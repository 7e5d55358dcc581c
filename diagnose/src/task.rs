//! One task: who it is, which program it runs, in which system call. The list of all tasks is in
//! `tasks.rs`.

use guest::{GuestVirt, Reg};
use repair_image::{CfaRule, FrameKind, RepairImage, base_name};

use crate::kernel::Kernel;
use crate::{Error, Frame, Task, UnwindEnd};

/// `PF_IDLE` and `PF_KTHREAD` of include/linux/sched.h: the same values since v4.10.
const PF_IDLE: u64 = 0x2;
const PF_KTHREAD: u64 = 0x0020_0000;
/// Longest name of an executable that is read, bytes (NAME_MAX).
const NAME_MAX: usize = 255;
/// System-call numbers at or above this are not looked up: the x86-64 table has under 500 entries.
const SYSCALL_MAX: u64 = 1024;

/// Reads the task at `at`.
pub(crate) fn read(kernel: &Kernel<'_>, at: GuestVirt) -> Result<Task, Error> {
    let flags = kernel.number(at, "task_struct", "flags")?;
    Ok(Task {
        at,
        comm: kernel.text(at, "task_struct", "comm")?,
        pid: kernel.int(at, "task_struct", "pid")?,
        tgid: kernel.int(at, "task_struct", "tgid")?,
        kernel_thread: flags & PF_KTHREAD != 0,
        executable: executable(kernel, at).ok().flatten(),
        syscall: None,
    })
}

/// Whether the task at `at` is the idle task of a CPU.
pub(crate) fn is_idle(kernel: &Kernel<'_>, at: GuestVirt) -> Result<bool, Error> {
    let flags = kernel.number(at, "task_struct", "flags")?;
    Ok(flags & PF_IDLE != 0 || kernel.int(at, "task_struct", "pid")? == 0)
}

/// Last component of the path of the task's executable; `None` for kernel threads.
fn executable(kernel: &Kernel<'_>, task: GuestVirt) -> Result<Option<String>, Error> {
    let mm = kernel.pointer(task, "task_struct", "mm")?;
    if mm.0 == 0 {
        return Ok(None);
    }
    let file = kernel.pointer(mm, "mm_struct", "exe_file")?;
    if file.0 == 0 {
        return Ok(None);
    }
    let entry = kernel.pointer(file, "file", "f_path.dentry")?;
    let name = kernel.pointer(entry, "dentry", "d_name.name")?;
    kernel.string(name, NAME_MAX + 1).map(Some)
}

/// System call that a walk to user mode came from: `write (1)`.
pub(crate) fn syscall(kernel: &Kernel<'_>, frames: &[Frame], end: &UnwindEnd) -> Option<String> {
    if *end != UnwindEnd::UserMode {
        return None;
    }
    let outermost = frames.last()?;
    // entry_SYSCALL_64_after_hwframe in v6.1 to v6.12: the only entry whose orig_ax counts in
    // sys_call_table.
    if !base_name(outermost.function.as_deref()?).starts_with("entry_SYSCALL_64") {
        return None;
    }
    let regs = user_regs_at(kernel.image, outermost)?;
    let number = kernel.number(regs, "pt_regs", "orig_ax").ok().filter(|&nr| nr < SYSCALL_MAX)?;
    let name = syscall_name(kernel, number);
    Some(name.map_or_else(|| number.to_string(), |name| format!("{name} ({number})")))
}

/// Guest-virtual address of the `pt_regs` that lie at the CFA of an entry frame.
fn user_regs_at(image: &RepairImage, frame: &Frame) -> Option<GuestVirt> {
    let row = image.unwind_row(frame.pc.lookup())?;
    match (row.kind, row.cfa) {
        (FrameKind::Regs, CfaRule::Offset { reg: Reg::Rsp, offset }) => {
            Some(frame.registers.rsp()?.offset(i64::from(offset)))
        }
        _ => None,
    }
}

fn syscall_name(kernel: &Kernel<'_>, number: u64) -> Option<String> {
    let table = kernel.image.address_of("sys_call_table")?;
    let entry = kernel.pointer_at(table + number * 8, "sys_call_table").ok()?;
    let location = kernel.image.locate(entry).filter(|location| location.offset == 0)?;
    let name = location.symbol.name;
    // Since commit d5a00528b58c ("syscalls/core, syscalls/x86: Rename struct pt_regs-based sys_*() to
    // __x64_sys_*()", v4.17) the functions carry a prefix for their ABI.
    let name = name.strip_prefix("__x64_sys_").or_else(|| name.strip_prefix("__x64_"));
    name.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use guest::CodeAddress;
    use repair_image::{RowSource, SavedRule, UnwindRow};

    use super::*;
    use crate::testing::{DATA, Guest, TEXT, frame};

    const TASK: u64 = DATA + 0x1000;

    fn guest() -> Guest {
        let mut guest = Guest::new();
        guest.poke_task(TASK, 42, "dd");
        guest.poke_u64(TASK + 0x30, DATA + 0x2000);
        guest.poke_u64(DATA + 0x2008, DATA + 0x3000);
        guest.poke_u64(DATA + 0x3008, DATA + 0x4000);
        guest.poke_u64(DATA + 0x4008, DATA + 0x5000);
        guest.poke(DATA + 0x5000, b"busybox\0");
        guest
    }

    fn of(guest: &mut Guest) -> Result<Task, Error> {
        let image = guest.image();
        read(&Kernel::of_memory(&image, &guest.machine.space()), GuestVirt(TASK))
    }

    #[test]
    fn a_process_and_its_executable() {
        let task = of(&mut guest()).unwrap();
        assert_eq!((task.pid, task.comm.as_str(), task.kernel_thread), (42, "dd", false));
        assert_eq!(task.executable.as_deref(), Some("busybox"));
    }

    #[test]
    fn damaged_pointers_cost_only_the_name() {
        for at in [TASK + 0x30, DATA + 0x2008, DATA + 0x3008, DATA + 0x4008] {
            let mut guest = guest();
            guest.poke_u64(at, 0x1234_5678_9abc_def0);
            assert_eq!(of(&mut guest).unwrap().executable, None);
        }
        let mut endless = guest();
        endless.poke(DATA + 0x5000, &[b'a'; 0x800]);
        assert_eq!(of(&mut endless).unwrap().executable, None);
    }

    #[test]
    fn the_system_call_is_named_from_the_outermost_registers() {
        let row = UnwindRow {
            kind: FrameKind::Regs,
            cfa: CfaRule::Offset { reg: Reg::Rsp, offset: 8 },
            saved: [SavedRule::Unknown; 6],
            source: RowSource::Orc,
        };
        let mut guest = guest()
            .object("sys_call_table", DATA + 0x8000)
            .function("__x64_sys_write", TEXT + 0x100, 0x10)
            .function("entry_SYSCALL_64_after_hwframe", TEXT + 0x200, 0x80)
            .row(TEXT + 0x200..TEXT + 0x280, row);
        guest.poke_u64(DATA + 0x8008, TEXT + 0x100);
        guest.poke_u64(DATA + 0x9008 + 15 * 8, 1);
        let image = guest.image();
        let space = guest.machine.space();
        let mut outermost = frame("entry_SYSCALL_64_after_hwframe", None);
        outermost.pc = CodeAddress::Return(GuestVirt(TEXT + 0x240));
        outermost.registers.set(Reg::Rsp, DATA + 0x9000);
        let kernel = Kernel::of_memory(&image, &space);
        let frames = [outermost];
        let name = |end: UnwindEnd| syscall(&kernel, &frames, &end);
        assert_eq!(name(UnwindEnd::UserMode).as_deref(), Some("write (1)"));
        assert_eq!(name(UnwindEnd::Outermost), None);
    }
}
