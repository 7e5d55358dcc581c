//! Comparing a guest layer with the guest's memory now: which pages, gates and modules differ, and what
//! may have changed them. Nothing is judged as an attack or repaired here.

use guest::{AddressSpace, GuestVirt, PhysMemory, VirtMemory};
use serde::Serialize;

use crate::guest_layer::{PAGE, Place, hash_pages};
use crate::{Damage, GuestLayer, KernelFacts, PageKind, RepairImage, compare};

/// Symbols named per page.
const MAX_SYMBOLS: usize = 16;
/// More jump labels or static call sites than any kernel has.
const MAX_SITES: u64 = 1 << 18;

/// A page that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DifferingPage {
    /// Guest-virtual address of the page.
    pub at: GuestVirt,
    /// Part of the kernel.
    pub kind: PageKind,
    /// Whether it can be read now.
    pub readable: bool,
    /// First functions in it, at most 16.
    pub symbols: Vec<String>,
    /// Jump labels (static keys) in it: the kernel rewrites these when a key is switched.
    pub jump_labels: usize,
    /// Static calls in it: the kernel rewrites these when the call's target is set.
    pub static_calls: usize,
}

impl DifferingPage {
    /// Why the kernel itself may have changed the page; `None` = no reason is known. Tracing (ftrace, kprobes,
    /// live patching) rewrites function entries anywhere in text and is not told apart.
    #[must_use]
    pub fn legitimate_reason(&self) -> Option<&'static str> {
        match self.kind {
            PageKind::Text if self.jump_labels > 0 => Some("holds jump labels"),
            PageKind::Text if self.static_calls > 0 => Some("holds static calls"),
            _ => None,
        }
    }
}

/// What differs between a guest layer and memory.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// Whether the guest is in the same boot. If not, the rest means nothing.
    pub same_boot: bool,
    /// Pages compared.
    pub pages: usize,
    /// Pages that differ.
    pub differing: Vec<DifferingPage>,
    /// Damage: bytes that differ where the kernel itself rewrites nothing.
    pub damage: Vec<Damage>,
    /// IDT vectors whose gates differ.
    pub gates: Vec<u8>,
    /// Whether `sys_call_table` differs.
    pub syscall_table: bool,
    /// Whether the module list differs; `None` = it can't be read now.
    pub modules: Option<bool>,
}

impl Verification {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.same_boot
            && self.differing.is_empty()
            && self.damage.is_empty()
            && self.gates.is_empty()
            && !self.syscall_table
            && self.modules == Some(false)
    }
}

/// Compares `layer` with memory now.
#[must_use]
pub fn verify(phys: &dyn PhysMemory, kernel: &KernelFacts, layer: &GuestLayer) -> Verification {
    let space = layer.space(phys);
    let place = Place { kernel, slide: layer.placement.slide };
    let sites = Sites::read(&space, &place);
    let mut differing = Vec::new();
    for run in &layer.pages {
        let len = run.hashes.len() as u64 * PAGE;
        let now = hash_pages(&space, run.kind, &(run.start..run.start + len));
        for (index, (was, is)) in run.hashes.iter().zip(&now.hashes).enumerate() {
            if was != is {
                let at = run.start + index as u64 * PAGE;
                differing.push(sites.explain(&place, at, run.kind, is.is_some()));
            }
        }
    }
    let idt = place.idt(&space, &layer.placement.text);
    let changed = (0..=u8::MAX).filter(|vector| {
        let gate =
            |gates: &[crate::Gate]| gates.iter().find(|gate| gate.vector == *vector).copied();
        gate(&layer.idt) != gate(&idt)
    });
    Verification {
        same_boot: layer.is_same_boot(phys, kernel),
        pages: layer.pages.iter().map(|run| run.hashes.len()).sum(),
        differing,
        damage: compare(&RepairImage::assemble(kernel, layer), phys).damage,
        gates: changed.collect(),
        syscall_table: place.syscall_table(&space) != layer.syscall_table,
        modules: place.module_keys(&space).ok().map(|keys| keys != layer.module_keys),
    }
}

/// Places in text that the kernel rewrites, ascending.
#[derive(Debug, Default)]
struct Sites {
    jump_labels: Vec<GuestVirt>,
    static_calls: Vec<GuestVirt>,
}

impl Sites {
    fn read(space: &AddressSpace<'_>, place: &Place<'_>) -> Self {
        let table = |start, stop, structure, member| {
            read_sites(space, place, [start, stop], structure, member).unwrap_or_default()
        };
        Self {
            jump_labels: table("__start___jump_table", "__stop___jump_table", "jump_entry", "code"),
            static_calls: table(
                "__start_static_call_sites",
                "__stop_static_call_sites",
                "static_call_site",
                "addr",
            ),
        }
    }

    fn explain(
        &self,
        place: &Place<'_>,
        at: GuestVirt,
        kind: PageKind,
        readable: bool,
    ) -> DifferingPage {
        let within = |sites: &[GuestVirt]| {
            let first = sites.partition_point(|site| *site < at);
            sites.partition_point(|site| *site < at + PAGE).saturating_sub(first)
        };
        DifferingPage {
            at,
            kind,
            readable,
            symbols: place.functions_in(&(at..at + PAGE), MAX_SYMBOLS),
            jump_labels: within(&self.jump_labels),
            static_calls: within(&self.static_calls),
        }
    }
}

/// Addresses in a table whose entries hold a 32-bit distance from the member itself, as
/// `CONFIG_HAVE_ARCH_JUMP_LABEL_RELATIVE` (v4.19) and static calls (v5.10) have it.
fn read_sites(
    space: &AddressSpace<'_>,
    place: &Place<'_>,
    [start, stop]: [&str; 2],
    structure: &str,
    member: &str,
) -> Option<Vec<GuestVirt>> {
    let range = place.range(start, stop)?;
    let stride = place.kernel.types.size_of(structure).filter(|&size| size > 0)?;
    let member = place.kernel.types.member(structure, member)?;
    let count = ((range.end - range.start) / stride).min(MAX_SITES);
    let mut bytes = vec![0; usize::try_from(count * stride).ok()?];
    space.read(range.start, &mut bytes).ok()?;
    let offset = usize::try_from(member.offset).ok()?;
    let mut sites = Vec::new();
    for (index, entry) in (0u64..).zip(bytes.chunks_exact(stride as usize)) {
        let distance = entry.get(offset..)?.first_chunk()?;
        let own = range.start + index * stride + member.offset;
        sites.push(own.offset(i64::from(i32::from_le_bytes(*distance))));
    }
    sites.sort_unstable();
    Some(sites)
}
