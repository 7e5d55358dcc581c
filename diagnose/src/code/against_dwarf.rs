//! Saved registers as code analysis finds them, against the call-frame information of a real vmlinux.
//! Run with `DEFIB_VMLINUX=FILE cargo test --release -p defib-diagnose against_dwarf -- --ignored
//! --nocapture`; `DEFIB_SITES` sets the number of call sites.

use std::env;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::{CodeAddress, GuestPhys, GuestVirt, LinkAddr, MemoryError, Reg, VirtMemory};
use object::{Object, ObjectSection};
use repair_image::{FrameKind, Placement, RepairImage, RowSource, SavedRule, kernel_layer};

use super::analysis::{CodeCache, SavedPlace, saved_place};
use super::instruction::disassembler;
use super::op::{Action, decode};
use super::value::{Base, Value};

/// The sections of an ELF file at their link addresses.
struct FileMemory(Vec<(u64, Vec<u8>)>);

impl FileMemory {
    fn read_file(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = object::File::parse(bytes.as_slice()).unwrap();
        let loaded = file.sections().filter(|section| {
            section.address() >> 32 == 0xffff_ffff
                && section.name().is_ok_and(|name| name.contains("text") || name == ".rodata")
        });
        Self(loaded.map(|it| (it.address(), it.data().unwrap().to_vec())).collect())
    }
}

impl VirtMemory for FileMemory {
    fn read(&self, at: GuestVirt, into: &mut [u8]) -> Result<(), MemoryError> {
        let found = self.0.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(at.0.checked_sub(*start)?).ok()?;
            bytes.get(offset..offset.checked_add(into.len())?)
        });
        into.copy_from_slice(found.ok_or(MemoryError::NotCanonical { at })?);
        Ok(())
    }

    fn translate(&self, at: GuestVirt) -> Result<GuestPhys, MemoryError> {
        Err(MemoryError::NotCanonical { at })
    }
}

fn image_of(vmlinux: &Path) -> RepairImage {
    let cache = env::temp_dir().join("defib-against-dwarf");
    std::fs::create_dir_all(&cache).unwrap();
    let layer = kernel_layer::cached(vmlinux, &cache, 2).unwrap();
    let kernel = layer.knowledge().clone();
    let address = |name: &str| GuestVirt(kernel.symbol(name).unwrap().at.0);
    let text = address("_stext")..address("_etext");
    RepairImage {
        types: layer.types().unwrap(),
        placement: Placement {
            slide: 0,
            root: GuestPhys(0),
            five_level: false,
            text,
            per_cpu: Vec::new(),
        },
        modules: Vec::new(),
        pristine: std::sync::Arc::default(),
        kernel,
    }
}

#[derive(Debug, Default)]
struct Tally {
    sites: usize,
    right: usize,
    wrong: usize,
    no_path: usize,
    no_register: usize,
    incomplete: usize,
    analysis: Duration,
    longest: Duration,
}

fn judge(
    image: &RepairImage,
    memory: &FileMemory,
    cache: &mut CodeCache,
    end: u64,
    tally: &mut Tally,
) {
    let pc = CodeAddress::Return(GuestVirt(end));
    let Some(row) = image.unwind_row(pc.lookup()) else { return };
    let known = row.saved.iter().all(|rule| *rule != SavedRule::Unknown);
    if row.kind != FrameKind::Call || row.source != RowSource::Cfi || !known {
        return;
    }
    tally.sites += 1;
    let table = cache.table(image);
    let started = Instant::now();
    let Some(analysis) = cache.analysis(image, memory, pc.lookup()) else {
        tally.no_path += 1;
        return;
    };
    let answer = analysis.at(&table, pc);
    tally.analysis += started.elapsed();
    tally.longest = tally.longest.max(started.elapsed());
    tally.incomplete += usize::from(!answer.complete);
    if answer.states.is_empty() {
        tally.no_path += 1;
        return;
    }
    let mut verdict = 0;
    for (reg, rule) in Reg::CALLEE_SAVED.into_iter().zip(row.saved) {
        for state in &answer.states {
            match (saved_place(state, reg), rule) {
                (Some(SavedPlace::Same), SavedRule::Same) => {}
                (Some(SavedPlace::At(at)), SavedRule::AtCfa(offset))
                    if at.base == Base::Cfa && at.offset == i64::from(offset) => {}
                // Saved, and not changed yet: on the stack and in the register alike.
                (Some(SavedPlace::At(_)), SavedRule::Same)
                    if state.reg(reg) == Value::entry(reg) => {}
                (None, _) => verdict = verdict.max(1),
                (found, rule) => {
                    verdict = 2;
                    let name = image.locate(pc.lookup()).map(|it| it.symbol.name.to_owned());
                    println!("wrong: {end:#x} in {name:?}: {reg:?} {found:?}, CFI {rule:?}");
                }
            }
        }
    }
    match verdict {
        0 => tally.right += 1,
        1 => tally.no_register += 1,
        _ => tally.wrong += 1,
    }
}

