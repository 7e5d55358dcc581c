//! What the operator allows: read from TOML, with defaults. Decisions are made in `plan.rs`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Rung};

/// A policy. Every key may be left out; the default is then in force ([`Policy::defaults_text`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Rungs that may be taken.
    pub rungs: Vec<Rung>,
    /// Crashes of one driver within [`Policy::strike_window_s`] that lead to its quarantine.
    pub strikes: u32,
    /// Seconds after which a strike is forgotten.
    pub strike_window_s: u64,
    /// Seconds of probation after a repair. The same crash within them goes one rung up.
    pub probation_s: u64,
    /// Drivers (module names) never to quarantine.
    pub never_quarantine: Vec<String>,
    /// Processes (names) never to kill. Process 1 and kernel threads are never killed.
    pub never_kill: Vec<String>,
    /// Longest time that the vCPUs may stand for a repair, in milliseconds; a repair that does not
    /// end in time is taken back where possible.
    pub max_downtime_ms: u64,
    /// Ways to get fresh memory, best first.
    pub fresh_memory: Vec<FreshWay>,
    /// When a driver's strikes are used up but it can't be quarantined: go on returning errors.
    pub return_error_when_quarantine_fails: bool,
    /// Drop a surplus of the preempt count that no lock found explains. A lock that was overlooked
    /// would then stay locked for ever.
    pub correct_preempt_count: bool,
    /// Incidents with a `live.core` at most (about 17 MB each): the first of each signature.
    pub live_cores: u32,
    /// Seconds without any progress after which a CPU that does not leave a driver's code is taken for locked
    /// up, a process that takes one page fault again and again for one that would go on so, and tasks that sleep for each
    /// other, or in a quarantined driver, for ones that would never wake; 0: never. A loop that visibly makes headway
    /// gets four times as long.
    pub lockup_s: u64,
}

/// A way to get fresh memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FreshWay {
    /// Plug a memory module in at crash time.
    HotAdd,
    /// Use the tail of RAM that the firmware reserved.
    FirmwareTail,
}

/// The defaults, as shown in help and tested to be the defaults.
const DEFAULTS: &str = "\
# Rungs that may be taken: return_error, quarantine_driver, quarantine_process, repair_kernel.
rungs = [\"return_error\", \"quarantine_driver\", \"quarantine_process\", \"repair_kernel\"]
# Crashes of one driver within strike_window_s seconds that lead to its quarantine.
strikes = 3
strike_window_s = 3600
# Seconds of probation after a repair; the same crash within them goes one rung up.
probation_s = 10
# Drivers never to quarantine (a root disk's driver, for instance).
never_quarantine = [\"virtio\", \"virtio_ring\", \"virtio_pci\", \"virtio_blk\", \"virtio_scsi\", \
\"scsi_mod\", \"sd_mod\", \"nvme\", \"nvme_core\", \"ahci\", \"libata\", \"dm_mod\", \"ext4\", \"xfs\", \"btrfs\"]
# Processes never to kill, by name; process 1 and kernel threads never are.
never_kill = [\"systemd\", \"init\", \"dbus-daemon\", \"systemd-journal\", \"systemd-logind\"]
# Longest stop of the vCPUs for one repair, milliseconds.
max_downtime_ms = 1000
# Ways to get memory that the guest does not know, best first: hot_add, firmware_tail.
fresh_memory = [\"firmware_tail\", \"hot_add\"]
# A driver without strikes left that can't be quarantined: go on returning errors.
return_error_when_quarantine_fails = true
# Drop a surplus of the preempt count that no lock explains (an overlooked lock would stay locked).
correct_preempt_count = false
# Seconds without progress in a driver after which a CPU is locked up, or a process in a loop of page faults (0: never);
# four times as many where a loop visibly makes headway.
lockup_s = 5
# Incidents that get a live.core (about 17 MB), at most; one for each signature.
live_cores = 16
";

impl Default for Policy {
    fn default() -> Self {
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        Self {
            rungs: Rung::ALL.to_vec(),
            strikes: 3,
            strike_window_s: 3600,
            probation_s: 10,
            never_quarantine: names(&[
                "virtio",
                "virtio_ring",
                "virtio_pci",
                "virtio_blk",
                "virtio_scsi",
                "scsi_mod",
                "sd_mod",
                "nvme",
                "nvme_core",
                "ahci",
                "libata",
                "dm_mod",
                "ext4",
                "xfs",
                "btrfs",
            ]),
            never_kill: names(&[
                "systemd",
                "init",
                "dbus-daemon",
                "systemd-journal",
                "systemd-logind",
            ]),
            max_downtime_ms: 1000,
            fresh_memory: vec![FreshWay::FirmwareTail, FreshWay::HotAdd],
            return_error_when_quarantine_fails: true,
            correct_preempt_count: false,
            lockup_s: 5,
            live_cores: 16,
        }
    }
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// [`Error::Policy`] for text that is no TOML, unknown keys, wrong types, or values out of
    /// range.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let policy: Self =
            toml::from_str(text).map_err(|source| Error::Policy(Box::new(source)))?;
        if policy.strikes == 0 {
            return Err(Error::PolicyValue { key: "strikes", value: 0, least: 1 });
        }
        if policy.max_downtime_ms == 0 {
            return Err(Error::PolicyValue { key: "max_downtime_ms", value: 0, least: 1 });
        }
        Ok(policy)
    }

    /// The defaults as a commented policy file.
    #[must_use]
    pub fn defaults_text() -> &'static str {
        DEFAULTS
    }

    /// How long a repair may take.
    #[must_use]
    pub fn max_downtime(&self) -> Duration {
        Duration::from_millis(self.max_downtime_ms)
    }

    /// Whether the policy names the process as one never to kill.
    #[must_use]
    pub fn protects_process(&self, comm: &str) -> bool {
        self.never_kill.iter().any(|name| name == comm)
    }

    /// Whether the policy names the driver as one never to quarantine. `-` and `_` are the same in
    /// module names.
    #[must_use]
    pub fn protects_driver(&self, module: &str) -> bool {
        let module = module.replace('-', "_");
        self.never_quarantine.iter().any(|name| name.replace('-', "_") == module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_the_defaults_is_the_defaults() {
        assert_eq!(Policy::parse(Policy::defaults_text()).unwrap(), Policy::default());
        assert_eq!(Policy::parse("").unwrap(), Policy::default());
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        assert!(matches!(Policy::parse("strike = 3"), Err(Error::Policy(_))));
        assert!(matches!(Policy::parse("strikes = \"3\""), Err(Error::Policy(_))));
        assert!(matches!(
            Policy::parse("strikes = 0"),
            Err(Error::PolicyValue { key: "strikes", .. })
        ));
        assert!(matches!(Policy::parse("rungs = [\"reboot\"]"), Err(Error::Policy(_))));
    }

    #[test]
    fn dashes_in_module_names_do_not_matter() {
        assert!(Policy::default().protects_driver("virtio-blk"));
        assert!(!Policy::default().protects_driver("virtio_net"));
    }
}
