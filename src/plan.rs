//! `defib plan`: what would be done about the crash in a dump, and why not more. Writes nothing.

use anyhow::{Context, Result, bail};
use diagnose::vmcore::Vmcore;
use diagnose::{CodeCache, Diagnosis};
use guest::{Hook, HookKind, Machine, Registers, Vcpu};
use quarantine::{Situation, Strikes};
use repair_image::{MappedFile, RepairImage};
use serde_json::json;

use crate::Outcome;
use crate::cli::{Format, PlanArguments};
use crate::{guard_command, knowledge};

/// Runs `defib plan`.
///
/// # Errors
/// When the dump or the kernel in it can't be read.
pub fn run(arguments: &PlanArguments) -> Result<Outcome> {
    let dump = &arguments.dump;
    let bytes = MappedFile::open(dump).with_context(|| format!("cannot use {}", dump.display()))?;
    let mut core =
        Vmcore::parse(bytes).with_context(|| format!("cannot use {}", dump.display()))?;
    let learned = guard::learn(core.phys(), &knowledge::sources(&arguments.knowledge), &[])?;
    let image = RepairImage::assemble(&learned.kernel.facts, &learned.layer);
    let vcpus = (0..core.vcpu_count())
        .map(|vcpu| core.registers(Vcpu(vcpu)))
        .collect::<Result<Vec<_>, _>>()?;
    let Some(diagnosis) = crashed(&image, &core, &vcpus) else {
        bail!("no vCPU of this dump is crashing: none has the kernel's crash code on its stack")
    };
    let memory = image.placement.space(core.phys());
    let policy = guard_command::policy(arguments.policy.as_deref())?;
    let situation =
        Situation { diagnosis: &diagnosis, image: &image, memory: &memory, vcpus: &vcpus };
    let plan = quarantine::plan(&situation, &policy, &Strikes::default());
    match arguments.format {
        Format::Text => println!("{}\n{plan}", diagnose::report::text(&diagnosis)),
        Format::Json => println!("{}", json!({ "diagnosis": diagnosis, "plan": plan })),
    }
    Ok(if plan.rung.is_some() { Outcome::Done } else { Outcome::NotSaved })
}

/// The diagnosis of the vCPU that stands at a hook, or else of the first one whose stack tells of a crash.
fn crashed(image: &RepairImage, core: &impl Machine, vcpus: &[Registers]) -> Option<Diagnosis> {
    let mut cache = CodeCache::default();
    let mut of = |index: usize, hook| {
        let registers = vcpus.get(index)?;
        diagnose::diagnose(image, core.phys(), registers, hook, Vcpu(index), &mut cache).ok()
    };
    for (index, registers) in vcpus.iter().enumerate() {
        let at_hook = HookKind::ALL.into_iter().find_map(|kind| {
            let at = image.address_of(kind.function())?;
            (registers.rip() == Some(at)).then_some(Hook { kind, at })
        });
        if at_hook.is_some() {
            return of(index, at_hook);
        }
    }
    let mut diagnoses = (0..vcpus.len()).filter_map(|index| of(index, None));
    diagnoses.find(|diagnosis| diagnosis.class.is_some())
}
