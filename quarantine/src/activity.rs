//! What would still call into a quarantined driver: its interrupts and pending timers, found in the
//! kernel's own structures, and the calls that switch them off. With its entry points failing
//! cleanly none of this is needed for safety, so what can't be found is a note, never a refusal.

use std::collections::HashSet;

use guest::GuestVirt;
use repair_image::Module;

use crate::action::Action;
use crate::guest_struct::Structures;
use crate::plan::Steps;

/// Tree nodes that are visited at most.
const NODES_MAX: usize = 4096;
/// Timers of one guest that are looked at at most.
const TIMERS_MAX: usize = 1 << 16;
/// Wheel buckets of one base at most; a kernel has 576 (kernel/time/timer.c: `WHEEL_SIZE`).
const BUCKETS_MAX: u64 = 1024;
/// Timer bases of one CPU at most; a kernel has two or three (`NR_BASES`).
const BASES_MAX: u64 = 4;
/// Handlers of one interrupt line at most.
const HANDLERS_MAX: usize = 64;
/// Interrupt numbers at or above this are not believed.
const INTERRUPTS_MAX: u64 = 1 << 16;
/// Calls that one plan makes for this at most.
const CALLS_MAX: usize = 32;
/// Timers that are deleted at most: this many interrupts can still be switched off besides.
const TIMER_CALLS_MAX: usize = 16;

/// The calls that stop a driver's interrupts and timers.
pub(crate) fn stop(structures: &Structures<'_>, module: &Module, notes: &mut Steps) -> Vec<Action> {
    let mut calls = interrupts(structures, module, &mut notes.notes);
    calls.truncate(CALLS_MAX - TIMER_CALLS_MAX);
    calls.extend(timers(structures, module, &mut notes.notes));
    calls
}

fn call(structures: &Structures<'_>, names: &[&str], argument: u64, why: String) -> Option<Action> {
    let (function, at) =
        names.iter().find_map(|name| Some((*name, structures.image.address_of(name)?)))?;
    Some(Action::CallGuest {
        function: function.to_owned(),
        at,
        arguments: vec![argument],
        expected: Vec::new(),
        why,
    })
}

fn interrupts(
    structures: &Structures<'_>,
    module: &Module,
    notes: &mut Vec<String>,
) -> Vec<Action> {
    let descriptors = descriptors(structures);
    if descriptors.is_empty() {
        notes.push("the kernel's interrupt descriptors were not found".to_owned());
    }
    let mut calls = Vec::new();
    for descriptor in descriptors {
        let Some(line) = Line::read(structures, module, descriptor) else { continue };
        let number = line.number;
        if line.shared {
            notes.push(format!("interrupt {number} is shared with other drivers and stays on"));
        } else if line.slow {
            notes.push(format!("interrupt {number} is behind a slow bus and stays on"));
        } else {
            let why = format!("interrupt {number} is only the driver's");
            calls.extend(call(structures, &["disable_irq_nosync"], number, why));
        }
    }
    calls
}

/// An interrupt line that the driver serves.
struct Line {
    number: u64,
    /// Others serve it too.
    shared: bool,
    /// Switching it off may sleep (`irq_chip.irq_bus_lock`).
    slow: bool,
}

impl Line {
    fn read(structures: &Structures<'_>, module: &Module, at: GuestVirt) -> Option<Self> {
        let word = |at, structure, path| structures.need(at, structure, path).ok();
        let number = word(at, "irq_desc", "irq_data.irq").filter(|irq| *irq < INTERRUPTS_MAX)?;
        let mut action = GuestVirt(word(at, "irq_desc", "action")?);
        let (mut own, mut others) = (false, false);
        for _ in 0..HANDLERS_MAX {
            if !action.is_kernel_half() {
                break;
            }
            let mine = ["handler", "thread_fn"].into_iter().any(|path| {
                word(action, "irqaction", path).is_some_and(|at| module.is_text(GuestVirt(at)))
            });
            own |= mine;
            others |= !mine;
            action = GuestVirt(word(action, "irqaction", "next")?);
        }
        let chip = GuestVirt(word(at, "irq_desc", "irq_data.chip")?);
        let slow = chip.is_kernel_half() && word(chip, "irq_chip", "irq_bus_lock")? != 0;
        own.then_some(Self { number, shared: others, slow })
    }
}

