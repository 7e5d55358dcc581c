//! The guest layer: what is read once from a running, healthy guest, without stopping it, so that it is
//! at hand outside the guest when the kernel has crashed. Finding the kernel is in `locate.rs`, reading
//! modules in `modules.rs`, comparing with memory later in `verify.rs`.
//!
//! The guest runs meanwhile. Text, read-only data, IDT and per-CPU bases do not change then; the module
//! list may, so it is walked before and after, and read again when it changed.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use guest::{AddressSpace, GuestPhys, GuestVirt, PhysMemory, Registers, VirtMemory};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::debug_files::{DebugFiles, Search};
use crate::kernel_layer::KernelLayer;
use crate::modules::{
    LoadedModule, ModuleKey, ModuleReader, btf_of_modules, knowledge_from_memory,
};
use crate::{
    Btf, BuildId, ConfirmedBy, Error, FoundBy, Knowledge, KnowledgeParts, Located, Module,
    OrcLayout, Placement, Pristine, RepairImage, Types, compile, locate, locate_without_files, orc,
};

/// Bytes of a page, the unit of hashing.
pub(crate) const PAGE: u64 = 4096;
/// More bytes than any kernel's text, BTF or ORC table has.
const MAX_TABLE: u64 = 256 << 20;
/// Vectors of an x86-64 IDT, and bytes of one gate (Intel SDM 3A 6.14.1).
const VECTORS: usize = 256;
const GATE: usize = 16;
/// How often the module list is read again when it changes meanwhile.
const TRIES: usize = 4;
/// First bytes of a stored guest layer, with the format's version.
const MAGIC: &[u8; 8] = b"DEFIBGL2";

/// What is known of the guest's kernel, from files or from its memory.
#[derive(Clone)]
pub struct KernelFacts {
    /// Symbols, unwind rows, source lines, prototypes.
    pub knowledge: Arc<Knowledge>,
    /// Types.
    pub types: Arc<dyn Types + Send + Sync>,
    /// The kernel's BTF, on which the BTF of modules builds; `None` = prototypes of modules are not read.
    pub btf: Option<Arc<Btf>>,
    /// Build id the facts were made from; `None` = not checked against the guest.
    pub build_id: Option<BuildId>,
}

impl KernelFacts {
    /// The facts of a compiled kernel layer.
    ///
    /// # Errors
    /// When its types are damaged.
    pub fn of_layer(layer: &KernelLayer) -> Result<Self, Error> {
        let btf = layer.types()?;
        let types: Arc<dyn Types + Send + Sync> = Arc::<Btf>::clone(&btf);
        let (knowledge, build_id) = (Arc::clone(layer.knowledge()), Some(layer.build_id()));
        Ok(Self { knowledge, types, btf: Some(btf), build_id })
    }
}

/// A gate of the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// Vector.
    pub vector: u8,
    /// Handler, guest-virtual.
    pub handler: GuestVirt,
    /// Interrupt stack table index, 0 = none.
    pub ist: u8,
    /// The 16 bytes as they are in memory.
    pub raw: [u8; GATE],
    /// Whether the handler lies in kernel text. In a healthy guest all do but those of exceptions that the
    /// kernel was built without: these keep the early boot's handlers, in init text that was freed.
    pub in_text: bool,
}

/// Which part of the kernel pages belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageKind {
    /// `_stext` to `_etext`
    Text,
    /// `__start_rodata` to `__end_rodata`
    ReadOnlyData,
    /// `idt_table`
    Idt,
    /// Text of a module
    ModuleText,
    /// Read-only data of a module
    ModuleReadOnlyData,
}

impl PageKind {
    /// All kinds, by the number that stands for them in files.
    const ALL: [Self; 5] =
        [Self::Text, Self::ReadOnlyData, Self::Idt, Self::ModuleText, Self::ModuleReadOnlyData];

