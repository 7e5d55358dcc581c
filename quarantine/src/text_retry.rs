//! When the fault may be retried after damage was put back, and with which registers. An instruction that
//! faulted has changed nothing (Intel SDM 3A 6.6), so what must be shown is that the damage lies in that
//! instruction alone, in the gate that its exception needed, or in the word of data that it used.

use diagnose::code::{Instruction, OperandKind, call_before, instruction_at};
use diagnose::{CrashClass, Frame, Trust};
use guest::{CodeAddress, GuestVirt, HookKind, Reg, Registers, VirtMemory};
use repair_image::{Damage, PageKind, base_name};

use crate::guest_struct::Structures;
use crate::plan::{Situation, Steps};
use crate::{Action, Reason, error_return};

/// Instructions decoded at most, from a function's start.
const INSTRUCTIONS_MAX: usize = 4096;
/// Loads followed back at most.
const LOADS_MAX: u8 = 4;
/// Resume flag in rflags: of the exception, not of the code (Intel SDM 3B 17.3.1.1).
const RFLAGS_RF: u64 = 1 << 16;
/// Bits of an error code that names a gate of the IDT (Intel SDM 3A 6.13).
const ERROR_EXTERNAL: u64 = 1 << 0;
const ERROR_IDT: u64 = 1 << 1;
/// Bytes of a gate of the IDT (Intel SDM 3A 6.14.1).
const GATE: u64 = 16;
/// Vectors of exceptions; beyond them are interrupts, which would have to be acknowledged.
const EXCEPTIONS: u64 = 32;
/// #DB, NMI, #DF, #MC: not raised again by the same instruction.
const NOT_REPEATED: [u64; 4] = [1, 2, 8, 18];
/// Exceptions whose entry counts as an NMI, or that are traps: rip is behind the instruction.
const NOT_FAULTS: [&str; 5] =
    ["exc_double_fault", "exc_nmi", "exc_int3", "exc_debug", "exc_machine_check"];

fn no(why: impl Into<String>) -> Reason {
    Reason::NotRetryable { why: why.into() }
}

/// The steps of a retry.
pub(crate) fn steps(situation: &Situation<'_>) -> Result<Steps, Reason> {
    let diagnosis = situation.diagnosis;
    let frame = diagnosis.frames.get(diagnosis.fault_frame).ok_or(Reason::NoSavedRegisters)?;
    let registers = saved(situation, frame)?;
    let mut notes = Vec::new();
    let (registers, why) = match diagnosis.class {
        Some(CrashClass::TextCorruption) => of_text(situation, frame, registers, &mut notes)?,
        Some(CrashClass::IdtCorruption) => of_idt(situation, registers)?,
        Some(CrashClass::ReadOnlyDataCorruption) => of_data(situation, frame, registers)?,
        _ => return Err(no("the damage found does not explain the crash")),
    };
    Ok(Steps { actions: resume(situation, &registers, why)?, notes, ..Steps::default() })
}

/// The way out of the exception. Over the idle task RCU must be told (see `error_return.rs`); otherwise an
/// entry of this kind has changed nothing that would have to be taken back.
fn resume(
    situation: &Situation<'_>,
    registers: &Registers,
    why: String,
) -> Result<Vec<Action>, Reason> {
    let diagnosis = situation.diagnosis;
    let at_entry = diagnosis.hook.is_some_and(|hook| hook.kind == HookKind::DoubleFault);
    match diagnosis.fault_regs_at {
        Some(regs) if diagnosis.context.idle && !at_entry => {
            error_return::leave_exception(situation, regs, registers, why)
        }
        _ => {
            let (vcpu, registers) = (diagnosis.vcpu, *registers);
            Ok(vec![Action::SetRegisters { vcpu, registers, why }])
        }
    }
}

