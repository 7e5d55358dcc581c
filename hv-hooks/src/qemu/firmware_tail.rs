//! Finding memory that SeaBIOS reserved at the end of low RAM and no longer uses. Reads guest memory only, and
//! trusts none of it: a wrong answer would be memory of the guest's.

use std::ops::Range;

use guest::{GuestPhys, MemoryError, PhysMemory};

use crate::Error;

/// Where firmware leaves the pointer to its ACPI tables (ACPI 6.5, 5.2.5.1).
const RSDP_AREA: Range<u64> = 0xe_0000..0x10_0000;
/// SeaBIOS allocates its tables from the last 256 KiB of low RAM downwards and reserves all from the lowest
/// allocation up (src/config.h, BUILD_MAX_HIGHTABLE; src/malloc.c, malloc_prepboot).
const MAX_RESERVED: u64 = 256 << 10;
/// Most tables that are looked at; QEMU makes about ten.
const MAX_TABLES: u32 = 64;
/// Longest ACPI table that is believed.
const MAX_TABLE: u32 = 256 << 10;
const PAGE: u64 = 4096;

/// The longest run of zeroed pages above the ACPI tables.
///
/// # Errors
/// [`Error::FreshUnavailable`] when the firmware is not one that leaves such a run.
pub(crate) fn find(memory: &dyn PhysMemory) -> Result<Range<GuestPhys>, Error> {
    let none = |why| move |_| Error::FreshUnavailable(why);
    let rsdt = find_rsdt(memory).map_err(none("the firmware area can't be read"))?;
    let rsdt = rsdt.ok_or(Error::FreshUnavailable("no ACPI tables where SeaBIOS leaves them"))?;
    let tables =
        table_span(memory, rsdt).map_err(none("the firmware's ACPI tables can't be read"))?;
    let ranges = memory.ranges();
    let low = ranges.iter().find(|range| range.contains(&tables.start));
    let top = low.map(|range| range.end).filter(|end| end.0 <= 1 << 32);
    let top = top.ok_or(Error::FreshUnavailable("the ACPI tables are not in low RAM"))?;
    if top - tables.start > MAX_RESERVED || tables.end > top {
        return Err(Error::FreshUnavailable("the ACPI tables are not at the end of low RAM"));
    }
    let first = GuestPhys(tables.end.0.next_multiple_of(PAGE));
    let run =
        longest_zero_run(memory, first..top).map_err(none("the end of low RAM can't be read"))?;
    run.ok_or(Error::FreshUnavailable("the firmware's reserved memory has no unused page"))
}

