//! A heap for the fake kernel: one slab of a driver's objects that a CPU has, and the slab that all caches come from. No
//! test itself.

use guest::fake::PageSize;
use guest::{GuestPhys, GuestVirt};

use super::{DATA, PER_CPU, Scene};

/// Objects of the driver's slab, and bytes of one.
pub(crate) const OBJECTS: u64 = 14;
pub(crate) const SIZE: u64 = 0x200;
/// Where all memory of the heap is mapped: two pages of objects, one of caches, one with the `struct page`s.
const DIRECT: GuestVirt = GuestVirt(0xffff_9000_0000_0000);
const PAGES: GuestVirt = GuestVirt(DIRECT.0 + 0x3000);
const PAGE_SIZE: u64 = 0x40;
/// Where in an object the link is, and what it is mixed with.
const LINK: u64 = 0xf8;
const SECRET: u64 = 0x1234_5678_9abc_def0;
/// Per-CPU parts of the two caches.
const CPU_SLAB: u64 = 0x300;
const OTHER_CPU_SLAB: u64 = 0x340;
/// The flag of a page that is a slab.
const FLAGS: u64 = 1 << 5;

/// The heap.
pub(crate) struct Heap {
    /// The driver's cache.
    pub(crate) cache: GuestVirt,
    /// The `struct slab` of its objects.
    pub(crate) slab: GuestVirt,
}

impl Heap {
    /// Objects 3 and 5 are free, in this order; 7 is on the CPU's list; the others are in use.
    pub(crate) fn new() -> (Scene, Self) {
        let mut scene = Scene::new();
        for page in 0..4 {
            let at = GuestPhys(0x15_0000 + page * 4096);
            scene.machine.map(DIRECT + page * 4096, at, PageSize::Size4K);
        }
        let heap = Self { cache: DIRECT + 0x2100, slab: PAGES };
        for (variable, value) in
            [(0xcc0, DIRECT.0), (0xcc8, PAGES.0), (0xcd0, 4), (0xcd8, heap.cache_object().0)]
        {
            scene.poke_word(DATA + variable, value);
        }
        heap.add_caches(&mut scene);
        heap.add_slabs(&mut scene);
        (scene, heap)
    }

    fn add_caches(&self, scene: &mut Scene) {
        scene.machine.poke_virt(PAGES + 0x800, b"toys\0");
        for (cache, size, cpu_slab) in
            [(self.cache_object(), 0x100, OTHER_CPU_SLAB), (self.cache, SIZE, CPU_SLAB)]
        {
            scene.set_member("kmem_cache", "size", cache, size);
            scene.set_member("kmem_cache", "offset", cache, LINK);
            scene.set_member("kmem_cache", "random", cache, SECRET);
            scene.set_member("kmem_cache", "cpu_slab", cache, cpu_slab);
            scene.set_member("kmem_cache", "name", cache, (PAGES + 0x800).0);
        }
    }

    fn add_slabs(&self, scene: &mut Scene) {
        let second = PAGES + PAGE_SIZE;
        scene.set_member("page", "compound_head", second, PAGES.0 | 1);
        let caches = PAGES + PAGE_SIZE * 2;
        for (slab, cache, objects, inuse) in
            [(self.slab, self.cache, OBJECTS, OBJECTS - 2), (caches, self.cache_object(), 2, 2)]
        {
            scene.set_member("page", "flags", slab, FLAGS);
            scene.set_member("slab", "slab_cache", slab, cache.0);
            scene.set_member("slab", "objects", slab, objects);
            scene.set_member("slab", "inuse", slab, inuse);
        }
        scene.set_member("slab", "freelist", self.slab, self.object(3).0);
        scene.set_member("slab", "frozen", self.slab, 1);
        self.set_link(scene, 3, self.object(5).0);
        self.set_link(scene, 5, 0);
        self.set_link(scene, 7, 0);
        self.set_cpu_slab(scene, self.slab);
        self.set_cpu_list(scene, self.object(7).0);
    }

    /// The object with that number.
    pub(crate) fn object(&self, number: u64) -> GuestVirt {
        DIRECT + number * SIZE
    }

    /// The cache of all caches.
    pub(crate) fn cache_object(&self) -> GuestVirt {
        DIRECT + 0x2000
    }

    /// A page that is none of a slab.
    pub(crate) fn other_page(&self) -> GuestVirt {
        PAGES + 0x900
    }

    /// All addresses of the heap that could be a pointer's.
    pub(crate) fn addresses(&self) -> Vec<GuestVirt> {
        (0..0x4000).step_by(8).map(|offset| DIRECT + offset).collect()
    }

    /// Where an object's link is.
    pub(crate) fn link(&self, number: u64) -> GuestVirt {
        self.object(number) + LINK
    }

    /// What a link leads to that holds a word, and the word of one that leads there.
    pub(crate) fn decoded(&self, link: GuestVirt, word: u64) -> u64 {
        word ^ SECRET ^ link.0.swap_bytes()
    }

    pub(crate) fn set_link(&self, scene: &mut Scene, number: u64, to: u64) {
        let link = self.link(number);
        scene.poke_word(link, self.decoded(link, to));
    }

    /// The CPU's list begins there.
    pub(crate) fn set_cpu_list(&self, scene: &mut Scene, first: u64) {
        scene.set_member("kmem_cache_cpu", "freelist", PER_CPU + CPU_SLAB, first);
    }

    /// The CPU has that slab.
    pub(crate) fn set_cpu_slab(&self, scene: &mut Scene, slab: GuestVirt) {
        scene.set_member("kmem_cache_cpu", "slab", PER_CPU + CPU_SLAB, slab.0);
    }

    pub(crate) fn set_inuse(&self, scene: &mut Scene, inuse: u64) {
        scene.set_member("slab", "inuse", self.slab, inuse);
    }

    /// The slab names that cache.
    pub(crate) fn set_cache(&self, scene: &mut Scene, cache: GuestVirt) {
        scene.set_member("slab", "slab_cache", self.slab, cache.0);
    }

    /// The driver's cache is that of buffers.
    pub(crate) fn holds_buffers(&self, scene: &mut Scene) {
        scene.poke_word(DATA + 0xce8, self.cache.0);
    }

    /// All objects are on the slab's own list, and no CPU has it.
    pub(crate) fn free_all(&self, scene: &mut Scene) {
        for number in 0..OBJECTS {
            let next = if number + 1 < OBJECTS { self.object(number + 1).0 } else { 0 };
            self.set_link(scene, number, next);
        }
        scene.set_member("slab", "freelist", self.slab, self.object(0).0);
        self.set_cpu_slab(scene, GuestVirt(0));
    }
}
