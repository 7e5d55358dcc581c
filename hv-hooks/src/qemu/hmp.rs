//! What QEMU's human monitor prints, understood: the memory map, host addresses, port reads, descriptor
//! tables. Text in, values out; sends nothing.

use guest::{GuestPhys, GuestVirt, HostVirt};

/// Most entries of a memory map that are looked at.
const MAX_ENTRIES: usize = 16 << 10;

/// What stands behind a range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// RAM, writable by the guest.
    Ram,
    /// RAM or ROM that the guest can't write at the moment.
    Rom,
    /// Registers of a device.
    Io,
    /// Something else (`ramd`, `romd`...).
    Other,
}

/// One range of a flat memory map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address: guest-physical, or a port number in the I/O space.
    pub start: GuestPhys,
    /// Last address, inclusive.
    pub last: GuestPhys,
    /// What is behind it.
    pub kind: MapKind,
    /// Name of the memory region; for RAM the id of its memory backend.
    pub name: String,
    /// Offset of `start` in that region, bytes.
    pub offset: u64,
}

/// The two address spaces of `info mtree -f` that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryMap {
    /// Guest-physical memory as devices and CPUs see it (outside of system management mode).
    pub memory: Vec<MapEntry>,
    /// I/O ports.
    pub ports: Vec<MapEntry>,
}

impl MemoryMap {
    /// The I/O ports of this name: first port and number of ports.
    #[must_use]
    pub fn ports_of(&self, name: &str) -> Option<(u16, u16)> {
        let entry = self.ports.iter().find(|entry| entry.name == name && entry.offset == 0)?;
        let len = entry.last.0.checked_sub(entry.start.0)?.checked_add(1)?;
        Some((u16::try_from(entry.start.0).ok()?, u16::try_from(len).ok()?))
    }
}

/// Understands `info mtree -f`: flat views, each with the address spaces that use it and its ranges.
#[must_use]
pub fn parse_memory_map(text: &str) -> MemoryMap {
    let mut map = MemoryMap::default();
    for view in text.split("FlatView #").skip(1) {
        // One view serves several address spaces: "memory" is the one of devices, shared by the CPUs.
        let target = if view.contains("AS \"memory\"") {
            &mut map.memory
        } else if view.contains("AS \"I/O\"") {
            &mut map.ports
        } else {
            continue;
        };
        target.extend(view.lines().filter_map(parse_map_entry).take(MAX_ENTRIES));
        target.sort_by_key(|entry| entry.start);
    }
    map
}

/// `  0000000000100000-000000000fffffff (prio 0, ram): m @0000000000100000`
fn parse_map_entry(line: &str) -> Option<MapEntry> {
    let (range, rest) = line.trim().split_once(" (prio ")?;
    let (start, last) = range.split_once('-')?;
    let (flags, name) = rest.split_once("): ")?;
    let (_, kind) = flags.split_once(", ")?;
    let kind = match kind.trim_start_matches("nv-") {
        "ram" => MapKind::Ram,
        "rom" => MapKind::Rom,
        "i/o" => MapKind::Io,
        _ => MapKind::Other,
    };
    // A KVM host appends the accelerator's name to what it maps.
    let name = name.trim_end().trim_end_matches(" KVM");
    let (name, offset) = match name.rsplit_once(" @") {
        Some((name, offset)) => (name, hex(offset)?),
        None => (name, 0),
    };
    let (start, last) = (hex(start)?, hex(last)?);
    let name = name.to_owned();
    (start <= last).then_some(MapEntry {
        start: GuestPhys(start),
        last: GuestPhys(last),
        kind,
        name,
        offset,
    })
}

/// Understands `gpa2hva`: `Host virtual address for 0x0 (m) is 0x7f71a3fff000`. `None` when the address is
/// not RAM.
#[must_use]
pub fn parse_host_address(text: &str) -> Option<HostVirt> {
    let (_, address) = text.trim().rsplit_once(" is 0x")?;
    hex(address).map(HostVirt)
}

