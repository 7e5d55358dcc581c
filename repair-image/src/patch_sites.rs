//! Places in text that the kernel rewrites while it runs: a byte that differs there is no damage. Knows the
//! tables and the shapes of what is written; comparing is `damage.rs`'s.
//!
//! Alternatives, retpolines, return thunks and paravirtual calls are patched before text is read for the
//! repair image (at boot, and while a module is loaded), so they are no sites. A kprobe's int3 may stand
//! anywhere.

use guest::{GuestVirt, VirtMemory};
use serde::Serialize;

use crate::RepairImage;

/// More jump labels or static call sites than any kernel has.
const MAX_SITES: u64 = 1 << 18;
/// Bytes of a near jump or call, and of the nop in their place.
const JUMP: u64 = 5;
/// Bytes of `endbr64`, which stands before the ftrace nop with `CONFIG_X86_KERNEL_IBT`.
const ENDBR: &[u8] = &[0xf3, 0x0f, 0x1e, 0xfa];
/// The nop of five bytes (`P6_NOP5`, arch/x86/include/asm/nops.h).
const NOP5: &[u8] = &[0x0f, 0x1f, 0x44, 0x00, 0x00];
const INT3: u8 = 0xcc;
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;
const JMP_SHORT: u8 = 0xeb;
/// First byte of the nop of two bytes, `66 90`.
const NOP2: u8 = 0x66;
/// First byte of a conditional near jump, which has six bytes.
const TWO_BYTES: u8 = 0x0f;
/// `lock` prefix, and the `ds` prefix that takes its place while there is one CPU
/// (arch/x86/kernel/alternative.c, `alternatives_smp_lock()`).
const LOCK: [u8; 2] = [0xf0, 0x3e];

/// Functions that ftrace rewrites inside (arch/x86/kernel/ftrace_64.S: `ftrace_call`, `ftrace_graph_call`).
const REWRITTEN: &[&str] =
    &["ftrace_caller", "ftrace_regs_caller", "ftrace_graph_caller", "ftrace_epilogue"];

/// Why the kernel rewrites a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SiteKind {
    /// A static key was switched.
    JumpLabel,
    /// The target of a static call was set.
    StaticCall,
    /// A function's entry is traced, live patched, or has a BPF program.
    FunctionEntry,
    /// A breakpoint: a kprobe, or text that is just being patched.
    Breakpoint,
    /// A jump or call to code that was made at run time: an optimised kprobe.
    Detour,
    /// A lock prefix: the number of CPUs changed from or to one.
    LockPrefix,
    /// ftrace's own entry code.
    Tracer,
}

/// Patch sites of one kernel with its modules, from its tables.
#[derive(Clone, Debug, Default)]
pub struct PatchSites {
    /// Start and kind, ascending.
    sites: Vec<(GuestVirt, SiteKind)>,
}

impl PatchSites {
    /// Reads the tables from `memory`: pristine bytes over the guest's, so that damage in a table does not
    /// hide damage in text.
    #[must_use]
    pub fn read(image: &RepairImage, memory: &dyn VirtMemory) -> Self {
        let mut sites = Vec::new();
        for source in &SOURCES {
            let of_modules = image
                .modules
                .iter()
                .filter_map(|module| source.of_module(image, memory, module.at));
            for table in source.of_kernel(image).into_iter().chain(of_modules) {
                let found = table.sites(image, memory);
                sites.extend(found.into_iter().map(|at| (at, source.kind)));
            }
        }
        sites.sort_unstable();
        Self { sites }
    }

    /// Number of sites known from tables.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }

    /// Why the kernel may have changed the byte at `at`; `None` = no reason is known. `was` and `is` are
    /// text before and now.
    #[must_use]
    pub fn reason(
        &self,
        image: &RepairImage,
        was: &dyn VirtMemory,
        is: &dyn VirtMemory,
        at: GuestVirt,
    ) -> Option<SiteKind> {
        let [old, new] = [was.read_u8(at).ok()?, is.read_u8(at).ok()?];
        if new == INT3 {
            return Some(SiteKind::Breakpoint);
        }
        if LOCK.contains(&old) && LOCK.contains(&new) {
            return Some(SiteKind::LockPrefix);
        }
        self.in_table(was, at)
            .or_else(|| at_entry(image, was, at))
            .or_else(|| detour(image, is, at))
    }

