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

/// The same, borrowed from the knowledge that tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceRef<'k> {
    /// As [`SourceFrame::function`].
    pub function: Option<&'k str>,
    /// As [`SourceFrame::file`].
    pub file: &'k str,
    /// As [`SourceFrame::line`].
    pub line: u32,
    /// As [`SourceFrame::column`].
    pub column: u32,
    /// As [`SourceFrame::inlined`].
    pub inlined: bool,
}

impl From<SourceRef<'_>> for SourceFrame {
    fn from(from: SourceRef<'_>) -> Self {
        let SourceRef { function, file, line, column, inlined } = from;
        Self { function: function.map(str::to_owned), file: file.to_owned(), line, column, inlined }
    }
}
