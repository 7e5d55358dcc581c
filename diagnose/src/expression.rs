//! The operand of an instruction as an expression of the source, `s->p->flag`, by the places of variables that debug
//! information gives. What can't be told for certain gets no expression; the words around it are `explain.rs`'s.

use guest::{GuestVirt, LinkAddr, Reg};
use repair_image::{Knowledge, TypeShape, Variable, VariableLocation};

use crate::Frame;
use crate::code::op::{Action, Address, Op, Place};
use crate::code::{MemoryOperand, Segment, block_before};
use crate::kernel::Kernel;

/// Most loads that are followed from a variable to the pointer that was used.
const MAX_LOADS: u8 = 4;

/// An operand in the words of the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expression {
    /// What was accessed: `s->p->flag`.
    pub(crate) accessed: Option<String>,
    /// Its base register and the pointer that this holds: `s->p`.
    pub(crate) pointer: Option<(Reg, String)>,
}

/// An expression and its type.
#[derive(Clone, Debug)]
struct Value {
    text: String,
    shape: TypeShape,
}

/// An instruction, with the instructions that have run before it whatever way led to it.
struct Code<'a> {
    kernel: &'a Kernel<'a>,
    frame: &'a Frame,
    knowledge: &'a Knowledge,
    at: GuestVirt,
    block: Vec<(u64, Op)>,
}

/// The memory operand of the instruction at `at` in `frame`, which ends at `next`.
pub(crate) fn of_operand(
    kernel: &Kernel<'_>,
    frame: &Frame,
    at: GuestVirt,
    next: GuestVirt,
    operand: &MemoryOperand,
) -> Expression {
    let Some(code) = Code::new(kernel, frame, at) else { return Expression::default() };
    if matches!(operand.segment, Some(Segment::Fs | Segment::Gs)) {
        return Expression::default();
    }
    let end = code.block.len();
    let (Some(base), false) = (operand.base, operand.base == Some(Reg::Rip)) else {
        let at = operand.address(&frame.registers, next).filter(|_| operand.index.is_none());
        let found = at.map(|at| code.values_at(Address::Absolute(at.0), end, MAX_LOADS));
        let accessed = found.into_iter().flatten().next().map(|value| value.text);
        return Expression { accessed, pointer: None };
    };
    let pointers = code.values_in(base, end, MAX_LOADS);
    let mut expression = Expression {
        accessed: None,
        pointer: pointers.first().map(|pointer| (base, pointer.text.clone())),
    };
    if operand.index.is_some() {
        return expression;
    }
    for pointer in &pointers {
        if let Some(accessed) = code.dereferenced(pointer, operand.disp) {
            expression.pointer = Some((base, pointer.text.clone()));
            expression.accessed = Some(accessed.text);
            return expression;
        }
    }
    if pointers.is_empty() {
        let found = code.on_stack(base, operand.disp, end);
        expression.accessed = found.into_iter().next().map(|value| value.text);
    }
    expression
}

/// The pointer that a register holds before the instruction at `at` in `frame`.
pub(crate) fn of_register(
    kernel: &Kernel<'_>,
    frame: &Frame,
    at: GuestVirt,
    reg: Reg,
) -> Option<String> {
    let code = Code::new(kernel, frame, at)?;
    let found = code.values_in(reg, code.block.len(), MAX_LOADS);
    found.into_iter().next().map(|value| value.text)
}

/// Whether an instruction may change a register. A function that is called preserves some.
fn writes(op: &Op, reg: Reg) -> bool {
    let is = |place: Place| matches!(place, Place::Reg(own, _) | Place::High(own) if own == reg);
    match op.action {
        Action::Move(to, _) | Action::Add(to, _) | Action::And(to, _) => is(to),
        Action::Lea(own, ..) | Action::Zero(own) => own == reg,
        Action::Pop(to) => is(to) || reg == Reg::Rsp,
        Action::Push(_) | Action::PushFlags | Action::PopFlags => reg == Reg::Rsp,
        Action::Leave => matches!(reg, Reg::Rsp | Reg::Rbp),
        Action::Call(_) => reg != Reg::Rsp && !Reg::CALLEE_SAVED.contains(&reg),
        Action::Clobber { regs, .. } => {
            u32::from(regs).checked_shr(reg as u32).unwrap_or(1) & 1 == 1
        }
        Action::Nop
        | Action::Cli
        | Action::Sti
        | Action::Test(..)
        | Action::Compare(..)
        | Action::Jump(_)
        | Action::Branch(..)
        | Action::Stop
        | Action::Trap => false,
    }
}

