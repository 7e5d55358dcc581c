//! A machine in memory, for tests: flat RAM, real page tables, registers that can be set.

use std::ops::Range;

use crate::{
    AddressSpace, Control, GuestPhys, GuestVirt, Machine, MachineError, MemoryError, PhysMemory,
    Registers, Stop, Vcpu, WriteMemory,
};

/// Flat RAM from guest-physical 0.
pub struct FlatMemory(Vec<u8>);

impl PhysMemory for FlatMemory {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        let source = usize::try_from(at.0)
            .ok()
            .and_then(|start| self.0.get(start..start.checked_add(into.len())?))
            .ok_or(MemoryError::NotRam { at, len: into.len() })?;
        into.copy_from_slice(source);
        Ok(())
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        vec![GuestPhys(0)..GuestPhys(self.0.len() as u64)]
    }
}

/// Sizes of x86-64 pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB
    Size4K,
    /// 2 MiB
    Size2M,
    /// 1 GiB
    Size1G,
}

impl PageSize {
    fn level(self) -> u32 {
        match self {
            Self::Size4K => 1,
            Self::Size2M => 2,
            Self::Size1G => 3,
        }
    }
}

/// A machine of flat RAM; page tables are taken from the top of RAM downwards.
pub struct FakeMachine {
    memory: FlatMemory,
    five_level: bool,
    root: GuestPhys,
    next_table: u64,
    registers: Vec<Registers>,
    running: bool,
}

impl FakeMachine {
    /// A stopped machine with `size` bytes of RAM, one vCPU and an empty top page table.
    #[must_use]
    pub fn new(size: u64, five_level: bool) -> Self {
        let root = GuestPhys((size - 4096) & !4095);
        Self {
            memory: FlatMemory(vec![0; size as usize]),
            five_level,
            root,
            next_table: root.0,
            registers: vec![Registers::unknown()],
            running: false,
        }
    }

    /// Writes bytes without asking.
    ///
    /// # Panics
    /// When the range is not RAM.
    pub fn poke(&mut self, at: GuestPhys, bytes: &[u8]) {
        let start = at.0 as usize;
        let end = (start + bytes.len()).min(self.memory.0.len());
        self.memory.0[start..end].copy_from_slice(&bytes[..end - start]);
    }

    /// Writes bytes at a guest-virtual address that is mapped.
    ///
    /// # Panics
    /// When the range is not mapped.
    pub fn poke_virt(&mut self, at: GuestVirt, bytes: &[u8]) {
        use crate::VirtMemory;
        for (index, byte) in bytes.iter().enumerate() {
            let phys = self.space().translate(at + index as u64).expect("mapped");
            self.poke(phys, &[*byte]);
        }
    }

    /// Maps one page, building the tables in between.
    pub fn map(&mut self, virt: GuestVirt, phys: GuestPhys, size: PageSize) {
        let mut table = self.root.0;
        let top = if self.five_level { 5 } else { 4 };
        for level in (size.level() + 1..=top).rev() {
            let at = table + (virt.0 >> (12 + 9 * (level - 1)) & 511) * 8;
            let entry = self.memory.read_u64(GuestPhys(at)).expect("table in RAM");
            table = if entry & 1 == 1 {
                entry & !0xfff
            } else {
                self.next_table -= 4096;
                let next = self.next_table;
                self.poke(GuestPhys(at), &(next | 3).to_le_bytes());
                next
            };
        }
        let large = if size == PageSize::Size4K { 0 } else { 0x80 };
        let at = table + (virt.0 >> (12 + 9 * (size.level() - 1)) & 511) * 8;
        self.poke(GuestPhys(at), &(phys.0 | large | 3).to_le_bytes());
    }

    /// The RAM.
    #[must_use]
    pub fn memory(&self) -> &dyn PhysMemory {
        &self.memory
    }

    /// The address space under the machine's top table.
    #[must_use]
    pub fn space(&self) -> AddressSpace<'_> {
        AddressSpace::new(&self.memory, self.root, self.five_level)
    }

    /// Registers of vCPU 0, to be set by a test.
    pub fn registers_mut(&mut self) -> &mut Registers {
        &mut self.registers[0]
    }
}

impl Machine for FakeMachine {
    fn phys(&self) -> &dyn PhysMemory {
        &self.memory
    }

    fn vcpu_count(&self) -> usize {
        self.registers.len()
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        self.registers.get(vcpu.0).copied().ok_or(MachineError::NoSuchVcpu(vcpu))
    }

    fn control(&mut self) -> Option<&mut dyn Control> {
        Some(self)
    }

    fn writer(&mut self) -> Option<&mut dyn WriteMemory> {
        Some(self)
    }
}

impl Control for FakeMachine {
    fn is_running(&self) -> bool {
        self.running
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.running = true;
        Ok(())
    }

    fn wait(&mut self, _limit: std::time::Duration) -> Result<Option<Stop>, MachineError> {
        Ok(None)
    }

    fn set_registers(&mut self, vcpu: Vcpu, regs: &Registers) -> Result<(), MachineError> {
        self.registers.get_mut(vcpu.0).ok_or(MachineError::NoSuchVcpu(vcpu))?.overlay(regs);
        Ok(())
    }
}

impl WriteMemory for FakeMachine {
    fn write(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MemoryError> {
        let end = at.0.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.memory.0.len() as u64) {
            return Err(MemoryError::NotRam { at, len: bytes.len() });
        }
        self.poke(at, bytes);
        Ok(())
    }

    fn write_code(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), MachineError> {
        Ok(self.write(at, bytes)?)
    }
}
