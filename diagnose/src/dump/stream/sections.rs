//! How the sections of a stream follow each other. Those of RAM say themselves where they end, those of devices end
//! where the description says; all have their number once more at the end, which is checked.
//!
//! Facts are from QEMU's migration/savevm.c: `save_section_header()`, `save_section_footer()`,
//! `qemu_savevm_command_send()`, `vmstate_configuration`.

use super::cursor::{Cursor, Stop};
use super::description::State;
use super::ram::Ram;
use crate::dump::{Bytes, Error};

/// `QEMU_VM_FILE_VERSION`, behind the magic.
const VERSION: u32 = 3;
/// `QEMU_VM_*`: what a section begins with.
const EOF: u8 = 0x00;
const START: u8 = 0x01;
const PART: u8 = 0x02;
const END: u8 = 0x03;
const FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;
const FOOTER: u8 = 0x7e;
/// Name of the section that carries RAM.
const RAM: &str = "ram";
/// More capabilities than there are in any version.
const MAX_CAPABILITIES: u32 = 64;

/// A device's section, and where its content begins in the file.
pub(super) type Found<'a> = (&'a State<'a>, u64);

/// What sections have told so far.
pub(super) struct Sections<'a, B> {
    cursor: Cursor<'a, B>,
    /// Described sections that have not come yet.
    expected: std::slice::Iter<'a, State<'a>>,
    /// Number of RAM's section.
    ram_id: Option<u32>,
    has_footers: bool,
    /// QEMU's name of the machine.
    pub machine: Option<String>,
    capabilities: Vec<String>,
    pub devices: Vec<Found<'a>>,
    pub ram: Ram,
}

impl<'a, B: Bytes> Sections<'a, B> {
    /// A stream whose magic is at the cursor, and the description of its devices' sections.
    pub(super) fn new(cursor: Cursor<'a, B>, described: &'a [State<'a>]) -> Self {
        Self {
            cursor,
            expected: described.iter(),
            ram_id: None,
            has_footers: false,
            machine: None,
            capabilities: Vec::new(),
            devices: Vec::new(),
            ram: Ram::default(),
        }
    }

    /// Whether a capability was in use that changes the stream.
    pub(super) fn has_capability(&self, name: &str) -> bool {
        self.capabilities.iter().any(|it| it == name)
    }

    /// Reads what comes before all sections.
    pub(super) fn header(&mut self) -> Result<(), Error> {
        let at = self.cursor.at();
        let version = self.cursor.skip(4).and_then(|()| self.cursor.u32());
        match version {
            Ok(VERSION) => Ok(()),
            Ok(found) => {
                let what = "version of the migration stream";
                Err(Error::BadHeader { what, found: found.into() })
            }
            Err(_) => Err(Error::Truncated { what: "header", at }),
        }
    }

    /// Goes through all sections, as far as they can be read.
    pub(super) fn walk(&mut self) -> Result<(), Stop> {
        loop {
            let at = self.cursor.at();
            match self.cursor.u8()? {
                EOF => return Ok(()),
                CONFIGURATION => self.configuration()?,
                COMMAND => {
                    let _which = self.cursor.u16()?;
                    let len = self.cursor.u16()?;
                    self.cursor.skip(len.into())?;
                }
                START | FULL => self.named()?,
                PART | END => {
                    let id = self.cursor.u32()?;
                    if self.ram_id != Some(id) {
                        return Err(Stop::Unknown { name: format!("number {id}") });
                    }
                    self.ram_section(id)?;
                }
                _ => return Err(Stop::Broken { at }),
            }
        }
    }

    /// A section that is the first one of its number.
    fn named(&mut self) -> Result<(), Stop> {
        let id = self.cursor.u32()?;
        let name = self.cursor.name()?;
        let instance = self.cursor.u32()?;
        let _version = self.cursor.u32()?;
        if name == RAM {
            self.ram_id = Some(id);
            return self.ram_section(id);
        }
        let next = self.expected.next();
        let is_it = |it: &&State<'_>| it.name == name && it.instance_id == u64::from(instance);
        let Some(device) = next.filter(is_it) else { return Err(Stop::Unknown { name }) };
        let at = self.cursor.at();
        self.cursor.skip(device.size().ok_or(Stop::Broken { at })?)?;
        self.footer(id)?;
        self.devices.push((device, at));
        Ok(())
    }

    fn ram_section(&mut self, id: u32) -> Result<(), Stop> {
        let ignore_shared = self.has_capability(super::IGNORE_SHARED);
        if self.has_capability(super::MAPPED_RAM) {
            return Err(Stop::Unknown { name: RAM.to_owned() });
        }
        self.ram.section(&mut self.cursor, ignore_shared)?;
        self.footer(id)
    }

    /// The section's number once more. Machines of before 2.4 do not write it, others at all sections.
    fn footer(&mut self, id: u32) -> Result<(), Stop> {
        let at = self.cursor.at();
        match self.cursor.peek() {
            Some([FOOTER]) => {
                self.has_footers = true;
                self.cursor.skip(1)?;
                if self.cursor.u32()? == id { Ok(()) } else { Err(Stop::Broken { at }) }
            }
            Some([EOF..=COMMAND]) if !self.has_footers => Ok(()),
            Some(_) => Err(Stop::Broken { at }),
            None => Err(Stop::Cut),
        }
    }

    /// The machine's name, and subsections that are there when there is need.
    fn configuration(&mut self) -> Result<(), Stop> {
        let len = self.cursor.u32()?;
        self.machine = Some(self.cursor.text(len.into())?);
        while self.cursor.peek() == Some([SUBSECTION]) {
            self.cursor.skip(1)?;
            let name = self.cursor.name()?;
            let _version = self.cursor.u32()?;
            match name.as_str() {
                "configuration/capabilities" => self.capabilities()?,
                "configuration/target-page-bits" => self.cursor.skip(4)?,
                "configuration/uuid" => self.cursor.skip(16)?,
                _ => return Err(Stop::Unknown { name }),
            }
        }
        Ok(())
    }

    fn capabilities(&mut self) -> Result<(), Stop> {
        let at = self.cursor.at();
        let count = self.cursor.u32()?;
        if count > MAX_CAPABILITIES {
            return Err(Stop::Broken { at });
        }
        for _ in 0..count {
            let name = self.cursor.name()?;
            self.capabilities.push(name);
        }
        Ok(())
    }
}
