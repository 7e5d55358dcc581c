//! Which pages matter: stacks, tasks, modules, the log, per-CPU areas, the kernel's data, what frames and
//! registers point to, and what all these point to, as far as the limit goes. Everything here may be a lie
//! of the guest: it costs pages of the limit, never more.

use std::collections::HashMap;
use std::ops::Range;

use guest::{AddressSpace, GuestPhys, GuestVirt, PhysMemory, Reg, Registers, VirtMemory};
use repair_image::RepairImage;

use super::store::{PAGE, Recorder};
use crate::kernel::Kernel;
use crate::{Diagnosis, context, tasks};

/// Bytes of one thing that a lying length can make us take at most.
const THING_MAX: u64 = 4 << 20;
/// The kernel's static data is larger than anything else: some 10 MiB, most of it zero.
const STATIC_MAX: u64 = 64 << 20;
/// Stacks that are taken at most.
const TASKS_MAX: usize = 4096;
/// Code addresses on stacks whose unwind rows are taken at most.
const ROWS_MAX: usize = 1 << 16;
/// Bytes of text that one entry of `orc_lookup` covers (arch/x86/include/asm/orc_lookup.h, since v4.14).
const ORC_BLOCK: u64 = 256;
/// Page tables that are taken at most: 4 MiB.
const TABLES_MAX: usize = 1024;
/// `NR_SECTION_ROOTS` with 46 bits of physical address, 128 MiB a section, 256 sections a page.
const SECTION_ROOTS: u64 = 2048;
/// Slab caches at most; kernels have some 200.
const CACHES_MAX: usize = 4096;
/// NUMA nodes at most (`CONFIG_NODES_SHIFT` is 10 at most).
const NODES_MAX: u64 = 1024;
/// Entries of the tree of process ids at most, empty ones counted.
const PIDS_MAX: usize = 1 << 16;
/// Regions of 2 MiB whose translation is remembered at most.
const REGIONS_MAX: usize = 1 << 14;
/// Functions whose code `crash` looks at when it opens a dump, before it does anything else: how the kernel
/// was compiled, and what its interrupt entry and context switch look like (its x86_64.c). Names differ
/// between kernels. The last one is what we look at ourselves: whether spinlocks count in the preempt count.
const DISASSEMBLED: [&str; 13] = [
    "sys_fork",
    "__x64_sys_fork",
    "sys_open",
    "__x64_sys_open",
    "sys_read",
    "__x64_sys_read",
    "do_futex",
    "common_interrupt",
    "asm_common_interrupt",
    "__schedule",
    "schedule",
    "thread_return",
    "_raw_spin_lock",
];
const LARGE_PAGE: u64 = 2 << 20;

/// Selecting pages of one guest.
pub(super) struct Selector<'a> {
    pub(super) image: &'a RepairImage,
    pub(super) recorder: &'a Recorder<'a>,
    space: AddressSpace<'a>,
    /// The kernel image: guest-virtual, and where it starts guest-physical.
    pub(super) kernel_image: Option<(Range<GuestVirt>, GuestPhys)>,
    /// What could not be had, in words.
    pub(super) gaps: Vec<String>,
}

impl<'a> Selector<'a> {
    pub(super) fn new(image: &'a RepairImage, recorder: &'a Recorder<'a>) -> Self {
        let placement = &image.placement;
        let space = AddressSpace::new(recorder, placement.root, placement.five_level);
        let kernel_image = image.address_of("_text").zip(image.address_of("_end"));
        let kernel_image = kernel_image.filter(|(start, end)| start < end);
        let kernel_image =
            kernel_image.and_then(|(start, end)| Some((start..end, space.translate(start).ok()?)));
        Self { image, recorder, space, kernel_image, gaps: Vec::new() }
    }

