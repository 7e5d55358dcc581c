//! `live.core`: a small ELF core of a guest that was repaired, for `crash`, drgn and defib itself. Holds the
//! pages that matter and no others; what is missing is missing, not zero. Reads the guest only.
//!
//! Taken in two steps. [`Snapshot::take`] copies what a repair changes, while the guest stands: at most
//! 2 MiB. [`Contents::collect`] reads the rest, which may be done while the guest runs on: then these pages
//! are of different instants, and the file says in its own note which pages are of the crash.
//!
//! Layout: ELF header; program headers (`PT_NOTE` first, then `PT_LOAD` ascending by guest-physical
//! address, `p_vaddr` as the kernel maps the page); notes; 256 KiB of zeroes at most, which the segments of
//! zero pages share; pages. Notes: `CORE`/`NT_PRSTATUS` for every vCPU in the order of the kernel's CPU
//! numbers, `QEMU` for control registers, `VMCOREINFO`, and [`NOTE_NAME`].
//!
//! Pages are taken whole: they may hold bytes of user processes, as every kernel dump does.

mod elf;
mod notes;
mod select;
mod store;

use std::io::{self, Write};
use std::ops::Range;

use guest::{AddressSpace, GuestPhys, GuestVirt, PhysMemory, Reg, Registers, Vcpu, VirtMemory};
use repair_image::{RepairImage, Vmcoreinfo};
use serde::Serialize;
use thiserror::Error;

use crate::kernel::Kernel;
use crate::{Diagnosis, context};
use elf::Mappings;
pub use notes::{NOTE_NAME, NOTE_TYPE};
use select::Selector;
use store::{PAGE, Recorder, Store};

/// Pages of a snapshot at most: 2 MiB are copied well within a millisecond.
const SNAPSHOT_PAGES: usize = 512;
/// An ELF header counts at most 65,534 segments, a segment may be one page, and as many pages of zeroes
/// come on top.
const PAGES_MAX: usize = 32_000;
/// VMCOREINFO fills a page at most.
const VMCOREINFO_MAX: u64 = 4096;

/// Why no core can be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LiveCoreError {
    /// Without it no tool can find its way in the file.
    #[error("the guest has no VMCOREINFO")]
    NoVmcoreinfo,
}

/// Bounds of a core.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Guest memory in it, bytes, pages of zeroes not counted. At most 126 MiB are used.
    pub bytes: u64,
    /// Set the kernel's `panic_cpu` in the file (not in the guest) to the CPU that crashed, if the kernel had
    /// not come to that: drgn takes the crashed CPU from nowhere else. The file's own note says so.
    pub mark_panic_cpu: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 16 << 20, mark_panic_cpu: true }
    }
}

/// What a repair changes, copied while the guest stood.
pub struct Snapshot {
    store: Store,
    vcpus: Vec<VcpuState>,
    crashed: Option<Vcpu>,
}

/// A vCPU at the crash.
struct VcpuState {
    vcpu: Vcpu,
    registers: Registers,
    /// Kernel CPU number.
    cpu: Option<usize>,
    /// Thread id of its current task; 0 when not known, as for the idle task.
    pid: i32,
}

impl Snapshot {
    /// Copies registers, and the pages that a repair of this crash changes: stacks and current tasks of the
    /// vCPUs, what frames and their registers point to, held locks, and `writes`, the guest-virtual ranges
    /// that a plan is going to write. Pages that can't be read are left out. At most 2 MiB.
    #[must_use]
    pub fn take(
        image: &RepairImage,
        phys: &dyn PhysMemory,
        vcpus: &[Registers],
        diagnosis: Option<&Diagnosis>,
        writes: &[Range<GuestVirt>],
    ) -> Self {
        let recorder = Recorder::new(phys, Store::with_limit(SNAPSHOT_PAGES));
        let selector = Selector::new(image, &recorder);
        let crashed = diagnosis.map(|diagnosis| diagnosis.vcpu);
        writes.iter().for_each(|range| selector.range(range, SNAPSHOT_PAGES as u64 * PAGE));
        let first = crashed.and_then(|vcpu| vcpus.get(vcpu.0));
        first.into_iter().for_each(|registers| selector.vcpu(registers));
        diagnosis.into_iter().for_each(|diagnosis| selector.diagnosis(diagnosis));
        vcpus.iter().for_each(|registers| selector.vcpu(registers));
        let vcpus = vcpus.iter().enumerate();
        let vcpus = vcpus.map(|(index, registers)| {
            VcpuState::of(image, selector.space(), Vcpu(index), registers)
        });
        let vcpus = vcpus.collect();
        Self { vcpus, crashed, store: recorder.into_store() }
    }

