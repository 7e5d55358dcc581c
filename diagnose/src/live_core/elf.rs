//! The ELF core file: header, program headers, notes, pages. Which pages and what notes is decided
//! elsewhere.

use std::io::{self, Write};

use guest::{GuestPhys, GuestVirt};

use super::store::{PAGE, Store};

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Readable, writable, executable: as `/proc/vmcore` says of every segment.
const FLAGS: u32 = 7;
/// Zero pages of one segment at most. They all share this one stretch of the file.
const ZERO_PAGES: usize = 64;
/// Fewer zero pages in a row than this are not worth a segment.
const ZERO_RUN: usize = 4;

/// Where the kernel maps physical memory: what tools expect of `p_vaddr`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mappings {
    /// Guest-virtual start of the map of all physical memory.
    pub(super) direct: Option<GuestVirt>,
    /// The kernel image: guest-physical start, guest-virtual start, size in bytes.
    pub(super) image: Option<(GuestPhys, GuestVirt, u64)>,
}

impl Mappings {
    /// Guest-virtual address of a page; 0 where it is not known, as QEMU writes it.
    fn virt(&self, at: GuestPhys) -> u64 {
        if let Some((phys, virt, _)) = self.image.filter(|_| self.is_image(at)) {
            return virt.wrapping_add(at - phys).0;
        }
        self.direct.map_or(0, |direct| direct.wrapping_add(at.0).0)
    }

    fn is_image(&self, at: GuestPhys) -> bool {
        self.image.is_some_and(|(phys, _, size)| at >= phys && at - phys < size)
    }
}

/// A run of pages.
struct Segment {
    phys: GuestPhys,
    /// Places in the store; for zero pages only their number counts.
    places: Vec<usize>,
    zero: bool,
}

/// The segments of a store, ascending.
fn segments(store: &Store, mappings: &Mappings) -> Vec<Segment> {
    let pages: Vec<_> = store
        .ascending()
        .into_iter()
        .map(|(at, place)| {
            let zero = store.page(place).is_some_and(|page| page.iter().all(|&byte| byte == 0));
            (at, place, zero)
        })
        .collect();
    let mut segments: Vec<Segment> = Vec::new();
    let mut index = 0;
    while let Some(&(at, place, zero)) = pages.get(index) {
        let run = pages.get(index..).unwrap_or_default();
        let zeros = run
            .iter()
            .zip(0_u64..)
            .take_while(|((here, _, zero), n)| *zero && *here == at + n * PAGE)
            .count();
        let same = |segment: &Segment| {
            !segment.zero
                && segment.phys + segment.places.len() as u64 * PAGE == at
                && mappings.is_image(segment.phys) == mappings.is_image(at)
        };
        if zero && zeros >= ZERO_RUN {
            let taken = run.iter().take(zeros.min(ZERO_PAGES)).map(|page| page.1);
            segments.push(Segment { phys: at, places: taken.collect(), zero: true });
            index += zeros.min(ZERO_PAGES);
            continue;
        }
        match segments.last_mut().filter(|segment| same(segment)) {
            Some(segment) => segment.places.push(place),
            None => segments.push(Segment { phys: at, places: vec![place], zero: false }),
        }
        index += 1;
    }
    segments
}

/// Writes the file.
pub(super) fn write(
    store: &Store,
    mappings: &Mappings,
    notes: &[u8],
    out: &mut dyn Write,
) -> io::Result<()> {
    let segments = segments(store, mappings);
    let count = u16::try_from(segments.len() + 1)
        .ok()
        .filter(|&count| count < u16::MAX)
        .ok_or_else(|| io::Error::other("more segments than an ELF header can count"))?;
    let notes_at = HEADER + PROGRAM_HEADER * u64::from(count);
    let zeros_at = (notes_at + notes.len() as u64).next_multiple_of(PAGE);
    let longest = segments.iter().filter(|segment| segment.zero).map(|it| it.places.len()).max();
    let zeros = longest.unwrap_or(0) as u64 * PAGE;
    out.write_all(&header(count))?;
    out.write_all(&program_header(PT_NOTE, 0, notes_at, 0, 0, notes.len() as u64))?;
    let mut at = zeros_at + zeros;
    for segment in &segments {
        let size = segment.places.len() as u64 * PAGE;
        let offset = if segment.zero { zeros_at } else { at };
        let virt = mappings.virt(segment.phys);
        out.write_all(&program_header(PT_LOAD, FLAGS, offset, virt, segment.phys.0, size))?;
        at += if segment.zero { 0 } else { size };
    }
    out.write_all(notes)?;
    let padding = zeros_at - notes_at - notes.len() as u64 + zeros;
    io::copy(&mut io::Read::take(io::repeat(0), padding), out)?;
    for segment in segments.iter().filter(|segment| !segment.zero) {
        for &place in &segment.places {
            out.write_all(store.page(place).unwrap_or_default())?;
        }
    }
    Ok(())
}

fn header(count: u16) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    let mut bytes = Vec::with_capacity(HEADER as usize);
    // 64-bit, little-endian, version 1, System V.
    bytes.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    bytes.extend(ET_CORE.to_le_bytes());
    bytes.extend(EM_X86_64.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(0_u64.to_le_bytes());
    // makedumpfile takes program headers right after the header for granted.
    bytes.extend(HEADER.to_le_bytes());
    bytes.extend(0_u64.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, count, 0, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    bytes
}

fn program_header(kind: u32, flags: u32, offset: u64, virt: u64, phys: u64, size: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PROGRAM_HEADER as usize);
    bytes.extend(kind.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    for word in [offset, virt, phys, size, size, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}
