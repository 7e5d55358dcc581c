//! Fresh memory: which ways there are, in which order they are tried, and what has been given out.

use std::ops::Range;

use guest::{FreshKind, FreshRegion, GuestPhys, PhysMemory};

use super::firmware_tail;
use super::hmp::parse_memory_map;
use super::hotplug::{self, GRANULE, Module, Ports};
use super::ram::GuestRam;
use super::stub::Stub;
use crate::Error;

const PAGE: u64 = 4096;

/// What a region that was given out needs to be taken back.
enum Given {
    Module(Module),
    /// What stood there before.
    Tail(Vec<u8>),
}

/// The fresh memory of one VM.
pub(crate) struct Fresh {
    order: Vec<FreshKind>,
    /// `None` on a machine without memory slots.
    ports: Option<Ports>,
    /// Whether that is sure since the last reset.
    looked: bool,
    given: Vec<(FreshRegion, Given)>,
    /// Parts of the modules that code was written to.
    code: Vec<Range<GuestPhys>>,
    /// The code that was last written to the firmware's memory, and where: QEMU may have translated it.
    tail_code: Option<(GuestPhys, Vec<u8>)>,
    count: u64,
}

impl Fresh {
    /// Nothing given out yet.
    pub(crate) fn new(order: Vec<FreshKind>, ports: Option<Ports>) -> Self {
        let (given, code) = (Vec::new(), Vec::new());
        Self { order, ports, looked: false, given, code, tail_code: None, count: 0 }
    }

    /// Looks for the ports of memory hot-plug if they are not known: firmware programs where they are, so an
    /// early look or one before a reset tells nothing. Not done when memory is needed, for it takes a while.
    pub(crate) fn find_ports(&mut self, stub: &mut Stub) -> Result<(), Error> {
        if self.ports.is_none() && !std::mem::replace(&mut self.looked, true) {
            let map = stub.monitor(&["info mtree -f".into()])?.concat();
            self.ports = Ports::find(&parse_memory_map(&map));
        }
        Ok(())
    }

    /// The machine was reset.
    pub(crate) fn forget_ports(&mut self) {
        self.ports = None;
        self.looked = false;
        self.tail_code = None;
    }

    /// Tries each way in turn.
    pub(crate) fn add(
        &mut self,
        stub: &mut Stub,
        ram: &mut GuestRam,
        size: u64,
    ) -> Result<FreshRegion, Error> {
        let mut reasons = Vec::new();
        for kind in self.order.clone() {
            let added = match kind {
                FreshKind::HotAdded => self.hot_add(stub, ram, size),
                FreshKind::FirmwareTail => self.take_tail(ram, size),
                _ => Err(Error::FreshUnavailable("not a way of this backend")),
            };
            match added {
                Ok((region, given)) => {
                    self.given.push((region, given));
                    return Ok(region);
                }
                Err(error @ (Error::Gone | Error::Timeout { .. })) => return Err(error),
                Err(error) => reasons.push((kind, error)),
            }
        }
        Err(Error::NoFreshMemory(reasons))
    }

    fn hot_add(
        &mut self,
        stub: &mut Stub,
        ram: &mut GuestRam,
        size: u64,
    ) -> Result<(FreshRegion, Given), Error> {
        let ports = self.ports.ok_or(Error::FreshUnavailable(
            "the VM has no memory slots (-m ...,slots=N,maxmem=M) or no ACPI",
        ))?;
        let size = size
            .max(1)
            .checked_next_multiple_of(GRANULE)
            .ok_or(Error::FreshUnavailable("the size asked for is not possible"))?;
        self.count += 1;
        let module = hotplug::plug(stub, ports, self.count, size)?;
        ram.add_remote(module.at..module.at + module.size, module.host);
        let region = FreshRegion { at: module.at, size: module.size, kind: FreshKind::HotAdded };
        Ok((region, Given::Module(module)))
    }

    fn take_tail(&self, ram: &GuestRam, size: u64) -> Result<(FreshRegion, Given), Error> {
        if self.given.iter().any(|(region, _)| region.kind == FreshKind::FirmwareTail) {
            return Err(Error::FreshUnavailable(
                "the firmware's reserved memory is in use already",
            ));
        }
        let run = firmware_tail::find(ram)?;
        let have = run.end - run.start;
        if have < size {
            return Err(Error::FreshUnavailable("the firmware's reserved memory is too small"));
        }
        let size = size.max(1).next_multiple_of(PAGE);
        let mut before = vec![0; size as usize];
        ram.read(run.start, &mut before)?;
        let region = FreshRegion { at: run.start, size, kind: FreshKind::FirmwareTail };
        Ok((region, Given::Tail(before)))
    }

    /// Whether code may be written here past QEMU, that is, whether QEMU holds no translation of anything else
    /// that was here. From then on the range counts as executed.
    ///
    /// - In a module that was just plugged in nothing was executed yet. (QEMU drops the translations of memory
    ///   that goes: a module plugged in later at the same place of QEMU's RAM never ran old code.)
    /// - In the firmware's memory, if the same bytes were written to the same place the last time. What the guest
    ///   itself writes there in between, QEMU sees.
    pub(crate) fn may_bypass(&mut self, at: GuestPhys, bytes: &[u8]) -> bool {
        let (start, end) = (at.0, at.0.saturating_add(bytes.len() as u64));
        let inside = |(region, _): &&(FreshRegion, Given)| {
            start >= region.at.0 && end <= region.at.0.saturating_add(region.size)
        };
        match self.given.iter().find(inside).map(|(region, _)| region.kind) {
            Some(FreshKind::HotAdded) => {
                let apart = |known: &Range<GuestPhys>| end <= known.start.0 || start >= known.end.0;
                let untouched = self.code.iter().all(apart);
                self.code.push(at..GuestPhys(end));
                untouched
            }
            Some(FreshKind::FirmwareTail) => {
                let same =
                    self.tail_code.as_ref().is_some_and(|last| *last == (at, bytes.to_vec()));
                self.tail_code = Some((at, bytes.to_vec()));
                same
            }
            _ => false,
        }
    }

    /// Takes a region back.
    pub(crate) fn remove(
        &mut self,
        stub: &mut Stub,
        ram: &mut GuestRam,
        region: FreshRegion,
    ) -> Result<(), Error> {
        let index = self.given.iter().position(|(given, _)| *given == region);
        let index = index.ok_or(Error::FreshUnavailable("no such region was given out"))?;
        match (&self.given.get(index).map(|(_, given)| given), self.ports) {
            (Some(Given::Module(module)), Some(ports)) => {
                hotplug::unplug(stub, ports, module)?;
                ram.remove(region.at);
            }
            (Some(Given::Tail(before)), _) => ram.write(region.at, before)?,
            _ => return Err(Error::FreshUnavailable("the hot-plug ports are gone")),
        }
        self.given.remove(index);
        let end = region.at + region.size;
        self.code.retain(|known| known.end <= region.at || known.start >= end);
        Ok(())
    }

    /// What is given out.
    pub(crate) fn regions(&self) -> Vec<FreshRegion> {
        self.given.iter().map(|(region, _)| *region).collect()
    }
}
