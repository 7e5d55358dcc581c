//! The mapping that an address of a process lies in, and which functions of drivers serve page faults there. Says
//! nothing of any fault.

use guest::{GuestVirt, VirtMemory};
use repair_image::RepairImage;

use crate::Error;
use crate::kernel::Kernel;

/// Nodes from the root of a process's mappings to a leaf at most: a tree of 2^31 mappings has far fewer levels.
const DEPTH_MAX: usize = 16;
/// Slots of one node at most (lib/maple_tree.c: 16 and 10).
const SLOTS_MAX: u64 = 32;
/// Functions of `vm_operations_struct` that serve a fault. Where two of them are called for one fault, the first of
/// them is called last only if the other handed out a page, and its answer is seen at once (mm/memory.c,
/// do_shared_fault()).
const OPERATIONS: [&str; 4] = ["fault", "page_mkwrite", "pfn_mkwrite", "huge_fault"];

/// A mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its `vm_area_struct`, guest-virtual.
    pub at: GuestVirt,
    /// Functions of drivers that serve faults in it.
    pub handlers: Vec<Handler>,
}

/// A driver's function that serves page faults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler {
    /// Which member of `vm_operations_struct` it is.
    pub operation: &'static str,
    /// Its first instruction, guest-virtual.
    pub at: GuestVirt,
    /// The driver.
    pub module: String,
    /// Its name.
    pub function: String,
}

/// The mapping of the task's process that `address` lies in; `None` when there is none. The guest may run meanwhile:
/// what is found is checked to be a mapping of that address.
///
/// # Errors
/// Not a process, a structure can't be read, or this kernel keeps its mappings elsewhere.
pub fn area(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    task: GuestVirt,
    address: GuestVirt,
) -> Result<Option<Area>, Error> {
    let kernel = Kernel::of_memory(image, memory);
    let mm = kernel.pointer(task, "task_struct", "mm")?;
    let Some(at) = look_up(&kernel, mm, address)?.filter(|at| at.is_kernel_half()) else {
        return Ok(None);
    };
    let start = kernel.pointer(at, "vm_area_struct", "vm_start")?;
    let end = kernel.pointer(at, "vm_area_struct", "vm_end")?;
    let own = kernel.pointer(at, "vm_area_struct", "vm_mm")? == mm;
    if !own || !(start..end).contains(&address) {
        return Ok(None);
    }
    let operations = kernel.pointer(at, "vm_area_struct", "vm_ops")?;
    let handlers = if operations.0 == 0 { Vec::new() } else { handlers(&kernel, operations) };
    Ok(Some(Area { at, handlers }))
}

fn handlers(kernel: &Kernel<'_>, operations: GuestVirt) -> Vec<Handler> {
    let of = |operation: &'static str| {
        let at = kernel.pointer(operations, "vm_operations_struct", operation).ok()?;
        let module = kernel.image.module_of_text(at)?.name.clone();
        let location = kernel.image.locate(at).filter(|location| location.offset == 0)?;
        Some(Handler { operation, at, module, function: location.symbol.name.to_owned() })
    };
    OPERATIONS.into_iter().filter_map(of).collect()
}

/// What the maple tree of mappings has for an address. Since commit d4af56c5c7c6 ("mm: start tracking VMAs with maple
/// tree", v6.1).
fn look_up(
    kernel: &Kernel<'_>,
    mm: GuestVirt,
    address: GuestVirt,
) -> Result<Option<GuestVirt>, Error> {
    let enumerator = |name| kernel.image.types.enumerator(name);
    let (leaf, wide) = (enumerator("maple_leaf_64"), enumerator("maple_arange_64"));
    let mut entry = kernel.pointer(mm, "mm_struct", "mm_mt.ma_root")?;
    // `xa_is_node()`: one mapping alone is no node.
    if entry.0 & 3 != 2 {
        return Ok(Some(entry));
    }
    let mut max = u64::MAX;
    for _ in 0..DEPTH_MAX {
        // Bits 3 to 6 are the node's type, nodes lie at multiples of 256 (include/linux/maple_tree.h).
        let kind = Some((entry.0 >> 3 & 0xf) as i64);
        let structure = if kind == wide { "maple_arange_64" } else { "maple_range_64" };
        (entry, max) = step(kernel, entry.align_down(256), structure, address, max)?;
        if kind == leaf {
            return Ok(Some(entry));
        }
        if !entry.is_kernel_half() {
            break;
        }
    }
    Ok(None)
}