    /// Bytes of guest memory that were copied.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.store.len() as u64 * PAGE
    }
}

impl VcpuState {
    fn of(
        image: &RepairImage,
        space: &AddressSpace<'_>,
        vcpu: Vcpu,
        registers: &Registers,
    ) -> Self {
        let kernel = Kernel::of_memory(image, space);
        // In user mode the kernel's base is in the other register.
        let mut bases = [Reg::GsBase, Reg::KernelGsBase].into_iter();
        let cpu = bases.find_map(|reg| image.cpu_of_gs_base(registers.get(reg)?));
        let task = cpu.and_then(|cpu| context::current(&kernel, cpu));
        let pid = task.and_then(|task| kernel.int(task, "task_struct", "pid").ok()).unwrap_or(0);
        Self { vcpu, registers: *registers, cpu, pid }
    }
}

/// A core, ready to be written.
pub struct Contents {
    store: Store,
    mappings: Mappings,
    vcpus: Vec<VcpuState>,
    vmcoreinfo: Vec<u8>,
    about: About,
}

/// What the file says of itself.
#[derive(Clone, Debug, Serialize)]
struct About {
    /// Version of this note.
    format: u32,
    /// vCPU that crashed, in the order of the `NT_PRSTATUS` notes.
    crashed: Option<usize>,
    /// Guest-physical ranges that were copied while the guest stood at the crash; the guest may have run
    /// while the others were.
    of_the_crash: Vec<Range<GuestPhys>>,
    /// Kernel CPU number and thread id of each `NT_PRSTATUS` note; `null` and 0 where not known.
    cpus: Vec<(Option<usize>, i32)>,
    /// Guest-virtual address of the `panic_cpu` that was set in this file only.
    panic_cpu_set: Option<GuestVirt>,
    /// What could not be had.
    gaps: Vec<String>,
}

impl Contents {
    /// Reads what else the core shall hold, up to the limit. The guest may run; every read is bounded, and a
    /// list that changes while it is read costs what lies behind it.
    ///
    /// # Errors
    /// [`LiveCoreError::NoVmcoreinfo`]
    pub fn collect(
        image: &RepairImage,
        phys: &dyn PhysMemory,
        snapshot: Snapshot,
        limits: &Limits,
    ) -> Result<Self, LiveCoreError> {
        let Snapshot { mut store, mut vcpus, crashed } = snapshot;
        let of_the_crash = ranges(&store);
        let pages = usize::try_from(limits.bytes / PAGE).unwrap_or(PAGES_MAX).min(PAGES_MAX);
        store.set_limit(pages.max(store.len()));
        let recorder = Recorder::new(phys, store);
        let mut selector = Selector::new(image, &recorder);
        let vmcoreinfo = vmcoreinfo(image, selector.space()).or_else(|| found(phys));
        let vmcoreinfo = vmcoreinfo.ok_or(LiveCoreError::NoVmcoreinfo)?;
        let panic_cpu = image.address_of("panic_cpu");
        let panic_cpu = panic_cpu.and_then(|at| Some((at, selector.space().translate(at).ok()?)));
        selector.bulk();
        let mappings = mappings(&selector);
        let gaps = std::mem::take(&mut selector.gaps);
        let mut store = recorder.into_store();
        let cpu = vcpus.iter().find(|state| Some(state.vcpu) == crashed).and_then(|it| it.cpu);
        let panic_cpu_set = panic_cpu
            .zip(cpu)
            .filter(|_| limits.mark_panic_cpu)
            .and_then(|((at, phys), cpu)| mark(&mut store, phys, cpu).then_some(at));
        vcpus.sort_by_key(|state| (state.cpu, state.vcpu));
        let crashed = vcpus.iter().position(|state| Some(state.vcpu) == crashed);
        let cpus = vcpus.iter().map(|state| (state.cpu, state.pid)).collect();
        let about = About { format: 1, crashed, of_the_crash, cpus, panic_cpu_set, gaps };
        Ok(Self { store, mappings, vcpus, vmcoreinfo, about })
    }

