//! Whether the list that the kernel's own check has found broken (lib/list_debug.c) is one that others go on with:
//! returning an error mends no list. Reads only. Lists of the driver's own, and those of memory that was handed out,
//! are its business: `strikes.rs` counts how often it breaks them.

use diagnose::state::newest;
use diagnose::{CrashClass, Offender};
use guest::GuestVirt;

use crate::Reason;
use crate::guest_struct::Structures;
use crate::plan::Situation;

/// Records of the kernel log in which the check's own is looked for: it is followed by those of the crash.
const RECORDS_MAX: u64 = 16;

/// Refuses when the broken list runs through memory of the kernel's own or of another driver.
pub(crate) fn check(situation: &Situation<'_>) -> Result<(), Reason> {
    if situation.diagnosis.class != Some(CrashClass::ListCorruption) {
        return Ok(());
    }
    let log = newest(situation.image, situation.memory, RECORDS_MAX);
    let records = log.map(|log| log.records).unwrap_or_default();
    let link = records.iter().rev().find_map(|record| Link::told(&record.text));
    link.map_or(Ok(()), |link| link.check(situation))
}

/// A link of a list that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    /// The `struct list_head` that it is in.
    of: GuestVirt,
    path: &'static str,
    /// That which it should lead to.
    to: GuestVirt,
}

impl Link {
    /// The link that a record of the kernel log tells of: `list_del corruption. next->prev should be E, but was X.
    /// (next=N)`, with addresses as they are since commit 68c1f08203f2 ("lib/list_debug.c: print unmangled
    /// addresses", v4.18). Of an entry that is not on a list it says other things.
    fn told(text: &str) -> Option<Self> {
        let told = ["list_add corruption. ", "list_del corruption. "];
        let rest = told.iter().find_map(|head| text.strip_prefix(head))?;
        let path = ["prev", "next"].into_iter().find(|path| {
            let link = rest.split_once(" should be").and_then(|(link, _)| link.split_once("->"));
            link.is_some_and(|(_, member)| member == *path)
        })?;
        let digits = rest.split(|c: char| !c.is_ascii_hexdigit()).filter(|word| word.len() == 16);
        let addresses: Vec<u64> =
            digits.filter_map(|word| u64::from_str_radix(word, 16).ok()).collect();
        let [to, _, of] = *addresses.as_slice() else { return None };
        Some(Self { of: GuestVirt(of), path, to: GuestVirt(to) })
    }

    fn check(&self, situation: &Situation<'_>) -> Result<(), Reason> {
        let kernel = Structures { image: situation.image, memory: situation.memory };
        let others = [self.of, self.to].into_iter().filter(|&node| is_others(situation, node));
        let broken = others.filter_map(|node| is_whole(&kernel, node)).any(|whole| !whole);
        if !broken {
            return Ok(());
        }
        Err(Reason::Broken {
            what: "a list outside the driver",
            at: kernel.need_at(self.of, "list_head", self.path)?,
            found: kernel.need(self.of, "list_head", self.path)?,
            expected: self.to.0,
        })
    }
}

/// Whether an address is one of the core kernel's variables, a CPU's among them, or lies in a driver that is not at
/// fault.
fn is_others(situation: &Situation<'_>, at: GuestVirt) -> bool {
    let image = situation.image;
    let own = match &situation.diagnosis.offender {
        Some(Offender::Driver { module, .. }) => Some(module),
        _ => None,
    };
    if let Some(module) = image.modules.iter().find(|module| module.contains(at)) {
        return Some(&module.name) != own;
    }
    let within = |start: Option<GuestVirt>, end: Option<GuestVirt>| {
        start.zip(end).is_some_and(|(start, end)| (start..end).contains(&at))
    };
    within(image.address_of("_sdata"), image.address_of("_end"))
        || (0..image.placement.per_cpu.len()).any(|cpu| {
            within(image.per_cpu("__per_cpu_start", cpu), image.per_cpu("__per_cpu_end", cpu))
        })
}

