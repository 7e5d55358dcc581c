//! Hand-made frames, tasks and diagnoses for the tests of this crate. No test itself.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use guest::fake::{FakeMachine, PageSize};
use guest::{CodeAddress, GuestPhys, GuestVirt, Hook, HookKind, LinkAddr, Reg, Registers, Vcpu};
use repair_image::{
    Knowledge, KnowledgeParts, Member, Module, Placement, Prototype, RepairImage, SourceFrame,
    SymbolKind, TypeShape, Types, UnwindRow, Variable, VariableLocation,
};

use crate::fault::Fault;
use crate::{
    Boundary, Confirmation, Context, CrashClass, Diagnosis, ExecutionContext, Explanation, Frame,
    FrameEffects, Held, Offender, ResourceKind, Task, Trust, UnwindEnd,
};

/// A frame of this function.
pub(crate) fn frame(function: &str, module: Option<&str>) -> Frame {
    Frame {
        pc: CodeAddress::Return(GuestVirt(0xffff_ffff_8100_0010)),
        cfa: None,
        registers: Registers::unknown(),
        trust: Trust::Cfi,
        module: module.map(str::to_owned),
        function: (!function.is_empty()).then(|| function.to_owned()),
        function_start: Some(GuestVirt(0xffff_ffff_8100_0000)),
        source: Vec::new(),
        saved_at: None,
    }
}

/// The same frame, its registers read from a `pt_regs`.
pub(crate) fn saved(mut frame: Frame) -> Frame {
    frame.trust = Trust::SavedRegisters;
    frame.saved_at = Some(GuestVirt(0xffff_c900_0000_1000));
    frame.pc = CodeAddress::Exact(frame.pc.ip());
    frame
}

/// One level of an inline chain.
pub(crate) fn level(function: &str, file: &str, line: u32) -> SourceFrame {
    SourceFrame {
        function: Some(function.to_owned()),
        file: file.to_owned(),
        line,
        column: 0,
        inlined: false,
    }
}

/// A fault in frame `at`.
pub(crate) fn fault(frames: Vec<Frame>, at: usize, end: UnwindEnd) -> Fault {
    Fault { frames, end, at, regs_at: None, exception: None, detector: None, found: true }
}

/// A context of CPU 0 with everything off.
pub(crate) fn context(kind: ExecutionContext) -> Context {
    Context {
        kind,
        cpu: Some(0),
        preempt_count: Some(0x8000_0000),
        preempt_count_at: Some(GuestVirt(0xffff_8880_0000_fb40)),
        interrupts_enabled: Some(true),
        rcu_nesting: None,
        idle: false,
    }
}

/// A user task.
pub(crate) fn task(pid: i32, comm: &str) -> Task {
    Task {
        at: GuestVirt(0xffff_8880_0123_0000),
        comm: comm.to_owned(),
        pid,
        tgid: pid,
        kernel_thread: false,
        executable: None,
        syscall: None,
    }
}

/// A whole diagnosis: a driver that read from NULL with a mutex held, in write().
pub(crate) fn diagnosis() -> Diagnosis {
    let mut helper = saved(frame("__memcpy", None));
    helper.source = vec![level("__memcpy", "arch/x86/lib/memcpy_64.S", 34)];
    helper.registers = Registers::unknown().with(Reg::Rsi, 0).with(Reg::Rip, TEXT + 0x10);
    let mut driver = frame("bw.isra.0", Some("crashcases"));
    driver.source = vec![level("deref", "crashcases.c", 40), level("bw", "crashcases.c", 77)];
    if let Some(inner) = driver.source.first_mut() {
        inner.inlined = true;
    }
    let mut caller = frame("vfs_write", None);
    caller.trust = Trust::OrcAndCode;
    let frames = vec![frame("oops_begin", None), helper, driver, caller];
    let held = Held {
        kind: ResourceKind::Mutex,
        lock: Some(GuestVirt(MODULE + 0x900)),
        name: Some("big_lock".to_owned()),
        frame: 2,
        taken_at: GuestVirt(MODULE + 0x20),
        confirmed: Confirmation::Confirmed,
        saved_interrupts: None,
    };
    let effects = FrameEffects { held: vec![held], ..FrameEffects::default() };
    let at = GuestVirt(TEXT + 0x100);
    Diagnosis {
        hook: Some(Hook { kind: HookKind::OopsBegin, at }),
        vcpu: Vcpu(1),
        class: Some(CrashClass::NullDereference),
        title: "BUG: unable to handle kernel NULL pointer dereference in bw [crashcases]"
            .to_owned(),
        signature: "0123456789ab".to_owned(),
        context: context(ExecutionContext::Task),
        task: Some(Task {
            executable: Some("busybox".to_owned()),
            syscall: Some("write (1)".to_owned()),
            ..task(42, "dd")
        }),
        frames,
        fault_frame: 1,
        fault_regs_at: Some(GuestVirt(0xffff_c900_0000_1000)),
        unwind_end: UnwindEnd::UserMode,
        offender: Some(Offender::Driver {
            module: "crashcases".to_owned(),
            function: "bw".to_owned(),
            source: Some(level("deref", "crashcases.c", 40)),
        }),
        evidence: vec![
            "__memcpy is not blamed: it copies what it is given".to_owned(),
            "bw [crashcases] is the innermost frame of a module".to_owned(),
        ],
        explanation: Some(Explanation {
            instruction: "mov rax, qword ptr [rsi]".to_owned(),
            operands: vec![("rsi".to_owned(), "0x0".to_owned())],
            accessed: Some(GuestVirt(0)),
            expression: None,
            sentence: "reads 8 bytes at 0x0: rsi is NULL".to_owned(),
        }),
        boundary: Some(Boundary {
            frame: 3,
            entry: 2,
            function: "vfs_write".to_owned(),
            prototype: None,
            effects: effects.clone(),
            outer: FrameEffects::default(),
        }),
        core_exits: Vec::new(),
        damage: Vec::new(),
        queued: None,
        all_effects: Some(effects),
        message: None,
    }
}

