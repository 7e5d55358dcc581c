//! The kernel's memory as its own counters have it.

use serde::Serialize;

use crate::Error;
use crate::kernel::Kernel;

/// Counters of the kernel, in pages of 4096 bytes. What CPUs have counted for themselves and not yet added up is not
/// in them (`vm_stat_threshold`, mm/vmstat.c): each may be some hundred pages off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// RAM that the kernel manages.
    pub total: u64,
    /// Free.
    pub free: Option<u64>,
    /// Page cache and shared memory.
    pub file: Option<u64>,
    /// Memory of programs.
    pub anonymous: Option<u64>,
    /// To be written to disk.
    pub dirty: Option<u64>,
    /// Slabs that can be given back.
    pub slab_reclaimable: Option<u64>,
    /// Slabs that can't.
    pub slab_unreclaimable: Option<u64>,
}

pub(super) fn of(kernel: &Kernel<'_>) -> Result<Memory, Error> {
    const TOTAL: &str = "_totalram_pages";
    let at = kernel.image.address_of(TOTAL).ok_or(Error::MissingSymbol(TOTAL))?;
    let total = kernel.pointer_at(at, TOTAL)?.0;
    let node = |name| counter(kernel, "vm_node_stat", name);
    // Counted in bytes when `enum node_stat_item` says so (`_B`, since commit d42f3245c7e2, v5.9), but always stored in
    // pages there (`vmstat_item_in_bytes()`).
    Ok(Memory {
        total,
        free: counter(kernel, "vm_zone_stat", "NR_FREE_PAGES"),
        file: node("NR_FILE_PAGES"),
        anonymous: node("NR_ANON_MAPPED"),
        dirty: node("NR_FILE_DIRTY"),
        slab_reclaimable: node("NR_SLAB_RECLAIMABLE_B"),
        slab_unreclaimable: node("NR_SLAB_UNRECLAIMABLE_B"),
    })
}

/// A counter of an array of `atomic_long_t` that an enumeration indexes. A sum that is negative, for what CPUs have not
/// added, counts as 0.
fn counter(kernel: &Kernel<'_>, array: &'static str, name: &str) -> Option<u64> {
    let index = u64::try_from(kernel.image.types.enumerator(name)?).ok().filter(|it| *it < 256)?;
    let at = kernel.image.address_of(array)?.checked_add(index * 8)?;
    let value = kernel.memory.read_u64(at).ok()?;
    Some(u64::try_from(value.cast_signed()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest};

    #[test]
    fn what_a_kernel_does_not_have_is_not_determined() {
        let mut guest = Guest::new().object("_totalram_pages", DATA + 0x100);
        guest.poke_u64(DATA + 0x100, 1234);
        let image = guest.image();
        let space = guest.machine.space();
        let found = of(&Kernel::of_memory(&image, &space)).unwrap();
        assert_eq!((found.total, found.free), (1234, None));
        let image = Guest::new().image();
        let found = of(&Kernel::of_memory(&image, &space));
        assert_eq!(found, Err(Error::MissingSymbol("_totalram_pages")));
    }
}