    fn kernel(&self) -> Kernel<'_> {
        Kernel::of_memory(self.image, &self.space)
    }

    pub(super) fn space(&self) -> &AddressSpace<'a> {
        &self.space
    }

    /// Takes the pages of a guest-virtual range and the page tables that lead to them; at most `max` bytes.
    pub(super) fn range(&self, range: &Range<GuestVirt>, max: u64) {
        let start = range.start.align_down(PAGE);
        let size = range.end.0.saturating_sub(start.0).min(max);
        for page in 0..size.div_ceil(PAGE) {
            if self.recorder.store().is_full() {
                return;
            }
            let at = start.wrapping_add(page * PAGE);
            if let Ok(phys) = self.space.translate(at) {
                self.recorder.add(phys);
            }
        }
    }

    fn thing(&self, at: GuestVirt, size: u64) {
        self.range(&(at..at.wrapping_add(size)), THING_MAX);
    }

    fn symbol(&self, name: &str) -> Option<GuestVirt> {
        self.image.address_of(name)
    }

    fn between(&self, from: &str, to: &str) {
        if let (Some(from), Some(to)) = (self.symbol(from), self.symbol(to)) {
            self.range(&(from..to), STATIC_MAX);
        }
    }

    // What a repair changes: taken while the guest stands.

    /// The pages of one vCPU: its current task and stacks, its hot per-CPU state.
    pub(super) fn vcpu(&self, registers: &Registers) {
        let kernel = self.kernel();
        let base = registers.get(Reg::GsBase);
        let cpu = base.and_then(|base| self.image.cpu_of_gs_base(base));
        if let Some(cpu) = cpu {
            for name in ["pcpu_hot", "__preempt_count", "current_task", "cpu_tss_rw", "runqueues"] {
                self.image.per_cpu(name, cpu).into_iter().for_each(|at| self.thing(at, PAGE));
            }
            if let Some(task) = context::current(&kernel, cpu) {
                self.task(task);
            }
        }
        if let Some(rsp) = registers.rsp().filter(|rsp| rsp.is_kernel_half()) {
            self.thing(rsp, 2 * PAGE);
        }
    }

    /// What the diagnosis speaks of: frames, their registers, locks.
    pub(super) fn diagnosis(&self, diagnosis: &Diagnosis) {
        for frame in &diagnosis.frames {
            self.thing(frame.pc.ip().align_down(PAGE), 1);
            let start = frame.function_start.filter(|&start| frame.pc.ip() - start < THING_MAX);
            start.into_iter().for_each(|start| self.range(&(start..frame.pc.ip()), 4 * PAGE));
            frame.saved_at.into_iter().for_each(|at| self.thing(at, PAGE));
            frame.cfa.into_iter().for_each(|at| self.thing(at.offset(-8), 8));
            let values = frame.registers.iter().map(|(_, value)| GuestVirt(value));
            values.filter(|at| at.is_kernel_half()).for_each(|at| self.thing(at, 64));
        }
        let effects = diagnosis.all_effects.iter();
        let effects = effects.chain(diagnosis.boundary.iter().map(|boundary| &boundary.effects));
        for lock in effects.flat_map(|effects| &effects.held).filter_map(|held| held.lock) {
            self.thing(lock, 64);
        }
    }

    /// A task and its stack.
    pub(super) fn task(&self, task: GuestVirt) {
        let size = self.image.types.size_of("task_struct").unwrap_or(2 * PAGE);
        self.thing(task, size);
        let stack = context::stack_of(&self.kernel(), task);
        stack.into_iter().for_each(|stack| self.range(&stack, THING_MAX));
    }

    // The bulk: may be taken while the guest runs.

    /// Everything else that a dump tool needs, most needed first.
    pub(super) fn bulk(&mut self) {
        self.tasks();
        self.modules();
        let near = 0..self.recorder.store().len();
        self.tables();
        self.slab_caches();
        self.static_data();
        self.log();
        self.unwind_rows();
        self.constants();
        self.closure(near);
        if self.recorder.store().is_full() {
            self.gaps.push("the limit was reached: structures further away are missing".to_owned());
        }
    }

    /// The kernel's constants, without the large tables that vmlinux holds, too: symbol names and BTF.
    fn constants(&self) {
        let symbols = ["__start_rodata", "__end_rodata"].map(|name| self.symbol(name));
        let [Some(start), Some(end)] = symbols else { return };
        const NAMES: [&str; 6] =
            ["names", "markers", "token_table", "token_index", "offsets", "num_syms"];
        let names = NAMES.map(|name| self.symbol(&format!("kallsyms_{name}")));
        let names = names.into_iter().flatten();
        let names = names.clone().min().zip(names.max());
        let skipped = [names, self.symbol("__start_BTF").zip(self.symbol("__stop_BTF"))];
        let mut from = start;
        for (first, last) in skipped.into_iter().flatten().filter(|(first, _)| *first >= start) {
            self.range(&(from..first.min(end)), STATIC_MAX);
            from = last.max(from);
        }
        self.range(&(from..end), STATIC_MAX);
    }

    /// The kernel's variables. Text is in vmlinux.
    fn static_data(&mut self) {
        for name in ["linux_banner", "sys_call_table", "idt_table"] {
            self.symbol(name).into_iter().for_each(|at| self.thing(at, PAGE));
        }
        for name in DISASSEMBLED {
            self.symbol(name).into_iter().for_each(|at| self.thing(at, 2 * PAGE));
        }
        self.process_ids();
        self.nodes();
        self.memory_sections();
        self.between("_sdata", "_edata");
        self.between("__start_ro_after_init", "__end_ro_after_init");
        self.between("__bss_start", "__bss_stop");
        if self.symbol("_sdata").is_none() {
            self.gaps.push("the kernel's data is not known by symbol".to_owned());
        }
        let size = self
            .image
            .per_cpu_offset("__per_cpu_end")
            .zip(self.image.per_cpu_offset("__per_cpu_start"))
            .map_or(0, |(end, start)| end.wrapping_sub(start));
        for cpu in 0..self.image.placement.per_cpu.len().min(TASKS_MAX) {
            let start = self.image.per_cpu("__per_cpu_start", cpu);
            start.into_iter().for_each(|start| self.thing(start, size));
        }
    }

    /// The kernel's page tables. Others of the last level come with the pages that they map.
    fn tables(&self) {
        const PRESENT_AND_LARGE: u64 = 0x81;
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let levels = if self.space.five_level() { 4 } else { 3 };
        let mut tables = vec![(self.space.root(), levels)];
        let (mut next, mut taken) = (0, 0);
        while let Some(&(table, level)) = tables.get(next) {
            next += 1;
            // User addresses are the lower half of the top table.
            let entries = if next == 1 { 256..512 } else { 0..512 };
            for entry in entries {
                let entry = self.recorder.read_u64(table + entry * 8).unwrap_or(0);
                if entry & PRESENT_AND_LARGE != 1 || taken >= TABLES_MAX {
                    continue;
                }
                let below = GuestPhys(entry & ADDRESS);
                self.recorder.add(below);
                taken += 1;
                if level > 1 {
                    tables.push((below, level - 1));
                }
            }
        }
    }

    fn tasks(&mut self) {
        match tasks::all(self.image, &self.space) {
            Ok(all) => {
                if all.len() > TASKS_MAX {
                    self.gaps.push(format!("stacks of {} tasks", all.len() - TASKS_MAX));
                }
                all.iter().take(TASKS_MAX).for_each(|position| self.task(position.task));
            }
            Err(error) => self.gaps.push(format!("tasks: {error}")),
        }
    }

    fn modules(&self) {
        let size = self.image.types.size_of("module").unwrap_or(PAGE);
        for module in &self.image.modules {
            self.thing(module.at, size);
            module.ranges.iter().for_each(|range| self.range(range, THING_MAX));
        }
    }

    /// The descriptions of the NUMA nodes.
    fn nodes(&self) {
        let size = self.image.types.size_of("pglist_data").unwrap_or(PAGE);
        let Some(table) = self.symbol("node_data") else { return };
        for node in 0..NODES_MAX {
            match self.space.read_u64(table + node * 8) {
                Ok(at) if GuestVirt(at).is_kernel_half() => self.thing(GuestVirt(at), size),
                _ => return,
            }
        }
    }

    /// The tree of process ids, from which drgn and `crash` find tasks: an IDR since commit 95846ecf9dac
    /// ("pid: replace pid bitmap implementation with IDR API", v4.15).
    fn process_ids(&self) {
        const INTERNAL: u64 = 2;
        let member = |structure, path| self.image.types.member(structure, path);
        let (Some(head), Some(slots)) =
            (member("pid_namespace", "idr.idr_rt.xa_head"), member("xa_node", "slots"))
        else {
            return;
        };
        let size = self.image.types.size_of("pid").unwrap_or(PAGE).min(PAGE);
        let Some(root) = self.symbol("init_pid_ns").map(|at| at + head.offset) else { return };
        let mut entries: Vec<u64> = self.space.read_u64(root).into_iter().collect();
        let mut next = 0;
        while let Some(&entry) = entries.get(next) {
            next += 1;
            let at = GuestVirt(entry & !3);
            if !at.is_kernel_half() {
                continue;
            }
            if entry & 3 != INTERNAL {
                self.thing(at, size);
                continue;
            }
            self.thing(at, slots.offset.saturating_add(slots.size));
            for slot in 0..slots.size.min(PAGE) / 8 {
                if entries.len() < PIDS_MAX {
                    entries.extend(self.space.read_u64(at + slots.offset + slot * 8).ok());
                }
            }
        }
    }

    /// The list of slab caches, which `crash` reads when it opens a dump.
    fn slab_caches(&self) {
        let kernel = self.kernel();
        let size = self.image.types.size_of("kmem_cache").unwrap_or(PAGE).min(PAGE);
        let Ok(offset) = kernel.offset("kmem_cache", "list") else { return };
        let Some(head) = self.symbol("slab_caches") else { return };
        let mut node = head;
        for _ in 0..CACHES_MAX {
            node = match kernel.pointer_at(node, "slab_caches") {
                Ok(next) if next != head && next.is_kernel_half() => next,
                _ => return,
            };
            self.thing(GuestVirt(node.0.wrapping_sub(offset)), size);
        }
    }

    /// The table of memory sections, from which `crash` finds every `struct page` (SPARSEMEM_EXTREME, all
    /// distributions' choice: a variable that points to a table of pointers).
    fn memory_sections(&self) {
        let table = self.symbol("mem_section").and_then(|at| self.space.read_u64(at).ok());
        let Some(table) = table.map(GuestVirt).filter(|table| table.is_kernel_half()) else {
            return;
        };
        for root in 0..SECTION_ROOTS {
            match self.space.read_u64(table + root * 8) {
                Ok(0) => {}
                Ok(at) => self.thing(GuestVirt(at), PAGE),
                Err(_) => return,
            }
        }
    }

    /// The kernel log: its buffer, and the descriptors of its records, wherever they were allocated.
    fn log(&mut self) {
        let kernel = self.kernel();
        let pointer = |name| self.symbol(name).and_then(|at| kernel.pointer_at(at, name).ok());
        let size = self.symbol("log_buf_len").and_then(|at| self.space.read_u32(at).ok());
        if let (Some(buffer), Some(size)) = (pointer("log_buf"), size) {
            self.thing(buffer, u64::from(size));
        }
        let Some(ring) = pointer("prb") else {
            self.gaps.push("kernel log: no prb".to_owned());
            return;
        };
        // Since commit 896fbe20b4e2 ("printk: use the lockless ringbuffer", v5.10).
        const RING: &str = "printk_ringbuffer";
        let bits = kernel.number(ring, RING, "desc_ring.count_bits").unwrap_or(0);
        let count = 1_u64.checked_shl(bits as u32).unwrap_or(0);
        for (member, structure) in
            [("desc_ring.descs", "prb_desc"), ("desc_ring.infos", "printk_info")]
        {
            let size = self.image.types.size_of(structure).unwrap_or(0);
            if let Ok(at) = kernel.pointer(ring, RING, member) {
                self.thing(at, count.saturating_mul(size));
            }
        }
    }

    /// The kernel's own unwind rows for every code address on a stack: `crash` unwinds by these.
    fn unwind_rows(&self) {
        let symbols = ["__start_orc_unwind_ip", "__start_orc_unwind", "orc_lookup", "_stext"];
        let [Some(ips), Some(rows), Some(lookup), Some(text)] = symbols.map(|it| self.symbol(it))
        else {
            return;
        };
        let row = self.image.types.size_of("orc_entry").unwrap_or(0);
        let mut blocks: Vec<u64> = self
            .words(0..self.recorder.store().len())
            .filter(|at| self.image.placement.text.contains(at))
            .map(|at| (at - text) / ORC_BLOCK)
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        for block in blocks.into_iter().take(ROWS_MAX) {
            let Ok(first) = self.space.read_u32(lookup + block * 4) else { continue };
            let Ok(last) = self.space.read_u32(lookup + (block + 1) * 4) else { continue };
            let count = u64::from(last.saturating_sub(first)).min(ORC_BLOCK) + 1;
            self.thing(ips + u64::from(first) * 4, count * 4);
            self.thing(rows + u64::from(first) * row, count * row);
        }
    }

    /// Words of copied pages.
    fn words(&self, places: Range<usize>) -> impl Iterator<Item = GuestVirt> + '_ {
        places.flat_map(|place| {
            let store = self.recorder.store();
            let page = store.page(place).unwrap_or_default();
            let words = page.chunks_exact(8).filter_map(|word| word.try_into().ok());
            words.map(|word| GuestVirt(u64::from_le_bytes(word))).collect::<Vec<_>>()
        })
    }

    /// Pages that pages point to, nearest first, until the limit. What tasks and modules point to is wanted
    /// two steps far before anything that only the kernel's variables lead to.
    fn closure(&self, near: Range<usize>) {
        let mut targets = Targets { selector: self, regions: HashMap::new() };
        let mut from = near;
        for _ in 0..2 {
            let end = self.recorder.store().len();
            self.follow(&mut targets, from);
            from = end..self.recorder.store().len();
        }
        let mut from = 0;
        while from < self.recorder.store().len() && !self.recorder.store().is_full() {
            let end = self.recorder.store().len();
            self.follow(&mut targets, from..end);
            from = end;
        }
    }

    fn follow(&self, targets: &mut Targets<'_, '_>, places: Range<usize>) {
        for place in places {
            if self.recorder.store().is_full() {
                return;
            }
            let of_image = self.is_image_page(place);
            for at in self.words(place..place + 1) {
                // Nearly all constants of the kernel are pointed to by its data; vmlinux has them.
                if at.is_kernel_half() && !(of_image && self.is_image(at)) {
                    targets.take(at);
                }
            }
        }
    }

    fn is_image(&self, at: GuestVirt) -> bool {
        self.kernel_image.as_ref().is_some_and(|(virt, _)| virt.contains(&at))
    }

    fn is_image_page(&self, place: usize) -> bool {
        let at = self.recorder.store().page_at(place);
        let image = self.kernel_image.as_ref();
        at.zip(image)
            .is_some_and(|(at, (virt, start))| at >= *start && at - *start < virt.end - virt.start)
    }
}

