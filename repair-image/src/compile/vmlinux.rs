//! A linked kernel with debug information -> knowledge, types and identity.

use std::collections::HashMap;
use std::path::Path;

use gimli::{Dwarf, EndianSlice, LittleEndian};
use object::Object;

use super::Slice;
use super::elf::{self, Elf};
use super::units::{self, Units};
use super::unwind::{Joined, Tables};
use crate::cfi::Agreement;
use crate::draft::{Draft, DraftSymbol};
use crate::mmap::MappedFile;
use crate::orc::OrcLayout;
use crate::variables::Variables;
use crate::{Btf, BuildId, Error, KernelLayer, Types, table};

/// A compiled kernel, as sections of a knowledge file.
pub(crate) struct Compiled {
    pub(crate) sections: Vec<(&'static str, Vec<u8>)>,
    /// Raw BTF, packed.
    pub(crate) btf: Vec<u8>,
    pub(crate) build_id: BuildId,
    /// Text of `linux_banner`, without the line's end.
    pub(crate) banner: String,
    pub(crate) agreement: Agreement,
    /// Compilation units that could not be read.
    pub(crate) damaged_units: usize,
}

/// Compiles a kernel's vmlinux, with its symbol table, ORC and BTF, and DWARF where it has any. `threads` threads are
/// used; 0 = one a core.
///
/// # Errors
/// [`Error::Io`] when the file cannot be mapped, [`Error::Elf`], [`Error::MissingSection`], [`Error::Btf`] or
/// [`Error::Dwarf`] when it is no such file or damaged.
pub fn vmlinux(path: &Path, threads: usize) -> Result<KernelLayer, Error> {
    let file = MappedFile::open(path)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| Error::Write { what: "threads", reason: error.to_string() })?;
    pool.install(|| KernelLayer::of_compiled(compile(&file)?))
}

/// The DWARF sections of a linked object. Its relocations for them are left alone: the linker has applied
/// them, `--emit-relocs` (CONFIG_X86_NEED_RELOCS) only kept a copy.
pub(crate) fn dwarf<'d>(elf: &Elf<'d>) -> Result<Dwarf<Slice<'d>>, Error> {
    let load = |id: gimli::SectionId| {
        Ok::<_, Error>(EndianSlice::new(elf::data(elf, id.name())?, LittleEndian))
    };
    Dwarf::load(load)
}

/// Text at a data symbol.
fn text_at(elf: &Elf<'_>, symbols: &[DraftSymbol<'_>], name: &str) -> Option<String> {
    use object::ObjectSection;
    let symbol = symbols.iter().find(|symbol| symbol.name == name)?;
    let section = elf.sections().find(|section| {
        symbol.at.0 >= section.address() && symbol.at.0 - section.address() < section.size()
    })?;
    let data = section.data().ok()?.get((symbol.at.0 - section.address()) as usize..)?;
    let data = data.get(..memchr::memchr(0, data)?)?;
    Some(std::str::from_utf8(data).ok()?.trim_end().to_owned())
}

/// Where nothing is known of the layout from types, the section `.orc_header` tells.
fn orc_layout(elf: &Elf<'_>, types: &Btf) -> OrcLayout {
    let header = elf.section_by_name(".orc_header").is_some();
    OrcLayout::of(types).unwrap_or(OrcLayout::by_header(header))
}

fn compile(bytes: &[u8]) -> Result<Compiled, Error> {
    let elf = elf::parse(bytes, "vmlinux")?;
    let build_id = elf::build_id(&elf).ok_or(Error::MissingSection { section: ".notes" })?;
    let (btf_bytes, _) = elf::needed(&elf, ".BTF")?;
    let btf = Btf::new(btf_bytes)?;
    let (orc_ip, orc_ip_at) = elf::needed(&elf, ".orc_unwind_ip")?;
    let tables = Tables {
        orc_ip,
        orc_ip_at,
        orc: elf::needed(&elf, ".orc_unwind")?.0,
        layout: orc_layout(&elf, &btf),
        debug_frame: elf::data(&elf, ".debug_frame")?,
    };
    let units = Units::new(dwarf(&elf)?)?;
    let text = elf::code_ranges(&elf);
    let wanted = |name: &str| btf.prototype(name).is_none();
    let side = || rayon::join(|| tables.joined(), || table::compress_hard(btf_bytes));
    let (gathered, (joined, packed_btf)) =
        rayon::join(|| units::gather(&units, &text, &wanted), side);
    let (unwind, agreement): Joined = joined?;
    let symbols = elf::symbols(&elf, |_| Some(0));
    let banner = text_at(&elf, &symbols, "linux_banner").unwrap_or_default();
    let prototypes: HashMap<_, _> = gathered.prototypes;
    let draft = Draft {
        symbols,
        unwind,
        lines: gathered.lines,
        scopes: gathered.scopes,
        functions: gathered.functions,
        files: gathered.files.iter().map(String::as_str).collect(),
        prototypes: prototypes.iter().map(|(name, prototype)| (*name, prototype)).collect(),
        // Those of the kernel are many, and BTF has no need of them: not kept.
        variables: Variables::default(),
    };
    Ok(Compiled {
        sections: draft.encode(),
        btf: packed_btf,
        build_id,
        banner,
        agreement,
        damaged_units: gathered.damaged,
    })
}
