//! Replays every seed and past find of the fuzz targets, and mutations of them, through the oracles, without a
//! fuzzer. What must hold is said in `fuzz/oracles`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use defib_fuzz_oracles::{Mutator, ORACLES, Oracle};

/// Mutations of each seed. `cargo fuzz` is for more.
fn mutations(target: &str) -> u64 {
    match target {
        // Each decodes some thousand instructions.
        "instructions" => 250,
        _ => 2000,
    }
}

/// The seeds of one target, finds (`find_*`) included, in the order of their names.
fn seeds(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

/// Runs an oracle; on failure the input is kept in the temporary folder, to become a find.
fn run(target: &str, oracle: Oracle, data: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| oracle(data))).is_err() {
        let path = std::env::temp_dir().join(format!("defib_find_{target}"));
        fs::write(&path, data).expect("the input is kept");
        panic!("the oracle of {target} failed; its input is {}", path.display());
    }
}

fn replay(target: &str) {
    let (_, oracle) = ORACLES.iter().find(|(name, _)| *name == target).expect("an oracle");
    let seeds = seeds(target);
    assert!(!seeds.is_empty(), "{target} has no seed");
    for (number, path) in (1..).zip(&seeds) {
        let seed = fs::read(path).expect("a seed");
        run(target, *oracle, &seed);
        let mut mutator = Mutator::new(number);
        for _ in 0..mutations(target) {
            run(target, *oracle, &mutator.mutate(&seed));
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn every_oracle_is_replayed() {
            let replayed = [$(stringify!($name)),*];
            assert_eq!(ORACLES.map(|(name, _)| name), replayed);
        }
    };
}

targets! {
    btf console crash guest_layer hmp_text instructions kernel_layer kernel_memory migration_stream module_object notes
    page_tables payload_results policy qmp_line rsp_packets target_xml unwind_tables unwinding vmcore vmcoreinfo
}

#[test]
fn seeds_stay_small() {
    let sizes = ORACLES.iter().flat_map(|(name, _)| seeds(name)).map(fs::metadata);
    let total: u64 = sizes.map(|metadata| metadata.expect("a seed").len()).sum();
    assert!(total < 300 << 10, "{total} bytes");
}
