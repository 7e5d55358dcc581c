//! From registers to frames: applies unwind rows one after another. Knows rows, not the tables they
//! come from; registers that no row tells of come from code analysis. Guest memory may be hostile: every
//! step is checked, bounded, and must lead somewhere new.

use std::collections::HashSet;

use guest::{CodeAddress, GuestVirt, Reg, Registers, VirtMemory};
use repair_image::{CfaRule, FrameKind, RepairImage, SavedRule, UnwindRow};

use crate::code::{CodeCache, Place, SavedPlace, call_before, saved_place};
use crate::{Frame, Trust, UnwindEnd};

/// Where unwinding starts.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Registers of the innermost frame, among them rsp.
    pub registers: Registers,
    /// Where it executes.
    pub pc: CodeAddress,
}

impl Start {
    /// At the registers of a stopped vCPU; `None` without rip.
    #[must_use]
    pub fn of(registers: &Registers) -> Option<Self> {
        Some(Self { registers: *registers, pc: CodeAddress::Exact(registers.rip()?) })
    }
}

/// Bounds of one walk.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most frames.
    pub frames: usize,
}

impl Default for Limits {
    /// A 16 KiB stack of smallest frames has 1024 of 16 bytes; real ones stay below 512.
    fn default() -> Self {
        Self { frames: 512 }
    }
}

/// Registers that stay the same from frame to frame within the kernel.
const LASTING: [Reg; 6] = [Reg::GsBase, Reg::Cr0, Reg::Cr2, Reg::Cr3, Reg::Cr4, Reg::Efer];

/// Members of `struct pt_regs` (arch/x86/include/asm/ptrace.h) and the registers they hold.
const PT_REGS: [(&str, Reg); 20] = [
    ("r15", Reg::R15),
    ("r14", Reg::R14),
    ("r13", Reg::R13),
    ("r12", Reg::R12),
    ("bp", Reg::Rbp),
    ("bx", Reg::Rbx),
    ("r11", Reg::R11),
    ("r10", Reg::R10),
    ("r9", Reg::R9),
    ("r8", Reg::R8),
    ("ax", Reg::Rax),
    ("cx", Reg::Rcx),
    ("dx", Reg::Rdx),
    ("si", Reg::Rsi),
    ("di", Reg::Rdi),
    ("ip", Reg::Rip),
    ("cs", Reg::Cs),
    ("flags", Reg::Rflags),
    ("sp", Reg::Rsp),
    ("ss", Reg::Ss),
];
/// Those of them that the processor itself pushes.
const HARDWARE: [&str; 5] = ["ip", "cs", "flags", "sp", "ss"];

/// Frames from `start` outward, innermost first, and why there are no more.
pub fn walk(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    cache: &mut CodeCache,
    start: &Start,
    limits: Limits,
) -> (Vec<Frame>, UnwindEnd) {
    let mut walker = Walker { image, memory, cache, seen: HashSet::new() };
    let mut frames = vec![walker.frame(start.pc, start.registers, Trust::Context, None)];
    loop {
        if frames.len() >= limits.frames {
            return (frames, UnwindEnd::TooDeep);
        }
        let Some(frame) = frames.last_mut() else { return (frames, UnwindEnd::Outermost) };
        match walker.step(frame) {
            Ok(next) => frames.push(next),
            Err(end) => return (frames, end),
        }
    }
}

/// Reads the `struct pt_regs` at a guest-virtual address; `None` when it can't be read or its layout is
/// not known.
#[must_use]
pub fn read_pt_regs(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    at: GuestVirt,
) -> Option<Registers> {
    read_members(image, memory, at, &PT_REGS)
}

fn read_members(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    at: GuestVirt,
    members: &[(&str, Reg)],
) -> Option<Registers> {
    let mut registers = Registers::unknown();
    for (name, reg) in members {
        let member = image.types.member("pt_regs", name)?;
        let value = memory.read_uint(at + member.offset, member.size).ok()?;
        registers.set(*reg, value);
    }
    Some(registers)
}

struct Walker<'a> {
    image: &'a RepairImage,
    memory: &'a dyn VirtMemory,
    cache: &'a mut CodeCache,
    /// Stack pointers and addresses of the frames so far.
    seen: HashSet<(u64, u64)>,
}

