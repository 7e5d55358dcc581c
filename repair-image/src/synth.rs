//! A guest's memory for tests, written with layouts of its own: a kernel image with banner, page tables,
//! kallsyms and VMCOREINFO, and a module list. Imports nothing of the readers.

use std::collections::HashMap;

use guest::fake::{FakeMachine, PageSize};
use guest::{GuestPhys, GuestVirt, LinkAddr};

use crate::{Knowledge, KnowledgeParts, Member, Prototype, SymbolKind, TypeShape, Types};

/// Where the image lies, guest-physical, and where it is linked to.
pub(crate) const TEXT_PHYS: u64 = 0x40_0000;
pub(crate) const TEXT_LINK: u64 = 0xffff_ffff_8100_0000;
/// KASLR slide.
pub(crate) const SLIDE: u64 = 0x1360_0000;
const RAM: u64 = 16 << 20;
/// Offsets in the image.
const PHYS_BASE: u64 = 0x1000;
const L5: u64 = 0x1010;
const NR_CPUS: u64 = 0x1020;
const PER_CPU: u64 = 0x1040;
const STATE: u64 = 0x1080;
const NOTES: u64 = 0x1100;
const BANNER: u64 = 0x2000;
const INFO_POINTER: u64 = 0x2800;
const NAMES: u64 = 0x3000;
const TOKENS: u64 = 0x4000;
const TOKEN_INDEX: u64 = 0x5000;
const OFFSETS: u64 = 0x6000;
const COUNT: u64 = 0x6800;
const RELATIVE_BASE: u64 = 0x6808;
/// Where VMCOREINFO lies, guest-physical: not part of the image.
pub(crate) const INFO_PHYS: u64 = 0x80_0000;
/// Build id of the kernel.
pub(crate) const BUILD_ID: [u8; 20] = [0xab; 20];

/// Guest-virtual address of a byte of the image.
pub(crate) fn placed(offset: u64) -> GuestVirt {
    GuestVirt(TEXT_LINK + SLIDE + offset)
}

/// Symbols of the image by offset; `init_top_pgt` is where the machine's tables begin.
fn symbols(root: u64) -> Vec<(&'static str, u64)> {
    vec![
        ("_text", 0),
        ("_stext", 0),
        ("startup", 0x10),
        ("_etext", 0x1000),
        ("phys_base", PHYS_BASE),
        ("__pgtable_l5_enabled", L5),
        ("nr_cpu_ids", NR_CPUS),
        ("__per_cpu_offset", PER_CPU),
        ("system_state", STATE),
        ("__start_notes", NOTES),
        ("__stop_notes", NOTES + 36),
        ("linux_banner", BANNER),
        ("vmcoreinfo_data", INFO_POINTER),
        ("init_top_pgt", root - TEXT_PHYS),
    ]
}

/// A machine with the kernel in it, and its symbols as from a vmlinux.
pub(crate) fn kernel(five_level: bool) -> (FakeMachine, Knowledge) {
    let mut machine = FakeMachine::new(RAM, five_level);
    machine.map(placed(0), GuestPhys(TEXT_PHYS), PageSize::Size2M);
    machine.map(placed(2 << 20), GuestPhys(TEXT_PHYS + (2 << 20)), PageSize::Size2M);
    machine.map(placed(INFO_PHYS), GuestPhys(INFO_PHYS), PageSize::Size4K);
    let root = machine.space().root().0;
    let mut poke = |offset: u64, bytes: &[u8]| machine.poke(GuestPhys(TEXT_PHYS + offset), bytes);
    // Physical address = virtual - map + phys_base
    let phys_base = TEXT_PHYS.wrapping_sub(placed(0).0 - 0xffff_ffff_8000_0000);
    poke(PHYS_BASE, &phys_base.to_le_bytes());
    poke(L5, &[u8::from(five_level)]);
    poke(NR_CPUS, &[2]);
    poke(STATE, &[2]);
    poke(PER_CPU, &0xffff_8880_0010_0000u64.to_le_bytes());
    poke(PER_CPU + 8, &0xffff_8880_0020_0000u64.to_le_bytes());
    poke(BANNER, b"Linux version 9.9.9 (synthetic)\n\0");
    let mut note = [4u32, 20, 3].map(u32::to_le_bytes).concat();
    note.extend(b"GNU\0");
    note.extend(BUILD_ID);
    poke(NOTES, &note);
    poke(INFO_POINTER, &placed(INFO_PHYS).0.to_le_bytes());
    write_kallsyms(&mut machine, root);
    let parts = symbols(root).into_iter().map(|(name, offset)| {
        let kind = if offset < 0x1000 { SymbolKind::Function } else { SymbolKind::Object };
        (name.to_owned(), LinkAddr(TEXT_LINK.wrapping_add(offset)), 0, kind)
    });
    let parts = KnowledgeParts { symbols: parts.collect(), ..KnowledgeParts::default() };
    (machine, Knowledge::new(parts))
}

