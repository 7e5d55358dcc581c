//! The modules of a running guest, read from its memory: list, ranges, sections, symbols, unwind rows,
//! prototypes. Every offset comes from the kernel's own types. Files of modules are `debug_files.rs`.
//!
//! The guest runs while it is read: the list is walked before and after, and what changed meanwhile is
//! read again. A hostile guest can make the list cyclic or its counts huge: all loops are bounded.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use guest::{GuestVirt, LinkAddr, VirtMemory};
use serde::{Deserialize, Serialize};

use crate::{
    Btf, BuildId, Error, Knowledge, KnowledgeParts, OrcLayout, Prototype, SymbolKind, Types,
    base_name, orc,
};

/// More modules than any distribution loads.
const MAX_MODULES: usize = 1024;
/// More sections than any module has (one per function with `-ffunction-sections` is not used).
const MAX_SECTIONS: u64 = 1024;
/// More symbols than any module keeps (amdgpu: some 30 000).
const MAX_SYMBOLS: u64 = 262_144;
/// More bytes of names, unwind table or BTF than any module has.
const MAX_BYTES: u64 = 32 << 20;
/// Longest section or symbol name (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 512;
/// `sizeof(Elf64_Sym)`
const ELF_SYM: usize = 24;

/// Where a module is in its life (`enum module_state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModuleState {
    /// In normal use.
    Live,
    /// Its init function runs.
    Coming,
    /// It is being unloaded.
    Going,
}

/// What the guest's memory says of one module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedModule {
    /// Name as in `/proc/modules`.
    pub name: String,
    /// Guest-virtual address of its `struct module`.
    pub at: GuestVirt,
    /// Where it is in its life.
    pub state: ModuleState,
    /// Taint bits it brought (`/sys/module/NAME/taint`).
    pub taints: u64,
    /// Executable ranges, guest-virtual; the init text too while it is there.
    pub text: Vec<Range<GuestVirt>>,
    /// Every range, guest-virtual.
    pub ranges: Vec<Range<GuestVirt>>,
    /// Sections by name, where loaded.
    pub sections: Vec<(String, GuestVirt)>,
    /// GNU build id, from its notes in memory.
    pub build_id: Option<BuildId>,
}

impl LoadedModule {
    /// Whether what is known of the other's code holds for this one: it is the same code at the same place, in
    /// another part of its life perhaps.
    pub(crate) fn has_code_of(&self, other: &Self) -> bool {
        let place = |module: &Self| (module.at, module.text.clone(), module.ranges.clone());
        let whose = |module: &Self| (module.name.clone(), module.build_id);
        self == other
            || self.build_id.is_some()
                && whose(self) == whose(other)
                && place(self) == place(other)
                && self.sections == other.sections
    }
}

/// What identifies an entry of the module list: enough to see that the list changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleKey {
    /// Guest-virtual address of its `struct module`.
    pub at: GuestVirt,
    /// `enum module_state`, raw.
    pub state: u32,
    /// First byte of its text, guest-virtual.
    pub text: GuestVirt,
    /// Hash of its name.
    pub name: u64,
}

/// Offset of a member, in bytes.
fn offset(types: &dyn Types, structure: &'static str, path: &'static str) -> Result<u64, Error> {
    let member = types.member(structure, path);
    member.map(|member| member.offset).ok_or(Error::MissingMember { structure, path })
}

/// Where a module says which memory it has.
#[derive(Clone, Debug)]
enum MemoryLayout {
    /// `core_layout` and `init_layout`, each with its text first. Until v6.3.
    Layouts {
        /// Offsets of the two in `struct module`.
        at: [u64; 2],
        base: u64,
        size: u64,
        text_size: u64,
    },
    /// `mem[]`, by type. Since commit ac3b43283923 ("module: replace module_layout with
    /// module_memory", v6.4).
    Array {
        /// Offsets of the elements in `struct module`.
        at: Vec<u64>,
        base: u64,
        size: u64,
        /// Elements that hold code.
        text: Vec<usize>,
    },
}

