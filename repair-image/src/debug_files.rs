//! Files of loaded modules: finding them under `--debug-dir`, unpacking them, and refusing those of
//! another build. What they say is read by `compile::module`.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Cursor, Read, Write};
use std::path::{Path, PathBuf};

use object::Object;

use crate::{BuildId, Error, LoadedModule};

/// Depth and number of directory entries that a search goes to (`/usr/lib/debug` of one kernel: depth 9,
/// some 5 000 files).
const MAX_DEPTH: usize = 16;
const MAX_ENTRIES: usize = 500_000;
/// Largest file of a module, unpacked (amdgpu with debug information: some 400 MB).
const MAX_SIZE: u64 = 1 << 30;
/// Endings of module files, the unpacked ones first.
const ENDINGS: [&str; 4] = [".ko.debug", ".ko", ".ko.xz", ".ko.zst"];

/// Directories in which files of modules are looked for.
#[derive(Clone, Debug, Default)]
pub struct DebugFiles {
    directories: Vec<PathBuf>,
    by_name: HashMap<String, Vec<PathBuf>>,
}

/// A module's file, unpacked.
#[derive(Clone, Debug)]
pub struct ModuleFile {
    /// Where it was found.
    pub path: PathBuf,
    /// ELF bytes.
    pub bytes: Vec<u8>,
    /// Whether its build id is known to be the loaded module's; `false` = one of them has none.
    pub build_id_checked: bool,
    /// Whether it has debug information.
    pub has_dwarf: bool,
}

/// What a search for one module's file gave.
#[derive(Debug, Default)]
pub struct Search {
    /// The file to use.
    pub file: Option<ModuleFile>,
    /// Files that were looked at and not taken, with the reason.
    pub refused: Vec<(PathBuf, Error)>,
}

impl DebugFiles {
    /// Lists the module files under `directories`, links not followed. What can't be read is left out.
    #[must_use]
    pub fn new(directories: &[PathBuf]) -> Self {
        let mut files = Self { directories: directories.to_vec(), by_name: HashMap::new() };
        let mut left = MAX_ENTRIES;
        for directory in directories {
            files.list(directory, MAX_DEPTH, &mut left);
        }
        files
    }

    fn list(&mut self, directory: &Path, depth: usize, left: &mut usize) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if *left == 0 {
                return;
            }
            *left -= 1;
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth > 0 => self.list(&entry.path(), depth - 1, left),
                Ok(kind) if kind.is_file() => {
                    if let Some(name) = entry.file_name().to_str().and_then(module_name) {
                        self.by_name.entry(name).or_default().push(entry.path());
                    }
                }
                _ => {}
            }
        }
    }

    /// The file of a loaded module: by build id (`.build-id/xx/yyyy.debug`), then by name.
    #[must_use]
    pub fn find(&self, module: &LoadedModule) -> Search {
        let mut search = Search::default();
        let by_id = module.build_id.iter().flat_map(|id| {
            let file = build_id_path(id);
            self.directories.iter().map(move |directory| directory.join(&file))
        });
        let by_name = self.by_name.get(&module.name).into_iter().flatten().cloned();
        for path in by_id.filter(|path| path.is_file()).chain(by_name) {
            match open(&path, module.build_id) {
                // A stripped copy tells no more than memory does: look on for the one with DWARF.
                Ok(file) if !file.has_dwarf => search.file = search.file.or(Some(file)),
                Ok(file) => {
                    search.file = Some(file);
                    break;
                }
                Err(error) => search.refused.push((path, error)),
            }
        }
        search
    }
}

/// Where a debug file lies under a debug directory by its build id: `.build-id/xx/yyyy.debug`.
#[must_use]
pub fn build_id_path(id: &BuildId) -> PathBuf {
    let text = id.to_string();
    let (first, rest) = text.split_at(2.min(text.len()));
    format!(".build-id/{first}/{rest}.debug").into()
}

/// The module's name from its file's: `virtio-net.ko.xz` is module `virtio_net`.
fn module_name(file: &str) -> Option<String> {
    let stem = ENDINGS.iter().find_map(|ending| file.strip_suffix(ending))?;
    Some(stem.replace('-', "_"))
}

