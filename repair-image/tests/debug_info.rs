//! Variables that are read where they are asked for, from what the C compiler of the machine says of an object. What a real
//! kernel's hold is compared with drgn's answers in the end-to-end tests.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use defib_repair_image::{
    Absent, Argument, DebugFile, Error, FrameState, Knowledge, ValueKind, compile,
};
use guest::{GuestPhys, GuestVirt, LinkAddr, MemoryError, Reg, Registers, VirtMemory};

const SOURCE: &str = "
enum speed { SLOW = -1, FAST = 3 };
struct part { int flag; int value; };
extern int keep(void *);
extern int send(const char *name, unsigned char small, int number);

static inline int twice(int number)
{
    int doubled = number * 2;
    return keep(&doubled) + doubled;
}

int run(const char *name, signed char small, enum speed speed, _Bool on, struct part *parts)
{
    struct part local[2] = { { 1, 2 } };
    int sum = twice(small);
    sum += keep(&local);
    return send(name, on, sum) + speed + parts->flag;
}

__attribute__((noinline)) static int inner(long first, long second)
{
    keep(0);
    return first > 3 ? keep(0) : 1;
}

int outer(long given)
{
    int found = inner(given, 77);
    keep(0);
    return found + given;
}
";
const TEXT: u64 = 0xffff_ffff_c000_0000;
const STACK: u64 = 0xffff_c900_0000_0000;

struct Object {
    file: DebugFile,
    knowledge: Knowledge,
}

fn object_file(options: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (source, object) = (folder.path().join("m.c"), folder.path().join("m.o"));
    std::fs::write(&source, SOURCE).unwrap();
    let mut compiler = Command::new("gcc");
    compiler.args(["-O2", "-c", "-fno-pic", "-mcmodel=kernel", "-fno-optimize-sibling-calls"]);
    let status = compiler.arg("-o").args([&object, Path::new(&source)]).args(options).status();
    assert!(status.unwrap().success());
    std::fs::read(object).unwrap()
}

fn compiled(options: &[&str]) -> Object {
    let bytes = object_file(options);
    let sections = [(".text".to_owned(), GuestVirt(TEXT))];
    let knowledge = compile::module(&bytes, &sections, None).unwrap();
    Object { file: DebugFile::module(&bytes, &sections).unwrap(), knowledge }
}

/// Words by their address.
struct Words(HashMap<u64, u64>);

impl VirtMemory for Words {
    fn read(&self, at: GuestVirt, into: &mut [u8]) -> Result<(), MemoryError> {
        let word = self.0.get(&at.0).ok_or(MemoryError::NotMapped { at, level: 1 })?;
        into.copy_from_slice(&word.to_le_bytes()[..into.len()]);
        Ok(())
    }

    fn translate(&self, at: GuestVirt) -> Result<GuestPhys, MemoryError> {
        Err(MemoryError::NotMapped { at, level: 1 })
    }
}

/// Addresses of a function's code.
fn addresses(object: &Object, function: &str) -> std::ops::Range<u64> {
    let symbol = object.knowledge.symbol(function).unwrap();
    symbol.at.0..symbol.at.0 + symbol.size
}

fn check(options: &[&str]) {
    let object = compiled(options);
    let info = object.file.info().unwrap();
    let run = addresses(&object, "run");
    let start = LinkAddr(run.start);
    let registers = Registers::unknown()
        .with(Reg::Rdi, STACK)
        .with(Reg::Rsi, 0xffff_fffb)
        .with(Reg::Rdx, 0xffff_ffff)
        .with(Reg::Rcx, 1);
    let memory = Words(HashMap::new());
    let state = FrameState {
        registers: &registers,
        cfa: Some(GuestVirt(STACK + 0x100)),
        memory: &memory,
        slide: 0,
        passed: &|_| None,
    };
    let in_force = info.at(start).unwrap();
    assert_eq!((in_force.function, in_force.jumps_on), (Some("run"), false));
    let of = |name: &str| {
        let variable = in_force.variables.iter().find(|it| it.name == name).unwrap();
        let held = info.held(&in_force, variable, &state);
        (variable.value_type.name.clone(), variable.value_type.kind, held.map(|it| it.bits))
    };
    assert_eq!(of("name"), ("char *".to_owned(), ValueKind::Text, Ok(Some(STACK))));
    // As many bits as the type has, whatever else is in the register.
    assert_eq!(of("small"), ("signed char".to_owned(), ValueKind::Signed, Ok(Some(0xfb))));
    let speed = in_force.variables.iter().find(|it| it.name == "speed").unwrap();
    assert_eq!(of("speed").1, ValueKind::Enumeration);
    assert_eq!(info.enumerator(&in_force, speed, -1), Some("SLOW"));
    assert_eq!(info.enumerator(&in_force, speed, 3), Some("FAST"));
    assert_eq!(info.enumerator(&in_force, speed, 4), None);
    assert_eq!(of("on"), ("_Bool".to_owned(), ValueKind::Bool, Ok(Some(1))));
    assert_eq!(of("parts"), ("part *".to_owned(), ValueKind::Pointer, Err(Absent::Overwritten)));
    let local = in_force.variables.iter().find(|it| it.name == "local").unwrap();
    let local = info.held(&in_force, local, &state).unwrap();
    assert!(local.at.is_some_and(|at| at < GuestVirt(STACK + 0x100)) && local.bits.is_none());

    // Those of the inlined function come before those of the function around it, and say whose they are.
    let inlined = run
        .clone()
        .filter_map(|at| info.at(LinkAddr(at)))
        .find(|found| found.variables.first().is_some_and(|first| first.inlined == Some("twice")));
    let inlined = inlined.expect("code of the inlined function");
    assert!(inlined.variables.iter().any(|it| it.name == "doubled" && it.inlined.is_some()));
    assert!(inlined.variables.iter().any(|it| it.name == "name" && it.inlined.is_none()));

    // What the caller has passed on is known where it keeps it.
    let outer = addresses(&object, "outer");
    let registers = Reg::CALLEE_SAVED
        .into_iter()
        .fold(Registers::unknown(), |registers, reg| registers.with(reg, 0x99));
    let state = FrameState { registers: &registers, ..state };
    let passed = |callee: &str, argument: Argument<'_>| {
        let mut found =
            outer.clone().filter_map(|at| info.passed(LinkAddr(at), callee, argument, &state));
        found.next()
    };
    assert_eq!(passed("inner", Argument::In(Reg::Rdi)), Some(0x99));
    // The function is copied for the only number that it is called with.
    assert_eq!(passed("inner", Argument::Named("second")), Some(77));
    assert_eq!(passed("run", Argument::In(Reg::Rdi)), None, "another function is called there");
    assert!(info.at(LinkAddr(outer.end + 0x1000)).is_none());
}

#[test]
fn of_dwarf_5() {
    check(&["-gdwarf-5"]);
}

#[test]
fn without_debug_information_there_is_none() {
    let bytes = object_file(&["-g0"]);
    assert!(matches!(DebugFile::module(&bytes, &[]), Err(Error::MissingSection { .. })));
    assert!(DebugFile::module(&bytes[..bytes.len() / 2], &[]).is_err());
}
