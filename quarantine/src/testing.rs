//! A small hand-made kernel in a fake machine, for the tests of this crate. What crashes there is in `diagnosis.rs`.
//! No test itself.

mod diagnosis;
pub(crate) mod double;
pub(crate) mod slabs;
mod types;

use std::sync::Arc;

use guest::fake::{FakeMachine, PageSize};
use guest::{GuestPhys, GuestVirt, LinkAddr, Reg, Registers};
use repair_image::{
    Knowledge, KnowledgeParts, Module, Placement, RepairImage, SymbolKind, TypeShape, Types,
};

pub(crate) use diagnosis::{context, effects, wild_diagnosis};
pub(crate) use types::{FakeTypes, int, prototype, tagged};

/// Addresses of the fake kernel; RAM is one to one behind them, see `Scene::new`.
pub(crate) const TEXT: GuestVirt = GuestVirt(0xffff_ffff_8100_0000);
pub(crate) const MODULE_TEXT: GuestVirt = GuestVirt(0xffff_ffff_c000_0000);
pub(crate) const MODULE_DATA: GuestVirt = GuestVirt(0xffff_ffff_c000_2000);
pub(crate) const DATA: GuestVirt = GuestVirt(0xffff_8880_0000_0000);
/// The lowest address of the crashed task's stack.
pub(crate) const STACK: GuestVirt = GuestVirt(0xffff_c900_0000_0000);
const STACK_SIZE: u64 = 0x4000;
/// What marks the end of each stack.
pub(crate) const STACK_MARK: u64 = 0x57ac_6e9d;
const MEMORY_MAP: GuestVirt = GuestVirt(DATA.0 + 0xe00);
const INIT_TASK: GuestVirt = GuestVirt(DATA.0 + 0xd00);
const PER_CPU: GuestVirt = GuestVirt(0xffff_8880_0000_1000);
/// Preempt count of the fake kernel's only CPU.
pub(crate) const PREEMPT_COUNT: GuestVirt = GuestVirt(PER_CPU.0 + 0x20);
/// RAM of the fake machine, bytes.
pub(crate) const RAM: u64 = 8 << 20;

/// Kernel functions of the fake kernel, 0x40 bytes each.
const FUNCTIONS: &[&str] = &[
    "vfs_write",
    "mutex_unlock",
    "up_write",
    "up_read",
    "_raw_spin_unlock",
    "__rcu_read_unlock",
    "irqentry_exit",
    "error_return",
    "do_group_exit",
    "rewind_stack_and_make_dead",
    "do_something",
    "call_timer_fn",
    "disable_irq_nosync",
    "timer_delete",
    "_raw_spin_lock",
    "_raw_spin_lock_irqsave",
    "signal_wake_up_state",
    "sched_tick",
    "wake_up_process",
    "netif_device_detach",
    "netif_carrier_off",
    "blk_mq_end_request",
    "blk_mq_start_stopped_hw_queues",
    "pci_clear_master",
];
/// Driver functions: name, and what they return (`None` = not known).
const DRIVER: [(&str, Option<&str>); 6] = [
    ("toy_write", Some("ssize_t")),
    ("toy_open", Some("int")),
    ("toy_release", Some("int")),
    ("toy_timer", Some("void")),
    ("toy_helper", None),
    ("cleanup_module", Some("void")),
];

