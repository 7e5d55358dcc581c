//! All tasks of the guest and where each of them stands: needed to say that nobody executes or sleeps
//! in a driver. Walks lists of a guest that may lie: bounded, and a list met twice is an error.

use std::collections::HashSet;

use guest::{CodeAddress, GuestVirt, Reg, Registers, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;

use crate::code::CodeCache;
use crate::kernel::Kernel;
use crate::unwind::{self, Limits, Start};
use crate::{Error, Frame, UnwindEnd, context};

/// Tasks at most. A kernel allows 4 million (PID_MAX_LIMIT); guests have hundreds.
const TASKS_MAX: usize = 1 << 17;
/// Frames of one sleeping task at most.
const FRAMES_MAX: usize = 256;

/// A task and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TaskPosition {
    /// Guest-virtual address of its `task_struct`.
    pub task: GuestVirt,
    /// Thread id.
    pub pid: i32,
    /// Process id.
    pub tgid: i32,
    /// Name.
    pub comm: String,
    /// Kernel CPU number of the CPU that executes it, `None` while it does not run.
    pub on_cpu: Option<usize>,
    /// `task_struct.__state`: 0 runnable, bit 0 interruptible, bit 1 uninterruptible sleep.
    pub state: u32,
    /// Guest-virtual stack pointer that it was switched out with; stale while it runs.
    pub sp: GuestVirt,
}

impl TaskPosition {
    /// Whether it sleeps and signals do not wake it (`D` in ps), idle kernel threads not counted:
    /// `TASK_UNINTERRUPTIBLE` without `TASK_NOLOAD`, include/linux/sched.h.
    #[must_use]
    pub fn is_uninterruptible(&self) -> bool {
        self.state & 0x402 == 0x2
    }

    /// Its state in one letter, as ps shows it: `R` runnable, `S` sleeps, `D` sleeps and signals do not wake it, `T`
    /// stopped, `t` traced, `P` parked, `Z` dead, `I` idle kernel thread. The bits are those of include/linux/sched.h
    /// since v4.14.
    #[must_use]
    pub fn letter(&self) -> char {
        const LETTERS: [(u32, char); 6] =
            [(0x1, 'S'), (0x2, 'D'), (0x4, 'T'), (0x8, 't'), (0x40, 'P'), (0x80, 'Z')];
        if self.state & 0x402 == 0x402 {
            return 'I';
        }
        LETTERS.iter().find(|(bit, _)| self.state & bit != 0).map_or('R', |(_, letter)| *letter)
    }
}

/// Every task, the idle tasks of the CPUs included.
///
/// # Errors
/// A structure member is missing, or a list is damaged: then nothing may be concluded from the part
/// that could be read.
pub fn all(image: &RepairImage, memory: &dyn VirtMemory) -> Result<Vec<TaskPosition>, Error> {
    let kernel = Kernel::of_memory(image, memory);
    let mut walk = Walk::new(kernel);
    let init = image.address_of("init_task").ok_or(Error::MissingSymbol("init_task"))?;
    walk.add(init)?;
    for leader in walk.list(init, "tasks")? {
        walk.add_process(leader)?;
    }
    for cpu in 0..image.placement.per_cpu.len() {
        let idle = image.per_cpu("idle_threads", cpu);
        let idle = idle.map(|at| kernel.pointer_at(at, "idle_threads")).transpose()?;
        if let Some(idle) = idle.filter(|idle| idle.0 != 0) {
            walk.add(idle)?;
        }
    }
    Ok(walk.found)
}

/// The frames of a task that does not run, innermost first.
///
/// # Errors
/// The frame that `__switch_to_asm()` left can't be read.
pub fn frames_of_sleeping(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    position: &TaskPosition,
    cache: &mut CodeCache,
) -> Result<(Vec<Frame>, UnwindEnd), Error> {
    let kernel = Kernel::of_memory(image, memory);
    let registers = switched_out(&kernel, position.sp)?;
    let rip = registers.rip().ok_or(Error::UnknownRegister(Reg::Rip))?;
    let start = Start { registers, pc: CodeAddress::Return(rip) };
    Ok(unwind::walk(image, memory, cache, &start, Limits { frames: FRAMES_MAX }))
}

