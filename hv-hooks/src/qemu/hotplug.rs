//! Plugging a memory module (pc-dimm) into a machine that stands, and unplugging it, so that the guest's ACPI
//! driver learns of neither. The hypervisor's side of the ACPI memory hot-plug interface (QEMU
//! docs/specs/acpi_mem_hotplug.rst) is spoken through the human monitor's port commands.

use guest::{GuestPhys, HostVirt};

use super::hmp::{MemoryDevice, MemoryMap, parse_host_address, parse_memory_devices, parse_port};
use super::stub::Stub;
use crate::Error;

/// Prefix of every object and device that is made in QEMU.
const PREFIX: &str = "defib-";
/// A module's size is a multiple of this: the alignment QEMU wants (2 MiB pages).
pub(crate) const GRANULE: u64 = 2 << 20;
/// Register of the hot-plug interface that selects a slot, and the slot's flags.
const SLOT_SELECTOR: u16 = 0;
const SLOT_FLAGS: u16 = 0x14;
/// Written to the flags: "inserting" is seen to; unplug.
const FLAG_INSERTING: u64 = 2;
const FLAG_EJECT: u64 = 8;
/// The general-purpose event of memory hot-plug, in the first byte of status and enable.
const GPE_MEMORY: u64 = 8;
/// A backend may be in use for a moment after its module is gone.
const DELETE_TRIES: usize = 20;

/// The ports of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    /// `acpi-mem-hotplug`: one slot at a time.
    slots: u16,
    /// `acpi-gpe0`: the status register's first byte.
    status: u16,
    /// The enable register's first byte.
    enable: u16,
}

impl Ports {
    /// From the machine's I/O map. A machine without memory slots has no such ports.
    pub(crate) fn find(map: &MemoryMap) -> Option<Self> {
        let (slots, _) = map.ports_of("acpi-mem-hotplug")?;
        let (status, len) = map.ports_of("acpi-gpe0")?;
        // Status is the first half of the block, enable the second (ACPI 6.5, 4.8.4.1).
        Some(Self { slots, status, enable: status.checked_add(len / 2)? })
    }
}

/// A module that is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Guest-physical start.
    pub(crate) at: GuestPhys,
    /// Bytes.
    pub(crate) size: u64,
    /// Where it lies in QEMU's address space.
    pub(crate) host: HostVirt,
    slot: u64,
    /// Id of its memory backend.
    backend: String,
}

fn read(port: u16) -> String {
    format!("i /b {port:#x}")
}

fn write(port: u16, value: u64) -> String {
    format!("o /b {port:#x} {value:#x}")
}

fn select(ports: Ports, slot: u64) -> String {
    format!("o /w {:#x} {slot:#x}", ports.slots + SLOT_SELECTOR)
}

fn delete(backend: &str) -> String {
    format!("object_del {backend}")
}

/// Runs commands. Those that are to say nothing and do are the error; the words of the others are returned.
fn run<const N: usize>(
    stub: &mut Stub,
    silent: &[String],
    asking: [String; N],
) -> Result<[String; N], Error> {
    let lines = [silent, &asking[..]].concat();
    let mut said = stub.monitor(&lines)?;
    let words = said.split_off(silent.len().min(said.len()));
    match silent.iter().zip(&said).find(|(_, said)| !said.is_empty()) {
        Some((line, said)) => Err(Error::answer(format!("HMP {line}"), said)),
        None => <[String; N]>::try_from(words).map_err(|_| Error::Gone),
    }
}

/// Plugs in a module of `size` bytes, a multiple of [`GRANULE`]. The guest must stand. The event is switched
/// off while QEMU raises it and its status is cleared, so that no interrupt is ever pending.
pub(crate) fn plug(stub: &mut Stub, ports: Ports, number: u64, size: u64) -> Result<Module, Error> {
    let backend = format!("{PREFIX}memory-{number}");
    // Shared: else the first byte written makes the host zero a huge page, 0.4 ms.
    let create = format!("object_add memory-backend-ram,id={backend},size={size},share=on");
    let [status, enable] = run(stub, &[create], [read(ports.status), read(ports.enable)])?;
    let registers = parse_port(&status).zip(parse_port(&enable));
    let inserted = match registers {
        Some((status, enable)) => insert(stub, ports, &backend, status, enable),
        None => Err(Error::answer("HMP i", status)),
    };
    match inserted {
        Ok((device, host)) => Ok(Module { at: device.at, size, host, slot: device.slot, backend }),
        Err(error) => {
            let mut undo = vec![delete(&backend)];
            undo.extend(registers.map(|(_, enable)| write(ports.enable, enable)));
            let _ = stub.monitor(&undo);
            Err(error)
        }
    }
}