/// Compares with a file of this crate's `tests/golden`; `DEFIB_BLESS=1` writes it instead.
pub(crate) fn golden(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("DEFIB_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{} differs; found:\n{found}", path.display());
}

/// Types with made-up layouts: nothing in this crate may know offsets.
#[derive(Default)]
pub(crate) struct FakeTypes {
    members: HashMap<(String, String), (u64, u64)>,
    pointers: HashMap<(String, u64), (String, String)>,
    sizes: HashMap<String, u64>,
    values: HashMap<String, i64>,
}

impl FakeTypes {
    /// Adds a member: offset and size in bytes.
    pub(crate) fn with(mut self, structure: &str, path: &str, offset: u64, size: u64) -> Self {
        self.members.insert((structure.to_owned(), path.to_owned()), (offset, size));
        self
    }

    /// Adds a member that is a pointer to a structure.
    pub(crate) fn pointer(mut self, structure: &str, path: &str, offset: u64, to: &str) -> Self {
        let member = (path.to_owned(), to.to_owned());
        self.pointers.insert((structure.to_owned(), offset), member);
        self.with(structure, path, offset, 8)
    }

    /// Adds the size of a structure.
    pub(crate) fn sized(mut self, structure: &str, size: u64) -> Self {
        self.sizes.insert(structure.to_owned(), size);
        self
    }

    /// Adds an enumerator.
    pub(crate) fn valued(mut self, name: &str, value: i64) -> Self {
        self.values.insert(name.to_owned(), value);
        self
    }

    /// Layouts of the structures that tests use.
    pub(crate) fn kernel() -> Self {
        let words = |types: Self, structure: &str, members: &[&str]| {
            members.iter().enumerate().fold(types, |types, (index, member)| {
                types.with(structure, member, index as u64 * 8, 8)
            })
        };
        let types = Self::default()
            .with("task_struct", "flags", 0x10, 4)
            .with("task_struct", "pid", 0x14, 4)
            .with("task_struct", "tgid", 0x18, 4)
            .with("task_struct", "__state", 0x1c, 4)
            .with("task_struct", "comm", 0x20, 16)
            .with("task_struct", "mm", 0x30, 8)
            .with("task_struct", "stack", 0x38, 8)
            .with("task_struct", "tasks", 0x40, 16)
            .with("task_struct", "thread_node", 0x50, 16)
            .with("task_struct", "signal", 0x60, 8)
            .with("task_struct", "thread.sp", 0x68, 8)
            .with("signal_struct", "thread_head", 0x10, 16)
            .with("mm_struct", "exe_file", 0x8, 8)
            .with("file", "f_path.dentry", 0x8, 8)
            .with("dentry", "d_name.name", 0x8, 8)
            .with("bug_entry", "bug_addr_disp", 0, 4)
            .with("bug_entry", "file_disp", 4, 4)
            .with("bug_entry", "line", 8, 2)
            .with("bug_entry", "flags", 10, 2)
            .sized("bug_entry", 12)
            .sized("thread_union", 0x4000);
        let types = words(
            types,
            "pt_regs",
            &[
                "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx",
                "si", "di", "orig_ax", "ip", "cs", "flags", "sp", "ss",
            ],
        )
        .sized("pt_regs", 168);
        words(types, "inactive_task_frame", &["r15", "r14", "r13", "r12", "bx", "bp", "ret_addr"])
    }
}

impl Types for FakeTypes {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let (offset, size) = *self.members.get(&(structure.to_owned(), path.to_owned()))?;
        Some(Member { offset, size, bits: None, shape: TypeShape::Other })
    }

    fn size_of(&self, name: &str) -> Option<u64> {
        self.sizes.get(name).copied()
    }

    fn enumerator(&self, name: &str) -> Option<i64> {
        self.values.get(name).copied()
    }

    fn prototype(&self, _: &str) -> Option<Prototype> {
        None
    }

    fn member_prototype(&self, _: &str, _: &str) -> Option<Prototype> {
        None
    }

    fn member_at(&self, structure: &str, offset: u64) -> Option<(String, TypeShape)> {
        if let Some((path, to)) = self.pointers.get(&(structure.to_owned(), offset)) {
            return Some((path.clone(), TypeShape::Pointer { to: Some(to.clone()) }));
        }
        let mut members = self.members.iter();
        let ((_, path), _) =
            members.find(|((own, _), (start, _))| own == structure && *start == offset)?;
        Some((path.clone(), TypeShape::Other))
    }
}

