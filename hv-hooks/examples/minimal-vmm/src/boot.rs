//! A kernel in guest memory, ready to be entered by the PVH protocol: ELF segments, initrd, command line,
//! memory map and `hvm_start_info`. The CPU's side of the protocol is in `cpu.rs`.

use std::fs::File;
use std::path::Path;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{self, Ram};
use crate::{Error, Result};

/// Magic number of `hvm_start_info` (Xen's public/arch-x86/hvm/start_info.h).
const START_MAGIC: u32 = 0x336e_c578;
/// The version of it that has a memory map.
const START_VERSION: u32 = 1;
/// Memory map types, as in e820.
const RAM_TYPE: u32 = 1;
const RESERVED_TYPE: u32 = 2;
const PAGE: u64 = 4096;

/// Loads everything; returns the guest-physical entry point.
pub fn load(ram: &Ram, kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<u32> {
    let (entry, kernel_end) = load_kernel(ram, kernel)?;
    let modules: Vec<_> =
        initrd.map(|path| load_initrd(ram, path, kernel_end)).transpose()?.into_iter().collect();
    write_command_line(ram, cmdline)?;
    write_start_info(ram, &modules)?;
    Ok(entry)
}

/// Loads the ELF segments where they want to be; the loader reads nothing else of the file, so that its
/// debug information costs nothing.
fn load_kernel(ram: &Ram, path: &Path) -> Result<(u32, u64)> {
    let mut file = File::open(path).map_err(Error::file(path))?;
    let high = Some(GuestAddress(memory::HIGH_MEMORY));
    let loaded = Elf::load(ram, None, &mut file, high)
        .map_err(|source| Error::Kernel { path: path.to_owned(), source })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::NotPvh { path: path.to_owned() });
    };
    let entry = u32::try_from(entry.0).map_err(|_| Error::NotPvh { path: path.to_owned() })?;
    Ok((entry, loaded.kernel_end))
}

/// Puts the initrd at the end of low RAM, far away from what the kernel unpacks and allocates early.
fn load_initrd(ram: &Ram, path: &Path, kernel_end: u64) -> Result<hvm_modlist_entry> {
    let mut file = File::open(path).map_err(Error::file(path))?;
    let size = file.metadata().map_err(Error::file(path))?.len();
    let ram_end = low_ram_end(ram);
    let at = ram_end.checked_sub(size).map(|at| at & !(PAGE - 1)).filter(|at| *at >= kernel_end);
    let room = ram_end.saturating_sub(kernel_end);
    let at = at.ok_or(Error::DoesNotFit { what: "initrd", size, room })?;
    ram.read_exact_volatile_from(GuestAddress(at), &mut file, size as usize)
        .map_err(|source| Error::BootData { what: "initrd", source })?;
    Ok(hvm_modlist_entry { paddr: at, size, ..Default::default() })
}

fn low_ram_end(ram: &Ram) -> u64 {
    ram.iter().next().map_or(0, GuestMemoryRegion::len)
}

fn write_command_line(ram: &Ram, cmdline: &str) -> Result<()> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    if bytes.len() > memory::COMMAND_LINE_ROOM {
        let (size, room) = (bytes.len() as u64, memory::COMMAND_LINE_ROOM as u64);
        return Err(Error::DoesNotFit { what: "command line", size, room });
    }
    ram.write_slice(&bytes, memory::COMMAND_LINE)
        .map_err(|source| Error::BootData { what: "command line", source })
}

fn write_start_info(ram: &Ram, modules: &[hvm_modlist_entry]) -> Result<()> {
    let map = memory_map(ram);
    let header = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { memory::MODULES.0 },
        cmdline_paddr: memory::COMMAND_LINE.0,
        rsdp_paddr: memory::ACPI.start,
        memmap_paddr: memory::MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&header, memory::START_INFO);
    params.set_sections(&map, memory::MEMORY_MAP);
    if !modules.is_empty() {
        params.set_modules(modules, memory::MODULES);
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(|error| Error::BootData {
        what: "hvm_start_info",
        source: vm_memory::GuestMemoryError::IOError(std::io::Error::other(error)),
    })
}

/// RAM without the legacy area, and the ACPI tables as reserved, so that the kernel keeps them.
fn memory_map(ram: &Ram) -> Vec<hvm_memmap_table_entry> {
    let entry = |range: std::ops::Range<u64>, type_| hvm_memmap_table_entry {
        addr: range.start,
        size: range.end.saturating_sub(range.start),
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0..memory::BASE_MEMORY_END, RAM_TYPE),
        entry(memory::ACPI, RESERVED_TYPE),
        entry(memory::HIGH_MEMORY..low_ram_end(ram), RAM_TYPE),
    ];
    map.extend(ram.iter().skip(1).map(|region| {
        let start = region.start_addr().0;
        entry(start..start.saturating_add(region.len()), RAM_TYPE)
    }));
    map
}