    fn in_table(&self, was: &dyn VirtMemory, at: GuestVirt) -> Option<SiteKind> {
        let after = self.sites.partition_point(|(site, _)| *site <= at);
        let near = self.sites.get(after.saturating_sub(4)..after)?;
        let hit = near.iter().rev().find(|(site, kind)| {
            let size = match (kind, was.read_u8(*site)) {
                // arch_jump_entry_size(), arch/x86/kernel/jump_label.c: as long as what was compiled.
                (SiteKind::JumpLabel, Ok(NOP2 | JMP_SHORT)) => 2,
                // Conditional tail calls, since v6.3 (arch/x86/kernel/static_call.c).
                (SiteKind::StaticCall, Ok(TWO_BYTES)) => JUMP + 1,
                _ => JUMP,
            };
            at - *site < size
        });
        hit.map(|(_, kind)| *kind)
    }
}

/// The ftrace nop or call at a function's start, where the function was compiled with one; and whole
/// functions that are rewritten inside.
fn at_entry(image: &RepairImage, was: &dyn VirtMemory, at: GuestVirt) -> Option<SiteKind> {
    let location = image.locate(at)?;
    let name = location.symbol.name;
    if location.module.is_none() && REWRITTEN.contains(&name) {
        return Some(SiteKind::Tracer);
    }
    // DEFINE_STATIC_CALL() trampolines, include/linux/static_call_types.h.
    if name.starts_with("__SCT__") && location.offset < JUMP {
        return Some(SiteKind::StaticCall);
    }
    let start = location.start(at);
    let mut head = [0; ENDBR.len() + NOP5.len()];
    was.read(start, &mut head).ok()?;
    let skipped = if head.starts_with(ENDBR) { ENDBR.len() } else { 0 };
    let entry = head.get(skipped..skipped + NOP5.len())?;
    // `bpf_dispatcher_*_func` (until v6.2) begin with plain nops instead.
    let patchable = entry == NOP5
        || entry.first() == Some(&CALL)
        || entry.first() == Some(&JMP)
        || location.module.is_none() && name.starts_with("bpf_dispatcher_");
    let offset = location.offset.checked_sub(skipped as u64)?;
    (patchable && offset < JUMP).then_some(SiteKind::FunctionEntry)
}

/// Whether a jump or call over this byte leads out of all text that is known: to an optimised kprobe's
/// copy or a trampoline.
fn detour(image: &RepairImage, is: &dyn VirtMemory, at: GuestVirt) -> Option<SiteKind> {
    (0..JUMP).find_map(|back| {
        let start = GuestVirt(at.0.checked_sub(back)?);
        let mut bytes = [0; JUMP as usize];
        is.read(start, &mut bytes).ok()?;
        let [JMP | CALL, a, b, c, d] = bytes else { return None };
        let distance = i64::from(i32::from_le_bytes([a, b, c, d]));
        let target = (start + JUMP).offset(distance);
        let made_at_run_time = is.translate(target).is_ok() && !image.is_text(target);
        made_at_run_time.then_some(SiteKind::Detour)
    })
}

/// Where the tables of one kind of site are: the kernel's between two symbols, a module's by two members of
/// `struct module`.
struct Source {
    kind: SiteKind,
    structure: &'static str,
    member: &'static str,
    start: &'static str,
    stop: &'static str,
    pointer: &'static str,
    count: &'static str,
}

const SOURCES: [Source; 2] = [
    Source {
        kind: SiteKind::JumpLabel,
        structure: "jump_entry",
        member: "code",
        start: "__start___jump_table",
        stop: "__stop___jump_table",
        pointer: "jump_entries",
        count: "num_jump_entries",
    },
    Source {
        kind: SiteKind::StaticCall,
        structure: "static_call_site",
        member: "addr",
        start: "__start_static_call_sites",
        stop: "__stop_static_call_sites",
        pointer: "static_call_sites",
        count: "num_static_call_sites",
    },
];

impl Source {
    fn table(&self, at: GuestVirt, count: u64) -> Table {
        Table { at, count, structure: self.structure, member: self.member }
    }

