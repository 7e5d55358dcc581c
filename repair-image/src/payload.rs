//! The payload: code that runs in the guest's kernel from fresh memory and calls guest functions from a
//! mailbox. Lays out its pages and says what to write where; writing and running is the caller's.
//!
//! A region of [`REGION_SIZE`] bytes, in 4 KiB pages: 0 code; 1 and 2 mailbox; 3 holds the page table that
//! maps the region, and as nothing is mapped at its own place, it is the guard page below the stack; 4 to 7 stack.

use guest::{
    AddressSpace, GuestPhys, GuestVirt, MemoryError, PhysMemory, RFLAGS_IF, Reg, Registers,
};

use crate::Error;

include!(concat!(env!("OUT_DIR"), "/payload_code.rs"));

/// Bytes of fresh memory that the payload needs, page table included.
pub const REGION_SIZE: u64 = 8 * PAGE;
/// Most calls of one run.
pub const MAX_CALLS: usize = 64;
/// Where the mailbox lies in the region, bytes.
pub const MAILBOX: u64 = PAGE;
/// Where the page table lies in the region, bytes: a page that is not mapped itself.
pub const PAGE_TABLE: u64 = 3 * PAGE;

const PAGE: u64 = 4096;
/// `"ebifDEFB"` in memory, then the version.
const MAGIC: u64 = 0x4246_4544_6669_6265;
const VERSION: u32 = 1;
/// Offsets in the mailbox; the same numbers are in payload.S.
const COUNT: usize = 0x0c;
const PREEMPT_COUNT: usize = 0x10;
const DONE: usize = 0x18;
const STARTED: usize = 0x1c;
const ENTRIES: usize = 0x40;
/// Offsets in an entry.
const RESULT: usize = 0x38;
const STATUS: usize = 0x40;
const ENTRY_SIZE: usize = 0x48;

/// Page-table entry bits (Intel SDM 3A 4.5): present, accessed, dirty; writable; no execute.
const PRESENT: u64 = 1;
const BASE_FLAGS: u64 = 0x61;
const WRITABLE: u64 = 2;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The last GiB of the address space: modules from its start on, fixmap at its end (mm.rst). It is under
/// the kernel's own top entry, so what is mapped here is mapped in every address space.
const TOP_GIB: GuestVirt = GuestVirt(0xffff_ffff_c000_0000);
/// Slots of 2 MiB in it that are looked at, from the highest: modules grow from the low end, and the
/// fixmap (with room to spare) is above.
const SLOTS: std::ops::RangeInclusive<u64> = 300..=495;

/// A function of the guest to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCall {
    /// Its first instruction, guest-virtual.
    pub function: GuestVirt,
    /// Its arguments: rdi, rsi, rdx, rcx, r8, r9.
    pub arguments: [u64; 6],
}

