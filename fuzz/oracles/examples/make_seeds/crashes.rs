//! Seeds that are a crashed machine: registers, code and data for the scene of the oracles.

use defib_fuzz_oracles::scene::{CPUS, DATA, FUNCTIONS, MODULE, address};
use guest::Reg;

use crate::{Outcome, Seeds};

/// The stack, guest-virtual; and where the current task lies.
const STACK: u64 = DATA + 0x2000;
const TASK: u64 = DATA + 0x1a00;
/// The lock that the driver holds.
const LOCK: u64 = DATA + 0x1c00;

/// What one seed is made of.
struct Crash {
    choice: u8,
    variant: u8,
    registers: Vec<(Reg, u64)>,
    module: Vec<u8>,
    data: Vec<u8>,
}

impl Crash {
    fn new(choice: u8, rip: u64) -> Self {
        let registers = [(Reg::Rip, rip), (Reg::Rsp, STACK), (Reg::Rbp, STACK + 0x80)];
        let mut registers = registers.to_vec();
        registers.extend([(Reg::Rflags, 0x202), (Reg::GsBase, CPUS[0]), (Reg::Cr2, 8)]);
        let mut crash =
            Self { choice, variant: 0, registers, module: CODE.to_vec(), data: vec![0; 0x2200] };
        // In `pcpu_hot`, and as variables of their own.
        crash.words(CPUS[0], &[TASK, 0x8000_0000]);
        crash.poke(CPUS[0] + 0x80, TASK);
        crash.poke(CPUS[0] + 0x100, 0x8000_0000);
        // Whichever member of the task holds its pid.
        for offset in (0..0x100).step_by(8) {
            crash.poke(TASK + offset, 40);
        }
        // And whichever member of the lock holds its owner.
        for offset in (0..0x100).step_by(8) {
            crash.poke(LOCK + offset, TASK);
        }
        crash
    }

    fn poke(&mut self, at: u64, word: u64) {
        let start = (at - DATA) as usize;
        self.data[start..start + 8].copy_from_slice(&word.to_le_bytes());
    }

    /// Words from a place on.
    fn words(&mut self, at: u64, words: &[u64]) {
        for (index, word) in words.iter().enumerate() {
            self.poke(at + index as u64 * 8, *word);
        }
    }

    /// A `struct pt_regs` of this rip and rsp; all other registers hold an address of data.
    fn saved(&mut self, at: u64, rip: u64, rsp: u64) {
        let mut words = [LOCK; 21];
        words[16..21].copy_from_slice(&[rip, 0x10, 0x202, rsp, 0x18]);
        self.words(at, &words);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![self.choice, self.variant];
        for reg in Reg::GENERAL.into_iter().chain([Reg::Rip, Reg::Rflags, Reg::GsBase, Reg::Cr2]) {
            let value = self.registers.iter().find(|own| own.0 == reg).map_or(0, |own| own.1);
            out.extend(value.to_le_bytes());
        }
        let text = text();
        for part in [&text, &self.module] {
            out.extend((part.len() as u16).to_le_bytes());
            out.extend(part.iter());
        }
        out.extend(&self.data);
        out
    }
}

/// `endbr64; mov rdi, LOCK; call mutex_lock; mov eax, [rax+8]; mov rdi, LOCK; call mutex_unlock; xor eax, eax; ret`,
/// calls filled in below. Without a push, as the rows of the scene have it.
const CODE: [u8; 34] = [
    0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0xc7, 0xc7, 0, 0x1c, 0, 0x82, 0xe8, 0, 0, 0, 0, 0x8b, 0x40, 0x08,
    0x48, 0xc7, 0xc7, 0, 0x1c, 0, 0x82, 0xe8, 0, 0, 0, 0, 0x31, 0xc0, 0xc3,
];

/// Text of the kernel: every function calls the next one, its call ending at byte 16.
fn text() -> Vec<u8> {
    let function = [
        0xf3, 0x0f, 0x1e, 0xfa, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xe8, 0x30, 0, 0, 0,
        0x31, 0xc0, 0xc3, 0x0f, 0x0b,
    ];
    let mut text = Vec::new();
    for _ in FUNCTIONS {
        text.extend(function);
        text.resize(text.len().next_multiple_of(0x40), 0xcc);
    }
    text
}

fn calls(code: &mut [u8]) {
    for (end, to) in [(16, "mutex_lock"), (31, "mutex_unlock")] {
        let distance = (address(to).wrapping_sub(MODULE + end as u64)) as u32;
        code[end - 4..end].copy_from_slice(&distance.to_le_bytes());
    }
}

pub(crate) fn add(seeds: &Seeds) -> Outcome<()> {
    let within = |name: &str| address(name) + 16;
    // A driver's write faults: oops_begin < asm_exc_page_fault < bw < vfs_write < kthread.
    let mut fault = Crash::new(0, address("oops_begin"));
    calls(&mut fault.module);
    fault.words(STACK + 0x80, &[STACK + 0x90, within("asm_exc_page_fault")]);
    fault.saved(STACK + 0x90, MODULE + 16, STACK + 0x150);
    fault.words(STACK + 0x150, &[within("vfs_write"), within("kthread"), 0, 0]);
    seeds.add("crash", "fault", fault.bytes())?;
    seeds.add("unwinding", "fault", fault.bytes())?;
    fault.variant = 3;
    seeds.add("crash", "fault_other_kernel", fault.bytes())?;
    // panic() from a timer that interrupted a driver.
    let mut panic = Crash::new(1, address("panic"));
    panic.words(STACK, &[within("asm_exc_page_fault")]);
    panic.saved(STACK + 8, MODULE + 16, STACK + 0x100);
    panic.words(STACK + 0x100, &[0, within("__handle_irq_event_percpu"), within("ret_from_fork")]);
    seeds.add("crash", "panic", panic.bytes())?;
    // A stack that leads to itself.
    let mut circle = Crash::new(4, address("handle_softirqs") + 16);
    circle.words(STACK, &[0, STACK + 8, within("handle_softirqs"), STACK]);
    seeds.add("unwinding", "circle", circle.bytes())?;
    let mut code = CODE.to_vec();
    calls(&mut code);
    code.resize(0x40, 0xcc);
    // mov rax, gs:[0x40]; rep movsb; jmp [rip+8]; test; jne -9; lock cmpxchg; sti; hlt
    code.extend([
        0x65, 0x48, 0x8b, 0x04, 0x25, 0x40, 0, 0, 0, 0xf3, 0xa4, 0x48, 0x85, 0xc0, 0x75, 0xf0,
    ]);
    code.extend([0xf0, 0x48, 0x0f, 0xb1, 0x0f, 0xfb, 0xf4, 0xff, 0x25, 8, 0, 0, 0, 0x0f, 0x0b]);
    seeds.add("instructions", "functions", code)
}