impl MemoryLayout {
    fn of(types: &dyn Types) -> Result<Self, Error> {
        let Some(array) = types.member("module", "mem") else {
            let layout = |path| offset(types, "module_layout", path);
            return Ok(Self::Layouts {
                at: [
                    offset(types, "module", "core_layout")?,
                    offset(types, "module", "init_layout")?,
                ],
                base: layout("base")?,
                size: layout("size")?,
                text_size: layout("text_size")?,
            });
        };
        let missing = Error::MissingMember { structure: "module_memory", path: "base" };
        let stride = types.size_of("module_memory").filter(|&size| size > 0).ok_or(missing)?;
        let kinds = ["MOD_TEXT", "MOD_INIT_TEXT"];
        let kinds = kinds.iter().filter_map(|name| usize::try_from(types.enumerator(name)?).ok());
        Ok(Self::Array {
            at: (0..(array.size / stride).min(32))
                .map(|i| array.offset.wrapping_add(i * stride))
                .collect(),
            base: offset(types, "module_memory", "base")?,
            size: offset(types, "module_memory", "size")?,
            text: kinds.collect(),
        })
    }

    /// Offset in `struct module` of the pointer to its text.
    fn text_pointer(&self) -> u64 {
        match self {
            Self::Layouts { at, base, .. } => at[0] + base,
            Self::Array { at, base, text, .. } => {
                text.first().and_then(|&index| at.get(index)).map_or(0, |at| at + base)
            }
        }
    }

    /// Text ranges and all ranges of the module at `module`.
    fn ranges(&self, memory: &dyn VirtMemory, module: GuestVirt) -> Result<RangePair, Error> {
        let (mut text, mut all) = (Vec::new(), Vec::new());
        let range = |at: u64, base: u64, size: u64| {
            let start = memory.read_u64(module + at + base).map_err(Error::guest(RANGE))?;
            let size = memory.read_u32(module + at + size).map_err(Error::guest(RANGE))?;
            Ok::<_, Error>(plausible(GuestVirt(start), u64::from(size)))
        };
        match self {
            Self::Layouts { at, base, size, text_size } => {
                for at in at {
                    all.extend(range(*at, *base, *size)?);
                    text.extend(range(*at, *base, *text_size)?);
                }
            }
            Self::Array { at, base, size, text: kinds } => {
                for (index, at) in at.iter().enumerate() {
                    let range = range(*at, *base, *size)?;
                    all.extend(range.clone());
                    text.extend(range.filter(|_| kinds.contains(&index)));
                }
            }
        }
        Ok((text, all))
    }
}

type RangePair = (Vec<Range<GuestVirt>>, Vec<Range<GuestVirt>>);
/// What is being read, for errors.
const RANGE: &str = "ranges of a module";
const LIST: &str = "list of modules";

/// A range that a module may have; `None` for an empty one and for nonsense.
fn plausible(start: GuestVirt, size: u64) -> Option<Range<GuestVirt>> {
    let end = start.checked_add(size)?;
    (size > 0 && size <= 1 << 30 && start.is_kernel_half()).then_some(start..end)
}

/// Reads the module list of one kernel: offsets looked up once, used for every walk.
#[derive(Clone, Debug)]
pub struct ModuleReader {
    head: GuestVirt,
    list: u64,
    next: u64,
    name: u64,
    name_size: usize,
    state: u64,
    taints: u64,
    memory: MemoryLayout,
    states: [(i64, ModuleState); 3],
}

impl ModuleReader {
    /// For the kernel with these types, whose variable `modules` lies at guest-virtual `head`.
    ///
    /// # Errors
    /// [`Error::MissingMember`] when the types lack something that every kernel has.
    pub fn new(types: &dyn Types, head: GuestVirt) -> Result<Self, Error> {
        let missing = Error::MissingMember { structure: "module", path: "name" };
        let name = types.member("module", "name").ok_or(missing)?;
        let state = |enumerator, state| (types.enumerator(enumerator).unwrap_or(-1), state);
        Ok(Self {
            head,
            list: offset(types, "module", "list")?,
            next: offset(types, "list_head", "next")?,
            name: name.offset,
            name_size: (name.size as usize).clamp(1, 256),
            state: offset(types, "module", "state")?,
            taints: offset(types, "module", "taints")?,
            memory: MemoryLayout::of(types)?,
            states: [
                state("MODULE_STATE_LIVE", ModuleState::Live),
                state("MODULE_STATE_COMING", ModuleState::Coming),
                state("MODULE_STATE_GOING", ModuleState::Going),
            ],
        })
    }

