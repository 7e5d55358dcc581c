//! One function as blocks of decoded instructions, its cut-off cold part included, read from guest
//! memory. What the blocks do is `analysis.rs`'s.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use capstone::Capstone;
use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;

use super::instruction::{MAX_INSTRUCTION, disassembler};
use super::locks::{Does, LockTable};
use super::op::{Action, Op, Relation, decode};

/// Most bytes of one part of a function that are read: above the largest of the kernel.
const MAX_PART: u64 = 128 << 10;
/// Most instructions of one function that are decoded.
const MAX_OPS: usize = 32 << 10;

/// `endbr64`, with which a function starts that may be called indirectly (kernels with IBT).
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// The no-operation that stands where ftrace may put a call (arch/x86/include/asm/nops.h: `BYTES_NOP5`).
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// A way out of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    /// Index of the block it leads to.
    pub(crate) to: u32,
    /// What the arithmetic flags show on this way.
    pub(crate) relation: Relation,
    /// Behind a `ud2`: taken only if it is a `WARN()`.
    pub(crate) after_trap: bool,
}

/// Instructions that are entered at the first only.
#[derive(Clone, Debug, Default)]
pub(crate) struct Block {
    /// Address and instruction, ascending.
    pub(crate) ops: Vec<(u64, Op)>,
    /// Ways out within the function.
    pub(crate) edges: Vec<Edge>,
    /// rsp below the CFA at the first instruction, where the unwind row says so.
    pub(crate) depth: Option<i64>,
}

impl Block {
    pub(crate) fn start(&self) -> u64 {
        self.ops.first().map_or(0, |op| op.0)
    }
}

/// A function's blocks; the first one is the entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub(crate) blocks: Vec<Block>,
}

/// Part of a function: its bytes.
struct Part {
    start: u64,
    bytes: Vec<u8>,
}

impl Part {
    fn read(memory: &dyn VirtMemory, range: &Range<u64>) -> Self {
        let len = (range.end.saturating_sub(range.start)).min(MAX_PART);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if memory.read(GuestVirt(range.start), &mut bytes).is_err() {
            // Up to the first page that is missing.
            let mut good = 0;
            for chunk in bytes.chunks_mut(4096) {
                if memory.read(GuestVirt(range.start.wrapping_add(good as u64)), chunk).is_err() {
                    break;
                }
                good += chunk.len();
            }
            bytes.truncate(good);
        }
        Self { start: range.start, bytes }
    }

    fn at(&self, address: u64) -> Option<&[u8]> {
        let offset = usize::try_from(address.checked_sub(self.start)?).ok()?;
        let rest = self.bytes.get(offset..)?;
        (!rest.is_empty()).then(|| rest.get(..MAX_INSTRUCTION).unwrap_or(rest))
    }
}

/// A function's bytes: its own first, then those of its cold part.
pub(crate) struct Text(Vec<Part>);

impl Text {
    /// Reads the parts, each up to the first page that is missing. The function may have been quarantined since it was
    /// entered.
    pub(crate) fn read(memory: &dyn VirtMemory, ranges: &[Range<u64>]) -> Self {
        let mut parts: Vec<Part> = ranges.iter().map(|range| Part::read(memory, range)).collect();
        if let Some(own) = parts.first_mut() {
            undo_quarantine(&mut own.bytes);
        }
        Self(parts)
    }

