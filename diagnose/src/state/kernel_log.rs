//! The end of the kernel log, out of the kernel's own ring buffer. What the lines mean is the console reader's.

use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;

use crate::Error;
use crate::kernel::{Kernel, printable};

/// Records that are told of at most, from the end.
const RECORDS_MAX: u64 = 400;
/// `LOG_BUF_SHIFT` is at most 25 (init/Kconfig), and a record has 32 bytes (`PRB_AVGBITS`).
const BITS_MAX: u64 = 31;
/// Bytes of one record at most: `PRINTKRB_RECORD_MAX` is 1024, `text_len` could say 65535.
const TEXT_MAX: u64 = 4096;
/// Bits of `prb_desc.state_var` above the id (kernel/printk/printk_ringbuffer.h): `desc_committed` and
/// `desc_finalized` are records that can be read.
const STATE_SHIFT: u32 = 62;
const READABLE: [u64; 2] = [1, 2];

/// A record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Time since boot, microseconds.
    pub at_us: u64,
    /// Text, control characters replaced.
    pub text: String,
}

/// The end of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelLog {
    /// Records, oldest first.
    pub records: Vec<Record>,
    /// Older records that are not listed.
    pub older: u64,
    /// Records among them whose text is not there or can't be read.
    pub unreadable: u64,
}

impl KernelLog {
    /// The lines as a console shows them: `[   12.000345] text`.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        for record in &self.records {
            let (seconds, micros) = (record.at_us / 1_000_000, record.at_us % 1_000_000);
            for line in record.text.split('\n') {
                out.push_str(&format!("[{seconds:>5}.{micros:06}] {line}\n"));
            }
        }
        out
    }
}

pub(super) fn of(kernel: &Kernel<'_>) -> Result<KernelLog, Error> {
    end(kernel, RECORDS_MAX)
}

/// The last records of a kernel's log, `most` at most.
///
/// # Errors
/// When there is no log that could be read.
pub fn newest(image: &RepairImage, memory: &dyn VirtMemory, most: u64) -> Result<KernelLog, Error> {
    end(&Kernel::of_memory(image, memory), most.min(RECORDS_MAX))
}

fn end(kernel: &Kernel<'_>, most: u64) -> Result<KernelLog, Error> {
    let ring = Ring::open(kernel)?;
    let count = ring.head.wrapping_sub(ring.tail).wrapping_add(1) & ID;
    let count = count.min(ring.count);
    let shown = count.min(most);
    let mut log = KernelLog { records: Vec::new(), older: count - shown, unreadable: 0 };
    for back in (0..shown).rev() {
        match ring.record(kernel, ring.head.wrapping_sub(back) & ID) {
            Ok(Some(record)) => log.records.push(record),
            // Not written yet, or given up: no record.
            Ok(None) => {}
            Err(_) => log.unreadable += 1,
        }
    }
    Ok(log)
}

/// `DESC_ID_MASK`
const ID: u64 = (1 << STATE_SHIFT) - 1;
const RING: &str = "printk_ringbuffer";

/// The ring buffer: since commit 896fbe20b4e2 ("printk: use the lockless ringbuffer", v5.10).
struct Ring {
    /// Descriptors, a power of two.
    count: u64,
    descriptors: GuestVirt,
    infos: GuestVirt,
    head: u64,
    tail: u64,
    data: GuestVirt,
    /// Bytes of data, a power of two.
    size: u64,
    descriptor_size: u64,
    info_size: u64,
}

impl Ring {
    fn open(kernel: &Kernel<'_>) -> Result<Self, Error> {
        let at = kernel.image.address_of("prb").ok_or(Error::MissingSymbol("prb"))?;
        let at = kernel.pointer_at(at, "prb")?;
        let power = |path| {
            let bits = kernel.number(at, RING, path)?;
            // A lying exponent leads to a ring of one entry, never to a large one.
            Ok::<_, Error>(1 << if bits <= BITS_MAX { bits } else { 0 })
        };
        let size = |structure| {
            let size = kernel.image.types.size_of(structure);
            size.ok_or(Error::MissingMember { structure, path: "" })
        };
        Ok(Self {
            count: power("desc_ring.count_bits")?,
            descriptors: kernel.pointer(at, RING, "desc_ring.descs")?,
            infos: kernel.pointer(at, RING, "desc_ring.infos")?,
            head: kernel.number(at, RING, "desc_ring.head_id")? & ID,
            tail: kernel.number(at, RING, "desc_ring.tail_id")? & ID,
            data: kernel.pointer(at, RING, "text_data_ring.data")?,
            size: power("text_data_ring.size_bits")?,
            descriptor_size: size("prb_desc")?,
            info_size: size("printk_info")?,
        })
    }

