//! A virtio block device over a file (virtio 1.2, section 5.2): one request at a time. Queues and registers
//! are in `virtio_mmio.rs`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_RO, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::{DescriptorChain, Reader, Writer};

use crate::memory::Ram;
use crate::{Error, Result};

const SECTOR: u64 = 512;
/// Bytes that are copied at once, whatever the guest asks for.
const CHUNK: usize = 1 << 16;
const ID: &[u8] = b"minimal-vmm";

/// The device.
pub struct VirtioBlock {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl VirtioBlock {
    /// A disk in a file; read-only when the file is.
    pub fn open(path: &Path) -> Result<Self> {
        let writable = OpenOptions::new().read(true).write(true).open(path);
        let (file, read_only) = match writable {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                (File::open(path).map_err(Error::file(path))?, true)
            }
            file => (file.map_err(Error::file(path))?, false),
        };
        let size = file.metadata().map_err(Error::file(path))?.len();
        Ok(Self { file, sectors: size / SECTOR, read_only })
    }

    /// The configuration: the size in sectors is its only member without a feature bit.
    pub fn config(&self) -> [u8; 8] {
        self.sectors.to_le_bytes()
    }

    /// Feature bits of this disk.
    pub fn features(&self) -> u64 {
        u64::from(self.read_only) << VIRTIO_BLK_F_RO
    }

    /// Serves a request; returns how many bytes were written to guest memory. A chain that is no request is
    /// answered by nothing at all.
    pub fn serve(&mut self, ram: &Ram, chain: DescriptorChain<&Ram>) -> u32 {
        let (Ok(mut reader), Ok(mut writer)) = (chain.clone().reader(ram), chain.writer(ram))
        else {
            return 0;
        };
        // The last byte that the device may write is for the status.
        let Some(room) = writer.available_bytes().checked_sub(1) else { return 0 };
        let Ok(mut status) = writer.split_at(room) else { return 0 };
        let answer = match self.carry_out(&mut reader, &mut writer) {
            Ok(answer) => answer,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        let told = status.write(&[answer as u8]).unwrap_or(0);
        u32::try_from(writer.bytes_written().saturating_add(told)).unwrap_or(u32::MAX)
    }

    fn carry_out(&mut self, reader: &mut Reader<'_>, writer: &mut Writer<'_>) -> io::Result<u32> {
        let mut header = [0; 16];
        reader.read_exact(&mut header)?;
        let [kind, _reserved, low, high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte])));
        let sector = u64::from(high) << 32 | u64::from(low);
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, writer)?,
            VIRTIO_BLK_T_OUT => self.write(sector, reader)?,
            VIRTIO_BLK_T_FLUSH => self.file.sync_data()?,
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id[..ID.len()].copy_from_slice(ID);
                writer.write_all(&id)?;
            }
            _ => return Ok(VIRTIO_BLK_S_UNSUPP),
        }
        Ok(VIRTIO_BLK_S_OK)
    }

    fn read(&self, sector: u64, writer: &mut Writer<'_>) -> io::Result<()> {
        let mut at = self.place(sector, writer.available_bytes())?;
        let mut chunk = [0; CHUNK];
        while let size @ 1.. = writer.available_bytes().min(CHUNK) {
            self.file.read_exact_at(&mut chunk[..size], at)?;
            writer.write_all(&chunk[..size])?;
            at += size as u64;
        }
        Ok(())
    }

    fn write(&self, sector: u64, reader: &mut Reader<'_>) -> io::Result<()> {
        let mut at = self.place(sector, reader.available_bytes())?;
        let mut chunk = [0; CHUNK];
        while let size @ 1.. = reader.available_bytes().min(CHUNK) {
            reader.read_exact(&mut chunk[..size])?;
            self.file.write_all_at(&chunk[..size], at)?;
            at += size as u64;
        }
        Ok(())
    }

    /// Byte offset of a request that lies on the disk as a whole.
    fn place(&self, sector: u64, size: usize) -> io::Result<u64> {
        let at = sector.checked_mul(SECTOR);
        let end = at.and_then(|at| at.checked_add(size as u64));
        at.filter(|_| end.is_some_and(|end| end <= self.sectors * SECTOR))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}
