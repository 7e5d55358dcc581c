//! Finding the running kernel in RAM, with or without its vmlinux, and proving that it is the one
//! that runs. What is read through it afterwards is in `guest_layer.rs`.

use guest::{AddressSpace, GuestPhys, GuestVirt, LinkAddr, PhysMemory, Reg, Registers, VirtMemory};
use serde::{Deserialize, Serialize};

use crate::kallsyms::KallsymsTables;
use crate::{BuildId, Error, Knowledge, KnowledgeParts, Placement, Vmcoreinfo};

/// `__START_KERNEL_map`: the kernel image is mapped from here on x86-64, whatever the slide
/// (Documentation/x86/x86_64/mm.rst).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The kernel and its slide fit into 1 GiB (`KERNEL_IMAGE_SIZE`, same document).
const KERNEL_MAP_SIZE: u64 = 1 << 30;
/// The kernel starts at a multiple of this, physically and virtually (`MIN_KERNEL_ALIGN`).
const ALIGN: u64 = 2 << 20;
/// Every banner starts so, since v1.0.
const BANNER: &[u8] = b"Linux version ";
/// More CPUs than `CONFIG_NR_CPUS` allows (8192).
const MAX_CPUS: u32 = 8192;
/// More bytes than any kernel's notes have.
const MAX_NOTES: u64 = 64 << 10;

/// By what the kernel was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FoundBy {
    /// `linux_banner` at its place in a 2 MiB-aligned image.
    Banner {
        /// Guest-physical address of the banner.
        at: GuestPhys,
    },
    /// VMCOREINFO in a page of RAM.
    Vmcoreinfo {
        /// Guest-physical address of the page.
        at: GuestPhys,
    },
}

/// How it is known that the kernel found is the one that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ConfirmedBy {
    /// A vCPU's page tables map the kernel there.
    VcpuPageTables,
    /// It is the only kernel in RAM whose own page tables map it where it says it is.
    OnlyOne,
}

/// The running kernel.
#[derive(Clone, Debug)]
pub struct Located {
    /// Where it lies.
    pub placement: Placement,
    /// Guest-physical address of `_text`.
    pub text_phys: GuestPhys,
    /// Its banner, one line (`Linux version 6.1.0 (…) …`).
    pub banner: String,
    /// Its GNU build id, read from its memory.
    pub build_id: Option<BuildId>,
    /// By what it was found.
    pub found_by: FoundBy,
    /// How it is known to be the running one.
    pub confirmed_by: ConfirmedBy,
    /// The kernel's `system_state` before anything else was read of it: what is read later may be of a later stage of
    /// the boot, never of an earlier one. `None` when it could not be read.
    pub system_state: Option<u32>,
}

/// A kernel image in RAM whose own page tables agree with it.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    text_phys: GuestPhys,
    text: GuestVirt,
    root: GuestPhys,
    five_level: bool,
    found_by: FoundBy,
}

impl Candidate {
    /// Whether its page tables map its text where it should be.
    fn is_consistent(&self, phys: &dyn PhysMemory) -> bool {
        self.text.0 >= KERNEL_MAP
            && self.text.0 - KERNEL_MAP < KERNEL_MAP_SIZE
            && self.space(phys).translate(self.text) == Ok(self.text_phys)
    }

    fn space<'m>(&self, phys: &'m dyn PhysMemory) -> AddressSpace<'m> {
        AddressSpace::new(phys, self.root, self.five_level)
    }

    /// Whether a vCPU's page tables map the text to the same place; `None` when its CR3 and CR4 are
    /// not known. With page-table isolation, CR3 may hold the user half, whose kernel half is the
    /// page below (bit 12, arch/x86/entry/calling.h).
    fn runs_on(&self, phys: &dyn PhysMemory, regs: &Registers) -> Option<bool> {
        let own = AddressSpace::of_vcpu(phys, regs)?;
        let kernel_half = GuestPhys(regs.get(Reg::Cr3)? & !0x1000);
        let kernel_half = AddressSpace::new(phys, kernel_half, own.five_level());
        let here = |space: AddressSpace<'_>| space.translate(self.text) == Ok(self.text_phys);
        Some(here(own) || here(kernel_half))
    }
}