/// kallsyms whose tokens are single characters, but for one of two; the last symbol is per-CPU.
fn write_kallsyms(machine: &mut FakeMachine, root: u64) {
    let (mut tokens, mut index) = (Vec::new(), Vec::new());
    for code in 0..=255u8 {
        index.extend((tokens.len() as u16).to_le_bytes());
        match code {
            1 => tokens.extend(b"_t"),
            0 | 2..32 | 127.. => {}
            printable => tokens.push(printable),
        }
        tokens.push(0);
    }
    let base = placed(0).0;
    let (mut names, mut offsets) = (Vec::new(), Vec::new());
    let mut add = |kind: u8, name: &str, offset: i32| {
        let text = [&[kind], name.replace("_t", "\u{1}").as_bytes()].concat();
        names.extend(if text.len() < 128 {
            vec![text.len() as u8]
        } else {
            vec![text.len() as u8 | 0x80, (text.len() >> 7) as u8]
        });
        names.extend(text);
        offsets.extend(offset.to_le_bytes());
    };
    for (name, offset) in symbols(root) {
        let kind = if offset < 0x1000 { b'T' } else { b'D' };
        add(kind, name, -1 - i32::try_from(offset).unwrap());
    }
    add(b't', &"long".repeat(50), -1 - 0x800);
    add(b'A', "current_task", 0x1234);
    let count = offsets.len() as u32 / 4;
    for (at, bytes) in [
        (TOKENS, &tokens[..]),
        (TOKEN_INDEX, &index),
        (NAMES, &names),
        (OFFSETS, &offsets),
        (COUNT, &count.to_le_bytes()),
        (RELATIVE_BASE, &base.to_le_bytes()),
    ] {
        machine.poke(GuestPhys(TEXT_PHYS + at), bytes);
    }
    machine.poke(GuestPhys(INFO_PHYS), vmcoreinfo(root).as_bytes());
}

/// VMCOREINFO of the kernel.
fn vmcoreinfo(root: u64) -> String {
    let phys_base = TEXT_PHYS.wrapping_sub(placed(0).0 - 0xffff_ffff_8000_0000) as i64;
    let mut text = format!("OSRELEASE=9.9.9\nBUILD-ID={}\n", "ab".repeat(20));
    for (name, offset) in [
        ("_stext", 0),
        ("swapper_pg_dir", root - TEXT_PHYS),
        ("kallsyms_names", NAMES),
        ("kallsyms_num_syms", COUNT),
        ("kallsyms_token_table", TOKENS),
        ("kallsyms_token_index", TOKEN_INDEX),
        ("kallsyms_offsets", OFFSETS),
        ("kallsyms_relative_base", RELATIVE_BASE),
    ] {
        text += &format!("SYMBOL({name})={:x}\n", placed(offset).0);
    }
    text + &format!("NUMBER(phys_base)={phys_base}\nKERNELOFFSET={SLIDE:x}\n")
}

/// Types given one by one.
#[derive(Default)]
pub(crate) struct FakeTypes {
    pub(crate) members: HashMap<(&'static str, &'static str), (u64, u64)>,
    pub(crate) sizes: HashMap<&'static str, u64>,
    pub(crate) enumerators: HashMap<&'static str, i64>,
}

impl Types for FakeTypes {
    fn member(&self, structure: &str, path: &str) -> Option<Member> {
        let found = self.members.iter().find(|(key, _)| key.0 == structure && key.1 == path)?;
        let (offset, size) = *found.1;
        Some(Member { offset, size, bits: None, shape: TypeShape::Other })
    }

    fn size_of(&self, name: &str) -> Option<u64> {
        self.sizes.get(name).copied()
    }

    fn enumerator(&self, name: &str) -> Option<i64> {
        self.enumerators.get(name).copied()
    }

    fn prototype(&self, _: &str) -> Option<Prototype> {
        None
    }

    fn member_prototype(&self, _: &str, _: &str) -> Option<Prototype> {
        None
    }
}