    fn of_kernel(&self, image: &RepairImage) -> Option<Table> {
        let (start, stop) = (image.address_of(self.start)?, image.address_of(self.stop)?);
        let size = image.types.size_of(self.structure).unwrap_or(0).max(1);
        (start < stop).then(|| self.table(start, (stop - start) / size))
    }

    fn of_module(
        &self,
        image: &RepairImage,
        memory: &dyn VirtMemory,
        module: GuestVirt,
    ) -> Option<Table> {
        let word = |path: &str| {
            let member = image.types.member("module", path)?;
            memory.read_uint(module + member.offset, member.size).ok()
        };
        Some(self.table(GuestVirt(word(self.pointer)?), word(self.count)?))
    }
}

/// A table whose entries hold a 32-bit distance from the member itself, as
/// `CONFIG_HAVE_ARCH_JUMP_LABEL_RELATIVE` (v4.19) and static calls (v5.10) have it.
struct Table {
    at: GuestVirt,
    count: u64,
    structure: &'static str,
    member: &'static str,
}

impl Table {
    /// The places it names; none if it can't be read.
    fn sites(&self, image: &RepairImage, memory: &dyn VirtMemory) -> Vec<GuestVirt> {
        let read = || {
            let stride =
                image.types.size_of(self.structure).filter(|size| (1..=64).contains(size))?;
            let member = image.types.member(self.structure, self.member)?;
            let mut bytes = vec![0; usize::try_from(self.count.min(MAX_SITES) * stride).ok()?];
            memory.read(self.at, &mut bytes).ok()?;
            let offset = usize::try_from(member.offset).ok()?;
            let entries = (0u64..).zip(bytes.chunks_exact(usize::try_from(stride).ok()?));
            let site = |(index, entry): (u64, &[u8])| {
                let distance = entry.get(offset..)?.first_chunk()?;
                let own = self.at + index * stride + member.offset;
                Some(own.offset(i64::from(i32::from_le_bytes(*distance))))
            };
            Some(entries.filter_map(site).collect())
        };
        read().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use guest::fake::FakeMachine;
    use proptest::prelude::*;

    use super::*;
    use crate::synth::{
        CONSTANT_DATA, CONSTANT_MODULE, CONSTANT_TEXT, LABEL, SHORT_LABEL, STATIC_CALL, TRACED,
        WRITABLE, constants,
    };

    /// Why `bytes` may stand at `at` now, byte for byte; bytes that are as they were are left out.
    fn reasons(at: GuestVirt, bytes: &[u8]) -> Vec<Option<SiteKind>> {
        let (mut machine, image) = constants();
        let before = machine.space();
        let was: Vec<u8> =
            (0..bytes.len()).map(|n| before.read_u8(at + n as u64).unwrap()).collect();
        machine.poke_virt(at, bytes);
        let space = machine.space();
        let view = image.pristine.over(&space);
        let sites = PatchSites::read(&image, &view);
        let changed = (0u64..).zip(was.iter().zip(bytes)).filter(|(_, (was, is))| was != is);
        changed.map(|(n, _)| sites.reason(&image, &view, &space, at + n)).collect()
    }

    fn all(kind: SiteKind, found: &[Option<SiteKind>]) {
        assert!(
            !found.is_empty() && found.iter().all(|&it| it == Some(kind)),
            "{kind:?}: {found:?}"
        );
    }

    #[test]
    fn tables_of_kernel_and_module_are_read() {
        let (machine, image) = constants();
        let sites = PatchSites::read(&image, &machine.space());
        let expected = [
            (CONSTANT_TEXT + LABEL, SiteKind::JumpLabel),
            (CONSTANT_TEXT + SHORT_LABEL, SiteKind::JumpLabel),
            (CONSTANT_TEXT + STATIC_CALL, SiteKind::StaticCall),
            (CONSTANT_MODULE + LABEL, SiteKind::JumpLabel),
            (CONSTANT_MODULE + STATIC_CALL, SiteKind::StaticCall),
        ];
        assert_eq!(sites.sites, expected);
        assert!(sites.len() == 5 && !sites.is_empty());
    }

    #[test]
    fn legal_states_of_a_site_have_a_reason() {
        for text in [CONSTANT_TEXT, CONSTANT_MODULE] {
            all(SiteKind::JumpLabel, &reasons(text + LABEL, &[JMP, 0x10, 1, 2, 3]));
            all(SiteKind::Breakpoint, &reasons(text + LABEL, &[INT3]));
            all(SiteKind::StaticCall, &reasons(text + STATIC_CALL, &[CALL, 7, 7, 7, 1]));
            // xor eax, eax with prefixes: a static call that returns 0.
            all(
                SiteKind::StaticCall,
                &reasons(text + STATIC_CALL, &[0x2e, 0x2e, 0x2e, 0x31, 0xc0]),
            );
            all(SiteKind::StaticCall, &reasons(text + STATIC_CALL, NOP5));
            all(SiteKind::FunctionEntry, &reasons(text + TRACED, &[CALL, 7, 7, 7, 1]));
            // A kprobe anywhere.
            all(SiteKind::Breakpoint, &reasons(text + 0x123, &[INT3]));
        }
        all(SiteKind::JumpLabel, &reasons(CONSTANT_TEXT + SHORT_LABEL, &[JMP_SHORT, 0x10]));
    }

    #[test]
    fn what_is_beside_a_site_has_none() {
        for at in [
            LABEL - 1,
            LABEL + 5,
            SHORT_LABEL - 1,
            SHORT_LABEL + 2,
            STATIC_CALL - 1,
            STATIC_CALL + 5,
        ] {
            assert_eq!(reasons(CONSTANT_TEXT + at, &[0x91]), [None], "{at:#x}");
        }
        // The module's table names no short label.
        assert_eq!(reasons(CONSTANT_MODULE + SHORT_LABEL, &[JMP_SHORT]), [None]);
        // A function without a nop at its entry, and what follows the nop of one that has it.
        assert_eq!(reasons(CONSTANT_TEXT + 0x500, &[CALL, 7, 7, 7, 1]), [None; 5]);
        assert_eq!(reasons(CONSTANT_TEXT + TRACED + 5, &[0x91]), [None]);
    }

    #[test]
    fn a_jump_to_what_is_no_text_is_a_detour() {
        let (from, to) = (CONSTANT_TEXT + 0x520, WRITABLE + 0x10);
        let far = (to.0.wrapping_sub(from.0 + JUMP) as i32).to_le_bytes();
        all(SiteKind::Detour, &reasons(from, &[&[JMP], &far[..]].concat()));
        // Into the middle of other text: no kprobe does that.
        assert_eq!(reasons(from, &[JMP, 0x10, 0, 0, 0]), [None; 5]);
    }

    #[test]
    fn lock_prefixes_come_and_go() {
        let (mut machine, image) = constants();
        machine.poke_virt(CONSTANT_TEXT + 0x600, &[0x3e]);
        let mut kept = vec![0x90; 4096];
        kept[0x600] = 0xf0;
        let was = crate::Pristine::default().with(crate::PageKind::Text, CONSTANT_TEXT, &kept);
        let space = machine.space();
        let sites = PatchSites::read(&image, &space);
        let reason = sites.reason(&image, &was.over(&space), &space, CONSTANT_TEXT + 0x600);
        assert_eq!(reason, Some(SiteKind::LockPrefix));
    }

    fn sites_of(machine: &FakeMachine, image: &RepairImage) -> usize {
        PatchSites::read(image, &machine.space()).len()
    }

    proptest! {
        #[test]
        fn hostile_tables_neither_panic_nor_hang(
            pointer in any::<u64>(), count in any::<u32>(), entry in any::<[u8; 12]>(),
            at in 0u64..0x200, near in any::<bool>(),
        ) {
            let (mut machine, image) = constants();
            machine.poke_virt(CONSTANT_DATA + at, &entry);
            let pointer = if near { CONSTANT_MODULE.0 + (pointer & 0x3fff) } else { pointer };
            let module = image.modules[0].at;
            machine.poke_virt(module + 0x10, &pointer.to_le_bytes());
            machine.poke_virt(module + 0x18, &count.to_le_bytes());
            prop_assert!(sites_of(&machine, &image) as u64 <= MAX_SITES + 8);
            let space = machine.space();
            let sites = PatchSites::read(&image, &space);
            for probe in [0, LABEL, 0xfff, 0x3fff] {
                let _ = sites.reason(&image, &space, &space, CONSTANT_TEXT + probe);
            }
        }
    }
}
