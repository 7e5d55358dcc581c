//! All that a dump tells: its crash, the repair that would have been made, what the machine was doing.

use anyhow::Result;
use diagnose::CodeCache;
use diagnose::console::{self, Report};
use diagnose::state::{self, Sources, State};
use diagnose::vmcore::Vmcore;
use guard::KnowledgeSources;
use guest::Machine;
use quarantine::Policy;

use crate::offline::{AtHand, Crash, Scene};

/// What a dump tells.
pub struct OfDump {
    /// Its name.
    pub name: String,
    /// Its format, in words.
    pub format: String,
    /// Bytes of RAM of the machine, and how many of them are in the dump.
    pub coverage: (u64, u64),
    /// What is odd about it.
    pub remarks: Vec<String>,
    /// The kernel.
    pub kernel: KernelOf,
    /// The crash and its plan; `None` when no vCPU is crashing.
    pub crash: Option<Crash>,
    /// What the machine was doing.
    pub state: State,
    /// What the kernel itself reported, by the log in its memory.
    pub reports: Vec<Report>,
}

/// The kernel in a dump.
pub struct KernelOf {
    /// Its release, if the dump says.
    pub release: Option<String>,
    /// Its build id, hex.
    pub build_id: Option<String>,
    /// Where its symbols and lines come from, in words.
    pub knowledge: String,
}

impl OfDump {
    /// Reads one.
    pub fn read(
        name: String,
        mut dump: Vmcore,
        sources: &KnowledgeSources,
        policy: &Policy,
    ) -> Result<Self> {
        let scene = Scene::of(&mut dump, sources)?;
        let mut cache = CodeCache::default();
        let crash = scene.crash(&dump, policy, &mut cache);
        let debug = AtHand::of(&scene.learned, sources, &scene.files);
        let sources = Sources {
            image: &scene.image,
            phys: dump.phys(),
            vcpus: &scene.vcpus,
            modules: &scene.learned.layer.modules,
            diagnosis: crash.as_ref().map(|crash| &crash.diagnosis),
            debug: Some(&debug),
        };
        let state = state::of(&sources, &mut cache);
        let reports = state.log.known().map(|log| console::read(log.text().as_bytes()));
        let coverage = dump.coverage();
        let kernel = KernelOf {
            release: scene.release,
            build_id: scene.learned.layer.build_id.map(|id| id.to_string()),
            knowledge: scene.learned.kernel.origin,
        };
        Ok(Self {
            name,
            format: dump.format().to_string(),
            coverage: (coverage.ram, coverage.captured),
            remarks: scene.remarks,
            kernel,
            crash,
            state,
            reports: reports.unwrap_or_default(),
        })
    }

    /// Facts of the dump and its kernel, by name.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        const MIB: u64 = 1 << 20;
        let (ram, captured) = self.coverage;
        let kernel = &self.kernel;
        let mut facts = vec![
            ("dump", format!("{}: {}", self.name, self.format)),
            ("memory", format!("{} MiB of {} MiB are in the dump", captured / MIB, ram / MIB)),
            ("kernel", kernel.release.clone().unwrap_or_else(|| "release unknown".to_owned())),
        ];
        facts.extend(kernel.build_id.clone().map(|id| ("build id", id)));
        facts.push(("knowledge", kernel.knowledge.clone()));
        facts.extend(self.remarks.iter().map(|remark| ("remark", remark.clone())));
        facts
    }
}