impl<'a> Code<'a> {
    /// `None` where no variables are known: outside of modules with debug information.
    fn new(kernel: &'a Kernel<'a>, frame: &'a Frame, at: GuestVirt) -> Option<Self> {
        let knowledge = &*kernel.image.module_of_text(at)?.knowledge;
        if !knowledge.has_source() && knowledge.variables_at(LinkAddr(at.0)).is_empty() {
            return None;
        }
        let block = block_before(kernel.image, kernel.memory, at);
        Some(Self { kernel, frame, knowledge, at, block })
    }

    /// The variables before the instruction of that number in the block, innermost scope first.
    fn variables(&self, step: usize) -> Vec<Variable> {
        let at = self.block.get(step).map_or(self.at.0, |(at, _)| *at);
        self.knowledge.variables_at(LinkAddr(at))
    }

    /// Whether the register has kept its value from that instruction on.
    fn unchanged(&self, reg: Reg, step: usize) -> bool {
        self.block.iter().skip(step).all(|(_, op)| !writes(op, reg))
    }

    /// The pointers that a register may be called by before an instruction of the block.
    fn values_in(&self, reg: Reg, step: usize, loads: u8) -> Vec<Value> {
        let variables = self.variables(step).into_iter();
        let held = variables.filter(|variable| {
            variable.location == VariableLocation::Register(reg)
                && matches!(variable.shape, TypeShape::Pointer { .. })
        });
        let held: Vec<Value> =
            held.map(|variable| Value { text: variable.name, shape: variable.shape }).collect();
        let before = self.block.get(..step).unwrap_or_default();
        let writer = before.iter().rposition(|(_, op)| writes(op, reg));
        let (true, Some(loads), Some(writer)) = (held.is_empty(), loads.checked_sub(1), writer)
        else {
            return held;
        };
        match before.get(writer).map(|(_, op)| op.action) {
            Some(Action::Move(Place::Reg(_, 8), Place::Reg(from, 8))) => {
                self.values_in(from, writer, loads)
            }
            Some(Action::Move(Place::Reg(_, 8), Place::Mem(address, 8)))
                if !self.contradicted(writer, reg, address) =>
            {
                let mut loaded = self.values_at(address, writer, loads);
                loaded.retain(|value| matches!(value.shape, TypeShape::Pointer { .. }));
                loaded
            }
            _ => Vec::new(),
        }
    }

    /// What lies at an address, in the registers before an instruction of the block.
    fn values_at(&self, address: Address, step: usize, loads: u8) -> Vec<Value> {
        match address {
            Address::Absolute(at) => {
                let variables = self.variables(step).into_iter();
                let found = variables.filter_map(|variable| match variable.location {
                    VariableLocation::Address(start) => {
                        self.part(&variable, at.checked_sub(start.0)?)
                    }
                    _ => None,
                });
                found.collect()
            }
            Address::Based(base, disp) => {
                let pointers = self.values_in(base, step, loads);
                if pointers.is_empty() {
                    return self.on_stack(base, disp, step);
                }
                pointers.iter().filter_map(|pointer| self.dereferenced(pointer, disp)).collect()
            }
            Address::PerCpu(offset) if Some(offset) == self.current_offset() => {
                let shape = TypeShape::Pointer { to: Some("task_struct".to_owned()) };
                vec![Value { text: "current".to_owned(), shape }]
            }
            Address::PerCpu(_) | Address::Unknown => Vec::new(),
        }
    }

    /// Where `current` is in the per-CPU area: a variable of its own, but a member of `struct pcpu_hot` from commit
    /// e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct", v6.2) up to v6.14.
    fn current_offset(&self) -> Option<u64> {
        let image = self.kernel.image;
        let in_hot = || {
            let member = image.types.member("pcpu_hot", "current_task")?;
            image.per_cpu_offset("pcpu_hot")?.checked_add(member.offset)
        };
        image.per_cpu_offset("current_task").or_else(in_hot)
    }

