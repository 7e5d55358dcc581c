//! The one error type of this crate: what could not be read, compiled or opened, and where.

use std::io;
use std::path::PathBuf;

use guest::{GuestPhys, GuestVirt, MemoryError};

use crate::BuildId;

/// Why knowledge could not be made, read or placed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read, written or mapped.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An ELF file is damaged or of the wrong kind.
    #[error("cannot read ELF data of {what}")]
    Elf {
        /// Which part was being read.
        what: &'static str,
        /// What the ELF reader said.
        #[source]
        source: object::Error,
    },
    /// DWARF data is damaged or of an unknown version.
    #[error("cannot read DWARF data in {what}")]
    Dwarf {
        /// Which part was being read.
        what: &'static str,
        /// What the DWARF reader said.
        #[source]
        source: gimli::Error,
    },
    /// A section that is needed is not there.
    #[error("section {section} is missing")]
    MissingSection {
        /// Name of the section.
        section: &'static str,
    },
    /// BTF data is damaged.
    #[error("damaged BTF: {what} at byte {offset:#x}")]
    Btf {
        /// What is wrong.
        what: &'static str,
        /// Offset in the BTF data, bytes.
        offset: usize,
    },
    /// ORC data is damaged or of an unknown layout.
    #[error("damaged ORC table: {what} ({value:#x})")]
    Orc {
        /// What is wrong.
        what: &'static str,
        /// The offending value.
        value: u64,
    },
    /// A relocation of a module's debug section cannot be applied.
    #[error("relocation type {kind} at offset {offset:#x} of {section} cannot be applied")]
    Relocation {
        /// Section that is relocated.
        section: String,
        /// Offset in it, bytes.
        offset: u64,
        /// ELF relocation type (`R_X86_64_*`).
        kind: u32,
    },
    /// A knowledge file is damaged, truncated or of another format version.
    #[error("damaged knowledge file: {what} (found {found:#x}, expected {expected:#x})")]
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// What was found.
        found: u64,
        /// What was expected.
        expected: u64,
    },
    /// Compressed data of a knowledge file cannot be unpacked.
    #[error("cannot unpack {what}")]
    Unpack {
        /// Which part.
        what: &'static str,
        /// What the decompressor said.
        #[source]
        source: io::Error,
    },
    /// Data could not be brought into file form.
    #[error("cannot make {what}: {reason}")]
    Write {
        /// What was being made.
        what: &'static str,
        /// What the writer said (its error type is not public).
        reason: String,
    },
    /// Guest memory could not be read.
    #[error("cannot read the guest's {what}")]
    Guest {
        /// What was being read.
        what: &'static str,
        /// What the memory said.
        #[source]
        source: MemoryError,
    },
    /// The kernel has no such symbol.
    #[error("the kernel has no symbol {name}")]
    MissingSymbol {
        /// Name of the symbol.
        name: &'static str,
    },
    /// The kernel has no such structure member.
    #[error("the kernel has no member {structure}.{path}")]
    MissingMember {
        /// The structure.
        structure: &'static str,
        /// Path of the member.
        path: &'static str,
    },
    /// The build id of the guest or a module is not the one the knowledge was made from.
    #[error("build id {found} found, {expected} expected")]
    WrongBuild {
        /// What was found.
        found: BuildId,
        /// What the knowledge was made from.
        expected: BuildId,
    },
    /// A value in guest memory makes no sense.
    #[error("the guest's {what} at {at} holds {value:#x}")]
    Implausible {
        /// What was being read.
        what: &'static str,
        /// Where.
        at: GuestVirt,
        /// The value.
        value: u64,
    },
    /// No Linux kernel was found in the guest's RAM.
    #[error("no running kernel found in the guest's RAM: {why}")]
    NoKernel {
        /// What was looked for, and why what was found was not taken.
        why: &'static str,
    },
    /// Several kernels lie in RAM (leftovers of an earlier boot), and nothing tells which one runs.
    #[error("{count} kernels lie in the guest's RAM and it is not clear which one runs")]
    AmbiguousKernel {
        /// How many pass every check.
        count: usize,
    },
    /// The payload was given more calls than its mailbox holds.
    #[error("{calls} calls for the payload, {most} at most")]
    TooManyCalls {
        /// How many were asked for.
        calls: usize,
        /// How many fit.
        most: usize,
    },
    /// The kernel's last page directory has no free slot for the payload.
    #[error("no free slot for the payload in the page directory at guest-physical {directory:#x}")]
    NoFreeSlot {
        /// The directory.
        directory: GuestPhys,
    },
    /// Fresh memory that does not start at a page boundary.
    #[error("fresh memory at guest-physical {at:#x} is not page-aligned")]
    UnalignedRegion {
        /// Where it starts.
        at: GuestPhys,
    },
    /// VMCOREINFO lacks a line.
    #[error("VMCOREINFO at guest-physical {at:#x} has no line for {entry}")]
    NoVmcoreinfoEntry {
        /// Key of the line.
        entry: &'static str,
        /// Where the text lies.
        at: GuestPhys,
    },
}

impl Error {
    /// Turns a memory error into one that says what was being read.
    pub(crate) fn guest(what: &'static str) -> impl Fn(MemoryError) -> Self {
        move |source| Self::Guest { what, source }
    }

    pub(crate) fn io(path: &std::path::Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn damaged(what: &'static str, found: u64, expected: u64) -> Self {
        Self::Damaged { what, found, expected }
    }
}