/// Candidates for `struct irq_desc`; the caller checks each.
fn descriptors(structures: &Structures<'_>) -> Vec<GuestVirt> {
    let image = structures.image;
    // Since commit 721255b9826b ("genirq: Use a maple tree for interrupt descriptor management",
    // v6.5) in a maple tree; before in a radix tree, which is an xarray.
    if let Some(tree) = image.address_of("sparse_irqs") {
        let root = structures.number(tree, "maple_tree", "ma_root").ok().flatten();
        return Tree::new(structures).maple(root.unwrap_or(0));
    }
    let tree = image.address_of("irq_desc_tree");
    let root = tree.and_then(|tree| structures.number(tree, "xarray", "xa_head").ok().flatten());
    Tree::new(structures).xarray(root.unwrap_or(0))
}

/// Collects the pointers in the leaves of a tree, without regard to their indices.
struct Tree<'a> {
    structures: &'a Structures<'a>,
    seen: HashSet<u64>,
    leaves: Vec<GuestVirt>,
}

/// `xa_is_internal()`, include/linux/xarray.h: the low bits of an entry that is a node are 2. Maple
/// trees mark their root alike.
fn is_node(entry: u64) -> bool {
    entry & 3 == 2 && entry > 4096
}

impl<'a> Tree<'a> {
    fn new(structures: &'a Structures<'a>) -> Self {
        Self { structures, seen: HashSet::new(), leaves: Vec::new() }
    }

    fn leaf(&mut self, entry: u64) {
        if GuestVirt(entry).is_kernel_half() && entry & 7 == 0 {
            self.leaves.push(GuestVirt(entry));
        }
    }

    fn slots(&self, node: u64, structure: &str, path: &str) -> Vec<u64> {
        let Some(member) = self.structures.image.types.member(structure, path) else {
            return Vec::new();
        };
        let count = (member.size / 8).min(64);
        let at = GuestVirt(node) + member.offset;
        (0..count).filter_map(|slot| self.structures.memory.read_u64(at + slot * 8).ok()).collect()
    }

    fn xarray(mut self, root: u64) -> Vec<GuestVirt> {
        let mut work = vec![root];
        while let Some(entry) = work.pop() {
            if !is_node(entry) {
                self.leaf(entry);
            } else if self.seen.len() < NODES_MAX && self.seen.insert(entry) {
                work.extend(self.slots(entry - 2, "xa_node", "slots"));
            }
        }
        self.leaves
    }

    /// Node pointers of a maple tree carry their type in bits 3 to 6 and lie at multiples of 256
    /// (include/linux/maple_tree.h).
    fn maple(mut self, root: u64) -> Vec<GuestVirt> {
        if !is_node(root) {
            self.leaf(root);
            return self.leaves;
        }
        let types = &self.structures.image.types;
        let wide = types.enumerator("maple_arange_64");
        let leaf = types.enumerator("maple_leaf_64");
        let mut work = vec![root];
        while let Some(entry) = work.pop() {
            if self.seen.len() >= NODES_MAX || !self.seen.insert(entry) {
                continue;
            }
            let kind = (entry >> 3 & 0xf) as i64;
            let structure = if Some(kind) == wide { "maple_arange_64" } else { "maple_range_64" };
            let slots = self.slots(entry & !0xff, structure, "slot");
            if Some(kind) == leaf {
                slots.into_iter().for_each(|slot| self.leaf(slot));
            } else {
                work.extend(slots.into_iter().filter(|slot| GuestVirt(*slot).is_kernel_half()));
            }
        }
        self.leaves
    }
}

