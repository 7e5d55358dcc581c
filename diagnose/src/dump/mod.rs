//! Dumps as machines without abilities: `open()` finds out the format, and a `Dump` answers for memory and
//! registers. Nothing here knows what is in the memory; diagnosis sees a dump as it sees a live VM.
//!
//! Files are mapped and read where they are asked for. Every table in them is hostile input: lengths are
//! checked against the file, and what does not fit is missing.
//!
//! Which CPU crashed is in none of the formats (`current_cpu` of kdump's header is never set): the kernel's
//! `crashing_cpu` and `panic_cpu` tell, in memory.

mod bitmap;
mod by_page;
mod codec;
mod elf;
mod error;
mod flat;
mod kdump;
mod lzo;
mod notes;
mod pages;
mod raw;
mod remark;
mod segments;
mod storage;
mod stream;
#[cfg(test)]
mod testing;

use std::fmt;
use std::path::Path;

use guest::{
    AddressSpace, GuestPhys, GuestVirt, Machine, MachineError, PhysMemory, Registers, Vcpu,
};
use repair_image::{MappedFile, Vmcoreinfo};

pub use error::{Error, Unsupported};
pub use notes::CpuNote;
pub use raw::RawLayout;
pub use remark::{Remark, SplitBy};
pub use storage::Bytes;

use notes::Notes;
use pages::Pages;
use segments::Segments;
use storage::Storage;

/// `__START_KERNEL_map`: the kernel's image is mapped from here on x86-64, whatever the slide
/// (Documentation/x86/x86_64/mm.rst).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// What the caller knows that the files don't say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// Take the file for a raw image of RAM with this layout, whatever it looks like.
    pub raw: Option<RawLayout>,
}

/// The format of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatKind {
    /// ELF core of a whole machine.
    Elf,
    /// kdump-compressed, by makedumpfile or QEMU.
    Kdump {
        /// `header_version`, 1 to 6 so far.
        version: u32,
        /// makedumpfile's `-d`: bits for zero, cache, private cache, user and free pages that were
        /// excluded. QEMU says 1. `None` in version 0.
        dump_level: Option<u32>,
    },
    /// Raw image of RAM.
    Raw(RawLayout),
    /// QEMU's migration stream.
    Migration {
        /// Whether libvirt's header stands before it.
        libvirt: bool,
    },
}

/// The format of a dump and how it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Which format.
    pub kind: FormatKind,
    /// Whether it is in makedumpfile's flattened form.
    pub flattened: bool,
    /// Number of files.
    pub parts: usize,
    /// Whether QEMU wrote it (its own notes are in it, or it is a migration stream).
    pub by_qemu: bool,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FormatKind::Elf => f.write_str("ELF vmcore")?,
            FormatKind::Kdump { version, dump_level } => {
                write!(f, "kdump-compressed, version {version}")?;
                if let Some(level) = dump_level {
                    write!(f, ", dump level {level}")?;
                }
            }
            FormatKind::Raw(_) => f.write_str("raw image of RAM")?,
            FormatKind::Migration { libvirt: false } => f.write_str("migration stream")?,
            FormatKind::Migration { libvirt: true } => f.write_str("libvirt save file")?,
        }
        if self.by_qemu {
            f.write_str(", by QEMU")?;
        }
        if self.flattened {
            f.write_str(", flattened")?;
        }
        if self.parts > 1 {
            write!(f, ", in {} parts", self.parts)?;
        }
        Ok(())
    }
}

/// Bytes of RAM in a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// RAM of the machine, as far as the dump says.
    pub ram: u64,
    /// Of that, what is in the dump.
    pub captured: u64,
}

/// A dump. `B` is a file's bytes, most often a mapping of it.
///
/// What is RAM but not in the dump gives [`MemoryError::NotCaptured`]; so does what is damaged.
/// [`PhysMemory::ranges`] of a kdump-compressed dump lists all RAM; that of an ELF dump or a migration stream
/// what is in the file, since sizes beyond that are mere claims there.
pub struct Dump<B = MappedFile> {
    memory: Memory<B>,
    cpus: Vec<CpuNote>,
    vmcoreinfo: Option<Vmcoreinfo>,
    remarks: Vec<Remark>,
    format: Format,
}