/// All registers that the exception saved, as it found them.
fn saved(situation: &Situation<'_>, frame: &Frame) -> Result<Registers, Reason> {
    let diagnosis = situation.diagnosis;
    if frame.trust != Trust::SavedRegisters || diagnosis.fault_regs_at.is_none() {
        return Err(Reason::NoSavedRegisters);
    }
    let at_entry = diagnosis.hook.is_some_and(|hook| hook.kind == HookKind::DoubleFault);
    let reporting = diagnosis.frames.iter().take(diagnosis.fault_frame).skip(usize::from(at_entry));
    let not_a_fault = |frame: &Frame| {
        frame.function.as_deref().is_some_and(|name| NOT_FAULTS.contains(&base_name(name)))
    };
    if reporting.into_iter().any(not_a_fault) {
        return Err(Reason::Context { context: "non-maskable exception" });
    }
    let mut registers = Registers::unknown();
    let wanted = Reg::GENERAL.into_iter().chain([Reg::Rip, Reg::Rflags]);
    for reg in wanted {
        let value = frame.registers.get(reg).ok_or_else(|| Reason::UnknownRegister {
            register: reg.name(),
            function: frame.function.clone().unwrap_or_else(|| "the faulting frame".to_owned()),
        })?;
        registers.set(reg, if reg == Reg::Rflags { value & !RFLAGS_RF } else { value });
    }
    Ok(registers)
}

/// Text: all damage to the functions on the stack lies in the instruction that faulted.
fn of_text(
    situation: &Situation<'_>,
    frame: &Frame,
    registers: Registers,
    notes: &mut Vec<String>,
) -> Result<(Registers, String), Reason> {
    let CodeAddress::Exact(rip) = frame.pc else { return Err(Reason::NoSavedRegisters) };
    let was = situation.image.pristine.over(situation.memory);
    let instruction = instructions(situation, &was, rip)?
        .pop()
        .filter(|instruction| instruction.at == rip)
        .ok_or_else(|| no("the fault is not at the start of an instruction of the healthy text"))?;
    let whole = instruction.at..instruction.next();
    let inside = |piece: &Damage| whole.contains(&piece.at) && piece.range().end <= whole.end;
    let (here, elsewhere): (Vec<_>, Vec<_>) =
        situation.diagnosis.damage.iter().filter(|p| p.kind.is_text()).partition(|p| inside(p));
    if here.is_empty() {
        return Err(no("the damaged instruction is not the one that faulted"));
    }
    if let Some(piece) = elsewhere.iter().find(|piece| is_on_stack(situation, piece)) {
        return Err(no(format!("{} is damaged too and may have been executed", piece.place())));
    }
    if !elsewhere.is_empty() {
        notes.push(
            "text that no frame is in was damaged too, and may have been executed".to_owned(),
        );
    }
    match instruction_at(situation.memory, rip) {
        Some(found) if found.mnemonic.starts_with("rep") => {
            return Err(no("the damaged instruction repeats, and may have been done in part"));
        }
        Some(found) if !found.mnemonic.starts_with("ud") => notes.push(format!(
            "the damaged instruction ({}) may have been executed before without a fault",
            found.text
        )),
        _ => {}
    }
    Ok((registers, format!("{} is retried: {}", place(frame), instruction.text)))
}

fn place(frame: &Frame) -> String {
    let name = frame.function.as_deref().unwrap_or("?");
    let offset = frame.function_start.map_or(0, |start| frame.pc.ip() - start);
    format!("{name}+{offset:#x}")
}

/// Whether a function on the stack contains the piece.
fn is_on_stack(situation: &Situation<'_>, piece: &Damage) -> bool {
    let diagnosis = situation.diagnosis;
    let frames = diagnosis.frames.get(diagnosis.fault_frame..).unwrap_or_default();
    let name = |name: &str| base_name(name).to_owned();
    let of_piece = piece.symbol.as_deref().map(name);
    of_piece.is_none() || frames.iter().any(|frame| frame.function.as_deref().map(name) == of_piece)
}

/// The instructions of the function around `at`, from its start up to and with the one at or over `at`.
fn instructions(
    situation: &Situation<'_>,
    memory: &dyn VirtMemory,
    at: GuestVirt,
) -> Result<Vec<Instruction>, Reason> {
    let location =
        situation.image.locate(at).ok_or_else(|| no(format!("{at:#x} is in no known function")))?;
    let mut next = location.start(at);
    let mut found = Vec::new();
    while next <= at && found.len() < INSTRUCTIONS_MAX {
        let instruction = instruction_at(memory, next)
            .ok_or_else(|| no(format!("the instruction at {next:#x} cannot be decoded")))?;
        next = instruction.next();
        found.push(instruction);
    }
    Ok(found)
}