impl GuestCall {
    /// A call with at most six arguments; the others are 0.
    #[must_use]
    pub fn new<const N: usize>(function: GuestVirt, arguments: [u64; N]) -> Self {
        const { assert!(N <= 6) };
        let mut all = [0; 6];
        all.iter_mut().zip(arguments).for_each(|(slot, argument)| *slot = argument);
        Self { function, arguments: all }
    }
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallResult {
    /// Not begun.
    NotBegun,
    /// Begun, and has not come back: this is where the guest stands or has crashed.
    Begun,
    /// It came back with this in rax.
    Returned(u64),
}

/// The payload's pages, filled, and how to start it.
#[derive(Clone, Debug)]
pub struct PayloadImage {
    /// The region's contents, [`REGION_SIZE`] bytes. The page table's page is zero: [`PayloadMapping`] has it.
    pub bytes: Vec<u8>,
    /// Registers to enter with: rip, rsp, rdi, and rflags with interrupts off. The other registers (segments,
    /// GS base, control registers) stay those of the vCPU in kernel mode.
    pub entry: Registers,
    /// Where the payload waits when it is done: the host's breakpoint.
    pub finish: GuestVirt,
}

impl PayloadImage {
    /// Fills the pages for a region mapped at guest-virtual `base`. `preempt_count` is the address of the
    /// preempt count of the CPU that will run it (`None` = is not touched): it is raised during the calls.
    ///
    /// # Errors
    /// [`Error::TooManyCalls`] above [`MAX_CALLS`].
    pub fn new(
        base: GuestVirt,
        calls: &[GuestCall],
        preempt_count: Option<GuestVirt>,
    ) -> Result<Self, Error> {
        if calls.len() > MAX_CALLS {
            return Err(Error::TooManyCalls { calls: calls.len(), most: MAX_CALLS });
        }
        let mut bytes = vec![0; REGION_SIZE as usize];
        put(&mut bytes, 0, CODE);
        let mailbox = MAILBOX as usize;
        put(&mut bytes, mailbox, &MAGIC.to_le_bytes());
        put(&mut bytes, mailbox + 8, &VERSION.to_le_bytes());
        put(&mut bytes, mailbox + COUNT, &(calls.len() as u32).to_le_bytes());
        let preempt_count = preempt_count.map_or(0, |at| at.0);
        put(&mut bytes, mailbox + PREEMPT_COUNT, &preempt_count.to_le_bytes());
        for (index, call) in calls.iter().enumerate() {
            let words = std::iter::once(call.function.0).chain(call.arguments);
            let words: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            put(&mut bytes, mailbox + ENTRIES + index * ENTRY_SIZE, &words);
        }
        let entry = Registers::unknown()
            .with(Reg::Rip, (base + ENTRY).0)
            .with(Reg::Rsp, (base + REGION_SIZE).0)
            .with(Reg::Rdi, (base + MAILBOX).0)
            // Bit 1 is always set; IF, DF, TF and AC are clear.
            .with(Reg::Rflags, 2);
        debug_assert_eq!(entry.get(Reg::Rflags).unwrap_or(0) & RFLAGS_IF, 0);
        Ok(Self { bytes, entry, finish: base + FINISH })
    }

    /// The part of the region that is executed, and the rest, which is data.
    #[must_use]
    pub fn code_and_data(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(CODE.len().min(self.bytes.len()))
    }
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(slot) = bytes.get_mut(at..at + what.len()) {
        slot.copy_from_slice(what);
    }
}

/// What became of the calls, from the region's contents read back (at least up to the end of the
/// mailbox). `None` when the mailbox is damaged: the guest wrote over it.
#[must_use]
pub fn results(region: &[u8]) -> Option<Vec<CallResult>> {
    let mailbox = region.get(MAILBOX as usize..PAGE_TABLE as usize)?;
    let number = |at: usize, len: usize| {
        let bytes = mailbox.get(at..at + len)?;
        Some(bytes.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte)))
    };
    let count = number(COUNT, 4)?;
    let (done, started) = (number(DONE, 4)?, number(STARTED, 4)?);
    let ordered = done <= started && started <= count && started - done <= 1;
    if number(0, 8)? != MAGIC || count > MAX_CALLS as u64 || !ordered {
        return None;
    }
    let result = |index: u64| {
        let entry = ENTRIES + index as usize * ENTRY_SIZE;
        match (number(entry + STATUS, 8)?, index) {
            (0, index) if index >= started => Some(CallResult::NotBegun),
            (1, index) if index == done && index < started => Some(CallResult::Begun),
            (2, index) if index < done => Some(CallResult::Returned(number(entry + RESULT, 8)?)),
            // Between the last store to an entry and the one to the counter.
            (2, index) if index == done && index < started => Some(CallResult::Begun),
            (0, index) if index + 1 == started => Some(CallResult::Begun),
            _ => None,
        }
    };
    (0..count).map(result).collect()
}

/// An eight-byte page-table entry to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryWrite {
    /// Guest-physical address of the entry.
    pub at: GuestPhys,
    /// What must be there now.
    pub old: u64,
    /// What is to be there.
    pub new: u64,
}

/// How to map a region of fresh memory into the kernel half of every address space.
#[derive(Clone, Debug)]
pub struct PayloadMapping {
    /// Guest-virtual address of the region's first byte.
    pub base: GuestVirt,
    /// The page table's entries, inside the region.
    pub table: Vec<EntryWrite>,
    /// The entry that makes it visible; to be written last, and put back first. Not-present entries are
    /// not cached, so mapping needs no flush; after unmapping, the TLB must be flushed on the vCPU that
    /// ran the payload (a write of CR3 from outside does it: the entries are not global).
    pub link: EntryWrite,
}

