//! Type information made by hand: layouts unlike any real kernel's. No test itself.

use std::collections::HashMap;

use repair_image::{Member, Parameter, Prototype, TypeShape, Types};

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
    ("buffer_head", "b_state", 0, 8),
    ("buffer_head", "b_page", 0x10, 8),
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
            ("BH_Lock", 2),
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
    pub(super) fn with_locks(mut self) -> Self {
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

    pub(super) fn offset(&self, structure: &str, path: &str) -> u64 {
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
