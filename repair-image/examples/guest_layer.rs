//! Prints the guest layer of a guest whose RAM is a flat file (QEMU's `memory-backend-file` of at most 3 GiB,
//! guest-physical 0 at offset 0), read without any other file, and how long each step took.
//!
//! `cargo run --release --example guest_layer -- RAMFILE [DEBUG_DIR]…`

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use defib_repair_image::{DebugFiles, GuestLayer, KernelText, RepairImage, verify, without_files};
use guest::{GuestPhys, MemoryError, PhysMemory};

/// A RAM file, read at once.
struct RamFile(Vec<u8>);

impl PhysMemory for RamFile {
    fn read(&self, at: GuestPhys, into: &mut [u8]) -> Result<(), MemoryError> {
        let start = at.0 as usize;
        let from = start.checked_add(into.len()).and_then(|end| self.0.get(start..end));
        into.copy_from_slice(from.ok_or(MemoryError::NotRam { at, len: into.len() })?);
        Ok(())
    }

    fn ranges(&self) -> Vec<Range<GuestPhys>> {
        vec![GuestPhys(0)..GuestPhys(self.0.len() as u64)]
    }
}

fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    println!("{what:<28} {:>9.3} ms", start.elapsed().as_secs_f64() * 1e3);
    result
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: guest_layer RAMFILE [DEBUG_DIR]...")?;
    let ram = RamFile(std::fs::read(path)?);
    let (_, kernel) = timed("facts without files", || without_files(&ram, &[]))?;
    let mut layer =
        timed("guest layer", || GuestLayer::take(&ram, &kernel, &[], KernelText::Kept))?;
    let changed = timed("module list, again", || layer.refresh_modules(&ram, &kernel))?;
    let same = timed("same boot?", || layer.is_same_boot(&ram, &kernel));
    let bytes = layer.to_bytes()?;
    println!("changed {changed}, same boot {same}, stored in {} bytes", bytes.len());
    println!("{:#x?} {:?}", layer.placement, layer.build_id);
    for module in &layer.modules {
        println!(
            "MODULE {} {:x} {:x?} {:?}",
            module.name, module.at, module.ranges, module.build_id
        );
        for (name, at) in &module.sections {
            println!("SECTION {} {name} {at:#x}", module.name);
        }
    }
    let outside = layer.idt.iter().filter(|gate| !gate.in_text).count();
    println!("{} gates, {outside} with handlers outside kernel text", layer.idt.len());
    for gate in layer.idt.iter().filter(|gate| !gate.in_text) {
        let link = guest::LinkAddr(gate.handler.0.wrapping_sub(layer.placement.slide));
        println!("GATE {:#x} {link:#x} {:?}", gate.vector, kernel.knowledge.function_at(link));
    }
    for run in &layer.pages {
        let mapped = run.hashes.iter().flatten().count();
        println!("{:?} {:#x}: {} pages, {mapped} mapped", run.kind, run.start, run.hashes.len());
    }
    let directories: Vec<PathBuf> = std::env::args().skip(2).map(PathBuf::from).collect();
    let files = timed("listing debug files", || DebugFiles::new(&directories));
    for (name, search) in timed("module files", || layer.load_debug_files(&kernel, &files)) {
        println!(
            "FILE {name}: {:?}, refused {:?}",
            search.file.map(|file| file.path),
            search.refused
        );
    }
    let stored = GuestLayer::from_bytes(&bytes)?;
    let verification = timed("verify", || verify(&ram, &kernel, &stored));
    println!("clean: {}", verification.is_clean());
    let image = RepairImage::assemble(&kernel, &layer);
    for module in &image.modules {
        let functions = module.knowledge.functions().collect::<Vec<_>>();
        let rows = functions.iter().filter(|f| module.knowledge.unwind_row(f.at).is_some()).count();
        let prototypes =
            functions.iter().filter(|f| module.knowledge.prototype(f.name).is_some()).count();
        println!(
            "KNOWLEDGE {}: {} functions, {rows} with unwind rows, {prototypes} with prototypes",
            module.name,
            functions.len()
        );
    }
    Ok(())
}