impl PayloadMapping {
    /// Plans the mapping of the region at guest-physical `region` under the kernel's page tables `space`:
    /// code is not writable; everything else is, and not executable if `no_execute` (EFER.NXE) allows to say so.
    ///
    /// # Errors
    /// [`Error::NoFreeSlot`] when every slot is taken; [`Error::Guest`] when the tables can't be read;
    /// [`Error::UnalignedRegion`].
    pub fn plan(
        space: &AddressSpace<'_>,
        region: GuestPhys,
        no_execute: bool,
    ) -> Result<Self, Error> {
        if region.0 & !ADDRESS != 0 {
            return Err(Error::UnalignedRegion { at: region });
        }
        let directory = directory(space).map_err(Error::guest("page tables of the kernel"))?;
        let (slot, at) = free_slot(space.physical(), directory)?;
        let data = BASE_FLAGS | WRITABLE | if no_execute { NO_EXECUTE } else { 0 };
        let pages = (0..REGION_SIZE / PAGE).filter(|&page| page * PAGE != PAGE_TABLE);
        let table = pages.map(|page| EntryWrite {
            at: region + PAGE_TABLE + page * 8,
            old: 0,
            new: (region + page * PAGE).0 | if page == 0 { BASE_FLAGS } else { data },
        });
        let link = (region + PAGE_TABLE).0 | BASE_FLAGS | WRITABLE;
        Ok(Self {
            base: TOP_GIB + (slot << 21),
            table: table.collect(),
            link: EntryWrite { at, old: 0, new: link },
        })
    }
}

/// The page directory of the last GiB.
fn directory(space: &AddressSpace<'_>) -> Result<GuestPhys, MemoryError> {
    let mut table = space.root();
    let top = if space.five_level() { 5 } else { 4 };
    for level in (3..=top).rev() {
        // Index of the last GiB at every level is the last one.
        let entry = space.physical().read_u64(table + 511 * 8)?;
        let large = level == 3 && entry & 0x80 != 0;
        if entry & PRESENT == 0 || large {
            return Err(MemoryError::NotMapped { at: TOP_GIB, level });
        }
        table = GuestPhys(entry & ADDRESS);
    }
    Ok(table)
}

/// A slot of the directory that is empty, and where its entry lies. Its neighbours must be empty too, so
/// that nothing that overruns its own mapping hits the payload.
fn free_slot(phys: &dyn PhysMemory, directory: GuestPhys) -> Result<(u64, GuestPhys), Error> {
    let empty = |slot: u64| phys.read_u64(directory + slot * 8).is_ok_and(|entry| entry == 0);
    let slot = SLOTS.rev().find(|&slot| (slot - 1..=slot + 1).all(empty));
    slot.map(|slot| (slot, directory + slot * 8)).ok_or(Error::NoFreeSlot { directory })
}

#[cfg(test)]
mod tests {
    use guest::fake::{FakeMachine, PageSize};
    use guest::{VirtMemory, WriteMemory};

    use super::*;

    const BASE: GuestVirt = GuestVirt(0xffff_ffff_fde0_0000);

    fn call(function: u64) -> GuestCall {
        GuestCall::new(GuestVirt(function), [1, 2, 3])
    }