    /// Bytes of guest memory in it. The file is smaller where pages are zero.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.store.len() as u64 * PAGE
    }

    /// What could not be had, in words for people.
    #[must_use]
    pub fn gaps(&self) -> &[String] {
        &self.about.gaps
    }

    /// Whether the page at a guest-physical address is in it.
    #[must_use]
    pub fn contains(&self, at: GuestPhys) -> bool {
        self.store.contains(at)
    }

    /// Writes the file, front to back.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        // Readers match these by order: all of them, or none.
        let mut qemu = Vec::new();
        if !self.vcpus.iter().all(|state| notes::push_qemu(&mut qemu, &state.registers)) {
            qemu.clear();
        }
        let mut bytes = Vec::new();
        for (index, state) in (1..).zip(&self.vcpus) {
            let pid = if qemu.is_empty() { state.pid } else { index };
            notes::push_prstatus(&mut bytes, &state.registers, pid);
        }
        bytes.append(&mut qemu);
        notes::push(&mut bytes, "VMCOREINFO", 0, &self.vmcoreinfo);
        notes::push(&mut bytes, NOTE_NAME, NOTE_TYPE, &serde_json::to_vec(&self.about)?);
        elf::write(&self.store, &self.mappings, &bytes, out)
    }
}

/// Sets `panic_cpu`, if it says `PANIC_CPU_INVALID` (-1, include/linux/panic.h).
fn mark(store: &mut Store, at: GuestPhys, cpu: usize) -> bool {
    let invalid = store.read_u32(at) == Some(u32::MAX);
    let cpu = u32::try_from(cpu).ok().filter(|_| invalid);
    cpu.is_some_and(|cpu| store.patch(at, &cpu.to_le_bytes()))
}

/// Copied pages as ranges, ascending.
fn ranges(store: &Store) -> Vec<Range<GuestPhys>> {
    let mut ranges: Vec<Range<GuestPhys>> = Vec::new();
    for (at, _) in store.ascending() {
        match ranges.last_mut().filter(|range| range.end == at) {
            Some(range) => range.end = at + PAGE,
            None => ranges.push(at..at + PAGE),
        }
    }
    ranges
}

/// The text that the kernel keeps for dump tools.
fn vmcoreinfo(image: &RepairImage, space: &AddressSpace<'_>) -> Option<Vec<u8>> {
    let at = space.read_u64(image.address_of("vmcoreinfo_data")?).ok().map(GuestVirt)?;
    let size = space.read_u64(image.address_of("vmcoreinfo_size")?).ok()?;
    let mut text = vec![0; usize::try_from(size.min(VMCOREINFO_MAX)).ok()?];
    space.read(at, &mut text).ok()?;
    Vmcoreinfo::parse(&text).map(|_| text)
}

/// The same, found by its looks.
fn found(phys: &dyn PhysMemory) -> Option<Vec<u8>> {
    let info = Vmcoreinfo::find_all(phys).pop()?;
    let mut text = vec![0; VMCOREINFO_MAX as usize];
    phys.read(info.at, &mut text).ok()?;
    let end = text.iter().position(|&byte| byte == 0)?;
    text.truncate(end);
    Some(text)
}

/// Where the kernel maps physical memory, checked against its page tables.
fn mappings(selector: &Selector<'_>) -> Mappings {
    let space = selector.space();
    // A variable since commit 021182e52fe0 ("x86/mm: Enable KASLR for physical mapping memory regions",
    // v4.8).
    let direct = selector.image.address_of("page_offset_base");
    let direct = direct.and_then(|at| space.read_u64(at).ok()).map(GuestVirt);
    let maps = |base: &GuestVirt| {
        let ranges = space.physical().ranges();
        let page = ranges.first().map(|range| range.start + PAGE);
        page.is_some_and(|page| space.translate(base.wrapping_add(page.0)) == Ok(page))
    };
    let image = selector.kernel_image.as_ref();
    let image = image.map(|(virt, phys)| (*phys, virt.start, virt.end - virt.start));
    Mappings { direct: direct.filter(maps), image }
}

#[cfg(test)]
mod tests;
