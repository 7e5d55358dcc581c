//! Which blocks of a stream are the machine's RAM, and where the guest has them. A stream names blocks and offsets in
//! them; that RAM is interrupted by the PCI hole below 4 GiB, and where, is the board's affair. The board has told it
//! to its firmware, in the clock chip's CMOS, and that is in the stream. Without it the board's default is presumed,
//! and said to be no more.

use guest::GuestPhys;

use super::ram::Block;
use super::runs::PAGE;
use crate::dump::raw::{FIRST_SPLIT, RawLayout};
use crate::dump::remark::{Remark, SplitBy};

/// Offsets in CMOS of RAM from 16 MiB to 4 GiB (2 bytes) and above 4 GiB (3 bytes), in units of 64 KiB
/// (`pc_cmos_init()` in hw/i386/pc.c; SeaBIOS has the first from there, `qemu_preinit()` in its src/fw/paravirt.c).
const BELOW: usize = 0x34;
const ABOVE: usize = 0x5b;
const UNIT: u64 = 64 << 10;
const BELOW_FROM: u64 = 16 << 20;
/// Three bytes hold no more units than this: 1 TiB.
const ABOVE_WRAPS: u64 = UNIT << 24;
/// Where AMD machines have a hole for HyperTransport. RAM that would reach it all goes to 1 TiB instead, if the vCPU
/// says to be AMD's (`AMD_HT_START` and `pc_set_amd_above_4g_mem_start()` in hw/i386/pc.c, since 7.1).
const HYPERTRANSPORT: u64 = 0xfd_0000_0000;
const GIB_4: u64 = 4 << 30;
/// What boards have below the hole, unless told otherwise, and from which RAM on (`pc_init1()` in hw/i386/pc_piix.c,
/// `pc_q35_init()` in hw/i386/pc_q35.c). The rest of the name is a version.
const BOARDS: [(&str, u64, u64); 2] =
    [("pc-q35-", FIRST_SPLIT, 2 << 30), ("pc-i440fx-", 0xe000_0000, 3 << 30)];
/// The smallest block that is worth a remark: what can be plugged in, a section of memory in Linux.
const WORTH_SAYING: u64 = 128 << 20;

/// A piece of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub at: GuestPhys,
    /// The stream's number of its first page.
    pub first: u32,
    pub pages: u32,
}

impl Piece {
    /// Its size in bytes.
    pub(super) fn size(self) -> u64 {
        u64::from(self.pages) * PAGE
    }
}

/// What the stream says of its board.
#[derive(Default)]
pub(super) struct Board<'a> {
    /// QEMU's name of the machine.
    pub machine: Option<&'a str>,
    /// The clock chip's memory.
    pub cmos: Option<&'a [u8]>,
}

/// The machine's memory, ascending.
pub(super) fn pieces(blocks: &[Block], board: &Board<'_>, remarks: &mut Vec<Remark>) -> Vec<Piece> {
    let (ram, below) = match ram_of_cmos(blocks, board.cmos) {
        Some((ram, below)) => (ram, Some(below)),
        None => (candidates(blocks).into_iter().next().unwrap_or_default(), None),
    };
    let others = blocks.iter().filter(|block| block.size() >= WORTH_SAYING && !ram.contains(block));
    remarks
        .extend(others.map(|it| Remark::BlockLeftOut { name: it.name.clone(), size: it.size() }));
    let size = ram.iter().map(|block| block.size()).sum();
    let below = below.map(|below| (below, SplitBy::Cmos)).or_else(|| presumed(board, size));
    let Some((below, by)) = below else {
        remarks.push(Remark::HighLeftOut { below_4g: 2 << 30 });
        return pieces_of(&ram, 2 << 30, 2 << 30);
    };
    if below < size && GIB_4 + (size - below) > HYPERTRANSPORT {
        remarks.push(Remark::HighLeftOut { below_4g: below });
        return pieces_of(&ram, below, below);
    }
    if below < size || by != SplitBy::Cmos {
        let below_4g = below.min(size);
        remarks.push(Remark::Split { below_4g, above_4g: size - below_4g, by });
    }
    pieces_of(&ram, below, size)
}

