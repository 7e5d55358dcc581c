//! Small dumps that real programs wrote, read back. How each was made is in `dumps/README.md`.

use std::path::Path;

use defib_diagnose::dump::{Dump, FormatKind};
use guest::{GuestPhys, Machine, MemoryError, Reg, Vcpu};

fn dump(name: &str) -> Dump<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dumps").join(name);
    let packed = std::fs::read(&path).unwrap();
    Dump::parse(zstd::decode_all(&packed[..]).unwrap()).unwrap()
}

#[test]
fn qemu_kdump() {
    let mut dump = dump("qemu-7.2.kdump-zlib.zst");
    let format = dump.format();
    assert!(format.flattened && format.by_qemu, "{format}");
    assert_eq!(format.kind, FormatKind::Kdump { version: 6, dump_level: Some(1) });
    assert_eq!(dump.vcpu_count(), 2);
    let registers = dump.registers(Vcpu(1)).unwrap();
    // The reset vector (Intel SDM 3A 10.1.4).
    assert_eq!(
        (registers.get(Reg::Rip), registers.get(Reg::Cr0)),
        (Some(0xfff0), Some(0x6000_0010))
    );
    let phys = dump.phys();
    assert_eq!(
        phys.ranges(),
        [0..1 << 20, 0xffff_0000..1 << 32].map(|it| GuestPhys(it.start)..GuestPhys(it.end))
    );
    for offset in (0..0x1_0000).step_by(512) {
        let mut text = [0; 16];
        phys.read(GuestPhys(0xffff_0000 + offset), &mut text).unwrap();
        assert_eq!(text, *format!("page {offset:08x}   ").as_bytes());
    }
    assert_eq!(phys.read_u64(GuestPhys(0x8000)), Ok(0), "a zero page is there");
    let above = GuestPhys(1 << 20);
    assert_eq!(phys.read_u64(above), Err(MemoryError::NotRam { at: above, len: 8 }));
}

#[test]
fn qemu_elf() {
    let mut dump = dump("qemu-7.2.elf.zst");
    assert_eq!(dump.format().kind, FormatKind::Elf);
    assert!(dump.format().by_qemu);
    assert_eq!(dump.phys().ranges(), [GuestPhys(0x1000)..GuestPhys(0x2000)]);
    let info = dump.vmcoreinfo().expect("VMCOREINFO");
    assert_eq!(info.release(), Some("6.1.0-56-cloud-amd64"));
    assert_eq!(info.build_id(), Some("3b43fad5034874490492495d552c0af6a5fab235"));
    let root = dump.kernel_space().expect("a page table").root();
    assert_eq!(dump.vcpu_count(), 2);
    // One CPU was idle, and ran on the kernel's own table.
    let mut roots = (0..2).map(|vcpu| dump.registers(Vcpu(vcpu)).unwrap().get(Reg::Cr3));
    assert!(roots.any(|cr3| cr3 == Some(root.0)));
}
