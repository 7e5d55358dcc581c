//! A kernel of a few functions in fake memory, for the tests of this folder, of unwinding and of effects.

use std::sync::Arc;

use guest::fake::{FakeMachine, PageSize};
use guest::{GuestPhys, GuestVirt, LinkAddr, Reg, Registers};
use repair_image::{
    CfaRule, FrameKind, Knowledge, KnowledgeParts, Member, Placement, Prototype, RepairImage,
    RowSource, SavedRule, SymbolKind, TypeShape, Types, UnwindRow,
};

/// Where the functions are.
pub(crate) const TEXT: u64 = 0xffff_ffff_8100_0000;
/// A stack and objects: 8 pages.
pub(crate) const DATA: u64 = 0xffff_c900_0000_0000;
/// Per-CPU offset of the preempt count.
pub(crate) const PREEMPT_COUNT: u64 = 0x1000;
/// Address of the current task.
pub(crate) const TASK: u64 = 0xffff_8880_0123_4000;

/// Assembled from the text beside the bytes, at [`TEXT`].
#[rustfmt::skip]
pub(crate) const CODE: &[u8] = &[
    // nested:
    0x55, // push rbp
    0x53, // push rbx
    0x48, 0x83, 0xec, 0x10, // sub rsp,0x10
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0x48, 0x8d, 0x7b, 0x20, // lea rdi,[rbx+0x20]
    0xe8, 0xee, 0x0f, 0x00, 0x00, // call 1000 <__bss_start>
    0x48, 0x8d, 0x7b, 0x60, // lea rdi,[rbx+0x60]
    0xe8, 0x05, 0x10, 0x00, 0x00, // call 1020 <_raw_spin_lock_irqsave>
    0x48, 0x89, 0x44, 0x24, 0x08, // mov QWORD PTR [rsp+0x8],rax
    0x48, 0x8d, 0x7b, 0x70, // lea rdi,[rbx+0x70]
    0xe8, 0xf7, 0x0f, 0x00, 0x00, // call 1020 <_raw_spin_lock_irqsave>
    0x48, 0x89, 0xc5, // mov rbp,rax
    // nested_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x48, 0x83, 0xc4, 0x10, // add rsp,0x10
    0x5b, // pop rbx
    0x5d, // pop rbp
    0xc3, // ret
    0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, // data16 cs nop WORD PTR [rax+rax*1+0x0]
    0x00, 0x00, 0x00, 0x00,
    // trying:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0xe8, 0x37, 0x10, 0x00, 0x00, // call 1080 <mutex_trylock>
    0x85, 0xc0, // test eax,eax
    0x74, 0x04, // je 0051 <trying_not>
    // trying_held:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x5b, // pop rbx
    0xc3, // ret
    // trying_not:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x5b, // pop rbx
    0xc3, // ret
    0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, // data16 cs nop WORD PTR [rax+rax*1+0x0]
    0x00, 0x00, 0x00, 0x00,
    // split:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0x48, 0x85, 0xf6, // test rsi,rsi
    0x75, 0x07, // jne 0070 <split_cold>
    0x5b, // pop rbx
    0xc3, // ret
    0x0f, 0x1f, 0x44, 0x00, 0x00, // nop DWORD PTR [rax+rax*1+0x0]
    // split_cold:
    0x48, 0x8d, 0x7b, 0x08, // lea rdi,[rbx+0x8]
    0xe8, 0xc7, 0x0f, 0x00, 0x00, // call 1040 <_raw_spin_lock>
    // split_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x0f, 0x0b, // ud2
    0x0f, 0x1f, 0x00, // nop DWORD PTR [rax]
    // looping:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0x48, 0x89, 0xdf, // mov rdi,rbx
    0xe8, 0xb4, 0x0f, 0x00, 0x00, // call 1040 <_raw_spin_lock>
    // looping_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x48, 0x89, 0xdf, // mov rdi,rbx
    0xe8, 0xca, 0x0f, 0x00, 0x00, // call 1060 <_raw_spin_unlock>
    0x48, 0x8b, 0x1b, // mov rbx,QWORD PTR [rbx]
    0x48, 0x85, 0xdb, // test rbx,rbx
    0x75, 0xe6, // jne 0084 <looping+0x4>
    // looping_after:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x5b, // pop rbx
    0xc3, // ret
    0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, // data16 cs nop WORD PTR [rax+rax*1+0x0]
    0x00, 0x00, 0x00, 0x00,
    0x0f, 0x1f, 0x00, // nop DWORD PTR [rax]
    // either:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0x48, 0x85, 0xf6, // test rsi,rsi
    0x74, 0x05, // je 00be <either_fault>
    0xe8, 0x42, 0x0f, 0x00, 0x00, // call 1000 <__bss_start>
    // either_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x5b, // pop rbx
    0xc3, // ret
    0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, // data16 cs nop WORD PTR [rax+rax*1+0x0]
    0x00, 0x00, 0x00, 0x00,
    0x0f, 0x1f, 0x00, // nop DWORD PTR [rax]
    // outer:
    0x41, 0x54, // push r12
    0x49, 0x89, 0xfc, // mov r12,rdi
    0x48, 0x83, 0xec, 0x08, // sub rsp,0x8
    0xe8, 0x22, 0xff, 0xff, 0xff, // call 0000 <nested>
    // outer_return:
    0x48, 0x83, 0xc4, 0x08, // add rsp,0x8
    0x41, 0x5c, // pop r12
    0xc3, // ret
    0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0x00, // data16 cs nop WORD PTR [rax+rax*1+0x0]
    0x00, 0x00, 0x00, 0x00,
    // inline_off:
    0x9c, // pushf
    0x5b, // pop rbx
    0xfa, // cli
    0x65, 0xff, 0x04, 0x25, 0x00, 0x10, 0x00, // inc DWORD PTR gs:0x1000
    0x00,
    // inline_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x65, 0xff, 0x0c, 0x25, 0x00, 0x10, 0x00, // dec DWORD PTR gs:0x1000
    0x00,
    0xf6, 0xc7, 0x02, // test bh,0x2
    0x74, 0x01, // je 010b <inline_after>
    0xfb, // sti
    // inline_after:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0xc3, // ret
    0x66, 0x90, // xchg ax,ax
    // worker:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0xe8, 0x27, 0x0f, 0x00, 0x00, // call 1040 <_raw_spin_lock>
    0x48, 0x89, 0xdf, // mov rdi,rbx
    0xe8, 0x02, 0x00, 0x00, 0x00, // call 123 <worked>
    // worker_return:
    0x5b, // pop rbx
    0xc3, // ret
    // worked:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0xe8, 0x34, 0x0f, 0x00, 0x00, // call 1060 <_raw_spin_unlock>
    // worked_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x5b, // pop rbx
    0xc3, // ret
    // waiting:
    0x53, // push rbx
    0x48, 0x89, 0xfb, // mov rbx,rdi
    0xe8, 0xc7, 0x0e, 0x00, 0x00, // call 1000 <mutex_lock>
    // waiting_test:
    0x83, 0x7b, 0x08, 0x00, // cmp DWORD PTR [rbx+0x8],0x0
    0x75, 0x12, // jne 151 <waiting_fault>
    0x48, 0x89, 0xdf, // mov rdi,rbx
    0xe8, 0xc9, 0x0e, 0x00, 0x00, // call 1010 <mutex_unlock>
    0x48, 0x89, 0xdf, // mov rdi,rbx
    0xe8, 0xb1, 0x0e, 0x00, 0x00, // call 1000 <mutex_lock>
    0xeb, 0xe8, // jmp 139 <waiting_test>
    // waiting_fault:
    0x8b, 0x02, // mov eax,DWORD PTR [rdx]
    0x5b, // pop rbx
    0xc3, // ret
];

