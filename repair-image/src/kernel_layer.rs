//! The kernel layer of a repair image: one kernel's knowledge and types in one file, shared by every guest that runs that
//! kernel, cached by build id. How it is compiled is in `compile/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::compile::{self, Compiled};
use crate::file::{self, KnowledgeFile};
use crate::{Btf, BuildId, Error, GuestLayer, Knowledge, table};

const BTF: &str = ".defib.btf";
const META: &str = ".defib.meta";
const GUEST: &str = ".defib.guest";
/// Largest unpacked BTF that is believed, bytes.
const MAX_BTF: usize = 256 << 20;
/// Largest unpacked description that is believed, bytes.
const MAX_META: usize = 1 << 16;
/// Largest unpacked guest layer that is believed, bytes.
const MAX_GUEST: usize = 64 << 20;

/// What the file says of itself, zero-separated: build id, banner, compile statistics.
#[derive(Clone, Debug)]
struct Meta {
    build_id: BuildId,
    banner: String,
    statistics: String,
}

/// One kernel's compiled knowledge.
#[derive(Debug)]
pub struct KernelLayer {
    bytes: Option<Vec<u8>>,
    file: KnowledgeFile,
    meta: Meta,
    knowledge: Arc<Knowledge>,
    types: OnceLock<Arc<Btf>>,
}

/// One section of a kernel layer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SectionInfo {
    /// Name, as `readelf -S` shows it.
    pub name: String,
    /// Size in the file, bytes.
    pub bytes: usize,
    /// Number of records, where it is a table.
    pub records: Option<usize>,
}

impl KernelLayer {
    pub(crate) fn of_compiled(compiled: Compiled) -> Result<Self, Error> {
        let agreement = compiled.agreement;
        let statistics = format!(
            "cfa same {}, different {}, orc only {}, cfi only {}; damaged units {}",
            agreement.same,
            agreement.different,
            agreement.orc_only,
            agreement.cfi_only,
            compiled.damaged_units,
        );
        let meta = format!("{}\0{}\0{statistics}", compiled.build_id, compiled.banner);
        let mut sections = compiled.sections;
        sections.push((BTF, compiled.btf));
        sections.push((META, table::compress(meta.as_bytes())));
        let bytes = file::pack(&sections)?;
        let file = KnowledgeFile::of_bytes(bytes.clone())?;
        Ok(Self { bytes: Some(bytes), ..Self::of_file(file)? })
    }

    fn of_file(file: KnowledgeFile) -> Result<Self, Error> {
        let section = file.section(META);
        let len = section.len() as u64;
        let meta = table::unpack(&section, MAX_META).and_then(|text| {
            let text = String::from_utf8(text).ok()?;
            let mut parts = text.split('\0').map(str::to_owned);
            let build_id = parts.next()?.parse().ok()?;
            Some(Meta { build_id, banner: parts.next()?, statistics: parts.next()? })
        });
        let meta = meta.ok_or(Error::damaged(META, len, len))?;
        let knowledge = Arc::new(Knowledge::of_file(&file)?);
        Ok(Self { bytes: None, file, meta, knowledge, types: OnceLock::new() })
    }