/// The fake kernel, crashed.
pub(crate) struct Scene {
    pub(crate) machine: FakeMachine,
    pub(crate) image: RepairImage,
    types: FakeTypes,
    /// Where vfs_write continues.
    pub(crate) return_address: GuestVirt,
    /// Its stack pointer.
    pub(crate) boundary_rsp: GuestVirt,
    /// Where an exception saved registers.
    pub(crate) regs_at: GuestVirt,
    /// User-mode registers at the top of the stack.
    pub(crate) user_regs: GuestVirt,
    /// The current task.
    pub(crate) task: GuestVirt,
    timers: u64,
    lines: u64,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let mut machine = FakeMachine::new(RAM, false);
        let pages = |machine: &mut FakeMachine, virt: GuestVirt, phys: u64, count: u64| {
            for page in 0..count {
                let at = GuestPhys(phys + page * 4096);
                machine.map(virt + page * 4096, at, PageSize::Size4K);
            }
        };
        pages(&mut machine, TEXT, 0x10_0000, 4);
        pages(&mut machine, MODULE_TEXT, 0x11_0000, 4);
        pages(&mut machine, DATA, 0x12_0000, 4);
        pages(&mut machine, STACK, 0x13_0000, STACK_SIZE / 4096);
        let types = FakeTypes::linux().with_locks();
        let mut scene = Self {
            image: image(&machine, types.clone()),
            machine,
            types,
            return_address: TEXT + 0x20,
            boundary_rsp: STACK + 0x3800,
            regs_at: STACK + 0x3000,
            user_regs: (STACK + STACK_SIZE).offset(-168),
            task: DATA + 0x100,
            timers: 0,
            lines: 0,
        };
        scene.fill();
        scene
    }

    fn fill(&mut self) {
        let slot = self.boundary_rsp.offset(-8);
        self.poke_word(slot, self.return_address.0);
        self.poke_word(PER_CPU + 0x28, (STACK + STACK_SIZE).0);
        self.set_member("task_struct", "stack", self.task, STACK.0);
        self.set_member("task_struct", "mm", self.task, (DATA + 0x400).0);
        self.set_member("task_struct", "stack_vm_area", self.task, (DATA + 0x440).0);
        self.set_member("task_struct", "stack", INIT_TASK, (DATA + 0x500).0);
        self.poke_word(DATA + 0x500, STACK_MARK);
        for empty in [DATA + 0xca0, DATA + 0xcb0] {
            self.set_member("list_head", "next", empty, empty.0);
        }
        self.poke_word(STACK, STACK_MARK);
        self.set_member("rq", "curr", PER_CPU + 0x80, self.task.0);
        self.set_member("tlb_state", "loaded_mm", self.tlb_state(), (DATA + 0xc20).0);
        self.set_member("pt_regs", "cs", self.user_regs, 0x33);
        self.machine.poke_virt(PREEMPT_COUNT, &0x8000_0000_u32.to_le_bytes());
        for index in 0..DRIVER.len() as u64 {
            let nop_and_body = [0x0f, 0x1f, 0x44, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0xc3];
            self.machine.poke_virt(MODULE_TEXT + index * 0x40, &nop_and_body);
        }
        let module = self.image.modules[0].at;
        self.set_member("module", "exit", module, (MODULE_TEXT + 5 * 0x40).0);
        self.set_member("module", "refcnt", module, 1);
        let fops = MODULE_DATA + 0x100;
        self.set_member("file_operations", "owner", fops, module.0);
        self.set_member("file_operations", "write", fops, MODULE_TEXT.0);
        self.set_member("file_operations", "open", fops, (MODULE_TEXT + 0x40).0);
        self.set_member("file_operations", "release", fops, (MODULE_TEXT + 0x80).0);
        self.poke_word(MODULE_DATA + 0x300, (MODULE_TEXT + 0xc0).0);
        let mut registers = Registers::unknown().with(Reg::Rflags, 2);
        for (index, reg) in Reg::GENERAL.into_iter().enumerate() {
            registers.set(reg, 0x700 + index as u64);
        }
        registers.set(Reg::Rip, (TEXT + 0x1000).0);
        registers.set(Reg::Rsp, (STACK + 0x2000).0);
        *self.machine.registers_mut() = registers;
    }

    /// Writes a 64-bit word.
    pub(crate) fn poke_word(&mut self, at: GuestVirt, value: u64) {
        self.machine.poke_virt(at, &value.to_le_bytes());
    }

    pub(crate) fn set_member(&mut self, structure: &str, path: &str, at: GuestVirt, value: u64) {
        let member = self.types.member(structure, path).expect("member of the fake kernel");
        let bytes = value.to_le_bytes();
        let at = at + self.types.offset(structure, path);
        self.machine.poke_virt(at, &bytes[..member.size as usize]);
    }

    /// The kernel's map of memory: start, size, type.
    pub(crate) fn set_memory_map(&mut self, entries: &[(u64, u64, u64)]) {
        self.poke_word(DATA + 0xc18, MEMORY_MAP.0);
        self.set_memory_map_entries(u32::try_from(entries.len()).expect("small"));
        for (index, (start, size, kind)) in (0_u64..).zip(entries) {
            let entry = MEMORY_MAP + 4 + index * 20;
            self.set_member("e820_entry", "addr", entry, *start);
            self.set_member("e820_entry", "size", entry, *size);
            self.set_member("e820_entry", "type", entry, *kind);
        }
    }

    /// How many entries the map says that it has.
    pub(crate) fn set_memory_map_entries(&mut self, count: u32) {
        self.set_member("e820_table", "nr_entries", MEMORY_MAP, count.into());
    }

    /// A tree of three tasks that wait for the CPU: the root, and what is left and right of it.
    pub(crate) fn add_waiting_tasks(&mut self) -> [GuestVirt; 3] {
        let nodes = [DATA + 0x3800, DATA + 0x3840, DATA + 0x3880];
        let [root, left, right] = nodes;
        self.set_member("cfs_rq", "tasks_timeline.rb_root.rb_node", PER_CPU + 0xa0, root.0);
        self.set_member("rb_node", "__rb_parent_color", root, 1);
        for (child, link) in [(left, "rb_left"), (right, "rb_right")] {
            self.set_member("rb_node", link, root, child.0);
            self.set_member("rb_node", "__rb_parent_color", child, root.0);
        }
        nodes
    }

    /// Page tables of the loaded process, and the kernel's own.
    pub(crate) fn add_page_tables(&mut self) -> [GuestVirt; 2] {
        let (own, whole, process) = (DATA + 0x2000, DATA + 0x3000, DATA + 0xc30);
        self.set_member("mm_struct", "pgd", process, own.0);
        self.set_member("mm_struct", "pgd", DATA + 0xc20, whole.0);
        self.set_member("tlb_state", "loaded_mm", self.tlb_state(), process.0);
        [own, whole]
    }

    /// A file whose operations lie there, as the third and last that the current process has open.
    pub(crate) fn add_file(&mut self, operations: GuestVirt) {
        let (files, table, descriptors, file) =
            (DATA + 0x3a00, DATA + 0x3a20, DATA + 0x3a40, DATA + 0x3a80);
        self.set_member("task_struct", "files", self.task, files.0);
        self.set_member("files_struct", "fdt", files, table.0);
        self.set_member("fdtable", "max_fds", table, 3);
        self.set_member("fdtable", "fd", table, descriptors.0);
        self.poke_word(descriptors + 16, file.0);
        self.set_member("file", "f_op", file, operations.0);
    }

    /// A node with one zone, which is returned, and what has been written back and what is being.
    pub(crate) fn add_zone(&mut self, written: u64, under_way: u64) -> GuestVirt {
        self.poke_word(DATA + 0xc90, self.node().0);
        self.set_member("pglist_data", "nr_zones", self.node(), 1);
        self.poke_word(DATA + 0xc60 + 2 * 8, under_way);
        self.poke_word(DATA + 0xc60 + 3 * 8, written);
        self.node() + self.types.offset("pglist_data", "node_zones")
    }

    /// Where that node is.
    pub(crate) fn node(&self) -> GuestVirt {
        DATA + 0x3900
    }

    /// What the fake kernel's only CPU knows of its page tables.
    pub(crate) fn tlb_state(&self) -> GuestVirt {
        self.image.per_cpu("cpu_tlbstate", 0).expect("a CPU")
    }

    /// A pending timer that calls `function`.
    pub(crate) fn add_timer(&mut self, function: GuestVirt) -> GuestVirt {
        let timer = DATA + 0x3000 + self.timers * 64;
        let bucket = PER_CPU + 0x200 + 0x40 + self.timers * 8;
        self.poke_word(bucket, (timer + 8).0);
        self.set_member("timer_list", "function", timer, function.0);
        self.timers += 1;
        timer
    }

    /// An interrupt line with these handlers.
    pub(crate) fn add_interrupt(&mut self, number: u64, handlers: &[GuestVirt]) {
        let node = DATA + 0x2000;
        let line = DATA + 0x2400 + self.lines * 0x100;
        self.poke_word(DATA + 0xc40 + 8, node.0 | 2);
        self.poke_word(node + 0x28 + self.lines * 8, line.0);
        self.set_member("irq_desc", "irq_data.irq", line, number);
        let mut link = line + 0x10;
        for (index, handler) in handlers.iter().enumerate() {
            let action = line + 0x40 + index as u64 * 0x20;
            self.poke_word(link, action.0);
            self.poke_word(action, handler.0);
            link = action + 16;
        }
        self.lines += 1;
    }

    /// Two network devices with operations there, in the only namespace.
    pub(crate) fn add_network(&mut self, operations: [GuestVirt; 2]) -> [GuestVirt; 2] {
        let (list, namespace) = (DATA + 0xca0, DATA + 0x3b00);
        let devices = [DATA + 0x3b80, DATA + 0x3c00];
        let rings: [&[GuestVirt]; 2] =
            [&[list, namespace + 0x10], &[namespace + 0x20, devices[0] + 0x30, devices[1] + 0x30]];
        for ring in rings {
            for (at, next) in ring.iter().zip(ring.iter().cycle().skip(1)) {
                self.set_member("list_head", "next", *at, next.0);
            }
        }
        for (device, operations) in devices.into_iter().zip(operations) {
            self.set_member("net_device", "netdev_ops", device, operations.0);
        }
        devices
    }

    /// The only disk, with operations there and one queue of its hardware that knows three requests: two of them are
    /// started.
    pub(crate) fn add_disk(&mut self, operations: GuestVirt) -> [GuestVirt; 3] {
        let base = DATA + 0x3d00;
        let (entry, device, disk, queue) = (base, base + 0x20, base + 0x80, base + 0xa0);
        let (set, array, tags, requests) = (base + 0xc0, base + 0xd0, base + 0xe0, base + 0x100);
        let all = [base + 0x140, base + 0x160, base + 0x180];
        for (at, next) in [(DATA + 0xcb0, entry + 8), (entry + 8, DATA + 0xcb0)] {
            self.set_member("list_head", "next", at, next.0);
        }
        for (structure, path, at, value) in [
            ("backing_dev_info", "owner", entry, (device + 0x10).0),
            ("block_device", "bd_disk", device, disk.0),
            ("block_device", "bd_queue", device, queue.0),
            ("gendisk", "part0", disk, device.0),
            ("request_queue", "mq_ops", queue, operations.0),
            ("request_queue", "tag_set", queue, set.0),
            ("blk_mq_tag_set", "nr_hw_queues", set, 1),
            ("blk_mq_tag_set", "tags", set, array.0),
            ("blk_mq_tags", "nr_tags", tags, 4),
            ("blk_mq_tags", "rqs", tags, requests.0),
        ] {
            self.set_member(structure, path, at, value);
        }
        self.poke_word(array, tags.0);
        for (index, request) in (0..).zip(all) {
            self.poke_word(requests + index * 8, request.0);
            self.set_member("request", "q", request, queue.0);
            self.set_member("request", "state", request, u64::from(index < 2));
        }
        all
    }

    /// The `struct device` of that disk.
    pub(crate) fn disk_device(&self) -> GuestVirt {
        DATA + 0x3d30
    }

    /// Devices, each the child of the next one, on buses of these names; gives their `struct device`s.
    pub(crate) fn add_devices(&mut self, buses: &[Option<&str>]) -> Vec<GuestVirt> {
        let base = DATA + 0x3f00;
        let devices: Vec<GuestVirt> =
            (0..).zip(buses).map(|(index, _)| base + index * 0x30).collect();
        for (index, (&at, bus)) in devices.iter().zip(buses).enumerate() {
            let (structure, name) = (at + 0x10, at + 0x18);
            let parent = devices.get(index + 1).map_or(0, |parent| parent.0);
            self.set_member("device", "parent", at, parent);
            self.set_member("device", "bus", at, bus.map_or(0, |_| structure.0));
            self.set_member("bus_type", "name", structure, name.0);
            let name_of = bus.unwrap_or_default();
            self.machine.poke_virt(name, &[name_of.as_bytes(), &[0]].concat());
        }
        devices
    }
}

