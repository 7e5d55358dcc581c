//! Damage: bytes that a running kernel never writes and that are not what they were. Found by comparing
//! the pristine bytes with memory; places that the kernel rewrites are told apart by `patch_sites.rs`.
//! Nothing is repaired here.

use std::ops::Range;

use guest::{GuestVirt, PhysMemory, VirtMemory};
use serde::{Serialize, Serializer};

use crate::patch_sites::{PatchSites, SiteKind};
use crate::{PageKind, PristineRun, RepairImage};

/// Bytes compared at once: what was copied out of the guest is still in the first-level cache then.
const CHUNK: usize = 16 << 10;
/// Differing bytes looked into at most, in one comparison. A kernel whose text differs in more is not
/// damaged but another.
const MAX_BYTES: usize = 16 << 10;
/// Bytes of one gate of the IDT (Intel SDM 3A 6.14.1).
const GATE: u64 = 16;

/// Damaged bytes that lie together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Guest-virtual address of the first.
    pub at: GuestVirt,
    /// What they are part of.
    pub kind: PageKind,
    /// Name of the module, `None` for the kernel proper.
    pub module: Option<String>,
    /// Function or object that they lie in; of the IDT the vector.
    pub symbol: Option<String>,
    /// Bytes from its start.
    pub offset: u64,
    /// Bytes found.
    #[serde(serialize_with = "hex_bytes")]
    pub found: Vec<u8>,
    /// Bytes that were there when the guest was healthy.
    #[serde(serialize_with = "hex_bytes")]
    pub expected: Vec<u8>,
}

fn hex_bytes<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&hex(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Damage {
    /// The range, guest-virtual.
    #[must_use]
    pub fn range(&self) -> Range<GuestVirt> {
        self.at..self.at + self.expected.len() as u64
    }

    /// Number of bits that differ.
    #[must_use]
    pub fn flipped_bits(&self) -> u32 {
        self.found.iter().zip(&self.expected).map(|(found, was)| (found ^ was).count_ones()).sum()
    }

    /// The place by name: `vfs_read+0x10`, `read [e1000]+0x4`, `vector 6 of the IDT+0x5`.
    #[must_use]
    pub fn place(&self) -> String {
        let name = self.symbol.clone().unwrap_or_else(|| format!("{:#x}", self.at));
        match (&self.module, &self.symbol) {
            (Some(module), Some(_)) => format!("{name}+{:#x} [{module}]", self.offset),
            (Some(module), None) => format!("{name} [{module}]"),
            (None, Some(_)) => format!("{name}+{:#x}", self.offset),
            (None, None) => name,
        }
    }

    /// One line for people.
    #[must_use]
    pub fn words(&self) -> String {
        let what = match self.kind {
            PageKind::Text | PageKind::ModuleText => "text",
            PageKind::ReadOnlyData | PageKind::ModuleReadOnlyData => "read-only data",
            PageKind::Idt => "the IDT",
        };
        let bits = self.flipped_bits();
        let plural = if bits == 1 { "" } else { "s" };
        format!(
            "{what} is damaged at {:#x} ({}): {} instead of {}, {bits} bit{plural} flipped",
            self.at,
            self.place(),
            hex(&self.found),
            hex(&self.expected),
        )
    }
}

/// What a comparison found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Comparison {
    /// Damage, by address.
    pub damage: Vec<Damage>,
    /// Bytes that differ where the kernel itself rewrites text, with the reason.
    pub patched: Vec<(GuestVirt, SiteKind)>,
    /// Bytes compared.
    pub bytes: u64,
    /// Whether more differs than was looked into: no conclusion may be drawn.
    pub overwhelmed: bool,
}

/// Compares everything that is constant.
#[must_use]
pub fn compare(image: &RepairImage, phys: &dyn PhysMemory) -> Comparison {
    let all: Vec<_> = image.pristine.runs().iter().map(PristineRun::range).collect();
    compare_within(image, phys, &all)
}

/// Compares what is constant within some ranges, guest-virtual.
#[must_use]
pub fn compare_within(
    image: &RepairImage,
    phys: &dyn PhysMemory,
    ranges: &[Range<GuestVirt>],
) -> Comparison {
    let space = image.placement.space(phys);
    let mut comparison = Comparison::default();
    let mut differing = Vec::new();
    for run in image.pristine.runs() {
        for range in ranges {
            let start = range.start.max(run.start);
            let end = range.end.min(run.range().end);
            if start < end {
                comparison.bytes += end - start;
                differ(&space, run, start..end, &mut differing);
            }
        }
    }
    comparison.overwhelmed = differing.len() >= MAX_BYTES;
    if differing.is_empty() {
        return comparison;
    }
    differing.sort_unstable();
    differing.dedup();
    let was = image.pristine.over(&space);
    let sites = PatchSites::read(image, &was);
    for at in differing {
        let Some(run) = image.pristine.run_at(at) else { continue };
        let reason = run.kind.is_text().then(|| sites.reason(image, &was, &space, at)).flatten();
        match reason {
            Some(kind) => comparison.patched.push((at, kind)),
            None => add(image, &space, run, at, &mut comparison.damage),
        }
    }
    comparison
}