/// Makes a module of a backend and acknowledges the event in the guest's place. Takes the first bytes of the
/// event's status and enable registers.
fn insert(
    stub: &mut Stub,
    ports: Ports,
    backend: &str,
    status: u64,
    enable: u64,
) -> Result<(MemoryDevice, HostVirt), Error> {
    let device = format!("device_add pc-dimm,id={backend}-dimm,memdev={backend}");
    let orders = [write(ports.enable, enable & !GPE_MEMORY), device];
    let [listed] = run(stub, &orders, ["info memory-devices".into()])?;
    let ours = parse_memory_devices(&listed).into_iter().find(|device| is_of(device, backend));
    let device = ours.ok_or_else(|| Error::answer("HMP info memory-devices", listed))?;
    let mut orders =
        vec![select(ports, device.slot), write(ports.slots + SLOT_FLAGS, FLAG_INSERTING)];
    // An event that was pending before is somebody else's; the guest finds nothing new of ours behind it.
    if status & GPE_MEMORY == 0 {
        orders.push(write(ports.status, GPE_MEMORY));
    }
    orders.push(write(ports.enable, enable));
    let [located] = run(stub, &orders, [format!("gpa2hva {:#x}", device.at)])?;
    let host =
        parse_host_address(&located).ok_or_else(|| Error::answer("HMP gpa2hva", &located))?;
    Ok((device, host))
}

fn is_of(device: &MemoryDevice, backend: &str) -> bool {
    device.backend.rsplit('/').next() == Some(backend)
}

/// Takes a module out, as the guest's own ACPI code would: the guest must stand and not use it any more.
pub(crate) fn unplug(stub: &mut Stub, ports: Ports, module: &Module) -> Result<(), Error> {
    eject(stub, ports, module.slot, &module.backend)
}

fn eject(stub: &mut Stub, ports: Ports, slot: u64, backend: &str) -> Result<(), Error> {
    let orders = [select(ports, slot), write(ports.slots + SLOT_FLAGS, FLAG_EJECT)];
    let [mut said] = run(stub, &orders, [delete(backend)])?;
    for _ in 0..DELETE_TRIES {
        if said.is_empty() {
            return Ok(());
        }
        [said] = run(stub, &[], [delete(backend)])?;
    }
    Err(Error::answer(format!("HMP {}", delete(backend)), said))
}

/// Takes out every module and object that a former guard left behind; `backends` are the ids of all memory
/// backends. Returns how many there were.
pub(crate) fn sweep(
    stub: &mut Stub,
    ports: Option<Ports>,
    backends: &[String],
) -> Result<usize, Error> {
    let left: Vec<&String> = backends.iter().filter(|id| id.starts_with(PREFIX)).collect();
    if left.is_empty() {
        return Ok(0);
    }
    let [listed] = run(stub, &[], ["info memory-devices".into()])?;
    let devices = parse_memory_devices(&listed);
    for backend in &left {
        match (devices.iter().find(|device| is_of(device, backend)), ports) {
            (Some(device), Some(ports)) => eject(stub, ports, device.slot, backend)?,
            _ => {
                run(stub, &[delete(backend)], [])?;
            }
        }
    }
    Ok(left.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::hmp::parse_memory_map;

    #[test]
    fn ports_come_from_the_map() {
        let text = "FlatView #0\n AS \"I/O\", root: io\n  \
            0000000000000620-000000000000062f (prio 0, i/o): acpi-gpe0\n  \
            0000000000000a00-0000000000000a17 (prio 0, i/o): acpi-mem-hotplug\n";
        let ports = Ports::find(&parse_memory_map(text)).unwrap();
        assert_eq!(ports, Ports { slots: 0xa00, status: 0x620, enable: 0x628 });
        let without = text.replace("acpi-mem-hotplug", "io");
        assert_eq!(Ports::find(&parse_memory_map(&without)), None);
    }

    #[test]
    fn backends_are_compared_by_id() {
        let device = MemoryDevice {
            at: GuestPhys(0),
            slot: 0,
            backend: "/objects/defib-memory-1".to_owned(),
        };
        assert!(is_of(&device, "defib-memory-1"));
        assert!(!is_of(&device, "memory-1"));
    }
}
