//! A small hand-made kernel in a fake machine, and diagnoses of it, for the tests of this crate.
//! Layouts are this file's own and unlike any real kernel's. No test itself.

pub(crate) mod double;
pub(crate) mod slabs;

use std::collections::HashMap;
use std::sync::Arc;

use diagnose::{
    Boundary, Confirmation, Context, CrashClass, Diagnosis, ExecutionContext, Frame, FrameEffects,
    Held, Offender, ResourceKind, Task, Trust, UnwindEnd,
};
use guest::fake::{FakeMachine, PageSize};
use guest::{CodeAddress, GuestPhys, GuestVirt, Hook, HookKind, LinkAddr, Reg, Registers, Vcpu};
use repair_image::{
    Knowledge, KnowledgeParts, Member, Module, Parameter, Placement, Prototype, RepairImage,
    SymbolKind, TypeShape, Types,
};

/// Types made by hand.
#[derive(Clone, Debug, Default)]
pub(crate) struct FakeTypes {
    members: HashMap<(&'static str, &'static str), (u64, u64)>,
    sizes: HashMap<&'static str, u64>,
    enumerators: HashMap<&'static str, i64>,
    prototypes: HashMap<(&'static str, &'static str), Prototype>,
}

/// Members of structures: where, and how many bytes.
const MEMBERS: &[(&str, &str, u64, u64)] = &[
    ("backing_dev_info", "bdi_list", 8, 16),
    ("backing_dev_info", "owner", 0x18, 8),
    ("block_device", "bd_device", 0x10, 0x40),
    ("block_device", "bd_disk", 0, 8),
    ("block_device", "bd_queue", 8, 8),
    ("gendisk", "part0", 0, 8),
    ("request_queue", "tag_set", 0x10, 8),
    ("request_queue", "mq_ops", 0x18, 8),
    ("device", "parent", 0, 8),
    ("device", "bus", 8, 8),
    ("bus_type", "name", 0, 8),
    ("pci_dev", "dev", 0x20, 0x40),
    ("blk_mq_tag_set", "nr_hw_queues", 0, 4),
    ("blk_mq_tag_set", "tags", 8, 8),
    ("blk_mq_tags", "nr_tags", 0, 4),
    ("blk_mq_tags", "rqs", 8, 8),
    ("request", "q", 0, 8),
    ("request", "state", 8, 4),
    ("list_head", "next", 8, 8),
    ("list_head", "prev", 0, 8),
    ("seq_operations", "start", 0, 8),
    ("seq_operations", "stop", 8, 8),
    ("seq_operations", "next", 16, 8),
    ("seq_operations", "show", 24, 8),
    ("module", "ftrace_callsites", 0x40, 8),
    ("module", "num_ftrace_callsites", 0x38, 4),
    ("timer_base", "vectors", 0x40, 64),
    ("timer_list", "entry", 8, 16),
    ("timer_list", "function", 24, 8),
    ("xarray", "xa_head", 8, 8),
    ("xa_node", "slots", 0x28, 64 * 8),
    ("irq_desc", "irq_data.irq", 0, 4),
    ("irq_desc", "irq_data.chip", 8, 8),
    ("irq_desc", "action", 0x10, 8),
    ("irq_chip", "irq_bus_lock", 0, 8),
    ("irqaction", "handler", 0, 8),
    ("irqaction", "thread_fn", 8, 8),
    ("irqaction", "next", 16, 8),
    ("e820_table", "nr_entries", 0, 4),
    ("e820_table", "entries", 4, 0),
    ("e820_entry", "addr", 0, 8),
    ("e820_entry", "size", 8, 8),
    ("e820_entry", "type", 16, 4),
    ("net", "list", 0x10, 16),
    ("net", "dev_base_head", 0x20, 16),
    ("net_device", "dev_list", 0x30, 16),
    ("net_device", "netdev_ops", 0x18, 8),
    ("net_device", "features", 0x28, 8),
    ("net_device_ops", "ndo_start_xmit", 0x10, 8),
    ("rq", "__lock", 0, 4),
    ("rq", "curr", 0x18, 8),
    ("rq", "cfs", 0x20, 16),
    ("cfs_rq", "tasks_timeline.rb_root.rb_node", 8, 8),
    ("rb_node", "__rb_parent_color", 0, 8),
    ("rb_node", "rb_left", 16, 8),
    ("rb_node", "rb_right", 8, 8),
    ("tlb_state", "loaded_mm", 0, 8),
    ("task_struct", "files", 0x98, 8),
    ("task_struct", "nameidata", 0xa0, 8),
    ("nameidata", "flags", 0, 4),
    ("files_struct", "fdt", 0, 8),
    ("fdtable", "max_fds", 8, 4),
    ("fdtable", "fd", 16, 8),
    ("file", "f_op", 0, 8),
    ("zone", "lock", 0x10, 4),
    ("pglist_data", "nr_zones", 0, 4),
    ("pglist_data", "node_zones", 8, 0x40),
    ("mm_struct", "pgd", 8, 8),
    ("page", "flags", 8, 8),
    ("page", "compound_head", 0x10, 8),
    ("page", "page_type", 0x18, 4),
    ("slab", "slab_cache", 0x20, 8),
    ("slab", "freelist", 0x28, 8),
    ("slab", "inuse", 0x30, 2),
    ("slab", "objects", 0x32, 2),
    ("slab", "frozen", 0x34, 1),
    ("kmem_cache", "cpu_slab", 0, 8),
    ("kmem_cache", "size", 0x10, 4),
    ("kmem_cache", "offset", 0x18, 4),
    ("kmem_cache", "name", 0x20, 8),
    ("kmem_cache", "random", 0x28, 8),
    ("kmem_cache_cpu", "slab", 0, 8),
    ("kmem_cache_cpu", "freelist", 8, 8),
];