    #[test]
    fn pages_are_laid_out_as_the_code_expects() {
        let calls = [call(0xffff_ffff_8100_0000), call(0xffff_ffff_8100_0040)];
        let image = PayloadImage::new(BASE, &calls, Some(GuestVirt(0x77))).unwrap();
        assert_eq!(image.bytes.len() as u64, REGION_SIZE);
        assert_eq!(image.bytes[..4], [0xf3, 0x0f, 0x1e, 0xfa], "endbr64 comes first");
        assert!(CODE.len() < PAGE as usize);
        let finish = (image.finish - BASE) as usize;
        assert_eq!(image.bytes[finish..finish + 4], [0xf3, 0x90, 0xeb, 0xfc], "pause; jmp");
        assert_eq!(image.entry.rsp().unwrap().0 % 16, 0);
        let mailbox = &image.bytes[MAILBOX as usize..];
        assert_eq!(mailbox[..4], 0x6669_6265u32.to_le_bytes(), "as MAGIC_LOW of the code");
        assert_eq!(mailbox[COUNT], 2);
        assert_eq!(mailbox[PREEMPT_COUNT], 0x77);
        assert_eq!(mailbox[ENTRIES + ENTRY_SIZE], 0x40);
        assert_eq!(
            mailbox[ENTRIES + 8..ENTRIES + 32],
            [[1u64, 2, 3].map(u64::to_le_bytes)].concat().concat()
        );
        assert!(ENTRIES + MAX_CALLS * ENTRY_SIZE <= (PAGE_TABLE - MAILBOX) as usize);
        let many = vec![call(0); MAX_CALLS + 1];
        assert!(PayloadImage::new(BASE, &many, None).is_err());
    }

    #[test]
    fn results_tell_how_far_it_came() {
        let mut bytes = PayloadImage::new(BASE, &[call(0); 3], None).unwrap().bytes;
        assert_eq!(results(&bytes), Some(vec![CallResult::NotBegun; 3]));
        let mailbox = MAILBOX as usize;
        put(&mut bytes, mailbox + DONE, &[1]);
        put(&mut bytes, mailbox + STARTED, &[2]);
        put(&mut bytes, mailbox + ENTRIES + STATUS, &[2]);
        put(&mut bytes, mailbox + ENTRIES + RESULT, &[9]);
        put(&mut bytes, mailbox + ENTRIES + ENTRY_SIZE + STATUS, &[1]);
        let expected = [CallResult::Returned(9), CallResult::Begun, CallResult::NotBegun];
        assert_eq!(results(&bytes), Some(expected.to_vec()));
        put(&mut bytes, mailbox + DONE, &[3]);
        assert_eq!(results(&bytes), None, "counters contradict each other");
        assert_eq!(results(&bytes[..100]), None);
    }

    #[test]
    fn region_is_mapped_with_a_guard_page() {
        for five_level in [false, true] {
            let mut machine = FakeMachine::new(4 << 20, five_level);
            machine.map(TOP_GIB, GuestPhys(0), PageSize::Size4K);
            machine.map(TOP_GIB + (495 << 21), GuestPhys(0), PageSize::Size4K);
            let region = GuestPhys(0x10_0000);
            let mapping = PayloadMapping::plan(&machine.space(), region, true).unwrap();
            assert_eq!(mapping.base, TOP_GIB + (493 << 21), "495 is taken, 494 touches it");
            for write in mapping.table.iter().chain([&mapping.link]) {
                assert_eq!(machine.memory().read_u64(write.at), Ok(write.old));
                machine.write(write.at, &write.new.to_le_bytes()).unwrap();
            }
            let space = machine.space();
            let code = space.walk(mapping.base).unwrap();
            assert_eq!(code.phys, region);
            assert!(!code.writable && !code.no_execute && !code.user);
            let mailbox = space.walk(mapping.base + MAILBOX).unwrap();
            assert!(mailbox.writable && mailbox.no_execute);
            assert!(space.translate(mapping.base + PAGE_TABLE).is_err(), "guard page");
            assert!(space.walk(mapping.base + (REGION_SIZE - 8)).unwrap().writable);
            assert!(space.translate(mapping.base + REGION_SIZE).is_err());
        }
    }

    #[test]
    fn a_full_directory_and_a_crooked_region_are_refused() {
        let mut machine = FakeMachine::new(4 << 20, false);
        assert!(PayloadMapping::plan(&machine.space(), GuestPhys(0x1000), true).is_err());
        for slot in 0..512 {
            machine.map(TOP_GIB + (slot << 21), GuestPhys(0), PageSize::Size2M);
        }
        let full = PayloadMapping::plan(&machine.space(), GuestPhys(0x1000), true);
        assert!(matches!(full, Err(Error::NoFreeSlot { .. })));
        let crooked = PayloadMapping::plan(&machine.space(), GuestPhys(0x1001), true);
        assert!(matches!(crooked, Err(Error::UnalignedRegion { .. })));
    }
}