/// Layouts of `struct module` as before v6.4 (`old`) or since; not those of any real build.
pub(crate) fn module_types(old: bool) -> FakeTypes {
    let mut types = FakeTypes::default();
    let mut member = |structure, path, offset, size| {
        types.members.insert((structure, path), (offset, size));
    };
    member("list_head", "next", 0, 8);
    member("module", "state", 0, 4);
    member("module", "list", 0x10, 16);
    member("module", "name", 0x20, 56);
    member("module", "taints", 0x60, 8);
    if old {
        member("module", "core_layout", 0x80, 0x20);
        member("module", "init_layout", 0xa0, 0x20);
        member("module_layout", "base", 0, 8);
        member("module_layout", "size", 8, 4);
        member("module_layout", "text_size", 0xc, 4);
    } else {
        member("module", "mem", 0x80, 0x40);
        member("module_memory", "base", 8, 8);
        member("module_memory", "size", 0, 4);
        types.sizes.insert("module_memory", 0x10);
        types.enumerators.extend([("MOD_TEXT", 1), ("MOD_INIT_TEXT", 3)]);
    }
    types.enumerators.extend([
        ("MODULE_STATE_LIVE", 0),
        ("MODULE_STATE_COMING", 1),
        ("MODULE_STATE_GOING", 2),
    ]);
    types
}

/// Where the image of [`constants`] has its parts, guest-virtual: four pages of text, four of read-only data
/// with the patch-site tables in the first, four of a module (two of text), and one that can be written.
pub(crate) const CONSTANT_TEXT: GuestVirt = GuestVirt(0xffff_ffff_8100_0000);
pub(crate) const CONSTANT_DATA: GuestVirt = GuestVirt(0xffff_ffff_8200_0000);
pub(crate) const CONSTANT_MODULE: GuestVirt = GuestVirt(0xffff_ffff_c000_0000);
pub(crate) const WRITABLE: GuestVirt = GuestVirt(0xffff_ffff_8300_0000);
/// A jump label of five bytes and one of two, and a static call, in text; the same in the module, but for the
/// short label.
pub(crate) const LABEL: u64 = 0x840;
pub(crate) const SHORT_LABEL: u64 = 0x850;
pub(crate) const STATIC_CALL: u64 = 0x860;
/// A function that can be traced, and the size of each function of the image.
pub(crate) const TRACED: u64 = 0x400;
pub(crate) const FUNCTION: u64 = 0x100;
const PAGE: u64 = 4096;

/// Sizes and members of the tables; strides that no real kernel has.
fn constant_types() -> FakeTypes {
    let mut types = FakeTypes::default();
    types.members.extend([
        (("jump_entry", "code"), (4, 4)),
        (("static_call_site", "addr"), (0, 4)),
        (("module", "jump_entries"), (0x10, 8)),
        (("module", "num_jump_entries"), (0x18, 4)),
        (("module", "static_call_sites"), (0x20, 8)),
        (("module", "num_static_call_sites"), (0x28, 4)),
    ]);
    types.sizes.extend([("jump_entry", 12), ("static_call_site", 8)]);
    types
}

