//! Downtime of repairs on KVM: every case of the tiny guest in the minimal VMM, guard in its process, some rounds of
//! each. What single steps cost (memory slots, stops, exits) is measured in hv-hooks' own benchmark.

#[path = "../tests/tiny_vmm/mod.rs"]
mod tiny_vmm;

use std::time::Duration;

use corpus::tiny::{CASES, Exit};
use hv_hooks::kvm::HostKind;
use serde_json::Value;

/// Rounds over all cases.
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kind = HostKind::detect();
    println!("{kind}");
    if !kind.is_usable() {
        return Ok(());
    }
    let root = tempfile::tempdir()?;
    let mut all = Vec::new();
    println!("hook to resume, tiny guest, 2 vCPUs, {ROUNDS} rounds:");
    for case in CASES {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let told = tiny_vmm::run(case, root.path())?;
            let right = case.differences(&told.diagnosis, &told.end)?.is_empty();
            if told.code != Some(Exit::ChecksumOk) || !right {
                return Err(format!("{} was not saved: {}", case.name, told.serial).into());
            }
            let time = told.end.get("downtime_us").and_then(Value::as_u64).ok_or("no downtime")?;
            times.push(Duration::from_micros(time));
        }
        print(case.name, &mut times);
        all.extend(times);
    }
    print("all", &mut all);
    Ok(())
}

/// Minimum, median and maximum.
fn print(what: &str, times: &mut [Duration]) {
    times.sort_unstable();
    let ms = |time: Option<&Duration>| time.map_or(0.0, |time| time.as_secs_f64() * 1e3);
    println!(
        "  {what:<16} min {:>7.2}  p50 {:>7.2}  max {:>7.2} ms",
        ms(times.first()),
        ms(times.get(times.len() / 2)),
        ms(times.last())
    );
}
