//! What libvirt writes before a stream in a file of `virsh save` and managed saves: a header and the domain's XML
//! (`struct _virQEMUSaveHeader` in its src/qemu/qemu_saveimage.h). `virsh dump` writes none.

use super::Remark;
use crate::dump::storage::Storage;
use crate::dump::{Error, Unsupported};

/// `QEMU_SAVE_MAGIC`, and what stands there until the file is complete.
const SAVE: &[u8; 16] = b"LibvirtQemudSave";
const PARTIAL: &[u8; 16] = b"LibvirtQemudPart";
/// Offsets in the header, which is in the order of the host's bytes.
const VERSION: u64 = 16;
const DATA_LEN: u64 = 20;
const FORMAT: u64 = 28;
const SIZE: u64 = 92;
/// `QEMU_SAVE_VERSION`
const MAX_VERSION: u32 = 2;
/// `virQEMUSaveFormat`, by numbers that start with 1; 0 is a stream as it is. The last one has RAM beside the
/// stream.
const FORMATS: [&str; 6] = ["gzip", "bzip2", "xz", "lzop", "zstd", "sparse"];

/// Where the stream begins; `None` when libvirt has not written this.
pub(super) fn stream<B: AsRef<[u8]>>(
    storage: &Storage<B>,
    remarks: &mut Vec<Remark>,
) -> Result<Option<u64>, Error> {
    let magic: Option<[u8; 16]> = storage.array(0);
    match magic.as_ref() {
        Some(SAVE) => {}
        Some(PARTIAL) => remarks.push(Remark::Unfinished),
        _ => return Ok(None),
    }
    let member = |at| {
        let bytes = storage.array(at).ok_or(Error::Truncated { what: "header", at: 0 })?;
        Ok::<u32, Error>(u32::from_le_bytes(bytes))
    };
    let (version, format) = (member(VERSION)?, member(FORMAT)?);
    if version > MAX_VERSION {
        return Err(Error::BadHeader {
            what: "version of libvirt's header",
            found: version.into(),
        });
    }
    if let Some(index) = (format as usize).checked_sub(1) {
        let what = "format in libvirt's header";
        let bad = Error::BadHeader { what, found: format.into() };
        return Err(FORMATS
            .get(index)
            .map_or(bad, |name| Error::Unsupported(Unsupported::LibvirtSave(name))));
    }
    Ok(Some(SIZE + u64::from(member(DATA_LEN)?)))
}