impl Walker<'_> {
    fn frame(
        &self,
        pc: CodeAddress,
        registers: Registers,
        trust: Trust,
        saved_at: Option<GuestVirt>,
    ) -> Frame {
        let at = pc.lookup();
        let location = self.image.locate(at);
        let module = self.image.module_of_text(at).map(|module| module.name.clone());
        Frame {
            pc,
            cfa: None,
            registers,
            trust,
            module,
            function: location.map(|location| location.symbol.name.to_owned()),
            function_start: location.map(|location| location.start(at)),
            source: self.image.source(at),
            saved_at,
        }
    }

    /// The caller of `frame`, whose CFA is filled in on the way.
    fn step(&mut self, frame: &mut Frame) -> Result<Frame, UnwindEnd> {
        let ip = frame.pc.ip();
        let rsp = frame.registers.rsp().ok_or(UnwindEnd::UnknownRegister(ip))?;
        if !self.seen.insert((rsp.0, ip.0)) {
            return Err(UnwindEnd::NotAdvancing(rsp));
        }
        if matches!(frame.pc, CodeAddress::Exact(at) if !self.image.is_text(at)) {
            return self.bad_call(frame, rsp);
        }
        let row = self.image.unwind_row(frame.pc.lookup()).ok_or(UnwindEnd::NoRow(ip))?;
        if row.kind == FrameKind::End {
            return Err(UnwindEnd::Outermost);
        }
        let cfa = self.cfa(frame, row.cfa)?;
        frame.cfa = Some(cfa);
        match row.kind {
            FrameKind::Call => self.call(frame, &row, rsp, cfa),
            FrameKind::Regs => self.saved_registers(frame, cfa),
            FrameKind::PartialRegs => self.hardware_frame(frame, cfa),
            FrameKind::End => Err(UnwindEnd::Outermost),
        }
    }

    /// A call through a bad pointer pushed its return address and nothing else.
    fn bad_call(&self, frame: &mut Frame, rsp: GuestVirt) -> Result<Frame, UnwindEnd> {
        let ip = frame.pc.ip();
        let to = self.memory.read_u64(rsp).map_err(|_| UnwindEnd::Unreadable(rsp))?;
        let to = GuestVirt(to);
        if !self.image.is_text(to) || call_before(self.memory, to).is_none() {
            return Err(UnwindEnd::NoRow(ip));
        }
        let cfa = rsp + 8;
        frame.cfa = Some(cfa);
        let mut registers = lasting(&frame.registers);
        for reg in Reg::CALLEE_SAVED {
            if let Some(value) = frame.registers.get(reg) {
                registers.set(reg, value);
            }
        }
        registers.set(Reg::Rsp, cfa.0);
        registers.set(Reg::Rip, to.0);
        Ok(self.frame(CodeAddress::Return(to), registers, Trust::BadCall, None))
    }

    fn cfa(&self, frame: &Frame, rule: CfaRule) -> Result<GuestVirt, UnwindEnd> {
        let ip = frame.pc.ip();
        let get = |reg| frame.registers.get(reg).ok_or(UnwindEnd::UnknownRegister(ip));
        match rule {
            CfaRule::Offset { reg, offset } => Ok(GuestVirt(get(reg)?).offset(i64::from(offset))),
            CfaRule::Deref { reg, inner, outer } => {
                let at = GuestVirt(get(reg)?).offset(i64::from(inner));
                let word = self.memory.read_u64(at).map_err(|_| UnwindEnd::Unreadable(at))?;
                Ok(GuestVirt(word).offset(i64::from(outer)))
            }
            CfaRule::Unknown => Err(UnwindEnd::NoRow(ip)),
        }
    }

    fn call(
        &mut self,
        frame: &Frame,
        row: &UnwindRow,
        rsp: GuestVirt,
        cfa: GuestVirt,
    ) -> Result<Frame, UnwindEnd> {
        // Only a load may lead to another stack (from the interrupt stack back to the task's).
        if cfa <= rsp && !matches!(row.cfa, CfaRule::Deref { .. }) {
            return Err(UnwindEnd::NotAdvancing(cfa));
        }
        let return_at = GuestVirt(cfa.0.wrapping_sub(8));
        let to = self.memory.read_u64(return_at).map_err(|_| UnwindEnd::Unreadable(return_at))?;
        let to = GuestVirt(to);
        let pc = CodeAddress::Return(to);
        if !self.image.is_text(pc.lookup()) {
            return Err(UnwindEnd::NoRow(to));
        }
        let mut registers = lasting(&frame.registers);
        let trust = self.callee_saved(frame, row, cfa, &mut registers);
        registers.set(Reg::Rsp, cfa.0);
        registers.set(Reg::Rip, to.0);
        Ok(self.frame(pc, registers, trust, None))
    }

    /// Fills in what the caller's callee-saved registers were, and says how that is known.
    fn callee_saved(
        &mut self,
        frame: &Frame,
        row: &UnwindRow,
        cfa: GuestVirt,
        registers: &mut Registers,
    ) -> Trust {
        let mut missing = Vec::new();
        for (reg, rule) in Reg::CALLEE_SAVED.into_iter().zip(row.saved) {
            let value = match rule {
                SavedRule::Same => frame.registers.get(reg),
                SavedRule::AtCfa(offset) => {
                    self.memory.read_u64(cfa.offset(i64::from(offset))).ok()
                }
                SavedRule::Unknown => {
                    missing.push(reg);
                    None
                }
            };
            if let Some(value) = value {
                registers.set(reg, value);
            }
        }
        if missing.is_empty() {
            return Trust::Cfi;
        }
        match self.registers_from_code(frame, &missing, registers) {
            Some(()) => Trust::OrcAndCode,
            None => Trust::Orc,
        }
    }

    /// Registers from code analysis; `None` when it does not tell of all of them.
    fn registers_from_code(
        &mut self,
        frame: &Frame,
        missing: &[Reg],
        registers: &mut Registers,
    ) -> Option<()> {
        let table = self.cache.table(self.image);
        let analysis = self.cache.analysis(self.image, self.memory, frame.pc.lookup())?;
        let answer = analysis.at(&table, frame.pc);
        let mut places = Vec::new();
        for state in &answer.states {
            let place = Place {
                memory: self.memory,
                nodes: analysis.nodes(),
                state,
                registers: &frame.registers,
                cfa: frame.cfa,
                per_cpu: None,
            };
            // A path on which the stack is not as deep as it is was not taken.
            let rsp = place.resolve(state.reg(Reg::Rsp));
            if rsp.is_some() && rsp == frame.registers.get(Reg::Rsp) {
                places.push(place);
            }
        }
        let mut all = !places.is_empty();
        for &reg in missing {
            let mut values = places.iter().map(|place| match saved_place(place.state, reg)? {
                SavedPlace::Same => frame.registers.get(reg),
                SavedPlace::At(at) => self.memory.read_u64(GuestVirt(place.resolve(at)?)).ok(),
            });
            let first = values.next().flatten();
            match first.filter(|_| values.all(|value| value == first)) {
                Some(value) => registers.set(reg, value),
                None => all = false,
            }
        }
        all.then_some(())
    }

    fn saved_registers(&self, frame: &Frame, at: GuestVirt) -> Result<Frame, UnwindEnd> {
        let saved = read_pt_regs(self.image, self.memory, at).ok_or(UnwindEnd::Unreadable(at))?;
        let mut registers = lasting(&frame.registers);
        registers.overlay(&saved);
        self.interrupted(registers, Some(at))
    }

    /// Only what the processor pushed is there; the entry code has not changed the rest yet.
    fn hardware_frame(&self, frame: &Frame, at: GuestVirt) -> Result<Frame, UnwindEnd> {
        let first = self.image.types.member("pt_regs", HARDWARE[0]);
        let first = first.ok_or(UnwindEnd::Unreadable(at))?;
        let members: Vec<_> =
            PT_REGS.into_iter().filter(|(name, _)| HARDWARE.contains(name)).collect();
        let base = GuestVirt(at.0.wrapping_sub(first.offset));
        let saved = read_members(self.image, self.memory, base, &members);
        let mut registers = frame.registers;
        registers.overlay(&saved.ok_or(UnwindEnd::Unreadable(at))?);
        self.interrupted(registers, None)
    }

    fn interrupted(
        &self,
        registers: Registers,
        saved_at: Option<GuestVirt>,
    ) -> Result<Frame, UnwindEnd> {
        // Requested privilege level 3 in cs: user mode.
        if registers.get(Reg::Cs).is_some_and(|cs| cs & 3 == 3) {
            return Err(UnwindEnd::UserMode);
        }
        let ip = registers.rip().ok_or(UnwindEnd::Outermost)?;
        Ok(self.frame(CodeAddress::Exact(ip), registers, Trust::SavedRegisters, saved_at))
    }
}