/// IDT: the error code names a damaged gate, whose exception the instruction raises again.
fn of_idt(situation: &Situation<'_>, registers: Registers) -> Result<(Registers, String), Reason> {
    let diagnosis = situation.diagnosis;
    let task = diagnosis.task.as_ref().ok_or(Reason::NoProcess)?;
    let structures = Structures { image: situation.image, memory: situation.memory };
    // Stored by do_trap_no_signal() and gp_try_fixup_and_notify(), arch/x86/kernel/traps.c.
    let code = structures.need(task.at, "task_struct", "thread.error_code")?;
    let table = situation
        .image
        .address_of("idt_table")
        .ok_or_else(|| Reason::MissingFunction { name: "idt_table".to_owned() })?;
    let gates = diagnosis.damage.iter().filter(|piece| piece.kind == PageKind::Idt);
    let mut gates: Vec<u64> =
        gates.flat_map(|piece| [piece.at - table, piece.range().end - table - 1]).collect();
    gates.iter_mut().for_each(|offset| *offset /= GATE);
    // QEMU's TCG (7.2, do_interrupt64()) puts the gate's offset there, not eight times the vector.
    let named = [code >> 3, (code & !7) / GATE];
    let mut named = named.into_iter().filter(|vector| gates.contains(vector));
    let vector = named
        .next()
        .filter(|_| code & ERROR_IDT != 0)
        .ok_or_else(|| no(format!("the error code {code:#x} names no damaged gate of the IDT")))?;
    if named.next().is_some_and(|other| other != vector) {
        return Err(no(format!("the error code {code:#x} may name two damaged gates")));
    }
    if vector >= EXCEPTIONS || NOT_REPEATED.contains(&vector) {
        let source = if code & ERROR_EXTERNAL != 0 { "an interrupt" } else { "an event" };
        return Err(no(format!("vector {vector} is of {source} that does not come again")));
    }
    let why = format!("the instruction that raised vector {vector} is retried");
    Ok((registers, why))
}

/// Read-only data: the word was used by the faulting instruction itself, or as the target of the call that
/// led to the fault.
fn of_data(
    situation: &Situation<'_>,
    frame: &Frame,
    registers: Registers,
) -> Result<(Registers, String), Reason> {
    let damage = &situation.diagnosis.damage;
    let data = |piece: &&Damage| {
        matches!(piece.kind, PageKind::ReadOnlyData | PageKind::ModuleReadOnlyData)
    };
    if damage.iter().any(|piece| piece.kind.is_text()) {
        return Err(no("text is damaged too"));
    }
    let rip = frame.pc.ip();
    if let Some(instruction) =
        instruction_at(situation.memory, rip).filter(|_| situation.image.is_text(rip))
        && !instruction.mnemonic.starts_with("rep")
    {
        let reads = |piece: &Damage| {
            instruction.accesses().any(|(operand, memory)| {
                let start = memory.address(&registers, instruction.next());
                start.is_some_and(|start| {
                    piece.at < start + u64::from(operand.size) && start < piece.range().end
                })
            })
        };
        if damage.iter().filter(data).any(reads) {
            return Ok((registers, format!("{} is retried: {}", place(frame), instruction.text)));
        }
    }
    let mut slots: Vec<GuestVirt> =
        damage.iter().filter(data).map(|piece| piece.at.align_down(8)).collect();
    slots.dedup();
    let calls =
        slots.into_iter().filter_map(|slot| BadCall::of(situation, frame, &registers, slot));
    let calls: Vec<BadCall> = calls.collect();
    let [call] = calls.as_slice() else {
        return Err(no("it is not proven that the damaged word led to the fault"));
    };
    let target = call.target;
    let name = situation.image.locate(target).map_or("?", |location| location.symbol.name);
    let why = format!("the call through the damaged pointer at {:#x} goes to {name}", call.slot);
    let registers = registers.with(Reg::Rip, target.0).with(Reg::Rsp, call.rsp.0);
    Ok((registers, why))
}

/// A call through a damaged pointer that has pushed its return address and faulted at its target.
struct BadCall {
    slot: GuestVirt,
    target: GuestVirt,
    rsp: GuestVirt,
}

