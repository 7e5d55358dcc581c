//! What must hold of reading a guest's memory: page tables, VMCOREINFO, kallsyms, the whole guest layer.

use guest::fake::{FakeMachine, PageSize};
use guest::{AddressSpace, GuestPhys, GuestVirt, PhysMemory, VirtMemory};
use repair_image::{
    GuestLayer, KallsymsTables, KernelFacts, KernelText, Located, Vmcoreinfo,
    knowledge_from_memory, verify, without_files,
};

use crate::input::Input;

/// RAM of the machine whose page tables are the fuzzer's, bytes.
const TABLES_RAM: u64 = 64 << 10;
/// RAM of the machine that holds a kernel, bytes.
const KERNEL_RAM: u64 = 256 << 10;
/// Bytes of it that the fuzzer fills; page tables are at the top.
const KERNEL_SIZE: u64 = 64 << 10;
/// Where the kernel's first byte is mapped, guest-virtual.
pub const KERNEL: GuestVirt = GuestVirt(0xffff_ffff_8100_0000);

/// Page tables: what is mapped is canonical, in a page of a known size, and read as its pages are.
///
/// # Panics
/// When that does not hold.
pub fn page_tables(data: &[u8]) {
    let mut input = Input::new(data);
    let (flags, root, at) = (input.u8(), input.u64(), GuestVirt(input.u64()));
    let five_level = flags & 1 != 0;
    let mut machine = FakeMachine::new(TABLES_RAM, five_level);
    let rest = input.rest();
    machine.poke(GuestPhys(0), rest.get(..TABLES_RAM as usize).unwrap_or(rest));
    let space = AddressSpace::new(machine.memory(), GuestPhys(root), five_level);
    let Ok(mapping) = space.walk(at) else {
        assert!(space.read_u8(at).is_err());
        return;
    };
    assert!(at.is_canonical(five_level));
    assert!([12, 21, 30].map(|shift| 1 << shift).contains(&mapping.page_size));
    assert_eq!(mapping.phys.0 % mapping.page_size, at.0 % mapping.page_size);
    assert!(mapping.entry & 1 == 1 && mapping.entry_at.0 < TABLES_RAM);
    assert_eq!(machine.memory().read_u64(mapping.entry_at), Ok(mapping.entry));
    assert_eq!(space.translate(at), Ok(mapping.phys));
    let mut direct = [0];
    let in_ram = machine.memory().read(mapping.phys, &mut direct).is_ok();
    assert_eq!(space.read_u8(at).ok(), in_ram.then_some(direct[0]));
    let mut both = [0; 600];
    if space.read(at, &mut both).is_ok() {
        for index in [0, 1, 255, 599] {
            assert_eq!(space.read_u8(at + index as u64), Ok(both[index]));
        }
    }
    if let Ok(text) = space.read_cstr(at, 600) {
        assert!(text.len() <= 3 * 600);
    }
}

/// VMCOREINFO text: every entry has a line in it.
///
/// # Panics
/// When that does not hold.
pub fn vmcoreinfo(data: &[u8]) {
    let Some(info) = Vmcoreinfo::parse(data) else { return };
    assert!(data.starts_with(b"OSRELEASE="));
    let text = String::from_utf8_lossy(data);
    for key in text.lines().filter_map(|line| Some(line.split_once('=')?.0)).take(200) {
        if let Some(value) = info.get(key) {
            assert!(text.contains(&format!("{key}={value}")));
        }
        let _ = info.symbol(key);
        let _ = info.number(key);
    }
    for value in [info.release(), info.build_id()].into_iter().flatten() {
        assert!(text.contains(value));
    }
    let _ = (info.slide(), info.top_page_table(), info.five_level());
    // Its tables lie nowhere: that is an error.
    let machine = FakeMachine::new(16 << 10, false);
    if let Ok(tables) = KallsymsTables::from_vmcoreinfo(&info) {
        assert!(tables.read(&machine.space()).is_err());
    }
}

