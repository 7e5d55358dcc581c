//! Requests that a block driver has taken and not ended when it is quarantined: nobody else would end them, and who waits
//! for a block of a disk waits for ever. Requests that it is still to be given fail by its entry.

use std::collections::{BTreeSet, HashSet};

use guest::GuestVirt;
use repair_image::Module;

use crate::Reason;
use crate::action::Action;
use crate::bus_master::{self, Hardware};
use crate::guest_struct::Structures;
use crate::plan::Situation;
use crate::{in_hand, occupants};

/// `BLK_STS_IOERR`, include/linux/blk_types.h (a macro).
const BLK_STS_IOERR: u64 = 10;
/// Disks that are looked at at most.
const DISKS_MAX: usize = 4096;
/// Queues of one disk's hardware that are looked at at most.
const HARDWARE_QUEUES_MAX: u64 = 1024;
/// Requests of one such queue at most (`BLK_MQ_MAX_DEPTH`, include/linux/blk-mq.h).
const REQUESTS_MAX: u64 = 10240;
/// Requests that are ended at most.
const ENDED_MAX: usize = 24;

/// The calls that end the driver's requests with an I/O error, and let queues go on that it had stopped. None of them while
/// somebody else is inside the driver, who may be about to end a request himself; nor for a request that the crashed
/// call has in hand, which its caller may end. Who waited may give the request's memory to others at once: the hardware
/// must have no way to it any more. What is left is noted.
pub(crate) fn end(
    situation: &Situation<'_>,
    module: &Module,
    notes: &mut Vec<String>,
) -> Vec<Action> {
    let structures = Structures { image: situation.image, memory: situation.memory };
    let taken = match taken(&structures, module) {
        Ok(taken) => taken,
        Err(reason) => {
            notes.push(format!("requests to {} were not looked for: {reason}", module.name));
            return Vec::new();
        }
    };
    if taken.is_empty() {
        return Vec::new();
    }
    let in_hand = in_hand::words(situation);
    let (own, others): (Vec<Request>, _) =
        taken.into_iter().partition(|request| in_hand.contains(&request.at.0));
    if !own.is_empty() {
        notes.push(format!(
            "{} requests that the crashed call has in hand are left alone",
            own.len()
        ));
    }
    if others.is_empty() {
        return Vec::new();
    }
    calls(situation, module, &others).unwrap_or_else(|why| {
        notes.push(format!("{} requests to {} never end: {why}", others.len(), module.name));
        Vec::new()
    })
}

/// The calls for these requests, or why there can be none.
fn calls(
    situation: &Situation<'_>,
    module: &Module,
    requests: &[Request],
) -> Result<Vec<Action>, String> {
    if requests.len() > ENDED_MAX {
        return Err("they are too many".to_owned());
    }
    if let Some(occupant) = occupants::first(situation, module) {
        return Err(format!("{occupant} is inside the driver and may hold one"));
    }
    let structures = Structures { image: situation.image, memory: situation.memory };
    let mut calls = silence(&structures, requests)?;
    calls.extend(endings(&structures, requests));
    Ok(calls)
}

/// The calls after which no hardware touches the requests' memory. What it does at this moment has an end too: a hypervisor that
/// has stopped its vCPUs waits for the I/O of the devices that it emulates before it does anything else (QEMU:
/// `do_vm_stop()`, softmmu/cpus.c).
fn silence(structures: &Structures<'_>, requests: &[Request]) -> Result<Vec<Action>, String> {
    let unknown = || "its hardware may still be using their memory".to_owned();
    let devices: BTreeSet<GuestVirt> = requests.iter().map(|request| request.device).collect();
    let mut calls = Vec::new();
    for device in devices {
        match bus_master::behind(structures, device).map_err(|reason| reason.to_string())? {
            Hardware::None => {}
            Hardware::Pci(function) => {
                calls.push(bus_master::take_away(structures, function).ok_or_else(unknown)?);
            }
            Hardware::Unknown => return Err(unknown()),
        }
    }
    Ok(calls)
}

