//! Tests of the core as a whole: written from a made-up guest, read back by the reader of dumps.

use guest::{Machine, MemoryError};
use object::{Object, ObjectSegment};
use proptest::prelude::*;

use super::*;
use crate::testing::{DATA, Guest, MODULE, TEXT, diagnosis};
use crate::vmcore::Vmcore;

const INFO: &[u8] = b"OSRELEASE=6.1.0\nKERNELOFFSET=0\n";
const TASK: u64 = DATA + 0x1_0000;
const STACK: u64 = DATA + 0x2_0000;
/// Only pointed to, from the stack; and only from there.
const NEAR: u64 = DATA + 0x10_0000;
const FAR: u64 = DATA + 0x12_0000;
/// Nothing leads here.
const UNRELATED: u64 = DATA + 0x18_0000;

/// Guest-physical address of an address in the test guest's data.
fn data(at: u64) -> GuestPhys {
    GuestPhys(0x40_0000 + at - DATA)
}

fn guest() -> Guest {
    let mut guest = Guest::new()
        .object("vmcoreinfo_data", DATA + 0x100)
        .object("vmcoreinfo_size", DATA + 0x108)
        .object("panic_cpu", DATA + 0x110)
        .object("init_task", TASK)
        .object("current_task", 0x40)
        .object("pcpu_hot", 0)
        .types(|types| types.with("pcpu_hot", "current_task", 0x40, 8).sized("task_struct", 0x1000))
        .cpu(DATA + 0x5000);
    guest.poke_u64(DATA + 0x100, DATA + 0x3000);
    guest.poke_u64(DATA + 0x108, INFO.len() as u64);
    guest.poke(DATA + 0x3000, INFO);
    guest.poke_u32(DATA + 0x110, u32::MAX);
    guest.poke_task(TASK, 42, "dd");
    guest.poke_u64(TASK + 0x38, STACK);
    guest.poke_u64(TASK + 0x60, TASK + 0x800);
    guest.poke_u64(TASK + 0x810, TASK + 0x810);
    guest.poke_u64(DATA + 0x5040, TASK);
    guest.poke_u64(STACK + 0x3f00, NEAR + 8);
    guest.poke_u64(NEAR, FAR);
    guest.poke_u64(FAR, 1);
    guest.poke_u64(UNRELATED, 1);
    guest
}

fn registers() -> Registers {
    [(Reg::Rip, TEXT), (Reg::Rsp, STACK + 0x3f00), (Reg::Cr3, 0x1000), (Reg::Cr4, 0x20)]
        .into_iter()
        .fold(Registers::unknown(), |registers, (reg, value)| registers.with(reg, value))
        .with(Reg::GsBase, DATA + 0x5000)
}

fn crash() -> Diagnosis {
    Diagnosis { vcpu: Vcpu(0), ..diagnosis() }
}

fn core_of(guest: &mut Guest, limits: &Limits) -> Result<Vec<u8>, LiveCoreError> {
    let image = guest.image();
    let phys = guest.machine.memory();
    let snapshot = Snapshot::take(&image, phys, &[registers()], Some(&crash()), &[]);
    let contents = Contents::collect(&image, phys, snapshot, limits)?;
    let mut file = Vec::new();
    contents.write(&mut file).unwrap();
    Ok(file)
}

#[test]
fn what_matters_is_in_the_file_and_nothing_else() {
    let file = core_of(&mut guest(), &Limits::default()).unwrap();
    assert!(file.len() < 1 << 20, "{}", file.len());
    let mut core = Vmcore::parse(file).unwrap();
    let memory = core.phys();
    assert_eq!(memory.read_u64(data(STACK + 0x3f00)), Ok(NEAR + 8));
    assert_eq!(memory.read_u64(data(NEAR)), Ok(FAR));
    assert_eq!(memory.read_u64(data(FAR)), Ok(1));
    // Zero pages are there as zeroes.
    assert_eq!(memory.read_u64(data(STACK)), Ok(0));
    let missing = memory.read_u64(data(UNRELATED));
    assert!(
        matches!(missing, Err(MemoryError::NotRam { .. } | MemoryError::NotCaptured { .. })),
        "{missing:?}"
    );
    let found = core.registers(Vcpu(0)).unwrap();
    for reg in [Reg::Rip, Reg::Rsp, Reg::Cr3, Reg::GsBase] {
        assert_eq!(found.get(reg), registers().get(reg), "{reg:?}");
    }
}

#[test]
fn the_kernels_own_tables_lead_through_the_file() {
    let mut guest = guest();
    let root = guest.machine.space().root();
    let core = Vmcore::parse(core_of(&mut guest, &Limits::default()).unwrap()).unwrap();
    let space = AddressSpace::new(core.phys(), root, false);
    assert_eq!(space.translate(GuestVirt(TASK)), Ok(data(TASK)));
    assert_eq!(space.read_u32(GuestVirt(TASK + 0x14)), Ok(42));
}