    pub(crate) fn number(self) -> u64 {
        Self::ALL.iter().position(|&kind| kind == self).unwrap_or_default() as u64
    }

    pub(crate) fn of_number(number: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Whether it is executed.
    #[must_use]
    pub fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::ModuleText)
    }

    /// Whether it is the kernel proper's, not a module's.
    #[must_use]
    pub fn is_of_kernel(self) -> bool {
        !matches!(self, Self::ModuleText | Self::ModuleReadOnlyData)
    }
}

/// Hashes (XXH3, 64 bits) of consecutive pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageHashes {
    /// What they are.
    pub kind: PageKind,
    /// Guest-virtual address of the first page.
    pub start: GuestVirt,
    /// One hash a page; `None` = not mapped or not readable.
    pub hashes: Vec<Option<u64>>,
}

/// The guest layer. Belongs to one boot of one kernel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestLayer {
    /// `linux_banner`
    pub banner: String,
    /// Build id read from the guest.
    pub build_id: Option<BuildId>,
    /// By what the kernel was found.
    pub found_by: FoundBy,
    /// How it is known to be the running one.
    pub confirmed_by: ConfirmedBy,
    /// The kernel's `system_state` before the layer was taken; `None` when it is not known.
    #[serde(default)]
    pub system_state: Option<u32>,
    /// Guest-physical address of `_text`.
    pub text_phys: GuestPhys,
    /// Where the kernel lies.
    pub placement: Placement,
    /// Differs from boot to boot. See [`GuestLayer::is_same_boot`].
    pub boot: u64,
    /// Present gates of the IDT.
    pub idt: Vec<Gate>,
    /// Hash of `sys_call_table`.
    pub syscall_table: Option<u64>,
    /// Modules, in the kernel's order.
    pub modules: Vec<LoadedModule>,
    /// The module list when they were read.
    pub module_keys: Vec<ModuleKey>,
    /// Hashes of text and read-only pages.
    #[serde(skip)]
    pub pages: Vec<PageHashes>,
    /// Text and read-only data themselves, to be put back where they were damaged.
    #[serde(skip)]
    pub pristine: Arc<Pristine>,
    #[serde(skip)]
    knowledge: Vec<Arc<Knowledge>>,
    #[serde(skip)]
    text: KernelText,
}

/// What becomes of the text and read-only data of the guest that a layer is taken from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelText {
    /// They are copied and hashed: the guest is healthy, and what changes later is damage. Some ten milliseconds, and
    /// as many bytes as the kernel has text.
    #[default]
    Kept,
    /// They are left where they are: the memory is a dump's, and has no later.
    Left,
}

impl GuestLayer {
    /// Takes the layer from a running guest or a dump. `vcpus` may hold registers, see [`locate`].
    ///
    /// # Errors
    /// As [`locate`]; or the module list can't be read, or never holds still.
    pub fn take(
        phys: &dyn PhysMemory,
        kernel: &KernelFacts,
        vcpus: &[Registers],
        text: KernelText,
    ) -> Result<Self, Error> {
        let located = locate(phys, &kernel.knowledge, kernel.build_id, vcpus)?;
        Self::take_located(phys, kernel, located, text)
    }