/// Understands `i /b PORT`: `portb[0xafe2] = 0x0e`.
#[must_use]
pub fn parse_port(text: &str) -> Option<u64> {
    let (_, value) = text.trim().rsplit_once(" = 0x")?;
    hex(value)
}

/// A memory module as `info memory-devices` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDevice {
    /// Guest-physical start.
    pub at: GuestPhys,
    /// Slot of the ACPI hot-plug interface.
    pub slot: u64,
    /// Path of its memory backend: `/objects/ID`.
    pub backend: String,
}

/// Understands `info memory-devices`. Devices without a slot (virtio-mem, virtio-pmem) are left out.
#[must_use]
pub fn parse_memory_devices(text: &str) -> Vec<MemoryDevice> {
    let device = |lines: &str| {
        let field = |name: &str| {
            let value = lines.lines().find_map(|line| line.trim().strip_prefix(name));
            value.map(|value| value.trim())
        };
        Some(MemoryDevice {
            at: GuestPhys(hex(field("addr: 0x")?)?),
            slot: field("slot: ")?.parse().ok()?,
            backend: field("memdev: ")?.to_owned(),
        })
    };
    text.split("Memory device [").skip(1).take(MAX_ENTRIES).filter_map(device).collect()
}

/// A descriptor table register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Guest-virtual start.
    pub base: GuestVirt,
    /// Offset of its last byte.
    pub limit: u32,
}

/// The registers of a vCPU that gdb's register file lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTables {
    /// Interrupt descriptor table.
    pub idt: Table,
    /// Global descriptor table.
    pub gdt: Table,
    /// Task state segment.
    pub tss: Table,
    /// Selector of the task state segment.
    pub tr: u16,
    /// Privilege level, 0 to 3.
    pub cpl: u8,
    /// Whether the vCPU sleeps in `hlt`.
    pub halted: bool,
}

/// Understands `info registers` of one vCPU. `None` when a table is missing from it.
#[must_use]
pub fn parse_tables(text: &str) -> Option<CpuTables> {
    let line = |prefix: &str| text.lines().find_map(|line| line.trim_start().strip_prefix(prefix));
    let table = |words: &str| {
        let mut words = words.split_whitespace();
        let base = GuestVirt(hex(words.next()?)?);
        Some(Table { base, limit: u32::try_from(hex(words.next()?)?).ok()? })
    };
    let (tr, tss) = line("TR =")?.trim_start().split_once(' ')?;
    let flag = |name: &str| {
        let at = text.split_once(name)?.1;
        at.get(..1)?.parse::<u8>().ok()
    };
    Some(CpuTables {
        idt: table(line("IDT=")?)?,
        gdt: table(line("GDT=")?)?,
        tss: table(tss)?,
        tr: u16::try_from(hex(tr)?).ok()?,
        cpl: flag(" CPL=")?,
        halted: flag(" HLT=")? != 0,
    })
}

/// The value of a register that `info registers` prints as `NAME=hex`.
#[must_use]
pub fn parse_register(text: &str, name: &str) -> Option<u64> {
    let words = text.split_whitespace();
    words
        .filter_map(|word| word.split_once('='))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| hex(value))
}

