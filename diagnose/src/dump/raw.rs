//! Raw images of RAM: which offset is which guest-physical address. An image has no header, so that this
//! follows from what the caller knows, or from a size at which all machines agree.

use guest::GuestPhys;

use super::segments::Segment;

/// RAM above the hole starts here on every x86 machine.
const ABOVE: u64 = 4 << 30;
/// The smallest RAM at which some machine has RAM above 4 GiB: QEMU's q35 (`pc_q35_init()` in
/// hw/i386/pc_q35.c; 3.5 GiB for its `pc`).
pub(super) const FIRST_SPLIT: u64 = 0xb000_0000;

/// Layout of a raw image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RawLayout {
    /// An offset in the file is a guest-physical address, all through: the monitor's `pmemsave`.
    Physical,
    /// RAM without the hole below 4 GiB: a file that backs a VM's RAM. What lies behind the first
    /// `below_4g` bytes belongs to 4 GiB and up.
    Ram {
        /// RAM below the PCI hole, in bytes. QEMU: for `pc` 3 GiB when the VM has 3.5 GiB or more, for
        /// `q35` 2 GiB when it has 2.75 GiB or more, else all of it.
        below_4g: u64,
    },
}

impl RawLayout {
    /// The layout of an image of `size` bytes, where there can be no other: below 2.75 GiB.
    #[must_use]
    pub fn of_size(size: u64) -> Option<Self> {
        (size < FIRST_SPLIT).then_some(Self::Physical)
    }

    pub(super) fn segments(self, size: u64) -> Vec<Segment> {
        let segment =
            |at, offset, size| Segment { at: GuestPhys(at), captured: size, size, offset };
        match self {
            Self::Physical => vec![segment(0, 0, size)],
            Self::Ram { below_4g } => {
                let low = size.min(below_4g).min(ABOVE);
                vec![segment(0, 0, low), segment(ABOVE, low, size - low)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hole_is_skipped() {
        let segments = RawLayout::Ram { below_4g: 3 << 30 }.segments(4 << 30);
        assert_eq!(segments[1].at, GuestPhys(4 << 30));
        assert_eq!((segments[1].offset, segments[1].captured), (3 << 30, 1 << 30));
        assert_eq!(RawLayout::of_size(512 << 20), Some(RawLayout::Physical));
        assert_eq!(RawLayout::of_size(4 << 30), None);
    }
}
