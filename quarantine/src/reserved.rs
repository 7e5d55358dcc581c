//! Whether the guest's kernel knows that memory is reserved: asked before anything is put into the firmware's memory.
//! The backend finds that memory by what the firmware left in it; the kernel's own map must agree. Reads only.

use guest::{FreshRegion, GuestVirt, VirtMemory};
use repair_image::RepairImage;

use crate::guest_struct::Structures;

/// Entries of the map that are looked at; a BIOS hands over 128 at most (`E820_MAX_ENTRIES_ZEROPAGE`).
const MAX_ENTRIES: u64 = 512;
/// `E820_TYPE_RESERVED` (arch/x86/include/asm/e820/types.h); the number is the BIOS' (ACPI 6.5, 15.1).
const RESERVED: u64 = 2;

/// Whether one reserved entry of `e820_table` (arch/x86/kernel/e820.c) holds the whole region; `false` too where the
/// map can't be read. `None`: this kernel keeps no such map, as every Linux on x86 does.
pub(crate) fn holds(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    region: FreshRegion,
) -> Option<bool> {
    let table = image.address_of("e820_table")?;
    Some(entry_around(image, memory, table, region).is_some())
}

fn entry_around(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    pointer: GuestVirt,
    region: FreshRegion,
) -> Option<GuestVirt> {
    let kernel = Structures { image, memory };
    // A pointer; e820__reallocate_tables() moves the table out of the init section.
    let table = GuestVirt(memory.read_u64(pointer).ok()?);
    let count = kernel.number(table, "e820_table", "nr_entries").ok()??.min(MAX_ENTRIES);
    let first = kernel.member_at(table, "e820_table", "entries")?;
    let size = image.types.size_of("e820_entry")?;
    let end = region.at.0.checked_add(region.size)?;
    (0..count).map(|index| first + index.saturating_mul(size)).find(|&entry| {
        let number = |member: &str| kernel.number(entry, "e820_entry", member).ok().flatten();
        let (Some(start), Some(size)) = (number("addr"), number("size")) else { return false };
        number("type") == Some(RESERVED)
            && start <= region.at.0
            && start.checked_add(size).is_some_and(|entry_end| end <= entry_end)
    })
}

#[cfg(test)]
mod tests {
    use guest::{FreshKind, GuestPhys};

    use super::*;
    use crate::testing::Scene;

    #[test]
    fn only_a_whole_reserved_entry_holds_a_region() {
        let mut scene = Scene::new();
        scene.set_memory_map(&[(0, 0x100_0000, 1), (0x100_0000, 0x2_0000, RESERVED)]);
        let holds = |at: u64, size: u64| {
            let region = FreshRegion { at: GuestPhys(at), size, kind: FreshKind::FirmwareTail };
            holds(&scene.image, &scene.machine.space(), region).unwrap()
        };
        assert!(holds(0x100_0000, 0x2_0000) && holds(0x101_0000, 0x1000));
        assert!(!holds(0xff_f000, 0x2000) && !holds(0x101_f000, 0x2000), "it reaches out");
        assert!(!holds(0x1000, 0x1000), "RAM");
        assert!(!holds(u64::MAX - 0xfff, 0x2000), "it wraps");
    }

    #[test]
    fn a_map_that_cannot_be_read_holds_nothing() {
        let mut scene = Scene::new();
        let region =
            FreshRegion { at: GuestPhys(0x1000), size: 0x1000, kind: FreshKind::FirmwareTail };
        assert_eq!(holds(&scene.image, &scene.machine.space(), region), Some(false));
        scene.set_memory_map(&[(0, 0x100_0000, RESERVED)]);
        assert_eq!(holds(&scene.image, &scene.machine.space(), region), Some(true));
        scene.set_memory_map_entries(u32::MAX);
        // Entries behind the map are no entries, and their number is no reason to hang.
        let beyond = FreshRegion { at: GuestPhys(0x200_0000), ..region };
        assert_eq!(holds(&scene.image, &scene.machine.space(), beyond), Some(false));
    }
}