impl FakeTypes {
    /// A little Linux.
    pub(crate) fn linux() -> Self {
        let mut types = Self::default();
        let regs = [
            "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx",
            "si", "di", "orig_ax", "ip", "cs", "flags", "sp", "ss",
        ];
        for (index, name) in regs.into_iter().enumerate() {
            types.members.insert(("pt_regs", name), (index as u64 * 8, 8));
        }
        types.sizes.insert("pt_regs", 168);
        for (index, name) in ["flags", "__state", "pagefault_disabled"].into_iter().enumerate() {
            types.members.insert(("task_struct", name), (0x40 + index as u64 * 4, 4));
        }
        for (index, name) in
            ["mm", "stack", "journal_info", "plug", "stack_vm_area"].into_iter().enumerate()
        {
            types.members.insert(("task_struct", name), (0x60 + index as u64 * 8, 8));
        }
        for (index, name) in
            ["owner", "open", "write", "read", "release", "unlocked_ioctl"].into_iter().enumerate()
        {
            types.members.insert(("file_operations", name), (index as u64 * 8, 8));
        }
        types.sizes.insert("file_operations", 48);
        types.members.insert(("module", "exit"), (0x28, 8));
        types.members.insert(("module", "init"), (0x20, 8));
        types.members.insert(("module", "refcnt"), (0x30, 4));
        types.members.insert(("rq", "nr_switches"), (0x10, 8));
        for &(structure, path, offset, size) in MEMBERS {
            types.members.insert((structure, path), (offset, size));
        }
        types.sizes.insert("timer_base", 0x80);
        types.sizes.insert("e820_entry", 20);
        types.sizes.insert("zone", 0x20);
        types.sizes.insert("module", 0x80);
        types.sizes.insert("page", 0x40);
        types.enumerators.extend([
            ("IRQ_NONE", 0),
            ("IRQ_HANDLED", 1),
            ("HRTIMER_NORESTART", 0),
            ("HRTIMER_RESTART", 1),
            ("VM_FAULT_SIGBUS", 2),
            ("NETDEV_TX_OK", 0),
            ("NETIF_F_LLTX_BIT", 0),
            ("NR_WRITEBACK", 2),
            ("NR_WRITTEN", 3),
            ("MQ_RQ_IN_FLIGHT", 1),
            ("PG_locked", 3),
            ("PG_slab", 5),
        ]);
        let ssize = int("ssize_t", 8, true);
        let number = int("int", 4, true);
        for (structure, path, returns) in [
            ("file_operations", "write", ssize.clone()),
            ("file_operations", "read", ssize),
            ("file_operations", "open", number.clone()),
            ("file_operations", "release", number),
            ("file_operations", "unlocked_ioctl", int("long", 8, true)),
            ("seq_operations", "start", TypeShape::Pointer { to: None }),
        ] {
            types = types.with_prototype(structure, path, prototype(returns));
        }
        types
    }

