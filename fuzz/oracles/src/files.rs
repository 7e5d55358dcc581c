//! What must hold of files: a module's object, a dump of any format.

use diagnose::dump::{Dump, FormatKind, Hints};
use guest::fake::FakeMachine;
use guest::{GuestPhys, GuestVirt, LinkAddr, Machine, MemoryError, Reg, Registers, Vcpu};
use repair_image::{Argument, DebugFile, DebugInfo, FrameState, OrcLayout, Vmcoreinfo, compile};

/// Where sections of a module are placed, guest-virtual, 64 KiB apart.
const MODULE: u64 = 0xffff_ffff_c000_0000;
/// Sections that are placed.
const SECTIONS: [&str; 6] =
    [".text", ".text.unlikely", ".init.text", ".data", ".rodata", ".orc_unwind_ip"];

/// A module's object file: what is known of it is at the places it was given.
///
/// # Panics
/// When that does not hold.
pub fn module_object(data: &[u8]) {
    let places = (0u64..).zip(SECTIONS);
    let places: Vec<_> =
        places.map(|(index, name)| (name.to_owned(), GuestVirt(MODULE + (index << 16)))).collect();
    let Ok(knowledge) = compile::module(data, &places, Some(OrcLayout::V6_4)) else { return };
    assert!(knowledge.symbols().is_sorted_by_key(|symbol| symbol.at));
    if let Ok(file) = DebugFile::module(data, &places) {
        let info = file.info().expect("sections that were relocated");
        for symbol in knowledge.functions().take(16) {
            in_force(&info, LinkAddr(symbol.at.0.wrapping_add(symbol.size / 2)));
        }
    }
    for symbol in knowledge.functions().take(64) {
        for at in [symbol.at, LinkAddr(symbol.at.0.wrapping_add(symbol.size / 2))] {
            let chain = knowledge.source(at);
            assert!(chain.len() <= 64);
            let _ = knowledge.unwind_row(at);
        }
        assert!(knowledge.symbols_named(symbol.name).any(|other| other.at == symbol.at));
        if let Some(prototype) = knowledge.prototype(symbol.name) {
            assert!(prototype.parameters.len() <= 255);
        }
    }
}

/// Variables at an address are few, and each holds something or the reason is told, the same each time.
fn in_force(info: &DebugInfo<'_>, at: LinkAddr) {
    let Some(found) = info.at(at) else { return };
    assert!(found.variables.len() <= 512);
    let machine = FakeMachine::new(1 << 16, false);
    let (registers, memory) = (Registers::unknown().with(Reg::Rbp, MODULE), machine.space());
    let state = FrameState {
        registers: &registers,
        cfa: Some(GuestVirt(MODULE)),
        memory: &memory,
        slide: 0,
        passed: &|argument| (argument == Argument::In(Reg::Rdi)).then_some(MODULE),
    };
    for variable in &found.variables {
        let held = info.held(&found, variable, &state);
        assert_eq!(held, info.held(&found, variable, &state));
        let _ = info.enumerator(&found, variable, 1);
    }
    if let Some(function) = found.function {
        let _ =
            info.passed(LinkAddr(at.0.wrapping_add(1)), function, Argument::In(Reg::Rdi), &state);
    }
}

/// A dump of any format: what it says is RAM can be read or was not captured, and no more of it is found
/// than is there. Two copies of a file are no split dump.
///
/// # Panics
/// When that does not hold.
pub fn vmcore(data: &[u8]) {
    assert!(Dump::parse_parts(vec![data, data], &Hints::default()).is_err() || is_empty_part(data));
    let Ok(mut core) = Dump::parse(data) else { return };
    let count = core.vcpu_count();
    assert!(count <= data.len() / 12, "a vCPU without a note");
    assert!((0..count).all(|vcpu| core.registers(Vcpu(vcpu)).is_ok()));
    assert!(core.registers(Vcpu(count)).is_err());
    let phys = core.phys();
    let ranges = phys.ranges();
    for range in &ranges {
        assert!(range.start < range.end, "a range of RAM that wraps: {range:?}");
        let mut byte = [0];
        for at in [range.start, GuestPhys(range.end.0 - 1)] {
            let read = phys.read(at, &mut byte);
            assert!(matches!(
                read,
                Ok(()) | Err(MemoryError::NotCaptured { .. } | MemoryError::NotRam { .. })
            ));
            if let Some(slice) = phys.slice(at..at + 1) {
                assert_eq!((slice, read), (&byte[..], Ok(())));
            }
        }
    }
    let total: u128 = ranges.iter().map(|range| u128::from(range.end.0 - range.start.0)).sum();
    assert!(core.remarks().iter().all(|remark| !remark.to_string().is_empty()));
    let _ = core.kernel_space().map(|space| space.walk(GuestVirt(MODULE)));
    // What follows goes through all RAM page by page.
    if total <= 16 << 20 {
        assert!(Vmcoreinfo::find_all(phys).len() <= 64);
        let _ = repair_image::without_files(phys, &[]);
    }
}

/// A migration stream: each page that is captured can be read, and has cost the file a header and a byte; what
/// libvirt writes before a stream changes nothing in it.
///
/// # Panics
/// When that does not hold.
pub fn migration_stream(data: &[u8]) {
    let Ok(mut dump) = Dump::parse(data) else { return };
    let FormatKind::Migration { libvirt } = dump.format().kind else { return };
    let captured = dump.coverage().captured;
    assert!(captured / 4096 <= data.len() as u64 / 9 && captured <= dump.coverage().ram);
    let ranges = dump.phys().ranges();
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    assert_eq!(ranges.iter().map(|range| range.end.0 - range.start.0).sum::<u64>(), captured);
    for range in ranges.iter().take(64) {
        for at in [range.start, GuestPhys(range.end.0 - 8)] {
            assert!(dump.phys().read_u64(at).is_ok(), "a page at {at:#x} that is not captured");
        }
    }
    if libvirt || dump.format().flattened {
        return;
    }
    let saved = [LIBVIRT_HEADER, &[0; 92 - 24], b"<domain/>\0", data].concat();
    let mut saved = Dump::parse(saved).expect("the same stream");
    assert_eq!((saved.coverage(), saved.phys().ranges()), (dump.coverage(), ranges.clone()));
    for range in ranges.iter().take(64) {
        let read = |dump: &dyn Machine| dump.phys().read_u64(range.start);
        assert_eq!(read(&saved), read(&dump));
    }
    assert_eq!(saved.vcpu_count(), dump.vcpu_count());
    for vcpu in (0..dump.vcpu_count()).map(Vcpu) {
        assert_eq!(saved.registers(vcpu).ok(), dump.registers(vcpu).ok());
    }
}

/// Magic, version 2, 10 bytes of XML: zeroes follow.
const LIBVIRT_HEADER: &[u8] = b"LibvirtQemudSave\x02\0\0\0\x0a\0\0\0";

/// Whether a file is a part of a split dump that holds no page: then two of it do not overlap.
fn is_empty_part(data: &[u8]) -> bool {
    Dump::parse(data).is_ok_and(|dump| dump.coverage().captured == 0)
}