/// `blk_mq_end_request()` may be called in any context, as drivers do from their interrupts; a queue is then run by a work
/// item (`async`).
fn endings(structures: &Structures<'_>, requests: &[Request]) -> Vec<Action> {
    let call = |function: &str, arguments: Vec<u64>, why: &str| {
        Some(Action::CallGuest {
            function: function.to_owned(),
            at: structures.image.address_of(function)?,
            arguments,
            expected: Vec::new(),
            why: why.to_owned(),
        })
    };
    let queues: BTreeSet<GuestVirt> = requests.iter().map(|request| request.queue).collect();
    let ended = requests.iter().filter_map(|request| {
        let why = "a request that the driver has taken and would never end";
        call("blk_mq_end_request", vec![request.at.0, BLK_STS_IOERR], why)
    });
    let started = queues.into_iter().filter_map(|queue| {
        let why = "a queue that the driver may have stopped";
        call("blk_mq_start_stopped_hw_queues", vec![queue.0, 1], why)
    });
    ended.chain(started).collect()
}

/// A request that the driver has started and not completed, guest-virtual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    at: GuestVirt,
    queue: GuestVirt,
    /// The disk's `struct device`.
    device: GuestVirt,
}

/// A disk of the driver's, guest-virtual.
#[derive(Clone, Copy)]
struct Disk {
    queue: GuestVirt,
    device: GuestVirt,
}

/// All requests that the driver has taken, of all its disks.
fn taken(structures: &Structures<'_>, module: &Module) -> Result<Vec<Request>, Reason> {
    let mut found = Vec::new();
    // Every disk has an entry there (mm/backing-dev.c).
    let Some(all) = structures.image.address_of("bdi_list") else { return Ok(found) };
    for entry in structures.list(all, ("backing_dev_info", "bdi_list"), DISKS_MAX)? {
        if let Some(disk) = disk_of(structures, module, entry)? {
            started(structures, disk, &mut found)?;
        }
    }
    Ok(found)
}

/// The disk of that entry, if the driver takes its requests. One whose requests another driver hands on (a SCSI disk's)
/// is not looked at: that one may yet end them.
fn disk_of(
    structures: &Structures<'_>,
    module: &Module,
    entry: GuestVirt,
) -> Result<Option<Disk>, Reason> {
    // Network file systems have an entry, too, and no device.
    let device = GuestVirt(structures.need(entry, "backing_dev_info", "owner")?);
    if !device.is_kernel_half() {
        return Ok(None);
    }
    let inside = structures.need_at(GuestVirt(0), "block_device", "bd_device")?;
    let block = GuestVirt(device.0.wrapping_sub(inside.0));
    let disk = GuestVirt(structures.need(block, "block_device", "bd_disk")?);
    if structures.need(disk, "gendisk", "part0")? != block.0 {
        return Err(Reason::Inconsistent { what: format!("no disk has the device at {block:#x}") });
    }
    let queue = GuestVirt(structures.need(block, "block_device", "bd_queue")?);
    let operations = GuestVirt(structures.need(queue, "request_queue", "mq_ops")?);
    let has_requests = structures.need(queue, "request_queue", "tag_set")? != 0;
    Ok((module.contains(operations) && has_requests).then_some(Disk { queue, device }))
}

/// Requests of a queue that its driver has started and not completed.
fn started(
    structures: &Structures<'_>,
    disk: Disk,
    found: &mut Vec<Request>,
) -> Result<(), Reason> {
    let in_flight = structures.image.types.enumerator("MQ_RQ_IN_FLIGHT");
    let in_flight = in_flight.ok_or_else(|| Reason::MissingMember {
        structure: "mq_rq_state".to_owned(),
        path: "MQ_RQ_IN_FLIGHT".to_owned(),
    })?;
    let Disk { queue, device } = disk;
    let set = GuestVirt(structures.need(queue, "request_queue", "tag_set")?);
    let queues = structures.need(set, "blk_mq_tag_set", "nr_hw_queues")?.min(HARDWARE_QUEUES_MAX);
    let first = GuestVirt(structures.need(set, "blk_mq_tag_set", "tags")?);
    let mut met = HashSet::new();
    for index in 0..queues {
        let tags = word(structures, first + index * 8)?;
        // Queues may share their tags.
        if !tags.is_kernel_half() || !met.insert(tags) {
            continue;
        }
        let count = structures.need(tags, "blk_mq_tags", "nr_tags")?.min(REQUESTS_MAX);
        let requests = GuestVirt(structures.need(tags, "blk_mq_tags", "rqs")?);
        for tag in 0..count {
            let at = word(structures, requests + tag * 8)?;
            if !at.is_kernel_half() || structures.need(at, "request", "q")? != queue.0 {
                continue;
            }
            let state = structures.need(at, "request", "state")?;
            if state == in_flight.cast_unsigned() && met.insert(at) {
                found.push(Request { at, queue, device });
            }
        }
    }
    Ok(())
}