    /// Differs, as good as certainly, when an address or a byte does.
    pub(crate) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for part in &self.0 {
            part.start.hash(&mut hasher);
            part.bytes.hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// Puts back what stood at a function's entry before a quarantine made it return at once, `push imm8; pop rax; ret` or
/// `ret` in the first bytes of the no-operation: whoever is inside came in before.
fn undo_quarantine(bytes: &mut [u8]) {
    let skip = if bytes.starts_with(&ENDBR) { ENDBR.len() } else { 0 };
    let Some(entry) = bytes.get_mut(skip..skip + NOP5.len()) else { return };
    if matches!(entry, [0x6a, _, 0x58, 0xc3, 0x00] | [0xc3, 0x1f, 0x44, 0x00, 0x00]) {
        entry.copy_from_slice(&NOP5);
    }
}

/// The parts of the function at a code address: itself first, then its cold part. For an address in a
/// cold part that is the function it was cut off from.
pub(crate) fn parts(image: &RepairImage, at: GuestVirt) -> Option<(GuestVirt, Vec<Range<u64>>)> {
    let location = image.locate(at)?;
    let name = location.symbol.name;
    let own = (location.start(at), location.symbol.size);
    let range = |(start, size): (GuestVirt, u64)| start.0..start.0.saturating_add(size);
    // Older compilers number the cold parts: `f.cold.12`.
    let (main, cold) = match name.find(".cold") {
        Some(cut) => (image.sibling(at, name.get(..cut)?), Some(own)),
        None => (Some(own), image.sibling(at, &format!("{name}.cold"))),
    };
    let main = main?;
    let mut ranges = vec![range(main)];
    ranges.extend(cold.map(range));
    Some((main.0, ranges))
}

/// The instructions that have run before the one at `at` whenever control gets there: those of its block. None when
/// the function has indirect jumps, as these may lead into the middle of it.
pub(crate) fn block_before(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    at: GuestVirt,
) -> Vec<(u64, Op)> {
    let read = || {
        let (_, ranges) = parts(image, at)?;
        let text = Text::read(memory, &ranges);
        let function = Function::decode(image, &LockTable::new(image), text)?;
        let mut ops = function.blocks.iter().flat_map(|block| &block.ops);
        if ops.any(|(_, op)| op.action == Action::Jump(None)) {
            return None;
        }
        let mut places = function.find(at.0);
        let (Some((block, index)), None) = (places.next(), places.next()) else { return None };
        Some(function.blocks.get(block)?.ops.get(..index)?.to_vec())
    };
    read().unwrap_or_default()
}

impl Function {
    /// Decodes what can be reached from the entry.
    pub(crate) fn decode(image: &RepairImage, table: &LockTable, text: Text) -> Option<Self> {
        let Text(parts) = text;
        let entry = parts.first()?.start;
        let mut decoder = Decoder {
            disassembler: disassembler()?,
            parts,
            table,
            ops: BTreeMap::new(),
            leaders: BTreeSet::new(),
        };
        decoder.run(entry);
        let mut function = decoder.blocks(entry);
        for block in &mut function.blocks {
            block.depth = depth(image, block.start());
        }
        Some(function)
    }

    /// The block that contains the instruction at `at`, and the instruction's index in it.
    pub(crate) fn find(&self, at: u64) -> impl Iterator<Item = (usize, usize)> {
        self.blocks.iter().enumerate().filter_map(move |(index, block)| {
            Some((index, block.ops.binary_search_by_key(&at, |op| op.0).ok()?))
        })
    }

    /// The block whose call ends at `end`, and the call's index in it.
    pub(crate) fn find_call(&self, end: u64) -> impl Iterator<Item = (usize, usize)> {
        self.blocks.iter().enumerate().filter_map(move |(index, block)| {
            let place = block.ops.partition_point(|(at, _)| *at < end).checked_sub(1)?;
            let (at, op) = block.ops.get(place)?;
            let ends = at.wrapping_add(u64::from(op.len)) == end;
            (ends && matches!(op.action, Action::Call(_))).then_some((index, place))
        })
    }
}

/// rsp below the CFA, from an unwind row that is based on rsp.
fn depth(image: &RepairImage, at: u64) -> Option<i64> {
    match image.unwind_row(GuestVirt(at))?.cfa {
        repair_image::CfaRule::Offset { reg: guest::Reg::Rsp, offset } => Some(i64::from(offset)),
        _ => None,
    }
}

struct Decoder<'a> {
    disassembler: Capstone,
    parts: Vec<Part>,
    table: &'a LockTable,
    ops: BTreeMap<u64, Op>,
    leaders: BTreeSet<u64>,
}

impl Decoder<'_> {
    fn bytes(&self, at: u64) -> Option<&[u8]> {
        self.parts.iter().find_map(|part| part.at(at))
    }