/// Addresses of the bytes that differ. Memory that can't be read is passed over: that its page is gone is
/// not damage to its bytes.
fn differ(
    space: &dyn VirtMemory,
    run: &PristineRun,
    range: Range<GuestVirt>,
    found: &mut Vec<GuestVirt>,
) {
    let mut buffer = vec![0; CHUNK.min(usize::try_from(range.end - range.start).unwrap_or(CHUNK))];
    let mut at = range.start;
    while at < range.end && found.len() < MAX_BYTES {
        let here = usize::try_from(range.end - at).unwrap_or(CHUNK).min(buffer.len());
        let offset = usize::try_from(at - run.start).unwrap_or(usize::MAX);
        let was = offset.checked_add(here).and_then(|end| run.bytes.get(offset..end));
        let (Some(is), Some(was)) = (buffer.get_mut(..here), was) else { return };
        if space.read(at, is).is_ok() && is != was {
            let bytes = (0u64..).zip(is.iter().zip(was));
            found.extend(bytes.filter(|(_, (is, was))| is != was).map(|(index, _)| at + index));
        }
        at = at + here as u64;
    }
    found.truncate(MAX_BYTES);
}

/// Adds a byte to the damage found, to the last piece if it lies right behind it.
fn add(
    image: &RepairImage,
    space: &dyn VirtMemory,
    run: &PristineRun,
    at: GuestVirt,
    damage: &mut Vec<Damage>,
) {
    let offset = usize::try_from(at - run.start).unwrap_or(usize::MAX);
    let (Ok(is), Some(&was)) = (space.read_u8(at), run.bytes.get(offset)) else { return };
    let (module, symbol, offset) = name(image, run, at);
    if let Some(last) = damage.last_mut()
        && last.range().end == at
        && last.kind == run.kind
        && last.symbol == symbol
    {
        last.found.push(is);
        last.expected.push(was);
        return;
    }
    let (found, expected) = (vec![is], vec![was]);
    damage.push(Damage { at, kind: run.kind, module, symbol, offset, found, expected });
}

/// Module, function or object, and offset into it.
fn name(
    image: &RepairImage,
    run: &PristineRun,
    at: GuestVirt,
) -> (Option<String>, Option<String>, u64) {
    if run.kind == PageKind::Idt {
        let offset = image.address_of("idt_table").map_or(0, |table| at - table);
        return (None, Some(format!("vector {} of the IDT", offset / GATE)), offset % GATE);
    }
    if let Some(location) = image.locate(at) {
        let module = location.module.map(|module| module.name.clone());
        return (module, Some(location.symbol.name.to_owned()), location.offset);
    }
    let module = image.modules.iter().find(|module| module.contains(at));
    let (knowledge, link) = match module {
        Some(module) => (&module.knowledge, guest::LinkAddr(at.0)),
        None => (&image.kernel, image.link(at)),
    };
    let object = knowledge
        .symbols()
        .find(|symbol| link.0.checked_sub(symbol.at.0).is_some_and(|offset| offset < symbol.size));
    let named = object.map(|symbol| (symbol.name.to_owned(), link - symbol.at));
    let module = module.map(|module| module.name.clone());
    named.map_or((module.clone(), None, 0), |(name, offset)| (module, Some(name), offset))
}

#[cfg(test)]
mod tests {
    use guest::Machine;
    use proptest::prelude::*;

    use super::*;
    use crate::synth::{
        CONSTANT_DATA, CONSTANT_MODULE, CONSTANT_TEXT, FUNCTION, LABEL, SHORT_LABEL, STATIC_CALL,
        TRACED, WRITABLE, constants,
    };

    #[test]
    fn a_healthy_guest_has_no_damage() {
        let (mut machine, image) = constants();
        machine.poke_virt(WRITABLE, &[7; 64]);
        let found = compare(&image, machine.phys());
        assert!(found.damage.is_empty() && found.patched.is_empty() && !found.overwhelmed);
        assert_eq!(found.bytes, 12 * 4096);
    }

