//! What a guard knows of the guest in its present boot: kernel, guest layer, repair image; and keeping
//! that up to date while modules come and go.

use std::time::Duration;

use diagnose::CodeCache;
use guest::{AddressSpace, Hook, HookKind, PhysMemory, Reg, Registers, VirtMemory};
use repair_image::{DebugFiles, GuestLayer, KernelText, RepairImage};
use serde_json::{Value, json};

use crate::knowledge::{self, Kernel, Learned};
use crate::{Error, KnowledgeSources, Observer};

/// CR0.PE: protected mode, not real mode (Intel SDM 3A 2.5).
const CR0_PROTECTION: u64 = 1 << 0;
/// CR0.PG: paging is on (Intel SDM 3A 2.5).
const CR0_PAGING: u64 = 1 << 31;
/// EFER.LMA: 64-bit mode or a 32-bit program under it (Intel SDM 3A 2.2.1).
const EFER_LONG_MODE: u64 = 1 << 10;

/// Knowledge of one boot of the guest.
pub struct Session {
    /// The repair image in use.
    pub image: RepairImage,
    /// Functions that were decoded already.
    pub cache: CodeCache,
    kernel: Kernel,
    layer: GuestLayer,
    sources: KnowledgeSources,
    debug_files: DebugFiles,
    /// Modules whose debug files were not taken, and why.
    refused_files: Vec<(String, String)>,
    /// Whether everything that a crash is likely to need is decoded.
    warm: bool,
    taken: Duration,
}

impl Session {
    /// Learns the kernel and takes the guest layer. The guest runs meanwhile.
    ///
    /// # Errors
    /// When the kernel is not found, or is another than the files are for.
    pub fn begin(phys: &dyn PhysMemory, sources: &KnowledgeSources) -> Result<Self, Error> {
        Self::with(knowledge::learn(phys, sources, &[])?, sources.clone())
    }

    /// Whether the layer is known to be of a kernel that had not booted: text was still to be patched, per-CPU areas
    /// to be placed, CPUs to come. That the kernel has booted since does not make the layer a better one.
    #[must_use]
    pub fn is_booting(&self) -> bool {
        self.system_state().is_some_and(|(state, running)| state < running)
    }

    /// The same after a reset of the guest: its kernel may lie elsewhere, or be another.
    ///
    /// # Errors
    /// As [`Session::begin`]; also while the guest has not booted yet.
    pub fn begin_again(&self, phys: &dyn PhysMemory, vcpus: &[Registers]) -> Result<Self, Error> {
        let learned = knowledge::take(phys, self.kernel.clone(), vcpus, KernelText::Kept)
            .or_else(|_| knowledge::learn(phys, &self.sources, vcpus))?;
        let session = Self::with(learned, self.sources.clone())?;
        if !session.runs_on(phys, vcpus) {
            return Err(Error::NotRunning);
        }
        match session.system_state() {
            Some((state, running)) if state == running => Ok(session),
            _ => Err(Error::Booting),
        }
    }

    /// Whether a vCPU's own page tables map this kernel. After a reset, memory still holds the kernel of the
    /// boot before while the firmware runs.
    fn runs_on(&self, phys: &dyn PhysMemory, vcpus: &[Registers]) -> bool {
        let text = self.image.placement.text.start;
        let expected = self.layer.space(phys).translate(text);
        vcpus.iter().any(|registers| {
            let paging = registers.get(Reg::Cr0).is_some_and(|cr0| cr0 & CR0_PAGING != 0);
            let space = AddressSpace::of_vcpu(phys, registers).filter(|_| paging);
            let found = space.map(|space| space.translate(text));
            expected.is_ok() && found == Some(expected)
        })
    }