    /// The same with a function pointer of this type.
    pub(crate) fn with_prototype(
        mut self,
        structure: &'static str,
        path: &'static str,
        prototype: Prototype,
    ) -> Self {
        self.prototypes.insert((structure, path), prototype);
        self
    }

    /// The same with another enumerator.
    pub(crate) fn with_enumerator(mut self, name: &'static str, value: i64) -> Self {
        self.enumerators.insert(name, value);
        self
    }

    /// The same with locks that are slept for.
    fn with_locks(mut self) -> Self {
        for (structure, path, offset, size) in [
            ("mutex", "owner", 8, 8),
            ("mutex", "wait_lock", 4, 4),
            ("mutex", "wait_list", 0x10, 16),
            ("mutex_waiter", "list", 8, 16),
            ("rw_semaphore", "count", 0, 8),
            ("rw_semaphore", "wait_lock", 8, 4),
            ("rw_semaphore", "wait_list", 0x10, 16),
            ("rwsem_waiter", "list", 8, 16),
            ("completion", "wait.lock", 4, 4),
            ("completion", "wait.task_list", 0x10, 16),
            ("swait_queue", "task_list", 8, 16),
            ("semaphore", "lock", 4, 4),
            ("semaphore", "wait_list", 0x10, 16),
            ("semaphore_waiter", "list", 8, 16),
            ("wait_queue_head", "lock", 4, 4),
            ("wait_queue_head", "head", 0x10, 16),
            ("wait_queue_entry", "entry", 8, 16),
        ] {
            self.members.insert((structure, path), (offset, size));
        }
        self
    }

    fn offset(&self, structure: &str, path: &str) -> u64 {
        let found = self.members.iter().find(|(key, _)| **key == (structure, path));
        found.expect("member of the fake kernel").1.0
    }
}

impl Types for FakeTypes {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let found = self.members.iter().find(|(key, _)| **key == (structure, path))?;
        let (offset, size) = *found.1;
        Some(Member { offset, size, bits: None, shape: TypeShape::Other })
    }

    fn size_of(&self, name: &str) -> Option<u64> {
        self.sizes.get(name).copied()
    }

    fn enumerator(&self, name: &str) -> Option<i64> {
        self.enumerators.get(name).copied()
    }

    fn prototype(&self, _function: &str) -> Option<Prototype> {
        None
    }

    fn member_prototype(&self, structure: &str, path: &str) -> Option<Prototype> {
        let found = self.prototypes.iter().find(|(key, _)| **key == (structure, path))?;
        Some(found.1.clone())
    }
}

/// A function of one pointer.
pub(crate) fn prototype(returns: TypeShape) -> Prototype {
    let shape = TypeShape::Pointer { to: None };
    Prototype { returns, parameters: vec![Parameter { name: "p".to_owned(), shape }] }
}

/// An integer type.
pub(crate) fn int(name: &str, size: u8, signed: bool) -> TypeShape {
    TypeShape::Int { name: name.to_owned(), size, signed }
}

/// An enumeration.
pub(crate) fn tagged(tag: &str) -> TypeShape {
    TypeShape::Enum { name: format!("{tag}_t"), tag: tag.to_owned(), size: 4 }
}

/// Effects of frame 1 holding these, all confirmed.
pub(crate) fn effects(kinds: &[ResourceKind]) -> FrameEffects {
    let mut effects = FrameEffects::default();
    for (index, &kind) in kinds.iter().enumerate() {
        effects.preempt_delta += crate::counts::preempt_share(kind);
        effects.rcu_delta += i64::from(kind == ResourceKind::Rcu);
        let has_lock = !matches!(
            kind,
            ResourceKind::Rcu
                | ResourceKind::BottomHalves
                | ResourceKind::Preemption
                | ResourceKind::Interrupts
        );
        effects.held.push(Held {
            kind,
            lock: has_lock.then(|| DATA + 0x800 + index as u64 * 64),
            name: has_lock.then(|| format!("lock_{index}")),
            frame: 1,
            taken_at: MODULE_TEXT + 0x20,
            confirmed: if has_lock { Confirmation::Confirmed } else { Confirmation::NotApplicable },
            saved_interrupts: None,
        });
    }
    effects
}

