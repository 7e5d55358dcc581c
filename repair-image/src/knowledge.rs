//! Code knowledge of one object, vmlinux or a module: symbols, unwind rows, source lines, prototypes, looked up by
//! address or name in the encoded tables. How it is made is in `compile/`, how it is encoded in `draft.rs`.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;

use guest::LinkAddr;

use crate::draft::{Draft, section};
use crate::file::{self, KnowledgeFile, Span};
use crate::record::{
    FileRecord, FunctionRecord, LineRecord, NameRecord, ScopeRecord, SymbolRecord, UnwindRecord,
    name_key,
};
use crate::table::{self, Reader, Record, Table};
use crate::variables::Variables;
use crate::{
    Error, Parameter, Prototype, SourceFrame, SourceRef, Symbol, SymbolKind, TypeShape, UnwindRow,
    Variable, base_name,
};

/// Deepest chain of inlined calls that is followed.
const MAX_INLINED: usize = 64;
/// Functions that start after the wanted one, inside of it, which are looked past.
const MAX_INNER: usize = 64;
/// Largest unpacked prototype section that is believed, bytes.
const MAX_PROTOTYPES: usize = 64 << 20;
/// Most parameters of one prototype that are believed.
const MAX_PARAMETERS: u64 = 255;

/// What goes into a [`Knowledge`], in any order.
#[derive(Debug, Default)]
pub struct KnowledgeParts {
    /// Name, address, size in bytes (0 = up to the next symbol), kind.
    pub symbols: Vec<(String, LinkAddr, u64, SymbolKind)>,
    /// Each row holds from its address up to the next entry's; `None` = nothing is known from there on.
    pub unwind: Vec<(LinkAddr, Option<UnwindRow>)>,
    /// Inline chains (innermost first), each from its address up to the next entry's.
    pub source: Vec<(LinkAddr, Vec<SourceFrame>)>,
    /// Prototypes by function name without compiler suffixes.
    pub prototypes: HashMap<String, Prototype>,
    /// Variables, each with the addresses of code at which it is in that place, outer scopes first.
    pub variables: Vec<(Range<LinkAddr>, Variable)>,
}

/// Code knowledge of one object.
#[derive(Debug, Default)]
pub struct Knowledge {
    names: Table<NameRecord>,
    symbols: Table<SymbolRecord>,
    unwind: Table<UnwindRecord>,
    rows: Table<UnwindRow>,
    lines: Table<LineRecord>,
    scopes: Table<ScopeRecord>,
    functions: Table<FunctionRecord>,
    files: Table<FileRecord>,
    packed_prototypes: Span,
    packed_variables: Span,
    variables: OnceLock<Variables>,
    prototypes: OnceLock<HashMap<String, Prototype>>,
}

fn open<R: Record>(file: &KnowledgeFile, name: &'static str) -> Result<Table<R>, Error> {
    let section = file.section(name);
    let len = section.len() as u64;
    Table::new(section).ok_or(Error::damaged(name, len, len))
}

impl Knowledge {
    /// Sorts, indexes and encodes the parts.
    #[must_use]
    pub fn new(parts: KnowledgeParts) -> Self {
        // What was encoded a line ago is readable; should it not be, knowing nothing is the safe answer.
        Self::of_draft(Draft::of_parts(&parts)).unwrap_or_default()
    }

    pub(crate) fn of_draft(draft: Draft<'_>) -> Result<Self, Error> {
        Self::of_file(&KnowledgeFile::of_bytes(file::pack(&draft.encode())?)?)
    }

    pub(crate) fn of_file(file: &KnowledgeFile) -> Result<Self, Error> {
        Ok(Self {
            names: open(file, section::NAMES)?,
            symbols: open(file, section::SYMBOLS)?,
            unwind: open(file, section::UNWIND)?,
            rows: open(file, section::ROWS)?,
            lines: open(file, section::LINES)?,
            scopes: open(file, section::SCOPES)?,
            functions: open(file, section::FUNCTIONS)?,
            files: open(file, section::FILES)?,
            packed_prototypes: file.section(section::PROTOTYPES),
            prototypes: OnceLock::new(),
            packed_variables: file.section(section::VARIABLES),
            variables: OnceLock::new(),
        })
    }