#[test]
fn the_crashed_cpu_is_marked_in_the_file_only() {
    let mut marked = guest();
    let core = Vmcore::parse(core_of(&mut marked, &Limits::default()).unwrap()).unwrap();
    assert_eq!(core.phys().read_u64(data(DATA + 0x110)).unwrap() as u32, 0);
    assert_eq!(marked.machine.space().read_u32(GuestVirt(DATA + 0x110)), Ok(u32::MAX));
    let limits = Limits { mark_panic_cpu: false, ..Limits::default() };
    let core = Vmcore::parse(core_of(&mut guest(), &limits).unwrap()).unwrap();
    assert_eq!(core.phys().read_u64(data(DATA + 0x110)).unwrap() as u32, u32::MAX);
}

#[test]
fn pages_of_the_crash_are_not_read_again() {
    let mut guest = guest();
    let image = guest.image();
    let writes = [GuestVirt(MODULE)..GuestVirt(MODULE + 8)];
    let phys = guest.machine.memory();
    let snapshot = Snapshot::take(&image, phys, &[registers()], Some(&crash()), &writes);
    assert!(snapshot.bytes() <= (SNAPSHOT_PAGES as u64) * 2 * PAGE);
    // The repair changes the stack and the module's code.
    guest.poke_u64(STACK + 0x3f00, 0);
    guest.poke(MODULE, &[0xc3]);
    let contents =
        Contents::collect(&image, guest.machine.memory(), snapshot, &Limits::default()).unwrap();
    let mut file = Vec::new();
    contents.write(&mut file).unwrap();
    let text = String::from_utf8_lossy(&file).into_owned();
    assert!(text.contains("\"of_the_crash\":[{\"start\":\"0x"));
    let core = Vmcore::parse(file).unwrap();
    assert_eq!(core.phys().read_u64(data(STACK + 0x3f00)), Ok(NEAR + 8));
    assert_eq!(core.phys().read_u64(GuestPhys(0x60_0000)), Ok(0));
}

#[test]
fn without_vmcoreinfo_there_is_no_core() {
    let mut guest = guest();
    guest.poke(DATA + 0x3000, b"X");
    let found = core_of(&mut guest, &Limits::default());
    assert!(matches!(found, Err(LiveCoreError::NoVmcoreinfo)));
}

#[test]
fn the_limit_holds() {
    let mut guest = guest();
    for page in 0..256 {
        guest.poke_u64(NEAR + 8 * page, DATA + 0x14_0000 + (page % 64) * PAGE);
        guest.poke_u64(DATA + 0x14_0000 + (page % 64) * PAGE, 7);
    }
    let image = guest.image();
    let phys = guest.machine.memory();
    let snapshot = Snapshot::take(&image, phys, &[registers()], None, &[]);
    let limits = Limits { bytes: 20 * PAGE, ..Limits::default() };
    let contents = Contents::collect(&image, phys, snapshot, &limits).unwrap();
    assert!(contents.bytes() <= 40 * PAGE, "{}", contents.bytes());
    assert!(contents.gaps().iter().any(|gap| gap.contains("limit")));
}

#[test]
fn segments_tell_where_the_kernel_maps_them() {
    let image = (GuestPhys(0x40_0000), GuestVirt(DATA), 0x20_0000);
    let mappings = Mappings { direct: Some(GuestVirt(0xffff_8880_0000_0000)), image: Some(image) };
    let mut store = Store::with_limit(16);
    let mut guest = guest();
    guest.machine.poke(GuestPhys(0x3f_f000), &[1]);
    guest.machine.poke(GuestPhys(0x40_0000), &[1]);
    for at in [0x3f_f000, 0x40_0000] {
        assert!(store.add(guest.machine.memory(), GuestPhys(at)));
    }
    let mut file = Vec::new();
    elf::write(&store, &mappings, &[], &mut file).unwrap();
    let elf = object::read::elf::ElfFile64::<object::Endianness>::parse(&*file).unwrap();
    let loads: Vec<u64> = elf.segments().map(|segment| segment.address()).collect();
    assert_eq!(loads, [0xffff_8880_003f_f000, DATA]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_memory_never_panics_nor_grows(
        words in proptest::collection::vec((0_u64..0x4000, any::<u64>(), any::<bool>()), 1..60),
    ) {
        let mut guest = guest();
        for (slot, value, near) in words {
            // Half of the values lead back into mapped memory, where circles can be built.
            let value = if near { DATA + (value & 0x1f_ffff) } else { value };
            guest.poke_u64(DATA + slot * 8, value);
        }
        let limits = Limits { bytes: 1 << 20, ..Limits::default() };
        if let Ok(file) = core_of(&mut guest, &limits) {
            prop_assert!(file.len() < 5 << 20);
            prop_assert!(Vmcore::parse(file).is_ok());
        }
    }
}