    /// The record of that id; `None` when there is none.
    fn record(&self, kernel: &Kernel<'_>, id: u64) -> Result<Option<Record>, Error> {
        let index = id & (self.count - 1);
        let descriptor = self.descriptors.wrapping_add(index.wrapping_mul(self.descriptor_size));
        let state = kernel.number(descriptor, "prb_desc", "state_var")?;
        if state & ID != id || !READABLE.contains(&(state >> STATE_SHIFT)) {
            return Ok(None);
        }
        let begin = kernel.number(descriptor, "prb_desc", "text_blk_lpos.begin")?;
        let next = kernel.number(descriptor, "prb_desc", "text_blk_lpos.next")?;
        let info = self.infos.wrapping_add(index.wrapping_mul(self.info_size));
        let at_us = kernel.number(info, "printk_info", "ts_nsec")? / 1000;
        let length = kernel.number(info, "printk_info", "text_len")?;
        // Odd positions mean "no data" (`BLK_DATALESS`): an empty line, or one that found no place.
        if begin & 1 == 1 && next & 1 == 1 {
            return Ok(Some(Record { at_us, text: String::new() }));
        }
        let mask = self.size - 1;
        // A block that would reach over the end lies at the start instead (`get_data()`). It begins with its id.
        let wraps = begin & !mask != next & !mask && next & mask != 0;
        let start = if wraps { 0 } else { begin & mask };
        let end = if next & mask == 0 { self.size } else { next & mask };
        let room = end.saturating_sub(start).saturating_sub(8);
        let mut bytes = vec![0; length.min(room).min(TEXT_MAX) as usize];
        let at = self.data.wrapping_add(start).wrapping_add(8);
        let read = kernel.memory.read(at, &mut bytes);
        read.map_err(|source| Error::Guest { what: "kernel log", at, source })?;
        let text = bytes.split(|&byte| byte == b'\n').map(printable).collect::<Vec<_>>().join("\n");
        Ok(Some(Record { at_us, text }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{DATA, Guest};

    const AT: u64 = DATA + 0x1000;
    const DESCRIPTORS: u64 = DATA + 0x2000;
    const INFOS: u64 = DATA + 0x3000;
    const TEXTS: u64 = DATA + 0x4000;

    /// A ring of 4 descriptors and 64 bytes; ids 5, 6 and 7 are used, the last one wraps.
    fn guest() -> Guest {
        let members = [
            ("desc_ring.count_bits", 0),
            ("desc_ring.descs", 8),
            ("desc_ring.infos", 16),
            ("desc_ring.head_id", 24),
            ("desc_ring.tail_id", 32),
            ("text_data_ring.size_bits", 40),
            ("text_data_ring.data", 48),
        ];
        let mut guest = Guest::new().object("prb", DATA + 0x500).types(|types| {
            let types =
                members.into_iter().fold(types, |types, (name, at)| types.with(RING, name, at, 8));
            types
                .with("prb_desc", "state_var", 0, 8)
                .with("prb_desc", "text_blk_lpos.begin", 8, 8)
                .with("prb_desc", "text_blk_lpos.next", 16, 8)
                .sized("prb_desc", 24)
                .with("printk_info", "ts_nsec", 8, 8)
                .with("printk_info", "text_len", 16, 2)
                .sized("printk_info", 32)
        });
        guest.poke_u64(DATA + 0x500, AT);
        for (word, value) in [2, DESCRIPTORS, INFOS, 7, 5, 6, TEXTS].into_iter().enumerate() {
            guest.poke_u64(AT + word as u64 * 8, value);
        }
        let mut put = |id: u64, state: u64, begin: u64, next: u64, at: u64, text: &str| {
            let (descriptor, info) = (DESCRIPTORS + (id & 3) * 24, INFOS + (id & 3) * 32);
            guest.poke_u64(descriptor, state << STATE_SHIFT | id);
            guest.poke_u64(descriptor + 8, begin);
            guest.poke_u64(descriptor + 16, next);
            guest.poke_u64(info + 8, id * 1_000_000);
            guest.poke_u64(info + 16, text.len() as u64);
            guest.poke(TEXTS + at + 8, text.as_bytes());
        };
        put(5, 2, 64, 88, 0, "hello\x1b[2J");
        put(6, 0, 88, 96, 24, "unwritten");
        put(7, 1, 112, 152, 0, "hello\x1b[2J");
        guest
    }

    fn read(guest: &mut Guest) -> Result<KernelLog, Error> {
        let image = guest.image();
        of(&Kernel::of_memory(&image, &guest.machine.space()))
    }

    #[test]
    fn records_are_read_and_cannot_steer_a_terminal() {
        let log = read(&mut guest()).unwrap();
        let lines: Vec<_> = log.records.iter().map(|it| (it.at_us, it.text.as_str())).collect();
        assert_eq!(lines, [(5000, "hello.[2J"), (7000, "hello.[2J")]);
        assert_eq!((log.older, log.unreadable), (0, 0));
    }

    #[test]
    fn text_that_is_not_there_is_counted() {
        let mut guest = guest();
        guest.poke_u64(AT + 48, 0xffff_9000_0000_0000);
        assert_eq!(read(&mut guest).map(|log| log.unreadable), Ok(2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn a_lying_ring_never_panics(words in proptest::collection::vec((0_u64..0x60, any::<u64>()), 1..20)) {
            let mut guest = guest();
            for (slot, value) in words {
                let base = [AT, DESCRIPTORS, INFOS][(slot % 3) as usize];
                guest.poke_u64(base + slot / 3 * 8, value);
            }
            let _ = read(&mut guest);
        }
    }
}
