//! Streams as a whole, through `Dump`: what is sent last counts, what is damaged or missing is said.

use guest::{GuestPhys, GuestVirt, Machine, MemoryError, Reg, Vcpu};

use super::testing::{Sent, StreamFile, saved};
use crate::dump::{Coverage, Dump, Error, Remark, SplitBy, Unsupported};

const MIB: u64 = 1 << 20;

fn page(byte: u8) -> [u8; 4096] {
    [byte; 4096]
}

/// Two vCPUs and 32 MiB, of which five pages were sent, two of them twice.
fn stream() -> StreamFile {
    let mut file = StreamFile::new("pc-i440fx-7.2", &[]);
    file.blocks(&[("vga.vram", 2 * MIB), ("pc.ram", 32 * MIB)], false);
    let (one, two, three) = (page(1), page(2), page(3));
    file.pages(&[
        ("pc.ram", 0, Sent::Page(&one)),
        ("pc.ram", 0x1000, Sent::Page(&two)),
        ("pc.ram", 0x2000, Sent::Fill(0)),
        ("vga.vram", 0, Sent::Page(&page(0x77))),
        ("pc.ram", 31 * MIB, Sent::Page(&three)),
        ("pc.ram", 0x5000, Sent::Fill(0)),
    ]);
    file.pages(&[("pc.ram", 0, Sent::Fill(0)), ("pc.ram", 0x2000, Sent::Page(&page(4)))]);
    file.cpu(1, 0xffff_ffff_8100_0001, 0x1000, 0x10);
    file.cpu(0, 0xffff_ffff_8100_0000, 0x2000, 0x33);
    file.clock(256, 0);
    file
}

fn byte(dump: &Dump<Vec<u8>>, at: u64) -> Result<u8, MemoryError> {
    let mut byte = [0];
    dump.phys().read(GuestPhys(at), &mut byte).map(|()| byte[0])
}

#[track_caller]
fn error(file: Vec<u8>) -> Error {
    Dump::parse(file).err().expect("no dump")
}

#[test]
fn the_last_copy_of_a_page_counts() {
    let dump = Dump::parse(stream().finish(true)).unwrap();
    assert_eq!(dump.format().to_string(), "migration stream, by QEMU");
    let read = [0, 0x1000, 0x2000, 0x2fff, 31 * MIB + 5].map(|at| byte(&dump, at));
    assert_eq!(read, [Ok(0), Ok(2), Ok(4), Ok(4), Ok(3)]);
    let missing = GuestPhys(0x3000);
    assert_eq!(byte(&dump, missing.0), Err(MemoryError::NotCaptured { at: missing }));
    let none = GuestPhys(32 * MIB);
    assert_eq!(byte(&dump, none.0), Err(MemoryError::NotRam { at: none, len: 1 }));
    let mut both = [0; 4];
    dump.phys().read(GuestPhys(0x1ffe), &mut both).unwrap();
    assert_eq!(both, [2, 2, 4, 4]);
    let range = |start: u64, end: u64| GuestPhys(start)..GuestPhys(end);
    let last = range(31 * MIB, 31 * MIB + 0x1000);
    assert_eq!(dump.phys().ranges(), [range(0, 0x3000), range(0x5000, 0x6000), last]);
    assert_eq!(dump.coverage(), Coverage { ram: 32 * MIB, captured: 5 * 0x1000 });
    assert_eq!(dump.remarks(), [Remark::NoVmcoreinfo], "the CMOS agrees");
}

#[test]
fn registers_are_found_by_their_names() {
    let mut dump = Dump::parse(stream().finish(true)).unwrap();
    assert_eq!(dump.vcpu_count(), 2);
    let registers = dump.registers(Vcpu(1)).unwrap();
    assert_eq!(registers.rip(), Some(GuestVirt(0xffff_ffff_8100_0001)));
    let get = |reg| registers.get(reg);
    assert_eq!((get(Reg::Cr3), get(Reg::Cs), get(Reg::Ss)), (Some(0x1000), Some(0x10), Some(0x11)));
    assert_eq!((get(Reg::FsBase), get(Reg::GsBase)), (Some(0x5004), Some(0x5005)));
    assert_eq!(
        (get(Reg::Rax), get(Reg::Rsp), get(Reg::R15)),
        (Some(0x600), Some(0x604), Some(0x60f))
    );
    assert_eq!(get(Reg::Efer), None, "not in the section");
    assert_eq!(dump.registers(Vcpu(0)).unwrap().get(Reg::Cs), Some(0x33));
    assert_eq!(dump.cpus()[0].pid, None);
}