    #[test]
    fn damage_is_told_by_name() {
        let (mut machine, image) = constants();
        machine.poke_virt(CONSTANT_TEXT + 0x10a, &[0x91, 0x80]);
        machine.poke_virt(CONSTANT_MODULE + 0x205, &[0xd0]);
        let found = compare(&image, machine.phys());
        let words: Vec<String> = found.damage.iter().map(Damage::words).collect();
        assert_eq!(
            words,
            [
                "text is damaged at 0xffffffff8100010a (k100+0xa): 9180 instead of 9090, 2 bits flipped",
                "text is damaged at 0xffffffffc0000205 (m200+0x5 [m]): d0 instead of 90, 1 bit flipped",
            ]
        );
        let within = CONSTANT_MODULE..CONSTANT_MODULE + 0x205;
        assert!(compare_within(&image, machine.phys(), &[within]).damage.is_empty());
        let within = CONSTANT_MODULE..CONSTANT_MODULE + 0x206;
        // Ranges may overlap: each byte is told once.
        let twice = [within.clone(), within];
        assert_eq!(compare_within(&image, machine.phys(), &twice).damage, found.damage[1..]);
    }

    #[test]
    fn another_kernel_gives_no_conclusion() {
        let (mut machine, image) = constants();
        for page in 0..4 {
            machine.poke_virt(CONSTANT_TEXT + page * 4096, &[0x55; 4096]);
        }
        assert!(compare(&image, machine.phys()).overwhelmed);
    }

    #[test]
    fn a_damaged_table_hides_no_damaged_text() {
        let (mut machine, image) = constants();
        // The table now names the place where text is damaged.
        let own = CONSTANT_DATA + 4;
        let far = ((CONSTANT_TEXT + 0x520).0.wrapping_sub(own.0) as i32).to_le_bytes();
        machine.poke_virt(own, &far);
        machine.poke_virt(CONSTANT_TEXT + 0x520, &[0x91]);
        let found = compare(&image, machine.phys());
        assert!(found.damage.iter().any(|piece| piece.at == CONSTANT_TEXT + 0x520));
        assert!(found.damage.iter().any(|piece| piece.kind == PageKind::ReadOnlyData));
    }

    /// Whether text at this offset may be rewritten.
    fn is_site(offset: u64) -> bool {
        let sites = [(LABEL, 5), (SHORT_LABEL, 2), (STATIC_CALL, 5), (TRACED, 5)];
        sites.iter().any(|&(start, len)| (start..start + len).contains(&offset))
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_found_and_its_repair_puts_it_back(
            region in 0usize..4, offset in 0u64..2 * 4096, bit in 0u8..8,
        ) {
            let starts =
                [CONSTANT_TEXT, CONSTANT_DATA, CONSTANT_MODULE, CONSTANT_MODULE + 2 * 4096];
            let at = starts[region] + offset;
            prop_assume!(region == 1 || region == 3 || !is_site(offset));
            let (mut machine, image) = constants();
            let was = machine.space().read_u8(at).unwrap();
            let is = was ^ 1 << bit;
            prop_assume!(is != 0xcc);
            machine.poke_virt(at, &[is]);
            let found = compare(&image, machine.phys());
            prop_assert_eq!(found.damage.len(), 1);
            let piece = &found.damage[0];
            prop_assert_eq!((piece.at, piece.flipped_bits()), (at, 1));
            prop_assert_eq!((&piece.found[..], &piece.expected[..]), (&[is][..], &[was][..]));
            if region == 0 {
                prop_assert_eq!(piece.offset, offset % FUNCTION);
            }
            let (at, expected) = (piece.at, piece.expected.clone());
            machine.poke_virt(at, &expected);
            prop_assert!(compare(&image, machine.phys()).damage.is_empty());
        }

        #[test]
        fn bytes_anywhere_are_damage_or_patched_never_both(
            pokes in proptest::collection::vec((0u64..16 * 4096, any::<u8>()), 0..60),
        ) {
            let (mut machine, image) = constants();
            let (before, _) = constants();
            let mut changed = 0;
            for (offset, byte) in &pokes {
                machine.poke_virt(CONSTANT_TEXT + (offset & 0x3fff), &[*byte]);
            }
            for offset in 0..4 * 4096 {
                let at = CONSTANT_TEXT + offset;
                changed += usize::from(machine.space().read_u8(at) != before.space().read_u8(at));
            }
            let found = compare(&image, machine.phys());
            let damaged: usize = found.damage.iter().map(|piece| piece.expected.len()).sum();
            prop_assert_eq!(damaged + found.patched.len(), changed);
            prop_assert!(found.damage.windows(2).all(|pair| pair[0].range().end <= pair[1].at));
        }
    }
}