/// A small kernel with a module whose constant pages are mapped read-only and kept in the image as they are in
/// the machine. Text is 0x90 (`nop`) where nothing else is said; data counts up.
pub(crate) fn constants() -> (FakeMachine, crate::RepairImage) {
    let mut machine = FakeMachine::new(2 << 20, false);
    for (start, phys, read_only) in [
        (CONSTANT_TEXT, 0x1_0000, true),
        (CONSTANT_DATA, 0x2_0000, true),
        (CONSTANT_MODULE, 0x3_0000, true),
        (WRITABLE, 0x4_0000, false),
    ] {
        for page in 0..4 {
            let (at, phys) = (start + page * PAGE, GuestPhys(phys + page * PAGE));
            machine.map(at, phys, PageSize::Size4K);
            let entry = machine.space().walk(at).unwrap();
            let bits = if read_only { entry.entry & !2 } else { entry.entry };
            machine.poke(entry.entry_at, &bits.to_le_bytes());
            let bytes: Vec<u8> = (0..PAGE).map(|byte| (byte % 251) as u8).collect();
            machine.poke(phys, if start == CONSTANT_DATA { &bytes } else { &[0x90; 4096] });
        }
    }
    for text in [CONSTANT_TEXT, CONSTANT_MODULE] {
        machine.poke_virt(text + LABEL, &[0x0f, 0x1f, 0x44, 0, 0]);
        machine.poke_virt(text + SHORT_LABEL, &[0x66, 0x90]);
        machine.poke_virt(text + STATIC_CALL, &[0xe8, 1, 2, 3, 0]);
        machine.poke_virt(text + TRACED, &[0x0f, 0x1f, 0x44, 0, 0]);
    }
    let far = |from: GuestVirt, to: GuestVirt| (to.0.wrapping_sub(from.0) as i32).to_le_bytes();
    let mut table = |at: GuestVirt, stride: u64, member: u64, sites: &[GuestVirt]| {
        for (index, &site) in (0u64..).zip(sites) {
            let own = at + index * stride + member;
            machine.poke_virt(own, &far(own, site));
        }
    };
    let text = CONSTANT_TEXT;
    table(CONSTANT_DATA, 12, 4, &[text + LABEL, text + SHORT_LABEL]);
    table(CONSTANT_DATA + 0x100, 8, 0, &[text + STATIC_CALL]);
    let (module, of_module) = (WRITABLE + 0x800, CONSTANT_MODULE + 0x2800);
    table(of_module, 12, 4, &[CONSTANT_MODULE + LABEL]);
    table(of_module + 0x100, 8, 0, &[CONSTANT_MODULE + STATIC_CALL]);
    for (offset, word) in [(0x10, of_module.0), (0x18, 1), (0x20, (of_module + 0x100).0), (0x28, 1)]
    {
        machine.poke_virt(module + offset, &word.to_le_bytes());
    }
    let image = constant_image(&machine, module);
    (machine, image)
}

fn constant_image(machine: &FakeMachine, module: GuestVirt) -> crate::RepairImage {
    let function =
        |name: String, at: GuestVirt| (name, LinkAddr(at.0), FUNCTION, SymbolKind::Function);
    let object =
        |name: &str, at: GuestVirt| (name.to_owned(), LinkAddr(at.0), 0, SymbolKind::Object);
    let functions = |start: GuestVirt, pages: u64| {
        (0..pages * PAGE / FUNCTION).map(move |n| start + n * FUNCTION)
    };
    let mut symbols: Vec<_> = functions(CONSTANT_TEXT, 4)
        .map(|at| function(format!("k{:x}", at.0 & 0xffff), at))
        .collect();
    symbols.extend([
        object("__start___jump_table", CONSTANT_DATA),
        object("__stop___jump_table", CONSTANT_DATA + 24),
        object("__start_static_call_sites", CONSTANT_DATA + 0x100),
        object("__stop_static_call_sites", CONSTANT_DATA + 0x108),
    ]);
    let of_module =
        functions(CONSTANT_MODULE, 2).map(|at| function(format!("m{:x}", at.0 & 0xffff), at));
    let knowledge =
        |symbols| Knowledge::new(KnowledgeParts { symbols, ..KnowledgeParts::default() });
    let module = crate::Module {
        name: "m".to_owned(),
        at: module,
        text: vec![CONSTANT_MODULE..CONSTANT_MODULE + 2 * PAGE],
        ranges: vec![CONSTANT_MODULE..CONSTANT_MODULE + 4 * PAGE],
        sections: Vec::new(),
        knowledge: std::sync::Arc::new(knowledge(of_module.collect())),
    };
    let mut pristine = crate::Pristine::default();
    for (kind, start, pages) in [
        (crate::PageKind::Text, CONSTANT_TEXT, 4),
        (crate::PageKind::ReadOnlyData, CONSTANT_DATA, 4),
        (crate::PageKind::ModuleText, CONSTANT_MODULE, 2),
        (crate::PageKind::ModuleReadOnlyData, CONSTANT_MODULE + 2 * PAGE, 2),
        (crate::PageKind::ReadOnlyData, WRITABLE, 4),
    ] {
        pristine.add(&machine.space(), kind, &(start..start + pages * PAGE));
    }
    crate::RepairImage {
        kernel: std::sync::Arc::new(knowledge(symbols)),
        types: std::sync::Arc::new(constant_types()),
        placement: crate::Placement {
            slide: 0,
            root: machine.space().root(),
            five_level: false,
            text: CONSTANT_TEXT..CONSTANT_TEXT + 4 * PAGE,
            per_cpu: Vec::new(),
        },
        modules: vec![module],
        pristine: std::sync::Arc::new(pristine),
    }
}
