//! Where things are in guest-physical memory, and the RAM itself. Nothing is read or written here.

use std::ops::Range;

use guest::GuestPhys;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::{Error, Result};

/// Guest RAM.
pub type Ram = GuestMemoryMmap;

/// `hvm_start_info`, which the kernel's entry gets in EBX.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// The list of modules (the initrd).
pub const MODULES: GuestAddress = GuestAddress(0x6800);
/// The memory map.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line, its final zero included; Linux on x86 reads no more than 2,048 bytes.
pub const COMMAND_LINE_ROOM: usize = 2048;
/// End of the RAM below the area of video memory and firmware.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// ACPI tables: where firmware has them, so that kernels which search find them too.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Where RAM begins again; kernels are loaded from here on.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Guest-physical addresses without RAM, below 4 GiB: devices, APICs, KVM's own pages.
pub const DEVICE_WINDOW: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// Registers of the virtio block device.
pub const VIRTIO_BLOCK: Range<u64> = 0xd000_0000..0xd000_0200;
/// The three pages that KVM on Intel hosts needs for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;
/// The I/O APIC of KVM's in-kernel interrupt controllers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Memory slots with RAM in them.
pub const RAM_SLOTS: Range<u32> = 0..8;
/// Memory slots left to the guard.
pub const GUARD_SLOTS: Range<u32> = 8..16;

/// RAM of `mib` MiB: as much as fits below the device window, the rest from 4 GiB on.
pub fn allocate(mib: u64) -> Result<Ram> {
    let no_ram = |source| Error::Ram { mib, source };
    let ranges: Vec<_> = ranges(mib.saturating_mul(1 << 20))
        .map(|range| (GuestAddress(range.start), (range.end - range.start) as usize))
        .collect();
    Ram::from_ranges(&ranges).map_err(no_ram)
}

/// The ranges that `size` bytes of RAM take.
pub fn ranges(size: u64) -> impl Iterator<Item = Range<u64>> {
    let low = 0..size.min(DEVICE_WINDOW.start);
    let above = size.saturating_sub(DEVICE_WINDOW.start);
    let high = DEVICE_WINDOW.end..DEVICE_WINDOW.end.saturating_add(above);
    [low, high].into_iter().filter(|range| !range.is_empty())
}

/// Windows that fresh memory must keep out of.
pub fn reserved() -> Vec<Range<GuestPhys>> {
    vec![GuestPhys(DEVICE_WINDOW.start)..GuestPhys(DEVICE_WINDOW.end)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_out_the_device_window() {
        let gib = 1 << 30;
        assert_eq!(ranges(gib).collect::<Vec<_>>(), vec![0..gib; 1]);
        assert_eq!(ranges(4 * gib).collect::<Vec<_>>(), [0..3 * gib, 4 * gib..5 * gib]);
    }
}
