//! The kernel's array of all `struct page`: which page an address means, and what its flags say. Reads only; knows no
//! allocator.

use guest::GuestVirt;
use repair_image::Member;

use crate::guest_struct::Structures;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Bit 0 of `page.compound_head`: the rest leads to the first page of several (include/linux/page-flags.h).
const TAIL: u64 = 1;

/// The array, which has no holes in its addresses (CONFIG_SPARSEMEM_VMEMMAP, the only way on x86-64).
pub(crate) struct PageMap<'a> {
    kernel: Structures<'a>,
    /// Its first `struct page`, their number, and the size of one.
    start: GuestVirt,
    count: u64,
    size: u64,
    head: Member,
    flags: Member,
    locked: u64,
}

impl<'a> PageMap<'a> {
    /// `None` where the array's place is no variable: without CONFIG_RANDOMIZE_MEMORY (v4.8).
    pub(crate) fn of(kernel: Structures<'a>) -> Option<Self> {
        let types = &kernel.image.types;
        let word = |symbol| kernel.memory.read_u64(kernel.image.address_of(symbol)?).ok();
        Some(Self {
            kernel,
            start: GuestVirt(word("vmemmap_base")?),
            count: word("max_pfn")?,
            size: types.size_of("page").filter(|&size| size > 0)?,
            head: types.member("page", "compound_head")?,
            flags: types.member("page", "flags")?,
            locked: flag(types.enumerator("PG_locked")?)?,
        })
    }

    /// Number of pages.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The `struct page` of a page, or of the first of several that belong together; by the page's number.
    pub(crate) fn head(&self, number: u64) -> Option<GuestVirt> {
        if number >= self.count {
            return None;
        }
        let page = self.start + number.wrapping_mul(self.size);
        let head = self.kernel.value(page, &self.head)?;
        Some(if head & TAIL == 0 { page } else { GuestVirt(head & !TAIL) })
    }

    /// Number of the page whose `struct page` an address lies in.
    pub(crate) fn number_around(&self, at: GuestVirt) -> Option<u64> {
        let number = at.0.checked_sub(self.start.0)?.checked_div(self.size)?;
        (number < self.count).then_some(number)
    }

    /// Number of the page whose `struct page` begins at an address.
    pub(crate) fn number(&self, at: GuestVirt) -> Option<u64> {
        let number = self.number_around(at)?;
        (self.start + number.wrapping_mul(self.size) == at).then_some(number)
    }

    /// Flags of a `struct page`.
    pub(crate) fn flags(&self, page: GuestVirt) -> Option<u64> {
        self.kernel.value(page, &self.flags)
    }

    /// Whether these flags have `PG_locked`. All bits are what was never set up (`PAGE_POISON_PATTERN`).
    pub(crate) fn is_locked(&self, flags: u64) -> bool {
        flags & self.locked != 0 && flags != u64::MAX
    }
}

/// The mask of a flag with that number.
pub(crate) fn flag(number: i64) -> Option<u64> {
    1_u64.checked_shl(u32::try_from(number).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;
    use crate::testing::slabs::Heap;

    #[test]
    fn pages_by_number_and_by_address() {
        let (scene, heap) = Heap::new();
        let memory = scene.machine.space();
        let map = PageMap::of(Structures { image: &scene.image, memory: &memory }).unwrap();
        assert_eq!((map.count(), map.number(heap.slab)), (4, Some(0)));
        assert_eq!(map.head(1), Some(heap.slab), "the second of two");
        assert_eq!(map.head(4), None);
        let inside = heap.slab + 0x48;
        assert_eq!((map.number(inside), map.number_around(inside)), (None, Some(1)));
        for beyond in [heap.slab.offset(-1), heap.slab + 0x100, GuestVirt(u64::MAX)] {
            assert_eq!(map.number_around(beyond), None, "{beyond}");
        }
        assert!(map.is_locked(1 << 3) && !map.is_locked(1 << 5) && !map.is_locked(u64::MAX));
    }

    #[test]
    fn a_kernel_whose_array_is_not_known_has_none() {
        let mut scene = Scene::new();
        scene.image.types = std::sync::Arc::new(crate::testing::FakeTypes::default());
        let memory = scene.machine.space();
        assert!(PageMap::of(Structures { image: &scene.image, memory: &memory }).is_none());
    }
}
