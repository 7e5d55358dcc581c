//! Decompression of one page by the flags of its descriptor. Output is bounded by the page; input by the
//! caller. Codecs keep their working memory between pages.

use flate2::{Decompress, FlushDecompress, Status};

use super::lzo;

/// Size of a page in bytes.
pub(super) const PAGE: usize = 4096;
/// `DUMP_DH_COMPRESSED_*` (makedumpfile's diskdump_mod.h).
const ZLIB: u32 = 0x1;
const LZO: u32 = 0x2;
const SNAPPY: u32 = 0x4;
/// Since makedumpfile 1.7.0.
const ZSTD: u32 = 0x20;
const COMPRESSED: u32 = ZLIB | LZO | SNAPPY | ZSTD;

/// Whether a page with these flags is stored as it is.
pub(super) fn is_stored(flags: u32) -> bool {
    flags & COMPRESSED == 0
}

/// The codecs.
pub(super) struct Codecs {
    zlib: Decompress,
    /// `None` when the library could not get its memory.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    snappy: snap::raw::Decoder,
}

impl Codecs {
    pub(super) fn new() -> Self {
        Self {
            zlib: Decompress::new(true),
            zstd: zstd::bulk::Decompressor::new().ok(),
            snappy: snap::raw::Decoder::new(),
        }
    }

    /// Decompresses a whole page; `None` when the data is damaged, holds less or more than a page, or is
    /// compressed in a way that is not known here.
    pub(super) fn page(&mut self, flags: u32, data: &[u8], page: &mut [u8; PAGE]) -> Option<()> {
        let written = match flags & COMPRESSED {
            ZLIB => {
                self.zlib.reset(true);
                let status = self.zlib.decompress(data, page, FlushDecompress::Finish).ok()?;
                if status != Status::StreamEnd {
                    return None;
                }
                usize::try_from(self.zlib.total_out()).ok()?
            }
            LZO => lzo::decompress(data, page)?,
            SNAPPY => self.snappy.decompress(data, page).ok()?,
            ZSTD => self.zstd.as_mut()?.decompress_to_buffer(data, &mut page[..]).ok()?,
            _ => return None,
        };
        (written == PAGE).then_some(())
    }
}