    /// Variables in memory around a base register: parts of the stack frame.
    fn on_stack(&self, base: Reg, disp: i64, step: usize) -> Vec<Value> {
        let value = self.frame.registers.get(base).filter(|_| self.unchanged(base, step));
        let from_cfa = value.zip(self.frame.cfa).map(|(value, cfa)| {
            // Both are addresses of one stack, their difference is small and may be negative.
            value.wrapping_add_signed(disp).wrapping_sub(cfa.0).cast_signed()
        });
        let variables = self.variables(step).into_iter();
        let found = variables.filter_map(|variable| {
            let offset = match variable.location {
                VariableLocation::AtRegister(reg, start) if reg == base => {
                    disp.checked_sub(i64::from(start))?
                }
                VariableLocation::AtCfa(start) => from_cfa?.checked_sub(i64::from(start))?,
                _ => return None,
            };
            self.part(&variable, u64::try_from(offset).ok()?)
        });
        found.collect()
    }

    /// What lies at an offset of a variable that is kept in memory.
    fn part(&self, variable: &Variable, offset: u64) -> Option<Value> {
        match &variable.shape {
            TypeShape::Aggregate { name, size } if offset < *size => {
                let (path, shape) = self.member_at(name, offset)?;
                Some(Value { text: format!("{}.{path}", variable.name), shape })
            }
            TypeShape::Pointer { .. } if offset == 0 => {
                Some(Value { text: variable.name.clone(), shape: variable.shape.clone() })
            }
            _ => None,
        }
    }

    /// What lies at an offset from where a pointer points to.
    fn dereferenced(&self, pointer: &Value, disp: i64) -> Option<Value> {
        let TypeShape::Pointer { to: Some(to) } = &pointer.shape else { return None };
        let offset = u64::try_from(disp).ok()?;
        if let Some((path, shape)) = self.member_at(to, offset) {
            return Some(Value { text: format!("{}->{path}", pointer.text), shape });
        }
        // Of no structure, or of one whose members share that place.
        let whole = || Value { text: format!("*{}", pointer.text), shape: TypeShape::Other };
        (offset == 0).then(whole)
    }

    /// By the module's own debug information; the kernel's types are asked about those that it doesn't have.
    fn member_at(&self, structure: &str, offset: u64) -> Option<(String, TypeShape)> {
        if self.knowledge.knows_type(structure) {
            return self.knowledge.member_at(structure, offset);
        }
        self.kernel.image.types.member_at(structure, offset)
    }

    /// Whether memory that a register was loaded from holds something else by now.
    fn contradicted(&self, load: usize, reg: Reg, address: Address) -> bool {
        let registers = &self.frame.registers;
        let at = match address {
            Address::Absolute(at) => Some(at),
            Address::Based(base, disp) if self.unchanged(base, load) => {
                registers.get(base).map(|base| base.wrapping_add_signed(disp))
            }
            _ => None,
        };
        let now = at.and_then(|at| self.kernel.memory.read_u64(GuestVirt(at)).ok());
        let loaded = registers.get(reg).filter(|_| self.unchanged(reg, load.saturating_add(1)));
        now.zip(loaded).is_some_and(|(now, loaded)| now != loaded)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;

    use guest::fake::PageSize;
    use guest::{CodeAddress, GuestPhys, Registers};
    use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget};
    use repair_image::compile;

    use super::*;
    use crate::code::{Instruction, instruction_at};
    use crate::testing::{FakeTypes, Guest, MODULE, frame};

    fn of(guest: &mut Guest, at: u64, registers: Registers) -> Expression {
        let image = guest.image();
        let space = guest.machine.space();
        of_image(&Kernel::new(&image, &space, &registers), at, registers)
    }