/// The blocks whose size is what CMOS says, and how much of them lies below 4 GiB. A guest can write to CMOS: then
/// there are none.
fn ram_of_cmos<'a>(blocks: &'a [Block], cmos: Option<&[u8]>) -> Option<(Vec<&'a Block>, u64)> {
    let cmos = cmos?;
    let bytes = |at: usize| cmos.get(at).map(|byte| u64::from(*byte));
    let below = BELOW_FROM + UNIT * (bytes(BELOW)? | bytes(BELOW + 1)? << 8);
    let above = UNIT * (bytes(ABOVE)? | bytes(ABOVE + 1)? << 8 | bytes(ABOVE + 2)? << 16);
    let fits = |size: u64| {
        let rest = size.checked_sub(below);
        rest.is_some_and(|rest| rest % ABOVE_WRAPS == above && below <= GIB_4)
    };
    let mut found = candidates(blocks);
    found.extend(blocks.iter().map(|block| vec![block]));
    let ram = found.into_iter().find(|ram| fits(ram.iter().map(|block| block.size()).sum()))?;
    Some((ram, below))
}

/// What may be the machine's RAM, best first: QEMU's own block, those of NUMA nodes as libvirt names them, the
/// largest one.
fn candidates(blocks: &[Block]) -> Vec<Vec<&Block>> {
    let own = blocks.iter().filter(|block| block.name == "pc.ram").collect();
    let node = |block: &Block| block.name.rsplit_once("ram-node")?.1.parse::<u32>().ok();
    let mut nodes: Vec<_> = blocks.iter().filter_map(|it| Some((node(it)?, it))).collect();
    nodes.sort_by_key(|(number, _)| *number);
    let nodes = nodes.into_iter().map(|(_, block)| block).collect();
    let largest = blocks.iter().max_by_key(|block| block.size()).into_iter().collect();
    let mut candidates: Vec<Vec<&Block>> = vec![own, nodes, largest];
    candidates.retain(|blocks| !blocks.is_empty());
    candidates
}

/// RAM below 4 GiB of a machine with so much RAM, as is usual.
fn presumed(board: &Board<'_>, size: u64) -> Option<(u64, SplitBy)> {
    if size < FIRST_SPLIT {
        return Some((size, SplitBy::Size));
    }
    let machine = board.machine?;
    let (_, from, below) = BOARDS.into_iter().find(|(name, ..)| machine.starts_with(name))?;
    let below = if size < from { size } else { below };
    Some((below, SplitBy::Machine(machine.to_owned())))
}

