//! Where knowledge of a guest's kernel comes from: a vmlinux that was named, a compiled layer in the
//! cache, debug files by build id, or else the guest's own memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::{PhysMemory, Registers};
use repair_image::{
    BuildId, GuestLayer, KernelFacts, KernelLayer, KernelText, build_id_path, compile,
    locate_without_files, without_files,
};

use crate::Error;

/// Where knowledge of kernels may come from. None at all is fine: guest memory then tells what it can.
#[derive(Clone, Debug, Default)]
pub struct KnowledgeSources {
    /// vmlinux with DWARF of the guest's kernel; its build id must be the guest's.
    pub vmlinux: Option<PathBuf>,
    /// Directories with debug files (.build-id tree, vmlinux-*, *.ko, *.ko.debug).
    pub debug_dirs: Vec<PathBuf>,
    /// Directory that keeps compiled kernel layers, by build id, in its folder `layers`. `None`: nothing is
    /// kept, and a vmlinux is compiled each time (some seconds).
    pub cache: Option<PathBuf>,
}

impl KnowledgeSources {
    /// Where a command keeps layers if it is not told: `defib` in the user's cache directory (XDG Base Directory
    /// Specification), or in the system's for a user without a home.
    #[must_use]
    pub fn default_cache() -> PathBuf {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let of_user = || Some(variable("HOME")?.join(".cache"));
        let cache = variable("XDG_CACHE_HOME").or_else(of_user);
        cache.unwrap_or_else(|| PathBuf::from("/var/cache")).join("defib")
    }

    /// Where the vmlinux of a kernel is: as named, as remembered from the time when its layer was compiled, or found under
    /// the debug directories. It may have gone since, or be another's.
    #[must_use]
    pub fn vmlinux_of(&self, build_id: BuildId) -> Option<PathBuf> {
        let remembered = || {
            let path = repair_image::kernel_layer::remembered_vmlinux(&self.layers()?, &build_id)?;
            path.is_file().then_some(path)
        };
        let named = self.vmlinux.clone();
        named.or_else(remembered).or_else(|| find_vmlinux(&self.debug_dirs, build_id))
    }

    fn layers(&self) -> Option<PathBuf> {
        self.cache.as_ref().map(|cache| cache.join("layers"))
    }
}

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
/// [`Error::NoKernel`] when none is found in the memory, [`Error::OtherKernel`] when the one that was named is
/// another; [`Error::File`], [`Error::Types`], [`Error::GuestLayer`].
pub fn learn(
    phys: &dyn PhysMemory,
    sources: &KnowledgeSources,
    vcpus: &[Registers],
) -> Result<Learned, Error> {
    learn_keeping(phys, sources, vcpus, KernelText::Kept)
}

fn learn_keeping(
    phys: &dyn PhysMemory,
    sources: &KnowledgeSources,
    vcpus: &[Registers],
    text: KernelText,
) -> Result<Learned, Error> {
    if let Some(kernel) = from_files(phys, sources, vcpus)? {
        return take(phys, kernel, vcpus, text);
    }
    let (located, facts) =
        without_files(phys, vcpus).map_err(|source| Error::NoKernel(Box::new(source)))?;
    let start = Instant::now();
    let layer = GuestLayer::take_located(phys, &facts, located, text)
        .map_err(|source| Error::GuestLayer(Box::new(source)))?;
    let origin = "guest memory (no debug information: no lines in reports)".to_owned();
    Ok(Learned { kernel: Kernel { facts, layer: None, origin }, layer, taken: start.elapsed() })
}

/// The same for a dump. Where its notes tell the build id, a layer that is kept of that kernel is taken at once, without
/// searching the memory for what kernel it is. Memory has the last word: notes that don't agree with it are not believed.
/// Text is not kept for comparing.
///
/// # Errors
/// As [`learn`].
pub fn learn_dump(
    phys: &dyn PhysMemory,
    sources: &KnowledgeSources,
    build_id: Option<BuildId>,
    vcpus: &[Registers],
) -> Result<Learned, Error> {
    let kept = build_id.zip(sources.layers()).filter(|_| sources.vmlinux.is_none());
    let path = kept.map(|(id, folder)| repair_image::kernel_layer::cache_path(&folder, &id));
    if let Some(path) = path
        && let Ok(layer) = KernelLayer::open(&path)
        && let Ok(learned) = take(phys, of_layer(layer, &path)?, vcpus, KernelText::Left)
    {
        return Ok(learned);
    }
    learn_keeping(phys, sources, vcpus, KernelText::Left)
}

/// Takes the guest layer of a kernel that is known.
///
/// # Errors
/// When the guest runs another kernel.
pub(crate) fn take(
    phys: &dyn PhysMemory,
    kernel: Kernel,
    vcpus: &[Registers],
    text: KernelText,
) -> Result<Learned, Error> {
    let start = Instant::now();
    match GuestLayer::take(phys, &kernel.facts, vcpus, text) {
        Ok(layer) => Ok(Learned { kernel, layer, taken: start.elapsed() }),
        Err(source) => Err(Error::OtherKernel { origin: kernel.origin, source: Box::new(source) }),
    }
}

/// The kernel layer of a vmlinux: kept from an earlier time, or compiled, which takes some seconds.
///
/// # Errors
/// [`Error::File`] when the file is no vmlinux with debug information.
pub fn kernel_layer(vmlinux: &Path, sources: &KnowledgeSources) -> Result<KernelLayer, Error> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let layer = match sources.layers() {
        Some(folder) => repair_image::kernel_layer::cached(vmlinux, &folder, threads),
        None => compile::vmlinux(vmlinux, threads),
    };
    layer.map_err(|source| Error::File { path: vmlinux.to_owned(), source: Box::new(source) })
}

/// Facts from a file: named, kept, or found by build id.
fn from_files(
    phys: &dyn PhysMemory,
    sources: &KnowledgeSources,
    vcpus: &[Registers],
) -> Result<Option<Kernel>, Error> {
    if let Some(vmlinux) = &sources.vmlinux {
        return of_layer(kernel_layer(vmlinux, sources)?, vmlinux).map(Some);
    }
    let Some(build_id) = locate_without_files(phys, vcpus).ok().and_then(|found| found.0.build_id)
    else {
        return Ok(None);
    };
    let kept = sources.layers();
    if let Some(path) = kept.map(|kept| repair_image::kernel_layer::cache_path(&kept, &build_id))
        && let Ok(layer) = KernelLayer::open(&path)
    {
        return of_layer(layer, &path).map(Some);
    }
    let Some(vmlinux) = find_vmlinux(&sources.debug_dirs, build_id) else {
        return Ok(None);
    };
    of_layer(kernel_layer(&vmlinux, sources)?, &vmlinux).map(Some)
}

fn of_layer(layer: KernelLayer, origin: &Path) -> Result<Kernel, Error> {
    let facts = KernelFacts::of_layer(&layer).map_err(|source| Error::Types(Box::new(source)))?;
    Ok(Kernel { facts, layer: Some(Arc::new(layer)), origin: origin.display().to_string() })
}

/// The vmlinux of a build id under the debug directories: `.build-id/xx/yyyy.debug`, or a file named
/// `vmlinux*` there or in `boot/`.
fn find_vmlinux(directories: &[PathBuf], build_id: BuildId) -> Option<PathBuf> {
    let by_id = build_id_path(&build_id);
    let is_it = |path: &PathBuf| {
        repair_image::kernel_layer::build_id_of(path).is_ok_and(|found| found == build_id)
    };
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
