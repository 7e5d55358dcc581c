//! Locks that are one bit of a word, a page's (`PG_locked`) and a buffer's (`BH_Lock`): no owner is written anywhere, and
//! they are taken inline. So what is abandoned must not have in hand what is locked. Reads only; locks that
//! functions take are `locks.rs`'s.

use guest::GuestVirt;
use repair_image::TypeShape;

use crate::guest_struct::Structures;
use crate::page_map::{PageMap, flag};
use crate::plan::Situation;
use crate::slab::Slabs;
use crate::{Reason, Rung, in_hand};

/// Refuses when a call that the rung abandons has a locked page or buffer in hand: it may have locked it itself, and
/// nobody would unlock it. A request of a disk's has locked pages under way, and is ended by the status that its driver
/// returns.
pub(crate) fn check(situation: &Situation<'_>, rung: Rung) -> Result<(), Reason> {
    if rung != Rung::QuarantineProcess && returns_block_status(situation) {
        return Ok(());
    }
    let kernel = Structures { image: situation.image, memory: situation.memory };
    let Some(pages) = PageMap::of(kernel) else { return Ok(()) };
    let words = in_hand::addresses_before(situation, abandoned(situation, rung));
    if let Some(at) = words.iter().find_map(|&word| locked_page(&pages, word)) {
        return Err(Reason::BitLocked { what: "page", at });
    }
    let buffers = Buffers::of(kernel, &pages);
    let locked = buffers.and_then(|all| words.iter().find_map(|&word| all.locked(word)));
    locked.map_or(Ok(()), |at| Err(Reason::BitLocked { what: "buffer", at }))
}

/// Index of the frame that is gone on in, or one further out: which of several calls of the core's is failed is not
/// decided yet.
fn abandoned(situation: &Situation<'_>, rung: Rung) -> usize {
    let diagnosis = situation.diagnosis;
    let boundary = diagnosis.boundary.as_ref().map(|boundary| boundary.frame);
    let exit = || diagnosis.core_exits.iter().map(|exit| exit.frame).max();
    let gone_on = if rung == Rung::QuarantineProcess { None } else { boundary.or_else(exit) };
    gone_on.unwrap_or(diagnosis.frames.len())
}

fn returns_block_status(situation: &Situation<'_>) -> bool {
    let boundary = situation.diagnosis.boundary.as_ref();
    let returns = boundary.and_then(|it| it.prototype.as_ref()).map(|it| &it.returns);
    matches!(returns, Some(TypeShape::Int { name, .. }) if name == "blk_status_t")
}

/// The locked page, or the first of several that are locked together, whose `struct page` a word points into.
fn locked_page(pages: &PageMap<'_>, word: GuestVirt) -> Option<GuestVirt> {
    let head = pages.head(pages.number_around(word)?)?;
    pages.is_locked(pages.flags(head)?).then_some(head)
}

/// How buffers are told from other memory.
struct Buffers<'a> {
    kernel: Structures<'a>,
    slabs: Slabs<'a>,
    pages: &'a PageMap<'a>,
    /// The cache that they come from.
    cache: GuestVirt,
    locked: u64,
}

impl<'a> Buffers<'a> {
    fn of(kernel: Structures<'a>, pages: &'a PageMap<'a>) -> Option<Self> {
        let cache = kernel.memory.read_u64(kernel.image.address_of("bh_cachep")?).ok()?;
        Some(Self {
            kernel,
            slabs: Slabs::of(kernel)?,
            pages,
            cache: GuestVirt(cache),
            locked: flag(kernel.image.types.enumerator("BH_Lock")?)?,
        })
    }