    /// Takes the layer of a kernel that was found already.
    ///
    /// # Errors
    /// The module list can't be read, or never holds still.
    pub fn take_located(
        phys: &dyn PhysMemory,
        kernel: &KernelFacts,
        located: Located,
        text: KernelText,
    ) -> Result<Self, Error> {
        let placement = located.placement;
        let space = placement.space(phys);
        let place = Place { kernel, slide: placement.slide };
        // The first question for a type builds an index of all their names, which takes as long as copying half
        // of the text: both at once.
        let pristine = std::thread::scope(|scope| {
            scope.spawn(|| kernel.types.member("list_head", "next"));
            Arc::new(match text {
                KernelText::Kept => Pristine::of_kernel(&space, &place, &placement.text),
                KernelText::Left => Pristine::default(),
            })
        });
        let mut layer = Self {
            banner: located.banner,
            build_id: located.build_id,
            found_by: located.found_by,
            confirmed_by: located.confirmed_by,
            system_state: located.system_state,
            text_phys: located.text_phys,
            boot: boot_identity(&space, &place, &placement),
            idt: place.idt(&space, &placement.text),
            syscall_table: place.syscall_table(&space),
            modules: Vec::new(),
            module_keys: Vec::new(),
            pages: Vec::new(),
            pristine: Arc::clone(&pristine),
            knowledge: Vec::new(),
            text,
            placement,
        };
        let (hashes, read) = std::thread::scope(|scope| {
            let hashes = scope.spawn(|| kept_hashes(&pristine));
            let read = layer.read_modules(&space, &place);
            (hashes.join().unwrap_or_default(), read)
        });
        read?;
        if text == KernelText::Left {
            return Ok(layer);
        }
        layer.pages = pages(&space, &place, &layer.placement.text, &hashes);
        Ok(layer)
    }

