//! The functions of a driver that the rest of the kernel can reach: those whose address is stored
//! in the driver's data or taken in its code. Reads only; making them fail is in `driver.rs`.

use std::collections::BTreeMap;
use std::ops::Range;

use guest::GuestVirt;
use repair_image::{Module, Prototype, SymbolKind, TypeShape};

use crate::guest_struct::Structures;
use crate::values::Role;

/// Bytes of one driver that are searched at most.
const SEARCH_MAX: u64 = 16 << 20;
/// Functions of one driver that are looked at at most.
const FUNCTIONS_MAX: usize = 1 << 16;
const PAGE: u64 = 4096;

/// Structures that carry a pointer to their module, so that an instance is recognised by it, and
/// their function pointers with the role of what they point to.
type Table = (&'static str, &'static str, &'static [(&'static str, Role)]);

const TABLES: &[Table] = &[
    (
        "file_operations",
        "owner",
        &[
            ("open", Role::Open),
            ("release", Role::Release),
            ("flush", Role::Release),
            ("fasync", Role::Release),
            ("llseek", Role::Work),
            ("read", Role::Work),
            ("write", Role::Work),
            ("read_iter", Role::Work),
            ("write_iter", Role::Work),
            ("iopoll", Role::Work),
            ("iterate", Role::Work),
            ("iterate_shared", Role::Work),
            ("poll", Role::Work),
            ("unlocked_ioctl", Role::Work),
            ("compat_ioctl", Role::Work),
            ("mmap", Role::Work),
            ("fsync", Role::Work),
            ("lock", Role::Work),
            ("splice_write", Role::Work),
            ("splice_read", Role::Work),
            ("fallocate", Role::Work),
            ("show_fdinfo", Role::Work),
        ],
    ),
    (
        "block_device_operations",
        "owner",
        &[
            ("open", Role::Open),
            ("release", Role::Release),
            ("submit_bio", Role::Work),
            ("ioctl", Role::Work),
            ("compat_ioctl", Role::Work),
            ("getgeo", Role::Work),
        ],
    ),
    (
        "pci_driver",
        "driver.owner",
        &[
            ("probe", Role::Open),
            ("remove", Role::Release),
            ("suspend", Role::Release),
            ("resume", Role::Release),
            ("shutdown", Role::Release),
        ],
    ),
    (
        "platform_driver",
        "driver.owner",
        &[("probe", Role::Open), ("remove", Role::Release), ("shutdown", Role::Release)],
    ),
    (
        "virtio_driver",
        "driver.owner",
        &[("probe", Role::Open), ("remove", Role::Release), ("config_changed", Role::Work)],
    ),
];

/// A function that can be reached from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EntryPoint {
    /// Name with compiler suffixes.
    pub(crate) name: String,
    /// First byte, guest-virtual.
    pub(crate) at: GuestVirt,
    /// Size, bytes.
    pub(crate) size: u64,
    /// What it is for.
    pub(crate) role: Role,
    /// Its type: its own or that of the member it was found in.
    pub(crate) prototype: Option<Prototype>,
    /// How it was found.
    pub(crate) found: String,
}

/// All entry points of a driver, by address; its `init` and `exit` functions are none.
pub(crate) fn of(structures: &Structures<'_>, module: &Module) -> Vec<EntryPoint> {
    let mut search = Search::new(structures, module);
    for range in data_ranges(module) {
        search.data(&range);
    }
    for range in &module.text {
        search.code(range);
    }
    search.found.into_values().collect()
}

fn data_ranges(module: &Module) -> Vec<Range<GuestVirt>> {
    module.ranges.iter().flat_map(|range| without_text(range, &module.text)).collect()
}

/// What of a range is no text. Before v6.4 a module's text, read-only data and data are one range, text
/// first.
fn without_text(range: &Range<GuestVirt>, text: &[Range<GuestVirt>]) -> Vec<Range<GuestVirt>> {
    let mut left = vec![range.clone()];
    for hole in text {
        left = left
            .into_iter()
            .flat_map(|part| {
                [part.start..part.end.min(hole.start), part.start.max(hole.end)..part.end]
            })
            .filter(|part| part.start < part.end)
            .collect();
    }
    left
}

