//! What a module's file says of its code: functions, what calls go to, and the places that the kernel rewrites
//! itself. The bytes of the code are not taken from here but from the guest.

use std::collections::BTreeMap;

use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionIndex, SymbolKind};

use crate::{Error, Result};

/// Sections whose entries name places of the code that the kernel patches or looks up by address
/// (kernel/module/main.c find_module_sections(), arch/x86/kernel/module.c module_finalize(); which of them
/// exist differs by version and configuration).
const PATCHED: &[&str] = &[
    "__jump_table",
    ".static_call_sites",
    ".altinstructions",
    ".parainstructions",
    "__mcount_loc",
    "__patchable_function_entries",
    ".retpoline_sites",
    ".return_sites",
    ".call_sites",
    ".ibt_endbr_seal",
    ".smp_locks",
    "__bug_table",
    "__ex_table",
];
/// Bytes from such a place on that are left alone: the longest that is patched in modules' code.
const PATCH_BYTES: u64 = 16;

/// A function, at an offset of the section `.text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// What is known of a module's `.text`.
#[derive(Debug, Default)]
pub(crate) struct ModuleFile {
    /// By offset.
    pub(crate) functions: Vec<Function>,
    /// Called functions by the offset of the field that the relocation fills.
    pub(crate) calls: BTreeMap<u64, String>,
    /// Other fields filled by relocations.
    pub(crate) relocated: Vec<u64>,
    /// Places that the kernel rewrites, by offset.
    pub(crate) patched: Vec<u64>,
    /// Size in bytes.
    pub(crate) size: u64,
}

impl ModuleFile {
    /// Reads a module.
    ///
    /// # Errors
    /// [`Error::Module`] when it is not one.
    pub(crate) fn parse(name: &str, bytes: &[u8]) -> Result<Self> {
        let bad = |reason: String| Error::Module { name: name.to_owned(), reason };
        let file = object::File::parse(bytes).map_err(|error| bad(error.to_string()))?;
        let text = file.section_by_name(".text").ok_or_else(|| bad("it has no .text".into()))?;
        let mut found = Self { size: text.size(), ..Self::default() };
        for symbol in file.symbols() {
            let inside = symbol.section_index() == Some(text.index());
            if inside && symbol.kind() == SymbolKind::Text && symbol.size() > 0 {
                let name = symbol.name().unwrap_or_default().to_owned();
                found.functions.push(Function {
                    name,
                    offset: symbol.address(),
                    size: symbol.size(),
                });
            }
        }
        found.functions.sort_by_key(|function| function.offset);
        for (offset, relocation) in text.relocations() {
            let RelocationTarget::Symbol(index) = relocation.target() else { continue };
            let symbol = file.symbol_by_index(index).map_err(|error| bad(error.to_string()))?;
            let name = symbol.name().unwrap_or_default();
            if name.is_empty() {
                found.relocated.push(offset);
            } else {
                found.calls.insert(offset, name.to_owned());
            }
        }
        for section in file.sections() {
            if PATCHED.contains(&section.name().unwrap_or_default()) {
                found.patched.extend(places(&file, &section, text.index()));
            }
        }
        found.patched.sort_unstable();
        found.patched.dedup();
        Ok(found)
    }

    /// Whether an instruction touches a place that the kernel rewrites.
    pub(crate) fn is_patched(&self, offset: u64, length: u64) -> bool {
        let from = offset.saturating_sub(PATCH_BYTES - 1);
        let first = self.patched.partition_point(|&place| place < from);
        self.patched.get(first).is_some_and(|&place| place < offset + length)
    }

    /// The name that a field in this instruction refers to.
    pub(crate) fn called(&self, offset: u64, length: u64) -> Option<&str> {
        self.calls.range(offset..offset + length).next().map(|(_, name)| name.as_str())
    }

    /// Whether a relocation fills a field of this instruction.
    pub(crate) fn is_relocated(&self, offset: u64, length: u64) -> bool {
        self.called(offset, length).is_some()
            || self.relocated.iter().any(|&field| (offset..offset + length).contains(&field))
    }
}

/// The offsets in `.text` that a section's relocations point at.
fn places(
    file: &object::File<'_>,
    section: &object::Section<'_, '_>,
    text: SectionIndex,
) -> Vec<u64> {
    section
        .relocations()
        .filter_map(|(_, relocation)| {
            let RelocationTarget::Symbol(index) = relocation.target() else { return None };
            let symbol = file.symbol_by_index(index).ok()?;
            (symbol.section_index() == Some(text))
                .then(|| symbol.address().wrapping_add_signed(relocation.addend()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_the_kernel_rewrites_are_known_by_their_bytes() {
        let file = ModuleFile {
            patched: vec![100],
            calls: BTreeMap::from([(41, "mutex_unlock".to_owned())]),
            ..ModuleFile::default()
        };
        assert!(!file.is_patched(90, 10));
        assert!(file.is_patched(90, 11) && file.is_patched(115, 1));
        assert!(!file.is_patched(116, 4));
        assert_eq!(file.called(40, 5), Some("mutex_unlock"));
        assert_eq!(file.called(42, 5), None);
    }
}