    fn of_image(kernel: &Kernel<'_>, at: u64, registers: Registers) -> Expression {
        let mut frame = frame("f", Some("m"));
        frame.pc = CodeAddress::Exact(GuestVirt(at));
        frame.registers = registers;
        frame.cfa = registers.get(Reg::Rsp).map(|rsp| GuestVirt(rsp + 8));
        let instruction = instruction_at(kernel.memory, GuestVirt(at)).unwrap();
        let (_, operand) = instruction.accesses().next().unwrap();
        of_operand(kernel, &frame, instruction.at, instruction.next(), operand)
    }

    /// A gauge in rdi, over code that loads its `calibration` into rax and reads from there.
    fn gauge(code: &[u8]) -> Guest {
        let mut guest = Guest::new()
            .function("f", MODULE, code.len() as u64)
            .pointer("g", "gauge", Reg::Rdi, MODULE..MODULE + 0x100)
            .types(|types| {
                let types = types.with("calibration", "gain", 4, 4);
                types.pointer("gauge", "calibration", 8, "calibration")
            });
        guest.poke(MODULE, code);
        guest
    }

    fn named(accessed: &str, reg: Reg, pointer: &str) -> Expression {
        Expression { accessed: Some(accessed.to_owned()), pointer: Some((reg, pointer.to_owned())) }
    }

    // mov rax, [rdi+8]; mov eax, [rax+4]; ret
    const STRAIGHT: &[u8] = &[0x48, 0x8b, 0x47, 8, 0x8b, 0x40, 4, 0xc3];

    #[test]
    fn a_pointer_is_followed_to_where_it_was_loaded_from() {
        let registers = Registers::unknown().with(Reg::Rax, 0);
        let found = of(&mut gauge(STRAIGHT), MODULE, registers);
        assert_eq!(found, named("g->calibration", Reg::Rdi, "g"));
        let found = of(&mut gauge(STRAIGHT), MODULE + 4, registers);
        assert_eq!(found, named("g->calibration->gain", Reg::Rax, "g->calibration"));
        // mov rax, rdi; mov rax, [rax+8]; push rbx; mov eax, [rax+4]; ret
        let moved = [0x48, 0x89, 0xf8, 0x48, 0x8b, 0x40, 8, 0x53, 0x8b, 0x40, 4, 0xc3];
        let found = of(&mut gauge(&moved), MODULE + 8, registers);
        assert_eq!(found, named("g->calibration->gain", Reg::Rax, "g->calibration"));
    }

    #[test]
    fn the_innermost_variable_names_the_pointer() {
        let registers = Registers::unknown().with(Reg::Rax, 0);
        let inner = MODULE + 4..MODULE + 7;
        let mut guest = gauge(STRAIGHT).pointer("c", "calibration", Reg::Rax, inner.clone());
        assert_eq!(of(&mut guest, MODULE + 4, registers), named("c->gain", Reg::Rax, "c"));
        // A scalar is not a structure.
        let mut guest = gauge(STRAIGHT).pointer("n", "int", Reg::Rax, inner);
        let found = of(&mut guest, MODULE + 4, registers);
        assert_eq!(found.pointer, Some((Reg::Rax, "n".to_owned())));
        assert_eq!(found.accessed, None);
    }

    #[test]
    fn the_current_task_is_known_by_its_place() {
        // mov rax, gs:[0x40]; mov eax, [rax+0x10]; ret
        let code = [0x65, 0x48, 0x8b, 4, 0x25, 0x40, 0, 0, 0, 0x8b, 0x40, 0x10, 0xc3];
        let registers = Registers::unknown().with(Reg::Rax, 0);
        let old = gauge(&code).object("current_task", 0x40);
        let hot = |types: FakeTypes| types.with("pcpu_hot", "current_task", 0, 8);
        let new = gauge(&code).object("pcpu_hot", 0x40).types(hot);
        for mut guest in [old, new] {
            let found = of(&mut guest, MODULE + 9, registers);
            assert_eq!(found, named("current->flags", Reg::Rax, "current"));
        }
        let mut other = gauge(&code).object("current_task", 0x48);
        assert_eq!(of(&mut other, MODULE + 9, registers), Expression::default());
    }

