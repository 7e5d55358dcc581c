//! Where knowledge of a guest's kernel comes from: a vmlinux that was named, a compiled layer in the
//! cache, debug files by build id, or else the guest's own memory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest::{PhysMemory, Registers};
use repair_image::{
    BuildId, GuestLayer, KernelFacts, KernelLayer, build_id_path, kernel_layer,
    locate_without_files, without_files,
};

use crate::cli::KnowledgeSources;

/// What is known of a kernel, and where from.
#[derive(Clone)]
pub struct Kernel {
    /// The facts.
    pub facts: KernelFacts,
    /// The compiled layer they come from, if not from guest memory.
    pub layer: Option<Arc<KernelLayer>>,
    /// In words.
    pub origin: String,
}

/// A kernel, and the layer that was taken from the guest that runs it.
pub struct Learned {
    /// The kernel.
    pub kernel: Kernel,
    /// The guest layer.
    pub layer: GuestLayer,
    /// How long taking the layer took. The guest ran meanwhile.
    pub taken: Duration,
}

/// Learns the guest's kernel and takes the guest layer from its memory. `vcpus` may hold registers: a guest
/// that has rebooted keeps traces of its former kernel in memory, and only CR3 tells which one runs.
///
/// # Errors
/// When no kernel is found in the memory, or the one that was named is another.
pub fn learn(
    phys: &dyn PhysMemory,
    sources: &KnowledgeSources,
    vcpus: &[Registers],
) -> Result<Learned> {
    if let Some(kernel) = from_files(phys, sources, vcpus)? {
        return take(phys, kernel, vcpus);
    }
    let (located, facts) = without_files(phys, vcpus).context("no Linux kernel in guest memory")?;
    let start = Instant::now();
    let layer = GuestLayer::take_located(phys, &facts, located)?;
    let origin = "guest memory (no debug information: no lines in reports)".to_owned();
    Ok(Learned { kernel: Kernel { facts, layer: None, origin }, layer, taken: start.elapsed() })
}

/// Takes the guest layer of a kernel that is known.
///
/// # Errors
/// When the guest runs another kernel.
pub fn take(phys: &dyn PhysMemory, kernel: Kernel, vcpus: &[Registers]) -> Result<Learned> {
    let start = Instant::now();
    let layer = GuestLayer::take(phys, &kernel.facts, vcpus)
        .with_context(|| format!("the guest does not fit {}", kernel.origin))?;
    Ok(Learned { kernel, layer, taken: start.elapsed() })
}

/// Facts from a file: named, in the cache, or found by build id.
fn from_files(
    phys: &dyn PhysMemory,
    sources: &KnowledgeSources,
    vcpus: &[Registers],
) -> Result<Option<Kernel>> {
    let cache = cache(sources);
    if let Some(vmlinux) = &sources.vmlinux {
        let layer = kernel_layer::cached(vmlinux, &cache, threads())
            .with_context(|| format!("cannot use {}", vmlinux.display()))?;
        return of_layer(layer, vmlinux.display().to_string()).map(Some);
    }
    let Some(build_id) = locate_without_files(phys, vcpus).ok().and_then(|found| found.0.build_id)
    else {
        return Ok(None);
    };
    let compiled = kernel_layer::cache_path(&cache, &build_id);
    if let Ok(layer) = KernelLayer::open(&compiled) {
        return of_layer(layer, compiled.display().to_string()).map(Some);
    }
    let Some(vmlinux) = find_vmlinux(&sources.debug_dirs, build_id) else {
        return Ok(None);
    };
    let layer = kernel_layer::cached(&vmlinux, &cache, threads())
        .with_context(|| format!("cannot use {}", vmlinux.display()))?;
    of_layer(layer, vmlinux.display().to_string()).map(Some)
}

fn of_layer(layer: KernelLayer, origin: String) -> Result<Kernel> {
    let facts = KernelFacts::of_layer(&layer).context("types of the kernel layer")?;
    Ok(Kernel { facts, layer: Some(Arc::new(layer)), origin })
}

/// The vmlinux of a build id under the debug directories: `.build-id/xx/yyyy.debug`, or a file named
/// `vmlinux*` there or in `boot/`.
fn find_vmlinux(directories: &[PathBuf], build_id: BuildId) -> Option<PathBuf> {
    let by_id = build_id_path(&build_id);
    let is_it =
        |path: &PathBuf| kernel_layer::build_id_of(path).is_ok_and(|found| found == build_id);
    directories.iter().find_map(|directory| {
        let named = [directory.clone(), directory.join("boot")].into_iter().flat_map(|folder| {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .filter(|entry| entry.file_name().to_string_lossy().starts_with("vmlinux"))
                .map(|entry| entry.path())
                .collect::<Vec<_>>()
        });
        std::iter::once(directory.join(&by_id)).chain(named).find(is_it)
    })
}

/// Directory of compiled kernel layers.
#[must_use]
pub fn cache(sources: &KnowledgeSources) -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let root = sources.cache.clone().or_else(|| Some(variable("XDG_CACHE_HOME")?.join("defib")));
    let root = root.or_else(|| Some(variable("HOME")?.join(".cache/defib")));
    root.unwrap_or_else(|| PathBuf::from("/var/cache/defib")).join("layers")
}

/// Threads to compile with.
#[must_use]
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
