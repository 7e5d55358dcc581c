//! The pristine bytes of what a running kernel never writes: text, read-only data, IDT, and the same of
//! modules. Keeping and giving them back only; comparing with memory is `damage.rs`'s.
//!
//! Constant is what the kernel's own page tables map read-only: `mark_rodata_ro()` (arch/x86/mm/init_64.c)
//! does that to text, read-only data and `.data..ro_after_init` before `system_state` becomes
//! `SYSTEM_RUNNING`, `idt_setup_apic_and_irq_gates()` (arch/x86/kernel/idt.c) to the IDT,
//! `module_enable_ro()` (kernel/module) to a module before it is live. With `rodata=off` nothing is.

use std::ops::Range;
use std::sync::Arc;

use guest::{AddressSpace, GuestPhys, GuestVirt, MemoryError, VirtMemory};

use crate::guest_layer::{PAGE, Place, damaged, word};
use crate::modules::ModuleState;
use crate::{Error, LoadedModule, PageKind};

/// More pristine bytes than any guest has: text and read-only data of a kernel with all its modules.
const MAX_BYTES: u64 = 48 << 20;
/// Bytes read at once.
const CHUNK: u64 = 64 * PAGE;

/// Consecutive pages, as they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PristineRun {
    /// What they are.
    pub kind: PageKind,
    /// Guest-virtual address of the first page.
    pub start: GuestVirt,
    /// Their bytes, whole pages. Not `Arc<[u8]>`: they are as many as 30 MB, which that would copy once more.
    pub bytes: Arc<Vec<u8>>,
}

impl PristineRun {
    /// The range they are of, guest-virtual.
    #[must_use]
    pub fn range(&self) -> Range<GuestVirt> {
        self.start..self.start + self.bytes.len() as u64
    }
}

/// What a running kernel never writes, as it was in the healthy guest. Clones share the bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pristine {
    /// By address, without overlap.
    runs: Vec<PristineRun>,
}

impl Pristine {
    /// Reads what is constant of the kernel proper.
    pub(crate) fn of_kernel(
        space: &AddressSpace<'_>,
        place: &Place<'_>,
        text: &Range<GuestVirt>,
    ) -> Self {
        let mut pristine = Self::default();
        pristine.add(space, PageKind::Text, text);
        if let Some(rodata) = place.range("__start_rodata", "__end_rodata") {
            pristine.add(space, PageKind::ReadOnlyData, &rodata);
        }
        if let Some(idt) = place.address("idt_table") {
            pristine.add(space, PageKind::Idt, &(idt..idt + PAGE));
        }
        pristine
    }

    /// Reads what is constant of modules that are live, and drops what was known of modules that are gone.
    /// Those in `kept` were read before.
    pub(crate) fn take_modules(
        &mut self,
        space: &AddressSpace<'_>,
        modules: &[LoadedModule],
        kept: &[LoadedModule],
    ) {
        self.runs.retain(|run| {
            let of = |module: &LoadedModule| module.ranges.iter().any(|r| r.contains(&run.start));
            run.kind == PageKind::Idt || run.kind.is_of_kernel() || kept.iter().any(of)
        });
        let new = modules.iter().filter(|module| !kept.contains(module));
        for module in new.filter(|module| module.state == ModuleState::Live) {
            for range in &module.ranges {
                let is_text = module.text.iter().any(|text| text.start == range.start);
                // Before v6.4 text and data are parts of one range, text first.
                let text = module.text.iter().find(|text| text.start == range.start);
                let text_end = text.filter(|_| is_text).map_or(range.start, |text| text.end);
                let split = up(text_end).min(range.end);
                self.add(space, PageKind::ModuleText, &(range.start..split));
                self.add(space, PageKind::ModuleReadOnlyData, &(split..range.end));
            }
        }
    }

    /// Adds the pages of a range that are mapped read-only.
    pub(crate) fn add(
        &mut self,
        space: &AddressSpace<'_>,
        kind: PageKind,
        range: &Range<GuestVirt>,
    ) {
        let end = up(range.end);
        let mut at = range.start.align_down(PAGE);
        let mut left = MAX_BYTES.saturating_sub(self.bytes());
        while at < end && left > 0 {
            let constant = constant_part(space, &(at..end), left);
            let Some(bytes) = (constant > 0).then(|| read(space, at, constant)).flatten() else {
                at = at + PAGE;
                continue;
            };
            left = left.saturating_sub(constant);
            self.insert(PristineRun { kind, start: at, bytes: bytes.into() });
            at = at + constant;
        }
    }

