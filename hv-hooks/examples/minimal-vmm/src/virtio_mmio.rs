//! The virtio-mmio transport of one block device: registers, queue set-up, interrupts (virtio 1.2, section
//! 4.2.2). What a request means is in `virtio_block.rs`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio as register;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::Ram;
use crate::virtio_block::VirtioBlock;
use crate::{Error, Result};

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
/// The version of the transport that is not legacy.
const VERSION: u32 = 2;
const VENDOR: u32 = 0;
const QUEUE_SIZE: u16 = 256;
const CONFIG: u64 = register::VIRTIO_MMIO_CONFIG as u64;

/// A block device behind its registers. Requests are served on the vCPU that notifies: simple, and a disk
/// access is at most milliseconds.
pub struct VirtioMmio {
    state: Mutex<State>,
    ram: Ram,
    line: EventFd,
}

struct State {
    block: VirtioBlock,
    queue: Queue,
    status: u32,
    interrupts: u32,
    /// Which half of the 64 feature bits is read, and which is written.
    offered_half: u32,
    accepted_half: u32,
    /// Which queue the queue registers mean; there is only queue 0.
    selected: u32,
}

impl VirtioMmio {
    /// A device that uses `ram` and tells its interrupts to `line`.
    pub fn new(block: VirtioBlock, ram: Ram, line: EventFd) -> Result<Self> {
        let queue = Queue::new(QUEUE_SIZE)
            .map_err(|error| Error::host("virtqueue")(std::io::Error::other(error)))?;
        let state = State {
            block,
            queue,
            status: 0,
            interrupts: 0,
            offered_half: 0,
            accepted_half: 0,
            selected: 0,
        };
        Ok(Self { state: Mutex::new(state), ram, line })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads at `offset`: a register, or the configuration.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let config = state.block.config();
            let rest = config.get(offset as usize..).unwrap_or_default();
            data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = state.register(offset as u32).to_le_bytes();
        }
    }

    /// The guest writes at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(offset), Ok(value)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return;
        };
        let mut state = self.lock();
        if state.set_register(offset, u32::from_le_bytes(value)) && state.serve(&self.ram) {
            state.interrupts |= register::VIRTIO_MMIO_INT_VRING;
            // Fails only when the interrupt is pending a hundred million billion times.
            let _ = self.line.write(1);
        }
    }
}

impl State {
    fn offered(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH | self.block.features()
    }

    fn register(&self, offset: u32) -> u32 {
        let exists = self.selected == 0;
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_BLOCK,
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => match self.offered_half {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::VIRTIO_MMIO_QUEUE_NUM_MAX if exists => u32::from(QUEUE_SIZE),
            register::VIRTIO_MMIO_QUEUE_READY if exists => u32::from(self.queue.ready()),
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupts,
            register::VIRTIO_MMIO_STATUS => self.status,
            _ => 0,
        }
    }

    /// `true` when the queue is to be served.
    fn set_register(&mut self, offset: u32, value: u32) -> bool {
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.offered_half = value,
            // What the driver takes makes no difference to this device.
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.accepted_half = value,
            register::VIRTIO_MMIO_QUEUE_SEL => self.selected = value,
            register::VIRTIO_MMIO_QUEUE_NOTIFY => return value == 0,
            register::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupts &= !value,
            register::VIRTIO_MMIO_STATUS if value == 0 => self.reset(),
            register::VIRTIO_MMIO_STATUS => self.status = value,
            _ if self.selected == 0 => self.set_queue_register(offset, value),
            _ => {}
        }
        false
    }

    fn set_queue_register(&mut self, offset: u32, value: u32) {
        let queue = &mut self.queue;
        match offset {
            // What is no power of two or too large is ignored by the queue, which keeps its size.
            register::VIRTIO_MMIO_QUEUE_NUM => queue.set_size(value as u16),
            register::VIRTIO_MMIO_QUEUE_READY => queue.set_ready(value == 1),
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                queue.set_desc_table_address(None, Some(value));
            }
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                queue.set_avail_ring_address(Some(value), None)
            }
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                queue.set_avail_ring_address(None, Some(value));
            }
            register::VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                queue.set_used_ring_address(None, Some(value));
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.queue.reset();
        (self.status, self.interrupts, self.selected) = (0, 0, 0);
    }

    /// Serves what is in the queue; `true` when the driver wants to be told.
    fn serve(&mut self, ram: &Ram) -> bool {
        if !self.queue.is_valid(ram) {
            return false;
        }
        // One notification serves one queue's worth: a guest that fills it meanwhile notifies again, or
        // else would keep this vCPU here for ever.
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = self.queue.pop_descriptor_chain(ram) else { break };
            let head = chain.head_index();
            let written = self.block.serve(ram, chain);
            if self.queue.add_used(ram, head, written).is_err() {
                break;
            }
        }
        self.queue.needs_notification(ram).unwrap_or(true)
    }
}
