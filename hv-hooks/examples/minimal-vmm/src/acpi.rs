//! What the guest is told of its hardware: ACPI tables for its CPUs, its interrupt controllers and its few
//! devices. Hardware-reduced (ACPI 6.5, section 3.11.1): no PM timer, no SCI, no legacy power registers.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::devices;
use crate::memory::{self, Ram};
use crate::{Error, Result};

const OEM: [u8; 6] = *b"DEFIB ";
const TABLE: [u8; 8] = *b"MINIVMM ";
/// `IAPC_BOOT_ARCH` bits: what not to probe for; Linux looks for the clock for seconds else.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;
/// Byte offset of the first table; the RSDP is in front of it.
const FIRST_TABLE: u64 = 64;

/// Writes all tables; the RSDP is the first byte of [`memory::ACPI`].
pub fn write(ram: &Ram, vcpus: u8, has_disk: bool) -> Result<()> {
    let mut place = Place { ram, next: memory::ACPI.start + FIRST_TABLE };
    let dsdt = place.put(&dsdt(has_disk))?;
    let fadt = place.put(&fadt(dsdt))?;
    let madt = place.put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place.put(&xsdt)?;
    place.next = memory::ACPI.start;
    place.put(&Rsdp::new(OEM, xsdt)).map(|_| ())
}

/// Where the next table goes.
struct Place<'a> {
    ram: &'a Ram,
    next: u64,
}

impl Place<'_> {
    /// Writes a table and returns where it is.
    fn put(&mut self, table: &dyn Aml) -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let (at, size) = (self.next, bytes.len() as u64);
        let room = memory::ACPI.end.saturating_sub(at);
        if size > room {
            return Err(Error::DoesNotFit { what: "ACPI tables", size, room });
        }
        self.ram
            .write_slice(&bytes, GuestAddress(at))
            .map_err(|source| Error::BootData { what: "ACPI table", source })?;
        self.next = (at + size).next_multiple_of(16);
        Ok(at)
    }
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    let byte_port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = byte_port(devices::POWER_PORT);
    fadt.reset_value = devices::RESET_VALUE;
    fadt.sleep_control_reg = byte_port(devices::POWER_PORT);
    fadt.sleep_status_reg = byte_port(devices::POWER_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(memory::LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // KVM's I/O APIC has id 0 and serves the interrupts from 0 on.
    madt.add_structure(IoApic::new(0, memory::IO_APIC, 0));
    madt
}

/// The devices, and `_S5` so that the guest can switch itself off.
fn dsdt(has_disk: bool) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    let ports = |first, count| aml::IO::new(first, first, 1, count);
    let serial = ports(devices::SERIAL_PORT, devices::SERIAL_PORTS);
    let line = edge_triggered(devices::SERIAL_IRQ);
    add_device(&mut dsdt, "_SB_.COM1", &aml::EISAName::new("PNP0501"), vec![&serial, &line]);
    let pvpanic = ports(devices::PVPANIC_PORT, 1);
    add_device(&mut dsdt, "_SB_.PEVT", &"QEMU0001", vec![&pvpanic]);
    if has_disk {
        let range = memory::VIRTIO_BLOCK;
        let size = (range.end - range.start) as u32;
        let registers = aml::Memory32Fixed::new(true, range.start as u32, size);
        let line = edge_triggered(devices::DISK_IRQ);
        add_device(&mut dsdt, "_SB_.VRT0", &"LNRO0005", vec![&registers, &line]);
    }
    let sleep_type = aml::Package::new(vec![&devices::SLEEP_TYPE_OFF]);
    aml::Name::new("_S5_".into(), &sleep_type).to_aml_bytes(&mut dsdt);
    dsdt
}

/// Adds a device with the id by which Linux finds its driver, and what it occupies.
fn add_device(dsdt: &mut Sdt, path: &str, id: &dyn Aml, resources: Vec<&dyn Aml>) {
    let id = aml::Name::new("_HID".into(), id);
    let unique = aml::Name::new("_UID".into(), &aml::ZERO);
    let resources = aml::ResourceTemplate::new(resources);
    let resources = aml::Name::new("_CRS".into(), &resources);
    aml::Device::new(path.into(), vec![&id, &unique, &resources]).to_aml_bytes(dsdt);
}

/// An interrupt as KVM's irqfd without a resample event makes it.
fn edge_triggered(irq: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, irq)
}