    fn ends_path(&self, op: &Op) -> bool {
        let no_return = match op.action {
            Action::Call(Some(target)) => {
                self.table.call(GuestVirt(target)) == Some(Does::NoReturn)
            }
            _ => false,
        };
        no_return || !op.falls_through()
    }

    fn run(&mut self, entry: u64) {
        let mut work = vec![entry];
        self.leaders.insert(entry);
        while let Some(mut at) = work.pop() {
            while !self.ops.contains_key(&at) && self.ops.len() < MAX_OPS {
                let op = self.bytes(at).and_then(|bytes| decode(&self.disassembler, bytes, at));
                let Some(op) = op else { break };
                self.ops.insert(at, op);
                let next = at.wrapping_add(u64::from(op.len));
                if let Some(target) =
                    op.jump_target().filter(|&target| self.bytes(target).is_some())
                    && self.leaders.insert(target)
                {
                    work.push(target);
                }
                if matches!(op.action, Action::Branch(..) | Action::Trap) {
                    self.leaders.insert(next);
                }
                if self.ends_path(&op) {
                    break;
                }
                at = next;
            }
        }
    }

    fn blocks(self, entry: u64) -> Function {
        // The entry comes first, whatever its address.
        let mut starts = vec![entry];
        starts.extend(self.leaders.iter().copied().filter(|&at| at != entry));
        starts.retain(|at| self.ops.contains_key(at));
        let index: HashMap<u64, u32> =
            starts.iter().enumerate().map(|(index, &at)| (at, index as u32)).collect();
        let blocks = starts.iter().map(|&start| self.block(start, &index)).collect();
        Function { blocks }
    }

    fn block(&self, start: u64, index: &HashMap<u64, u32>) -> Block {
        let mut block = Block::default();
        let mut at = start;
        let edge = |to: u64, relation, after_trap| {
            index.get(&to).map(|&to| Edge { to, relation, after_trap })
        };
        while let Some(&op) = self.ops.get(&at) {
            block.ops.push((at, op));
            let next = at.wrapping_add(u64::from(op.len));
            let taken = match op.action {
                Action::Branch(relation, _) => relation,
                _ => Relation::Any,
            };
            if let Some(target) = op.jump_target() {
                block.edges.extend(edge(target, taken, false));
            }
            if self.ends_path(&op) {
                break;
            }
            if index.contains_key(&next) {
                let after_trap = op.action == Action::Trap;
                block.edges.extend(edge(next, taken.negated(), after_trap));
                break;
            }
            at = next;
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarantined_entry_is_read_as_it_was() {
        let undone = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            undo_quarantine(&mut bytes);
            bytes
        };
        let plain = [0x0f, 0x1f, 0x44, 0, 0, 0x55];
        assert_eq!(undone(&[0x6a, 0xfb, 0x58, 0xc3, 0, 0x55]), plain);
        assert_eq!(undone(&[0xc3, 0x1f, 0x44, 0, 0, 0x55]), plain);
        let typed = [ENDBR.as_slice(), &[0x6a, 0xfb, 0x58, 0xc3, 0, 0x55]].concat();
        assert_eq!(undone(&typed), [ENDBR.as_slice(), &plain].concat());
        for other in
            [&plain[..], &[0xe8, 1, 2, 3, 4, 0x55], &[0x6a, 0xfb, 0x58, 0xc3, 0x90], &[0xc3]]
        {
            assert_eq!(undone(other), other, "{other:x?}");
        }
    }
}