fn lasting(registers: &Registers) -> Registers {
    let mut kept = Registers::unknown();
    for reg in LASTING {
        if let Some(value) = registers.get(reg) {
            kept.set(reg, value);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::code::fixture::{self, DATA, TEXT, registers, store};

    fn frames(start: Registers, words: &[(u64, u64)]) -> (Vec<Frame>, UnwindEnd) {
        let (image, mut machine) = fixture::kernel();
        for (at, word) in words {
            store(&mut machine, *at, *word);
        }
        let mut cache = CodeCache::new();
        let start = Start::of(&start).unwrap();
        walk(&image, &machine.space(), &mut cache, &start, Limits { frames: 64 })
    }

    #[test]
    fn callee_saved_registers_come_from_code() {
        // nested, at its fault: rsp+0x10 rbx, +0x18 rbp, +0x20 return address; then outer: +0x28
        // padding, +0x30 r12, +0x38 return address.
        let rsp = DATA + 0x100;
        let words = [
            (rsp + 0x10, 0xb0b),
            (rsp + 0x18, 0xb9),
            (rsp + 0x20, TEXT + 0xde),
            (rsp + 0x30, 0x12),
            (rsp + 0x38, 0x1234),
        ];
        let start = registers(0x2c, rsp).with(Reg::R12, 0x99).with(Reg::R13, 13);
        let (frames, end) = frames(start.with(Reg::R14, 14).with(Reg::R15, 15), &words);
        assert_eq!(end, UnwindEnd::NoRow(GuestVirt(0x1234)));
        assert_eq!(frames.len(), 2);
        assert_eq!(frames[0].cfa, Some(GuestVirt(rsp + 0x28)));
        let outer = &frames[1];
        assert_eq!((outer.trust, outer.function.as_deref()), (Trust::OrcAndCode, Some("outer")));
        assert_eq!(outer.pc, CodeAddress::Return(GuestVirt(TEXT + 0xde)));
        let get = |reg| outer.registers.get(reg);
        assert_eq!((get(Reg::Rbx), get(Reg::Rbp)), (Some(0xb0b), Some(0xb9)));
        assert_eq!((get(Reg::R12), get(Reg::R13)), (Some(0x99), Some(13)));
        assert_eq!((get(Reg::Rsp), get(Reg::Rax)), (Some(rsp + 0x28), None));
    }

    #[test]
    fn a_bad_call_returns_to_its_caller() {
        let rsp = DATA + 0x100;
        let start = registers(0, rsp).with(Reg::Rip, 0).with(Reg::Rbx, 7);
        let (frames, _) = frames(start, &[(rsp, TEXT + 0xde)]);
        assert_eq!((frames[1].trust, frames[1].registers.get(Reg::Rbx)), (Trust::BadCall, Some(7)));
        assert_eq!(frames[1].registers.rsp(), Some(GuestVirt(rsp + 8)));
    }

    #[test]
    fn a_bad_call_needs_a_call_before_its_return_address() {
        let rsp = DATA + 0x100;
        let start = registers(0, rsp).with(Reg::Rip, 0);
        let (frames, end) = frames(start, &[(rsp, TEXT + 0x2c)]);
        assert_eq!((frames.len(), end), (1, UnwindEnd::NoRow(GuestVirt(0))));
    }

    #[test]
    fn saved_registers_are_read_and_user_mode_ends_the_walk() {
        let rsp = DATA + 0x100;
        let at = rsp + 8;
        let user = [(at + 17 * 8, 0x33), (at + 16 * 8, 0x40_0000)];
        let (found, end) = frames(registers(0x600, rsp), &user);
        assert_eq!((found.len(), end), (1, UnwindEnd::UserMode));
        let kernel = [
            (at + 17 * 8, 0x10),
            (at + 16 * 8, TEXT + 0x620),
            (at + 19 * 8, DATA + 0x800),
            (at, 15),
        ];
        let (found, _) = frames(registers(0x600, rsp), &kernel);
        assert_eq!(
            (found[1].trust, found[1].saved_at),
            (Trust::SavedRegisters, Some(GuestVirt(at)))
        );
        assert_eq!(found[1].registers.get(Reg::R15), Some(15));
        assert_eq!(found[1].registers.rsp(), Some(GuestVirt(DATA + 0x800)));
    }

    #[test]
    fn stacks_that_lead_inward_or_in_circles() {
        let rsp = DATA + 0x100;
        let (found, end) = frames(registers(0x610, rsp), &[(rsp - 24, TEXT + 0x611)]);
        assert_eq!((found.len(), end), (1, UnwindEnd::NotAdvancing(GuestVirt(rsp - 16))));
        // pt_regs that point at themselves
        let at = rsp + 8;
        let circle = [(at + 17 * 8, 0x10), (at + 16 * 8, TEXT + 0x600), (at + 19 * 8, rsp)];
        let (found, end) = frames(registers(0x600, rsp), &circle);
        assert_eq!((found.len(), end), (2, UnwindEnd::NotAdvancing(GuestVirt(rsp))));
    }

    proptest! {
        #[test]
        fn any_stack(words in proptest::collection::vec(any::<u64>(), 64), pick: u64) {
            let rsp = DATA + 0x100;
            let plausible = |word: u64| match word % 3 {
                0 => TEXT + word % 0x700,
                1 => DATA + word % 0x8000,
                _ => word,
            };
            let stack: Vec<_> =
                (0..).zip(&words).map(|(i, &word)| (rsp + 8 * i, plausible(word))).collect();
            let (found, _) = frames(registers(pick % 0x700, rsp), &stack);
            prop_assert!(found.len() <= 64);
        }
    }
}
