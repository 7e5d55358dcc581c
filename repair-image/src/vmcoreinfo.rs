//! VMCOREINFO, the text in which a kernel tells dump tools where things are: finding it in RAM and
//! parsing it (Documentation/admin-guide/kdump/vmcoreinfo.rst). What follows from it is in `locate.rs`.

use std::collections::HashMap;

use guest::{GuestPhys, GuestVirt, PhysMemory};

/// `VMCOREINFO_BYTES`: the text fills at most one page, and `vmcoreinfo_data` is a page of its own
/// since v4.13.
const PAGE: usize = 4096;
/// First line of every VMCOREINFO since v2.6.24.
const FIRST: &[u8] = b"OSRELEASE=";
/// More pages that begin like VMCOREINFO than any honest guest has.
const MAX_CANDIDATES: usize = 64;

/// One VMCOREINFO text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vmcoreinfo {
    /// Guest-physical address of the text; 0 when it did not come from memory.
    pub at: GuestPhys,
    entries: HashMap<String, String>,
}

impl Vmcoreinfo {
    /// Parses the text up to its first NUL; `None` when it does not begin like VMCOREINFO.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        if !text.starts_with(FIRST) {
            return None;
        }
        let text = text.split(|&byte| byte == 0).next()?;
        let entries = String::from_utf8_lossy(text)
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Some(Self { at: GuestPhys(0), entries })
    }

    /// Every page of RAM that begins like VMCOREINFO, in ascending order, at most 64. Stale copies
    /// (of a kernel that ran before a reboot) may be among them.
    #[must_use]
    pub fn find_all(phys: &dyn PhysMemory) -> Vec<Self> {
        let mut found = Vec::new();
        for range in phys.ranges() {
            let Some(first) = range.start.0.checked_next_multiple_of(PAGE as u64) else { continue };
            let mut at = GuestPhys(first);
            while at.0.checked_add(PAGE as u64).is_some_and(|end| end <= range.end.0) {
                if found.len() >= MAX_CANDIDATES {
                    return found;
                }
                found.extend(Self::read_at(phys, at));
                at = at + PAGE as u64;
            }
        }
        found
    }

    /// The text in the page at `at`.
    fn read_at(phys: &dyn PhysMemory, at: GuestPhys) -> Option<Self> {
        let mut first = [0; FIRST.len()];
        phys.read(at, &mut first).ok()?;
        if first != FIRST {
            return None;
        }
        let mut page = [0; PAGE];
        phys.read(at, &mut page).ok()?;
        Some(Self { at, ..Self::parse(&page)? })
    }

    /// Value of a line, by everything before its `=`: `"OSRELEASE"`, `"OFFSET(list_head.next)"`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.get(key).map(String::as_str)
    }

    /// `uname -r`
    #[must_use]
    pub fn release(&self) -> Option<&str> {
        self.get("OSRELEASE")
    }

    /// GNU build id of vmlinux, lower-case hex. Since commit 0935288c6e00 ("kdump: append kernel
    /// build-id string to VMCOREINFO", v5.9).
    #[must_use]
    pub fn build_id(&self) -> Option<&str> {
        self.get("BUILD-ID")
    }

    /// Run-time guest-virtual address of a kernel symbol.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<GuestVirt> {
        let value = self.get(&format!("SYMBOL({name})"))?;
        u64::from_str_radix(value, 16).ok().map(GuestVirt)
    }

    /// A number, printed by the kernel in signed decimal.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<i64> {
        self.get(&format!("NUMBER({name})"))?.parse().ok()
    }

    /// KASLR slide: run-time address minus link address (`KERNELOFFSET`).
    #[must_use]
    pub fn slide(&self) -> Option<u64> {
        u64::from_str_radix(self.get("KERNELOFFSET")?, 16).ok()
    }

    /// Guest-virtual address of the kernel's top page table. Its C name on x86-64 is `init_top_pgt`
    /// since v4.13; `swapper_pg_dir` is a macro for it.
    #[must_use]
    pub fn top_page_table(&self) -> Option<GuestVirt> {
        self.symbol("init_top_pgt").or_else(|| self.symbol("swapper_pg_dir"))
    }

    /// Whether the kernel uses 5-level paging.
    #[must_use]
    pub fn five_level(&self) -> bool {
        self.number("pgtable_l5_enabled") == Some(1)
    }
}

#[cfg(test)]
mod tests {
    use guest::fake::FakeMachine;
    use proptest::prelude::*;

    use super::*;

    const TEXT: &[u8] = b"OSRELEASE=6.1.0-1-cloud-amd64\nBUILD-ID=00ff\nPAGESIZE=4096\n\
        SYMBOL(swapper_pg_dir)=ffffffff96610000\nSYMBOL(_stext)=ffffffff94a00000\n\
        NUMBER(phys_base)=-318767104\nNUMBER(pgtable_l5_enabled)=1\nKERNELOFFSET=13a00000\n";

    #[test]
    fn lines_become_facts() {
        let info = Vmcoreinfo::parse(TEXT).unwrap();
        assert_eq!(info.release(), Some("6.1.0-1-cloud-amd64"));
        assert_eq!(info.build_id(), Some("00ff"));
        assert_eq!(info.top_page_table(), Some(GuestVirt(0xffff_ffff_9661_0000)));
        assert_eq!(info.number("phys_base"), Some(-318_767_104));
        assert_eq!(info.slide(), Some(0x13a0_0000));
        assert!(info.five_level());
        assert_eq!(info.symbol("_etext"), None);
    }

    #[test]
    fn only_page_starts_count_and_the_text_ends_at_nul() {
        let mut machine = FakeMachine::new(1 << 20, false);
        machine.poke(GuestPhys(0x5000), TEXT);
        machine.poke(GuestPhys(0x5000 + TEXT.len() as u64), b"\0BUILD-ID=beef\n");
        machine.poke(GuestPhys(0x9010), TEXT);
        let found = Vmcoreinfo::find_all(machine.memory());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].at, GuestPhys(0x5000));
        assert_eq!(found[0].build_id(), Some("00ff"));
    }

    proptest! {
        #[test]
        fn any_text_parses_without_panic(tail in proptest::collection::vec(any::<u8>(), 0..512)) {
            let mut text = FIRST.to_vec();
            text.extend(tail);
            let info = Vmcoreinfo::parse(&text).unwrap();
            let _ = (info.slide(), info.top_page_table(), info.five_level());
        }
    }
}