    /// Names and numbers of records of the tables, for inspection.
    pub(crate) fn counts(&self) -> [(&'static str, usize); 9] {
        [
            (section::NAMES, self.names.len()),
            (section::SYMBOLS, self.symbols.len()),
            (section::UNWIND, self.unwind.len()),
            (section::ROWS, self.rows.len()),
            (section::LINES, self.lines.len()),
            (section::SCOPES, self.scopes.len()),
            (section::FUNCTIONS, self.functions.len()),
            (section::FILES, self.files.len()),
            (section::PROTOTYPES, self.prototypes().len()),
        ]
    }

    fn text(&self, name: u32) -> Option<&str> {
        self.names.get(name as usize).map(|record| &*record.text)
    }

    fn entry(&self, record: &SymbolRecord) -> Option<Symbol<'_>> {
        let name = self.text(record.name)?;
        Some(Symbol { name, at: LinkAddr(record.at), size: record.size, kind: record.kind })
    }

    /// The function that contains `at`: the last one that starts at or before it and reaches over it.
    #[must_use]
    pub fn function_at(&self, at: LinkAddr) -> Option<Symbol<'_>> {
        let (mut number, _) = self.symbols.last_up_to(at.0)?;
        for _ in 0..MAX_INNER {
            let record = self.symbols.get(number)?;
            let inside = at.0.wrapping_sub(record.at) < record.size.max(1);
            if inside && record.kind == SymbolKind::Function {
                return self.entry(record);
            }
            number = number.checked_sub(1)?;
        }
        None
    }

    fn name(&self, name: &str) -> Option<&NameRecord> {
        let key = name_key(name);
        let number =
            self.names.partition_point(|first| first <= key, |record| &*record.text < name);
        self.names.get(number).filter(|record| &*record.text == name)
    }

    /// The first symbol of that exact name.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<Symbol<'_>> {
        self.symbols_named(name).next()
    }

    /// Every symbol of that exact name (static functions may share one).
    pub fn symbols_named(&self, name: &str) -> impl Iterator<Item = Symbol<'_>> {
        let numbers = self.name(name).map(|record| record.symbols.as_slice()).unwrap_or_default();
        numbers.iter().filter_map(|&number| self.entry(self.symbols.get(number as usize)?))
    }

    /// All symbols, ascending by address.
    pub fn symbols(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.symbols.iter().filter_map(|record| self.entry(record))
    }

    /// All functions, ascending by address.
    pub fn functions(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.symbols().filter(|symbol| symbol.kind == SymbolKind::Function)
    }

    /// The unwind row in force at `at`.
    #[must_use]
    pub fn unwind_row(&self, at: LinkAddr) -> Option<UnwindRow> {
        let (_, record) = self.unwind.last_up_to(at.0)?;
        self.rows.get((record.row as usize).checked_sub(1)?).copied()
    }

    fn path(&self, file: u32) -> &str {
        let record = (file as usize).checked_sub(1).and_then(|file| self.files.get(file));
        record.map_or("", |record| &record.0)
    }

    fn function_name(&self, function: u32) -> Option<&str> {
        self.text(self.functions.get((function as usize).checked_sub(1)?)?.0)
    }

    /// The chain of inlined calls at `at`, innermost first; empty when no line is known.
    #[must_use]
    pub fn source(&self, at: LinkAddr) -> Vec<SourceFrame> {
        self.source_refs(at).map(SourceFrame::from).collect()
    }

    /// As [`Self::source`], without copies: for whoever asks of millions of addresses.
    pub fn source_refs(&self, at: LinkAddr) -> impl Iterator<Item = SourceRef<'_>> {
        let here = self.lines.last_up_to(at.0).filter(|(_, here)| here.file != 0);
        let mut next = here.map(|(_, here)| (here.scope, here.file, here.line, here.column));
        let chain = std::iter::from_fn(move || {
            let (number, file, line, column) = next.take()?;
            let scope = (number as usize).checked_sub(1).and_then(|own| self.scopes.get(own));
            let scope = scope.copied().unwrap_or_default();
            let inlined = scope.parent != 0;
            let call = (scope.parent, scope.call_file, scope.call_line, scope.call_column);
            next = inlined.then_some(call);
            let function = self.function_name(scope.function);
            Some(SourceRef { function, file: self.path(file), line, column, inlined })
        });
        chain.take(MAX_INLINED)
    }

    fn prototypes(&self) -> &HashMap<String, Prototype> {
        self.prototypes.get_or_init(|| self.unpack_prototypes().unwrap_or_default())
    }

    fn unpack_prototypes(&self) -> Option<HashMap<String, Prototype>> {
        let bytes = table::unpack(&self.packed_prototypes, MAX_PROTOTYPES)?;
        let mut reader = Reader::new(&bytes, 1)?;
        let mut prototypes = HashMap::new();
        for _ in 0..reader.next(0)? {
            let name = self.next_text(&mut reader)?;
            let returns = self.next_shape(&mut reader)?;
            let mut parameters = Vec::new();
            for _ in 0..reader.next(0).filter(|&count| count <= MAX_PARAMETERS)? {
                let name = self.next_text(&mut reader)?;
                parameters.push(Parameter { name, shape: self.next_shape(&mut reader)? });
            }
            prototypes.insert(name, Prototype { returns, parameters });
        }
        Some(prototypes)
    }

    fn next_text(&self, reader: &mut Reader<'_>) -> Option<String> {
        self.text(reader.next_u32(0)?).map(str::to_owned)
    }

    fn next_shape(&self, reader: &mut Reader<'_>) -> Option<TypeShape> {
        let size = |reader: &mut Reader<'_>| u8::try_from(reader.next(0)?).ok();
        Some(match reader.next(0)? {
            0 => TypeShape::Void,
            kind @ (1 | 2) => {
                let name = self.next_text(reader)?;
                TypeShape::Int { name, size: size(reader)?, signed: kind == 2 }
            }
            3 => TypeShape::Bool,
            4 => {
                let (name, tag) = (self.next_text(reader)?, self.next_text(reader)?);
                TypeShape::Enum { name, tag, size: size(reader)? }
            }
            5 => TypeShape::Pointer { to: None },
            6 => TypeShape::Pointer { to: Some(self.next_text(reader)?) },
            7 => TypeShape::Aggregate { name: self.next_text(reader)?, size: reader.next(0)? },
            8 => TypeShape::Other,
            _ => return None,
        })
    }

    /// Prototype of a function, compiler suffixes ignored.
    #[must_use]
    pub fn prototype(&self, function: &str) -> Option<&Prototype> {
        self.prototypes().get(base_name(function))
    }

    fn variables(&self) -> &Variables {
        self.variables.get_or_init(|| Variables::decode(&self.packed_variables).unwrap_or_default())
    }

    /// Unpacks prototypes and variables ahead of need; bytes of the packed form. Variables of more than
    /// `variables_max` packed bytes are left alone: they may be many MiB.
    pub fn unpack_ahead(&self, variables_max: usize) -> usize {
        self.prototypes();
        if self.packed_variables.len() > variables_max {
            return 0;
        }
        self.variables();
        self.packed_variables.len()
    }

    /// The pointers and structures among the parameters and variables that are there when control is at `at`, with
    /// the place of each, innermost scope first. Empty for the kernel proper: knowledge has those of modules only.
    #[must_use]
    pub fn variables_at(&self, at: LinkAddr) -> Vec<Variable> {
        self.variables().at(at.0)
    }

    /// Path and type of the innermost member of a structure at an offset in bytes (`"queue.lock"`,
    /// `"list[2].flag"`). Where several members share that byte, the path ends at the member around them. Only
    /// structures that variables lead to are known.
    #[must_use]
    pub fn member_at(&self, structure: &str, offset: u64) -> Option<(String, TypeShape)> {
        self.variables().layouts.get(structure)?.as_ref()?.member_at(offset)
    }

    /// Whether the object's own debug information says what type `name` is, so that no other need be asked. A type
    /// that it only declares is not known.
    #[must_use]
    pub fn knows_type(&self, name: &str) -> bool {
        self.variables().layouts.contains_key(name)
    }

    /// Whether any source line is known.
    #[must_use]
    pub fn has_source(&self) -> bool {
        self.lines.len() > 0
    }
}