impl BadCall {
    /// The call, if it is proven that it took its target from `slot`.
    fn of(
        situation: &Situation<'_>,
        frame: &Frame,
        registers: &Registers,
        slot: GuestVirt,
    ) -> Option<Self> {
        let (image, memory) = (situation.image, situation.memory);
        let bad = memory.read_u64(slot).ok()?;
        let was = image.pristine.over(memory);
        let target = GuestVirt(was.read_u64(slot).ok()?);
        let function = image.locate(target)?;
        if function.offset != 0 && !entry_of_endbr(&was, function.start(target), target) {
            return None;
        }
        let rip = frame.pc.ip();
        let rsp = registers.rsp()?;
        // In a retpoline the target lies on the stack until `ret` takes it.
        let in_thunk = image
            .locate(rip)
            .is_some_and(|found| found.symbol.name.starts_with("__x86_indirect_thunk_"));
        let rsp = match memory.read_u64(rsp).ok()? {
            top if in_thunk && top == bad => rsp + 8,
            _ if in_thunk || rip.0 == bad => rsp,
            _ => return None,
        };
        let back = GuestVirt(memory.read_u64(rsp).ok()?);
        let call = call_before(&was, back)?;
        let code = instructions(situation, &was, call.at).ok()?;
        // rsp moved by the return address: operands on the stack are not computed.
        let before = registers.with(Reg::Rsp, rsp.0.wrapping_add(8));
        let code = Code { instructions: &code, registers: &before, memory };
        let loaded = match target_register(situation, &call) {
            Some(reg) => code.loaded_from(reg)?,
            None => {
                let (_, operand) = call.accesses().next()?;
                operand.address(&before, call.next())?
            }
        };
        (loaded == slot).then_some(Self { slot, target, rsp })
    }
}

/// Whether `target` is behind an `endbr64` at the function's start.
fn entry_of_endbr(memory: &dyn VirtMemory, start: GuestVirt, target: GuestVirt) -> bool {
    target - start == 4 && memory.read_u32(start).ok() == Some(0xfa1e_0ff3)
}

/// The register that a call takes its target from: `call rax`, `call __x86_indirect_thunk_rax`.
fn target_register(situation: &Situation<'_>, call: &Instruction) -> Option<Reg> {
    if let Some(OperandKind::Register { reg, .. }) = call.operands.first().map(|o| &o.kind) {
        return Some(*reg);
    }
    let thunk = situation.image.locate(call.branch_target()?)?;
    if thunk.symbol.name == "__x86_indirect_thunk_array" {
        // 32 bytes each, in the order of encoding (arch/x86/lib/retpoline.S).
        return Reg::GENERAL.get(usize::try_from(thunk.offset / 32).ok()?).copied();
    }
    Reg::from_name(thunk.symbol.name.strip_prefix("__x86_indirect_thunk_")?)
}

/// Straight code up to a call, and the registers at it.
struct Code<'a> {
    instructions: &'a [Instruction],
    registers: &'a Registers,
    memory: &'a dyn VirtMemory,
}

impl Code<'_> {
    /// The address that `reg` was last loaded from before the call, the last instruction.
    fn loaded_from(&self, reg: Reg) -> Option<GuestVirt> {
        let call = self.instructions.len().checked_sub(1)?;
        let load = self.last_write(reg, call)?;
        self.load_address(load, LOADS_MAX)
    }

    /// Index of the last instruction before `before` that changes `reg`.
    fn last_write(&self, reg: Reg, before: usize) -> Option<usize> {
        self.instructions.get(..before)?.iter().rposition(|it| writes(it, reg))
    }

    /// The address that the `mov` at `index` read its register from.
    fn load_address(&self, index: usize, depth: u8) -> Option<GuestVirt> {
        let load = self.instructions.get(index).filter(|load| load.mnemonic == "mov")?;
        let [_, source] = load.operands.as_slice() else { return None };
        let OperandKind::Memory(operand) = source.kind else { return None };
        if operand.segment.is_some() {
            return None;
        }
        let mut registers = Registers::unknown();
        for reg in [operand.base, operand.index].into_iter().flatten() {
            if reg != Reg::Rip {
                registers.set(reg, self.value(reg, index, depth)?);
            }
        }
        operand.address(&registers, load.next())
    }

    /// Value of `reg` before the instruction at `index`: the same as at the call if nothing between changes
    /// it, else what it was loaded with.
    fn value(&self, reg: Reg, index: usize, depth: u8) -> Option<u64> {
        let call = self.instructions.len().checked_sub(1)?;
        match self.last_write(reg, call) {
            Some(last) if last >= index => {
                let load = self.last_write(reg, index)?;
                let at = self.load_address(load, depth.checked_sub(1)?)?;
                self.memory.read_u64(at).ok()
            }
            _ => self.registers.get(reg),
        }
    }
}

