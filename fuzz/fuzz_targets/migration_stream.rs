//! Glue between libFuzzer and the oracle of the same name.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| defib_fuzz_oracles::migration_stream(data));