#[test]
fn the_hole_is_where_cmos_says() {
    let mut file = StreamFile::new("pc-q35-7.2", &[]);
    file.blocks(&[("pc.ram", 4096 * MIB)], false);
    file.pages(&[("pc.ram", 2048 * MIB, Sent::Fill(7)), ("pc.ram", 3072 * MIB, Sent::Fill(8))]);
    let mut told = file.clone();
    told.clock(((3072 - 16) * 16) as u16, 1024 * 16);
    let dump = Dump::parse(told.finish(true)).unwrap();
    assert_eq!((byte(&dump, 2 << 30), byte(&dump, 4 << 30)), (Ok(7), Ok(8)));
    let (below_4g, above_4g) = (3 << 30, 1 << 30);
    assert!(dump.remarks().contains(&Remark::Split { below_4g, above_4g, by: SplitBy::Cmos }));
    let dump = Dump::parse(file.finish(true)).unwrap();
    assert_eq!((byte(&dump, 4 << 30), byte(&dump, 5 << 30)), (Ok(7), Ok(8)));
    let by = SplitBy::Machine("pc-q35-7.2".to_owned());
    let (below_4g, above_4g) = (2 << 30, 2 << 30);
    assert!(dump.remarks().contains(&Remark::Split { below_4g, above_4g, by }));
}

#[test]
fn libvirts_header_is_passed_over_and_its_packed_formats_are_named() {
    let stream = stream().finish(true);
    let dump = Dump::parse(saved(b"LibvirtQemudSave", 0, &stream)).unwrap();
    assert_eq!(dump.format().to_string(), "libvirt save file, by QEMU");
    assert_eq!((byte(&dump, 0x1000), dump.vcpu_count()), (Ok(2), 2));
    let dump = Dump::parse(saved(b"LibvirtQemudPart", 0, &stream)).unwrap();
    assert!(dump.remarks().contains(&Remark::Unfinished));
    let refused = error(saved(b"LibvirtQemudSave", 5, &stream));
    assert!(matches!(refused, Error::Unsupported(Unsupported::LibvirtSave("zstd"))));
    assert!(refused.to_string().contains("--memory-only"), "{refused}");
    assert!(matches!(error(saved(b"LibvirtQemudSave", 99, &stream)), Error::BadHeader { .. }));
    let nothing = saved(b"LibvirtQemudSave", 0, b"no stream");
    assert!(matches!(error(nothing), Error::Truncated { what: "migration stream", .. }));
    assert!(matches!(error(b"LibvirtQemudSave".to_vec()), Error::Truncated { .. }));
}

#[test]
fn without_a_description_ram_alone_is_read() {
    let dump = Dump::parse(stream().finish(false)).unwrap();
    assert_eq!((byte(&dump, 0x1000), dump.vcpu_count()), (Ok(2), 0));
    for remark in [Remark::NoDescription, Remark::NoRegisters] {
        assert!(dump.remarks().contains(&remark), "{remark}");
    }
    let by = SplitBy::Size;
    let split = Remark::Split { below_4g: 32 * MIB, above_4g: 0, by };
    assert!(dump.remarks().contains(&split));
}

