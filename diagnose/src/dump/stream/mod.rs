//! QEMU's migration stream: what `migrate` to a file, `virsh save`, managed saves and `virsh dump` without
//! `--memory-only` leave. How sections follow each other is in `sections.rs`, what those of RAM hold in `ram.rs` and
//! `runs.rs`, where the guest has it in `board.rs`, what those of vCPUs hold in `cpus.rs`.

mod board;
mod cpus;
mod cursor;
mod description;
mod libvirt;
mod memory;
mod ram;
mod runs;
mod sections;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

pub(super) use memory::Memory;

use super::notes::{CpuNote, MAX_CPUS};
use super::storage::{Bytes, Storage};
use super::{Error, Remark, Unsupported};
use board::{Board, Piece};
use cursor::{Cursor, Stop};
use description::Description;
use runs::Runs;
use sections::{Found, Sections};

/// `QEMU_VM_FILE_MAGIC`
const MAGIC: &[u8; 4] = b"QEVM";
/// Capabilities that change the stream, and are in it for that reason (`should_validate_capability()` in
/// migration/savevm.c).
const IGNORE_SHARED: &str = "x-ignore-shared";
const MAPPED_RAM: &str = "mapped-ram";
/// The clock chip's section and the field that is its memory (`vmstate_rtc` in hw/rtc/mc146818rtc.c).
const CLOCK: &str = "mc146818rtc";
const CMOS: &str = "cmos_data";

/// A dump that is a stream.
pub(super) struct Stream<B> {
    pub memory: Memory<B>,
    pub cpus: Vec<CpuNote>,
}

/// Where a stream begins.
#[derive(Clone, Copy)]
pub(super) struct Start {
    at: u64,
    /// Whether libvirt's header stands before it.
    pub libvirt: bool,
}

/// Finds out whether a file holds a stream.
pub(super) fn find<B: Bytes>(
    storage: &Storage<B>,
    remarks: &mut Vec<Remark>,
) -> Result<Option<Start>, Error> {
    let header = libvirt::stream(storage, remarks)?;
    let start = Start { at: header.unwrap_or(0), libvirt: header.is_some() };
    match (storage.array(start.at).as_ref() == Some(MAGIC), header) {
        (true, _) => Ok(Some(start)),
        (false, Some(at)) => Err(Error::Truncated { what: "migration stream", at }),
        (false, None) => Ok(None),
    }
}

/// Reads a stream.
pub(super) fn open<B: Bytes>(
    storage: Storage<B>,
    start: Start,
    remarks: &mut Vec<Remark>,
) -> Result<Stream<B>, Error> {
    let Contents { runs, pieces, cpus, ignore_shared } = contents(&storage, start, remarks)?;
    let memory = Memory::new(storage, runs, pieces);
    match (memory.captured(), ignore_shared) {
        (0, true) => Err(Error::RamLeftOut),
        (0, false) => Err(Error::NoMemory),
        _ => Ok(Stream { memory, cpus }),
    }
}

/// What a stream holds.
struct Contents {
    runs: Runs,
    pieces: Vec<Piece>,
    cpus: Vec<CpuNote>,
    /// Whether RAM that is shared with others was left out.
    ignore_shared: bool,
}

fn contents<B: Bytes>(
    storage: &Storage<B>,
    start: Start,
    remarks: &mut Vec<Remark>,
) -> Result<Contents, Error> {
    let json = description::find(storage);
    let description = json.as_deref().and_then(Description::parse);
    if description.is_none() {
        remarks.push(Remark::NoDescription);
    }
    let devices = description.as_ref().map_or(&[][..], |it| &it.devices);
    let mut sections = Sections::new(Cursor::new(storage, start.at), devices);
    sections.header()?;
    let end = sections.walk();
    remarks.extend(end.err().and_then(|stop| remark(stop, description.is_some())));
    if sections.has_capability(MAPPED_RAM) {
        return Err(Error::Unsupported(Unsupported::QemuMigration(MAPPED_RAM)));
    }
    let (machine, ignore_shared) =
        (sections.machine.take(), sections.has_capability(IGNORE_SHARED));
    let cpus = cpus(storage, &sections.devices, machine.as_deref())?;
    let cmos = sections.devices.iter().find_map(|(section, at)| {
        let span = section.element(CMOS, 0).filter(|_| section.name == CLOCK)?;
        storage.bytes(at.checked_add(span.offset)?, span.size)
    });
    let sent = sections.ram.finish();
    if sent.packed > 0 {
        remarks.push(Remark::Packed { times: sent.packed });
    }
    let board = Board { machine: machine.as_deref(), cmos: cmos.as_deref() };
    let pieces = board::pieces(&sent.blocks, &board, remarks);
    Ok(Contents { runs: sent.runs, pieces, cpus, ignore_shared })
}

/// What is to be said of a stream whose sections end early. Without a description all streams do, at the first device.
fn remark(stop: Stop, described: bool) -> Option<Remark> {
    match stop {
        Stop::Cut => Some(Remark::Cut { what: "sections" }),
        Stop::Broken { at } => Some(Remark::Broken { at }),
        Stop::Unknown { name } => described.then_some(Remark::UnknownSection { name }),
    }
}

/// The vCPUs, in the order of their numbers.
fn cpus<B: Bytes>(
    storage: &Storage<B>,
    devices: &[Found<'_>],
    machine: Option<&str>,
) -> Result<Vec<CpuNote>, Error> {
    let mut found: Vec<_> = devices.iter().filter(|(it, _)| it.name == cpus::SECTION).collect();
    if found.iter().any(|(section, _)| !cpus::is_x86(section)) {
        let found = format!("QEMU's machine {}", machine.unwrap_or("without a name"));
        return Err(Error::OtherArchitecture { found });
    }
    found.sort_by_key(|(section, _)| section.instance_id);
    Ok(found
        .into_iter()
        .take(MAX_CPUS)
        .map(|(section, at)| cpus::cpu(storage, section, *at))
        .collect())
}