    /// Its address space in `phys`.
    #[must_use]
    pub fn space<'m>(&self, phys: &'m dyn PhysMemory) -> AddressSpace<'m> {
        self.placement.space(phys)
    }

    /// Whether the guest is still in the boot that the layer was taken from, by the stack canary of the
    /// first task, random memory bases, and the kernel's place. Cheap.
    #[must_use]
    pub fn is_same_boot(&self, phys: &dyn PhysMemory, kernel: &KernelFacts) -> bool {
        let place = Place { kernel, slide: self.placement.slide };
        boot_identity(&self.space(phys), &place, &self.placement) == self.boot
    }

    /// Reads the modules again if the list changed; says whether it did. Takes some ten microseconds
    /// when it did not. Knowledge of modules that stayed is kept.
    ///
    /// # Errors
    /// The module list can't be read, or never holds still.
    pub fn refresh_modules(
        &mut self,
        phys: &dyn PhysMemory,
        kernel: &KernelFacts,
    ) -> Result<bool, Error> {
        let space = self.space(phys);
        let place = Place { kernel, slide: self.placement.slide };
        if place.modules()?.keys(&space)? == self.module_keys {
            return Ok(false);
        }
        self.read_modules(&space, &place)?;
        Ok(true)
    }

    fn read_modules(&mut self, space: &AddressSpace<'_>, place: &Place<'_>) -> Result<(), Error> {
        let reader = place.modules()?;
        let types = &*place.kernel.types;
        let mut last = None;
        for _ in 0..TRIES {
            let keys = reader.keys(space)?;
            let read = keys.iter().filter_map(|key| reader.module(space, types, key).transpose());
            let modules = read.collect::<Result<Vec<_>, _>>();
            let changed = reader.keys(space)? != keys;
            match modules {
                Ok(modules) if !changed => {
                    self.learn(space, place, modules);
                    self.module_keys = keys;
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) => last = Some(error),
            }
        }
        let (at, value) = (self.placement.text.start, TRIES as u64);
        Err(last.unwrap_or(Error::Implausible {
            what: "module list (it keeps changing)",
            at,
            value,
        }))
    }

    /// Takes over `modules`, with knowledge of those that were not there before.
    fn learn(&mut self, space: &AddressSpace<'_>, place: &Place<'_>, modules: Vec<LoadedModule>) {
        let types = &*place.kernel.types;
        let head = place.address("btf_modules");
        let btf = place.kernel.btf.as_ref().zip(head);
        let stayed: HashSet<GuestVirt> =
            modules.iter().filter(|new| self.modules.contains(new)).map(|new| new.at).collect();
        let is_new = |at: GuestVirt| !stayed.contains(&at);
        let btf = btf.map(|(base, head)| btf_of_modules(space, types, head, base, &is_new));
        let btf = btf.unwrap_or_default();
        let known = self.modules.iter().zip(&self.knowledge);
        let known: Vec<_> =
            known.map(|(module, known)| (module.clone(), Arc::clone(known))).collect();
        let knowledge = modules.iter().map(|module| {
            let kept = known.iter().find(|(before, _)| module.has_code_of(before));
            kept.map(|(_, knowledge)| Arc::clone(knowledge)).unwrap_or_else(|| {
                Arc::new(knowledge_from_memory(space, types, module, btf.get(&module.at)))
            })
        });
        self.knowledge = knowledge.collect();
        if self.text == KernelText::Kept {
            Arc::make_mut(&mut self.pristine).take_modules(space, &modules, &self.modules);
        }
        self.modules = modules;
    }

    /// Replaces the knowledge of a module by a better one, made from its file; `false` when there is no
    /// such module.
    pub fn set_module_knowledge(&mut self, name: &str, knowledge: Arc<Knowledge>) -> bool {
        let index = self.modules.iter().position(|module| module.name == name);
        let slot = index.and_then(|index| self.knowledge.get_mut(index));
        slot.is_some_and(|slot| {
            *slot = knowledge;
            true
        })
    }

    /// Makes the knowledge of every module better whose file with debug information is found; says for each
    /// module what was found. A file without source lines changes nothing: memory tells as much. Modules whose
    /// file was found before are left as they are.
    pub fn load_debug_files(
        &mut self,
        kernel: &KernelFacts,
        files: &DebugFiles,
    ) -> Vec<(String, Search)> {
        let layout = OrcLayout::of(&*kernel.types);
        let mut report = Vec::new();
        for (module, slot) in self.modules.iter().zip(&mut self.knowledge) {
            if slot.has_source() {
                continue;
            }
            let mut search = files.find(module);
            if let Some(file) = &search.file {
                match compile::module(&file.bytes, &module.sections, layout) {
                    Ok(knowledge) if knowledge.has_source() => *slot = Arc::new(knowledge),
                    Ok(_) => {}
                    Err(error) => search.refused.push((file.path.clone(), error)),
                }
            }
            report.push((module.name.clone(), search));
        }
        report
    }

    /// The modules with their knowledge, as a [`RepairImage`] wants them.
    #[must_use]
    pub fn placed_modules(&self) -> Vec<Module> {
        let knowledge = self.knowledge.iter().cloned().map(Some).chain(std::iter::repeat(None));
        let modules = self.modules.iter().zip(knowledge);
        let module = |(module, knowledge): (&LoadedModule, Option<Arc<Knowledge>>)| Module {
            name: module.name.clone(),
            at: module.at,
            text: module.text.clone(),
            ranges: module.ranges.clone(),
            sections: module.sections.clone(),
            knowledge: knowledge.unwrap_or_default(),
        };
        modules.map(module).collect()
    }

    /// For section `.defib.guest` of the image file: magic, length of the JSON part (u64), JSON, the pristine
    /// pages (number of runs; per run kind, start, length and bytes), then per run of hashed pages kind (u64), start, count, and the hashes, 0 for a page that was not mapped. Knowledge of
    /// modules is not stored: it is read again.
    ///
    /// # Errors
    /// When a value has no JSON form, which does not happen for a layer that was taken from a guest.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let json = serde_json::to_vec(self)?;
        let mut out = MAGIC.to_vec();
        out.extend((json.len() as u64).to_le_bytes());
        out.extend(json);
        self.pristine.write(&mut out);
        for run in &self.pages {
            for word in [run.kind.number(), run.start.0, run.hashes.len() as u64] {
                out.extend(word.to_le_bytes());
            }
            out.extend(run.hashes.iter().flat_map(|hash| hash.unwrap_or(0).to_le_bytes()));
        }
        Ok(out)
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`Error::Damaged`] for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(damaged("wrong magic", 0))?;
        let len = usize::try_from(word(&mut rest)?).unwrap_or(usize::MAX);
        let json = rest.get(..len).ok_or(damaged("length of the JSON part", len))?;
        let mut layer: Self = serde_json::from_slice(json)
            .map_err(|error| damaged("JSON of the guest layer, column", error.column()))?;
        rest = rest.get(len..).unwrap_or_default();
        layer.pristine = Arc::new(Pristine::read(&mut rest)?);
        while !rest.is_empty() {
            let kind = word(&mut rest)?;
            let kind =
                PageKind::of_number(kind).ok_or(damaged("kind of hashed pages", kind as usize))?;
            let start = GuestVirt(word(&mut rest)?);
            let count = usize::try_from(word(&mut rest)?).unwrap_or(usize::MAX);
            if count > rest.len() / 8 {
                return Err(damaged("number of page hashes", count));
            }
            let hashes =
                (0..count).map(|_| word(&mut rest).map(|hash| (hash != 0).then_some(hash)));
            layer.pages.push(PageHashes { kind, start, hashes: hashes.collect::<Result<_, _>>()? });
        }
        Ok(layer)
    }
}