/// The first `size` bytes of blocks that follow each other, where the guest has them.
fn pieces_of(ram: &[&Block], below_4g: u64, size: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for segment in (RawLayout::Ram { below_4g }).segments(size) {
        let (mut start, end) = (0, segment.offset.saturating_add(segment.size));
        for block in ram {
            // The part of the block that lies in the segment, counted from the first block's start.
            let from = segment.offset.max(start);
            let to = end.min(start + block.size());
            if from < to {
                let page = |bytes: u64| u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
                pieces.push(Piece {
                    at: segment.at + (from - segment.offset),
                    first: block.first.saturating_add(page(from - start)),
                    pages: page(to - from),
                });
            }
            start += block.size();
        }
    }
    pieces.retain(|piece| piece.pages > 0);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn blocks(sizes: &[(&str, u64)]) -> Vec<Block> {
        let mut first = 0;
        let mut blocks = Vec::new();
        for (name, size) in sizes {
            let pages = (size / PAGE) as u32;
            blocks.push(Block { name: (*name).to_owned(), first, pages });
            first += pages;
        }
        blocks
    }

    /// As the firmware is told.
    fn cmos(below: u64, above: u64) -> Vec<u8> {
        let mut bytes = vec![0; 128];
        bytes[0x34..0x36].copy_from_slice(&(((below - (16 << 20)) >> 16) as u16).to_le_bytes());
        bytes[0x5b..0x5e].copy_from_slice(&((above >> 16) as u32).to_le_bytes()[..3]);
        bytes
    }

    fn placed(
        sizes: &[(&str, u64)],
        machine: Option<&str>,
        cmos: Option<&[u8]>,
    ) -> (Vec<(u64, u64, u64)>, Vec<Remark>) {
        let mut remarks = Vec::new();
        let found = pieces(&blocks(sizes), &Board { machine, cmos }, &mut remarks);
        let megabytes = |piece: &Piece| {
            (piece.at.0 / MIB, u64::from(piece.first) * PAGE / MIB, piece.size() / MIB)
        };
        (found.iter().map(megabytes).collect(), remarks)
    }

    #[test]
    fn cmos_tells_the_hole() {
        let table = [("vga.vram", 16 * MIB), ("pc.ram", 4096 * MIB)];
        let (found, remarks) =
            placed(&table, Some("pc-q35-7.2"), Some(&cmos(3072 * MIB, 1024 * MIB)));
        assert_eq!(
            found,
            [(0, 16, 3072), (4096, 16 + 3072, 1024)],
            "whatever the board's default is"
        );
        assert_eq!(
            remarks,
            [Remark::Split { below_4g: 3 << 30, above_4g: 1 << 30, by: SplitBy::Cmos }]
        );
        let (found, remarks) = placed(&[("ram", 256 * MIB)], None, Some(&cmos(256 * MIB, 0)));
        assert_eq!((found, remarks), (vec![(0, 0, 256)], vec![]));
        // As with `max-ram-below-4g=1G`, which no size tells.
        let (found, _) = placed(&[("ram", 1536 * MIB)], None, Some(&cmos(1024 * MIB, 512 * MIB)));
        assert_eq!(found, [(0, 0, 1024), (4096, 1024, 512)]);
    }

    #[test]
    fn without_cmos_the_board_is_presumed_and_that_is_said() {
        let table = [("pc.ram", 4096 * MIB)];
        let (found, remarks) = placed(&table, Some("pc-q35-7.2"), None);
        assert_eq!(found, [(0, 0, 2048), (4096, 2048, 2048)]);
        let by = SplitBy::Machine("pc-q35-7.2".to_owned());
        assert_eq!(remarks, [Remark::Split { below_4g: 2 << 30, above_4g: 2 << 30, by }]);
        // What a guest has written there is not believed.
        let lying = cmos(3072 * MIB, 2048 * MIB);
        let (found, _) = placed(&table, Some("pc-i440fx-7.2"), Some(&lying));
        assert_eq!(found, [(0, 0, 3072), (4096, 3072, 1024)]);
        let (found, remarks) = placed(&table, Some("microvm"), Some(&[]));
        assert_eq!(found, [(0, 0, 2048)]);
        assert_eq!(remarks, [Remark::HighLeftOut { below_4g: 2 << 30 }]);
    }

    #[test]
    fn ram_of_nodes_is_one_and_what_was_plugged_in_is_left_out() {
        let table = [
            ("/objects/dimm", 8192 * MIB),
            ("/objects/ram-node1", 1024 * MIB),
            ("/objects/ram-node0", 3072 * MIB),
        ];
        let (found, remarks) = placed(&table, None, Some(&cmos(2048 * MIB, 2048 * MIB)));
        assert_eq!(found, [(0, 9216, 2048), (4096, 9216 + 2048, 1024), (5120, 8192, 1024)]);
        let name = "/objects/dimm".to_owned();
        assert!(remarks.contains(&Remark::BlockLeftOut { name, size: 8 << 30 }));
    }

    #[test]
    fn beyond_amds_hole_nothing_is_presumed() {
        let above = (2 << 40) - 3072 * MIB;
        let (found, remarks) =
            placed(&[("pc.ram", 2 << 40)], None, Some(&cmos(3072 * MIB, above % (1 << 40))));
        assert_eq!(found, [(0, 0, 3072)]);
        assert!(remarks.contains(&Remark::HighLeftOut { below_4g: 3 << 30 }));
    }
}