fn hex(digits: &str) -> Option<u64> {
    // from_str_radix accepts a sign.
    if digits.starts_with('+') { None } else { u64::from_str_radix(digits, 16).ok() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// From QEMU 7.2.22, `-machine pc`, shortened.
    const MTREE: &str = "FlatView #0\r\n AS \"I/O\", root: io\r\n Root memory region: io\r\n  \
        0000000000000a00-0000000000000a17 (prio 0, i/o): acpi-mem-hotplug\r\n  \
        000000000000afe0-000000000000afe3 (prio 0, i/o): acpi-gpe0\r\n\r\nFlatView #1\r\n \
        AS \"memory\", root: system\r\n AS \"cpu-memory-0\", root: system\r\n Root memory region: system\r\n  \
        0000000000000000-000000000009ffff (prio 0, ram): m\r\n  \
        00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\r\n  \
        00000000000f0000-00000000000fffff (prio 0, rom): m @00000000000f0000\r\n  \
        0000000000100000-000000000fffffff (prio 0, ram): m @0000000000100000 KVM\r\n  \
        00000000febf0400-00000000febf041f (prio 0, i/o): vga ioports remapped\r\n\r\n";

    #[test]
    fn memory_map() {
        let map = parse_memory_map(MTREE);
        assert_eq!(map.ports_of("acpi-gpe0"), Some((0xafe0, 4)));
        assert_eq!(map.ports_of("nothing"), None);
        assert_eq!(map.memory.len(), 5);
        let high = &map.memory[3];
        assert_eq!((high.start.0, high.last.0, high.offset), (0x10_0000, 0x0fff_ffff, 0x10_0000));
        assert_eq!((high.kind, high.name.as_str()), (MapKind::Ram, "m"));
        assert_eq!(map.memory[4].name, "vga ioports remapped");
        assert_eq!(map.memory[2].kind, MapKind::Rom);
    }

    #[test]
    fn addresses_and_ports() {
        let text = "Host virtual address for 0x0 (m) is 0x7f71a3fff000\r\n";
        assert_eq!(parse_host_address(text), Some(HostVirt(0x7f71_a3ff_f000)));
        assert_eq!(parse_host_address("Memory at address 0xb0000 is not RAM\r\n"), None);
        assert_eq!(parse_port("portb[0xafe2] = 0x0e\r\n"), Some(14));
    }

    #[test]
    fn memory_modules() {
        let text = "Memory device [dimm]: \"d\"\r\n  addr: 0x100000000\r\n  slot: 2\r\n  node: 0\r\n  size: 2097152\r\n  \
            memdev: /objects/defib-memory-1\r\n  hotplugged: true\r\nMemory device [virtio-pmem]: \"v\"\r\n  \
            memaddr: 0x140000000\r\n  memdev: /objects/p\r\n";
        let found = parse_memory_devices(text);
        let backend = "/objects/defib-memory-1".to_owned();
        assert_eq!(found, [MemoryDevice { at: GuestPhys(1 << 32), slot: 2, backend }]);
    }

    #[test]
    fn descriptor_tables_in_both_widths() {
        let long = "\r\nCPU#0\r\nRIP=ffffffff93b063d6 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n\
            TR =0040 fffffe0000003000 00004087 00008900 DPL=0 TSS64-avl\r\n\
            GDT=     fffffe0000001000 0000007f\r\nIDT=     fffffe0000000000 00000fff\r\n";
        let tables = parse_tables(long).unwrap();
        assert_eq!(tables.idt.base, GuestVirt(0xffff_fe00_0000_0000));
        assert_eq!((tables.gdt.limit, tables.tr, tables.halted, tables.cpl), (0x7f, 0x40, true, 0));
        assert_eq!(tables.tss.base, GuestVirt(0xffff_fe00_0000_3000));
        let real = "EIP=000fd0af EFL=00000006 CPL=0 II=0 A20=1 SMM=0 HLT=0\nTR =0000 00000000 0000ffff 8b00\n\
            GDT=     000f6180 00000037\nIDT=     00000000 000003ff\n";
        assert_eq!(parse_tables(real).unwrap().idt.limit, 0x3ff);
        assert_eq!(parse_tables("unknown command"), None);
        assert_eq!(
            parse_register("CR2=000 CR3=0000000001f2a000 CR4=6b0\n", "CR3"),
            Some(0x1f2_a000)
        );
        assert_eq!(parse_register(real, "CR3"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_understood_or_not(text in ".{0,400}", cut in 0usize..1200) {
            let _ = (parse_memory_devices(&text), parse_register(&text, "CR3"));
            let _ = (parse_memory_map(&text), parse_tables(&text), parse_port(&text), parse_host_address(&text));
            let mut end = cut.min(MTREE.len());
            while !MTREE.is_char_boundary(end) { end -= 1; }
            let _ = parse_memory_map(&format!("{}{text}", &MTREE[..end]));
        }
    }
}