/// Finds the running kernel whose vmlinux `kernel` was compiled from.
///
/// `vcpus` may hold registers of vCPUs, if they are at hand: with them, a leftover of an earlier boot
/// in RAM can be told from the kernel that runs.
///
/// # Errors
/// [`Error::WrongBuild`] when the guest runs another build than `expected`; [`Error::NoKernel`];
/// [`Error::AmbiguousKernel`]; [`Error::MissingSymbol`] when `kernel` is no Linux kernel.
pub fn locate(
    phys: &dyn PhysMemory,
    kernel: &Knowledge,
    expected: Option<BuildId>,
    vcpus: &[Registers],
) -> Result<Located, Error> {
    let candidates = by_banner(phys, kernel)?;
    let Ok((candidate, confirmed_by)) = choose(phys, &candidates, vcpus) else {
        return Err(why_not(phys, candidates.len(), expected));
    };
    let symbol = |name: &str| Some(kernel.symbol(name)?.at);
    let located = complete(phys, &symbol, &candidate, confirmed_by)?;
    check_build(expected, located.build_id)?;
    Ok(located)
}

/// Refuses a kernel of another build. No error when one of the ids is not known.
fn check_build(expected: Option<BuildId>, found: Option<BuildId>) -> Result<(), Error> {
    match (expected, found) {
        (Some(expected), Some(found)) if expected != found => {
            Err(Error::WrongBuild { found, expected })
        }
        _ => Ok(()),
    }
}

/// The best explanation why no kernel was found with a vmlinux: the guest may run another one.
fn why_not(phys: &dyn PhysMemory, candidates: usize, expected: Option<BuildId>) -> Error {
    if candidates > 1 {
        return Error::AmbiguousKernel { count: candidates };
    }
    let found = Vmcoreinfo::find_all(phys)
        .iter()
        .filter(|info| by_vmcoreinfo(phys, info).is_some())
        .find_map(|info| info.build_id()?.parse::<BuildId>().ok());
    match check_build(expected, found) {
        Err(wrong) => wrong,
        Ok(()) => {
            Error::NoKernel { why: "no 2 MiB-aligned image has the banner where vmlinux has it" }
        }
    }
}

/// Kernel images at 2 MiB boundaries of RAM that have a banner where `kernel` has `linux_banner`.
fn by_banner(phys: &dyn PhysMemory, kernel: &Knowledge) -> Result<Vec<Candidate>, Error> {
    let offset = |name| {
        let symbol = kernel.symbol(name).ok_or(Error::MissingSymbol { name })?;
        let text = kernel.symbol("_text").ok_or(Error::MissingSymbol { name: "_text" })?;
        Ok::<u64, Error>(symbol.at - text.at)
    };
    let (banner, phys_base) = (offset("linux_banner")?, offset("phys_base")?);
    let root = offset("init_top_pgt").or_else(|_| offset("swapper_pg_dir"))?;
    let five_level = offset("__pgtable_l5_enabled").ok();
    let mut found = Vec::new();
    for text_phys in aligned(phys) {
        let mut start = [0; BANNER.len()];
        if phys.read(text_phys + banner, &mut start).is_err() || start != BANNER {
            continue;
        }
        let Ok(phys_base) = phys.read_u64(text_phys + phys_base) else { continue };
        let mut flag = [0; 4];
        let five_level = five_level
            .is_some_and(|at| phys.read(text_phys + at, &mut flag).is_ok() && flag[0] == 1);
        let candidate = Candidate {
            text_phys,
            text: GuestVirt(text_phys.0.wrapping_sub(phys_base).wrapping_add(KERNEL_MAP)),
            root: text_phys + root,
            five_level,
            found_by: FoundBy::Banner { at: text_phys + banner },
        };
        if candidate.is_consistent(phys) {
            found.push(candidate);
        }
    }
    Ok(found)
}

/// Every 2 MiB boundary of RAM.
fn aligned(phys: &dyn PhysMemory) -> impl Iterator<Item = GuestPhys> {
    phys.ranges().into_iter().flat_map(|range| {
        let first = range.start.0.checked_next_multiple_of(ALIGN);
        (first.unwrap_or(range.end.0)..range.end.0).step_by(ALIGN as usize).map(GuestPhys)
    })
}