/// Name of [`Dump`] in callers of before there were formats other than ELF.
pub use Dump as Vmcore;

/// Opens a dump: one file, or all parts of a split one in any order.
///
/// # Errors
/// When a file can't be mapped, is of no known format, or holds no memory.
pub fn open<P: AsRef<Path>>(paths: &[P], hints: &Hints) -> Result<Dump, Error> {
    let map = |path: &P| {
        let path = path.as_ref();
        MappedFile::open(path).map_err(|source| Error::Map { path: path.to_owned(), source })
    };
    Dump::parse_parts(paths.iter().map(map).collect::<Result<_, _>>()?, hints)
}

impl<B: Bytes> Dump<B> {
    /// A dump of one file.
    ///
    /// # Errors
    /// As [`open`].
    pub fn parse(bytes: B) -> Result<Self, Error> {
        Self::parse_parts(vec![bytes], &Hints::default())
    }

    /// A dump of one file, or of all parts of a split one.
    ///
    /// # Errors
    /// As [`open`].
    pub fn parse_parts(files: Vec<B>, hints: &Hints) -> Result<Self, Error> {
        let mut storages = Vec::new();
        for bytes in files {
            storages.push(Storage::new(bytes)?);
        }
        if storages.len() > 1 {
            return Self::kdump(storages);
        }
        let Some(storage) = storages.pop() else { return Err(Error::NoFile) };
        if let Some(layout) = hints.raw {
            return Self::raw(storage, layout);
        }
        let mut start = [0; 8];
        storage.read_sparse(0, &mut start);
        if start.starts_with(elf::MAGIC) {
            return Self::elf(storage);
        }
        if &start == kdump::SIGNATURE {
            return Self::kdump(vec![storage]);
        }
        let mut remarks = Vec::new();
        if let Some(start) = stream::find(&storage, &mut remarks)? {
            return Self::stream(storage, start, remarks);
        }
        if let Some(format) = unsupported(&storage) {
            return Err(Error::Unsupported(format));
        }
        Self::raw_by_content(storage, start)
    }

    fn elf(storage: Storage<B>) -> Result<Self, Error> {
        let mut remarks = Vec::new();
        if storage.is_cut() {
            remarks.push(Remark::Cut { what: "pages" });
        }
        let headers = elf::headers(&storage, &mut remarks)?;
        let mut notes = Notes::default();
        for (offset, size) in headers.notes {
            let there = size.min(storage.len().saturating_sub(offset));
            notes.cut |= there < size;
            if let Some(bytes) = storage.bytes(offset, there) {
                notes.add(&bytes);
            }
        }
        let end = |segment: &segments::Segment| segment.offset.saturating_add(segment.captured);
        let stored = |segment: &&segments::Segment| segment.captured > 0;
        if headers.segments.iter().filter(stored).any(|segment| end(segment) > storage.len()) {
            remarks.push(Remark::Cut { what: "pages" });
        }
        let flattened = storage.is_flattened();
        let memory = Segments::new(storage, headers.segments);
        if memory.is_empty() {
            return Err(Error::NoMemory);
        }
        if memory.left_out() > 0 {
            remarks.push(Remark::LeftOut);
        }
        let kind = FormatKind::Elf;
        let format = Format { kind, flattened, parts: 1, by_qemu: notes.qemu };
        Ok(Self::new(Memory::Segments(memory), notes, remarks, format))
    }

    fn kdump(storages: Vec<Storage<B>>) -> Result<Self, Error> {
        for (index, storage) in storages.iter().enumerate() {
            if storage.array(0).as_ref() != Some(kdump::SIGNATURE) {
                return Err(Error::NotOneDump { index, why: "it is not kdump-compressed" });
            }
        }
        let mut remarks = Vec::new();
        let kdump = kdump::open(storages, &mut remarks)?;
        let format = Format {
            kind: FormatKind::Kdump { version: kdump.version, dump_level: kdump.dump_level },
            flattened: kdump.pages.is_flattened(),
            parts: kdump.pages.parts(),
            by_qemu: kdump.notes.qemu,
        };
        Ok(Self::new(Memory::Pages(kdump.pages), kdump.notes, remarks, format))
    }