fn read_u32(memory: &dyn PhysMemory, at: GuestPhys) -> Result<u32, MemoryError> {
    let mut bytes = [0; 4];
    memory.read(at, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Address of the RSDT, from the root pointer with a right checksum.
fn find_rsdt(memory: &dyn PhysMemory) -> Result<Option<GuestPhys>, MemoryError> {
    let mut area = vec![0; (RSDP_AREA.end - RSDP_AREA.start) as usize];
    memory.read(GuestPhys(RSDP_AREA.start), &mut area)?;
    let mut pointers =
        area.chunks_exact(16).zip(area.chunks_exact(16).skip(1)).filter_map(|pair| {
            // Most of the area is something else.
            if !pair.0.starts_with(b"RSD PTR ") {
                return None;
            }
            let bytes: Vec<u8> = pair.0.iter().chain(pair.1).copied().take(20).collect();
            let sum = bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
            let (_, address) = bytes.split_last_chunk::<4>()?;
            (sum == 0).then(|| u32::from_le_bytes(*address))
        });
    Ok(pointers.next().map(|address| GuestPhys(address.into())))
}

/// From the lowest to the highest byte of all tables.
fn table_span(memory: &dyn PhysMemory, rsdt: GuestPhys) -> Result<Range<GuestPhys>, MemoryError> {
    let mut span = rsdt..rsdt;
    let mut include = |at: GuestPhys| {
        let len = read_u32(memory, at + 4)?.min(MAX_TABLE);
        span.start = span.start.min(at);
        span.end = span.end.max(at + len.into());
        Ok::<u32, MemoryError>(len)
    };
    let entries = (include(rsdt)?.saturating_sub(36) / 4).min(MAX_TABLES);
    for index in 0..entries {
        let table = GuestPhys(read_u32(memory, rsdt + 36 + u64::from(index) * 4)?.into());
        include(table)?;
        let mut name = [0; 4];
        memory.read(table, &mut name)?;
        if &name == b"FACP" {
            // FIRMWARE_CTRL and DSDT, the two tables that only the FADT points to (ACPI 6.5, 5.2.9).
            for field in [36, 40] {
                include(GuestPhys(read_u32(memory, table + field)?.into()))?;
            }
        }
    }
    Ok(span)
}

fn longest_zero_run(
    memory: &dyn PhysMemory,
    within: Range<GuestPhys>,
) -> Result<Option<Range<GuestPhys>>, MemoryError> {
    let mut best: Option<Range<GuestPhys>> = None;
    let mut run = within.start..within.start;
    let mut page = [0; PAGE as usize];
    while run.end < within.end && within.end - run.end >= PAGE {
        memory.read(run.end, &mut page)?;
        run.end = run.end + PAGE;
        if page.iter().any(|&byte| byte != 0) {
            run.start = run.end;
        } else if best.as_ref().is_none_or(|best| run.end - run.start > best.end - best.start) {
            best = Some(run.clone());
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use guest::Machine;
    use guest::fake::FakeMachine;
    use proptest::prelude::*;

    use super::*;

    const RAM: u64 = 2 << 20;
    const TABLES: u64 = RAM - 0x2_0000;

    fn with_tables(rsdt: u64) -> FakeMachine {
        let mut machine = FakeMachine::new(RAM, false);
        // FakeMachine's page table lies in the last page: in use, as some of SeaBIOS' allocations are.
        machine.poke(GuestPhys(RAM - PAGE), &[1]);
        let mut rsdp = *b"RSD PTR \0BOCHS \0\0\0\0\0";
        rsdp[16..].copy_from_slice(&(rsdt as u32).to_le_bytes());
        let sum = rsdp.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        rsdp[8] = 0u8.wrapping_sub(sum);
        machine.poke(GuestPhys(0xf_5000), &rsdp);
        let word = |machine: &mut FakeMachine, at: u64, value: u64| {
            machine.poke(GuestPhys(at), &(value as u32).to_le_bytes());
        };
        machine.poke(GuestPhys(rsdt), b"RSDT");
        word(&mut machine, rsdt + 4, 40);
        word(&mut machine, rsdt + 36, rsdt + 0x100);
        machine.poke(GuestPhys(rsdt + 0x100), b"FACP");
        word(&mut machine, rsdt + 0x104, 116);
        word(&mut machine, rsdt + 0x100 + 36, rsdt + 0x200);
        word(&mut machine, rsdt + 0x100 + 40, rsdt + 0x400);
        word(&mut machine, rsdt + 0x204, 64);
        word(&mut machine, rsdt + 0x404, 0x1f00);
        machine
    }

    #[test]
    fn free_pages_above_the_tables() {
        let machine = with_tables(TABLES + 0x40);
        let run = find(machine.phys()).unwrap();
        assert_eq!(run, GuestPhys(TABLES + 0x3000)..GuestPhys(RAM - PAGE));
    }

    #[test]
    fn a_used_page_splits_the_run() {
        let mut machine = with_tables(TABLES + 0x40);
        machine.poke(GuestPhys(TABLES + 0x5ff0), &[1]);
        assert_eq!(find(machine.phys()).unwrap().start, GuestPhys(TABLES + 0x6000));
    }

    #[test]
    fn other_firmware_is_refused() {
        let none = FakeMachine::new(RAM, false);
        assert!(matches!(find(none.phys()), Err(Error::FreshUnavailable(_))));
        let elsewhere = with_tables(0x4_0000);
        let error = find(elsewhere.phys()).unwrap_err().to_string();
        assert!(error.contains("not at the end"), "{error}");
    }

    proptest! {
        #[test]
        fn lying_tables_give_an_answer_or_an_error(at in 0u64..0x500, bytes in any::<[u8; 4]>()) {
            let mut machine = with_tables(TABLES + 0x40);
            machine.poke(GuestPhys(TABLES + 0x40 + at), &bytes);
            if let Ok(run) = find(machine.phys()) {
                prop_assert!(run.start.0 >= TABLES && run.end.0 <= RAM);
            }
        }
    }
}
