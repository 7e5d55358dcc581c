//! A place in source text.

use serde::Serialize;

/// One level of an inlined call chain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SourceFrame {
    /// Function (DWARF name), `None` when only the line is known.
    pub function: Option<String>,
    /// Path as the compiler recorded it, shortened to be relative to the source tree where possible.
    pub file: String,
    /// Line, from 1; 0 when the compiler gave none.
    pub line: u32,
    /// Column, from 1; 0 when the compiler gave none.
    pub column: u32,
    /// Whether this level was inlined into the next one of the chain.
    pub inlined: bool,
}