    fn insert(&mut self, run: PristineRun) {
        let index = self.runs.partition_point(|other| other.start < run.start);
        let before = index.checked_sub(1).and_then(|before| self.runs.get(before));
        let clashes = before.is_some_and(|other| other.range().end > run.start)
            || self.runs.get(index).is_some_and(|other| run.range().end > other.start);
        if !clashes {
            self.runs.insert(index, run);
        }
    }

    /// The runs, by address.
    #[must_use]
    pub fn runs(&self) -> &[PristineRun] {
        &self.runs
    }

    /// Bytes kept.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.bytes.len() as u64).sum()
    }

    /// The run that `at` lies in.
    #[must_use]
    pub fn run_at(&self, at: GuestVirt) -> Option<&PristineRun> {
        let index = self.runs.partition_point(|run| run.start <= at).checked_sub(1)?;
        self.runs.get(index).filter(|run| run.range().contains(&at))
    }

    /// Memory as `under` has it, with the pristine bytes where these are known.
    #[must_use]
    pub fn over<'a>(&'a self, under: &'a dyn VirtMemory) -> PristineMemory<'a> {
        PristineMemory { pristine: self, under }
    }

    /// For the guest layer's file: per run kind, start, length, bytes.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend((self.runs.len() as u64).to_le_bytes());
        for run in &self.runs {
            for word in [run.kind.number(), run.start.0, run.bytes.len() as u64] {
                out.extend(word.to_le_bytes());
            }
            out.extend(run.bytes.iter());
        }
    }

    /// Reads what [`Self::write`] wrote.
    pub(crate) fn read(rest: &mut &[u8]) -> Result<Self, Error> {
        let mut pristine = Self::default();
        let count = word(rest)?;
        for _ in 0..count {
            let kind = word(rest)?;
            let kind = PageKind::of_number(kind)
                .ok_or(damaged("kind of pristine pages", kind as usize))?;
            let start = GuestVirt(word(rest)?);
            let len = usize::try_from(word(rest)?).unwrap_or(usize::MAX);
            let whole =
                (len as u64).is_multiple_of(PAGE) && start.checked_add(len as u64).is_some();
            let bytes = rest.get(..len).filter(|_| whole && len > 0);
            let bytes = bytes.ok_or(damaged("length of pristine pages", len))?;
            pristine.insert(PristineRun { kind, start, bytes: Arc::new(bytes.to_vec()) });
            *rest = rest.get(len..).unwrap_or_default();
        }
        Ok(pristine)
    }

    /// For tests: a run made by hand.
    #[must_use]
    pub fn with(mut self, kind: PageKind, start: GuestVirt, bytes: &[u8]) -> Self {
        self.insert(PristineRun { kind, start, bytes: Arc::new(bytes.to_vec()) });
        self
    }
}

/// The next page boundary.
fn up(at: GuestVirt) -> GuestVirt {
    GuestVirt(at.0.saturating_add(PAGE - 1)).align_down(PAGE)
}

/// Bytes from the start of `range` on, whole pages, that are mapped read-only; at most `most`.
fn constant_part(space: &AddressSpace<'_>, range: &Range<GuestVirt>, most: u64) -> u64 {
    let len = (range.end - range.start).min(most) & !(PAGE - 1);
    let mut done = 0;
    while done < len {
        let here = range.start + done;
        match space.walk(here) {
            Ok(mapping) if !mapping.writable => {
                done += mapping.page_size - (here.0 & (mapping.page_size - 1));
            }
            _ => break,
        }
    }
    done.min(len)
}

fn read(space: &AddressSpace<'_>, at: GuestVirt, len: u64) -> Option<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).ok().filter(|_| len <= MAX_BYTES)?];
    for (index, chunk) in bytes.chunks_mut(CHUNK as usize).enumerate() {
        space.read(at + index as u64 * CHUNK, chunk).ok()?;
    }
    Some(bytes)
}

/// Memory with pristine bytes over it.
#[derive(Clone, Copy)]
pub struct PristineMemory<'a> {
    pristine: &'a Pristine,
    under: &'a dyn VirtMemory,
}

impl VirtMemory for PristineMemory<'_> {
    fn read(&self, at: GuestVirt, into: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let here = at.checked_add(done as u64);
            let here = here.ok_or(MemoryError::Wraps { at: at.0, len: done + rest.len() })?;
            let to_page_end = usize::try_from(PAGE - (here.0 & (PAGE - 1))).unwrap_or(1);
            let len = rest.len().min(to_page_end);
            let part = rest.get_mut(..len).unwrap_or_default();
            let kept = self.pristine.run_at(here).and_then(|run| {
                let offset = usize::try_from(here - run.start).ok()?;
                run.bytes.get(offset..offset.checked_add(len)?)
            });
            match kept {
                Some(bytes) => part.copy_from_slice(bytes),
                None => self.under.read(here, part)?,
            }
            done += len;
        }
        Ok(())
    }

    fn translate(&self, at: GuestVirt) -> Result<GuestPhys, MemoryError> {
        self.under.translate(at)
    }
}

