//! The crash in a dump: its diagnosis, and what repair would have been made. Reads only.

use std::path::PathBuf;

use anyhow::{Context, Result};
use diagnose::vmcore::Vmcore;
use diagnose::{CodeCache, Diagnosis};
use guard::{KnowledgeSources, Learned};
use guest::{Hook, HookKind, Machine, Registers, Vcpu};
use quarantine::{Plan, Policy, Situation, Strikes};
use repair_image::{DebugFiles, RepairImage};

/// A crash.
pub struct Crash {
    /// The diagnosis.
    pub diagnosis: Diagnosis,
    /// What would have been done.
    pub plan: Plan,
    /// Kernel release, if the dump says.
    pub release: Option<String>,
    /// What is odd about the dump; debug files of modules that were not used, and why.
    pub remarks: Vec<String>,
}

/// The kernel in a dump, and what its CPUs stood at.
pub struct Scene {
    /// What is known of the kernel, and where from.
    pub learned: Learned,
    /// The same, placed where the kernel lies.
    pub image: RepairImage,
    /// Registers of all vCPUs, by number.
    pub vcpus: Vec<Registers>,
    /// Kernel release, if the dump says.
    pub release: Option<String>,
    /// What is odd about the dump; debug files of modules that were not used, and why.
    pub remarks: Vec<String>,
    /// Debug files of modules that are to be found.
    pub files: DebugFiles,
}

impl Scene {
    /// Learns the kernel in a dump, and the modules whose debug files are found.
    ///
    /// # Errors
    /// When it can't be understood, or is another one than was named.
    pub fn of(core: &mut Vmcore, knowledge: &KnowledgeSources) -> Result<Self> {
        let build_id = core.vmcoreinfo().and_then(|info| info.build_id()?.parse().ok());
        let learned = guard::learn_dump(core.phys(), knowledge, build_id, &[])?;
        let image = RepairImage::assemble(&learned.kernel.facts, &learned.layer);
        let vcpus = (0..core.vcpu_count())
            .map(|vcpu| core.registers(Vcpu(vcpu)))
            .collect::<Result<Vec<_>, _>>()
            .context("registers")?;
        let release = release(core, &learned.layer.banner);
        let remarks = core.remarks().iter().map(ToString::to_string).collect();
        let files = DebugFiles::new(&knowledge.debug_dirs);
        let mut scene = Self { learned, image, vcpus, release, remarks, files };
        let refused = scene.learn_modules(&knowledge.debug_dirs);
        scene.remarks.extend(refused);
        Ok(scene)
    }

    /// Says which files were refused and why.
    fn learn_modules(&mut self, debug_dirs: &[PathBuf]) -> Vec<String> {
        if debug_dirs.is_empty() {
            return Vec::new();
        }
        let facts = &self.learned.kernel.facts;
        let report = self.learned.layer.load_debug_files(facts, &self.files);
        self.image = RepairImage::assemble(facts, &self.learned.layer);
        let refused = report.into_iter().flat_map(|(_, search)| search.refused);
        refused.map(|(path, error)| format!("{} is not used: {error}", path.display())).collect()
    }

    /// The crash; `None` when no vCPU is crashing.
    #[must_use]
    pub fn crash(&self, core: &Vmcore, policy: &Policy, cache: &mut CodeCache) -> Option<Crash> {
        let diagnosis = crashed(&self.image, core, &self.vcpus, cache)?;
        let memory = self.image.placement.space(core.phys());
        let (image, vcpus) = (&self.image, self.vcpus.as_slice());
        let situation = Situation { diagnosis: &diagnosis, image, memory: &memory, vcpus };
        let plan = quarantine::plan(&situation, policy, &Strikes::default());
        let (release, remarks) = (self.release.clone(), self.remarks.clone());
        Some(Crash { plan, diagnosis, release, remarks })
    }
}

/// The crash in a dump, with what the modules' debug files say; `None` when no vCPU of it is crashing.
///
/// # Errors
/// When the kernel in the dump can't be understood.
pub fn of_dump(
    core: &mut Vmcore,
    knowledge: &KnowledgeSources,
    policy: &Policy,
) -> Result<Option<Crash>> {
    let scene = Scene::of(core, knowledge)?;
    Ok(scene.crash(core, policy, &mut CodeCache::default()))
}

/// The kernel's release, by the dump's notes or by what the kernel in it calls itself (`linux_banner`, init/version.c).
fn release(core: &Vmcore, banner: &str) -> Option<String> {
    let noted = core.vmcoreinfo().and_then(|info| info.release().map(str::to_owned));
    let own = || banner.strip_prefix("Linux version ")?.split(' ').next().map(str::to_owned);
    noted.or_else(own)
}

/// The diagnosis of the vCPU that stands at a hook, or else of the first one whose stack tells of a crash.
fn crashed(
    image: &RepairImage,
    core: &impl Machine,
    vcpus: &[Registers],
    cache: &mut CodeCache,
) -> Option<Diagnosis> {
    let mut of = |index: usize, hook| {
        let registers = vcpus.get(index)?;
        diagnose::diagnose(image, core.phys(), registers, hook, Vcpu(index), cache).ok()
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
