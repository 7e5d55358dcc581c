//! Why a dump can't be opened: one enum for all formats. Pages that are merely missing are
//! `MemoryError::NotCaptured` when they are read, and what is odd about a usable dump is a `Remark`.

use std::path::PathBuf;

use thiserror::Error;

/// Why a file is no usable dump.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// No file was given.
    #[error("no file given")]
    NoFile,
    /// A file can't be opened or mapped.
    #[error("cannot map {}", .path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the mapping said.
        #[source]
        source: repair_image::Error,
    },
    /// No format that is known here, and no layout was given for a raw image.
    #[error(
        "no known dump format (first bytes {start:02x?}); a raw image of RAM must be given with its \
         layout"
    )]
    UnknownFormat {
        /// The first bytes.
        start: [u8; 8],
    },
    /// A known format that is not read here.
    #[error("{} can't be read: {}", .0, .0.advice())]
    Unsupported(Unsupported),
    /// The file ends inside of a structure without which nothing can be read.
    #[error("the file ends inside of its {what} (at offset {at:#x})")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Where it starts, offset in the file.
        at: u64,
    },
    /// An ELF file, but not of a kind that holds a machine's memory.
    #[error(
        "an ELF file, but no 64-bit little-endian core file (class {class}, data {data}, type {kind})"
    )]
    NotACore {
        /// `EI_CLASS`.
        class: u8,
        /// `EI_DATA`.
        data: u8,
        /// `e_type`.
        kind: u16,
    },
    /// A dump of another architecture.
    #[error("a dump of another architecture: {found}, not x86-64")]
    OtherArchitecture {
        /// What the header says: an ELF machine number or a `uname -m`.
        found: String,
    },
    /// A number in a header that no such dump has.
    #[error("{what} is {found}, which no such dump has")]
    BadHeader {
        /// The header's member.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// More of something than is read here.
    #[error("{found} {what}, more than the {limit} that are read")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many are allowed.
        limit: u64,
    },
    /// Several files that are not parts of one dump.
    #[error("file {index} is no part of the same split dump: {why}")]
    NotOneDump {
        /// Index of the file, in the order they were given.
        index: usize,
        /// What differs.
        why: &'static str,
    },
    /// A migration stream without the machine's RAM.
    #[error(
        "the machine's RAM was left out of the stream (capability x-ignore-shared): it is in the file that backs it"
    )]
    RamLeftOut,
    /// No memory in it.
    #[error("the dump holds no memory")]
    NoMemory,
}

/// Formats that are recognised, to say what to do instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unsupported {
    /// A libvirt save file of this format (`save_image_format` in its qemu.conf), not `raw`.
    LibvirtSave(&'static str),
    /// A QEMU migration stream with this capability.
    QemuMigration(&'static str),
    /// A disk image with internal snapshots.
    Qcow2,
    /// The diskdump facility of 2.6 kernels, the ancestor of kdump-compressed.
    Diskdump,
    /// A Windows crash dump.
    WindowsDump,
    /// A file compressed as a whole.
    Compressed(&'static str),
}

impl Unsupported {
    /// What its owner can do.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::LibvirtSave(_) => {
                "use `virsh dump --memory-only`, or save it again with `--image-format raw`"
            }
            Self::QemuMigration(_) => "use `dump-guest-memory` (or restore it and dump then)",
            Self::Qcow2 => "load the snapshot into QEMU and use `dump-guest-memory`",
            Self::Diskdump => "convert it with makedumpfile",
            Self::WindowsDump => "only Linux guests are diagnosed",
            Self::Compressed(_) => "decompress it first",
        }
    }
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LibvirtSave(format) => {
                return write!(f, "a libvirt save file of format {format}");
            }
            Self::QemuMigration(with) => {
                return write!(f, "a QEMU migration stream with capability {with}");
            }
            Self::Qcow2 => "a qcow2 disk image",
            Self::Diskdump => "a diskdump",
            Self::WindowsDump => "a Windows crash dump",
            Self::Compressed(by) => return write!(f, "a file compressed with {by}"),
        })
    }
}
