//! The network devices of a driver that is quarantined, and the calls that unplug them: users see a card without a
//! link, and packets for it are dropped by the network core. What else a driver has under way is `activity.rs`'s.

use guest::GuestVirt;
use repair_image::Module;

use crate::Reason;
use crate::action::Action;
use crate::guest_struct::Structures;

/// Network namespaces that are looked at at most.
const NAMESPACES_MAX: usize = 4096;
/// Network devices that are looked at at most.
const DEVICES_MAX: usize = 1 << 14;
/// Devices that are unplugged at most.
const UNPLUGGED_MAX: usize = 8;
/// The kernel's own way to let go of a device, in this order (net/core/dev.c, net/sched/sch_generic.c). The first
/// marks it absent, so that it can't be opened or asked any more, and stops its queues; it only sets bits. The second
/// reports the link lost: a work item then takes the device's queueing discipline away, which frees what waits there.
/// Both may be called in any context.
const UNPLUG: [&str; 2] = ["netif_device_detach", "netif_carrier_off"];

/// The calls for each device that the driver serves. What can't be found is noted: the entry that sends packets fails
/// by itself, it only loses them one by one.
pub(crate) fn unplug(
    structures: &Structures<'_>,
    module: &Module,
    notes: &mut Vec<String>,
) -> Vec<Action> {
    let devices = match devices(structures, module) {
        Ok(devices) => devices,
        Err(reason) => {
            notes.push(format!("network devices of {} were not looked for: {reason}", module.name));
            return Vec::new();
        }
    };
    if devices.len() > UNPLUGGED_MAX {
        notes.push(format!("{} network devices of the driver stay plugged in", devices.len()));
        return Vec::new();
    }
    let calls = |device: GuestVirt| {
        UNPLUG.into_iter().filter_map(move |function| {
            Some(Action::CallGuest {
                function: function.to_owned(),
                at: structures.image.address_of(function)?,
                arguments: vec![device.0],
                expected: Vec::new(),
                why: "a network device of the driver".to_owned(),
            })
        })
    };
    devices.into_iter().flat_map(calls).collect()
}

/// Devices of all network namespaces whose operations lie in the module.
fn devices(structures: &Structures<'_>, module: &Module) -> Result<Vec<GuestVirt>, Reason> {
    let mut found = Vec::new();
    // A kernel without networking has none.
    let Some(namespaces) = structures.image.address_of("net_namespace_list") else {
        return Ok(found);
    };
    let mut left = DEVICES_MAX;
    for namespace in structures.list(namespaces, ("net", "list"), NAMESPACES_MAX)? {
        let head = structures.need_at(namespace, "net", "dev_base_head")?;
        let all = structures.list(head, ("net_device", "dev_list"), left)?;
        left -= all.len();
        for device in all {
            let operations = structures.need(device, "net_device", "netdev_ops")?;
            if module.contains(GuestVirt(operations)) {
                found.push(device);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MODULE_DATA, Scene};

    fn unplugged(scene: &Scene) -> (Vec<(String, u64)>, Vec<String>) {
        let space = scene.machine.space();
        let structures = Structures { image: &scene.image, memory: &space };
        let mut notes = Vec::new();
        let calls = unplug(&structures, &scene.image.modules[0], &mut notes)
            .into_iter()
            .map(|action| match action {
                Action::CallGuest { function, arguments, .. } => (function, arguments[0]),
                other => panic!("{other}"),
            })
            .collect();
        (calls, notes)
    }

    #[test]
    fn the_drivers_own_devices_lose_their_link() {
        let mut scene = Scene::new();
        let [own, _] = scene.add_network([MODULE_DATA + 0x40, crate::testing::DATA]);
        let (calls, notes) = unplugged(&scene);
        let expected = UNPLUG.map(|function| (function.to_owned(), own.0));
        assert_eq!((calls.as_slice(), notes.len()), (expected.as_slice(), 0));
    }

    #[test]
    fn a_list_that_does_not_end_is_noted() {
        let mut scene = Scene::new();
        let [first, second] = scene.add_network([MODULE_DATA + 0x40, MODULE_DATA + 0x40]);
        let link = scene.image.types.member("net_device", "dev_list").unwrap().offset;
        scene.set_member("list_head", "next", second + link, first.0 + link);
        let (calls, notes) = unplugged(&scene);
        assert!(calls.is_empty());
        assert!(notes[0].contains("does not end"), "{notes:?}");
    }
}