fn word(structures: &Structures<'_>, at: GuestVirt) -> Result<GuestVirt, Reason> {
    let unreadable = |_| Reason::Unreadable { what: "tags of requests".to_owned(), at };
    structures.memory.read_u64(at).map(GuestVirt).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, MODULE_DATA, Scene};

    /// A disk with these operations, and its requests.
    fn disk(operations: GuestVirt) -> (Scene, [GuestVirt; 3]) {
        let mut scene = Scene::new();
        let requests = scene.add_disk(operations);
        (scene, requests)
    }

    fn look<T>(scene: &Scene, look: impl Fn(&Situation<'_>, &Module) -> T) -> T {
        let (space, diagnosis) = (scene.machine.space(), scene.diagnosis());
        let situation =
            Situation { diagnosis: &diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        look(&situation, &scene.image.modules[0])
    }

    fn found(scene: &Scene) -> Result<Vec<GuestVirt>, Reason> {
        look(scene, |situation, module| {
            let structures = Structures { image: situation.image, memory: situation.memory };
            Ok(taken(&structures, module)?.iter().map(|request| request.at).collect())
        })
    }

    #[test]
    fn only_what_the_driver_has_started_is_found() {
        let (mut scene, [first, second, idle]) = disk(MODULE_DATA + 0x40);
        assert_eq!(found(&scene), Ok(vec![first, second]));
        scene.set_member("request", "state", second, 2);
        scene.set_member("request", "q", idle, DATA.0);
        assert_eq!(found(&scene), Ok(vec![first]));
        assert_eq!(found(&disk(DATA).0), Ok(Vec::new()), "another driver's disk");
    }

    #[test]
    fn each_is_ended_once_and_its_queue_goes_on() {
        let (scene, _) = disk(MODULE_DATA + 0x40);
        let calls = look(&scene, |situation, module| {
            let structures = Structures { image: situation.image, memory: situation.memory };
            let taken = taken(&structures, module).unwrap();
            assert!(silence(&structures, &taken).unwrap().is_empty(), "no hardware");
            endings(&structures, &taken)
        });
        let names: Vec<_> = calls
            .iter()
            .map(|action| match action {
                Action::CallGuest { function, arguments, .. } => (function.as_str(), arguments[1]),
                other => panic!("{other}"),
            })
            .collect();
        let ended = ("blk_mq_end_request", BLK_STS_IOERR);
        assert_eq!(names, [ended, ended, ("blk_mq_start_stopped_hw_queues", 1)]);
    }

    #[test]
    fn hardware_is_silenced_first_or_nothing_is_ended() {
        let (mut scene, _) = disk(MODULE_DATA + 0x40);
        let silenced = |scene: &Scene| {
            look(scene, |situation, module| {
                let structures = Structures { image: situation.image, memory: situation.memory };
                silence(&structures, &taken(&structures, module).unwrap())
            })
        };
        for (bus, expected) in [("pci", true), ("usb", false)] {
            let hardware = scene.add_devices(&[Some(bus)])[0];
            scene.set_member("device", "parent", scene.disk_device(), hardware.0);
            let silenced = silenced(&scene).map(|calls| calls.len());
            assert_eq!(silenced.ok(), expected.then_some(1), "{bus}");
        }
    }

    #[test]
    fn nothing_is_ended_while_somebody_may_be_inside() {
        let (mut scene, requests) = disk(MODULE_DATA + 0x40);
        let noted = |scene: &Scene| {
            look(scene, |situation, module| {
                let mut notes = Vec::new();
                assert!(end(situation, module, &mut notes).is_empty());
                notes.join("; ")
            })
        };
        // The fake kernel has no list of tasks.
        assert!(noted(&scene).contains("2 requests to toy never end: somebody"));
        for request in requests {
            scene.set_member("request", "state", request, 0);
        }
        assert_eq!(noted(&scene), "");
    }

    #[test]
    fn a_list_of_disks_that_does_not_end_is_noted() {
        let (mut scene, _) = disk(MODULE_DATA + 0x40);
        let entry = GuestVirt(scene.image.address_of("bdi_list").unwrap().0);
        let first = scene.machine.space();
        let first = guest::VirtMemory::read_u64(&first, entry + 8).unwrap();
        scene.set_member("list_head", "next", GuestVirt(first), first);
        assert!(found(&scene).is_err());
    }
}