/// Name, offset in the text, size.
const FUNCTIONS: &[(&str, u64, u64)] = &[
    ("nested", 0, 0x35),
    ("trying", 0x40, 0x14),
    ("split", 0x60, 0xb),
    ("split.cold", 0x70, 0xd),
    ("looping", 0x80, 0x22),
    ("either", 0xb0, 0x12),
    ("outer", 0xd0, 0x15),
    ("inline_off", 0xf0, 0x1e),
    ("worker", 0x110, 0x13),
    ("worked", 0x123, 0xd),
    ("waiting", 0x130, 0x25),
    ("random", 0x800, 0x200),
    ("mutex_lock", 0x1000, 0x10),
    ("mutex_unlock", 0x1010, 0x10),
    ("_raw_spin_lock_irqsave", 0x1020, 0x10),
    ("_raw_spin_lock", 0x1040, 0x10),
    ("_raw_spin_unlock", 0x1060, 0x10),
    ("mutex_trylock", 0x1080, 0x10),
];

/// `inc dword ptr gs:[0x1000]; ret`
const COUNTING: [u8; 9] = [0x65, 0xff, 0x04, 0x25, 0x00, 0x10, 0x00, 0x00, 0xc3];

struct FakeTypes;

impl Types for FakeTypes {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        const REGS: [&str; 21] = [
            "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx",
            "si", "di", "orig_ax", "ip", "cs", "flags", "sp", "ss",
        ];
        let (offset, size) = match (structure, path) {
            ("pt_regs", name) => (8 * REGS.iter().position(|own| *own == name)? as u64, 8),
            ("mutex", "owner") => (0, 8),
            ("raw_spinlock", "raw_lock.locked") => (0, 1),
            _ => return None,
        };
        Some(Member { offset, size, bits: None, shape: TypeShape::Other })
    }
    fn size_of(&self, _name: &str) -> Option<u64> {
        None
    }
    fn enumerator(&self, _name: &str) -> Option<i64> {
        None
    }
    fn prototype(&self, _function: &str) -> Option<Prototype> {
        None
    }
    fn member_prototype(&self, _structure: &str, _path: &str) -> Option<Prototype> {
        None
    }
}