    /// Walks the list: addresses, states, names. Cheap enough to be done often.
    ///
    /// # Errors
    /// Unreadable memory, or a list that does not come back to its head within 1024 entries.
    pub fn keys(&self, memory: &dyn VirtMemory) -> Result<Vec<ModuleKey>, Error> {
        let mut keys = Vec::new();
        let mut entry = self.head;
        loop {
            entry = GuestVirt(memory.read_u64(entry + self.next).map_err(Error::guest(LIST))?);
            if entry == self.head {
                return Ok(keys);
            }
            if keys.len() >= MAX_MODULES {
                let value = keys.len() as u64;
                return Err(Error::Implausible { what: LIST, at: self.head, value });
            }
            let at = GuestVirt(entry.0.wrapping_sub(self.list));
            let text = self.memory.text_pointer();
            let mut name = vec![0; self.name_size];
            memory.read(at + self.name, &mut name).map_err(Error::guest(LIST))?;
            keys.push(ModuleKey {
                at,
                state: memory.read_u32(at + self.state).map_err(Error::guest(LIST))?,
                text: GuestVirt(memory.read_u64(at + text).map_err(Error::guest(LIST))?),
                name: xxhash_rust::xxh3::xxh3_64(&name),
            });
        }
    }

    /// Everything but knowledge about the module that `key` names; `None` for one that is still being
    /// set up (`MODULE_STATE_UNFORMED`): it has no code to run.
    ///
    /// # Errors
    /// Unreadable memory.
    pub fn module(
        &self,
        memory: &dyn VirtMemory,
        types: &dyn Types,
        key: &ModuleKey,
    ) -> Result<Option<LoadedModule>, Error> {
        let state = self.states.iter().find(|(value, _)| *value == i64::from(key.state));
        let Some((_, state)) = state else { return Ok(None) };
        let name =
            memory.read_cstr(key.at + self.name, self.name_size).map_err(Error::guest(LIST))?;
        let taints = memory.read_u64(key.at + self.taints).map_err(Error::guest(LIST))?;
        let (text, ranges) = self.memory.ranges(memory, key.at)?;
        if text.is_empty() {
            return Ok(None);
        }
        let sections = sections(memory, types, key.at).unwrap_or_default();
        let build_id = build_id(memory, &sections, &ranges);
        let state = *state;
        let at = key.at;
        Ok(Some(LoadedModule { name, at, state, taints, text, ranges, sections, build_id }))
    }
}

/// Sections from `sect_attrs` (what `/sys/module/NAME/sections` shows); `None` when the kernel keeps
/// none or they can't be read.
fn sections(
    memory: &dyn VirtMemory,
    types: &dyn Types,
    module: GuestVirt,
) -> Option<Vec<(String, GuestVirt)>> {
    let member = |structure, path| types.member(structure, path).map(|member| member.offset);
    let attrs = GuestVirt(memory.read_u64(module + member("module", "sect_attrs")?).ok()?);
    let array = member("module_sect_attrs", "grp")? + member("attribute_group", "bin_attrs")?;
    let array = GuestVirt(memory.read_u64(attrs + array).ok()?);
    let name = member("bin_attribute", "attr")? + member("attribute", "name")?;
    // Since v6.14 the address is in bin_attribute.private and the list of pointers is all that tells how
    // many there are; before, it follows the attribute in struct module_sect_attr.
    let address = match member("module_sect_attr", "address") {
        Some(address) => address.checked_sub(member("module_sect_attr", "battr")?)?,
        None => member("bin_attribute", "private")?,
    };
    let mut found = Vec::new();
    for index in 0..MAX_SECTIONS {
        let attribute = GuestVirt(memory.read_u64(array + index * 8).ok()?);
        if attribute.0 == 0 {
            break;
        }
        let name = GuestVirt(memory.read_u64(attribute + name).ok()?);
        let name = memory.read_cstr(name, MAX_NAME).ok()?;
        found.push((name, GuestVirt(memory.read_u64(attribute + address).ok()?)));
    }
    Some(found)
}

