//! A module with debug information, compiled for run-time addresses. Needs `DEFIB_MODULE` (a `.ko` with DWARF):
//! ignored without.

use defib_repair_image::{OrcLayout, SymbolKind, base_name, compile};
use guest::{GuestVirt, LinkAddr};
use object::Object;

#[test]
#[ignore = "needs DEFIB_MODULE"]
fn every_function_has_line_row_and_prototype() {
    let path = std::env::var_os("DEFIB_MODULE").expect("DEFIB_MODULE is set");
    let ko = std::fs::read(path).expect("module");
    let elf = object::File::parse(&*ko).expect("ELF");
    let loaded = [
        ".text",
        ".text.unlikely",
        ".init.text",
        ".exit.text",
        ".data",
        ".rodata",
        ".bss",
        ".orc_unwind_ip",
    ];
    let sections: Vec<(String, GuestVirt)> = (0u64..)
        .zip(loaded)
        .filter(|(_, name)| elf.section_by_name(name).is_some())
        .map(|(index, name)| {
            (name.to_owned(), GuestVirt(0xffff_ffff_c000_0000 + 0x10_0000 * index))
        })
        .collect();
    let header = elf.section_by_name(".orc_header").is_some();
    let start = std::time::Instant::now();
    let knowledge =
        compile::module(&ko, &sections, Some(OrcLayout::by_header(header))).expect("compiles");
    println!("compiled in {:?}", start.elapsed());
    let (mut functions, mut lines, mut rows, mut prototypes) = (0, 0, 0, 0);
    for function in knowledge.functions().filter(|f| f.kind == SymbolKind::Function && f.size > 0) {
        functions += 1;
        let middle = LinkAddr(function.at.0 + function.size / 2);
        let chain = knowledge.source(middle);
        let outer = chain.last().and_then(|frame| frame.function.clone());
        lines += usize::from(outer.as_deref() == Some(base_name(function.name)));
        rows += usize::from(knowledge.unwind_row(middle).is_some());
        prototypes += usize::from(knowledge.prototype(function.name).is_some());
        println!("{} {chain:?} {:?}", function.name, knowledge.prototype(function.name));
    }
    println!(
        "{functions} functions, {lines} with lines, {rows} with rows, {prototypes} prototypes"
    );
    // init_module and cleanup_module are aliases: their lines name the real function.
    assert!(
        functions > 5 && lines + 2 >= functions && rows == functions && prototypes + 2 >= functions
    );
}