fn row(offset: i32) -> Option<UnwindRow> {
    let mut saved = [SavedRule::Unknown; 6];
    saved[1] = SavedRule::Same;
    let cfa = CfaRule::Offset { reg: Reg::Rsp, offset };
    Some(UnwindRow { kind: FrameKind::Call, cfa, saved, source: RowSource::Orc })
}

/// The rows that ORC would have for the addresses that tests ask for.
fn rows() -> Vec<(LinkAddr, Option<UnwindRow>)> {
    let mut nested = row(0x28);
    if let Some(row) = &mut nested {
        row.saved[1] = SavedRule::AtCfa(-16);
    }
    let regs = row(8).map(|row| UnwindRow { kind: FrameKind::Regs, ..row });
    let rows = [
        (0x2c, nested),
        (0x35, None),
        (0x79, row(0x10)),
        (0x7d, None),
        (0xd9, row(0x18)),
        (0xe5, None),
        (0x600, regs),
        (0x610, row(-16)),
        (0x620, row(8)),
    ];
    rows.into_iter().map(|(at, row)| (LinkAddr(TEXT + at), row)).collect()
}

/// The image and the machine.
pub(crate) fn kernel() -> (RepairImage, FakeMachine) {
    let function = |(name, at, size): &(&str, u64, u64)| {
        ((*name).to_owned(), LinkAddr(TEXT + at), *size, SymbolKind::Function)
    };
    let mut symbols: Vec<_> = FUNCTIONS.iter().map(function).collect();
    let count = LinkAddr(PREEMPT_COUNT);
    symbols.push(("__preempt_count".to_owned(), count, 4, SymbolKind::Object));
    let parts = KnowledgeParts { symbols, unwind: rows(), ..KnowledgeParts::default() };
    let image = RepairImage {
        kernel: Arc::new(Knowledge::new(parts)),
        types: Arc::new(FakeTypes),
        placement: Placement {
            slide: 0,
            root: GuestPhys(0),
            five_level: false,
            text: GuestVirt(TEXT)..GuestVirt(TEXT + 0x2000),
            per_cpu: Vec::new(),
        },
        modules: Vec::new(),
        pristine: Arc::default(),
    };
    let mut machine = FakeMachine::new(8 << 20, false);
    machine.map(GuestVirt(TEXT), GuestPhys(0x20_0000), PageSize::Size2M);
    for page in 0..8 {
        let at = page * 4096;
        machine.map(GuestVirt(DATA + at), GuestPhys(0x40_0000 + at), PageSize::Size4K);
    }
    machine.poke(GuestPhys(0x20_0000), CODE);
    for offset in (0x1000..0x1100).step_by(0x10) {
        machine.poke(GuestPhys(0x20_0000 + offset), &COUNTING);
    }
    (image, machine)
}

/// Stores a word in [`DATA`].
pub(crate) fn store(machine: &mut FakeMachine, at: u64, word: u64) {
    machine.poke_virt(GuestVirt(at), &word.to_le_bytes());
}

/// Registers at an offset of the text with a stack pointer.
pub(crate) fn registers(offset: u64, rsp: u64) -> Registers {
    Registers::unknown().with(Reg::Rip, TEXT + offset).with(Reg::Rsp, rsp)
}
