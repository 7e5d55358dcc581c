//! Slabs as SLUB keeps them (mm/slub.c): which one an address lies in, of which cache it is, where its lists of free objects
//! begin and how they are linked. Reads only; whether they are whole is `free_lists.rs`'s. What can't be read, or
//! isn't known of a kernel, is no slab.

use guest::GuestVirt;
use repair_image::Member;

use crate::guest_struct::Structures;
use crate::page_map::{PAGE, PageMap, flag};

/// Most bytes of a slab: `MAX_ORDER` is 10 (include/linux/mmzone.h).
const BYTES_MAX: u64 = PAGE << 10;
/// Bits of a page's type below its kind (`page_type_has_type()`, include/linux/page-flags.h).
const TYPE_SHIFT: u32 = 24;

/// How a kernel keeps its slabs.
pub(crate) struct Slabs<'a> {
    kernel: Structures<'a>,
    /// Where all memory is mapped, one to one.
    direct: GuestVirt,
    pages: PageMap<'a>,
    mark: Mark,
    slab: SlabMembers,
    cache: CacheMembers,
    /// The cache that all caches come from.
    caches: GuestVirt,
}

/// What tells a slab from other pages.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Mark {
    /// A page flag, before commit 46df8e73a4a3 ("mm: free up PG_slab", v6.10).
    Flag(u64),
    /// A kind of page, since commit 4ffca5a96678 ("mm: support only one page_type per page", v6.12). In between it is
    /// a bit of the type that is clear, which is not known here.
    Kind(Member, u64),
}

/// `struct slab`: since commit d122019bf061 ("mm: Split slab into its own type", v5.17).
struct SlabMembers {
    cache: Member,
    freelist: Member,
    inuse: Member,
    objects: Member,
    frozen: Member,
}

/// `struct kmem_cache` and `struct kmem_cache_cpu`.
struct CacheMembers {
    size: Member,
    offset: Member,
    name: Member,
    /// Only with CONFIG_SLAB_FREELIST_HARDENED.
    random: Option<Member>,
    cpu_slab: Member,
    cpu_freelist: Member,
    cpu_page: Member,
}

/// A slab with objects in use, as its `struct slab` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slab {
    /// Its `struct slab`, guest-virtual, and its first object.
    pub(crate) at: GuestVirt,
    pub(crate) base: GuestVirt,
    pub(crate) cache: GuestVirt,
    pub(crate) objects: u64,
    /// Objects that are not on its own list of free ones: in use, or on a CPU's list.
    pub(crate) inuse: u64,
    /// A CPU has it, which takes and gives objects by a list of its own.
    frozen: bool,
}

/// A slab cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cache {
    /// Bytes from one object to the next.
    pub(crate) size: u64,
    /// Where in a free object the address of the next one is.
    offset: u64,
    /// What that address is mixed with.
    secret: Option<u64>,
    /// Its per-CPU part, as an offset.
    cpu_slab: u64,
}

/// The start of a list of free objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The word with the address of the first.
    pub(crate) at: GuestVirt,
    pub(crate) first: u64,
}

impl<'a> Slabs<'a> {
    /// `None` for a kernel with another allocator, and while SLUB's own debugging is on: it changes slabs in several
    /// steps then (`alloc_single_from_partial()`), and looks at them itself.
    pub(crate) fn of(kernel: Structures<'a>) -> Option<Self> {
        let image = kernel.image;
        let word = |symbol| kernel.memory.read_u64(image.address_of(symbol)?).ok();
        // The count of a `struct static_key` is its first member (include/linux/jump_label.h).
        let debugged = image.address_of("slub_debug_enabled");
        if debugged.is_some_and(|at| kernel.memory.read_uint(at, 4) != Ok(0)) {
            return None;
        }
        Some(Self {
            kernel,
            // Variables since v4.8 (CONFIG_RANDOMIZE_MEMORY); without, nothing is looked at.
            direct: GuestVirt(word("page_offset_base")?),
            pages: PageMap::of(kernel)?,
            mark: Mark::of(&kernel)?,
            slab: SlabMembers::of(&kernel)?,
            cache: CacheMembers::of(&kernel)?,
            caches: GuestVirt(word("kmem_cache")?),
        })
    }

    /// The slab that an address lies in. `None` for one that has no object in use: it is being made or given back,
    /// not in one step.
    pub(crate) fn around(&self, at: GuestVirt) -> Option<Slab> {
        self.at(self.pages.head(at.0.checked_sub(self.direct.0)? / PAGE)?)
    }

    /// The slab with that `struct slab`, which is that of its first page.
    fn at(&self, at: GuestVirt) -> Option<Slab> {
        let number = self.pages.number(at)?;
        if !self.is_slab(at)? {
            return None;
        }
        let value = |member| self.kernel.value(at, member);
        let slab = Slab {
            at,
            base: self.direct + number.wrapping_mul(PAGE),
            cache: GuestVirt(value(&self.slab.cache)?),
            objects: value(&self.slab.objects)?,
            inuse: value(&self.slab.inuse)?,
            frozen: value(&self.slab.frozen)? != 0,
        };
        (slab.inuse != 0).then_some(slab)
    }

