//! The repair image in use: one kernel's knowledge placed at the addresses of one running guest.
//! Answers by guest-virtual address. Taking the guest layer from memory is in `guest_layer.rs`.

use std::ops::Range;
use std::sync::Arc;

use guest::{AddressSpace, GuestPhys, GuestVirt, LinkAddr, PhysMemory};
use serde::{Deserialize, Serialize};

use crate::{Knowledge, Pristine, Prototype, SourceFrame, Symbol, Types, UnwindRow};

/// A module of the running guest.
#[derive(Clone, Debug)]
pub struct Module {
    /// Name as in `/proc/modules`.
    pub name: String,
    /// Guest-virtual address of its `struct module`.
    pub at: GuestVirt,
    /// Executable ranges, guest-virtual.
    pub text: Vec<Range<GuestVirt>>,
    /// Every range that belongs to the module (text, data, read-only data), guest-virtual.
    pub ranges: Vec<Range<GuestVirt>>,
    /// Sections by name, where loaded.
    pub sections: Vec<(String, GuestVirt)>,
    /// Its code knowledge, at run-time addresses.
    pub knowledge: Arc<Knowledge>,
}

impl Module {
    /// Whether `at` lies in one of the module's ranges (text or data).
    #[must_use]
    pub fn contains(&self, at: GuestVirt) -> bool {
        self.ranges.iter().any(|range| range.contains(&at))
    }

    /// Whether `at` lies in the module's text.
    #[must_use]
    pub fn is_text(&self, at: GuestVirt) -> bool {
        self.text.iter().any(|range| range.contains(&at))
    }
}

/// Where the kernel lies in one running guest. Belongs to one boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// KASLR slide: run-time address minus link address, wrapping.
    pub slide: u64,
    /// Guest-physical address of the kernel's own top page table (`init_top_pgt`).
    pub root: GuestPhys,
    /// 5-level paging.
    pub five_level: bool,
    /// Kernel text at run time, guest-virtual: `_stext` to `_etext`.
    pub text: Range<GuestVirt>,
    /// Per-CPU bases (`__per_cpu_offset[n]`), by kernel CPU number.
    pub per_cpu: Vec<u64>,
}

impl Placement {
    /// The kernel's own address space in `phys`.
    #[must_use]
    pub fn space<'m>(&self, phys: &'m dyn PhysMemory) -> AddressSpace<'m> {
        AddressSpace::new(phys, self.root, self.five_level)
    }
}

/// A place in code, by name.
#[derive(Clone, Copy, Debug)]
pub struct Location<'a> {
    /// The module, `None` for the kernel proper.
    pub module: Option<&'a Module>,
    /// The function.
    pub symbol: Symbol<'a>,
    /// Bytes from the function's start.
    pub offset: u64,
}

impl Location<'_> {
    /// Guest-virtual address of the function's first byte, given the address that was looked up.
    #[must_use]
    pub fn start(&self, looked_up: GuestVirt) -> GuestVirt {
        GuestVirt(looked_up.0.wrapping_sub(self.offset))
    }
}

/// The repair image of one running guest. Copies share what is large.
#[derive(Clone)]
pub struct RepairImage {
    /// Knowledge of the kernel, at link addresses.
    pub kernel: Arc<Knowledge>,
    /// The kernel's types.
    pub types: Arc<dyn Types + Send + Sync>,
    /// Where the kernel lies.
    pub placement: Placement,
    /// The modules, in the kernel's order.
    pub modules: Vec<Module>,
    /// What the kernel never writes, to be put back where it was damaged.
    pub pristine: Arc<Pristine>,
}

impl RepairImage {
    /// Run-time address of a link address of the kernel.
    #[must_use]
    pub fn place(&self, at: LinkAddr) -> GuestVirt {
        GuestVirt(at.0.wrapping_add(self.placement.slide))
    }

    /// Link address of a run-time address of the kernel.
    #[must_use]
    pub fn link(&self, at: GuestVirt) -> LinkAddr {
        LinkAddr(at.0.wrapping_sub(self.placement.slide))
    }

    /// Run-time address of a kernel symbol. Per-CPU symbols are not placed: see [`Self::per_cpu`].
    #[must_use]
    pub fn address_of(&self, symbol: &str) -> Option<GuestVirt> {
        self.kernel.symbol(symbol).map(|symbol| self.place(symbol.at))
    }