struct Search<'a> {
    structures: &'a Structures<'a>,
    module: &'a Module,
    /// Tables of the kernel's own that lie in the module's data and name functions nobody calls
    /// through.
    tables: Vec<Range<GuestVirt>>,
    /// Functions that count, by address: name and size.
    functions: BTreeMap<GuestVirt, (String, u64)>,
    found: BTreeMap<GuestVirt, EntryPoint>,
    left: u64,
}

impl<'a> Search<'a> {
    fn new(structures: &'a Structures<'a>, module: &'a Module) -> Self {
        let exempt: Vec<GuestVirt> = ["init", "exit"]
            .into_iter()
            .filter_map(|member| structures.number(module.at, "module", member).ok().flatten())
            .map(GuestVirt)
            .collect();
        let functions = module
            .knowledge
            .functions()
            .take(FUNCTIONS_MAX)
            .filter(|symbol| symbol.kind == SymbolKind::Function)
            .filter(|symbol| !matches!(symbol.name, "init_module" | "cleanup_module"))
            .map(|symbol| (GuestVirt(symbol.at.0), (symbol.name.to_owned(), symbol.size)))
            .filter(|(at, _)| module.is_text(*at) && !exempt.contains(at))
            .collect();
        let tables = own_tables(structures, module);
        Self { structures, module, tables, functions, found: BTreeMap::new(), left: SEARCH_MAX }
    }

    /// Words of data that are exactly the address of a function.
    fn data(&mut self, range: &Range<GuestVirt>) {
        self.pages(range, 0, |search, at, bytes| {
            for (index, word) in bytes.chunks_exact(8).enumerate() {
                let value = word.try_into().map(u64::from_le_bytes).unwrap_or(0);
                let word_at = at + index as u64 * 8;
                let is_function = search.functions.contains_key(&GuestVirt(value));
                if is_function && !search.tables.iter().any(|table| table.contains(&word_at)) {
                    search.pointer(GuestVirt(value), word_at);
                }
            }
        });
    }

    /// Addresses taken in code: as a sign-extended 32-bit immediate (`mov r64, imm32`: modules lie
    /// in the top 2 GiB) or relative to rip (`lea`).
    fn code(&mut self, range: &Range<GuestVirt>) {
        // Four bytes may reach over a page's end, and the two before them tell a `lea`.
        self.pages(range, 6, |search, at, bytes| {
            for (index, window) in bytes.windows(6).enumerate() {
                let &[opcode, mode, a, b, c, d] = window else { continue };
                let number = i64::from(i32::from_le_bytes([a, b, c, d]));
                let next = at + index as u64 + 6;
                search.taken(GuestVirt(number as u64));
                if opcode == 0x8d && mode & 0xc7 == 0x05 {
                    search.taken(next.offset(number));
                }
            }
        });
    }

    /// Calls `look` with each page of a range and the `extra` bytes after it, as far as they can be
    /// read.
    fn pages(
        &mut self,
        range: &Range<GuestVirt>,
        extra: u64,
        look: impl Fn(&mut Self, GuestVirt, &[u8]),
    ) {
        let mut at = range.start;
        while at < range.end && self.left > 0 {
            let to_end = range.end - at;
            let len = (PAGE - (at.0 & (PAGE - 1))).min(to_end).min(self.left);
            self.left -= len;
            let mut bytes = vec![0; usize::try_from(len + extra.min(to_end - len)).unwrap_or(0)];
            // Pages of freed init sections are not mapped; nothing can be registered in them.
            if self.structures.memory.read(at, &mut bytes).is_ok() {
                look(self, at, &bytes);
            }
            let Some(next) = at.checked_add(len) else { return };
            at = next;
        }
    }

    fn pointer(&mut self, function: GuestVirt, word_at: GuestVirt) {
        let member = self.member_of(word_at);
        let found = match &member {
            Some((structure, path, _)) => format!("{structure}.{path}"),
            None => format!("a pointer at {word_at:#x}"),
        };
        let role = member.as_ref().map(|member| member.2);
        let prototype = member.and_then(|(structure, path, _)| {
            self.structures.image.types.member_prototype(structure, path)
        });
        self.add(function, role, prototype, found);
    }

    fn taken(&mut self, function: GuestVirt) {
        if self.functions.contains_key(&function) {
            self.add(function, None, None, "its address is taken in code".to_owned());
        }
    }

