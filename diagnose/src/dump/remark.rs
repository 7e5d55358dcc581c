//! What is odd about a dump that can be used all the same: missing parts, things its writer gets wrong.

use std::fmt;
use std::ops::Range;

use guest::GuestPhys;

/// Something that whoever relies on the dump should know.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remark {
    /// The file ends too early: what was behind its end is missing.
    Cut {
        /// What is incomplete.
        what: &'static str,
    },
    /// Its writer said that it did not finish (`DUMP_DH_COMPRESSED_INCOMPLETE`).
    Incomplete,
    /// RAM that belongs to parts of a split dump that were not given.
    MissingPart {
        /// Guest-physical range.
        range: Range<GuestPhys>,
    },
    /// Bytes were overwritten on purpose (`makedumpfile --eppic`, `--config`).
    Erased,
    /// The dump has no VMCOREINFO: it must be found in memory.
    NoVmcoreinfo,
    /// The dump has no registers.
    NoRegisters,
    /// RAM was left out of an ELF dump (`makedumpfile -E`). The format does not tell pages that were
    /// filtered from pages that were zero, so that all of them are missing.
    LeftOut,
    /// A `live.core` of defib's own: what the repair did not touch was read after it, while the guest ran.
    TwoMoments,
    /// libvirt was not yet done with it (`QEMU_SAVE_PARTIAL`).
    Unfinished,
    /// A migration stream without a description of its devices: nothing behind RAM can be read.
    NoDescription,
    /// A migration stream makes no sense from here on.
    Broken {
        /// Offset in the file.
        at: u64,
    },
    /// A migration stream has a section that is not in its description: what follows it can't be read.
    UnknownSection {
        /// Its name.
        name: String,
    },
    /// Pages of a migration stream that were sent as differences to earlier copies (XBZRLE) or compressed.
    Packed {
        /// How many times that was done.
        times: u64,
    },
    /// Where RAM of a migration stream was placed, the PCI hole in between.
    Split {
        /// Bytes from 0 on.
        below_4g: u64,
        /// Bytes from 4 GiB on.
        above_4g: u64,
        /// What tells.
        by: SplitBy,
    },
    /// RAM above 4 GiB of a migration stream was left out: nothing tells where it lies.
    HighLeftOut {
        /// Bytes of RAM below.
        below_4g: u64,
    },
    /// A large block of a migration stream that is not the machine's own RAM: plugged in later, or a device's.
    BlockLeftOut {
        /// QEMU's name of it.
        name: String,
        /// Its size in bytes.
        size: u64,
    },
}

/// What tells how much RAM lies below 4 GiB.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SplitBy {
    /// The board itself, in the clock chip's CMOS, whose sizes add up to the RAM that is there.
    Cmos,
    /// The size: boards have less than that all below, unless told otherwise.
    Size,
    /// What this machine has by default.
    Machine(String),
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        match self {
            Self::Cut { what } => write!(f, "the file ends too early: its {what} are incomplete"),
            Self::Incomplete => f.write_str("its writer ran out of space: pages are missing"),
            Self::MissingPart { range } => {
                write!(f, "a part is missing: {:#x} to {:#x}", range.start, range.end)
            }
            Self::Erased => f.write_str("some data was erased on purpose when it was written"),
            Self::NoVmcoreinfo => f.write_str("no VMCOREINFO in its notes"),
            Self::NoRegisters => f.write_str("no registers in its notes"),
            Self::TwoMoments => f.write_str(
                "what the repair did not touch was read after it: a plan made of this file may refuse what the guard did",
            ),
            Self::LeftOut => {
                f.write_str("RAM was left out, filtered or zero: an ELF dump does not say")
            }
            Self::Unfinished => f.write_str("libvirt was not yet done with this file"),
            Self::NoDescription => {
                f.write_str("no description of its devices: their sections can't be read")
            }
            Self::Broken { at } => write!(f, "it makes no sense from offset {at:#x} on"),
            Self::UnknownSection { name } => {
                write!(f, "section {name:?} is not described: what follows can't be read")
            }
            Self::Packed { times } => {
                write!(f, "pages are missing: {times} were sent as differences or compressed")
            }
            Self::Split { below_4g, above_4g, by } => {
                let (below, above) = (below_4g / MIB, above_4g / MIB);
                write!(f, "RAM is taken for {below} MiB at 0 and {above} MiB at 4 GiB: {by}")
            }
            Self::HighLeftOut { below_4g } => {
                let below = below_4g / MIB;
                write!(f, "RAM from {below} MiB on was left out: nothing tells where it lies")
            }
            Self::BlockLeftOut { name, size } => {
                let size = size / MIB;
                write!(f, "memory {name:?} ({size} MiB) was left out: nothing tells where it lies")
            }
        }
    }
}

impl fmt::Display for SplitBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cmos => f.write_str("the machine's CMOS says so"),
            Self::Size => {
                f.write_str("presumed by its size alone, as the machine's CMOS does not tell")
            }
            Self::Machine(name) => {
                write!(f, "presumed, the default of {name}, as its CMOS does not tell")
            }
        }
    }
}
