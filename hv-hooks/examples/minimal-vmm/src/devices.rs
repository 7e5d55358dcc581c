//! Which device answers at which port and address. The devices themselves are in files of their own, but for
//! those of one register: pvpanic, power, keyboard reset, exit.

use crate::console::Console;
use crate::exit::Exit;
use crate::memory;
use crate::virtio_mmio::VirtioMmio;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_PORTS: u8 = 8;
pub const SERIAL_IRQ: u32 = 4;
/// pvpanic, where QEMU has it. Linux finds it by ACPI.
pub const PVPANIC_PORT: u16 = 0x505;
/// "The guest has panicked", the only event that this pvpanic knows (QEMU's docs/specs/pvpanic).
const PVPANIC_PANICKED: u8 = 1;
/// Power control as the FADT describes it: ACPI's sleep control register, and the reset register.
pub const POWER_PORT: u16 = 0x600;
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the `_S5` state, chosen freely; the register has it in bits 2 to 4 and `SLP_EN` in bit 5.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_OFF: u8 = SLEEP_TYPE_OFF << 2 | 1 << 5;
/// Keyboard controller: command 0xfe pulls the reset line.
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// A guest's way to end with a code, where QEMU's isa-debug-exit is by default in tests.
const EXIT_PORT: u16 = 0xf4;
/// The disk's interrupt.
pub const DISK_IRQ: u32 = 5;

/// What a guest's access asks of the VM as a whole.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// pvpanic: the guest's kernel says that it has crashed.
    Panicked,
    /// The VM is to end.
    End(Exit),
}

/// All devices. vCPU threads share them; each device has its own lock.
pub struct Devices {
    pub console: Console,
    pub disk: Option<VirtioMmio>,
}

impl Devices {
    /// The guest wrote to a port.
    pub fn io_out(&self, port: u16, data: &[u8]) -> Option<Request> {
        let value = *data.first()?;
        match (port, value) {
            (PVPANIC_PORT, PVPANIC_PANICKED) => Some(Request::Panicked),
            (POWER_PORT, RESET_VALUE) => Some(Request::End(Exit::Reset)),
            (POWER_PORT, SLEEP_OFF) => Some(Request::End(Exit::PowerOff)),
            (KEYBOARD_COMMAND, KEYBOARD_RESET) => Some(Request::End(Exit::Reset)),
            (EXIT_PORT, code) => Some(Request::End(Exit::Code(code))),
            _ => {
                if let Some(register) = serial_register(port) {
                    data.iter().for_each(|byte| self.console.write(register, *byte));
                }
                None
            }
        }
    }

    /// The guest reads from a port. Where nothing is, all bits are 1, but for the keyboard controller, whose
    /// "busy" bits would keep a reset waiting.
    pub fn io_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            PVPANIC_PORT => data.fill(PVPANIC_PANICKED),
            POWER_PORT | KEYBOARD_COMMAND => data.fill(0),
            _ => {
                if let Some(register) = serial_register(port) {
                    data.iter_mut().for_each(|byte| *byte = self.console.read(register));
                }
            }
        }
    }

    /// The guest reads from an address without RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((disk, offset)) = self.disk_register(address) {
            disk.read(offset, data);
        }
    }

    /// The guest wrote to an address without RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((disk, offset)) = self.disk_register(address) {
            disk.write(offset, data);
        }
    }

    fn disk_register(&self, address: u64) -> Option<(&VirtioMmio, u64)> {
        let disk = self.disk.as_ref()?;
        memory::VIRTIO_BLOCK
            .contains(&address)
            .then(|| (disk, address - memory::VIRTIO_BLOCK.start))
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = u8::try_from(port.checked_sub(SERIAL_PORT)?).ok()?;
    (register < SERIAL_PORTS).then_some(register)
}
