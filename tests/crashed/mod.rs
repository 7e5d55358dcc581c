//! A guest of the lab that crashed and answers no more, and what a diagnosis of its dumps needs. What a test makes of it
//! is the test's.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use corpus::lab::{Snapshot, Vm, VmConfig, drivers};
use serde_json::{Value, json};

/// One of a pair of tasks reads from NULL with a mutex held, the other one waits for it (driver `crash_locks`).
pub const PAIR: &str = "crash crash_locks pair mutex-waited,wait-mutex 3000";

/// The guest, stopped.
pub struct Crashed {
    pub vm: Vm,
    /// In the folder of the build: nothing removes it at the end of the tests.
    pub folder: PathBuf,
    /// `--vmlinux` and `--debug-dir`, with their values.
    pub knowledge: Vec<String>,
}

impl Crashed {
    /// Has a guest load a driver and crash by a deed of its. `name` is the folder's, below the build's own.
    pub fn of(name: &str, config: &VmConfig, driver: &str, deed: &str) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let modules = drivers(&config.kernel).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let knowledge = [
            "--vmlinux".to_owned(),
            text(&config.kernel.needed_vmlinux().unwrap()),
            "--debug-dir".to_owned(),
            text(modules[0].with_debug.parent().unwrap()),
        ];
        let mut vm = Snapshot::cached(config).unwrap().restore().unwrap();
        vm.agent().command(&format!("load {driver}")).unwrap();
        assert!(vm.agent().command_within(deed, Duration::from_secs(3)).is_err(), "it answers");
        // All dumps are of one moment.
        vm.control().command("stop", json!({})).unwrap();
        Self { vm, folder, knowledge: knowledge.to_vec() }
    }

    /// QEMU's own dump, by `dump-guest-memory` with these arguments besides.
    pub fn dumped(&mut self, name: &str, more: &Value) -> PathBuf {
        let file = self.folder.join(name);
        let protocol = format!("file:{}", file.display());
        let mut arguments = json!({ "paging": false, "protocol": protocol });
        for (key, value) in more.as_object().into_iter().flatten() {
            arguments[key] = value.clone();
        }
        self.vm.control().command("dump-guest-memory", arguments).unwrap();
        file
    }
}