    /// Why a vCPU that stands at a hook's address can't be at the hook; `None` when it can.
    #[must_use]
    pub fn why_not_in_kernel(
        &self,
        phys: &dyn PhysMemory,
        registers: &Registers,
    ) -> Option<&'static str> {
        let off = |reg, bit| registers.get(reg).is_some_and(|value| value & bit == 0);
        if off(Reg::Cr0, CR0_PROTECTION) {
            Some("is in real mode")
        } else if off(Reg::Cr0, CR0_PAGING) {
            Some("has paging off")
        } else if off(Reg::Efer, EFER_LONG_MODE) {
            Some("is not in long mode")
        } else if !self.runs_on(phys, std::slice::from_ref(registers)) {
            Some("runs another kernel than the one that is known")
        } else {
            None
        }
    }

    /// `system_state` before the layer was taken, and the value from which on text is patched and user space has
    /// started (`SYSTEM_RUNNING`; smaller ones are stages of the boot).
    fn system_state(&self) -> Option<(i64, i64)> {
        let running = self.image.types.enumerator("SYSTEM_RUNNING")?;
        Some((self.layer.system_state?.into(), running))
    }

    /// With a kernel that is known.
    ///
    /// # Errors
    /// When it lacks a function that is to be hooked.
    pub fn with(learned: Learned, sources: KnowledgeSources) -> Result<Self, Error> {
        let Learned { kernel, layer, taken } = learned;
        let mut session = Self {
            image: RepairImage::assemble(&kernel.facts, &layer),
            cache: CodeCache::default(),
            kernel,
            layer,
            debug_files: DebugFiles::new(&sources.debug_dirs),
            sources,
            refused_files: Vec::new(),
            warm: false,
            taken,
        };
        session.refuse_real_time()?;
        session.hooks_or_error()?;
        session.learn_modules();
        Ok(session)
    }

    /// `UTS_VERSION` says so in the banner (scripts/mkcompile_h; init/Makefile since v6.2).
    fn refuse_real_time(&self) -> Result<(), Error> {
        let banner = self.banner();
        let real_time = banner.split_whitespace().any(|word| word == "PREEMPT_RT");
        if real_time { Err(Error::RealTime { banner: banner.to_owned() }) } else { Ok(()) }
    }

    fn hooks_or_error(&self) -> Result<(), Error> {
        let mut functions = HookKind::ALL.into_iter().map(HookKind::function);
        match functions.find(|function| self.image.address_of(function).is_none()) {
            Some(function) => Err(Error::NoHook { function }),
            None => Ok(()),
        }
    }

    /// Where the hooks sit in this boot.
    #[must_use]
    pub fn hooks(&self) -> Vec<Hook> {
        let hook =
            |kind: HookKind| Some(Hook { kind, at: self.image.address_of(kind.function())? });
        HookKind::ALL.into_iter().filter_map(hook).collect()
    }

    /// Follows the module list; `true` when it changed. Reads debug files, so the guest must run.
    ///
    /// # Errors
    /// When the list can't be read.
    pub fn refresh_modules(&mut self, phys: &dyn PhysMemory) -> Result<bool, Error> {
        if !self.refresh_from_memory(phys)? {
            return Ok(false);
        }
        self.learn_modules();
        Ok(true)
    }

    /// Follows the module list with what is in guest memory alone, for a guest that stands.
    ///
    /// # Errors
    /// When the list can't be read.
    pub fn refresh_from_memory(&mut self, phys: &dyn PhysMemory) -> Result<bool, Error> {
        let changed = self
            .layer
            .refresh_modules(phys, &self.kernel.facts)
            .map_err(|source| Error::Modules(Box::new(source)))?;
        if changed {
            self.image = RepairImage::assemble(&self.kernel.facts, &self.layer);
            self.warm = false;
        }
        Ok(changed)
    }

    /// Decodes code that a crash is likely to need, for at most `budget`; `true` when nothing is left to do.
    pub fn warm(&mut self, phys: &dyn PhysMemory, budget: Duration) -> bool {
        if !self.warm {
            let space = self.layer.space(phys);
            self.warm = diagnose::warm(&self.image, &space, &mut self.cache, budget);
        }
        self.warm
    }

    /// Compiles knowledge of modules whose files are found.
    fn learn_modules(&mut self) {
        let report = self.layer.load_debug_files(&self.kernel.facts, &self.debug_files);
        let refused = report.iter().flat_map(|(module, search)| {
            search.refused.iter().map(move |(_, error)| (module.clone(), error.to_string()))
        });
        self.refused_files = refused.collect();
        self.image = RepairImage::assemble(&self.kernel.facts, &self.layer);
    }

    /// The kernel in its own words.
    pub fn banner(&self) -> &str {
        self.layer.banner.trim()
    }

    /// Kernel and origin of what is known of it.
    #[must_use]
    pub fn describe(&self) -> Value {
        json!({
            "banner": self.layer.banner.trim(),
            "release": self.kernel.layer.as_ref().map(|layer| layer.release().to_owned()),
            "build_id": self.layer.build_id.map(|id| id.to_string()),
            "knowledge": self.kernel.origin,
        })
    }

    /// Says what image is in use.
    ///
    /// # Errors
    /// When the observer fails.
    pub fn announce(&self, observer: &mut dyn Observer) -> std::io::Result<()> {
        let bytes = self
            .kernel
            .layer
            .as_ref()
            .map(|layer| layer.inspect().iter().map(|section| section.bytes).sum::<usize>());
        let mut fields = self.describe();
        fields["slide"] = json!(format!("{:#x}", self.image.placement.slide));
        fields["modules"] = json!(self.image.modules.len());
        fields["kernel_layer_bytes"] = json!(bytes);
        fields["guest_layer_us"] = json!(self.taken.as_micros() as u64);
        let text = format!(
            "image: {}\n               knowledge from {}; guest layer taken in {:.1} ms, {} modules",
            self.layer.banner.trim(),
            self.kernel.origin,
            self.taken.as_secs_f64() * 1e3,
            self.image.modules.len(),
        );
        observer.event("image", fields, &text)
    }

    /// Says which modules are loaded.
    ///
    /// # Errors
    /// When the observer fails.
    pub fn announce_modules(&self, observer: &mut dyn Observer) -> std::io::Result<()> {
        let names: Vec<_> = self.image.modules.iter().map(|module| &module.name).collect();
        let with_lines: Vec<_> = self
            .image
            .modules
            .iter()
            .filter(|module| module.knowledge.has_source())
            .map(|module| &module.name)
            .collect();
        let fields =
            json!({ "modules": names, "with_lines": with_lines, "refused": self.refused_files });
        observer.event("modules", fields, &format!("modules changed: {} loaded", names.len()))
    }
}