    /// Maps a file that [`Self::write`] made.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be mapped, [`Error::Elf`] or [`Error::Damaged`] when it is damaged,
    /// truncated or of another format version.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::of_file(KnowledgeFile::open(path)?)
    }

    /// Reads such a file from memory.
    ///
    /// # Errors
    /// As [`Self::open`], without [`Error::Io`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        Self::of_file(KnowledgeFile::of_bytes(bytes)?)
    }

    /// Writes a compiled layer to a file, at once or not at all. A layer that was opened from a file is already in one:
    /// then nothing is done.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        self.bytes.as_ref().map_or(Ok(()), |bytes| file::write_whole(path, bytes))
    }

    /// Writes a whole repair image: this kernel layer and, where given, a guest layer.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Write`] when a layer can't be encoded.
    pub fn write_image(&self, path: &Path, guest: Option<&GuestLayer>) -> Result<(), Error> {
        let mut sections: Vec<(String, Vec<u8>)> = self
            .file
            .sections()
            .filter(|(name, _)| *name != file::HEADER && *name != GUEST)
            .map(|(name, _)| (name.to_owned(), self.file.section(name).to_vec()))
            .collect();
        if let Some(guest) = guest {
            let bytes = guest
                .to_bytes()
                .map_err(|error| Error::Write { what: "guest layer", reason: error.to_string() })?;
            sections.push((GUEST.to_owned(), table::compress(&bytes)));
        }
        file::write_whole(path, &file::pack(&sections)?)
    }

    /// The guest layer in the same file, if it has one.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the section is damaged.
    pub fn guest_layer(&self) -> Result<Option<GuestLayer>, Error> {
        let packed = self.file.section(GUEST);
        if packed.is_empty() {
            return Ok(None);
        }
        let len = packed.len() as u64;
        let bytes = table::unpack(&packed, MAX_GUEST).ok_or(Error::damaged(GUEST, len, len))?;
        GuestLayer::from_bytes(&bytes).map(Some)
    }

    /// Code knowledge, at link addresses.
    #[must_use]
    pub fn knowledge(&self) -> &Arc<Knowledge> {
        &self.knowledge
    }

    /// The kernel's types. Unpacked at the first call (some milliseconds).
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::Btf`] when the section is damaged.
    pub fn types(&self) -> Result<Arc<Btf>, Error> {
        if let Some(types) = self.types.get() {
            return Ok(types.clone());
        }
        let packed = self.file.section(BTF);
        let len = packed.len() as u64;
        let bytes = table::unpack(&packed, MAX_BTF).ok_or(Error::damaged(BTF, len, len))?;
        let types = Arc::new(Btf::new(bytes)?);
        Ok(self.types.get_or_init(|| types).clone())
    }

    /// Build id of the kernel.
    #[must_use]
    pub fn build_id(&self) -> BuildId {
        self.meta.build_id
    }

    /// The kernel's banner, `Linux version 6.1.0-…`, without line end.
    #[must_use]
    pub fn banner(&self) -> &str {
        &self.meta.banner
    }

    /// The kernel's release, as `uname -r` prints it; empty when the banner is unusual.
    #[must_use]
    pub fn release(&self) -> &str {
        let rest = self.meta.banner.strip_prefix("Linux version ").unwrap_or("");
        rest.split(' ').next().unwrap_or("")
    }

    /// How compiling went: agreement of the unwind tables, damaged units.
    #[must_use]
    pub fn statistics(&self) -> &str {
        &self.meta.statistics
    }

    /// The sections with their sizes and numbers of records.
    #[must_use]
    pub fn inspect(&self) -> Vec<SectionInfo> {
        let counts = self.knowledge.counts();
        let sections = self.file.sections().map(|(name, bytes)| SectionInfo {
            name: name.to_owned(),
            bytes,
            records: counts.iter().find(|(own, _)| *own == name).map(|(_, count)| *count),
        });
        sections.collect()
    }
}

/// Where the layer of a build id lies in a cache folder.
#[must_use]
pub fn cache_path(cache: &Path, build_id: &BuildId) -> PathBuf {
    cache.join(format!("{build_id}.defib"))
}

/// The vmlinux that the layer of a build id in a cache folder was compiled from, or has last been asked for with. Whether
/// it is still there, and still that kernel's, is for its reader to see.
#[must_use]
pub fn remembered_vmlinux(cache: &Path, build_id: &BuildId) -> Option<PathBuf> {
    let path = fs::read_to_string(memory_path(cache, build_id)).ok()?;
    let path = PathBuf::from(path);
    path.is_absolute().then_some(path)
}

fn memory_path(cache: &Path, build_id: &BuildId) -> PathBuf {
    cache.join(format!("{build_id}.vmlinux"))
}

/// Best effort: a cache that cannot be written is no error, and a path that is no text is not kept.
fn remember(cache: &Path, build_id: &BuildId, vmlinux: &Path) {
    let Ok(path) = std::path::absolute(vmlinux) else { return };
    if let Some(text) = path.to_str()
        && remembered_vmlinux(cache, build_id).as_deref() != Some(&*path)
    {
        let _ = file::write_whole(&memory_path(cache, build_id), text.as_bytes());
    }
}

/// Build id of an ELF file, from its headers and notes only.
///
/// # Errors
/// [`Error::Io`], [`Error::Elf`], or [`Error::MissingSection`] when there is none.
pub fn build_id_of(path: &Path) -> Result<BuildId, Error> {
    use object::Object;
    let file = fs::File::open(path).map_err(|source| Error::io(path, source))?;
    let cache = object::ReadCache::new(file);
    let elf = object::read::elf::ElfFile64::<object::LittleEndian, _>::parse(&cache)
        .map_err(|source| Error::Elf { what: "vmlinux", source })?;
    let id = elf.build_id().ok().flatten().and_then(BuildId::new);
    id.ok_or(Error::MissingSection { section: ".note.gnu.build-id" })
}

/// The kernel layer of a vmlinux: from the cache folder when it is there and whole, else compiled and put there.
/// `threads` as in [`compile::vmlinux`].
///
/// # Errors
/// As [`compile::vmlinux`]. A cache that cannot be written is no error: the layer is then kept in memory.
pub fn cached(vmlinux: &Path, cache: &Path, threads: usize) -> Result<KernelLayer, Error> {
    let build_id = build_id_of(vmlinux)?;
    let path = cache_path(cache, &build_id);
    if let Ok(layer) = KernelLayer::open(&path)
        && layer.build_id() == build_id
    {
        remember(cache, &build_id, vmlinux);
        return Ok(layer);
    }
    let layer = compile::vmlinux(vmlinux, threads)?;
    let written = fs::create_dir_all(cache).map_err(|source| Error::io(cache, source));
    match written.and_then(|()| layer.write(&path)).and_then(|()| KernelLayer::open(&path)) {
        Ok(mapped) => {
            remember(cache, &build_id, vmlinux);
            Ok(mapped)
        }
        Err(_) => Ok(layer),
    }
}