/// The slot of a node that an address belongs to, and the last address that does. A pivot is the last address of its
/// slot; the last slot in use may have none, or 0 (`mas_logical_pivot()`).
fn step(
    kernel: &Kernel<'_>,
    node: GuestVirt,
    structure: &'static str,
    address: GuestVirt,
    max: u64,
) -> Result<(GuestVirt, u64), Error> {
    let pivots = kernel.member(structure, "pivot")?;
    let slots = kernel.offset(structure, "slot")?;
    let count = (pivots.size / 8).min(SLOTS_MAX);
    let mut found = (count, max);
    for index in 0..count {
        let pivot = kernel.pointer_at(node + pivots.offset + index * 8, structure)?.0;
        let pivot = if pivot == 0 && index > 0 { max } else { pivot };
        if address.0 <= pivot {
            found = (index, pivot);
            break;
        }
    }
    Ok((kernel.pointer_at(node + slots + found.0 * 8, structure)?, found.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Guest, MODULE, TEXT};

    const TASK: u64 = DATA + 0x1000;
    const MM: u64 = DATA + 0x2000;
    const ROOT: u64 = DATA + 0x3000;
    const LEAF: u64 = DATA + 0x3100;
    const AREA: u64 = DATA + 0x4000;
    const OPERATIONS: u64 = DATA + 0x5000;
    const START: u64 = 0x7f00_0000_0000;

    /// A process with one mapping of two pages of module `m`, in the second leaf of its tree.
    fn guest() -> Guest {
        let mut guest = Guest::new()
            .types(|types| {
                types
                    .with("mm_struct", "mm_mt.ma_root", 0x40, 8)
                    .with("vm_area_struct", "vm_start", 0x20, 8)
                    .with("vm_area_struct", "vm_end", 0x28, 8)
                    .with("vm_area_struct", "vm_mm", 0x30, 8)
                    .with("vm_area_struct", "vm_ops", 0x38, 8)
                    .with("vm_operations_struct", "fault", 0x10, 8)
                    .with("vm_operations_struct", "page_mkwrite", 0x18, 8)
                    .with("maple_range_64", "pivot", 0x8, 3 * 8)
                    .with("maple_range_64", "slot", 0x20, 4 * 8)
                    .with("maple_arange_64", "pivot", 0x10, 2 * 8)
                    .with("maple_arange_64", "slot", 0x20, 3 * 8)
                    .valued("maple_leaf_64", 1)
                    .valued("maple_arange_64", 3)
            })
            .function("serve", MODULE + 0x100, 0x40)
            .function("filemap_fault", TEXT + 0x100, 0x40);
        guest.poke_u64(TASK + 0x30, MM);
        guest.poke_u64(MM + 0x40, ROOT | 3 << 3 | 2);
        // Up to START - 1 in a leaf that is not there, the rest in the second one.
        guest.poke_u64(ROOT + 0x10, START - 1);
        guest.poke_u64(ROOT + 0x28, LEAF | 1 << 3 | 6);
        guest.poke_u64(LEAF + 0x8, START + 0x1fff);
        guest.poke_u64(LEAF + 0x20, AREA);
        for (member, value) in [(0x20, START), (0x28, START + 0x2000), (0x30, MM)] {
            guest.poke_u64(AREA + member, value);
        }
        guest.poke_u64(AREA + 0x38, OPERATIONS);
        guest.poke_u64(OPERATIONS + 0x10, TEXT + 0x100);
        guest.poke_u64(OPERATIONS + 0x18, MODULE + 0x100);
        guest
    }

    fn find(guest: &mut Guest, address: u64) -> Result<Option<Area>, Error> {
        let image = guest.image();
        area(&image, &guest.machine.space(), GuestVirt(TASK), GuestVirt(address))
    }

    #[test]
    fn the_functions_of_drivers_are_found() {
        for address in [START, START + 0x1fff] {
            let area = find(&mut guest(), address).unwrap().unwrap();
            assert_eq!(area.at, GuestVirt(AREA));
            let [handler] = area.handlers.as_slice() else { panic!("{area:?}") };
            assert_eq!((handler.operation, handler.at.0), ("page_mkwrite", MODULE + 0x100));
            assert_eq!((handler.module.as_str(), handler.function.as_str()), ("m", "serve"));
        }
    }

    #[test]
    fn an_address_outside_has_no_mapping() {
        for address in [START - 1, START + 0x2000, 0] {
            assert!(!matches!(find(&mut guest(), address), Ok(Some(_))), "{address:#x}");
        }
        let mut other = guest();
        other.poke_u64(AREA + 0x30, MM + 8);
        assert_eq!(find(&mut other, START), Ok(None), "it is another process's by now");
    }

    #[test]
    fn a_mapping_without_operations_is_nobodys() {
        let mut guest = guest();
        guest.poke_u64(AREA + 0x38, 0);
        assert_eq!(find(&mut guest, START).unwrap().unwrap().handlers, []);
    }

    #[test]
    fn a_tree_that_leads_into_itself_ends() {
        let mut guest = guest();
        guest.poke_u64(ROOT + 0x28, ROOT | 3 << 3 | 6);
        assert_eq!(find(&mut guest, START), Ok(None));
    }
}
