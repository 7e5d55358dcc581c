//! A kernel in a fake machine whose memory, registers and code are the fuzzer's. Its symbols, rows and types are
//! fixed; layouts are made up, since nothing may know real ones.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use guest::fake::{FakeMachine, PageSize};
use guest::{GuestPhys, GuestVirt, LinkAddr, Reg, Registers};
use repair_image::{
    CfaRule, FrameKind, Knowledge, KnowledgeParts, Member, Module, Parameter, Placement, Prototype,
    RepairImage, RowSource, SavedRule, SymbolKind, TypeShape, Types, UnwindRow,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::input::Input;

/// Guest-virtual start of the kernel's text.
pub const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Guest-virtual start of the kernel's data: symbols first, then free memory.
pub const DATA: u64 = 0xffff_ffff_8200_0000;
/// Guest-virtual start of module `m`: text, then its data.
pub const MODULE: u64 = 0xffff_ffff_c000_0000;
/// Bytes that a function has.
pub const FUNCTION: u64 = 0x40;
/// Bytes that a variable has.
const VARIABLE: u64 = 0x20;
/// Sizes of the three areas, bytes.
const SIZES: [u64; 3] = [0x3000, 0x4000, 0x2000];
const MODULE_TEXT: u64 = 0x1000;
/// Per-CPU bases.
pub const CPUS: [u64; 2] = [DATA + 0x1000, DATA + 0x1400];

/// Functions of the kernel, [`FUNCTION`] bytes apart from [`TEXT`] on. Their rows repeat with a period of
/// eight: see `row`.
pub const FUNCTIONS: [&str; 48] = [
    "vfs_write",
    "asm_exc_page_fault",
    "kthread",
    "asm_exc_invalid_op",
    "oops_begin",
    "exc_page_fault",
    "asm_sysvec_apic_timer_interrupt",
    "handle_softirqs",
    "panic",
    "asm_exc_double_fault",
    "ret_from_fork",
    "asm_common_interrupt",
    "__handle_irq_event_percpu",
    "exc_double_fault",
    "entry_SYSCALL_64_after_hwframe",
    "do_syscall_64",
    "__x64_sys_write",
    "mutex_lock",
    "mutex_unlock",
    "_raw_spin_lock",
    "_raw_spin_unlock",
    "_raw_spin_lock_irqsave",
    "_raw_spin_unlock_irqrestore",
    "down_read",
    "up_read",
    "__memcpy",
    "__schedule",
    "do_group_exit",
    "irqentry_exit",
    "rewind_stack_and_make_dead",
    "call_timer_fn",
    "process_one_work",
    "do_dentry_open",
    "seq_read_iter",
    "do_one_initcall",
    "timer_delete",
    "disable_irq_nosync",
    "__list_add_valid_or_report",
    "usercopy_abort",
    "watchdog_timer_fn",
    "check_hung_uninterruptible_tasks",
    "rcu_sched_clock_irq",
    "nmi_panic",
    "asm_exc_nmi",
    "__rcu_read_lock",
    "__rcu_read_unlock",
    "error_return",
    "kernfs_fop_write_iter",
];
/// Variables of the kernel, from [`DATA`] on.
pub const VARIABLES: [&str; 20] = [
    "init_task",
    "init_stack",
    "__end_init_stack",
    "modules",
    "sparse_irqs",
    "irq_desc_tree",
    "tainted_mask",
    "oops_in_progress",
    "jiffies_64",
    "rcu_state",
    "sys_call_table",
    "__start___bug_table",
    "__stop___bug_table",
    "panic_on_oops",
    "buf.0",
    "chrdevs",
    "proc_root",
    "idt_table",
    "kernel_param",
    "module_kset",
];
/// Per-CPU variables, from offset 0 on.
const PER_CPU: [&str; 8] = [
    "pcpu_hot",
    "current_task",
    "__preempt_count",
    "runqueues",
    "timer_bases",
    "idle_threads",
    "in_kernel_fpu",
    "hardirq_stack_ptr",
];
/// Functions of module `m`.
const MODULE_FUNCTIONS: [&str; 6] =
    ["bw", "open_it", "irq", "timer_fn", "init_module", "cleanup_module"];

/// A scene: what the pipeline is given.
pub(crate) struct Scene {
    pub(crate) machine: FakeMachine,
    pub(crate) image: RepairImage,
    pub(crate) registers: Registers,
    /// Choices of the fuzzer's.
    pub(crate) choice: u8,
}

/// Guest-virtual address of a function or variable of the kernel; 0 when there is none.
#[must_use]
pub fn address(name: &str) -> u64 {
    let place = |names: &[&str], base: u64, size: u64| {
        let index = names.iter().position(|own| *own == name)?;
        Some(base + index as u64 * size)
    };
    place(&FUNCTIONS, TEXT, FUNCTION)
        .or_else(|| place(&VARIABLES, DATA, VARIABLE))
        .or_else(|| place(&MODULE_FUNCTIONS, MODULE, FUNCTION))
        .unwrap_or(0)
}

impl Scene {
    /// Choice, layout variant, 16 general registers, rip, rflags, GS base, cr2, then text and module behind their
    /// lengths, and data.
    pub(crate) fn new(data: &[u8]) -> Self {
        let mut input = Input::new(data);
        let (choice, variant) = (input.u8(), input.u8());
        let mut registers = Registers::unknown();
        let others = [Reg::Rip, Reg::Rflags, Reg::GsBase, Reg::Cr2];
        for reg in Reg::GENERAL.into_iter().chain(others) {
            registers.set(reg, input.u64());
        }
        let mut machine = FakeMachine::new(128 << 10, false);
        let mut phys = 0;
        let contents = [(TEXT, input.part()), (MODULE, input.part()), (DATA, input.rest())];
        for ((virt, bytes), size) in contents.into_iter().zip([SIZES[0], SIZES[2], SIZES[1]]) {
            for page in (0..size).step_by(4096) {
                machine.map(GuestVirt(virt + page), GuestPhys(phys + page), PageSize::Size4K);
            }
            machine.poke(GuestPhys(phys), bytes.get(..size as usize).unwrap_or(bytes));
            phys += size;
        }
        registers.set(Reg::Cr3, machine.space().root().0);
        registers.set(Reg::Cr4, 0);
        let image = image(machine.space().root(), variant);
        Self { machine, image, registers, choice }
    }
}

fn image(root: GuestPhys, variant: u8) -> RepairImage {
    static KNOWLEDGE: OnceLock<[Arc<Knowledge>; 2]> = OnceLock::new();
    let [kernel, module] = KNOWLEDGE.get_or_init(|| [Arc::new(kernel()), Arc::new(module())]);
    let range = |start: u64, size| GuestVirt(start)..GuestVirt(start + size);
    RepairImage {
        kernel: Arc::clone(kernel),
        types: Arc::new(MadeUp { variant }),
        placement: Placement {
            slide: 0,
            root,
            five_level: false,
            text: range(TEXT, SIZES[0]),
            per_cpu: CPUS.to_vec(),
        },
        modules: vec![Module {
            name: "m".to_owned(),
            at: GuestVirt(MODULE + MODULE_TEXT),
            text: vec![range(MODULE, MODULE_TEXT)],
            ranges: vec![range(MODULE, SIZES[2])],
            sections: vec![(".data".to_owned(), GuestVirt(MODULE + MODULE_TEXT))],
            knowledge: Arc::clone(module),
        }],
        pristine: Arc::default(),
    }
}

type Symbols = Vec<(String, LinkAddr, u64, SymbolKind)>;

fn symbols(names: &[&str], base: u64, size: u64, kind: SymbolKind) -> Symbols {
    let places = (0u64..).zip(names);
    places
        .map(|(index, name)| ((*name).to_owned(), LinkAddr(base + index * size), size, kind))
        .collect()
}

/// Rows of all kinds: calls with rsp and rbp, saved registers, an indirect stack switch, the end.
fn row(index: u64) -> UnwindRow {
    let offset = |reg, offset| CfaRule::Offset { reg, offset };
    let same = [SavedRule::Same; 6];
    let (kind, cfa, saved) = match index % 8 {
        0 => (FrameKind::Call, offset(Reg::Rsp, 8), same),
        1 => (FrameKind::Regs, offset(Reg::Rsp, 0), same),
        2 => (FrameKind::End, CfaRule::Unknown, same),
        3 => (FrameKind::PartialRegs, offset(Reg::Rsp, 8), same),
        4 => (FrameKind::Call, offset(Reg::Rbp, 16), [SavedRule::AtCfa(-16); 6]),
        5 => (FrameKind::Call, offset(Reg::Rsp, 16), [SavedRule::Unknown; 6]),
        6 => (FrameKind::Regs, CfaRule::Deref { reg: Reg::Rsp, inner: 0, outer: 0 }, same),
        _ => (FrameKind::Call, CfaRule::Deref { reg: Reg::Rsp, inner: 8, outer: 8 }, same),
    };
    UnwindRow {
        kind,
        cfa,
        saved,
        source: if index.is_multiple_of(2) { RowSource::Cfi } else { RowSource::Orc },
    }
}

fn rows(range: Range<u64>) -> Vec<(LinkAddr, Option<UnwindRow>)> {
    let places = (0u64..).zip(range.step_by(FUNCTION as usize));
    places.map(|(index, at)| (LinkAddr(at), Some(row(index)))).collect()
}

fn kernel() -> Knowledge {
    let mut all = symbols(&FUNCTIONS, TEXT, FUNCTION, SymbolKind::Function);
    all.extend(symbols(&VARIABLES, DATA, VARIABLE, SymbolKind::Object));
    all.extend(symbols(&PER_CPU, 0, 0x80, SymbolKind::Object));
    Knowledge::new(KnowledgeParts {
        symbols: all,
        unwind: rows(TEXT..TEXT + SIZES[0]),
        ..KnowledgeParts::default()
    })
}

fn module() -> Knowledge {
    Knowledge::new(KnowledgeParts {
        symbols: symbols(&MODULE_FUNCTIONS, MODULE, FUNCTION, SymbolKind::Function),
        unwind: (0..MODULE_TEXT / FUNCTION)
            .map(|index| (LinkAddr(MODULE + index * FUNCTION), Some(row(index % 2 * 5))))
            .collect(),
        ..KnowledgeParts::default()
    })
}

/// Types where nearly every structure and member exists, at a place that follows from its name. Which ones do not
/// exist differs from variant to variant, as from kernel to kernel.
#[derive(Debug)]
struct MadeUp {
    variant: u8,
}

/// Members of `struct pt_regs`, eight bytes each.
const PT_REGS: [&str; 21] = [
    "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di",
    "orig_ax", "ip", "cs", "flags", "sp", "ss",
];
/// Members of four bytes.
const INTS: [&str; 10] = [
    "flags",
    "pid",
    "tgid",
    "__state",
    "state",
    "count",
    "line",
    "preempt_count",
    "bug_addr_disp",
    "file_disp",
];

impl MadeUp {
    /// A number that follows from the names; `None` for what this variant lacks.
    fn number(&self, structure: &str, path: &str) -> Option<u64> {
        let hash = xxh3_64(format!("{structure}.{path}").as_bytes());
        let lacking = self.variant != 0 && (hash >> 40 ^ u64::from(self.variant)).is_multiple_of(8);
        (!lacking).then_some(hash)
    }
}

fn function() -> Prototype {
    let parameter = Parameter {
        name: "file".to_owned(),
        shape: TypeShape::Pointer { to: Some("file".to_owned()) },
    };
    let returns = TypeShape::Int { name: "int".to_owned(), size: 4, signed: true };
    Prototype { returns, parameters: vec![parameter] }
}

impl Types for MadeUp {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let place = |offset, size| {
            let shape = TypeShape::Int { name: "u64".to_owned(), size: 8, signed: false };
            Some(Member { offset, size, bits: None, shape })
        };
        let index = |names: &[&str]| names.iter().position(|name| *name == path);
        match (structure, path) {
            ("pt_regs", _) => place(index(&PT_REGS)? as u64 * 8, 8),
            ("inactive_task_frame", "ret_addr") => place(48, 8),
            ("inactive_task_frame", _) => place(index(&PT_REGS)? as u64 * 8, 8),
            ("list_head" | "hlist_node", "next") => place(0, 8),
            ("list_head", "prev") => place(8, 8),
            ("pcpu_hot", "current_task") => place(0, 8),
            ("pcpu_hot", "preempt_count") => place(8, 4),
            ("task_struct", "rcu_read_lock_nesting") => place(0x180, 4),
            (_, "comm") => place((self.number(structure, path)? % 0x100) & !7, 16),
            _ => {
                let size = if INTS.contains(&path) { 4 } else { 8 };
                place((self.number(structure, path)? % 0x100) & !7, size)
            }
        }
    }

    fn size_of(&self, name: &str) -> Option<u64> {
        match name {
            "pt_regs" => Some(168),
            "thread_union" => Some(0x4000),
            "bug_entry" => Some(12),
            _ => Some(8 + ((self.number(name, "")? % 0x100) & !7)),
        }
    }

    fn enumerator(&self, name: &str) -> Option<i64> {
        self.number(name, "=").map(|hash| (hash % 5) as i64)
    }

    fn prototype(&self, name: &str) -> Option<Prototype> {
        self.number(name, "()").map(|_| function())
    }

    fn member_prototype(&self, structure: &str, path: &str) -> Option<Prototype> {
        self.number(structure, path).filter(|hash| hash & 16 != 0).map(|_| function())
    }
}
