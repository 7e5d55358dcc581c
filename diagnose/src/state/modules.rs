//! Modules for a report: what `/proc/modules` would show. Their code is repair-image's.

use guest::GuestVirt;
use repair_image::{BuildId, LoadedModule, ModuleState};
use serde::Serialize;

/// `module_flags_taint()` and `taint_flags[]` of kernel/panic.c: the letters of those taints that modules bring, by bit
/// (include/linux/panic.h), the same since v5.18.
const TAINTS: [(u32, char); 6] = [(0, 'P'), (1, 'F'), (10, 'C'), (12, 'O'), (13, 'E'), (15, 'K')];

/// A module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModuleInfo {
    /// Name.
    pub name: String,
    /// Guest-virtual address of its text.
    pub at: Option<GuestVirt>,
    /// Bytes of all its ranges.
    pub size: u64,
    /// Where it is in its life.
    pub state: ModuleState,
    /// Taints it brought, as letters: `O` out of tree, `E` unsigned, `P` proprietary.
    pub taints: String,
    /// Its build id.
    pub build_id: Option<BuildId>,
}

pub(super) fn of(module: &LoadedModule) -> ModuleInfo {
    let size = |range: &std::ops::Range<GuestVirt>| range.end.0.saturating_sub(range.start.0);
    let tainted = |bit: u32| module.taints.checked_shr(bit).unwrap_or(0) & 1 == 1;
    ModuleInfo {
        name: module.name.clone(),
        at: module.text.first().map(|range| range.start),
        size: module.ranges.iter().map(size).fold(0, u64::saturating_add),
        state: module.state,
        taints: TAINTS.iter().filter(|(bit, _)| tainted(*bit)).map(|(_, letter)| letter).collect(),
        build_id: module.build_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_summed_and_taints_are_letters() {
        let at = GuestVirt(0xffff_ffff_c000_0000);
        let module = LoadedModule {
            name: "toy".to_owned(),
            at,
            state: ModuleState::Live,
            taints: 1 << 12 | 1 << 13,
            text: vec![at..at + 0x1000],
            ranges: vec![at..at + 0x1000, at + 0x3000..at + 0x5000],
            sections: Vec::new(),
            build_id: None,
        };
        let found = of(&module);
        assert_eq!((found.size, found.taints.as_str(), found.at), (0x3000, "OE", Some(at)));
    }
}
