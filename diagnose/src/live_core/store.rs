//! Pages that were copied out of a guest, and a view of its memory that copies every page it is asked for.
//! Which pages are worth it is decided elsewhere.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use guest::{GuestPhys, MemoryError, PhysMemory};

/// Size of a page, bytes.
pub(super) const PAGE: u64 = 4096;
const PAGE_BYTES: usize = PAGE as usize;

/// Copied pages, in the order in which they were asked for.
#[derive(Default)]
pub(super) struct Store {
    /// Page frame number to place in `frames`.
    index: HashMap<u64, usize>,
    frames: Vec<u64>,
    bytes: Vec<u8>,
    /// Pages of zeroes among them. They cost nearly nothing in a file.
    zeros: usize,
    limit: usize,
}

impl Store {
    /// A store that takes at most `limit` pages, and as many pages of zeroes.
    pub(super) fn with_limit(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.frames.len() - self.zeros >= self.limit || self.zeros >= self.limit
    }

    pub(super) fn contains(&self, at: GuestPhys) -> bool {
        self.index.contains_key(&(at.0 / PAGE))
    }

    /// Guest-physical address of the page that was copied as number `place`.
    pub(super) fn page_at(&self, place: usize) -> Option<GuestPhys> {
        self.frames.get(place).map(|frame| GuestPhys(frame * PAGE))
    }

    /// Contents of the page that was copied as number `place`.
    pub(super) fn page(&self, place: usize) -> Option<&[u8]> {
        let start = place.checked_mul(PAGE_BYTES)?;
        self.bytes.get(start..start.checked_add(PAGE_BYTES)?)
    }

    /// The page around `at`, as it was copied.
    fn copied(&self, at: GuestPhys) -> Option<&[u8]> {
        self.page(*self.index.get(&(at.0 / PAGE))?)
    }

    /// Copies the page around `at`, unless it is there already. Whether it is there now.
    pub(super) fn add(&mut self, phys: &dyn PhysMemory, at: GuestPhys) -> bool {
        let frame = at.0 / PAGE;
        if self.index.contains_key(&frame) {
            return true;
        }
        if self.is_full() {
            return false;
        }
        let start = self.bytes.len();
        self.bytes.resize(start + PAGE_BYTES, 0);
        let read = self.bytes.get_mut(start..).map(|page| phys.read(GuestPhys(frame * PAGE), page));
        if !matches!(read, Some(Ok(()))) {
            self.bytes.truncate(start);
            return false;
        }
        let zero = self.bytes.get(start..).is_some_and(|page| page.iter().all(|&byte| byte == 0));
        self.zeros += usize::from(zero);
        self.index.insert(frame, self.frames.len());
        self.frames.push(frame);
        true
    }

    /// A little-endian word of a copied page.
    pub(super) fn read_u32(&self, at: GuestPhys) -> Option<u32> {
        let within = (at.0 % PAGE) as usize;
        let bytes = self.copied(at)?.get(within..within + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Overwrites bytes of a copied page. Whether they are all in one page that was copied.
    pub(super) fn patch(&mut self, at: GuestPhys, new: &[u8]) -> bool {
        let place = self.index.get(&(at.0 / PAGE)).copied();
        let start = place.and_then(|place| place.checked_mul(PAGE_BYTES));
        let within = (at.0 % PAGE) as usize;
        let target = start
            .filter(|_| within + new.len() <= PAGE_BYTES)
            .and_then(|start| self.bytes.get_mut(start + within..start + within + new.len()));
        let Some(target) = target else { return false };
        target.copy_from_slice(new);
        true
    }

    /// Pages in ascending order: guest-physical address and place.
    pub(super) fn ascending(&self) -> Vec<(GuestPhys, usize)> {
        let mut pages: Vec<_> = self
            .frames
            .iter()
            .enumerate()
            .map(|(place, frame)| (GuestPhys(frame * PAGE), place))
            .collect();
        pages.sort_unstable();
        pages
    }
}

/// Guest memory that copies into a store what is read through it, and reads what was copied already from
/// there: a walk sees what the file will show.
pub(super) struct Recorder<'a> {
    phys: &'a dyn PhysMemory,
    store: RefCell<Store>,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(phys: &'a dyn PhysMemory, store: Store) -> Self {
        Self { phys, store: RefCell::new(store) }
    }

    pub(super) fn into_store(self) -> Store {
        self.store.into_inner()
    }

    pub(super) fn store(&self) -> std::cell::Ref<'_, Store> {
        self.store.borrow()
    }

    /// Copies the page around `at`.
    pub(super) fn add(&self, at: GuestPhys) -> bool {
        self.store.borrow_mut().add(self.phys, at)
    }
}

impl PhysMemory for Recorder<'_> {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        if at.checked_add(into.len() as u64).is_none() {
            return Err(MemoryError::Wraps { at: at.0, len: into.len() });
        }
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let here = at + done as u64;
            let within = (here.0 % PAGE) as usize;
            let len = rest.len().min(PAGE_BYTES - within);
            let Some(part) = rest.get_mut(..len) else { break };
            let mut store = self.store.borrow_mut();
            store.add(self.phys, here);
            match store.copied(here).and_then(|page| page.get(within..within + len)) {
                Some(copied) => part.copy_from_slice(copied),
                None => self.phys.read(here, part)?,
            }
            done += len;
        }
        Ok(())
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        self.phys.ranges()
    }
}

#[cfg(test)]
mod tests {
    use guest::WriteMemory;
    use guest::fake::FakeMachine;

    use super::*;

    #[test]
    fn what_is_read_is_kept_as_it_was() {
        let mut machine = FakeMachine::new(1 << 20, false);
        machine.poke(GuestPhys(0x1ffe), &[1, 2, 3, 4]);
        let recorder = Recorder::new(machine.memory(), Store::with_limit(8));
        recorder.read(GuestPhys(0x1ffe), &mut [0; 4]).unwrap();
        let store = recorder.into_store();
        machine.write(GuestPhys(0x1ffe), &[9; 4]).unwrap();
        let recorder = Recorder::new(machine.memory(), store);
        let mut bytes = [0; 4];
        recorder.read(GuestPhys(0x1ffe), &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert_eq!(recorder.into_store().len(), 2);
    }

    #[test]
    fn a_full_store_still_reads() {
        let mut machine = FakeMachine::new(1 << 20, false);
        machine.poke(GuestPhys(0), &[1; 8192]);
        let recorder = Recorder::new(machine.memory(), Store::with_limit(1));
        recorder.read(GuestPhys(0), &mut [0; 8192]).unwrap();
        assert!(recorder.read(GuestPhys(1 << 20), &mut [0; 1]).is_err());
        assert!(recorder.read(GuestPhys(u64::MAX), &mut [0; 2]).is_err());
        let store = recorder.into_store();
        assert!(store.contains(GuestPhys(0xfff)) && !store.contains(GuestPhys(0x1000)));
    }

    #[test]
    fn a_patch_stays_in_its_page() {
        let machine = FakeMachine::new(1 << 20, false);
        let mut store = Store::with_limit(2);
        assert!(store.add(machine.memory(), GuestPhys(0x3008)));
        assert!(store.patch(GuestPhys(0x3ffc), &[7; 4]));
        assert!(!store.patch(GuestPhys(0x3ffd), &[7; 4]));
        assert!(!store.patch(GuestPhys(0x5000), &[7; 4]));
    }
}