pub(crate) fn damaged(what: &'static str, found: usize) -> Error {
    Error::Damaged { what, found: found as u64, expected: 0 }
}

pub(crate) fn word(rest: &mut &[u8]) -> Result<u64, Error> {
    let (word, after) = rest.split_first_chunk().ok_or(damaged("end of the guest layer", 0))?;
    *rest = after;
    Ok(u64::from_le_bytes(*word))
}

impl RepairImage {
    /// Puts the kernel's facts and a guest layer together.
    #[must_use]
    pub fn assemble(kernel: &KernelFacts, layer: &GuestLayer) -> Self {
        Self {
            kernel: Arc::clone(&kernel.knowledge),
            types: Arc::clone(&kernel.types),
            placement: layer.placement.clone(),
            modules: layer.placed_modules(),
            pristine: Arc::clone(&layer.pristine),
        }
    }
}

/// Kernel symbols at run-time addresses.
pub(crate) struct Place<'k> {
    pub(crate) kernel: &'k KernelFacts,
    pub(crate) slide: u64,
}

impl Place<'_> {
    pub(crate) fn address(&self, name: &str) -> Option<GuestVirt> {
        let at = self.kernel.knowledge.symbol(name)?.at;
        Some(GuestVirt(at.0.wrapping_add(self.slide)))
    }

    /// From one symbol to another.
    pub(crate) fn range(&self, start: &str, end: &str) -> Option<Range<GuestVirt>> {
        let range = self.address(start)?..self.address(end)?;
        (range.start < range.end && range.end - range.start <= MAX_TABLE).then_some(range)
    }

    /// The gates of `idt_table` that are present.
    pub(crate) fn idt(&self, space: &dyn VirtMemory, text: &Range<GuestVirt>) -> Vec<Gate> {
        let mut table = [0; VECTORS * GATE];
        let at = self.address("idt_table");
        if at.is_none_or(|at| space.read(at, &mut table).is_err()) {
            return Vec::new();
        }
        let gates = (0..=u8::MAX).zip(table.as_chunks::<GATE>().0);
        let present = gates.filter(|(_, raw)| raw[5] & 0x80 != 0);
        present.map(|(vector, raw)| gate(vector, raw, text)).collect()
    }

    /// Hash of the system-call table.
    pub(crate) fn syscall_table(&self, space: &dyn VirtMemory) -> Option<u64> {
        let size = self.kernel.knowledge.symbol("sys_call_table")?.size;
        let at = self.address("sys_call_table")?;
        Some(xxh3_64(&table(space, &(at..at.checked_add(size.min(1 << 16))?))?))
    }

    /// Names of the first functions that start in `range`, at most `most`.
    pub(crate) fn functions_in(&self, range: &Range<GuestVirt>, most: usize) -> Vec<String> {
        let link = |at: GuestVirt| guest::LinkAddr(at.0.wrapping_sub(self.slide));
        let (start, end) = (link(range.start), link(range.end));
        let first = self.kernel.knowledge.function_at(start).filter(|symbol| symbol.at < start);
        let inside = self.kernel.knowledge.functions();
        let inside = inside.skip_while(|symbol| symbol.at < start);
        let inside = inside.take_while(|symbol| symbol.at < end);
        first.into_iter().chain(inside).take(most).map(|symbol| symbol.name.to_owned()).collect()
    }

    /// The module list now.
    pub(crate) fn module_keys(&self, space: &dyn VirtMemory) -> Result<Vec<ModuleKey>, Error> {
        self.modules()?.keys(space)
    }

    fn modules(&self) -> Result<ModuleReader, Error> {
        let head = self.address("modules").ok_or(Error::MissingSymbol { name: "modules" })?;
        ModuleReader::new(&*self.kernel.types, head)
    }
}

