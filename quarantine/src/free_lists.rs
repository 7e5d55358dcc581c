//! Whether the lists of free objects are whole of the slabs that the crashed call has to do with: those that its words
//! point into, and those that its CPU would take the next objects from. Reads only. A CPU that was stopped in the
//! allocator has left them whole: what is changed in more than one step is no slab for `slab.rs`.

use std::collections::BTreeMap;

use guest::GuestVirt;

use crate::Reason;
use crate::guest_struct::Structures;
use crate::invariants::{Current, same};
use crate::slab::{Cache, Head, Slab, Slabs};

/// Slabs that are looked at, and free objects of all of them: some hundred microseconds' worth.
const SLABS_MAX: usize = 128;
const OBJECTS_MAX: usize = 8192;

/// Refuses when a list leads elsewhere than to free objects of its slab, or to one twice, or when a slab counts more or
/// fewer. What can't be read is not held against it: a dump has not all pages.
pub(crate) fn check(
    kernel: &Structures<'_>,
    current: Current,
    in_hand: &[GuestVirt],
) -> Result<(), Reason> {
    let Some(slabs) = Slabs::of(*kernel) else { return Ok(()) };
    let mut look = Look { slabs, caches: BTreeMap::new(), touched: BTreeMap::new() };
    look.hold(in_hand)?;
    look.take_from(current);
    look.all()
}

struct Look<'a> {
    slabs: Slabs<'a>,
    /// By address.
    caches: BTreeMap<GuestVirt, Cache>,
    /// By the address of their `struct slab`.
    touched: BTreeMap<GuestVirt, Slab>,
}

impl Look<'_> {
    /// The slabs that words point into, and the caches of these; a word may also be the address of a cache.
    fn hold(&mut self, in_hand: &[GuestVirt]) -> Result<(), Reason> {
        for &word in in_hand {
            let Some(slab) = self.slabs.around(word) else { continue };
            if self.slabs.holds_caches(&slab) {
                self.know(word);
            }
            if self.touched.contains_key(&slab.at) || self.touched.len() >= SLABS_MAX {
                continue;
            }
            if !self.know(slab.cache) {
                return Err(Reason::BrokenSlab { at: slab.at, cache: slab.cache });
            }
            self.touched.insert(slab.at, slab);
        }
        Ok(())
    }

    /// Reads the cache at an address, unless it can't be told whether there is one. `false`: there is none.
    fn know(&mut self, at: GuestVirt) -> bool {
        if self.caches.contains_key(&at) {
            return true;
        }
        match self.slabs.is_cache(at) {
            Some(true) => self.caches.extend(self.slabs.cache(at).map(|cache| (at, cache))),
            Some(false) => return false,
            None => {}
        }
        true
    }

    /// The slabs that the CPU takes objects of these caches from.
    fn take_from(&mut self, current: Current) {
        let Some(cpu) = current.cpu else { return };
        for cache in self.caches.values() {
            self.touched.extend(self.slabs.current(cache, cpu).map(|slab| (slab.at, slab)));
        }
    }

    fn all(&self) -> Result<(), Reason> {
        let mut left = OBJECTS_MAX;
        for slab in self.touched.values() {
            let cache = self.caches.get(&slab.cache);
            let Some(cache) = cache.filter(|cache| slab.has_room(cache)) else { continue };
            self.slab(slab, cache, &mut left)?;
        }
        Ok(())
    }

    fn slab(&self, slab: &Slab, cache: &Cache, left: &mut usize) -> Result<(), Reason> {
        let mut walk = Walk { look: self, slab, cache, met: vec![false; slab.objects as usize] };
        let own = self.slabs.own_list(slab);
        let listed = own.map(|head| walk.list(head, left)).transpose()?.flatten();
        let on_cpu = self.slabs.cpu_list(slab, cache);
        on_cpu.map(|head| walk.list(head, left)).transpose()?;
        // One that is new is handed to a CPU with all its objects in three steps (`___slab_alloc()`).
        let all = slab.objects;
        match listed {
            Some(listed) if !(listed == all && slab.inuse == all) => {
                let counted = slab.objects.wrapping_sub(slab.inuse);
                same("a slab's count of free objects", slab.at, counted, listed)
            }
            _ => Ok(()),
        }
    }
}

/// The lists of one slab.
struct Walk<'a> {
    look: &'a Look<'a>,
    slab: &'a Slab,
    cache: &'a Cache,
    /// Objects that were met on either list, by number.
    met: Vec<bool>,
}

