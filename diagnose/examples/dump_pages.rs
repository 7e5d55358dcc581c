//! What is in a dump, how fast it opens and reads, and whether its pages are those of another dump or raw
//! image of the same machine: `dump_pages FILE… [= FILE]`. For work on the readers of `diagnose::dump`.

use std::error::Error;
use std::time::Instant;

use defib_diagnose::dump::{Dump, Hints, open};
use guest::{GuestPhys, Machine, MemoryError, PhysMemory, Reg, Vcpu};

const PAGE: u64 = 4096;
const RANDOM_READS: u64 = 200_000;

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut sides = words.split(|word| word == "=");
    let files = sides.next().unwrap_or_default();
    let start = Instant::now();
    let mut dump = open(files, &Hints::default())?;
    println!("{} opened in {:?}", files.join(" "), start.elapsed());
    describe(&mut dump)?;
    println!("  resident {} KiB", resident());
    speed(dump.phys());
    println!("  resident {} KiB after that", resident());
    if let Some(other) = sides.next() {
        compare(dump.phys(), open(other, &Hints::default())?.phys());
    }
    Ok(())
}

fn describe(dump: &mut Dump) -> Result<(), Box<dyn Error>> {
    println!("  {}", dump.format());
    let coverage = dump.coverage();
    println!("  {} of {} KiB captured", coverage.captured >> 10, coverage.ram >> 10);
    println!("  {} ranges of RAM", dump.phys().ranges().len());
    for remark in dump.remarks() {
        println!("  remark: {remark}");
    }
    if let Some(info) = dump.vmcoreinfo() {
        println!("  {} {}", info.release().unwrap_or("?"), info.build_id().unwrap_or("?"));
    }
    if let (Some(space), Some(info)) = (dump.kernel_space(), dump.vmcoreinfo()) {
        let text = info.symbol("_stext").map(|text| space.walk(text));
        println!("  {} levels, _stext: {text:x?}", if space.five_level() { 5 } else { 4 });
    }
    for vcpu in 0..dump.vcpu_count() {
        let registers = dump.registers(Vcpu(vcpu))?;
        let show = |reg| registers.get(reg).unwrap_or_default();
        let (rip, gs, cr3) = (show(Reg::Rip), show(Reg::GsBase), show(Reg::Cr3));
        println!(
            "  cpu {vcpu}: rip {rip:#x} gs_base {gs:#x} cr3 {cr3:#x} {:?}",
            dump.cpus()[vcpu].pid
        );
    }
    Ok(())
}

/// Reads of 8 bytes at random pages of RAM, and of all pages in order.
fn speed(phys: &dyn PhysMemory) {
    let ranges = phys.ranges();
    let Some(range) = ranges.iter().max_by_key(|range| range.end - range.start) else { return };
    let pages = (range.end - range.start) / PAGE;
    let (mut state, mut missing) = (1u64, 0u64);
    let start = Instant::now();
    for _ in 0..RANDOM_READS {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = range.start + (state >> 33) % pages * PAGE;
        missing += u64::from(phys.read_u64(at).is_err());
    }
    let rate = RANDOM_READS as f64 / start.elapsed().as_secs_f64();
    println!("  {rate:.0} random pages a second ({missing} of {RANDOM_READS} not captured)");
    let start = Instant::now();
    let mut page = vec![0; PAGE as usize];
    let all =
        (0..pages).filter(|page_no| phys.read(range.start + page_no * PAGE, &mut page).is_ok());
    let mib = all.count() as f64 / 256.0;
    println!("  {:.0} MiB/s in order", mib / start.elapsed().as_secs_f64());
}

/// Memory of its own; pages of mapped files, which the kernel can drop, are not counted.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Counts pages of `phys` that are equal, zero on one side only, different, missing.
fn compare(phys: &dyn PhysMemory, other: &dyn PhysMemory) {
    let (mut equal, mut zero_here, mut differ, mut missing, mut missing_zero) = (0, 0, 0, 0, 0);
    let (mut not_ram, mut elsewhere) = (0, 0);
    let (mut one, mut two) = ([0; PAGE as usize], [0; PAGE as usize]);
    for range in other.ranges() {
        for at in (range.start.0..range.end.0).step_by(PAGE as usize).map(GuestPhys) {
            if other.read(at, &mut two).is_err() {
                elsewhere += 1;
                continue;
            }
            let is_zero = two == [0; PAGE as usize];
            match phys.read(at, &mut one) {
                Ok(()) if one == two => equal += 1,
                Ok(()) if one == [0; PAGE as usize] => zero_here += 1,
                Ok(()) => differ += 1,
                Err(MemoryError::NotCaptured { .. }) if is_zero => missing_zero += 1,
                Err(MemoryError::NotCaptured { .. }) => missing += 1,
                Err(_) => not_ram += 1,
            }
        }
    }
    println!(
        "  {equal} pages equal, {differ} differ, {zero_here} zero only here, {missing} not captured \
         (and {missing_zero} that were zero), {not_ram} not RAM here, {elsewhere} missing there"
    );
}