fn timers(structures: &Structures<'_>, module: &Module, notes: &mut Vec<String>) -> Vec<Action> {
    let Some(found) = pending_timers(structures, module) else {
        notes.push("pending timers of the driver were not looked for".to_owned());
        return Vec::new();
    };
    if found.len() > TIMER_CALLS_MAX {
        notes.push(format!("{} timers of the driver will fire once more", found.len()));
    }
    found
        .into_iter()
        .take(TIMER_CALLS_MAX)
        .filter_map(|timer| {
            // Renamed by commit bb663f0f3c39 ("timers: Rename del_timer() to timer_delete()", v6.2;
            // also in the 6.1 stable series).
            let names = ["timer_delete", "del_timer"];
            call(structures, &names, timer.0, "a pending timer of the driver".to_owned())
        })
        .collect()
}

/// Timers in the wheels of all CPUs whose function is the driver's; `None` when this kernel's wheel
/// is not understood.
fn pending_timers(structures: &Structures<'_>, module: &Module) -> Option<Vec<GuestVirt>> {
    let image = structures.image;
    let size = image.types.size_of("timer_base").filter(|size| *size > 0)?;
    let vectors = image.types.member("timer_base", "vectors")?;
    let entry = image.types.member("timer_list", "entry")?.offset;
    let function = image.types.member("timer_list", "function")?.offset;
    let bases = (image.kernel.symbol("timer_bases")?.size / size).clamp(1, BASES_MAX);
    let mut found = Vec::new();
    let mut left = TIMERS_MAX;
    for cpu in 0..image.placement.per_cpu.len() {
        let first = image.per_cpu("timer_bases", cpu)?;
        for bucket in (0..bases).flat_map(|base| {
            (0..(vectors.size / 8).min(BUCKETS_MAX))
                .map(move |bucket| first + base * size + vectors.offset + bucket * 8)
        }) {
            let mut node = structures.memory.read_u64(bucket).unwrap_or(0);
            while GuestVirt(node).is_kernel_half() && left > 0 {
                left -= 1;
                let timer = GuestVirt(node.wrapping_sub(entry));
                let called = structures.memory.read_u64(timer + function).unwrap_or(0);
                if module.is_text(GuestVirt(called)) && !found.contains(&timer) {
                    found.push(timer);
                }
                node = structures.memory.read_u64(GuestVirt(node)).unwrap_or(0);
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MODULE_TEXT, Scene};

    fn stopped(scene: &Scene) -> (Vec<(String, u64)>, Vec<String>) {
        let space = scene.machine.space();
        let structures = Structures { image: &scene.image, memory: &space };
        let mut steps = Steps::default();
        let calls = stop(&structures, &scene.image.modules[0], &mut steps)
            .into_iter()
            .map(|action| match action {
                Action::CallGuest { function, arguments, .. } => (function, arguments[0]),
                other => panic!("{other}"),
            })
            .collect();
        (calls, steps.notes)
    }

    #[test]
    fn a_pending_timer_and_an_own_interrupt_are_stopped() {
        let mut scene = Scene::new();
        let timer = scene.add_timer(MODULE_TEXT + 0xc0);
        scene.add_timer(crate::testing::TEXT);
        scene.add_interrupt(24, &[MODULE_TEXT]);
        scene.add_interrupt(25, &[crate::testing::TEXT]);
        scene.add_interrupt(26, &[MODULE_TEXT, crate::testing::TEXT]);
        let (mut calls, notes) = stopped(&scene);
        calls.sort();
        assert_eq!(
            calls,
            [("disable_irq_nosync".to_owned(), 24), ("timer_delete".to_owned(), timer.0),]
        );
        assert_eq!(notes, ["interrupt 26 is shared with other drivers and stays on"]);
    }

    #[test]
    fn a_cycle_of_timers_ends() {
        let mut scene = Scene::new();
        let timer = scene.add_timer(MODULE_TEXT + 0xc0);
        scene.poke_word(timer + 8, (timer + 8).0);
        assert_eq!(stopped(&scene).0, [("timer_delete".to_owned(), timer.0)]);
    }
}