/// A machine with `data` at the start of RAM, mapped from [`KERNEL`] on, page tables included.
fn machine(data: &[u8]) -> FakeMachine {
    let mut machine = FakeMachine::new(KERNEL_RAM, false);
    machine.poke(GuestPhys(0), data.get(..KERNEL_SIZE as usize).unwrap_or(data));
    for page in (0..KERNEL_SIZE).step_by(4096) {
        machine.map(KERNEL + page, GuestPhys(page), PageSize::Size4K);
    }
    machine
}

/// A kernel in memory, understood without any file: symbols, types, modules. A guest layer of memory that
/// has not changed since is clean, and comes back from its stored form.
///
/// # Panics
/// When that does not hold.
pub fn kernel_memory(data: &[u8]) {
    let machine = machine(data);
    let phys = machine.memory();
    for info in Vmcoreinfo::find_all(phys) {
        assert!(info.at.0 < KERNEL_RAM && info.at.0.is_multiple_of(4096));
        let tables = KallsymsTables::from_vmcoreinfo(&info);
        if let Ok(Ok(symbols)) = tables.map(|tables| tables.read(&machine.space())) {
            assert!(symbols.len() as u64 <= KERNEL_RAM, "a symbol takes a byte at least");
        }
    }
    if let Ok((located, facts)) = without_files(phys, &[]) {
        layer(phys, &facts, located);
    }
}

fn layer(phys: &dyn PhysMemory, facts: &KernelFacts, located: Located) {
    let placement = located.placement.clone();
    assert!(placement.text.start < placement.text.end && placement.per_cpu.len() <= 8192);
    let space = AddressSpace::new(phys, placement.root, placement.five_level);
    assert!(space.translate(placement.text.start).is_ok(), "text that is not mapped");
    let Ok(layer) = GuestLayer::take_located(phys, facts, located, KernelText::Kept) else {
        return;
    };
    let found = verify(phys, facts, &layer);
    assert!(found.is_clean(), "memory has not changed: {found:?}");
    assert!(layer.is_same_boot(phys, facts));
    for module in &layer.modules {
        assert!(module.ranges.iter().all(|range| range.start < range.end));
        assert!(!module.text.is_empty() && module.name.len() <= 3 * 256);
        let _ = knowledge_from_memory(&space, &*facts.types, module, facts.btf.as_deref());
    }
    assert_eq!(layer.placed_modules().len(), layer.modules.len());
    let bytes = layer.to_bytes().expect("a layer has a stored form");
    let again = GuestLayer::from_bytes(&bytes).expect("what was stored is read");
    assert_eq!(again.to_bytes().expect("stored again"), bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed;

    #[test]
    fn the_seed_is_a_kernel_with_a_module() {
        let machine = machine(&seed("kernel_memory", "kernel"));
        let phys = machine.memory();
        let (located, facts) = without_files(phys, &[]).expect("a kernel");
        assert_eq!(located.banner, "Linux version 9.9.9 (seed)");
        let take = |text| GuestLayer::take_located(phys, &facts, located.clone(), text);
        let layer = take(KernelText::Kept).expect("a guest layer");
        let of_dump = take(KernelText::Left).expect("a guest layer");
        assert!(!layer.pages.is_empty() && of_dump.pages.is_empty());
        assert!(of_dump.pristine.runs().is_empty(), "nothing is copied of a dump");
        assert_eq!(of_dump.modules, layer.modules);
        let modules = layer.placed_modules();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["m"]);
        assert!(modules.iter().all(|module| module.knowledge.symbol("bw").is_some()));
    }

    #[test]
    fn the_seeds_are_page_tables() {
        for (name, five_level) in [("four_levels", false), ("five_levels", true)] {
            let data = seed("page_tables", name);
            let mut input = Input::new(&data);
            let (_, root, at) = (input.u8(), input.u64(), GuestVirt(input.u64()));
            let mut machine = FakeMachine::new(TABLES_RAM, five_level);
            machine.poke(GuestPhys(0), input.rest());
            let space = AddressSpace::new(machine.memory(), GuestPhys(root), five_level);
            assert_eq!(space.translate(at), Ok(GuestPhys(0x1123)), "{name}");
        }
    }
}