/// Registers at the return from `__switch_to_asm()`: what it pushed lies at `sp`
/// (`struct inactive_task_frame`, arch/x86/include/asm/switch_to.h).
fn switched_out(kernel: &Kernel<'_>, sp: GuestVirt) -> Result<Registers, Error> {
    const FRAME: &str = "inactive_task_frame";
    let mut registers = Registers::unknown();
    for (member, reg) in [
        ("r15", Reg::R15),
        ("r14", Reg::R14),
        ("r13", Reg::R13),
        ("r12", Reg::R12),
        ("bx", Reg::Rbx),
        ("bp", Reg::Rbp),
        ("ret_addr", Reg::Rip),
    ] {
        registers.set(reg, kernel.number(sp, FRAME, member)?);
    }
    let above = kernel.offset(FRAME, "ret_addr")?.wrapping_add(8);
    registers.set(Reg::Rsp, sp.wrapping_add(above).0);
    Ok(registers)
}

/// A walk over the task lists.
struct Walk<'a> {
    kernel: Kernel<'a>,
    /// Current task of each CPU.
    running: Vec<Option<GuestVirt>>,
    seen: HashSet<GuestVirt>,
    found: Vec<TaskPosition>,
}

impl<'a> Walk<'a> {
    fn new(kernel: Kernel<'a>) -> Self {
        let cpus = 0..kernel.image.placement.per_cpu.len();
        let running = cpus.map(|cpu| context::current(&kernel, cpu)).collect();
        Self { kernel, running, seen: HashSet::new(), found: Vec::new() }
    }

    fn add(&mut self, task: GuestVirt) -> Result<(), Error> {
        if !self.seen.insert(task) {
            return Ok(());
        }
        if self.found.len() >= TASKS_MAX {
            return Err(Error::DamagedList { what: "tasks", at: task, entries: TASKS_MAX });
        }
        let kernel = &self.kernel;
        // Renamed by commit 2f064a59a11f ("sched: Change task_struct::state", v5.14).
        let state = kernel.number(task, "task_struct", "__state")?;
        self.found.push(TaskPosition {
            task,
            pid: kernel.int(task, "task_struct", "pid")?,
            tgid: kernel.int(task, "task_struct", "tgid")?,
            comm: kernel.text(task, "task_struct", "comm")?,
            on_cpu: self.running.iter().position(|&current| current == Some(task)),
            state: state as u32,
            sp: kernel.pointer(task, "task_struct", "thread.sp")?,
        });
        Ok(())
    }

    /// The threads of a process; `signal` outlives its threads' membership in the task list.
    fn add_process(&mut self, leader: GuestVirt) -> Result<(), Error> {
        self.add(leader)?;
        let signal = self.kernel.pointer(leader, "task_struct", "signal")?;
        let head = signal.wrapping_add(self.kernel.offset("signal_struct", "thread_head")?);
        for thread in self.nodes(head, "thread_node")? {
            self.add(thread)?;
        }
        Ok(())
    }

    /// Tasks on the list whose head is member `path` of `first`, `first` itself excluded.
    fn list(&self, first: GuestVirt, path: &'static str) -> Result<Vec<GuestVirt>, Error> {
        self.nodes(first.wrapping_add(self.kernel.offset("task_struct", path)?), path)
    }