/// A context of CPU 0.
pub(crate) fn context(kind: ExecutionContext, preempt_count: u32) -> Context {
    Context {
        kind,
        cpu: Some(0),
        preempt_count: Some(preempt_count),
        preempt_count_at: Some(PREEMPT_COUNT),
        interrupts_enabled: Some(true),
        rcu_nesting: Some(0),
        idle: false,
    }
}

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

    /// A device whose packets the driver's entry sends, in a register of the caller; gives its address.
    pub(crate) fn sends_packets(&mut self, diagnosis: &mut Diagnosis, features: u64) -> GuestVirt {
        let (device, operations) = (DATA + 0x600, DATA + 0x680);
        self.set_member("net_device", "netdev_ops", device, operations.0);
        self.set_member("net_device", "features", device, features);
        self.set_member("net_device_ops", "ndo_start_xmit", operations, MODULE_TEXT.0);
        let caller = diagnosis.boundary.as_ref().map_or(0, |boundary| boundary.frame);
        diagnosis.frames[caller].registers.set(Reg::Rbx, device.0);
        device
    }

    /// A NULL dereference in `toy_write`, called by `vfs_write`, that holds nothing.
    pub(crate) fn diagnosis(&self) -> Diagnosis {
        let mut caller = frame("vfs_write", None, CodeAddress::Return(self.return_address));
        caller.registers = Registers::unknown()
            .with(Reg::Rip, self.return_address.0)
            .with(Reg::Rsp, self.boundary_rsp.0);
        for (index, reg) in Reg::CALLEE_SAVED.into_iter().enumerate() {
            caller.registers.set(reg, 0x10 + index as u64);
        }
        let mut entry = frame("toy_write", Some("toy"), CodeAddress::Exact(MODULE_TEXT + 8));
        entry.cfa = Some(self.boundary_rsp);
        entry.registers.set(Reg::Rsp, self.boundary_rsp.offset(-64).0);
        let hook = frame("oops_begin", None, CodeAddress::Exact(TEXT + 0x1000));
        let held = FrameEffects { interrupts_before: Some(true), ..FrameEffects::default() };
        Diagnosis {
            hook: Some(Hook { kind: HookKind::OopsBegin, at: TEXT + 0x1000 }),
            vcpu: Vcpu(0),
            class: Some(CrashClass::NullDereference),
            title: "BUG: kernel NULL pointer dereference in toy_write".to_owned(),
            signature: "null_dereference:toy_write:vfs_write".to_owned(),
            context: context(ExecutionContext::Task, 0x8000_0000),
            task: Some(self.user_task()),
            frames: vec![hook, entry, caller],
            fault_frame: 1,
            fault_regs_at: Some(self.regs_at),
            unwind_end: UnwindEnd::UserMode,
            offender: Some(Offender::Driver {
                module: "toy".to_owned(),
                function: "toy_write".to_owned(),
                source: None,
            }),
            evidence: Vec::new(),
            explanation: None,
            boundary: Some(Boundary {
                frame: 2,
                entry: 1,
                function: "vfs_write".to_owned(),
                prototype: Some(prototype(int("ssize_t", 8, true))),
                effects: held,
                outer: FrameEffects::default(),
            }),
            core_exits: Vec::new(),
            damage: Vec::new(),
            queued: None,
            all_effects: Some(FrameEffects::default()),
            message: None,
        }
    }

    /// A NULL dereference in the core kernel on behalf of a process.
    pub(crate) fn core_diagnosis(&self) -> Diagnosis {
        let mut diagnosis = self.diagnosis();
        diagnosis.boundary = None;
        diagnosis.frames[1].module = None;
        diagnosis.frames[1].function = Some("do_something".to_owned());
        diagnosis.offender = Some(Offender::Process {
            pid: 300,
            tgid: 300,
            comm: "worker".to_owned(),
            function: "do_something".to_owned(),
            source: None,
        });
        diagnosis
    }

    pub(crate) fn effects(&self, kinds: &[ResourceKind]) -> FrameEffects {
        effects(kinds)
    }

    /// Lets the driver's frame hold these, with counts that agree.
    pub(crate) fn hold(&self, diagnosis: &mut Diagnosis, kinds: &[ResourceKind]) {
        let mut held = effects(kinds);
        held.interrupts_before = Some(true);
        let count = 0x8000_0000_u32 + u32::try_from(held.preempt_delta).expect("small");
        diagnosis.context.preempt_count = Some(count);
        diagnosis.context.rcu_nesting = i32::try_from(held.rcu_delta).ok();
        diagnosis.boundary.as_mut().expect("boundary").effects = held;
    }

    /// The same crash in a timer that interrupted the idle task.
    pub(crate) fn over_idle(&self, diagnosis: &mut Diagnosis) {
        diagnosis.context = context(ExecutionContext::Softirq, 0x8000_0101);
        diagnosis.context.idle = true;
        let boundary = diagnosis.boundary.as_mut().expect("boundary");
        boundary.function = "call_timer_fn".to_owned();
        boundary.prototype = Some(prototype(TypeShape::Void));
    }

    fn user_task(&self) -> Task {
        Task {
            at: self.task,
            comm: "worker".to_owned(),
            pid: 300,
            tgid: 300,
            kernel_thread: false,
            executable: Some("worker".to_owned()),
            syscall: Some("write (1)".to_owned()),
        }
    }
}

