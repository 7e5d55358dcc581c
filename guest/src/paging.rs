//! x86-64 page-table walk (Intel SDM 3A 4.5): 4 and 5 levels, 4K, 2M and 1G pages. Reads only.

use crate::{GuestPhys, GuestVirt, MemoryError, PhysMemory, Reg, Registers, VirtMemory};

/// Physical-address bits of a page-table entry (bits 51..12).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
/// "Page size" bit of PDPT and PD entries.
const LARGE: u64 = 1 << 7;
/// CR4.LA57: 5-level paging.
const CR4_LA57: u64 = 1 << 12;

/// What maps one guest-virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address of the byte asked for.
    pub phys: GuestPhys,
    /// Size of the page in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// The leaf entry, with its flags.
    pub entry: u64,
    /// Guest-physical address of the leaf entry.
    pub entry_at: GuestPhys,
    /// Writable at every level.
    pub writable: bool,
    /// Reachable from user mode at every level.
    pub user: bool,
    /// Not executable at some level.
    pub no_execute: bool,
}

/// Guest-virtual memory under one page-table root.
#[derive(Clone, Copy)]
pub struct AddressSpace<'m> {
    memory: &'m dyn PhysMemory,
    root: GuestPhys,
    five_level: bool,
}

impl<'m> AddressSpace<'m> {
    /// The address space whose top table lies at guest-physical `root` (low 12 bits are ignored, so a
    /// CR3 value with PCID or the PTI half's bit 12 cleared may be given).
    #[must_use]
    pub fn new(memory: &'m dyn PhysMemory, root: GuestPhys, five_level: bool) -> Self {
        Self { memory, root: GuestPhys(root.0 & ADDRESS), five_level }
    }

    /// The address space a vCPU runs in, from its CR3 and CR4; `None` if they are not known.
    #[must_use]
    pub fn of_vcpu(memory: &'m dyn PhysMemory, regs: &Registers) -> Option<Self> {
        let five_level = regs.get(Reg::Cr4)? & CR4_LA57 != 0;
        Some(Self::new(memory, GuestPhys(regs.get(Reg::Cr3)?), five_level))
    }

    /// Guest-physical address of the top page table.
    #[must_use]
    pub fn root(&self) -> GuestPhys {
        self.root
    }

    /// Whether tables have five levels.
    #[must_use]
    pub fn five_level(&self) -> bool {
        self.five_level
    }

    /// The guest-physical memory underneath.
    #[must_use]
    pub fn physical(&self) -> &'m dyn PhysMemory {
        self.memory
    }

    /// Walks the tables for `at`.
    ///
    /// # Errors
    /// [`MemoryError::NotCanonical`], [`MemoryError::NotMapped`], or a table that can't be read.
    pub fn walk(&self, at: GuestVirt) -> Result<Mapping, MemoryError> {
        if !at.is_canonical(self.five_level) {
            return Err(MemoryError::NotCanonical { at });
        }
        let (mut writable, mut user, mut no_execute) = (true, true, false);
        let mut table = self.root;
        let top = if self.five_level { 5 } else { 4 };
        for level in (1..=top).rev() {
            let shift = 12 + 9 * (u32::from(level) - 1);
            let entry_at = table + (at.0 >> shift & 511) * 8;
            let entry = self.memory.read_u64(entry_at)?;
            if entry & PRESENT == 0 {
                return Err(MemoryError::NotMapped { at, level });
            }
            writable &= entry & 2 != 0;
            user &= entry & 4 != 0;
            no_execute |= entry >> 63 != 0;
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                let page_size = 1 << shift;
                let base = entry & ADDRESS & !(page_size - 1);
                let phys = GuestPhys(base | at.0 & (page_size - 1));
                return Ok(Mapping {
                    phys,
                    page_size,
                    entry,
                    entry_at,
                    writable,
                    user,
                    no_execute,
                });
            }
            table = GuestPhys(entry & ADDRESS);
        }
        unreachable!("level 1 always returns")
    }
}

impl VirtMemory for AddressSpace<'_> {
    fn read(&self, at: GuestVirt, into: &mut [u8]) -> Result<(), MemoryError> {
        if into.is_empty() {
            return Ok(());
        }
        if at.checked_add(into.len() as u64 - 1).is_none() {
            return Err(MemoryError::Wraps { at: at.0, len: into.len() });
        }
        let mut done = 0;
        while done < into.len() {
            let here = at + done as u64;
            let mapping = self.walk(here)?;
            let left_in_page = mapping.page_size - (here.0 & (mapping.page_size - 1));
            let len = left_in_page.min((into.len() - done) as u64) as usize;
            self.memory.read(mapping.phys, &mut into[done..done + len])?;
            done += len;
        }
        Ok(())
    }

    fn translate(&self, at: GuestVirt) -> Result<GuestPhys, MemoryError> {
        self.walk(at).map(|mapping| mapping.phys)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::{FakeMachine, PageSize};

    #[test]
    fn walks_every_page_size_and_both_depths() {
        for five_level in [false, true] {
            let mut machine = FakeMachine::new(8 << 20, five_level);
            machine.map(GuestVirt(0xffff_ffff_8100_0000), GuestPhys(0x20_0000), PageSize::Size2M);
            machine.map(GuestVirt(0xffff_c900_0000_0000), GuestPhys(0x5000), PageSize::Size4K);
            machine.map(GuestVirt(0xffff_8880_0000_0000), GuestPhys(0), PageSize::Size1G);
            machine.poke(GuestPhys(0x20_1234), &[7]);
            let space = machine.space();
            assert_eq!(space.read_u8(GuestVirt(0xffff_ffff_8100_1234)), Ok(7));
            assert_eq!(space.read_u8(GuestVirt(0xffff_8880_0020_1234)), Ok(7));
            assert_eq!(space.translate(GuestVirt(0xffff_c900_0000_0010)), Ok(GuestPhys(0x5010)));
            assert!(matches!(
                space.read_u8(GuestVirt(0xffff_c900_0000_1000)),
                Err(MemoryError::NotMapped { level: 1, .. })
            ));
        }
    }

    #[test]
    fn a_read_across_pages_is_all_or_nothing() {
        let mut machine = FakeMachine::new(8 << 20, false);
        machine.map(GuestVirt(0xffff_c900_0000_0000), GuestPhys(0x5000), PageSize::Size4K);
        let space = machine.space();
        assert!(space.read_u64(GuestVirt(0xffff_c900_0000_0ff8)).is_ok());
        assert!(space.read_u64(GuestVirt(0xffff_c900_0000_0ffc)).is_err());
        assert!(space.read(GuestVirt(u64::MAX), &mut [0; 2]).is_err());
    }

    proptest! {
        #[test]
        fn hostile_tables_never_panic(words in proptest::collection::vec(any::<u64>(), 1..64),
                                      at: u64, root: u64, five: bool) {
            let mut machine = FakeMachine::new(1 << 20, five);
            for (index, word) in words.iter().enumerate() {
                machine.poke(GuestPhys(((*word ^ at) % (1 << 20)) & !7), &words[index].to_le_bytes());
            }
            let space = AddressSpace::new(machine.memory(), GuestPhys(root % (2 << 20)), five);
            let _ = space.walk(GuestVirt(at));
            let _ = space.read(GuestVirt(at), &mut [0; 100]);
            let _ = space.read_cstr(GuestVirt(at), 100);
        }
    }
}