fn image(machine: &FakeMachine, types: FakeTypes) -> RepairImage {
    let mut kernel = KnowledgeParts::default();
    let link = |at: GuestVirt| LinkAddr(at.0);
    for (index, &name) in FUNCTIONS.iter().enumerate() {
        let at = link(TEXT + index as u64 * 0x40);
        kernel.symbols.push((name.to_owned(), at, 0x40, SymbolKind::Function));
    }
    for (name, offset) in
        [("cpu_current_top_of_stack", 0x28), ("runqueues", 0x80), ("cpu_tlbstate", 0x100)]
    {
        kernel.symbols.push((name.to_owned(), LinkAddr(offset), 8, SymbolKind::Object));
    }
    kernel.symbols.push(("timer_bases".to_owned(), LinkAddr(0x200), 0x80, SymbolKind::Object));
    for (name, offset) in [
        ("init_task", 0xd00),
        ("init_mm", 0xc20),
        ("vm_node_stat", 0xc60),
        ("node_data", 0xc90),
        ("net_namespace_list", 0xca0),
        ("bdi_list", 0xcb0),
        ("page_offset_base", 0xcc0),
        ("vmemmap_base", 0xcc8),
        ("max_pfn", 0xcd0),
        ("kmem_cache", 0xcd8),
        ("slub_debug_enabled", 0xce0),
        ("bh_cachep", 0xce8),
        ("_sdata", 0x2800),
        ("_end", 0x2810),
        ("e820_table", 0xc18),
        ("irq_desc_tree", 0xc40),
        ("jiffies_64", 0xc00),
        ("oops_in_progress", 0xc08),
        ("tainted_mask", 0xc10),
    ] {
        kernel.symbols.push((name.to_owned(), link(DATA + offset), 8, SymbolKind::Object));
    }
    let mut driver = KnowledgeParts::default();
    for (index, (name, returns)) in DRIVER.into_iter().enumerate() {
        let at = link(MODULE_TEXT + index as u64 * 0x40);
        driver.symbols.push((name.to_owned(), at, 0x40, SymbolKind::Function));
        let shape = match returns {
            Some("void") => TypeShape::Void,
            Some("int") => int("int", 4, true),
            Some(name) => int(name, 8, true),
            None => continue,
        };
        driver.prototypes.insert(name.to_owned(), prototype(shape));
    }
    let module = Module {
        name: "toy".to_owned(),
        at: MODULE_DATA + 0x800,
        text: vec![MODULE_TEXT..MODULE_TEXT + 0x1000],
        ranges: vec![MODULE_TEXT..MODULE_TEXT + 0x1000, MODULE_DATA..MODULE_DATA + 0x1000],
        sections: Vec::new(),
        knowledge: Arc::new(Knowledge::new(driver)),
    };
    RepairImage {
        kernel: Arc::new(Knowledge::new(kernel)),
        types: Arc::new(types),
        placement: Placement {
            slide: 0,
            root: machine.space().root(),
            five_level: false,
            text: TEXT..TEXT + 0x2000,
            per_cpu: vec![PER_CPU.0],
        },
        modules: vec![module],
        pristine: Arc::default(),
    }
}
