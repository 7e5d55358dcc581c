//! What the kernel would still call of a driver by itself: pending timers, and work that is queued or waits for its
//! timer. Found in the kernel's own structures. Stopping it is the quarantine's.

use std::collections::HashSet;

use guest::GuestVirt;
use repair_image::{Module, base_name};
use serde::Serialize;

use super::Section;
use crate::Error;
use crate::kernel::Kernel;

/// Timers and work items that are looked at at most.
const ENTRIES_MAX: usize = 1 << 16;
/// Those of the driver that are told of.
const TOLD_MAX: usize = 64;
/// Wheel buckets of one base at most; a kernel has 576 (kernel/time/timer.c: `WHEEL_SIZE`).
const BUCKETS_MAX: u64 = 1024;
/// Timer bases of one CPU at most; a kernel has two or three (`NR_BASES`).
const BASES_MAX: u64 = 4;
/// Worker pools of one CPU: normal and high priority (`NR_STD_WORKER_POOLS`, kernel/workqueue.c). Those of bottom
/// halves, since commit 4cb1ef64609f ("workqueue: Implement BH workqueues", v6.9), are in another array.
const POOLS: u64 = 2;

/// What kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PendingKind {
    /// `struct timer_list` in a timer wheel.
    Timer,
    /// `struct delayed_work` whose timer is in a timer wheel.
    DelayedWork,
    /// `struct work_struct` in the queue of a CPU's worker pool.
    Work,
}

/// A call that is pending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pending {
    /// What it is.
    pub kind: PendingKind,
    /// Guest-virtual address of its structure.
    pub at: GuestVirt,
    /// The driver's function.
    pub function: String,
    /// Jiffies until it expires, less than 0 when it should have; `None` for queued work.
    pub expires_in: Option<i64>,
    /// The kernel's number of the CPU that it is queued on.
    pub cpu: usize,
}

/// What is pending of this module.
pub(super) fn of(kernel: &Kernel<'_>, module: Option<&str>) -> Section<Vec<Pending>> {
    let found = module.and_then(|name| kernel.image.modules.iter().find(|it| it.name == name));
    let Some(module) = found else {
        return Section::Unknown("no driver is at fault".to_owned());
    };
    let mut search = Search { kernel, module, left: ENTRIES_MAX, found: Vec::new() };
    if let Err(error) = search.timers().and_then(|()| search.work()) {
        return Section::unknown(&error);
    }
    Section::Known(search.found)
}

struct Search<'a> {
    kernel: &'a Kernel<'a>,
    module: &'a Module,
    left: usize,
    found: Vec<Pending>,
}