impl Walk<'_> {
    /// Follows a list; says how many objects are on it, `None` when not all of it was seen.
    fn list(&mut self, mut head: Head, left: &mut usize) -> Result<Option<u64>, Reason> {
        let mut count = 0;
        while head.first != 0 {
            let index = self.slab.index(self.cache, head.first);
            let met = index.and_then(|index| self.met.get_mut(index as usize));
            if met.is_none_or(|met| std::mem::replace(met, true)) {
                return Err(self.broken(head));
            }
            count += 1;
            *left = left.saturating_sub(1);
            let after = self.look.slabs.after(self.cache, head.first).filter(|_| *left > 0);
            let Some(after) = after else { return Ok(None) };
            head = after;
        }
        Ok(Some(count))
    }

    fn broken(&self, head: Head) -> Reason {
        let name = self.look.slabs.name(self.slab.cache);
        Reason::BrokenFreeList {
            cache: name.unwrap_or_else(|| "unnamed".to_owned()),
            at: head.at,
            found: head.first,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::slabs::{Heap, OBJECTS, SIZE};
    use crate::testing::{DATA, Scene};

    fn check(scene: &Scene, in_hand: &[GuestVirt]) -> Result<(), Reason> {
        let memory = scene.machine.space();
        let kernel = Structures { image: &scene.image, memory: &memory };
        super::check(&kernel, Current { task: scene.task, cpu: Some(0) }, in_hand)
    }

    fn broken(found: Result<(), Reason>) -> (String, GuestVirt, u64) {
        match found {
            Err(Reason::BrokenFreeList { cache, at, found }) => (cache, at, found),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn whole_lists_pass_whatever_is_in_hand() {
        let (scene, heap) = Heap::new();
        assert_eq!(check(&scene, &heap.addresses()), Ok(()));
        assert_eq!(check(&scene, &[heap.object(0), GuestVirt(0), GuestVirt(u64::MAX)]), Ok(()));
    }

    #[test]
    fn an_overwritten_link_is_found_from_any_object_of_the_slab() {
        let (mut scene, heap) = Heap::new();
        let link = heap.link(3);
        scene.poke_word(link, 0x5a5a_5a5a_5a5a_5a5a);
        for held in [heap.object(0), heap.object(3) + SIZE / 2] {
            let (cache, at, found) = broken(check(&scene, &[held]));
            assert_eq!((cache.as_str(), at), ("toys", link));
            assert_eq!(found, heap.decoded(link, 0x5a5a_5a5a_5a5a_5a5a));
        }
        assert_eq!(check(&scene, &[heap.cache_object()]), Ok(()), "another cache's");
    }

    #[test]
    fn a_link_into_the_midst_of_an_object_is_none() {
        let (mut scene, heap) = Heap::new();
        heap.set_link(&mut scene, 3, (heap.object(5) + 8).0);
        assert_eq!(broken(check(&scene, &[heap.object(0)])).2, (heap.object(5) + 8).0);
        heap.set_link(&mut scene, 3, heap.object(OBJECTS).0);
        assert_eq!(broken(check(&scene, &[heap.object(0)])).2, heap.object(OBJECTS).0);
    }

    #[test]
    fn an_object_that_is_free_twice_is_found_on_one_list_and_on_two() {
        let (mut scene, heap) = Heap::new();
        heap.set_link(&mut scene, 5, heap.object(3).0);
        assert_eq!(broken(check(&scene, &[heap.object(0)])).1, heap.link(5));
        let (mut scene, heap) = Heap::new();
        heap.set_cpu_list(&mut scene, heap.object(5).0);
        assert!(check(&scene, &[heap.object(0)]).is_err());
    }

    #[test]
    fn the_list_of_the_cpu_counts_while_it_has_the_slab() {
        let (mut scene, heap) = Heap::new();
        heap.set_cpu_list(&mut scene, 0x10);
        assert_eq!(broken(check(&scene, &[heap.object(0)])).2, 0x10);
        assert_eq!(broken(check(&scene, &[heap.cache])).2, 0x10, "the cache alone leads there");
        heap.set_cpu_slab(&mut scene, GuestVirt(0));
        assert_eq!(check(&scene, &[heap.object(0)]), Ok(()), "it is being given back");
    }

    #[test]
    fn a_count_must_agree_but_where_a_new_slab_is_handed_out() {
        let (mut scene, heap) = Heap::new();
        heap.set_inuse(&mut scene, OBJECTS - 1);
        let found = check(&scene, &[heap.object(0)]);
        assert!(matches!(found, Err(Reason::Broken { found: 1, expected: 2, .. })), "{found:?}");
        heap.set_inuse(&mut scene, OBJECTS + 1);
        assert!(check(&scene, &[heap.object(0)]).is_err());
        heap.set_inuse(&mut scene, 0);
        scene.poke_word(heap.link(3), 1);
        assert_eq!(check(&scene, &[heap.object(0)]), Ok(()), "it is being made");
        let (mut scene, heap) = Heap::new();
        heap.free_all(&mut scene);
        heap.set_inuse(&mut scene, OBJECTS);
        assert_eq!(check(&scene, &[heap.object(0)]), Ok(()), "three steps");
    }

    #[test]
    fn a_slab_names_a_cache() {
        let (mut scene, heap) = Heap::new();
        heap.set_cache(&mut scene, GuestVirt(0x5a5a));
        let found = check(&scene, &[heap.object(0)]);
        assert!(matches!(found, Err(Reason::BrokenSlab { cache: GuestVirt(0x5a5a), .. })));
        // Where it might be one it can't be told.
        heap.set_cache(&mut scene, heap.other_page());
        assert_eq!(check(&scene, &[heap.object(0)]), Ok(()));
    }

    proptest! {
        #[test]
        fn hostile_heaps_never_panic(
            words in proptest::collection::vec((any::<u16>(), any::<u64>(), 0_u8..3), 1..24),
            variables in proptest::collection::vec((0_u64..5, any::<u64>()), 0..2),
        ) {
            let (mut scene, heap) = Heap::new();
            let addresses = heap.addresses();
            for (slot, value, kind) in words {
                let near = addresses[value as usize % addresses.len()];
                let value = [value, near.0, value & 0xffff][usize::from(kind)];
                scene.poke_word(addresses[usize::from(slot) % addresses.len()], value);
            }
            for (index, value) in variables {
                scene.poke_word(DATA + 0xcc0 + index * 8, value);
            }
            let _ = check(&scene, &addresses);
        }
    }
}
