//! `defib plan`: what would be done about the crash in a dump, and why not more. Writes nothing.

use anyhow::{Context, Result, bail};
use diagnose::CodeCache;
use diagnose::vmcore::Vmcore;
use guest::{AddressSpace, Hook, HookKind, Machine, Registers, Vcpu};
use quarantine::{Situation, Strikes};
use repair_image::{MappedFile, RepairImage};
use serde_json::json;

use crate::Outcome;
use crate::cli::{Format, PlanArguments};
use crate::{guard, knowledge};

/// Runs `defib plan`.
///
/// # Errors
/// When the dump or the kernel in it can't be read.
pub fn run(arguments: &PlanArguments) -> Result<Outcome> {
    let dump = &arguments.dump;
    let bytes = MappedFile::open(dump).with_context(|| format!("cannot use {}", dump.display()))?;
    let mut core =
        Vmcore::parse(bytes).with_context(|| format!("cannot use {}", dump.display()))?;
    let learned = knowledge::learn(core.phys(), &arguments.knowledge, &[])?;
    let image = RepairImage::assemble(&learned.kernel.facts, &learned.layer);
    let vcpus = (0..core.vcpu_count())
        .map(|vcpu| core.registers(Vcpu(vcpu)))
        .collect::<Result<Vec<_>, _>>()?;
    let Some((vcpu, hook)) = crashed(&image, &vcpus) else {
        bail!("no vCPU of this dump is crashing: none stands in the kernel's crash code")
    };
    let mut cache = CodeCache::default();
    let registers = vcpus[vcpu.0];
    let diagnosis = diagnose::diagnose(&image, core.phys(), &registers, hook, vcpu, &mut cache)?;
    let placement = &image.placement;
    let memory = AddressSpace::new(core.phys(), placement.root, placement.five_level);
    let policy = guard::policy(arguments.policy.as_deref())?;
    let situation =
        Situation { diagnosis: &diagnosis, image: &image, memory: &memory, vcpus: &vcpus };
    let plan = quarantine::plan(&situation, &policy, &Strikes::default());
    match arguments.format {
        Format::Text => println!("{}\n{plan}", diagnose::report::text(&diagnosis)),
        Format::Json => println!("{}", json!({ "diagnosis": diagnosis, "plan": plan })),
    }
    Ok(if plan.rung.is_some() { Outcome::Done } else { Outcome::NotSaved })
}

/// The vCPU that stands at a hook, or else the first one in the kernel's crash code.
fn crashed(image: &RepairImage, vcpus: &[Registers]) -> Option<(Vcpu, Option<Hook>)> {
    for (index, registers) in vcpus.iter().enumerate() {
        let at_hook = HookKind::ALL.into_iter().find_map(|kind| {
            let at = image.address_of(kind.function())?;
            (registers.rip() == Some(at)).then_some(Hook { kind, at })
        });
        if at_hook.is_some() {
            return Some((Vcpu(index), at_hook));
        }
    }
    let crash_code =
        ["panic", "oops_begin", "die", "page_fault_oops", "native_machine_crash_shutdown"];
    let inside = |registers: &Registers| {
        let location = registers.rip().and_then(|rip| image.locate(rip));
        location.is_some_and(|location| {
            crash_code.contains(&repair_image::base_name(location.symbol.name))
        })
    };
    vcpus.iter().position(inside).map(|index| (Vcpu(index), None))
}