#[test]
fn what_is_behind_a_section_of_unknown_length_is_not_read() {
    let mut file = stream();
    file.device("undescribed", 0, None, &[1, 2, 3]);
    file.cpu(2, 1, 2, 3);
    let dump = Dump::parse(file.finish(true)).unwrap();
    assert_eq!(dump.vcpu_count(), 2);
    let name = "undescribed".to_owned();
    assert!(dump.remarks().contains(&Remark::UnknownSection { name }));
    // A section that is not as long as its description says.
    let mut file = stream();
    file.device("short", 0, Some(r#"{"name": "x", "size": 4}"#), &[1, 2, 3]);
    let dump = Dump::parse(file.finish(true)).unwrap();
    assert_eq!(dump.vcpu_count(), 2);
    assert!(dump.remarks().iter().any(|remark| matches!(remark, Remark::Broken { .. })));
}

#[test]
fn pages_that_are_differences_are_missing_and_counted() {
    let mut file = stream();
    file.pages(&[
        ("pc.ram", 0x1000, Sent::Difference(&[1, 2, 3])),
        ("pc.ram", 0x6000, Sent::Zlib(&[4; 40])),
        ("pc.ram", 0x7000, Sent::Fill(9)),
    ]);
    let dump = Dump::parse(file.finish(true)).unwrap();
    for at in [0x1000, 0x6000] {
        assert_eq!(byte(&dump, at), Err(MemoryError::NotCaptured { at: GuestPhys(at) }));
    }
    assert_eq!(byte(&dump, 0x7000), Ok(9));
    assert!(dump.remarks().contains(&Remark::Packed { times: 2 }));
}

#[test]
fn ram_that_was_left_out_is_said_and_what_was_not_shared_is_read() {
    let mut file = StreamFile::new("pc-i440fx-7.2", &["x-ignore-shared"]);
    file.blocks(&[("ram", 32 * MIB), ("vga.vram", MIB)], true);
    let mut without = file.clone();
    without.pages(&[("vga.vram", 0, Sent::Fill(0))]);
    without.clock(256, 0);
    assert!(matches!(error(without.finish(true)), Error::RamLeftOut));
    file.pages(&[("ram", 0x4000, Sent::Fill(6))]);
    let dump = Dump::parse(file.finish(true)).unwrap();
    assert_eq!(byte(&dump, 0x4000), Ok(6));
    let mapped = StreamFile::new("pc-q35-9.0", &["mapped-ram"]).finish(true);
    let refused = error(mapped);
    assert!(matches!(refused, Error::Unsupported(Unsupported::QemuMigration("mapped-ram"))));
}

#[test]
fn other_versions_and_architectures_are_refused() {
    assert!(matches!(error(b"QEVM\0\0\0\x02....".to_vec()), Error::BadHeader { found: 2, .. }));
    assert!(matches!(error(b"QEVM\0\0\0\x03".to_vec()), Error::NoMemory));
    assert!(matches!(error(b"QEVM".to_vec()), Error::Truncated { .. }));
    let mut file = StreamFile::new("virt-7.2", &[]);
    file.blocks(&[("mach-virt.ram", 32 * MIB)], false);
    file.pages(&[("mach-virt.ram", 0, Sent::Fill(0))]);
    file.device("cpu", 0, Some(r#"{"name": "env.pc", "size": 8}"#), &[0; 8]);
    assert!(error(file.finish(true)).to_string().contains("virt-7.2"));
}

#[test]
fn a_lying_list_costs_nothing() {
    // 8 EiB of RAM, of which one page is there; two pages behind each other's end; pages outside of their block.
    for (size, at) in [(1 << 63, 0), (1 << 43, (1 << 43) - 0x1000), (0x2000, 0x2000)] {
        let mut file = StreamFile::new("pc-i440fx-7.2", &[]);
        file.blocks(&[("pc.ram", size)], false);
        file.pages(&[("pc.ram", at, Sent::Fill(1))]);
        if let Ok(dump) = Dump::parse(file.finish(true)) {
            assert!(dump.phys().ranges().len() <= 1);
            assert!(dump.coverage().captured <= 0x1000);
        }
    }
    let mut twice = StreamFile::new("pc-i440fx-7.2", &[]);
    twice.blocks(&[("pc.ram", 0x2000), ("pc.ram", 0x2000)], false);
    assert!(matches!(error(twice.finish(true)), Error::NoMemory));
}

#[test]
fn a_stream_may_end_anywhere() {
    let file = stream().finish(true);
    let whole = Dump::parse(file.clone()).unwrap().coverage().captured;
    let mut captured = 0;
    for len in 0..file.len() {
        let Ok(dump) = Dump::parse(file[..len].to_vec()) else { continue };
        let now = dump.coverage().captured;
        assert!((captured..=whole).contains(&now), "{now} of {whole} in {len} bytes");
        captured = now;
        let cut = dump.remarks().iter().any(|it| matches!(it, Remark::Cut { .. }));
        assert!(cut || dump.vcpu_count() == 2 || dump.remarks().contains(&Remark::NoDescription));
    }
    assert_eq!(captured, whole);
}