#[cfg(test)]
mod tests {
    use guest::Reg;

    use super::*;
    use crate::{CfaRule, FrameKind, RowSource, SavedRule, VariableLocation};

    fn frame(function: &str, file: &str, line: u32, inlined: bool) -> SourceFrame {
        let function = Some(function.to_owned());
        SourceFrame { function, file: file.to_owned(), line, column: 7, inlined }
    }

    fn row(offset: i32) -> UnwindRow {
        UnwindRow {
            kind: FrameKind::Call,
            cfa: CfaRule::Offset { reg: Reg::Rsp, offset },
            saved: [SavedRule::AtCfa(-offset); 6],
            source: RowSource::Cfi,
        }
    }

    fn inode() -> Variable {
        let shape = TypeShape::Pointer { to: Some("inode".to_owned()) };
        let location = VariableLocation::Register(Reg::Rdi);
        Variable { name: "inode".to_owned(), shape, location }
    }

    fn sample() -> Knowledge {
        let symbol = |name: &str, at, size, kind| (name.to_owned(), LinkAddr(at), size, kind);
        let base = 0xffff_ffff_8100_0000;
        let deep = vec![
            frame("list_del", "include/linux/list.h", 130, true),
            frame("drop_one", "fs/inode.c", 70, true),
            frame("evict", "fs/inode.c", 600, false),
        ];
        let returns = TypeShape::Int { name: "ssize_t".to_owned(), size: 8, signed: true };
        let parameters = vec![Parameter {
            name: "inode".to_owned(),
            shape: TypeShape::Pointer { to: Some("inode".to_owned()) },
        }];
        Knowledge::new(KnowledgeParts {
            symbols: vec![
                symbol("per_cpu", 0x1000, 8, SymbolKind::Object),
                symbol("evict", base, 0, SymbolKind::Function),
                symbol("last", base + 0x40, 0x10, SymbolKind::Function),
                symbol("evict", base + 0x60, 0x10, SymbolKind::Function),
            ],
            unwind: vec![
                (LinkAddr(base), Some(row(8))),
                (LinkAddr(base + 1), Some(row(16))),
                (LinkAddr(base + 0x40), None),
            ],
            source: vec![
                (LinkAddr(base), vec![frame("evict", "fs/inode.c", 590, false)]),
                (LinkAddr(base + 4), deep),
                (LinkAddr(base + 0x40), Vec::new()),
            ],
            prototypes: HashMap::from([("evict".to_owned(), Prototype { returns, parameters })]),
            variables: vec![(LinkAddr(base)..LinkAddr(base + 8), inode())],
        })
    }

