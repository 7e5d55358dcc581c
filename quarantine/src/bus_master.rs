//! The hardware behind a device of a quarantined driver, and the call that keeps it from reading or writing guest memory by
//! itself. Whether that is needed is its caller's to know.

use guest::GuestVirt;

use crate::Reason;
use crate::action::Action;
use crate::guest_struct::Structures;

/// Devices above one another that are looked at at most.
const LEVELS_MAX: usize = 8;

/// What moves the data of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hardware {
    /// None: the device is the driver's invention.
    None,
    /// A PCI function of its own: its `struct pci_dev`, guest-virtual.
    Pci(GuestVirt),
    /// Another, or one that serves others too.
    Unknown,
}

/// What is behind a `struct device`, guest-virtual. Above it may be devices of no bus (a class's), or one of virtio's bus,
/// whose PCI function serves it alone; any other bus may have more on it.
pub(crate) fn behind(kernel: &Structures<'_>, device: GuestVirt) -> Result<Hardware, Reason> {
    let parent = |at| Ok(GuestVirt(kernel.need(at, "device", "parent")?));
    let mut at = parent(device)?;
    if at.0 == 0 {
        return Ok(Hardware::None);
    }
    for _ in 0..LEVELS_MAX {
        if !at.is_kernel_half() {
            break;
        }
        let bus = GuestVirt(kernel.need(at, "device", "bus")?);
        if bus.0 != 0 {
            let name = GuestVirt(kernel.need(bus, "bus_type", "name")?);
            if is_text(kernel, name, b"pci\0") {
                let inside = kernel.need_at(GuestVirt(0), "pci_dev", "dev")?;
                return Ok(Hardware::Pci(GuestVirt(at.0.wrapping_sub(inside.0))));
            }
            if !is_text(kernel, name, b"virtio\0") {
                break;
            }
        }
        at = parent(at)?;
    }
    Ok(Hardware::Unknown)
}

fn is_text<const N: usize>(kernel: &Structures<'_>, at: GuestVirt, text: &[u8; N]) -> bool {
    let mut found = [0; N];
    kernel.memory.read(at, &mut found).is_ok() && found == *text
}

/// Takes the right to use the bus from a PCI function, by its command register; may be called in any context
/// (drivers/pci/pci.c). `None` for a kernel that lacks it.
pub(crate) fn take_away(kernel: &Structures<'_>, function: GuestVirt) -> Option<Action> {
    const CLEAR: &str = "pci_clear_master";
    Some(Action::CallGuest {
        function: CLEAR.to_owned(),
        at: kernel.image.address_of(CLEAR)?,
        arguments: vec![function.0],
        expected: Vec::new(),
        why: "the driver's hardware must not touch memory that is given back".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    fn found(scene: &Scene, device: GuestVirt) -> Result<Hardware, Reason> {
        let memory = scene.machine.space();
        behind(&Structures { image: &scene.image, memory: &memory }, device)
    }

    #[test]
    fn a_device_without_a_parent_has_no_hardware() {
        let mut scene = Scene::new();
        let devices = scene.add_devices(&[None]);
        assert_eq!(found(&scene, devices[0]), Ok(Hardware::None));
    }

    #[test]
    fn only_a_class_and_virtio_may_be_between() {
        let mut scene = Scene::new();
        for between in [&[][..], &[None], &[Some("virtio")]] {
            let mut chain = vec![None];
            chain.extend(between);
            chain.push(Some("pci"));
            let devices = scene.add_devices(&chain);
            let function = GuestVirt(devices.last().unwrap().0 - 0x20);
            assert_eq!(found(&scene, devices[0]), Ok(Hardware::Pci(function)));
        }
        for bus in ["usb", "pci_express", "platform"] {
            let devices = scene.add_devices(&[None, Some(bus), Some("pci")]);
            assert_eq!(found(&scene, devices[0]), Ok(Hardware::Unknown), "{bus}");
        }
        let devices = scene.add_devices(&[None, None]);
        assert_eq!(found(&scene, devices[0]), Ok(Hardware::Unknown), "a class alone");
    }

    #[test]
    fn parents_in_a_circle_end() {
        let mut scene = Scene::new();
        let devices = scene.add_devices(&[None, None]);
        scene.set_member("device", "parent", devices[1], devices[1].0);
        assert_eq!(found(&scene, devices[0]), Ok(Hardware::Unknown));
    }
}