    fn raw(storage: Storage<B>, layout: RawLayout) -> Result<Self, Error> {
        let segments = layout.segments(storage.len());
        let flattened = storage.is_flattened();
        let memory = Segments::new(storage, segments);
        if memory.is_empty() {
            return Err(Error::NoMemory);
        }
        let kind = FormatKind::Raw(layout);
        let format = Format { kind, flattened, parts: 1, by_qemu: false };
        Ok(Self::new(Memory::Segments(memory), Notes::default(), Vec::new(), format))
    }

    fn stream(
        storage: Storage<B>,
        start: stream::Start,
        mut remarks: Vec<Remark>,
    ) -> Result<Self, Error> {
        let stream = stream::open(storage, start, &mut remarks)?;
        let kind = FormatKind::Migration { libvirt: start.libvirt };
        let flattened = stream.memory.is_flattened();
        let format = Format { kind, flattened, parts: 1, by_qemu: true };
        let notes = Notes { cpus: stream.cpus, ..Notes::default() };
        Ok(Self::new(Memory::Stream(stream.memory), notes, remarks, format))
    }

    /// A file without a known start is an image of RAM when a kernel's VMCOREINFO is in it. It is searched
    /// only if its size leaves no doubt about the layout.
    fn raw_by_content(storage: Storage<B>, start: [u8; 8]) -> Result<Self, Error> {
        let size = storage.len();
        let layout = RawLayout::of_size(size).filter(|_| size.is_multiple_of(codec::PAGE as u64));
        let layout = layout.ok_or(Error::UnknownFormat { start })?;
        let raw = Self::raw(storage, layout)?;
        if Vmcoreinfo::find_all(raw.phys()).is_empty() {
            return Err(Error::UnknownFormat { start });
        }
        Ok(raw)
    }

    fn new(memory: Memory<B>, notes: Notes, mut remarks: Vec<Remark>, format: Format) -> Self {
        if notes.cut {
            remarks.push(Remark::Cut { what: "notes" });
        }
        if notes.vmcoreinfo.is_none() {
            remarks.push(Remark::NoVmcoreinfo);
        }
        if notes.cpus.is_empty() {
            remarks.push(Remark::NoRegisters);
        }
        if notes.live {
            remarks.push(Remark::TwoMoments);
        }
        Self { memory, cpus: notes.cpus, vmcoreinfo: notes.vmcoreinfo, remarks, format }
    }

    /// Its format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// VMCOREINFO from its notes. When there is none, it may still be found in memory
    /// ([`Vmcoreinfo::find_all`]).
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&Vmcoreinfo> {
        self.vmcoreinfo.as_ref()
    }

    /// CPUs in the order of their notes. That of kdump kernels leaves out CPUs that were offline.
    #[must_use]
    pub fn cpus(&self) -> &[CpuNote] {
        &self.cpus
    }

    /// What is odd about it.
    #[must_use]
    pub fn remarks(&self) -> &[Remark] {
        &self.remarks
    }

    /// How much of RAM is in it.
    #[must_use]
    pub fn coverage(&self) -> Coverage {
        match &self.memory {
            Memory::Segments(segments) => {
                let captured = segments.captured();
                Coverage { ram: captured.saturating_add(segments.left_out()), captured }
            }
            Memory::Pages(pages) => {
                let ram = pages.ram();
                Coverage { ram, captured: pages.captured() }
            }
            Memory::Stream(stream) => Coverage { ram: stream.ram(), captured: stream.captured() },
        }
    }