    /// The member of a known structure at `word_at`, if a structure around it names this module as
    /// owner.
    fn member_of(&self, word_at: GuestVirt) -> Option<(&'static str, &'static str, Role)> {
        let types = &self.structures.image.types;
        for (structure, owner, members) in TABLES {
            let Some(owner) = types.member(structure, owner) else { continue };
            for (path, role) in *members {
                let Some(member) = types.member(structure, path) else { continue };
                let base = GuestVirt(word_at.0.wrapping_sub(member.offset));
                let holder = self.structures.memory.read_u64(base + owner.offset);
                if self.module.contains(base) && holder == Ok(self.module.at.0) {
                    return Some((structure, path, *role));
                }
            }
        }
        self.sequence_member(word_at)
    }

    /// `struct seq_operations` names no owner: it is recognised by its four functions.
    fn sequence_member(&self, word_at: GuestVirt) -> Option<(&'static str, &'static str, Role)> {
        const OPERATIONS: &str = "seq_operations";
        const MEMBERS: [&str; 4] = ["start", "stop", "next", "show"];
        let types = &self.structures.image.types;
        let offset = |path| Some(types.member(OPERATIONS, path)?.offset);
        MEMBERS.into_iter().find_map(|path| {
            let base = GuestVirt(word_at.0.wrapping_sub(offset(path)?));
            let is_one = MEMBERS.into_iter().all(|path| {
                let at = offset(path).map(|offset| base + offset);
                let function = at.and_then(|at| self.structures.memory.read_u64(at).ok());
                function.is_some_and(|function| self.fits_sequence(path, GuestVirt(function)))
            });
            is_one.then_some((OPERATIONS, path, Role::Sequence))
        })
    }

    /// Whether a function of the driver returns what the member of `struct seq_operations` does, as
    /// far as its type is known.
    fn fits_sequence(&self, path: &str, function: GuestVirt) -> bool {
        let Some((name, _)) = self.functions.get(&function) else { return false };
        let Some(own) = self.module.knowledge.prototype(name) else { return true };
        match path {
            "start" | "next" => matches!(own.returns, TypeShape::Pointer { .. }),
            "stop" => own.returns == TypeShape::Void,
            _ => matches!(own.returns, TypeShape::Int { signed: true, .. }),
        }
    }

    fn add(&mut self, at: GuestVirt, role: Option<Role>, typed: Option<Prototype>, found: String) {
        let Some((name, size)) = self.functions.get(&at) else { return };
        let own = self.module.knowledge.prototype(name).cloned();
        let entry = self.found.entry(at).or_insert_with(|| EntryPoint {
            name: name.clone(),
            at,
            size: *size,
            role: role.unwrap_or_else(|| role_of_name(name)),
            prototype: own,
            found,
        });
        if let Some(role) = role {
            entry.role = role;
        }
        if entry.prototype.is_none() {
            entry.prototype = typed;
        }
    }
}

/// `struct module` itself (which holds the start of the text), the list of ftrace's call sites, the
/// symbol table and the list of functions that kprobes must leave alone: they name functions that
/// nobody calls through them.
fn own_tables(structures: &Structures<'_>, module: &Module) -> Vec<Range<GuestVirt>> {
    let number = |path| structures.number(module.at, "module", path).ok().flatten();
    let size_of = |name| structures.image.types.size_of(name);
    let table = |start: &'static str, count: &'static str, size: Option<u64>| {
        let start = GuestVirt(number(start)?);
        let bytes = (number(count)? & 0xffff_ffff).checked_mul(size?)?;
        Some(start..start.checked_add(bytes.min(SEARCH_MAX))?)
    };
    let whole = size_of("module").and_then(|size| Some(module.at..module.at.checked_add(size)?));
    let symbols = table("core_kallsyms.symtab", "core_kallsyms.num_symtab", size_of("elf64_sym"));
    let traced = table("ftrace_callsites", "num_ftrace_callsites", Some(8));
    let barred = table("kprobe_blacklist", "num_kprobe_blacklist", Some(8));
    [whole, symbols, traced, barred].into_iter().flatten().collect()
}