/// Whether an instruction may change `reg`. A call may change every register that it need not keep.
fn writes(instruction: &Instruction, reg: Reg) -> bool {
    let named = instruction.operands.iter().any(|operand| {
        operand.write
            && matches!(operand.kind, OperandKind::Register { reg: other, .. } if other == reg)
    });
    let kept = Reg::CALLEE_SAVED.contains(&reg) || reg == Reg::Rsp;
    // Implicit results: multiplication, division, string instructions, exchanges of rax and rdx.
    let implicit = [Reg::Rax, Reg::Rdx, Reg::Rcx, Reg::Rsi, Reg::Rdi].contains(&reg)
        && ["mul", "imul", "div", "idiv", "cdq", "cqo", "cmpxchg", "cpuid", "rdmsr", "rdtsc"]
            .iter()
            .any(|name| instruction.mnemonic.ends_with(name));
    let string = instruction.mnemonic.starts_with("rep");
    named || implicit || string || instruction.mnemonic.ends_with("call") && !kept
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use diagnose::Diagnosis;
    use proptest::prelude::*;
    use repair_image::Pristine;

    use super::*;
    use crate::testing::{MODULE_TEXT, Scene};

    /// In the toy driver's second function: `mov rax, [rbx]`, `call rax`.
    const CODE: [u8; 5] = [0x48, 0x8b, 0x03, 0xff, 0xd0];
    const CALLER: u64 = 0x40;
    const RETURN: u64 = CALLER + 5;
    /// A pointer in the driver's constants, to its third function.
    const SLOT: u64 = 0x2300;
    const TARGET: u64 = 0x80;
    const BAD: u64 = 0xffff_dead_0000_0000;

    /// A call through a pointer whose bytes were damaged: it has pushed its return address and faulted.
    fn bad_call() -> (Scene, Diagnosis) {
        let mut scene = Scene::new();
        scene.machine.poke_virt(MODULE_TEXT + CALLER, &CODE);
        let slot = MODULE_TEXT + SLOT;
        scene.poke_word(slot, (MODULE_TEXT + TARGET).0);
        let mut pristine = Pristine::default();
        for (kind, start) in [
            (PageKind::ModuleText, MODULE_TEXT),
            (PageKind::ModuleReadOnlyData, MODULE_TEXT + 0x2000),
        ] {
            let mut page = [0; 4096];
            scene.machine.space().read(start, &mut page).unwrap();
            pristine = pristine.with(kind, start, &page);
        }
        scene.image.pristine = Arc::new(pristine);
        scene.poke_word(slot, BAD);
        let mut diagnosis = scene.diagnosis();
        let rsp = scene.boundary_rsp.offset(-64);
        scene.poke_word(rsp, (MODULE_TEXT + RETURN).0);
        diagnosis.class = Some(CrashClass::ReadOnlyDataCorruption);
        let frame = &mut diagnosis.frames[1];
        frame.pc = CodeAddress::Exact(GuestVirt(BAD));
        frame.trust = Trust::SavedRegisters;
        for reg in Reg::GENERAL {
            frame.registers.set(reg, 0);
        }
        let registers = [
            (Reg::Rip, BAD),
            (Reg::Rax, BAD),
            (Reg::Rbx, slot.0),
            (Reg::Rsp, rsp.0),
            (Reg::Rflags, 2),
        ];
        registers.into_iter().for_each(|(reg, value)| frame.registers.set(reg, value));
        diagnosis.damage = vec![Damage {
            at: slot,
            kind: PageKind::ModuleReadOnlyData,
            module: Some("toy".to_owned()),
            symbol: None,
            offset: 0,
            found: BAD.to_le_bytes().to_vec(),
            expected: (MODULE_TEXT + TARGET).0.to_le_bytes().to_vec(),
        }];
        (scene, diagnosis)
    }

    fn retry(scene: &Scene, diagnosis: &Diagnosis) -> Result<Registers, Reason> {
        let memory = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &memory, vcpus: &[] };
        let planned = steps(&situation)?;
        match planned.actions.as_slice() {
            [Action::SetRegisters { registers, .. }] => Ok(*registers),
            other => panic!("{other:?}"),
        }
    }

    fn why(scene: &Scene, diagnosis: &Diagnosis) -> String {
        retry(scene, diagnosis).unwrap_err().to_string()
    }

    #[test]
    fn a_call_through_a_damaged_pointer_goes_to_the_right_function() {
        let (scene, diagnosis) = bad_call();
        let registers = retry(&scene, &diagnosis).unwrap();
        assert_eq!(registers.rip(), Some(MODULE_TEXT + TARGET));
        // The return address stays pushed.
        assert_eq!(registers.rsp(), diagnosis.frames[1].registers.rsp());
    }

    #[test]
    fn a_call_that_took_its_target_elsewhere_is_not_retried() {
        let (scene, mut diagnosis) = bad_call();
        diagnosis.frames[1].registers.set(Reg::Rbx, (MODULE_TEXT + SLOT + 8).0);
        assert!(why(&scene, &diagnosis).contains("not proven"));
        let (mut scene, diagnosis) = bad_call();
        // The return address is not behind a call.
        let rsp = diagnosis.frames[1].registers.rsp().unwrap();
        scene.poke_word(rsp, (MODULE_TEXT + CALLER + 3).0);
        assert!(why(&scene, &diagnosis).contains("not proven"));
        let (mut scene, diagnosis) = bad_call();
        // A pointer into the middle of a function was no call's target.
        let kept = Pristine::default().with(
            PageKind::ModuleReadOnlyData,
            MODULE_TEXT + 0x2000,
            &[7; 4096],
        );
        scene.image.pristine = Arc::new(kept);
        assert!(why(&scene, &diagnosis).contains("not proven"));
    }

    #[test]
    fn without_all_saved_registers_nothing_is_retried() {
        let (scene, mut diagnosis) = bad_call();
        diagnosis.frames[1].trust = Trust::Cfi;
        assert!(matches!(retry(&scene, &diagnosis), Err(Reason::NoSavedRegisters)));
        let (scene, mut diagnosis) = bad_call();
        let mut known = Registers::unknown();
        for reg in Reg::GENERAL.into_iter().filter(|&reg| reg != Reg::R9) {
            known.set(reg, 1);
        }
        diagnosis.frames[1].registers = known.with(Reg::Rip, BAD).with(Reg::Rflags, 2);
        let reason = retry(&scene, &diagnosis);
        assert!(
            matches!(reason, Err(Reason::UnknownRegister { register: "r9", .. })),
            "{reason:?}"
        );
    }

    #[test]
    fn an_exception_that_is_no_fault_is_not_retried() {
        for name in NOT_FAULTS {
            let (scene, mut diagnosis) = bad_call();
            diagnosis.frames[0].function = Some(name.to_owned());
            assert!(matches!(retry(&scene, &diagnosis), Err(Reason::Context { .. })), "{name}");
        }
    }

    #[test]
    fn damage_that_explains_nothing_is_no_reason_to_retry() {
        let (scene, mut diagnosis) = bad_call();
        diagnosis.class = Some(CrashClass::NullDereference);
        assert!(why(&scene, &diagnosis).contains("does not explain"));
        let (scene, mut diagnosis) = bad_call();
        let mut text = diagnosis.damage[0].clone();
        (text.at, text.kind) = (MODULE_TEXT + 0x100, PageKind::ModuleText);
        diagnosis.damage.push(text);
        assert!(why(&scene, &diagnosis).contains("text is damaged too"));
    }

    proptest! {
        #[test]
        fn hostile_memory_and_registers_never_panic(
            words in proptest::collection::vec((0u64..0x80, any::<u64>(), any::<bool>()), 1..12),
            code in proptest::collection::vec(any::<u8>(), 1..64),
            class in 0_usize..3,
        ) {
            let (mut scene, mut diagnosis) = bad_call();
            scene.machine.poke_virt(MODULE_TEXT + CALLER, &code);
            for (slot, value, near) in words {
                let value = if near { MODULE_TEXT.0 + (value & 0x2fff) } else { value };
                scene.poke_word(scene.boundary_rsp.offset(-64) + (slot & 7) * 8, value);
                let reg = Reg::GENERAL[(slot >> 3) as usize % Reg::GENERAL.len()];
                diagnosis.frames[1].registers.set(reg, value);
            }
            let classes = [
                CrashClass::TextCorruption,
                CrashClass::IdtCorruption,
                CrashClass::ReadOnlyDataCorruption,
            ];
            diagnosis.class = classes.get(class).cloned();
            if let Ok(registers) = retry(&scene, &diagnosis) {
                let rip = registers.rip().unwrap();
                prop_assert!(rip == GuestVirt(BAD) || scene.image.is_text(rip));
            }
        }
    }
}