/// The build id note, where section `.note.gnu.build-id` was loaded.
fn build_id(
    memory: &dyn VirtMemory,
    sections: &[(String, GuestVirt)],
    ranges: &[Range<GuestVirt>],
) -> Option<BuildId> {
    let (_, at) = sections.iter().find(|(name, _)| name == ".note.gnu.build-id")?;
    let range = ranges.iter().find(|range| range.contains(at))?;
    let mut note = vec![0; (range.end - *at).min(128) as usize];
    memory.read(*at, &mut note).ok()?;
    BuildId::from_notes(&note)
}

/// `len` bytes, if that is not more than any module has.
fn bytes(memory: &dyn VirtMemory, at: GuestVirt, len: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).ok().filter(|_| len <= MAX_BYTES)?];
    memory.read(at, &mut bytes).ok()?;
    Some(bytes)
}

/// Knowledge of a module from the guest's memory alone: symbols, ORC rows, prototypes from its BTF. No
/// source lines. What can't be read is left out.
#[must_use]
pub fn knowledge_from_memory(
    memory: &dyn VirtMemory,
    types: &dyn Types,
    module: &LoadedModule,
    btf: Option<&Btf>,
) -> Knowledge {
    let symbols = symbols(memory, types, module).unwrap_or_default();
    let prototypes = btf.map(|btf| prototypes(btf, &symbols)).unwrap_or_default();
    let unwind = unwind(memory, types, module).unwrap_or_default();
    Knowledge::new(KnowledgeParts { symbols, unwind, prototypes, ..KnowledgeParts::default() })
}

type SymbolParts = Vec<(String, LinkAddr, u64, SymbolKind)>;

fn prototypes(btf: &Btf, symbols: &SymbolParts) -> HashMap<String, Prototype> {
    let functions = symbols.iter().filter(|symbol| symbol.3 == SymbolKind::Function);
    let names = functions.map(|symbol| base_name(&symbol.0));
    names.filter_map(|name| Some((name.to_owned(), btf.prototype(name)?))).collect()
}

/// Symbols from `module.kallsyms` (`struct mod_kallsyms`).
fn symbols(
    memory: &dyn VirtMemory,
    types: &dyn Types,
    module: &LoadedModule,
) -> Option<SymbolParts> {
    let member = |structure, path| types.member(structure, path).map(|member| member.offset);
    let table = GuestVirt(memory.read_u64(module.at + member("module", "kallsyms")?).ok()?);
    let word = |path| memory.read_u64(table + member("mod_kallsyms", path)?).ok().map(GuestVirt);
    let count = memory.read_u32(table + member("mod_kallsyms", "num_symtab")?).ok()?;
    let (symtab, strtab) = (word("symtab")?, word("strtab")?);
    let count = u64::from(count).min(MAX_SYMBOLS);
    let table = bytes(memory, symtab, count * ELF_SYM as u64)?;
    let field = |symbol: &[u8], at: usize, len: usize| {
        let bytes = symbol.get(at..at + len).unwrap_or_default();
        bytes.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))
    };
    let entries = table.chunks_exact(ELF_SYM);
    let last_name = entries.clone().map(|symbol| field(symbol, 0, 4)).max()?;
    let names = names(memory, strtab, last_name)?;
    let symbol = |symbol: &[u8]| {
        let start = names.get(usize::try_from(field(symbol, 0, 4)).ok()?..)?;
        let name = start.split(|&byte| byte == 0).next().filter(|name| !name.is_empty())?;
        let name = String::from_utf8_lossy(name.get(..MAX_NAME).unwrap_or(name)).into_owned();
        // st_info's low half: 2 = STT_FUNC, 3 = STT_SECTION, 4 = STT_FILE; st_shndx 0 = undefined.
        let (info, section) = (field(symbol, 4, 1) & 15, field(symbol, 6, 2));
        if info == 3 || info == 4 || section == 0 {
            return None;
        }
        let at = LinkAddr(field(symbol, 8, 8));
        let in_text = module.text.iter().any(|range| range.contains(&GuestVirt(at.0)));
        let kind = if in_text { SymbolKind::Function } else { SymbolKind::Object };
        Some((name, at, field(symbol, 16, 8), kind))
    };
    Some(entries.filter_map(symbol).collect())
}