/// Guest-virtual start of the kernel's text, 2 MiB.
pub(crate) const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Guest-virtual start of the kernel's data, 2 MiB.
pub(crate) const DATA: u64 = 0xffff_ffff_8200_0000;
/// Guest-virtual start of a module's text and data, 4 KiB.
pub(crate) const MODULE: u64 = 0xffff_ffff_c000_0000;

/// A kernel in a fake machine, for tests: text and data pages and the symbols put into them.
pub(crate) struct Guest {
    pub(crate) machine: FakeMachine,
    parts: KnowledgeParts,
    module: KnowledgeParts,
    types: FakeTypes,
    per_cpu: Vec<u64>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut machine = FakeMachine::new(16 << 20, false);
        machine.map(GuestVirt(TEXT), GuestPhys(0x20_0000), PageSize::Size2M);
        machine.map(GuestVirt(DATA), GuestPhys(0x40_0000), PageSize::Size2M);
        machine.map(GuestVirt(MODULE), GuestPhys(0x60_0000), PageSize::Size4K);
        Self {
            machine,
            parts: KnowledgeParts::default(),
            module: KnowledgeParts::default(),
            types: FakeTypes::kernel(),
            per_cpu: Vec::new(),
        }
    }

    /// Changes the types.
    pub(crate) fn types(mut self, change: impl FnOnce(FakeTypes) -> FakeTypes) -> Self {
        self.types = change(self.types);
        self
    }

    /// A kernel data symbol at this address.
    pub(crate) fn object(mut self, name: &str, at: u64) -> Self {
        self.parts.symbols.push((name.to_owned(), LinkAddr(at), 8, SymbolKind::Object));
        self
    }

    /// A kernel function, or one of module `m` by its address.
    pub(crate) fn function(mut self, name: &str, at: u64, size: u64) -> Self {
        let parts = if at >= MODULE { &mut self.module } else { &mut self.parts };
        parts.symbols.push((name.to_owned(), LinkAddr(at), size, SymbolKind::Function));
        self
    }

    /// A pointer to a structure in a register of module `m`, over a range of its text.
    pub(crate) fn pointer(mut self, name: &str, to: &str, reg: Reg, code: Range<u64>) -> Self {
        let variable = Variable {
            name: name.to_owned(),
            shape: TypeShape::Pointer { to: Some(to.to_owned()) },
            location: VariableLocation::Register(reg),
        };
        let code = LinkAddr(code.start)..LinkAddr(code.end);
        self.module.variables.push((code, variable));
        self
    }

    /// An unwind row that holds over a range of text.
    pub(crate) fn row(mut self, range: Range<u64>, row: UnwindRow) -> Self {
        let parts = if range.start >= MODULE { &mut self.module } else { &mut self.parts };
        parts.unwind.push((LinkAddr(range.start), Some(row)));
        parts.unwind.push((LinkAddr(range.end), None));
        self
    }

    /// One more CPU with this per-CPU base.
    pub(crate) fn cpu(mut self, base: u64) -> Self {
        self.per_cpu.push(base);
        self
    }

    pub(crate) fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.machine.poke_virt(GuestVirt(at), bytes);
    }

    pub(crate) fn poke_u32(&mut self, at: u64, value: u32) {
        self.poke(at, &value.to_le_bytes());
    }

    pub(crate) fn poke_u64(&mut self, at: u64, value: u64) {
        self.poke(at, &value.to_le_bytes());
    }

    /// A `task_struct` at `at` with this name and ids, its lists empty.
    pub(crate) fn poke_task(&mut self, at: u64, pid: u32, comm: &str) {
        self.poke_u32(at + 0x14, pid);
        self.poke_u32(at + 0x18, pid);
        self.poke(at + 0x20, comm.as_bytes());
        self.poke_u64(at + 0x40, at + 0x40);
        self.poke_u64(at + 0x50, at + 0x50);
    }

    /// The repair image of what was built so far.
    pub(crate) fn image(&mut self) -> RepairImage {
        let module = Module {
            name: "m".to_owned(),
            at: GuestVirt(MODULE + 0xe00),
            text: vec![GuestVirt(MODULE)..GuestVirt(MODULE + 0x800)],
            ranges: vec![GuestVirt(MODULE)..GuestVirt(MODULE + 0x1000)],
            sections: Vec::new(),
            knowledge: Arc::new(Knowledge::new(std::mem::take(&mut self.module))),
        };
        RepairImage {
            kernel: Arc::new(Knowledge::new(std::mem::take(&mut self.parts))),
            types: Arc::new(std::mem::take(&mut self.types)),
            placement: Placement {
                slide: 0,
                root: self.machine.space().root(),
                five_level: false,
                text: GuestVirt(TEXT)..GuestVirt(TEXT + 0x20_0000),
                per_cpu: self.per_cpu.clone(),
            },
            modules: vec![module],
            pristine: Arc::default(),
        }
    }
}