    /// Offset of a per-CPU variable from a CPU's base (what `gs:` instructions use). Before v6.14 per-CPU
    /// symbols are zero-based, link address = offset; since commit 9d7de2aa8b41 ("x86/percpu/64: Use
    /// relative percpu offsets", v6.15) they have ordinary addresses, and bases are relative to them.
    #[must_use]
    pub fn per_cpu_offset(&self, symbol: &str) -> Option<u64> {
        let at = self.kernel.symbol(symbol)?.at;
        let zero_based = self.kernel.symbol("__per_cpu_start").is_none_or(|start| start.at.0 == 0);
        Some(if zero_based { at.0 } else { self.place(at).0 })
    }

    /// Guest-virtual address of a per-CPU variable on a CPU (kernel CPU number).
    #[must_use]
    pub fn per_cpu(&self, symbol: &str, cpu: usize) -> Option<GuestVirt> {
        let base = *self.placement.per_cpu.get(cpu)?;
        Some(GuestVirt(base.wrapping_add(self.per_cpu_offset(symbol)?)))
    }

    /// The kernel CPU whose per-CPU base is `gs_base` (value of GS base in kernel mode).
    #[must_use]
    pub fn cpu_of_gs_base(&self, gs_base: u64) -> Option<usize> {
        self.placement.per_cpu.iter().position(|&base| base == gs_base)
    }

    /// The module whose text contains `at`.
    #[must_use]
    pub fn module_of_text(&self, at: GuestVirt) -> Option<&Module> {
        self.modules.iter().find(|module| module.is_text(at))
    }

    /// Whether `at` lies in kernel or module text.
    #[must_use]
    pub fn is_text(&self, at: GuestVirt) -> bool {
        self.placement.text.contains(&at) || self.module_of_text(at).is_some()
    }

    fn knowledge_at(&self, at: GuestVirt) -> Option<(&Knowledge, Option<&Module>, LinkAddr)> {
        if let Some(module) = self.module_of_text(at) {
            return Some((&module.knowledge, Some(module), LinkAddr(at.0)));
        }
        self.placement.text.contains(&at).then(|| (&*self.kernel, None, self.link(at)))
    }

    /// The function at a code address.
    #[must_use]
    pub fn locate(&self, at: GuestVirt) -> Option<Location<'_>> {
        let (knowledge, module, link) = self.knowledge_at(at)?;
        let symbol = knowledge.function_at(link)?;
        Some(Location { module, symbol, offset: link - symbol.at })
    }

    /// Where another function of the same object lies: used to join `f` with `f.cold`.
    #[must_use]
    pub fn sibling(&self, at: GuestVirt, name: &str) -> Option<(GuestVirt, u64)> {
        let (knowledge, module, link) = self.knowledge_at(at)?;
        let symbol =
            knowledge.symbols_named(name).min_by_key(|symbol| symbol.at.0.abs_diff(link.0))?;
        let start = if module.is_some() { GuestVirt(symbol.at.0) } else { self.place(symbol.at) };
        Some((start, symbol.size))
    }

    /// The unwind row in force at a code address.
    #[must_use]
    pub fn unwind_row(&self, at: GuestVirt) -> Option<UnwindRow> {
        let (knowledge, _, link) = self.knowledge_at(at)?;
        knowledge.unwind_row(link)
    }

    /// The chain of inlined calls at a code address, innermost first.
    #[must_use]
    pub fn source(&self, at: GuestVirt) -> Vec<SourceFrame> {
        self.knowledge_at(at).map(|(knowledge, _, link)| knowledge.source(link)).unwrap_or_default()
    }

    /// Prototype of the function at a code address: from its object's debug information, else from the
    /// kernel's BTF (kernel functions only: a module may reuse a name).
    #[must_use]
    pub fn prototype_at(&self, at: GuestVirt) -> Option<Prototype> {
        let (knowledge, module, link) = self.knowledge_at(at)?;
        let name = knowledge.function_at(link)?.name;
        let own = knowledge.prototype(name).cloned();
        own.or_else(|| if module.is_none() { self.types.prototype(name) } else { None })
    }
}
