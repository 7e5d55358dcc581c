//! Whether the guest's memory management goes on: dirty pages get written, zones get unlocked. Readings only; how long
//! one may last is `probation.rs`'s.

use std::time::Duration;

use guest::GuestVirt;

use crate::guest_struct::Structures;

/// Nodes that are looked at; most guests have one.
const NODES: u64 = 16;
/// Zones of a node that are looked at; `MAX_NR_ZONES` is 4 to 6 (include/linux/mmzone.h).
const ZONES: u64 = 8;
/// Bytes of a counter (`atomic_long_t`) and of a pointer.
const WORD: u64 = 8;
/// Pages under writeback and none that was written for so long is suspect. The per-CPU parts of the counters are
/// folded into these every second or two (`vmstat_update()`, mm/vmstat.c).
const WRITEBACK_GAP: Duration = Duration::from_secs(8);
/// A zone found locked by each of at least [`LOCKED_LOOKS`] looks for so long is suspect: it is held for microseconds.
const LOCKED_GAP: Duration = Duration::from_secs(4);
const LOCKED_LOOKS: u32 = 16;

/// One reading; `None` where this kernel has no such variable or it could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Pages that are being written.
    under_way: Option<u64>,
    /// Pages that were written since boot.
    written: Option<u64>,
    /// Zones whose lock is taken.
    locked: Vec<GuestVirt>,
}

/// Takes a reading.
pub(crate) fn read(kernel: &Structures<'_>) -> Reading {
    Reading {
        under_way: counter(kernel, "NR_WRITEBACK"),
        written: counter(kernel, "NR_WRITTEN"),
        locked: locked(kernel),
    }
}

/// A counter of all nodes (`vm_node_stat`, mm/vmstat.c; `enum node_stat_item`).
fn counter(kernel: &Structures<'_>, item: &str) -> Option<u64> {
    let index = u64::try_from(kernel.image.types.enumerator(item)?).ok()?;
    let counters = kernel.image.address_of("vm_node_stat")?;
    kernel.memory.read_u64(counters + index.checked_mul(WORD)?).ok()
}

fn locked(kernel: &Structures<'_>) -> Vec<GuestVirt> {
    let mut locked = Vec::new();
    for zone in zones(kernel).unwrap_or_default() {
        let lock = kernel.member_at(zone, "zone", "lock");
        if lock.is_some_and(|lock| kernel.memory.read_uint(lock, 4).is_ok_and(|word| word != 0)) {
            locked.push(zone);
        }
    }
    locked
}

/// The zones of all nodes: of `node_data` with CONFIG_NUMA, else there is no such symbol and nothing is looked at.
fn zones(kernel: &Structures<'_>) -> Option<Vec<GuestVirt>> {
    let nodes = kernel.image.address_of("node_data")?;
    let size = kernel.image.types.size_of("zone")?;
    let mut zones = Vec::new();
    for index in 0..NODES {
        let node = GuestVirt(kernel.memory.read_u64(nodes + index * WORD).ok()?);
        if !node.is_kernel_half() {
            break;
        }
        let count = kernel.number(node, "pglist_data", "nr_zones").ok()??.min(ZONES);
        let first = kernel.member_at(node, "pglist_data", "node_zones")?;
        zones.extend((0..count).map(|zone| first + zone.saturating_mul(size)));
    }
    Some(zones)
}

/// What a guest's readings have come to.
#[derive(Clone, Debug)]
pub(crate) struct History {
    last: Reading,
    /// Time when a page was last seen written, or none had to be.
    written: Duration,
    /// Time since which the zones in `last.locked` have been found locked, and by how many looks.
    free: Duration,
    looks: u32,
}

impl History {
    pub(crate) fn start(first: Reading, now: Duration) -> Self {
        Self { last: first, written: now, free: now, looks: 0 }
    }

    /// Takes another reading; says what is suspect.
    pub(crate) fn take(&mut self, mut reading: Reading, now: Duration) -> Option<String> {
        if reading.under_way.is_none_or(|pages| pages == 0) || reading.written != self.last.written
        {
            self.written = now;
        }
        let again = |zone: &GuestVirt| self.last.locked.contains(zone);
        if self.looks > 0 && reading.locked.iter().any(again) {
            reading.locked.retain(|zone| self.last.locked.contains(zone));
            self.looks += 1;
        } else {
            self.free = now;
            self.looks = u32::from(!reading.locked.is_empty());
        }
        self.last = reading;
        self.judge(now)
    }

    fn judge(&self, now: Duration) -> Option<String> {
        let gap = now.saturating_sub(self.written);
        if gap >= WRITEBACK_GAP {
            let pages = self.last.under_way.unwrap_or(0);
            let gap = gap.as_secs();
            return Some(format!("{pages} pages under writeback, and none written for {gap} s"));
        }
        let gap = now.saturating_sub(self.free);
        if self.looks >= LOCKED_LOOKS && gap >= LOCKED_GAP {
            let zone = self.last.locked.first()?;
            return Some(format!("the zone at {zone} has been locked for {} s", gap.as_secs()));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    const SECOND: Duration = Duration::from_secs(1);

    fn reading(under_way: u64, written: u64, locked: &[u64]) -> Reading {
        let locked = locked.iter().map(|&zone| GuestVirt(zone)).collect();
        Reading { under_way: Some(under_way), written: Some(written), locked }
    }

    #[test]
    fn writeback_that_stands_is_suspect_and_a_slow_one_is_not() {
        let mut history = History::start(reading(5, 100, &[]), Duration::ZERO);
        assert_eq!(history.take(reading(5, 100, &[]), SECOND * 7), None);
        assert_eq!(history.take(reading(5, 101, &[]), SECOND * 8), None);
        assert_eq!(history.take(reading(5, 101, &[]), SECOND * 15), None);
        assert!(history.take(reading(5, 101, &[]), SECOND * 16).unwrap().contains("5 pages"));
        assert_eq!(history.take(reading(0, 101, &[]), SECOND * 17), None, "nothing to write");
    }

    #[test]
    fn only_a_zone_that_every_look_finds_locked_is_suspect() {
        let run = |locked: &dyn Fn(u32) -> Vec<u64>, looks: u32| {
            let mut history = History::start(reading(0, 0, &[]), Duration::ZERO);
            (1..=looks)
                .filter_map(|look| history.take(reading(0, 0, &locked(look)), SECOND / 2 * look))
                .last()
        };
        assert_eq!(run(&|_| vec![0x10, 0x20], 15), None, "too few looks");
        assert!(run(&|_| vec![0x10, 0x20], 16).is_some());
        assert_eq!(run(&|look| vec![u64::from(look)], 40), None, "another one each time");
        assert_eq!(run(&|look| if look % 10 == 0 { vec![] } else { vec![1] }, 40), None);
    }

    #[test]
    fn zones_and_counters_are_found_in_memory() {
        let mut scene = Scene::new();
        let zone = scene.add_zone(40, 7);
        let read = |scene: &Scene| {
            let memory = scene.machine.space();
            read(&Structures { image: &scene.image, memory: &memory })
        };
        assert_eq!(read(&scene), reading(7, 40, &[]));
        scene.set_member("zone", "lock", zone, 1);
        assert_eq!(read(&scene).locked, [zone]);
        scene.set_member("pglist_data", "nr_zones", scene.node(), 0xffff_ffff);
        assert!(read(&scene).locked.len() <= 8);
    }
}
