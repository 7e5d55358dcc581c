//! Writes the `live.core` of the crash in a whole dump: `live_core DUMP KERNEL-LAYER OUT [MIB]`. For
//! measuring, and for comparing what dump tools say of both; `tests/live-core.sh` does.

use std::error::Error;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::time::Instant;

use defib_diagnose::live_core::{Contents, Limits, Snapshot};
use defib_diagnose::vmcore::Vmcore;
use defib_diagnose::{CodeCache, diagnose};
use guest::{Hook, HookKind, Machine, Registers, Vcpu};
use repair_image::{GuestLayer, KernelFacts, KernelLayer, KernelText, MappedFile, RepairImage};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, dump, layer, out, rest @ ..] = arguments.as_slice() else {
        return Err("usage: live_core DUMP KERNEL-LAYER OUT [MIB]".into());
    };
    let mut core = Vmcore::parse(MappedFile::open(Path::new(dump))?)?;
    let facts = KernelFacts::of_layer(&KernelLayer::open(Path::new(layer))?)?;
    let vcpus = (0..core.vcpu_count())
        .map(|vcpu| core.registers(Vcpu(vcpu)))
        .collect::<Result<Vec<Registers>, _>>()?;
    let guest = GuestLayer::take(core.phys(), &facts, &vcpus, KernelText::Left)?;
    let image = RepairImage::assemble(&facts, &guest);
    let at_hook = |registers: &Registers| {
        let mut kinds = HookKind::ALL.into_iter();
        kinds.find_map(|kind| {
            let at = image.address_of(kind.function())?;
            (registers.rip() == Some(at)).then_some(Hook { kind, at })
        })
    };
    let crashed = vcpus.iter().position(|registers| at_hook(registers).is_some());
    let mut cache = CodeCache::default();
    let diagnosis = crashed.and_then(|index| {
        let registers = vcpus.get(index)?;
        let hook = at_hook(registers);
        diagnose(&image, core.phys(), registers, hook, Vcpu(index), &mut cache).ok()
    });
    let mut limits = Limits::default();
    if let Some(mebibytes) = rest.first() {
        limits.bytes = mebibytes.parse::<u64>()? << 20;
    }
    let start = Instant::now();
    let snapshot = Snapshot::take(&image, core.phys(), &vcpus, diagnosis.as_ref(), &[]);
    println!("standing: {} KiB in {:?}", snapshot.bytes() >> 10, start.elapsed());
    let start = Instant::now();
    let contents = Contents::collect(&image, core.phys(), snapshot, &limits)?;
    println!("collected: {} KiB in {:?}", contents.bytes() >> 10, start.elapsed());
    contents.gaps().iter().for_each(|gap| println!("gap: {gap}"));
    let start = Instant::now();
    contents.write(&mut BufWriter::new(File::create(out)?))?;
    println!("written: {} KiB in {:?}", std::fs::metadata(out)?.len() >> 10, start.elapsed());
    Ok(())
}