    /// Whether it is one, and not locked: processors without `cmpxchg16b` change it so (`slab_lock()`).
    fn is_slab(&self, page: GuestVirt) -> Option<bool> {
        let flags = self.pages.flags(page)?;
        let marked = match &self.mark {
            Mark::Flag(flag) => flags & flag != 0,
            Mark::Kind(member, kind) => self.kernel.value(page, member)? >> TYPE_SHIFT == *kind,
        };
        Some(marked && !self.pages.is_locked(flags))
    }

    /// The cache at an address, if what it says of its objects can be.
    pub(crate) fn cache(&self, at: GuestVirt) -> Option<Cache> {
        let value = |member| self.kernel.value(at, member);
        let secret = match &self.cache.random {
            Some(random) => Some(value(random)?),
            None => None,
        };
        let cache = Cache {
            size: value(&self.cache.size)?,
            offset: value(&self.cache.offset)?,
            secret,
            cpu_slab: value(&self.cache.cpu_slab)?,
        };
        (cache.offset.checked_add(8)? <= cache.size).then_some(cache)
    }

    /// Whether a cache is at an address; `None` where that can't be told.
    pub(crate) fn is_cache(&self, at: GuestVirt) -> Option<bool> {
        if at - self.direct >= self.pages.count().saturating_mul(PAGE) {
            return Some(false);
        }
        let slab = self.around(at)?;
        let own = self.cache(self.caches)?;
        Some(self.holds_caches(&slab) && slab.index(&own, at.0).is_some())
    }

    /// Whether a slab's objects are caches.
    pub(crate) fn holds_caches(&self, slab: &Slab) -> bool {
        slab.cache == self.caches
    }

    /// A cache's name.
    pub(crate) fn name(&self, cache: GuestVirt) -> Option<String> {
        let at = GuestVirt(self.kernel.value(cache, &self.cache.name)?);
        let name = self.kernel.memory.read_cstr(at, 64).ok()?;
        name.bytes().all(|byte| byte.is_ascii_graphic()).then_some(name)
    }

    /// The slab that a CPU takes a cache's objects from.
    pub(crate) fn current(&self, cache: &Cache, cpu: usize) -> Option<Slab> {
        let at = self.on_cpu(cache, *self.kernel.image.placement.per_cpu.get(cpu)?);
        self.at(GuestVirt(self.kernel.value(at, &self.cache.cpu_page)?))
    }

    fn on_cpu(&self, cache: &Cache, base: u64) -> GuestVirt {
        GuestVirt(base.wrapping_add(cache.cpu_slab))
    }

    /// The slab's own list of free objects. It and the counts are changed in one step (`slab_update_freelist()`).
    pub(crate) fn own_list(&self, slab: &Slab) -> Option<Head> {
        self.list(slab.at, &self.slab.freelist)
    }

    /// The list of the CPU that has the slab. A CPU that takes another one has emptied its list before.
    pub(crate) fn cpu_list(&self, slab: &Slab, cache: &Cache) -> Option<Head> {
        let mut parts =
            self.kernel.image.placement.per_cpu.iter().map(|&base| self.on_cpu(cache, base));
        let has =
            |part: &GuestVirt| self.kernel.value(*part, &self.cache.cpu_page) == Some(slab.at.0);
        let part = if slab.frozen { parts.find(has)? } else { return None };
        self.list(part, &self.cache.cpu_freelist)
    }

    fn list(&self, at: GuestVirt, member: &Member) -> Option<Head> {
        Some(Head { at: at + member.offset, first: self.kernel.value(at, member)? })
    }

    /// What follows a free object on its list. Hardened since commit 2482ddec670f ("mm: add SLUB free list pointer
    /// obfuscation", v4.14), with the place's bytes swapped since 1ad53d9fa3f6 ("slub: improve bit diffusion for
    /// freelist ptr obfuscation", v5.7).
    pub(crate) fn after(&self, cache: &Cache, object: u64) -> Option<Head> {
        let at = GuestVirt(object.wrapping_add(cache.offset));
        let word = self.kernel.memory.read_u64(at).ok()?;
        let first = cache.secret.map_or(word, |secret| word ^ secret ^ at.0.swap_bytes());
        Some(Head { at, first })
    }
}

impl Slab {
    /// The object that an address lies in.
    pub(crate) fn object_around(&self, cache: &Cache, at: GuestVirt) -> Option<GuestVirt> {
        let index = at.0.checked_sub(self.base.0)?.checked_div(cache.size)?;
        (index < self.objects).then(|| self.base + index.wrapping_mul(cache.size))
    }

    /// Number of the object that begins at an address.
    pub(crate) fn index(&self, cache: &Cache, at: u64) -> Option<u64> {
        let offset = at.checked_sub(self.base.0)?;
        let index = offset.checked_div(cache.size)?;
        (index < self.objects && offset % cache.size == 0).then_some(index)
    }