/// A hash of what is random or different at each boot.
fn boot_identity(space: &dyn VirtMemory, place: &Place<'_>, placement: &Placement) -> u64 {
    let mut hash = Xxh3::new();
    let mut add = |value: Option<u64>| hash.update(&value.unwrap_or(0).to_le_bytes());
    add(Some(placement.slide));
    add(Some(placement.root.0));
    let read = |at: GuestVirt| space.read_u64(at).ok();
    add(place.address("page_offset_base").and_then(read));
    // Random bits; set once for the first task, in boot_init_stack_canary().
    let canary = place.kernel.types.member("task_struct", "stack_canary");
    let first = place.address("init_task");
    add(canary.zip(first).and_then(|(member, task)| read(task + member.offset)));
    placement.per_cpu.iter().for_each(|&base| add(Some(base)));
    hash.digest()
}

/// Decodes a gate: offset bits 15..0 at byte 0, IST at byte 4, bits 31..16 at 6, bits 63..32 at 8.
fn gate(vector: u8, raw: &[u8; GATE], text: &Range<GuestVirt>) -> Gate {
    let [a, b, _, _, ist, _, c, d, e, f, g, h, ..] = *raw;
    let handler = GuestVirt(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
    Gate { vector, handler, ist: ist & 7, raw: *raw, in_text: text.contains(&handler) }
}

/// The bytes of a range of at most 256 MiB; `None` if they can't be read.
fn table(space: &dyn VirtMemory, range: &Range<GuestVirt>) -> Option<Vec<u8>> {
    let len = range.end - range.start;
    let mut bytes = vec![0; usize::try_from(len).ok().filter(|_| len <= MAX_TABLE)?];
    space.read(range.start, &mut bytes).ok()?;
    Some(bytes)
}

/// Hashes of the pages that are kept, by address.
fn kept_hashes(pristine: &Pristine) -> HashMap<GuestVirt, u64> {
    let runs = pristine.runs().iter();
    let pages = runs.flat_map(|run| {
        let hashed = (0u64..).zip(run.bytes.chunks(PAGE as usize));
        hashed.map(|(index, page)| (run.start + index * PAGE, hash_page(page)))
    });
    pages.collect()
}

/// Hashes of the kernel's text and read-only data. Pages that are kept were read and hashed already; those that
/// are not (with `rodata=off`) are read here.
fn pages(
    space: &AddressSpace<'_>,
    place: &Place<'_>,
    text: &Range<GuestVirt>,
    kept: &HashMap<GuestVirt, u64>,
) -> Vec<PageHashes> {
    let rodata = place.range("__start_rodata", "__end_rodata");
    let runs = [(PageKind::Text, Some(text.clone())), (PageKind::ReadOnlyData, rodata)];
    let runs = runs.into_iter().filter_map(|(kind, range)| Some((kind, range?)));
    let hashes = |(kind, range): (PageKind, Range<GuestVirt>)| {
        let start = range.start.align_down(PAGE);
        let count = (range.end - start).min(MAX_TABLE).div_ceil(PAGE);
        let hashes = (0..count).map(|index| {
            let at = start + index * PAGE;
            let read = || hash_pages(space, kind, &(at..at + PAGE)).hashes.pop().flatten();
            kept.get(&at).copied().or_else(read)
        });
        PageHashes { kind, start, hashes: hashes.collect() }
    };
    runs.map(hashes).collect()
}

/// Hashes every page that `range` touches.
pub(crate) fn hash_pages(
    space: &AddressSpace<'_>,
    kind: PageKind,
    range: &Range<GuestVirt>,
) -> PageHashes {
    let start = range.start.align_down(PAGE);
    let count = (range.end - start).min(MAX_TABLE).div_ceil(PAGE);
    let mut chunk = vec![0; 64 * PAGE as usize];
    let mut hashes = Vec::new();
    while (hashes.len() as u64) < count {
        let at = start + hashes.len() as u64 * PAGE;
        let here = ((count - hashes.len() as u64).min(64) * PAGE) as usize;
        let Some(bytes) = chunk.get_mut(..here) else { break };
        if space.read(at, bytes).is_ok() {
            hashes.extend(bytes.chunks_exact(PAGE as usize).map(|page| Some(hash_page(page))));
            continue;
        }
        for (index, page) in bytes.chunks_exact_mut(PAGE as usize).enumerate() {
            let readable = space.read(at + index as u64 * PAGE, page).is_ok();
            hashes.push(readable.then(|| hash_page(page)));
        }
    }
    PageHashes { kind, start, hashes }
}

/// 0 stands for "not mapped" in the file, so it is not used as a hash.
fn hash_page(page: &[u8]) -> u64 {
    xxh3_64(page).max(1)
}

/// Finds the kernel and learns of it without any file: symbols, types, ORC. No source lines, and unwind
/// rows know only rsp and rbp.
///
/// # Errors
/// As [`locate_without_files`]; [`Error::MissingSymbol`] for a kernel without BTF
/// (`CONFIG_DEBUG_INFO_BTF`): structures can't be read then.
pub fn without_files(
    phys: &dyn PhysMemory,
    vcpus: &[Registers],
) -> Result<(Located, KernelFacts), Error> {
    let (located, parts) = locate_without_files(phys, vcpus)?;
    let space = located.placement.space(phys);
    let symbol = |wanted: &str| {
        let found = parts.symbols.iter().find(|(name, ..)| name == wanted)?;
        Some(GuestVirt(found.1.0.wrapping_add(located.placement.slide)))
    };
    let section = |start: &'static str, stop| {
        let range = symbol(start).zip(symbol(stop)).map(|(start, stop)| start..stop);
        let range = range.filter(|range| range.start < range.end);
        range.ok_or(Error::MissingSymbol { name: start })
    };
    let btf = section("__start_BTF", "__stop_BTF")?;
    let implausible =
        Error::Implausible { what: "BTF section", at: btf.start, value: btf.end - btf.start };
    let btf = Arc::new(Btf::new(table(&space, &btf).ok_or(implausible)?)?);
    let mut unwind = Vec::new();
    if let Ok(ips) = section("__start_orc_unwind_ip", "__stop_orc_unwind_ip")
        && let Ok(entries) = section("__start_orc_unwind", "__stop_orc_unwind")
        && let Some(layout) = OrcLayout::of(&*btf)
        && let Some((ip_bytes, entries)) = table(&space, &ips).zip(table(&space, &entries))
    {
        let linked = ips.start.0.wrapping_sub(located.placement.slide);
        unwind = orc::rows(&ip_bytes, linked, &entries, layout);
    }
    let build_id = located.build_id;
    let knowledge = Arc::new(Knowledge::new(KnowledgeParts { unwind, ..parts }));
    let types: Arc<dyn Types + Send + Sync> = Arc::<Btf>::clone(&btf);
    Ok((located, KernelFacts { knowledge, types, btf: Some(btf), build_id }))
}