/// The role of a function that no known structure tells, by how such functions are called.
fn role_of_name(name: &str) -> Role {
    const RELEASE: [&str; 11] = [
        "release",
        "remove",
        "exit",
        "close",
        "destroy",
        "disconnect",
        "shutdown",
        "stop",
        "free",
        "suspend",
        "resume",
    ];
    const OPEN: [&str; 3] = ["open", "probe", "attach"];
    let has = |words: &[&str]| name.split('_').any(|part| words.contains(&part));
    if has(&RELEASE) {
        Role::Release
    } else if has(&OPEN) {
        Role::Open
    } else {
        Role::Work
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MODULE_TEXT, Scene};

    fn entries(scene: &Scene) -> Vec<EntryPoint> {
        let space = scene.machine.space();
        let structures = Structures { image: &scene.image, memory: &space };
        of(&structures, &scene.image.modules[0])
    }

    #[test]
    fn operations_and_plain_pointers_are_found_and_exit_is_not() {
        let scene = Scene::new();
        let found: Vec<_> =
            entries(&scene).into_iter().map(|entry| (entry.name, entry.role)).collect();
        assert_eq!(
            found,
            [
                ("toy_write".to_owned(), Role::Work),
                ("toy_open".to_owned(), Role::Open),
                ("toy_release".to_owned(), Role::Release),
                ("toy_timer".to_owned(), Role::Work),
            ]
        );
    }

    #[test]
    fn addresses_taken_in_code_are_found() {
        let mut scene = Scene::new();
        let helper = MODULE_TEXT + 4 * 0x40;
        // mov rdi, imm32
        let mut bytes = vec![0x48, 0xc7, 0xc7];
        bytes.extend_from_slice(&(helper.0 as u32).to_le_bytes());
        scene.machine.poke_virt(MODULE_TEXT + 0x20, &bytes);
        assert!(entries(&scene).iter().any(|entry| entry.at == helper));
        let mut scene = Scene::new();
        // lea rsi, [rip + rel32], over a page boundary
        let at = MODULE_TEXT + 0xffa;
        let mut bytes = vec![0x48, 0x8d, 0x35];
        bytes.extend_from_slice(&((helper - (at + 7)) as u32).to_le_bytes());
        scene.machine.poke_virt(at, &bytes[..6]);
        assert!(!entries(&scene).iter().any(|entry| entry.at == helper));
        let at = MODULE_TEXT + 0x800;
        let mut bytes = vec![0x48, 0x8d, 0x35];
        bytes.extend_from_slice(&((helper - (at + 7)) as u32).to_le_bytes());
        scene.machine.poke_virt(at, &bytes);
        assert!(entries(&scene).iter().any(|entry| entry.at == helper));
    }

    #[test]
    fn the_kernels_own_tables_do_not_count() {
        let mut scene = Scene::new();
        let helper = MODULE_TEXT + 4 * 0x40;
        let sites = MODULE_TEXT + 0x2600;
        scene.poke_word(sites + 8, helper.0);
        assert!(entries(&scene).iter().any(|entry| entry.at == helper));
        let module = scene.image.modules[0].at;
        scene.set_member("module", "ftrace_callsites", module, sites.0);
        scene.set_member("module", "num_ftrace_callsites", module, 2);
        assert!(!entries(&scene).iter().any(|entry| entry.at == helper));
        scene.set_member("module", "num_ftrace_callsites", module, 1);
        assert!(entries(&scene).iter().any(|entry| entry.at == helper));
    }

    #[test]
    fn sequence_operations_are_recognised() {
        let mut scene = Scene::new();
        let table = MODULE_TEXT + 0x2600;
        let helper = MODULE_TEXT + 4 * 0x40;
        // start, stop, next, show; toy_timer returns nothing, toy_open an int.
        for (index, function) in [4, 3, 4, 1].into_iter().enumerate() {
            scene.poke_word(table + index as u64 * 8, (MODULE_TEXT + function * 0x40).0);
        }
        let all = entries(&scene);
        let start = all.iter().find(|entry| entry.at == helper).unwrap();
        assert_eq!((start.role, start.found.as_str()), (Role::Sequence, "seq_operations.start"));
        // An int where start() must return a pointer.
        scene.poke_word(table, (MODULE_TEXT + 0x40).0);
        assert!(entries(&scene).iter().all(|entry| entry.role != Role::Sequence));
    }

    #[test]
    fn types_come_from_the_member_where_the_function_has_none() {
        let mut scene = Scene::new();
        let helper = MODULE_TEXT + 4 * 0x40;
        let fops = GuestVirt(MODULE_TEXT.0 + 0x2100);
        scene.set_member("file_operations", "unlocked_ioctl", fops, helper.0);
        let all = entries(&scene);
        let found = all.iter().find(|entry| entry.at == helper).unwrap();
        assert_eq!(found.found, "file_operations.unlocked_ioctl");
        assert!(found.prototype.is_some());
    }
}