#[cfg(test)]
mod tests {
    use guest::fake::{FakeMachine, PageSize};
    use proptest::prelude::*;

    use super::*;
    use crate::synth::{CONSTANT_DATA, CONSTANT_MODULE, CONSTANT_TEXT, WRITABLE, constants};

    #[test]
    fn what_is_mapped_read_only_is_kept_and_nothing_else() {
        let (machine, image) = constants();
        let starts: Vec<_> =
            image.pristine.runs().iter().map(|run| (run.kind, run.start)).collect();
        let expected = [
            (PageKind::Text, CONSTANT_TEXT),
            (PageKind::ReadOnlyData, CONSTANT_DATA),
            (PageKind::ModuleText, CONSTANT_MODULE),
            (PageKind::ModuleReadOnlyData, CONSTANT_MODULE + 2 * PAGE),
        ];
        assert_eq!(starts, expected);
        assert_eq!(image.pristine.bytes(), 12 * PAGE);
        assert!(image.pristine.run_at(WRITABLE).is_none());
        assert!(image.pristine.run_at(CONSTANT_TEXT + 4 * PAGE).is_none());
        let mut page = [0; 4096];
        machine.space().read(CONSTANT_DATA + PAGE, &mut page).unwrap();
        let run = image.pristine.run_at(CONSTANT_DATA + PAGE).unwrap();
        assert_eq!(run.bytes[PAGE as usize..2 * PAGE as usize], page);
    }

    #[test]
    fn a_hole_and_a_writable_page_split_a_run() {
        let mut machine = FakeMachine::new(1 << 20, false);
        for page in [0, 1, 2, 4, 5] {
            let at = CONSTANT_TEXT + page * PAGE;
            machine.map(at, GuestPhys(page * PAGE), PageSize::Size4K);
            let entry = machine.space().walk(at).unwrap();
            let bits = if page == 1 { entry.entry } else { entry.entry & !2 };
            machine.poke(entry.entry_at, &bits.to_le_bytes());
        }
        let mut pristine = Pristine::default();
        let range = CONSTANT_TEXT + 1..CONSTANT_TEXT + (6 * PAGE - 1);
        pristine.add(&machine.space(), PageKind::Text, &range);
        let ranges: Vec<_> = pristine.runs().iter().map(PristineRun::range).collect();
        let at = |page: u64| CONSTANT_TEXT + page * PAGE;
        assert_eq!(ranges, [at(0)..at(1), at(2)..at(3), at(4)..at(6)]);
        // What overlaps is not taken twice.
        pristine.add(&machine.space(), PageKind::ReadOnlyData, &(at(5)..at(6)));
        assert_eq!(pristine.bytes(), 4 * PAGE);
    }

    #[test]
    fn pristine_bytes_lie_over_memory_that_has_others() {
        let (mut machine, image) = constants();
        machine.poke_virt(CONSTANT_TEXT + 0x10, &[1, 2, 3]);
        machine.poke_virt(WRITABLE, &[4]);
        let space = machine.space();
        let view = image.pristine.over(&space);
        assert_eq!(view.read_u32(CONSTANT_TEXT + 0x10), Ok(0x9090_9090));
        assert_eq!(space.read_u32(CONSTANT_TEXT + 0x10), Ok(0x9003_0201));
        assert_eq!(view.read_u8(WRITABLE), Ok(4));
        assert!(view.read_u64(CONSTANT_TEXT + (4 * PAGE - 4)).is_err(), "past its end is a hole");
        assert!(view.read(GuestVirt(u64::MAX - 1), &mut [0; 8]).is_err());
    }

    #[test]
    fn writing_and_reading_back() {
        let (_, image) = constants();
        let mut bytes = Vec::new();
        image.pristine.write(&mut bytes);
        let mut rest = bytes.as_slice();
        assert_eq!(Pristine::read(&mut rest).unwrap(), *image.pristine);
        assert!(rest.is_empty());
        for cut in [0, 7, 8, 20, bytes.len() - 1] {
            assert!(Pristine::read(&mut &bytes[..cut]).is_err(), "{cut}");
        }
    }

    proptest! {
        #[test]
        fn any_file_is_read_or_refused(at in 0usize..64, word in any::<u64>()) {
            let (_, image) = constants();
            let mut bytes = Vec::new();
            image.pristine.write(&mut bytes);
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            if let Ok(pristine) = Pristine::read(&mut bytes.as_slice()) {
                let mut ends = GuestVirt(0);
                for run in pristine.runs() {
                    prop_assert!(ends <= run.start && !run.bytes.is_empty());
                    ends = run.range().end;
                }
            }
        }
    }
}