    /// Tasks whose member `path` is on the list with this head.
    fn nodes(&self, head: GuestVirt, path: &'static str) -> Result<Vec<GuestVirt>, Error> {
        let offset = self.kernel.offset("task_struct", path)?;
        let mut met = HashSet::new();
        let mut tasks = Vec::new();
        let mut node = self.kernel.pointer_at(head, "task list")?;
        while node != head {
            if !met.insert(node) || tasks.len() >= TASKS_MAX || !node.is_kernel_half() {
                return Err(Error::DamagedList { what: "tasks", at: node, entries: tasks.len() });
            }
            tasks.push(GuestVirt(node.0.wrapping_sub(offset)));
            node = self.kernel.pointer_at(node, "task list")?;
        }
        Ok(tasks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest};

    const INIT: u64 = DATA + 0x1000;
    const LEADER: u64 = DATA + 0x2000;
    const THREAD: u64 = DATA + 0x3000;
    const SIGNAL: u64 = DATA + 0x4000;

    /// swapper/0, a process with two threads; CPU 0 executes the second one.
    fn guest() -> Guest {
        let mut guest =
            Guest::new().object("init_task", INIT).object("current_task", 0x40).cpu(DATA + 0x5000);
        for (at, pid, comm) in [(INIT, 0, "swapper/0"), (LEADER, 7, "db"), (THREAD, 8, "db:io")] {
            guest.poke_task(at, pid, comm);
            guest.poke_u64(at + 0x60, SIGNAL);
        }
        for (from, to) in [
            (INIT + 0x40, LEADER + 0x40),
            (LEADER + 0x40, INIT + 0x40),
            (SIGNAL + 0x10, LEADER + 0x50),
            (LEADER + 0x50, THREAD + 0x50),
            (THREAD + 0x50, SIGNAL + 0x10),
        ] {
            guest.poke_u64(from, to);
        }
        guest.poke_u64(DATA + 0x5040, THREAD);
        guest.poke_u32(LEADER + 0x1c, 2);
        guest.poke_u64(LEADER + 0x68, DATA + 0x6000);
        guest
    }

    fn walk(guest: &mut Guest) -> Result<Vec<TaskPosition>, Error> {
        let image = guest.image();
        all(&image, &guest.machine.space())
    }

    #[test]
    fn threads_and_cpus() {
        let tasks = walk(&mut guest()).unwrap();
        let pids: Vec<_> = tasks.iter().map(|task| (task.pid, task.on_cpu)).collect();
        assert_eq!(pids, [(0, None), (7, None), (8, Some(0))]);
        assert!(tasks[1].is_uninterruptible() && !tasks[2].is_uninterruptible());
        assert_eq!(tasks[1].comm, "db");
        assert_eq!((tasks[1].letter(), tasks[2].letter()), ('D', 'R'));
    }

    #[test]
    fn a_list_that_runs_in_a_circle_is_an_error() {
        let mut guest = guest();
        guest.poke_u64(LEADER + 0x40, LEADER + 0x40);
        let found = walk(&mut guest);
        assert!(matches!(found, Err(Error::DamagedList { entries: 1, .. })), "{found:?}");
    }

    #[test]
    fn wild_pointers_are_errors() {
        for (at, value) in [
            (INIT + 0x40, 0),
            (LEADER + 0x40, 0x4141_4141_4141_4141),
            (LEADER + 0x40, u64::MAX - 7),
            (LEADER + 0x60, 0xffff_ffff_ffff_fff8),
            (THREAD + 0x50, DATA + 0x1f_ffff),
        ] {
            let mut guest = guest();
            guest.poke_u64(at, value);
            assert!(walk(&mut guest).is_err(), "{at:#x} = {value:#x}");
        }
    }

    #[test]
    fn registers_that_were_pushed_by_the_switch() {
        let mut guest = guest();
        for word in 0..7 {
            guest.poke_u64(DATA + 0x6000 + word * 8, 100 + word);
        }
        let image = guest.image();
        let space = guest.machine.space();
        let found = switched_out(&Kernel::of_memory(&image, &space), GuestVirt(DATA + 0x6000));
        let found = found.unwrap();
        assert_eq!(found.get(Reg::R15), Some(100));
        assert_eq!(found.get(Reg::Rbp), Some(105));
        assert_eq!(found.get(Reg::Rip), Some(106));
        assert_eq!(found.get(Reg::Rsp), Some(DATA + 0x6038));
        assert_eq!(found.get(Reg::Rax), None);
    }
}