    /// Whether that many objects of the cache's find room in a slab.
    pub(crate) fn has_room(&self, cache: &Cache) -> bool {
        self.objects.saturating_mul(cache.size) <= BYTES_MAX
    }
}

impl Mark {
    fn of(kernel: &Structures<'_>) -> Option<Self> {
        let types = &kernel.image.types;
        if let Some(kind) = types.enumerator("PGTY_slab") {
            return Some(Self::Kind(types.member("page", "page_type")?, u64::try_from(kind).ok()?));
        }
        flag(types.enumerator("PG_slab")?).map(Self::Flag)
    }
}

impl SlabMembers {
    fn of(kernel: &Structures<'_>) -> Option<Self> {
        let member = |path| kernel.image.types.member("slab", path);
        Some(Self {
            cache: member("slab_cache")?,
            freelist: member("freelist")?,
            inuse: member("inuse")?,
            objects: member("objects")?,
            frozen: member("frozen")?,
        })
    }
}

impl CacheMembers {
    fn of(kernel: &Structures<'_>) -> Option<Self> {
        let member = |path| kernel.image.types.member("kmem_cache", path);
        let on_cpu = |path| kernel.image.types.member("kmem_cache_cpu", path);
        Some(Self {
            size: member("size")?,
            offset: member("offset")?,
            name: member("name")?,
            random: member("random"),
            cpu_slab: member("cpu_slab")?,
            cpu_freelist: on_cpu("freelist")?,
            cpu_page: on_cpu("slab")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::slabs::Heap;
    use crate::testing::{DATA, FakeTypes, Scene};

    fn around(scene: &Scene, at: GuestVirt) -> Option<Slab> {
        let memory = scene.machine.space();
        Slabs::of(Structures { image: &scene.image, memory: &memory })?.around(at)
    }

    #[test]
    fn every_page_of_a_slab_leads_to_its_first() {
        let (scene, heap) = Heap::new();
        let slab = around(&scene, heap.object(0)).unwrap();
        assert_eq!((slab.at, slab.base, slab.cache), (heap.slab, heap.object(0), heap.cache));
        assert_eq!(around(&scene, heap.object(13)), Some(slab), "on its second page");
        for none in [heap.other_page(), heap.object(0).offset(-1), DATA, GuestVirt(u64::MAX)] {
            assert_eq!(around(&scene, none), None, "{none}");
        }
    }

    #[test]
    fn a_locked_slab_and_one_without_objects_in_use_are_none() {
        let (mut scene, heap) = Heap::new();
        scene.set_member("page", "flags", heap.slab, 1 << 5 | 1 << 3);
        assert_eq!(around(&scene, heap.object(0)), None);
        let (mut scene, heap) = Heap::new();
        heap.set_inuse(&mut scene, 0);
        assert_eq!(around(&scene, heap.object(0)), None);
    }

    #[test]
    fn a_slab_is_a_flag_up_to_6_9_and_a_kind_of_page_since_6_12() {
        let (mut scene, heap) = Heap::new();
        let types = FakeTypes::linux().with_enumerator("PGTY_slab", 0xf5);
        scene.image.types = Arc::new(types);
        assert_eq!(around(&scene, heap.object(0)), None);
        scene.set_member("page", "page_type", heap.slab, 0xf500_0000);
        scene.set_member("page", "flags", heap.slab, 0);
        assert!(around(&scene, heap.object(0)).is_some());
        // In between, PG_slab was a bit of the type.
        let types = FakeTypes::linux().with_enumerator("PG_slab", 0x0400_0000);
        scene.image.types = Arc::new(types);
        assert_eq!(around(&scene, heap.object(0)), None);
    }

    #[test]
    fn nothing_is_a_slab_while_slub_is_debugged_or_where_there_is_no_slub() {
        let (mut scene, heap) = Heap::new();
        scene.poke_word(DATA + 0xce0, 1);
        assert_eq!(around(&scene, heap.object(0)), None);
        assert_eq!(around(&Scene::new(), heap.object(0)), None);
    }

    #[test]
    fn a_link_is_plain_or_mixed_with_its_place() {
        let (mut scene, heap) = Heap::new();
        let memory = scene.machine.space();
        let slabs = Slabs::of(Structures { image: &scene.image, memory: &memory }).unwrap();
        let hardened = slabs.cache(heap.cache).unwrap();
        assert_eq!(slabs.after(&hardened, heap.object(3).0).unwrap().first, heap.object(5).0);
        scene.poke_word(heap.link(3), heap.object(9).0);
        let memory = scene.machine.space();
        let slabs = Slabs::of(Structures { image: &scene.image, memory: &memory }).unwrap();
        let plain = Cache { secret: None, ..hardened };
        assert_eq!(slabs.after(&plain, heap.object(3).0).unwrap().first, heap.object(9).0);
    }
}