fn frame(function: &str, module: Option<&str>, pc: CodeAddress) -> Frame {
    Frame {
        pc,
        cfa: None,
        registers: Registers::unknown(),
        trust: Trust::Cfi,
        module: module.map(str::to_owned),
        function: Some(function.to_owned()),
        function_start: None,
        source: Vec::new(),
        saved_at: None,
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

/// A diagnosis in which anything may be wrong: numbers from `words`, choices from `bytes`.
pub(crate) fn wild_diagnosis(
    scene: &Scene,
    words: &[u64],
    bytes: &[u8],
    deltas: (i64, i64, i64, i64),
) -> Diagnosis {
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    let byte = |index: usize| bytes.get(index).copied().unwrap_or(0);
    let choose = |index: usize, of: u8| byte(index) % of;
    let mut diagnosis = if choose(2, 4) == 0 { scene.core_diagnosis() } else { scene.diagnosis() };
    let kinds = [
        ResourceKind::Mutex,
        ResourceKind::SpinlockBh,
        ResourceKind::Rcu,
        ResourceKind::Preemption,
        ResourceKind::RwsemRead,
    ];
    let mut held = effects(&kinds[..usize::from(choose(3, 6)).min(kinds.len())]);
    if choose(4, 2) == 0 {
        (held.preempt_delta, held.rcu_delta) = (deltas.0, deltas.1);
    }
    for (index, held) in held.held.iter_mut().enumerate() {
        match choose(5 + index, 5) {
            0 => held.lock = Some(GuestVirt(word(index))),
            1 => held.confirmed = Confirmation::Unknown,
            2 => held.frame = word(index) as usize,
            _ => {}
        }
    }
    held.interrupts_before = [None, Some(true), Some(false)][usize::from(choose(10, 3))];
    let outer = FrameEffects {
        preempt_delta: if choose(11, 3) == 0 { deltas.2 } else { 0 },
        rcu_delta: if choose(12, 3) == 0 { deltas.3 } else { 0 },
        ..FrameEffects::default()
    };
    if let Some(boundary) = diagnosis.boundary.as_mut() {
        boundary.effects = held.clone();
        boundary.outer = outer;
        if choose(13, 4) == 0 {
            (boundary.frame, boundary.entry) = (word(5) as usize, word(6) as usize);
        }
        if choose(14, 3) == 0 {
            boundary.prototype = None;
        }
    }
    diagnosis.all_effects = Some(held);
    let kinds = [
        ExecutionContext::Task,
        ExecutionContext::Softirq,
        ExecutionContext::Hardirq,
        ExecutionContext::Nmi,
    ];
    diagnosis.context = context(kinds[usize::from(choose(15, 4))], word(7) as u32 & 0x8000_0703);
    diagnosis.context.idle = choose(16, 2) == 0;
    diagnosis.context.cpu = Some(usize::from(choose(17, 3)));
    if choose(18, 3) == 0 {
        diagnosis.fault_frame = word(8) as usize;
        diagnosis.fault_regs_at = Some(GuestVirt(word(9)));
    }
    if choose(19, 3) == 0
        && let Some(frame) = diagnosis.frames.last_mut()
    {
        frame.registers.set(Reg::Rsp, word(10));
        frame.pc = CodeAddress::Return(GuestVirt(word(11)));
    }
    if choose(20, 4) == 0
        && let Some(task) = diagnosis.task.as_mut()
    {
        task.at = GuestVirt(word(12));
    }
    diagnosis
}