    #[test]
    fn what_goes_in_comes_out() {
        let base = LinkAddr(0xffff_ffff_8100_0000);
        let knowledge = sample();
        let evict = knowledge.function_at(base + 0x3f).unwrap();
        assert_eq!((evict.name, evict.size), ("evict", 0x40));
        assert_eq!(knowledge.function_at(base + 0x50), None);
        assert_eq!(knowledge.function_at(LinkAddr(0x1000)), None);
        assert_eq!(knowledge.symbol("per_cpu").unwrap().at, LinkAddr(0x1000));
        assert_eq!(knowledge.symbols_named("evict").count(), 2);
        assert_eq!(knowledge.symbol("evic"), None);
        assert_eq!(knowledge.functions().count(), 3);
        assert_eq!(knowledge.unwind_row(base + 0x3f), Some(row(16)));
        assert_eq!(knowledge.unwind_row(base + 0x40), None);
        assert_eq!(knowledge.unwind_row(LinkAddr(0)), None);
        let chain = knowledge.source(base + 0x10);
        assert_eq!(chain.len(), 3);
        assert_eq!(chain[0], frame("list_del", "include/linux/list.h", 130, true));
        assert_eq!(chain[1], frame("drop_one", "fs/inode.c", 70, true));
        assert_eq!(chain[2], frame("evict", "fs/inode.c", 600, false));
        assert!(knowledge.source(base + 0x41).is_empty());
        assert_eq!(knowledge.variables_at(base + 7), [inode()]);
        assert!(knowledge.variables_at(base + 8).is_empty());
        let prototype = knowledge.prototype("evict.isra.0").unwrap();
        assert_eq!(prototype.parameters[0].name, "inode");
        assert!(
            matches!(&prototype.returns, TypeShape::Int { signed: true, name, .. } if name == "ssize_t")
        );
    }

    #[test]
    fn nothing_known_answers_nothing() {
        for knowledge in [Knowledge::default(), Knowledge::new(KnowledgeParts::default())] {
            assert_eq!(knowledge.function_at(LinkAddr(1)), None);
            assert!(knowledge.source(LinkAddr(1)).is_empty() && !knowledge.has_source());
            assert_eq!(knowledge.symbol("panic"), None);
        }
    }

    #[test]
    fn many_symbols_are_found_across_chunks() {
        let symbols = (0..5000u64).map(|i| {
            (format!("function_{i}"), LinkAddr(0x1000 + 16 * i), 16, SymbolKind::Function)
        });
        let parts = KnowledgeParts { symbols: symbols.collect(), ..KnowledgeParts::default() };
        let knowledge = Knowledge::new(parts);
        for i in 0..5000u64 {
            let name = format!("function_{i}");
            assert_eq!(knowledge.symbol(&name).unwrap().at, LinkAddr(0x1000 + 16 * i));
            assert_eq!(knowledge.function_at(LinkAddr(0x100f + 16 * i)).unwrap().name, name);
        }
    }
}