/// The kernel that a VMCOREINFO text describes, if the page tables it names agree with it.
fn by_vmcoreinfo(phys: &dyn PhysMemory, info: &Vmcoreinfo) -> Option<Candidate> {
    let phys_base = info.number("phys_base")?.cast_unsigned();
    let to_phys =
        |virt: GuestVirt| GuestPhys(virt.0.wrapping_sub(KERNEL_MAP).wrapping_add(phys_base));
    let text = info.symbol("_stext")?;
    let candidate = Candidate {
        text_phys: to_phys(text),
        text,
        root: to_phys(info.top_page_table()?),
        five_level: info.five_level(),
        found_by: FoundBy::Vmcoreinfo { at: info.at },
    };
    candidate.is_consistent(phys).then_some(candidate)
}

/// The running one of the candidates.
fn choose(
    phys: &dyn PhysMemory,
    candidates: &[Candidate],
    vcpus: &[Registers],
) -> Result<(Candidate, ConfirmedBy), Error> {
    let why = "none whose own page tables map it where it says it is";
    let runs = |candidate: &&Candidate| {
        vcpus.iter().any(|regs| candidate.runs_on(phys, regs) == Some(true))
    };
    if let Some(running) = candidates.iter().find(runs) {
        return Ok((*running, ConfirmedBy::VcpuPageTables));
    }
    let places = candidates.iter().map(|candidate| (candidate.text, candidate.text_phys));
    match places.collect::<std::collections::BTreeSet<_>>().len() {
        0 => Err(Error::NoKernel { why }),
        1 => candidates
            .first()
            .map(|one| (*one, ConfirmedBy::OnlyOne))
            .ok_or(Error::NoKernel { why }),
        count => Err(Error::AmbiguousKernel { count }),
    }
}

/// Reads everything else about a candidate through its page tables.
fn complete(
    phys: &dyn PhysMemory,
    symbol: &dyn Fn(&str) -> Option<LinkAddr>,
    candidate: &Candidate,
    confirmed_by: ConfirmedBy,
) -> Result<Located, Error> {
    let space = candidate.space(phys);
    let link = |name| symbol(name).ok_or(Error::MissingSymbol { name });
    let base = match candidate.found_by {
        FoundBy::Banner { .. } => link("_text")?,
        FoundBy::Vmcoreinfo { .. } => link("_stext")?,
    };
    let slide = candidate.text.0.wrapping_sub(base.0);
    let place = |name| Ok::<_, Error>(GuestVirt(link(name)?.0.wrapping_add(slide)));
    let system_state = place("system_state").ok().and_then(|at| space.read_u32(at).ok());
    let banner = space.read_cstr(place("linux_banner")?, 1024).map_err(Error::guest("banner"))?;
    let text = place("_stext")?..place("_etext")?;
    if text.is_empty() || text.end - text.start > KERNEL_MAP_SIZE {
        return Err(Error::Implausible { what: "text size", at: text.start, value: text.end.0 });
    }
    let placement = Placement {
        slide,
        root: candidate.root,
        five_level: candidate.five_level,
        text,
        per_cpu: per_cpu_bases(&space, place("__per_cpu_offset").ok(), place("nr_cpu_ids").ok())?,
    };
    let text_phys = space.translate(place("_text")?).map_err(Error::guest("first page of text"))?;
    let notes = (place("__start_notes").ok()).zip(place("__stop_notes").ok());
    Ok(Located {
        placement,
        text_phys,
        banner: banner.trim_end().to_owned(),
        build_id: notes.and_then(|(start, end)| build_id(&space, start, end)),
        found_by: candidate.found_by,
        confirmed_by,
        system_state,
    })
}

/// The build id among the kernel's notes in memory.
fn build_id(space: &dyn VirtMemory, start: GuestVirt, end: GuestVirt) -> Option<BuildId> {
    let mut notes = vec![0; usize::try_from((end - start).min(MAX_NOTES)).ok()?];
    space.read(start, &mut notes).ok()?;
    BuildId::from_notes(&notes)
}

/// `__per_cpu_offset[0..nr_cpu_ids]`. Without `CONFIG_SMP` there is no such table and per-CPU
/// variables are ordinary ones: one base of 0. `nr_cpu_ids` counts the possible CPUs.
fn per_cpu_bases(
    space: &dyn VirtMemory,
    table: Option<GuestVirt>,
    count: Option<GuestVirt>,
) -> Result<Vec<u64>, Error> {
    let (Some(table), Some(count)) = (table, count) else { return Ok(vec![0]) };
    let cpus = space.read_u32(count).map_err(Error::guest("number of CPUs"))?;
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(Error::Implausible { what: "nr_cpu_ids", at: count, value: u64::from(cpus) });
    }
    (0..u64::from(cpus))
        .map(|cpu| space.read_u64(table + cpu * 8).map_err(Error::guest("per-CPU bases")))
        .collect()
}