    #[test]
    fn in_doubt_there_is_no_expression() {
        let registers = Registers::unknown().with(Reg::Rax, 0);
        // test esi, esi; je to the last mov; then as before: two ways lead to the read.
        let joined = [&[0x85, 0xf6, 0x74, 4], STRAIGHT].concat();
        assert_eq!(of(&mut gauge(&joined), MODULE + 8, registers), Expression::default());
        // A call (to itself) between load and read changes rax.
        let call = [0x48, 0x8b, 0x47, 8, 0xe8, 0xf7, 0xff, 0xff, 0xff, 0x8b, 0x40, 4, 0xc3];
        assert_eq!(of(&mut gauge(&call), MODULE + 9, registers), Expression::default());
        // lea rax, [rdi+8] is no load; movzx loads no pointer.
        let lea = [0x48, 0x8d, 0x47, 8, 0x8b, 0x40, 4, 0xc3];
        assert_eq!(of(&mut gauge(&lea), MODULE + 4, registers), Expression::default());
        // jmp rcx behind it may lead into the middle of the block.
        let indirect = [0x48, 0x8b, 0x47, 8, 0x8b, 0x40, 4, 0xff, 0xe1];
        assert_eq!(of(&mut gauge(&indirect), MODULE + 4, registers), Expression::default());
        // The member holds another value by now than the one that was loaded.
        let registers = registers.with(Reg::Rdi, MODULE + 0x900);
        let mut guest = gauge(STRAIGHT);
        guest.poke_u64(MODULE + 0x908, 1);
        assert_eq!(of(&mut guest, MODULE + 4, registers), Expression::default());
        guest = gauge(STRAIGHT);
        assert_ne!(of(&mut guest, MODULE + 4, registers), Expression::default());
    }

    const SOURCE: &str = "
        struct calibration { int offset, gain; };
        struct gauge { long id; struct calibration *calibration; int samples[8];
                       struct calibration own; int (*convert)(int); };
        struct gauge *the_gauge;
        extern void keep(void *);
        static inline int corrected(const struct gauge *g)
        { return *(volatile int *)&g->calibration->gain; }
        int inlined(struct gauge *g) { return corrected(g); }
        int global(void) { return the_gauge->samples[3]; }
        int scalar(int *number) { return *number; }
        int nested(struct gauge *g) { return g->own.gain; }
        int indexed(struct gauge *g, long i) { return g->samples[i]; }
        int called(struct gauge *g) { return g->convert(1) + 1; }
    ";
    const BSS: u64 = MODULE + 0x900;