    /// The kernel's own address space, of 4 or 5 levels, as VMCOREINFO gives it. `phys_base` is taken from
    /// there and not from a header: QEMU 7.2 writes it wrong there, its decimal digits read as hex
    /// (`vmcoreinfo_update_phys_base()` in its dump/dump.c).
    #[must_use]
    pub fn kernel_space(&self) -> Option<AddressSpace<'_>> {
        let info = self.vmcoreinfo.as_ref()?;
        let GuestVirt(table) = info.top_page_table()?;
        let phys_base = info.number("phys_base")?.cast_unsigned();
        let root = GuestPhys(table.checked_sub(KERNEL_MAP)?.wrapping_add(phys_base));
        Some(AddressSpace::new(self.memory.phys(), root, info.five_level()))
    }
}

impl<B: AsRef<[u8]>> Machine for Dump<B> {
    fn phys(&self) -> &dyn PhysMemory {
        self.memory.phys()
    }

    fn vcpu_count(&self) -> usize {
        self.cpus.len()
    }

    fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, MachineError> {
        let cpu = self.cpus.get(vcpu.0).ok_or(MachineError::NoSuchVcpu(vcpu))?;
        Ok(cpu.registers)
    }
}

/// Memory of a dump.
enum Memory<B> {
    Segments(Segments<B>),
    Pages(Pages<B>),
    Stream(stream::Memory<B>),
}

impl<B: AsRef<[u8]>> Memory<B> {
    fn phys(&self) -> &dyn PhysMemory {
        match self {
            Self::Segments(segments) => segments,
            Self::Pages(pages) => pages,
            Self::Stream(stream) => stream,
        }
    }
}

/// Formats that are told from garbage, so that the error can say what to do.
fn unsupported<B: AsRef<[u8]>>(storage: &Storage<B>) -> Option<Unsupported> {
    let starts: [(&[u8], Unsupported); 10] = [
        (b"QFI\xfb", Unsupported::Qcow2),
        (b"DISKDUMP", Unsupported::Diskdump),
        (b"diskdump", Unsupported::Diskdump),
        (b"PAGEDU64", Unsupported::WindowsDump),
        (b"PAGEDUMP", Unsupported::WindowsDump),
        (b"\x1f\x8b", Unsupported::Compressed("gzip")),
        (b"\xfd7zXZ\0", Unsupported::Compressed("xz")),
        (b"\x28\xb5\x2f\xfd", Unsupported::Compressed("zstd")),
        (b"BZh", Unsupported::Compressed("bzip2")),
        (b"\x04\x22\x4d\x18", Unsupported::Compressed("lz4")),
    ];
    let mut start = [0; 16];
    storage.read_sparse(0, &mut start);
    starts.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, format)| format)
}

#[cfg(test)]
mod tests {
    use guest::{MemoryError, Reg};
    use proptest::prelude::*;

    use super::stream::testing::{Sent, StreamFile, saved};
    use super::testing::{KdumpFile, Packing, core, note};
    use super::*;

    const INFO: &[u8] = b"OSRELEASE=6.1.0\nSYMBOL(init_top_pgt)=ffffffff82610000\n\
        NUMBER(phys_base)=-8388608\nNUMBER(pgtable_l5_enabled)=1\n";

    #[test]
    fn the_kernels_space_follows_from_signed_phys_base() {
        let file = core(&note("VMCOREINFO", 0, INFO), &[(0, 8, &[1; 8])], false);
        let dump = Dump::parse(file).unwrap();
        let space = dump.kernel_space().unwrap();
        assert_eq!(space.root(), GuestPhys(0x0261_0000 - 0x80_0000));
        assert!(space.five_level());
        assert_eq!(dump.format().to_string(), "ELF vmcore");
    }

    #[test]
    fn a_live_core_is_told_by_its_note() {
        use crate::live_core::{NOTE_NAME, NOTE_TYPE};
        let remarks = |kind| {
            let file = core(&note(NOTE_NAME, kind, b"{}"), &[(0, 8, &[1; 8])], false);
            Dump::parse(file).unwrap().remarks().to_vec()
        };
        assert!(remarks(NOTE_TYPE).contains(&Remark::TwoMoments));
        assert!(!remarks(0).contains(&Remark::TwoMoments));
    }

