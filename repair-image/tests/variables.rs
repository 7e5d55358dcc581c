//! Variables of a compiled object, by the debug information of the C compiler of the machine. What is made of them in an
//! explanation is tested where explanations are.

use std::path::Path;
use std::process::Command;

use defib_repair_image::{Knowledge, TypeShape, Variable, VariableLocation, compile};
use guest::{GuestVirt, LinkAddr, Reg};

const SOURCE: &str = "
struct part { int flag; int value; };
typedef struct { unsigned low : 4, high : 4; } bits_t;
struct device {
    long id;
    struct part *part;
    struct part list[3];
    union { int number; struct { short a, b; } halves; };
    bits_t bits;
    struct device *next;
    unsigned char data[];
};
struct device *the_device;
extern void keep(void *);

static inline int value_of(const struct part *part)
{
    return part->flag > 3 ? part->value * part->flag : 7;
}

int read_value(struct device *dev, int factor)
{
    return value_of(dev->part) * factor;
}

long on_stack(struct device *dev)
{
    struct part local = { 1, 2 };
    static struct part fixed;

    keep(&local);
    keep(&fixed);
    return dev->id;
}
";

const TEXT: u64 = 0xffff_ffff_c000_0000;
const BSS: u64 = 0xffff_ffff_c001_0000;

fn compiled(options: &[&str]) -> Knowledge {
    let folder = tempfile::tempdir().unwrap();
    let (source, object) = (folder.path().join("m.c"), folder.path().join("m.o"));
    std::fs::write(&source, SOURCE).unwrap();
    let mut compiler = Command::new("gcc");
    compiler.args(["-O2", "-c", "-fno-pic", "-mcmodel=kernel", "-fno-omit-frame-pointer", "-o"]);
    let status = compiler.args([&object, Path::new(&source)]).args(options).status();
    assert!(status.unwrap().success());
    let sections =
        [(".text", TEXT), (".bss", BSS)].map(|(name, at)| (name.to_owned(), GuestVirt(at)));
    compile::module(&std::fs::read(object).unwrap(), &sections, None).unwrap()
}

fn at(knowledge: &Knowledge, function: &str, offset: u64, name: &str) -> Option<Variable> {
    let start = knowledge.symbol(function).unwrap().at;
    knowledge.variables_at(start + offset).into_iter().find(|variable| variable.name == name)
}

fn check(knowledge: &Knowledge) {
    let device = TypeShape::Pointer { to: Some("device".to_owned()) };
    let dev = at(knowledge, "read_value", 0, "dev").unwrap();
    assert_eq!(dev.shape, device);
    assert_eq!(dev.location, VariableLocation::Register(Reg::Rdi));
    // An integer leads to no member.
    assert_eq!(at(knowledge, "read_value", 0, "factor"), None);

    // The parameter of the inlined function comes before those of the function around it.
    let function = knowledge.symbol("read_value").unwrap();
    let inlined = (0..function.size)
        .map(|offset| knowledge.variables_at(function.at + offset))
        .find(|found| found.iter().any(|variable| variable.name == "part"))
        .unwrap();
    assert_eq!(inlined[0].name, "part");
    assert!(matches!(inlined[0].location, VariableLocation::Register(_)));

    let local = at(knowledge, "on_stack", 0x10, "local").unwrap();
    let name = "part".to_owned();
    assert_eq!(local.shape, TypeShape::Aggregate { name, size: 8 });
    assert!(matches!(local.location, VariableLocation::AtCfa(offset) if offset < 0), "{local:?}");
    let global = at(knowledge, "read_value", 0, "the_device").unwrap();
    let symbol = knowledge.symbol("the_device").unwrap().at;
    assert_eq!(global.location, VariableLocation::Address(GuestVirt(symbol.0)));
    assert!(at(knowledge, "on_stack", 0, "fixed").is_some());
    assert_eq!(at(knowledge, "read_value", 0, "fixed"), None);
    assert!(knowledge.variables_at(LinkAddr(TEXT - 1)).iter().all(|it| it.name == "the_device"));

    let member = |offset| knowledge.member_at("device", offset).map(|(path, _)| path);
    assert_eq!(
        knowledge.member_at("device", 8).unwrap().1,
        TypeShape::Pointer { to: Some("part".to_owned()) }
    );
    assert_eq!(member(28).as_deref(), Some("list[1].value"));
    assert_eq!(member(40), None, "several members of the union lie there");
    assert_eq!(member(44).as_deref(), Some("bits"));
    assert_eq!(member(48).as_deref(), Some("next"));
    assert_eq!(member(56), None, "behind the end");
    assert_eq!(knowledge.member_at("part", 4).unwrap().0, "value");
    assert!(knowledge.knows_type("part") && !knowledge.knows_type("inode"));
}

#[test]
fn of_dwarf_5() {
    check(&compiled(&["-gdwarf-5"]));
}

#[test]
fn of_dwarf_4() {
    check(&compiled(&["-gdwarf-4"]));
}

#[test]
fn without_debug_information_there_are_none() {
    let knowledge = compiled(&["-g0"]);
    let start = knowledge.symbol("read_value").unwrap().at;
    assert!(knowledge.variables_at(start).is_empty() && !knowledge.knows_type("device"));
}
