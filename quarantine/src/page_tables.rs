//! Whether the page tables that the CPU runs on still hold the kernel. Reads only.

use guest::GuestVirt;

use crate::Reason;
use crate::guest_struct::Structures;
use crate::invariants::{Current, same};

/// Entries of the top-level table that map the kernel: the upper half, with 4 levels and with 5 (Intel SDM 3A 4.5.4).
const KERNEL_ENTRIES: std::ops::Range<u64> = 256..512;
/// Accessed and dirty, which the processor sets by itself (Intel SDM 3A 4.8).
const SET_BY_PROCESSOR: u64 = 0x60;
/// `LOADED_MM_SWITCHING`, arch/x86/include/asm/tlbflush.h: the CPU was changing them.
const SWITCHING: u64 = 1;

/// What maps the kernel in `init_mm` does so in the loaded memory description: `pgd_ctor()` copied it there, and
/// `sync_global_pgds()` keeps it so (arch/x86/mm/). That of the firmware's runtime services has its own.
pub(crate) fn check(kernel: &Structures<'_>, current: Current) -> Result<(), Reason> {
    let state = current.cpu.and_then(|cpu| kernel.image.per_cpu("cpu_tlbstate", cpu));
    let (Some(state), Some(init)) = (state, kernel.image.address_of("init_mm")) else {
        return Ok(());
    };
    let loaded = kernel.need(state, "tlb_state", "loaded_mm")?;
    let firmware = kernel.image.address_of("efi_mm");
    if loaded == init.0 || loaded == SWITCHING || firmware == Some(GuestVirt(loaded)) {
        return Ok(());
    }
    let tables = |description| kernel.need(description, "mm_struct", "pgd").map(GuestVirt);
    let (own, whole) = (tables(GuestVirt(loaded))?, tables(init)?);
    let (entries, expected) = (upper_half(kernel, own)?, upper_half(kernel, whole)?);
    for (index, (found, expected)) in KERNEL_ENTRIES.zip(entries.zip(expected)) {
        if expected != 0 {
            same("an entry of the page tables", own + index * 8, found, expected)?;
        }
    }
    Ok(())
}

fn upper_half(
    kernel: &Structures<'_>,
    table: GuestVirt,
) -> Result<impl Iterator<Item = u64>, Reason> {
    let mut bytes = [0; 2048];
    let at = table + KERNEL_ENTRIES.start * 8;
    let unreadable = |_| Reason::Unreadable { what: "the page tables".to_owned(), at };
    kernel.memory.read(at, &mut bytes).map_err(unreadable)?;
    let (words, _) = bytes.as_chunks::<8>();
    let words = words.to_vec();
    Ok(words.into_iter().map(|word| u64::from_le_bytes(word) & !SET_BY_PROCESSOR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scene;

    fn check(scene: &Scene) -> Result<(), Reason> {
        let memory = scene.machine.space();
        let kernel = Structures { image: &scene.image, memory: &memory };
        super::check(&kernel, Current { task: scene.task, cpu: Some(0) })
    }

    #[test]
    fn what_maps_the_kernel_is_everywhere_the_same() {
        let mut scene = Scene::new();
        let [own, whole] = scene.add_page_tables();
        scene.poke_word(whole + 300 * 8, 0x1063);
        assert!(matches!(check(&scene), Err(Reason::Broken { found: 0, .. })));
        scene.poke_word(own + 300 * 8, 0x1003);
        assert_eq!(check(&scene), Ok(()), "only the accessed and dirty bits differ");
        scene.poke_word(own + 8, 0x1234);
        scene.poke_word(own + 310 * 8, 0x1234);
        assert_eq!(check(&scene), Ok(()), "a process's own");
        scene.poke_word(own + 300 * 8, 0x2003);
        let broken = check(&scene);
        assert!(matches!(broken, Err(Reason::Broken { at, .. }) if at == own + 300 * 8));
    }

    #[test]
    fn tables_that_are_being_loaded_are_nobodys() {
        let mut scene = Scene::new();
        let [own, whole] = scene.add_page_tables();
        scene.poke_word(whole + 300 * 8, 0x1063);
        scene.set_member("tlb_state", "loaded_mm", scene.tlb_state(), SWITCHING);
        assert_eq!(check(&scene), Ok(()));
        scene.set_member("tlb_state", "loaded_mm", scene.tlb_state(), own.0 + 1);
        assert!(check(&scene).is_err(), "no description of memory");
    }
}
