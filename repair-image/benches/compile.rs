//! Times compiling, opening and asking a kernel layer; `VMLINUX=file cargo bench -p defib-repair-image --bench compile`.
//! Prints one figure a line. Not a test: nothing is checked.

use std::path::Path;
use std::time::Instant;

use defib_repair_image::{KernelLayer, Types, compile};
use guest::LinkAddr;

/// Peak resident set of this process, MiB.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    kib.unwrap_or(0u64) / 1024
}

/// Addresses spread evenly over the kernel's functions, in no order.
fn addresses(layer: &KernelLayer, count: usize) -> Vec<LinkAddr> {
    let knowledge = layer.knowledge();
    let symbol = |name| knowledge.symbol(name).map_or(0, |symbol| symbol.at.0);
    let (start, end) = (symbol("_stext"), symbol("_etext"));
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        LinkAddr(start + state % (end - start).max(1))
    };
    (0..count).map(|_| next()).collect()
}

fn main() {
    let Ok(vmlinux) = std::env::var("VMLINUX") else {
        println!("set VMLINUX to a kernel with debug information");
        return;
    };
    let start = Instant::now();
    let layer = compile::vmlinux(Path::new(&vmlinux), 2).expect("vmlinux compiles");
    println!("compile_s {:.2}", start.elapsed().as_secs_f64());
    println!("peak_rss_mib {}", peak_rss());
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("kernel.defib");
    layer.write(&path).expect("layer is written");
    println!("file_bytes {}", std::fs::metadata(&path).map_or(0, |file| file.len()));
    for section in layer.inspect() {
        println!("section {} bytes {} records {:?}", section.name, section.bytes, section.records);
    }
    println!("statistics {}", layer.statistics());
    drop(layer);

    let start = Instant::now();
    let layer = KernelLayer::open(&path).expect("layer opens");
    println!("open_us {:.1}", start.elapsed().as_secs_f64() * 1e6);
    let start = Instant::now();
    let first = layer.knowledge().symbol("panic").map(|symbol| symbol.at);
    println!("first_symbol_us {:.1}", start.elapsed().as_secs_f64() * 1e6);
    let start = Instant::now();
    let chain = first.map(|at| layer.knowledge().source(at));
    println!("first_source_us {:.1} {:?}", start.elapsed().as_secs_f64() * 1e6, chain);
    let start = Instant::now();
    let types = layer.types().expect("types");
    let member = types.member("task_struct", "thread.sp");
    println!("first_member_us {:.1} {member:?}", start.elapsed().as_secs_f64() * 1e6);

    let addresses = addresses(&layer, 100_000);
    for pass in ["cold", "warm"] {
        let start = Instant::now();
        let frames: usize = addresses.iter().map(|&at| layer.knowledge().source(at).len()).sum();
        let each = start.elapsed().as_secs_f64() / addresses.len() as f64;
        println!("source_{pass}_us {:.2} frames {frames}", each * 1e6);
        let start = Instant::now();
        let rows =
            addresses.iter().filter(|&&at| layer.knowledge().unwind_row(at).is_some()).count();
        let each = start.elapsed().as_secs_f64() / addresses.len() as f64;
        println!("unwind_{pass}_us {:.2} rows {rows}", each * 1e6);
        let start = Instant::now();
        let named =
            addresses.iter().filter(|&&at| layer.knowledge().function_at(at).is_some()).count();
        let each = start.elapsed().as_secs_f64() / addresses.len() as f64;
        println!("function_{pass}_us {:.2} named {named}", each * 1e6);
    }
    println!("rss_after_lookups_mib {}", peak_rss());
}
