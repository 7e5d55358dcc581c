//! What must hold of stored layers: a guest layer's bytes, a kernel layer's file.

use std::ops::Range;

use guest::LinkAddr;
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection};
use repair_image::{GuestLayer, KernelLayer, Types};
use xxhash_rust::xxh3::Xxh3;

/// Section that holds magic number, format version and checksum, 8 bytes each.
const HEADER: &str = ".defib.header";
/// Functions looked up at most.
const MAX_FUNCTIONS: usize = 64;

/// A stored guest layer: what is read is the same when stored and read again.
///
/// # Panics
/// When that does not hold.
pub fn guest_layer(data: &[u8]) {
    let Ok(layer) = GuestLayer::from_bytes(data) else { return };
    let hashes: usize = layer.pages.iter().map(|run| run.hashes.len()).sum();
    assert!(hashes <= data.len() / 8);
    let bytes = layer.to_bytes().expect("what was read can be stored");
    let again = GuestLayer::from_bytes(&bytes).expect("what was stored can be read");
    assert_eq!(again.to_bytes().expect("stored again"), bytes);
    assert_eq!(again.pages, layer.pages);
    assert_eq!(layer.placed_modules().len(), layer.modules.len());
}

/// A kernel layer's file: damage is found by its checksum; with the checksum made right, the damaged tables
/// are survived.
///
/// # Panics
/// When that does not hold.
pub fn kernel_layer(data: &[u8]) {
    if let Ok(layer) = KernelLayer::from_bytes(data.to_vec()) {
        assert_eq!(seal(data.to_vec()).as_deref(), Some(data), "a wrong checksum was accepted");
        lookups(&layer);
    } else if let Some(sealed) = seal(data.to_vec())
        && let Ok(layer) = KernelLayer::from_bytes(sealed)
    {
        lookups(&layer);
    }
}

fn lookups(layer: &KernelLayer) {
    assert!(layer.banner().contains(layer.release()));
    for section in layer.inspect() {
        assert!(section.bytes < 1 << 30);
    }
    let _ = layer.guest_layer();
    let knowledge = layer.knowledge();
    for symbol in knowledge.functions().take(MAX_FUNCTIONS) {
        for at in [symbol.at, LinkAddr(symbol.at.0.wrapping_add(symbol.size / 2))] {
            let _ = knowledge.function_at(at);
            let _ = knowledge.unwind_row(at);
            assert!(knowledge.source(at).len() <= 64);
        }
        knowledge.symbols_named(symbol.name).count();
        let _ = knowledge.prototype(symbol.name);
    }
    if let Ok(types) = layer.types() {
        types.member("module", "list");
        types.size_of("module");
    }
}

/// The file with its checksum made right; `None` when it has no header section.
fn seal(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let (sum, at) = checksum(&file)?;
    file.get_mut(at)?.copy_from_slice(&sum.to_le_bytes());
    Some(file)
}

fn checksum(file: &[u8]) -> Option<(u64, Range<usize>)> {
    let elf = ElfFile64::<LittleEndian, _>::parse(file).ok()?;
    let (mut hash, mut header) = (Xxh3::new(), None);
    for section in elf.sections() {
        let name = section.name().unwrap_or("");
        let Some((start, size)) = section.file_range().filter(|_| name.starts_with(".defib."))
        else {
            continue;
        };
        let range = usize::try_from(start).ok()?..usize::try_from(start.checked_add(size)?).ok()?;
        let data = file.get(range)?;
        if name == HEADER {
            header = header.or(Some(start as usize));
            continue;
        }
        hash.update(name.as_bytes());
        hash.update(&(data.len() as u64).to_le_bytes());
        hash.update(data);
    }
    let at = header?.checked_add(16)?;
    Some((hash.digest(), at..at.checked_add(8)?))
}