/// Every call in a function, by linear sweep.
fn call_ends(memory: &FileMemory, start: u64, size: u64) -> Vec<u64> {
    let mut bytes = vec![0; usize::try_from(size.min(1 << 16)).unwrap()];
    if memory.read(GuestVirt(start), &mut bytes).is_err() {
        return Vec::new();
    }
    let disassembler = disassembler().unwrap();
    let (mut ends, mut offset) = (Vec::new(), 0);
    while let Some(op) = decode(&disassembler, &bytes[offset..], start + offset as u64) {
        offset += usize::from(op.len);
        if matches!(op.action, Action::Call(_)) {
            ends.push(start + offset as u64);
        }
    }
    ends
}

#[test]
#[ignore = "needs a vmlinux with debug information: DEFIB_VMLINUX"]
fn saved_registers_agree_with_call_frame_information() {
    let Some(vmlinux) = env::var_os("DEFIB_VMLINUX") else { panic!("DEFIB_VMLINUX is not set") };
    let vmlinux = Path::new(&vmlinux);
    let wanted = env::var("DEFIB_SITES").ok().and_then(|text| text.parse().ok()).unwrap_or(3000);
    let image = image_of(vmlinux);
    let memory = FileMemory::read_file(vmlinux);
    let text = LinkAddr(image.placement.text.start.0)..LinkAddr(image.placement.text.end.0);
    let functions: Vec<(u64, u64)> = image
        .kernel
        .functions()
        .filter(|symbol| text.contains(&symbol.at) && symbol.size > 0)
        .map(|symbol| (symbol.at.0, symbol.size))
        .collect();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move |limit: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % limit as u64).unwrap()
    };
    let (mut tally, mut functions_seen) = (Tally::default(), 0);
    while tally.sites < wanted {
        let (start, size) = functions[next(functions.len())];
        let ends = call_ends(&memory, start, size);
        if ends.is_empty() {
            continue;
        }
        let mut cache = CodeCache::new();
        functions_seen += 1;
        judge(&image, &memory, &mut cache, ends[next(ends.len())], &mut tally);
    }
    println!("{functions_seen} functions, {tally:?}");
    println!("{:?} per function, cold", tally.analysis / u32::try_from(functions_seen).unwrap());
    assert_eq!(tally.wrong, 0);
    assert!(tally.right * 100 > tally.sites * 90, "{tally:?}");
}

#[test]
#[ignore = "needs a vmlinux with debug information: DEFIB_VMLINUX"]
fn warming_takes_its_time_in_pieces() {
    let vmlinux = env::var("DEFIB_VMLINUX").expect("DEFIB_VMLINUX");
    let image = image_of(Path::new(&vmlinux));
    let memory = FileMemory::read_file(Path::new(&vmlinux));
    let mut cache = CodeCache::new();
    let mut calls = Vec::new();
    loop {
        let started = Instant::now();
        let done = crate::warm(&image, &memory, &mut cache, Duration::from_millis(20));
        calls.push(started.elapsed());
        if done {
            break;
        }
        assert!(calls.len() < 10_000);
    }
    let total: Duration = calls.iter().sum();
    let worst = calls.iter().max().unwrap();
    println!("{} functions in {} calls: {total:?}, longest {worst:?}", cache.len(), calls.len());
    println!("first call {:?}", calls[0]);
    assert!(cache.len() > 500);
}