/// Whether both neighbours of a `struct list_head` lead back to it; `None` when they can't be read.
fn is_whole(kernel: &Structures<'_>, node: GuestVirt) -> Option<bool> {
    for (onward, back) in [("next", "prev"), ("prev", "next")] {
        let other = GuestVirt(kernel.number(node, "list_head", onward).ok()??);
        if !other.is_kernel_half() {
            return Some(false);
        }
        if kernel.number(other, "list_head", back).ok()?? != node.0 {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, MODULE_DATA, Scene};

    /// A ring of three: one of the kernel's own, two that were handed out.
    const OWN: GuestVirt = GuestVirt(DATA.0 + 0x2800);
    const RING: [GuestVirt; 3] = [OWN, GuestVirt(DATA.0 + 0x3800), GuestVirt(DATA.0 + 0x3820)];

    fn ring() -> Scene {
        let mut scene = Scene::new();
        for (at, next) in RING.into_iter().zip(RING.into_iter().cycle().skip(1)) {
            scene.set_member("list_head", "next", at, next.0);
            scene.set_member("list_head", "prev", next, at.0);
        }
        scene
    }

    fn check(scene: &Scene, link: Link) -> Result<(), Reason> {
        let (memory, diagnosis) = (scene.machine.space(), scene.diagnosis());
        let image = &scene.image;
        link.check(&Situation { diagnosis: &diagnosis, image, memory: &memory, vcpus: &[] })
    }

    #[test]
    fn the_kernel_says_which_link_it_is() {
        let told = |text: &str| Link::told(text).map(|link| (link.of.0, link.path, link.to.0));
        let add = "list_add corruption. next->prev should be prev (ffffffff834099c0), but was \
                   ffff888001234568. (next=ffff888001234560).";
        let found = Some((0xffff_8880_0123_4560, "prev", 0xffff_ffff_8340_99c0));
        assert_eq!(told(add), found);
        let delete = "list_del corruption. prev->next should be ffff888001234560, but was \
                      0000000000000000. (prev=ffffffff834099c0)";
        let found = Some((0xffff_ffff_8340_99c0, "next", 0xffff_8880_0123_4560));
        assert_eq!(told(delete), found);
        for other in [
            "list_del corruption, ffff888001234560->next is LIST_POISON1 (dead000000000100)",
            "list_add double add: new=ffff888001234560, prev=ffff888001234560, next=ffffffff834099c0.",
            // Before v5.18 it did not say of which.
            "list_del corruption. prev->next should be ffff888001234560, but was 0000000000000000",
            "list_add corruption. prev is NULL.",
            "",
        ] {
            assert_eq!(told(other), None, "{other}");
        }
    }

    #[test]
    fn a_broken_list_of_the_kernels_own_is_refused_from_both_sides() {
        let mut scene = ring();
        let link = Link { of: RING[1], path: "prev", to: OWN };
        assert_eq!(check(&scene, link), Ok(()), "it is whole: what was to be added was wrong");
        scene.set_member("list_head", "prev", RING[1], RING[1].0);
        let broken = check(&scene, link);
        assert!(matches!(broken, Err(Reason::Broken { expected, .. }) if expected == OWN.0));
        let mut scene = ring();
        scene.set_member("list_head", "next", OWN, 0x5a5a);
        let link = Link { of: OWN, path: "next", to: RING[1] };
        assert!(matches!(check(&scene, link), Err(Reason::Broken { found: 0x5a5a, .. })));
    }

    #[test]
    fn other_lists_are_the_drivers_business() {
        let mut scene = ring();
        scene.set_member("list_head", "prev", RING[2], 0x5a5a);
        assert_eq!(check(&scene, Link { of: RING[2], path: "prev", to: RING[1] }), Ok(()));
        let own = Link { of: MODULE_DATA + 0x40, path: "next", to: RING[1] };
        assert_eq!(check(&scene, own), Ok(()), "of its own module");
        scene.image.modules[0].name = "other".to_owned();
        assert!(check(&scene, own).is_err());
    }
}