impl Search<'_> {
    fn timers(&mut self) -> Result<(), Error> {
        const BASE: &str = "timer_base";
        let kernel = self.kernel;
        let missing = Error::MissingMember { structure: BASE, path: "vectors" };
        let size = kernel.image.types.size_of(BASE).filter(|size| *size > 0).ok_or(missing)?;
        let vectors = kernel.member(BASE, "vectors")?;
        let entry = kernel.offset("timer_list", "entry")?;
        let symbol = kernel.image.kernel.symbol("timer_bases");
        let symbol = symbol.ok_or(Error::MissingSymbol("timer_bases"))?;
        let bases = (symbol.size / size).clamp(1, BASES_MAX);
        for cpu in 0..kernel.image.placement.per_cpu.len() {
            let Some(first) = kernel.image.per_cpu("timer_bases", cpu) else { continue };
            for base in (0..bases).map(|base| first.wrapping_add(base * size)) {
                let clock = kernel.number(base, BASE, "clk").ok();
                for bucket in 0..(vectors.size / 8).min(BUCKETS_MAX) {
                    let bucket = base.wrapping_add(vectors.offset).wrapping_add(bucket * 8);
                    for node in self.list(bucket, None) {
                        self.timer(GuestVirt(node.0.wrapping_sub(entry)), cpu, clock);
                    }
                }
            }
        }
        Ok(())
    }

    /// Nodes of a list: of a `hlist` up to NULL, of a ring up to its head. What can't be read ends it.
    fn list(&mut self, first: GuestVirt, head: Option<GuestVirt>) -> Vec<GuestVirt> {
        let next = |at: GuestVirt| self.kernel.pointer_at(at, "pending calls").ok();
        let (mut nodes, mut met) = (Vec::new(), HashSet::new());
        let mut node = next(first);
        while let Some(at) = node.filter(|at| at.is_kernel_half() && Some(*at) != head) {
            if self.left == 0 || !met.insert(at) {
                break;
            }
            self.left -= 1;
            nodes.push(at);
            node = next(at);
        }
        nodes
    }

    fn timer(&mut self, at: GuestVirt, cpu: usize, clock: Option<u64>) {
        let kernel = self.kernel;
        let Ok(called) = kernel.pointer(at, "timer_list", "function") else { return };
        let expires = kernel.number(at, "timer_list", "expires").ok().zip(clock);
        let expires_in = expires.map(|(expires, clock)| expires.wrapping_sub(clock).cast_signed());
        if Some(called) == kernel.image.address_of("delayed_work_timer_fn") {
            let Ok(timer) = kernel.offset("delayed_work", "timer") else { return };
            let work = GuestVirt(at.0.wrapping_sub(timer));
            let called = kernel.pointer(work, "delayed_work", "work.func");
            let Ok(called) = called else { return };
            self.push(PendingKind::DelayedWork, work, called, expires_in, cpu);
        } else {
            self.push(PendingKind::Timer, at, called, expires_in, cpu);
        }
    }

    fn push(
        &mut self,
        kind: PendingKind,
        at: GuestVirt,
        called: GuestVirt,
        expires_in: Option<i64>,
        cpu: usize,
    ) {
        if !self.module.is_text(called) || self.found.len() >= TOLD_MAX {
            return;
        }
        let found = self.kernel.image.locate(called).filter(|found| found.offset == 0);
        let function =
            found.map_or_else(|| format!("{called:#x}"), |it| base_name(it.symbol.name).to_owned());
        self.found.push(Pending { kind, at, function, expires_in, cpu });
    }

    /// Work queued to the workers of each CPU. Queues that belong to no CPU are not looked at.
    fn work(&mut self) -> Result<(), Error> {
        const POOL: &str = "worker_pool";
        let kernel = self.kernel;
        let missing = Error::MissingMember { structure: POOL, path: "worklist" };
        let size = kernel.image.types.size_of(POOL).ok_or(missing)?;
        let list = kernel.offset(POOL, "worklist")?;
        let entry = kernel.offset("work_struct", "entry")?;
        for cpu in 0..kernel.image.placement.per_cpu.len() {
            let Some(first) = kernel.image.per_cpu("cpu_worker_pools", cpu) else { continue };
            for pool in 0..POOLS {
                let head = first.wrapping_add(pool * size).wrapping_add(list);
                for node in self.list(head, Some(head)) {
                    let at = GuestVirt(node.0.wrapping_sub(entry));
                    if let Ok(called) = kernel.pointer(at, "work_struct", "func") {
                        self.push(PendingKind::Work, at, called, None, cpu);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest, MODULE};

    const BASE: u64 = DATA + 0x5000;

    fn guest() -> Guest {
        let mut guest = Guest::new()
            .cpu(BASE)
            .object("timer_bases", 0x100)
            .object("cpu_worker_pools", 0x400)
            .function("tick", MODULE + 0x40, 0x20)
            .types(|types| {
                types
                    .with("timer_base", "clk", 0, 8)
                    .with("timer_base", "vectors", 8, 16)
                    .sized("timer_base", 24)
                    .with("timer_list", "entry", 0, 16)
                    .with("timer_list", "expires", 16, 8)
                    .with("timer_list", "function", 24, 8)
                    .with("worker_pool", "worklist", 8, 16)
                    .sized("worker_pool", 32)
                    .with("work_struct", "entry", 8, 16)
                    .with("work_struct", "func", 24, 8)
            });
        let (timer, work) = (DATA + 0x800, DATA + 0x900);
        guest.poke_u64(BASE + 0x100, 1000);
        guest.poke_u64(BASE + 0x110, timer);
        guest.poke_u64(timer + 16, 990);
        guest.poke_u64(timer + 24, MODULE + 0x40);
        let head = BASE + 0x408;
        guest.poke_u64(head, work + 8);
        guest.poke_u64(work + 8, head);
        guest.poke_u64(work + 24, MODULE + 0x40);
        guest.poke_u64(head + 32, head + 32);
        guest
    }

    fn look(guest: &mut Guest) -> Vec<Pending> {
        let image = guest.image();
        let space = guest.machine.space();
        of(&Kernel::of_memory(&image, &space), Some("m")).known().cloned().unwrap()
    }

    #[test]
    fn a_timer_and_work_of_the_driver() {
        let found = look(&mut guest());
        let found: Vec<_> =
            found.iter().map(|it| (it.kind, it.function.as_str(), it.expires_in)).collect();
        assert_eq!(
            found,
            [(PendingKind::Timer, "tick", Some(-10)), (PendingKind::Work, "tick", None)]
        );
    }

    #[test]
    fn circles_end_and_nobody_at_fault_is_said() {
        let mut guest = guest();
        guest.poke_u64(DATA + 0x800, DATA + 0x800);
        assert_eq!(look(&mut guest).len(), 2);
        let image = guest.image();
        let space = guest.machine.space();
        let found = of(&Kernel::of_memory(&image, &space), None);
        assert!(matches!(found, Section::Unknown(_)));
    }
}
