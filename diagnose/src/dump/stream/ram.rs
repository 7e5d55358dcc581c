//! The sections of a stream that carry RAM: the list of blocks, and where each page of each block lies in the file.
//! Which block the guest has where is in `board.rs`.
//!
//! Facts are from QEMU's migration/ram.c: `ram_save_setup()` writes the list, `save_zero_page()`, `ram_save_page()`
//! and `save_page_header()` the pages.

use std::collections::HashMap;

use super::cursor::{Cursor, Stop};
use super::runs::{Builder, PAGE, Place, Runs};
use crate::dump::Bytes;

/// `RAM_SAVE_FLAG_*`, in the low bits of a page's offset in its block.
const FLAGS: u64 = PAGE - 1;
const ZERO: u64 = 0x02;
const MEM_SIZE: u64 = 0x04;
const NORMAL: u64 = 0x08;
const EOS: u64 = 0x10;
/// The page belongs to the block of the page before: no name follows.
const CONTINUE: u64 = 0x20;
const XBZRLE: u64 = 0x40;
/// Compressed with zlib, until QEMU 9.0.
const COMPRESS_PAGE: u64 = 0x100;
/// Since QEMU 8.1.
const MULTIFD_FLUSH: u64 = 0x200;

/// More blocks than any machine has: one for each DIMM and each device with memory of its own.
const MAX_BLOCKS: usize = 4096;

/// A block of RAM, of the guest or of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub name: String,
    /// Number of its first page; blocks follow each other without a gap.
    pub first: u32,
    pub pages: u32,
}

impl Block {
    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        u64::from(self.pages) * PAGE
    }
}

/// What the sections have said so far.
#[derive(Default)]
pub(super) struct Ram {
    blocks: Vec<Block>,
    by_name: HashMap<String, usize>,
    /// Block of the last page.
    current: Option<usize>,
    pages: Builder,
    packed: u64,
}

/// All that they say.
pub(super) struct Sent {
    pub blocks: Vec<Block>,
    pub runs: Runs,
    /// How many times a page was sent as a difference or compressed.
    pub packed: u64,
}

impl Ram {
    /// Reads one section behind its header. `ignore_shared`: whether the list has addresses.
    pub(super) fn section<B: Bytes>(
        &mut self,
        cursor: &mut Cursor<'_, B>,
        ignore_shared: bool,
    ) -> Result<(), Stop> {
        loop {
            cursor.forget();
            let at = cursor.at();
            let word = cursor.u64()?;
            let (flags, offset) = (word & FLAGS, word & !FLAGS);
            match flags & !CONTINUE {
                EOS => return Ok(()),
                MEM_SIZE => self.list(cursor, offset, ignore_shared)?,
                MULTIFD_FLUSH => {}
                kind @ (ZERO | NORMAL | XBZRLE | COMPRESS_PAGE) => {
                    if flags & CONTINUE == 0 {
                        self.current = self.by_name.get(&cursor.name()?).copied();
                    }
                    let place = self.place(cursor, kind)?;
                    self.add(offset, place).ok_or(Stop::Broken { at })?;
                }
                _ => return Err(Stop::Broken { at }),
            }
        }
    }

    /// The list of blocks, which ends when all RAM is in it.
    fn list<B: Bytes>(
        &mut self,
        cursor: &mut Cursor<'_, B>,
        mut total: u64,
        ignore_shared: bool,
    ) -> Result<(), Stop> {
        let at = cursor.at();
        while total > 0 {
            let name = cursor.name()?;
            let size = cursor.u64()?;
            if ignore_shared {
                cursor.skip(8)?;
            }
            let broken = Stop::Broken { at };
            total = total.checked_sub(size).filter(|_| size > 0).ok_or(broken.clone())?;
            self.add_block(name, size).ok_or(broken)?;
        }
        Ok(())
    }

    /// `None` when the list can't be: more than 16 TiB, too many blocks, twice the same name.
    fn add_block(&mut self, name: String, size: u64) -> Option<()> {
        let first = self.blocks.last().map_or(0, |last| last.first + last.pages);
        let pages = u32::try_from(size.div_ceil(PAGE)).ok()?;
        first.checked_add(pages)?;
        let index = self.blocks.len();
        if index >= MAX_BLOCKS || self.by_name.insert(name.clone(), index).is_some() {
            return None;
        }
        self.blocks.push(Block { name, first, pages });
        Some(())
    }

    /// Where the page is whose header has been read.
    fn place<B: Bytes>(&mut self, cursor: &mut Cursor<'_, B>, kind: u64) -> Result<Place, Stop> {
        let len = match kind {
            ZERO => return Ok(Place::Filled(cursor.u8()?)),
            NORMAL => {
                let at = cursor.at();
                cursor.skip(PAGE)?;
                return Ok(Place::At(at));
            }
            XBZRLE => {
                // `ENCODING_FLAG_XBZRLE`
                cursor.skip(1)?;
                cursor.u16()?.into()
            }
            _ => cursor.u32()?.into(),
        };
        cursor.skip(len)?;
        self.packed += 1;
        Ok(Place::Unread)
    }

    /// `None` when there is no such page.
    fn add(&mut self, offset: u64, place: Place) -> Option<()> {
        let block = self.blocks.get(self.current?)?;
        let page = u32::try_from(offset / PAGE).ok().filter(|page| *page < block.pages)?;
        self.pages.add(block.first + page, place);
        Some(())
    }

    /// No section follows.
    pub(super) fn finish(self) -> Sent {
        Sent { blocks: self.blocks, runs: self.pages.finish(), packed: self.packed }
    }
}