/// The string table up to the name that starts last.
fn names(memory: &dyn VirtMemory, strtab: GuestVirt, last: u64) -> Option<Vec<u8>> {
    let mut names = bytes(memory, strtab, last)?;
    names.extend(memory.read_cstr(strtab + last, MAX_NAME).ok()?.into_bytes());
    Some(names)
}

/// ORC rows from `module.arch`, at run-time addresses. The guest sorts the tables before they are
/// reachable (`unwind_module_init()`), so distances are already those of the sorted places.
fn unwind(
    memory: &dyn VirtMemory,
    types: &dyn Types,
    module: &LoadedModule,
) -> Option<Vec<(LinkAddr, Option<crate::UnwindRow>)>> {
    let member = |path| Some(module.at + types.member("module", path)?.offset);
    let count = u64::from(memory.read_u32(member("arch.num_orcs")?).ok()?);
    let ip = GuestVirt(memory.read_u64(member("arch.orc_unwind_ip")?).ok()?);
    let entries = GuestVirt(memory.read_u64(member("arch.orc_unwind")?).ok()?);
    let entry = types.size_of("orc_entry")?;
    let ips = bytes(memory, ip, count.checked_mul(4)?)?;
    let entries = bytes(memory, entries, count.checked_mul(entry)?)?;
    Some(orc::rows(&ips, ip.0, &entries, OrcLayout::of(types)?))
}

/// BTF of those loaded modules that are `wanted`, by address of their `struct module`, from the list
/// `btf_modules`. The copy in the module itself is gone after loading (`do_init_module()` clears the pointer).
/// Empty when the kernel keeps none.
#[must_use]
pub fn btf_of_modules(
    memory: &dyn VirtMemory,
    types: &dyn Types,
    head: GuestVirt,
    base: &Arc<Btf>,
    wanted: &dyn Fn(GuestVirt) -> bool,
) -> HashMap<GuestVirt, Btf> {
    let mut found = HashMap::new();
    let _ = walk_btf(memory, types, head, wanted, &mut |module, bytes| {
        if let Ok(btf) = Btf::split(bytes, Arc::clone(base)) {
            found.insert(module, btf);
        }
    });
    found
}