    /// The object of the source with its `.text` at `MODULE`, and its knowledge.
    fn compiled() -> (Vec<u8>, Knowledge) {
        let folder = std::env::temp_dir().join(format!("expression-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, path) = (folder.join("m.c"), folder.join("m.o"));
        std::fs::write(&source, SOURCE).unwrap();
        let mut compiler = Command::new("gcc");
        compiler.args(["-g", "-O2", "-c", "-fno-pic", "-mcmodel=kernel", "-o"]);
        assert!(compiler.args([&path, &source]).status().unwrap().success());
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let sections = [(".text", MODULE), (".bss", BSS)];
        let sections = sections.map(|(name, at)| (name.to_owned(), GuestVirt(at)));
        let knowledge = compile::module(&bytes, &sections, None).unwrap();
        let elf = object::File::parse(&*bytes).unwrap();
        let text = elf.section_by_name(".text").unwrap();
        let mut code = text.data().unwrap().to_vec();
        for (offset, relocation) in text.relocations() {
            let RelocationTarget::Symbol(symbol) = relocation.target() else { continue };
            let symbol = elf.symbol_by_index(symbol).unwrap();
            let section = symbol.section_index().map(|it| elf.section_by_index(it).unwrap());
            let section = section.and_then(|it| it.name().map(str::to_owned).ok());
            if section.as_deref() == Some(".bss") {
                let to = BSS + symbol.address();
                let value =
                    to.wrapping_add_signed(relocation.addend()).wrapping_sub(MODULE + offset);
                let place = offset as usize..offset as usize + 4;
                code[place].copy_from_slice(&(value as u32).to_le_bytes());
            }
        }
        (code, knowledge)
    }

    /// The last instruction of a function that accesses memory and is no `ret`.
    fn last_access(kernel: &Kernel<'_>, function: &str) -> Instruction {
        let symbol = kernel.image.modules[0].knowledge.symbol(function).unwrap();
        let (mut at, end) = (GuestVirt(symbol.at.0), GuestVirt(symbol.at.0 + symbol.size));
        let mut last = None;
        while at < end {
            let instruction = instruction_at(kernel.memory, at).unwrap();
            at = instruction.next();
            if instruction.accesses().next().is_some() {
                last = Some(instruction);
            }
        }
        last.unwrap()
    }

    #[test]
    fn of_what_a_compiler_made() {
        let (code, knowledge) = compiled();
        let mut guest = Guest::new();
        guest.poke(MODULE, &code);
        let mut image = guest.image();
        image.modules[0].knowledge = Arc::new(knowledge);
        let space = guest.machine.space();
        let registers = Registers::unknown();
        let kernel = Kernel::new(&image, &space, &registers);
        let said = |function| {
            let found = of_image(&kernel, last_access(&kernel, function).at.0, registers);
            let pointer = found.pointer.map(|(_, text)| text).unwrap_or_default();
            format!("{} by {pointer}", found.accessed.unwrap_or_default())
        };
        assert_eq!(said("inlined"), "g->calibration->gain by g->calibration");
        assert_eq!(said("global"), "the_gauge->samples[3] by the_gauge");
        assert_eq!(said("scalar"), "*number by number");
        assert_eq!(said("nested"), "g->own.gain by g");
        assert_eq!(said("indexed"), " by g");
        assert_eq!(said("called"), "g->convert by g");
    }

    /// Share of the operands of a module that get an expression, and what they are. Needs `DEFIB_MODULE` (a `.ko` with
    /// DWARF).
    #[test]
    #[ignore = "needs DEFIB_MODULE"]
    fn of_a_module() {
        const AT: u64 = MODULE + 0x10_0000;
        let bytes = std::fs::read(std::env::var_os("DEFIB_MODULE").unwrap()).unwrap();
        let elf = object::File::parse(&*bytes).unwrap();
        let names = [".text", ".data", ".rodata", ".bss"];
        let sections: Vec<_> = (0..)
            .zip(names)
            .map(|(n, name)| (name.to_owned(), GuestVirt(AT + n * 0x10_0000)))
            .collect();
        let start = std::time::Instant::now();
        let knowledge = compile::module(&bytes, &sections, None).unwrap();
        println!("compiled in {:?}", start.elapsed());
        let code = elf.section_by_name(".text").unwrap().data().unwrap();
        let mut guest = Guest::new();
        for page in 0..(code.len() as u64).div_ceil(4096) {
            let (at, to) = (GuestVirt(AT + page * 4096), GuestPhys(0x80_0000 + page * 4096));
            guest.machine.map(at, to, PageSize::Size4K);
        }
        guest.poke(AT, code);
        let mut image = guest.image();
        image.modules[0].text = vec![GuestVirt(AT)..GuestVirt(AT + code.len() as u64)];
        image.modules[0].knowledge = Arc::new(knowledge);
        let space = guest.machine.space();
        let registers = Registers::unknown();
        let kernel = Kernel::new(&image, &space, &registers);
        let (mut operands, mut named) = (0, 0);
        for function in image.modules[0].knowledge.functions() {
            let (mut at, end) = (function.at.0, function.at.0 + function.size);
            while at < end {
                let Some(instruction) = instruction_at(kernel.memory, GuestVirt(at)) else { break };
                let next = instruction.next().0;
                let memory = instruction.accesses().next().map(|(_, memory)| *memory);
                if memory.is_some_and(|memory| {
                    ![None, Some(Reg::Rip), Some(Reg::Rsp)].contains(&memory.base)
                }) {
                    let found = of_image(&kernel, at, registers);
                    operands += 1;
                    named += usize::from(found.accessed.is_some());
                    println!(
                        "{}+{:#x} {instruction}: {found:?}",
                        function.name,
                        at - function.at.0
                    );
                }
                at = next;
            }
        }
        println!("{named} of {operands} operands have an expression");
        assert!(named > 0);
    }
}
