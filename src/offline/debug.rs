//! Files with debug information of the kernel in a dump and of its modules, as the arguments name them or the cache
//! remembers them. Each is opened when it is asked for the first time; what is read from it is `repair_image`'s.

use std::cell::OnceCell;
use std::path::PathBuf;

use diagnose::state;
use guard::{KnowledgeSources, Learned};
use repair_image::{BuildId, DebugFile, DebugFiles, LoadedModule};

/// The files at hand.
pub struct AtHand<'a> {
    vmlinux: Option<(PathBuf, BuildId)>,
    kernel: OnceCell<Option<DebugFile>>,
    modules: Vec<(&'a LoadedModule, OnceCell<Option<DebugFile>>)>,
    files: &'a DebugFiles,
}

impl<'a> AtHand<'a> {
    /// Those of a kernel and of the modules that are loaded in it.
    #[must_use]
    pub fn of(learned: &'a Learned, sources: &KnowledgeSources, files: &'a DebugFiles) -> Self {
        let build_id = learned.layer.build_id;
        let vmlinux = build_id.and_then(|id| Some((sources.vmlinux_of(id)?, id)));
        let modules = learned.layer.modules.iter().map(|module| (module, OnceCell::new()));
        Self { vmlinux, kernel: OnceCell::new(), modules: modules.collect(), files }
    }
}

impl state::DebugFiles for AtHand<'_> {
    fn kernel(&self) -> Option<&DebugFile> {
        let open = || {
            let (path, build_id) = self.vmlinux.as_ref()?;
            DebugFile::vmlinux(path, *build_id).ok()
        };
        self.kernel.get_or_init(open).as_ref()
    }

    fn module(&self, name: &str) -> Option<&DebugFile> {
        let (module, file) = self.modules.iter().find(|(module, _)| module.name == name)?;
        let open = || {
            let found = self.files.find(module).file.filter(|file| file.has_dwarf)?;
            DebugFile::module(&found.bytes, &module.sections).ok()
        };
        file.get_or_init(open).as_ref()
    }
}