    /// The locked buffer that a word points into. Others' objects may come from the same cache (`slab_nomerge` is not the
    /// default): a buffer has a page.
    fn locked(&self, word: GuestVirt) -> Option<GuestVirt> {
        let slab = self.slabs.around(word).filter(|slab| slab.cache == self.cache)?;
        let at = slab.object_around(&self.slabs.cache(slab.cache)?, word)?;
        let member = |path| self.kernel.number(at, "buffer_head", path).ok().flatten();
        self.pages.number(GuestVirt(member("b_page")?))?;
        (member("b_state")? & self.locked != 0).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use diagnose::Diagnosis;
    use guest::Reg;

    use super::*;
    use crate::testing::slabs::Heap;
    use crate::testing::{Scene, int, prototype};

    const LOCKED: u64 = 1 << 3;

    /// A crash whose driver has a word in a register, and what is said of it.
    fn said(scene: &Scene, word: GuestVirt, rung: Rung) -> Result<(), Reason> {
        let mut diagnosis = scene.diagnosis();
        diagnosis.frames[1].registers.set(Reg::Rbx, word.0);
        of(scene, &diagnosis, rung)
    }

    fn of(scene: &Scene, diagnosis: &Diagnosis, rung: Rung) -> Result<(), Reason> {
        let memory = scene.machine.space();
        check(&Situation { diagnosis, image: &scene.image, memory: &memory, vcpus: &[] }, rung)
    }

    #[test]
    fn a_locked_page_in_hand_is_not_abandoned() {
        let (mut scene, heap) = Heap::new();
        let tail = heap.slab + 0x48;
        assert_eq!(said(&scene, tail, Rung::ReturnError), Ok(()));
        scene.set_member("page", "flags", heap.slab, LOCKED);
        let locked = Err(Reason::BitLocked { what: "page", at: heap.slab });
        assert_eq!(said(&scene, tail, Rung::ReturnError), locked);
        assert_eq!(said(&scene, heap.other_page(), Rung::ReturnError), Ok(()));
    }

    #[test]
    fn a_process_that_ends_abandons_the_core_s_calls_too() {
        let (mut scene, heap) = Heap::new();
        scene.set_member("page", "flags", heap.slab, LOCKED);
        let mut diagnosis = scene.diagnosis();
        diagnosis.frames.last_mut().unwrap().registers.set(Reg::Rbx, heap.slab.0);
        assert_eq!(of(&scene, &diagnosis, Rung::ReturnError), Ok(()));
        let ended = of(&scene, &diagnosis, Rung::QuarantineProcess);
        assert!(matches!(ended, Err(Reason::BitLocked { what: "page", .. })), "{ended:?}");
    }

    #[test]
    fn a_disk_s_request_ends_with_its_status() {
        let (mut scene, heap) = Heap::new();
        scene.set_member("page", "flags", heap.slab, LOCKED);
        let mut diagnosis = scene.diagnosis();
        diagnosis.frames[1].registers.set(Reg::Rbx, heap.slab.0);
        let status = prototype(int("blk_status_t", 1, false));
        diagnosis.boundary.as_mut().unwrap().prototype = Some(status);
        assert_eq!(of(&scene, &diagnosis, Rung::ReturnError), Ok(()));
        assert!(of(&scene, &diagnosis, Rung::QuarantineProcess).is_err());
    }

    #[test]
    fn a_locked_buffer_is_one_only_if_it_is_a_buffer() {
        let (mut scene, heap) = Heap::new();
        let buffer = heap.object(2);
        let word = buffer + 0x20;
        scene.set_member("buffer_head", "b_state", buffer, 1 << 2);
        scene.set_member("buffer_head", "b_page", buffer, heap.slab.0);
        assert_eq!(said(&scene, word, Rung::ReturnError), Ok(()), "of another cache");
        heap.holds_buffers(&mut scene);
        let locked = Err(Reason::BitLocked { what: "buffer", at: buffer });
        assert_eq!(said(&scene, word, Rung::ReturnError), locked);
        scene.set_member("buffer_head", "b_page", buffer, 0);
        assert_eq!(said(&scene, word, Rung::ReturnError), Ok(()), "no buffer");
        scene.set_member("buffer_head", "b_page", buffer, heap.slab.0);
        scene.set_member("buffer_head", "b_state", buffer, 1);
        assert_eq!(said(&scene, word, Rung::ReturnError), Ok(()), "not locked");
    }
}