/// Finds the running kernel without any file, by VMCOREINFO, with the knowledge of symbols that its
/// own memory gives (no unwind rows, no types yet).
///
/// # Errors
/// [`Error::NoKernel`] or [`Error::AmbiguousKernel`]; or the symbol table can't be read.
pub fn locate_without_files(
    phys: &dyn PhysMemory,
    vcpus: &[Registers],
) -> Result<(Located, KnowledgeParts), Error> {
    let infos = Vmcoreinfo::find_all(phys);
    let mut candidates = Vec::new();
    let mut last = Error::NoKernel { why: "no page of RAM holds VMCOREINFO" };
    for info in &infos {
        let Some(candidate) = by_vmcoreinfo(phys, info) else {
            last = Error::NoKernel { why: "page tables named by VMCOREINFO do not map the kernel" };
            continue;
        };
        match symbols(phys, info, &candidate) {
            Ok(symbols) => candidates.push((candidate, symbols)),
            Err(error) => last = error,
        }
    }
    let plain: Vec<_> = candidates.iter().map(|(candidate, _)| *candidate).collect();
    if plain.is_empty() {
        return Err(last);
    }
    let (chosen, confirmed_by) = choose(phys, &plain, vcpus)?;
    let symbols = candidates.into_iter().find(|(candidate, _)| candidate.root == chosen.root);
    let symbols = symbols.map(|(_, symbols)| symbols).unwrap_or_default();
    let symbol = |wanted: &str| Some(symbols.iter().find(|(name, ..)| name == wanted)?.1);
    let located = complete(phys, &symbol, &chosen, confirmed_by)?;
    Ok((located, KnowledgeParts { symbols, ..KnowledgeParts::default() }))
}

type SymbolParts = Vec<(String, LinkAddr, u64, crate::SymbolKind)>;