/// Reads and unpacks a file, and checks its build id against the loaded module's.
fn open(path: &Path, loaded: Option<BuildId>) -> Result<ModuleFile, Error> {
    let packed = read_bounded(path).map_err(|error| Error::io(path, error))?;
    let bytes = unpack(packed)?;
    let elf = object::File::parse(&*bytes)
        .map_err(|source| Error::Elf { what: "a module's file", source })?;
    let own = elf.build_id().ok().flatten().and_then(BuildId::new);
    let has_dwarf = elf.section_by_name(".debug_info").is_some();
    match (own, loaded) {
        (Some(found), Some(expected)) if found != expected => {
            Err(Error::WrongBuild { found, expected })
        }
        (own, loaded) => {
            let build_id_checked = own.is_some() && own == loaded;
            Ok(ModuleFile { path: path.to_owned(), bytes, build_id_checked, has_dwarf })
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_SIZE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Unpacks xz and zstd, told by their first bytes; anything else is returned as it is.
fn unpack(packed: Vec<u8>) -> Result<Vec<u8>, Error> {
    let unpack = |what| move |source| Error::Unpack { what, source };
    if packed.starts_with(b"\xfd7zXZ\0") {
        let mut out = Bounded(Vec::new());
        lzma_rs::xz_decompress(&mut Cursor::new(packed), &mut out)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
            .map_err(unpack("a module's file (xz)"))?;
        return Ok(out.0);
    }
    if packed.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut out = Vec::new();
        zstd::Decoder::with_buffer(Cursor::new(packed))
            .and_then(|decoder| decoder.take(MAX_SIZE).read_to_end(&mut out))
            .map_err(unpack("a module's file (zstd)"))?;
        return Ok(out);
    }
    Ok(packed)
}

/// Takes at most [`MAX_SIZE`] bytes.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() as u64 + bytes.len() as u64 > MAX_SIZE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 GiB unpacked"));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use guest::GuestVirt;
    use object::write::Object as Writer;
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    use super::*;
    use crate::ModuleState;

    fn ko(id: u8) -> Vec<u8> {
        let mut elf = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let section = elf.add_section(vec![], b".note.gnu.build-id".to_vec(), SectionKind::Note);
        let mut note: Vec<u8> = [4u32, 20, 3].iter().flat_map(|word| word.to_le_bytes()).collect();
        note.extend(b"GNU\0");
        note.extend([id; 20]);
        elf.set_section_data(section, note, 4);
        elf.write().unwrap()
    }

    fn loaded(name: &str, id: u8) -> LoadedModule {
        LoadedModule {
            name: name.to_owned(),
            at: GuestVirt(0),
            state: ModuleState::Live,
            taints: 0,
            text: vec![],
            ranges: vec![],
            sections: vec![],
            build_id: BuildId::new(&[id; 20]),
        }
    }

    #[test]
    fn packed_files_are_found_by_name_and_other_builds_refused() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("kernel/drivers");
        fs::create_dir_all(&deep).unwrap();
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut Cursor::new(ko(7)), &mut packed).unwrap();
        fs::write(deep.join("a-b.ko.xz"), packed).unwrap();
        fs::write(deep.join("c.ko.zst"), zstd::encode_all(&*ko(8), 1).unwrap()).unwrap();
        fs::write(deep.join("note.txt"), b"no module").unwrap();
        let files = DebugFiles::new(&[directory.path().to_owned()]);
        let found = files.find(&loaded("a_b", 7)).file.unwrap();
        assert!(found.build_id_checked && found.bytes == ko(7));
        assert!(files.find(&loaded("c", 8)).file.is_some());
        let other = files.find(&loaded("c", 9));
        assert!(other.file.is_none());
        assert!(matches!(other.refused[..], [(_, Error::WrongBuild { .. })]));
        assert!(files.find(&loaded("d", 9)).refused.is_empty());
    }

    #[test]
    fn build_id_directory_comes_first_and_damage_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let ids = directory.path().join(".build-id/07");
        fs::create_dir_all(&ids).unwrap();
        fs::write(ids.join(format!("{}.debug", "07".repeat(19))), ko(7)).unwrap();
        fs::write(directory.path().join("a.ko"), b"\xfd7zXZ\0rubbish").unwrap();
        let files = DebugFiles::new(&[directory.path().to_owned()]);
        let found = files.find(&loaded("a", 7)).file.unwrap();
        assert!(found.path.to_string_lossy().contains(".build-id"));
        let damaged = files.find(&loaded("a", 8));
        assert!(matches!(damaged.refused[..], [(_, Error::Unpack { .. })]));
    }
}
