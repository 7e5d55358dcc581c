//! Symbols of one object (vmlinux or a module): names and addresses. Not source lines.

use guest::LinkAddr;

/// What a symbol names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SymbolKind {
    /// Code.
    Function,
    /// Data, or an absolute value such as a per-CPU offset.
    Object,
}

/// A symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Name as in the symbol table, with compiler suffixes (`.cold`, `.isra.0`).
    pub name: &'a str,
    /// Address as linked (modules: as loaded).
    pub at: LinkAddr,
    /// Size in bytes; where the symbol table gives none, the distance to the next symbol.
    pub size: u64,
    /// Code or data.
    pub kind: SymbolKind,
}

/// A function name without the suffixes that compilers add to copies and cut-off parts of it.
#[must_use]
pub fn base_name(name: &str) -> &str {
    let end = [".cold", ".isra.", ".constprop.", ".part.", ".llvm."]
        .iter()
        .filter_map(|suffix| name.find(suffix))
        .min()
        .unwrap_or(name.len());
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::base_name;

    #[test]
    fn suffixes_are_cut() {
        assert_eq!(base_name("deref.isra.0"), "deref");
        assert_eq!(base_name("panic.cold"), "panic");
        assert_eq!(base_name("a.part.0.cold"), "a");
        assert_eq!(base_name("vfs_write"), "vfs_write");
    }
}