    #[test]
    fn more_segments_than_sixteen_bits_count() {
        let data: Vec<[u8; 2]> = (0..70_000u32).map(|it| [it as u8, (it >> 8) as u8]).collect();
        let segments: Vec<_> =
            data.iter().enumerate().map(|(at, it)| (at as u64 * 16, 2, &it[..])).collect();
        let dump = Dump::parse(core(&[], &segments, true)).unwrap();
        assert_eq!(dump.phys().ranges().len(), 70_000);
        let mut bytes = [0; 2];
        dump.phys().read(GuestPhys(69_999 * 16), &mut bytes).unwrap();
        assert_eq!(u16::from_le_bytes(bytes), 69_999u32 as u16);
    }

    #[test]
    fn what_an_elf_dump_left_out_is_not_captured() {
        let dump = Dump::parse(core(&[], &[(0x1000, 0x2000, &[5; 0x1000])], false)).unwrap();
        let missing = MemoryError::NotCaptured { at: GuestPhys(0x2000) };
        assert_eq!(dump.phys().read_u64(GuestPhys(0x2000)), Err(missing));
        assert_eq!(dump.coverage(), Coverage { ram: 0x2000, captured: 0x1000 });
        assert!(dump.remarks().contains(&Remark::LeftOut));
    }

    #[test]
    fn registers_come_from_both_kinds_of_notes() {
        let mut status = vec![0; 336];
        status[32] = 77;
        status[112 + 16 * 8..][..8].copy_from_slice(&0xffff_ffff_8123_4567_u64.to_le_bytes());
        status[112 + 22 * 8..][..8].copy_from_slice(&0x7f00_u64.to_le_bytes());
        let mut file = core(&note("CORE", 1, &status), &[(0, 4, &[1; 4])], false);
        let mut dump = Dump::parse(&file).unwrap();
        let registers = dump.registers(Vcpu(0)).unwrap();
        assert_eq!(registers.rip(), Some(GuestVirt(0xffff_ffff_8123_4567)));
        assert_eq!(
            (registers.get(Reg::GsBase), registers.get(Reg::KernelGsBase)),
            (None, Some(0x7f00))
        );
        assert_eq!(dump.cpus()[0].pid, Some(77));
        assert!(!dump.format().by_qemu);

        let mut state = vec![0; 440];
        for (at, value) in [(136, 0x1234_u64), (264, 0xcafe), (416, 0xc000)] {
            state[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let notes = [note("CORE", 1, &status), note("QEMU", 0, &state)].concat();
        file = core(&notes, &[(0, 4, &[1; 4])], false);
        dump = Dump::parse(&file).unwrap();
        let registers = dump.registers(Vcpu(0)).unwrap();
        assert_eq!(registers.rip(), Some(GuestVirt(0x1234)));
        assert_eq!(registers.get(Reg::GsBase), Some(0xcafe));
        assert_eq!(registers.get(Reg::Cr3), Some(0xc000));
        assert_eq!(dump.cpus()[0].pid, None, "QEMU has a CPU number there");
        assert!(dump.registers(Vcpu(1)).is_err());
    }

    #[test]
    fn formats_that_are_not_read_are_named() {
        let error = |start: &[u8]| Dump::parse(start.to_vec()).err().unwrap().to_string();
        assert!(error(b"QFI\xfb\0\0\0\x03").contains("dump-guest-memory"));
        assert!(error(b"hello").contains("no known dump format"));
        assert!(matches!(
            Dump::<Vec<u8>>::parse_parts(vec![], &Hints::default()),
            Err(Error::NoFile)
        ));
        let mut arm = core(&[], &[(0, 1, &[1])], false);
        arm[18] = 183;
        assert!(error(&arm).contains("another architecture"));
    }

    #[test]
    fn a_raw_image_is_known_by_what_is_in_it() {
        let mut image = vec![0; 0x4000];
        let layout = RawLayout::Ram { below_4g: 0x3000 };
        assert!(Dump::parse(image.clone()).is_err());
        image[0x2000..0x2000 + INFO.len()].copy_from_slice(INFO);
        let dump = Dump::parse(&image).unwrap();
        assert_eq!(dump.format().kind, FormatKind::Raw(RawLayout::Physical));
        image[0x3000] = 9;
        let dump = Dump::parse_parts(vec![&image], &Hints { raw: Some(layout) }).unwrap();
        assert_eq!(dump.phys().read_u64(GuestPhys(4 << 30)), Ok(9));
        assert!(dump.phys().read_u64(GuestPhys(0x3000)).is_err());
    }

    fn some_stream(libvirt: bool) -> Vec<u8> {
        let mut file = StreamFile::new("pc-q35-7.2", &[]);
        file.blocks(&[("vga", 1 << 20), ("pc.ram", 4 << 30)], false);
        let pages = [("pc.ram", 0, Sent::Page(&[3; 4096])), ("vga", 0x1000, Sent::Fill(1))];
        file.pages(&pages);
        file.pages(&[("pc.ram", 0, Sent::Fill(0)), ("pc.ram", 3 << 30, Sent::Difference(&[1]))]);
        file.cpu(0, 1, 2, 3);
        file.clock(0x8000, 0x8000);
        let file = file.finish(true);
        if libvirt { saved(b"LibvirtQemudSave", 0, &file) } else { file }
    }

    fn some_file() -> impl Strategy<Value = Vec<u8>> {
        (0usize..5, any::<bool>()).prop_map(|(kind, flattened)| {
            if kind == 4 {
                return some_stream(flattened);
            }
            let notes = [note("CORE", 1, &[3; 336]), note("QEMU", 0, &[4; 440])].concat();
            let file = if kind == 0 {
                core(&notes, &[(0x1000, 0x2000, &[5; 0x800]), (0x9000, 64, &[6; 64])], true)
            } else {
                let packing = Packing::ALL[kind + 1];
                let mut file = KdumpFile::new(6, packing);
                file.notes = notes;
                file.vmcoreinfo = INFO.to_vec();
                let page = |byte: u8| Some([[byte; 64], [0; 64]].concat().repeat(32));
                let ram = [(1, page(1)), (2, None), (3, page(0)), (40, page(7)), (41, page(8))];
                file.write(&ram.into_iter().collect(), 64)
            };
            if flattened { testing::flatten(&file, 3) } else { file }
        })
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(
            mut file in some_file(),
            changes in proptest::collection::vec(
                (any::<prop::sample::Index>(), any::<u64>(), 0u32..64), 0..12),
            headers in proptest::collection::vec((0usize..0x1200, any::<u8>()), 0..12),
            cut in proptest::option::of(any::<prop::sample::Index>()),
        ) {
            let len = file.len();
            for (at, value, shift) in changes {
                let at = at.index(len.saturating_sub(8));
                file[at..at + 8].copy_from_slice(&(value >> shift).to_le_bytes());
            }
            for (at, byte) in headers {
                // The header of a flattened file's first record is behind its own.
                let at = if file.starts_with(b"makedump") { 0x1000 + at } else { at };
                if let Some(slot) = file.get_mut(at) {
                    *slot = byte;
                }
            }
            if let Some(cut) = cut {
                file.truncate(cut.index(len));
            }
            if let Ok(mut dump) = Dump::parse(file) {
                let ranges = dump.phys().ranges();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                for range in ranges.iter().take(64) {
                    let _ = dump.phys().read(range.start, &mut [0; 5000]);
                    let _ = dump.phys().read_u64(GuestPhys(range.end.0 - 1));
                }
                let _ = dump.kernel_space().map(|space| space.walk(GuestVirt(KERNEL_MAP)));
                let _ = (dump.coverage(), dump.format().to_string(), dump.registers(Vcpu(0)));
                prop_assert!(dump.remarks().iter().all(|remark| !remark.to_string().is_empty()));
            }
        }
    }
}