/// The kernel's symbols at link addresses, if `vmcoreinfo_data` really points to this text: a copy of
/// it in some buffer is not taken.
fn symbols(
    phys: &dyn PhysMemory,
    info: &Vmcoreinfo,
    candidate: &Candidate,
) -> Result<SymbolParts, Error> {
    let space = candidate.space(phys);
    let slide =
        info.slide().ok_or(Error::NoVmcoreinfoEntry { entry: "KERNELOFFSET", at: info.at })?;
    let symbols = KallsymsTables::from_vmcoreinfo(info)?.read(&space)?;
    let data = symbols.iter().find(|symbol| symbol.name == "vmcoreinfo_data");
    if let Some(data) = data {
        let pointer =
            space.read_u64(GuestVirt(data.value)).map_err(Error::guest("vmcoreinfo_data"))?;
        if space.translate(GuestVirt(pointer)) != Ok(info.at) {
            return Err(Error::NoKernel {
                why: "VMCOREINFO found is a copy, not the kernel's own",
            });
        }
    }
    Ok(symbols.into_iter().map(|symbol| symbol.into_part(slide)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{BUILD_ID, INFO_PHYS, SLIDE, TEXT_PHYS, kernel, placed};

    #[test]
    fn found_with_symbols_and_without() {
        for five_level in [false, true] {
            let (machine, symbols) = kernel(five_level);
            let id = BuildId::new(&BUILD_ID);
            let located = locate(machine.memory(), &symbols, id, &[]).unwrap();
            assert_eq!(located.placement.slide, SLIDE);
            assert_eq!(located.placement.root, machine.space().root());
            assert_eq!(located.placement.five_level, five_level);
            assert_eq!(located.placement.text, placed(0)..placed(0x1000));
            assert_eq!(located.placement.per_cpu.len(), 2);
            assert_eq!(located.system_state, Some(2));
            assert_eq!(located.text_phys, GuestPhys(TEXT_PHYS));
            assert_eq!(located.banner, "Linux version 9.9.9 (synthetic)");
            assert_eq!(located.build_id, id);
            assert_eq!(located.confirmed_by, ConfirmedBy::OnlyOne);
            if five_level {
                continue; // VMCOREINFO of the synthetic kernel has no line for it.
            }
            let (again, parts) = locate_without_files(machine.memory(), &[]).unwrap();
            assert_eq!(again.placement, located.placement);
            assert_eq!(again.found_by, FoundBy::Vmcoreinfo { at: GuestPhys(INFO_PHYS) });
            let link = parts.symbols.iter().find(|symbol| symbol.0 == "linux_banner").unwrap().1;
            assert_eq!(Some(link), symbols.symbol("linux_banner").map(|symbol| symbol.at));
        }
    }

    #[test]
    fn another_build_is_refused_with_both_ids() {
        let (machine, symbols) = kernel(false);
        let expected = BuildId::new(&[1; 20]).unwrap();
        let refused = locate(machine.memory(), &symbols, Some(expected), &[]);
        let found = BuildId::new(&BUILD_ID).unwrap();
        assert!(matches!(&refused, Err(Error::WrongBuild { found: f, expected: e })
            if *f == found && *e == expected));
        // A vmlinux whose banner lies elsewhere finds nothing, but VMCOREINFO tells why.
        let mut parts = KnowledgeParts::default();
        for name in ["_text", "linux_banner", "phys_base", "init_top_pgt"] {
            parts.symbols.push((name.to_owned(), LinkAddr(0x9000), 0, crate::SymbolKind::Object));
        }
        let refused = locate(machine.memory(), &Knowledge::new(parts), Some(expected), &[]);
        assert!(matches!(refused, Err(Error::WrongBuild { .. })));
    }

    #[test]
    fn leftovers_of_an_earlier_boot_are_told_apart() {
        let (mut machine, symbols) = kernel(false);
        // A second image with a slide of its own; nothing maps it yet.
        let (moved, slide) = (0x20_0000, 0x2000_0000);
        copy(&mut machine, TEXT_PHYS, moved, 2 << 20);
        let phys_base = moved.wrapping_sub(placed(slide).0 - KERNEL_MAP);
        machine.poke(GuestPhys(moved + 0x1000), &phys_base.to_le_bytes());
        let located = locate(machine.memory(), &symbols, None, &[]).unwrap();
        assert_eq!(located.text_phys, GuestPhys(TEXT_PHYS));
        // With page tables of its own that map it, only a vCPU's CR3 tells which one runs.
        let root = machine.space().root().0;
        let (old_root, directory_pointers, directory) =
            (moved + (root - TEXT_PHYS), 0xa0_0000, 0xa0_1000);
        let index = placed(slide).0 >> 21 & 511;
        for (at, entry) in [
            (old_root + 511 * 8, directory_pointers | 3),
            (directory_pointers + 510 * 8, directory | 3),
            (directory + index * 8, moved | 0x83),
        ] {
            machine.poke(GuestPhys(at), &entry.to_le_bytes());
        }
        let both = locate(machine.memory(), &symbols, None, &[]);
        assert!(matches!(both, Err(Error::AmbiguousKernel { count: 2 })));
        for (top, text) in [(root, TEXT_PHYS), (old_root, moved), (root | 0xfff, TEXT_PHYS)] {
            let vcpu = Registers::unknown().with(Reg::Cr3, top).with(Reg::Cr4, 0);
            let located = locate(machine.memory(), &symbols, None, &[vcpu]).unwrap();
            assert_eq!(located.text_phys, GuestPhys(text));
            assert_eq!(located.confirmed_by, ConfirmedBy::VcpuPageTables);
        }
        let nowhere = Registers::unknown().with(Reg::Cr3, 0x1000).with(Reg::Cr4, 0);
        assert!(locate(machine.memory(), &symbols, None, &[nowhere]).is_err());
    }

    fn copy(machine: &mut guest::fake::FakeMachine, from: u64, to: u64, len: usize) {
        let mut bytes = vec![0; len];
        machine.memory().read(GuestPhys(from), &mut bytes).unwrap();
        machine.poke(GuestPhys(to), &bytes);
    }

    #[test]
    fn a_copy_of_vmcoreinfo_is_not_taken() {
        let (mut machine, _) = kernel(false);
        let mut text = vec![0; 4096];
        machine.memory().read(GuestPhys(INFO_PHYS), &mut text).unwrap();
        machine.poke(GuestPhys(0x3000), &text);
        let (located, _) = locate_without_files(machine.memory(), &[]).unwrap();
        assert_eq!(located.found_by, FoundBy::Vmcoreinfo { at: GuestPhys(INFO_PHYS) });
        machine.poke(GuestPhys(INFO_PHYS), b"garbage");
        assert!(matches!(locate_without_files(machine.memory(), &[]), Err(Error::NoKernel { .. })));
    }
}