/// Translates what may be a pointer, remembering what 2 MiB regions are.
struct Targets<'s, 'a> {
    selector: &'s Selector<'a>,
    regions: HashMap<u64, Region>,
}

#[derive(Clone, Copy)]
enum Region {
    /// One page, or part of a larger one, from here.
    Large(GuestPhys),
    /// Smaller pages under this table.
    Table(GuestPhys),
    /// Nothing.
    Empty,
}

impl Targets<'_, '_> {
    fn take(&mut self, at: GuestVirt) {
        let phys = match self.region(at) {
            Region::Large(start) => start + at.0 % LARGE_PAGE,
            Region::Table(table) => {
                const PRESENT: u64 = 1;
                const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
                let entry = self.selector.recorder.read_u64(table + (at.0 >> 12 & 511) * 8);
                let Some(entry) = entry.ok().filter(|entry| entry & PRESENT != 0) else { return };
                GuestPhys(entry & ADDRESS)
            }
            Region::Empty => return,
        };
        self.selector.recorder.add(phys);
    }

    fn region(&mut self, at: GuestVirt) -> Region {
        let key = at.0 / LARGE_PAGE;
        if let Some(&region) = self.regions.get(&key) {
            return region;
        }
        if self.regions.len() >= REGIONS_MAX {
            self.regions.clear();
        }
        let region = match self.selector.space.walk(at) {
            Ok(mapping) if mapping.page_size >= LARGE_PAGE => {
                Region::Large(mapping.phys.align_down(LARGE_PAGE))
            }
            Ok(mapping) => Region::Table(mapping.entry_at.align_down(PAGE)),
            // The table is there; another page under it may be.
            Err(guest::MemoryError::NotMapped { level: 1, .. }) => return Region::Empty,
            Err(_) => Region::Empty,
        };
        self.regions.insert(key, region);
        region
    }
}