fn walk_btf(
    memory: &dyn VirtMemory,
    types: &dyn Types,
    head: GuestVirt,
    wanted: &dyn Fn(GuestVirt) -> bool,
    take: &mut dyn FnMut(GuestVirt, Vec<u8>),
) -> Option<()> {
    let member = |structure, path| types.member(structure, path).map(|member| member.offset);
    let (list, next) = (member("btf_module", "list")?, member("list_head", "next")?);
    let (module, btf) = (member("btf_module", "module")?, member("btf_module", "btf")?);
    let (data, size) = (member("btf", "data")?, member("btf", "data_size")?);
    let mut entry = head;
    for _ in 0..MAX_MODULES {
        entry = GuestVirt(memory.read_u64(entry + next).ok()?);
        if entry == head {
            break;
        }
        let at = GuestVirt(entry.0.wrapping_sub(list));
        let module = GuestVirt(memory.read_u64(at + module).ok()?);
        if !wanted(module) {
            continue;
        }
        let btf = GuestVirt(memory.read_u64(at + btf).ok()?);
        let data = GuestVirt(memory.read_u64(btf + data).ok()?);
        let size = memory.read_u32(btf + size).ok()?;
        if let Some(bytes) = bytes(memory, data, u64::from(size)) {
            take(module, bytes);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use guest::GuestPhys;
    use guest::fake::{FakeMachine, PageSize};
    use proptest::prelude::*;

    use super::*;
    use crate::synth::module_types;

    const BASE: GuestVirt = GuestVirt(0xffff_ffff_c000_0000);
    const TEXT: u64 = 0xffff_ffff_c010_0000;

    /// A list head at 0, then modules 0x400 apart, each 0x1000 of text and 0x2000 in all.
    fn guest(old: bool, names: &[&str]) -> FakeMachine {
        let mut machine = FakeMachine::new(4 << 20, false);
        machine.map(BASE, GuestPhys(0), PageSize::Size2M);
        let entry = |index: usize| BASE.0 + 0x400 * index as u64 + 0x10;
        machine.poke(GuestPhys(0), &(entry(1)).to_le_bytes());
        for (index, name) in (1..).zip(names) {
            let at = 0x400 * index as u64;
            let next = if index == names.len() { BASE.0 } else { entry(index + 1) };
            machine.poke(GuestPhys(at + 0x10), &next.to_le_bytes());
            machine.poke(GuestPhys(at + 0x20), name.as_bytes());
            let text = TEXT + index as u64 * 0x1_0000;
            if old {
                machine.poke(GuestPhys(at + 0x80), &text.to_le_bytes());
                machine.poke(GuestPhys(at + 0x88), &[0, 0x20, 0, 0, 0, 0x10]);
            } else {
                machine.poke(GuestPhys(at + 0x80), &[0, 0x10]);
                machine.poke(GuestPhys(at + 0x88), &(text + 0x1000).to_le_bytes());
                machine.poke(GuestPhys(at + 0x90), &[0, 0x10]);
                machine.poke(GuestPhys(at + 0x98), &text.to_le_bytes());
            }
        }
        machine
    }

    fn read(machine: &FakeMachine, old: bool) -> Result<Vec<LoadedModule>, Error> {
        let types = module_types(old);
        let reader = ModuleReader::new(&types, BASE)?;
        let space = machine.space();
        let keys = reader.keys(&space)?;
        keys.iter().filter_map(|key| reader.module(&space, &types, key).transpose()).collect()
    }

    #[test]
    fn both_layouts_of_struct_module_give_the_same_list() {
        for old in [true, false] {
            let modules = read(&guest(old, &["one", "two"]), old).unwrap();
            let names: Vec<_> = modules.iter().map(|module| &*module.name).collect();
            assert_eq!(names, ["one", "two"]);
            let text = GuestVirt(TEXT + 0x1_0000);
            assert_eq!(modules[0].text, [text..text + 0x1000]);
            let total: u64 = modules[0].ranges.iter().map(|range| range.end - range.start).sum();
            assert_eq!(total, 0x2000);
            assert_eq!(modules[0].at, BASE + 0x400);
        }
    }

    #[test]
    fn modules_being_set_up_have_no_text_yet() {
        let mut machine = guest(false, &["one", "two"]);
        machine.poke(GuestPhys(0x400), &[3]);
        let modules = read(&machine, false).unwrap();
        assert_eq!(modules.len(), 1);
        machine.poke(GuestPhys(0x400), &[1]);
        assert_eq!(read(&machine, false).unwrap()[0].state, ModuleState::Coming);
    }

    #[test]
    fn a_cycle_is_an_error_and_a_change_is_seen() {
        let mut machine = guest(true, &["one", "two"]);
        let reader = ModuleReader::new(&module_types(true), BASE).unwrap();
        let before = reader.keys(&machine.space()).unwrap();
        machine.poke(GuestPhys(0x420), b"eno");
        assert_ne!(reader.keys(&machine.space()).unwrap(), before);
        machine.poke(GuestPhys(0x810), &(BASE.0 + 0x410).to_le_bytes());
        let cyclic = read(&machine, true);
        assert!(matches!(cyclic, Err(Error::Implausible { value: 1024, .. })));
        machine.poke(GuestPhys(0x810), &0x1234u64.to_le_bytes());
        assert!(matches!(read(&machine, true), Err(Error::Guest { .. })));
    }

    #[test]
    fn lying_sizes_are_left_out() {
        let mut machine = guest(true, &["one"]);
        machine.poke(GuestPhys(0x48c), &[0xff; 4]);
        assert!(read(&machine, true).unwrap().is_empty(), "text of 4 GiB");
    }

    proptest! {
        #[test]
        fn hostile_lists_never_panic(at in 0u64..0x1000, bytes: [u8; 24], old: bool) {
            let mut machine = guest(old, &["one", "two", "three"]);
            machine.poke(GuestPhys(at), &bytes);
            let _ = read(&machine, old);
        }
    }
}
