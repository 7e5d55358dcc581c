//! Knowledge before it is encoded: gathered by `compile/` or given as [`KnowledgeParts`], then put into sections.

use std::collections::HashMap;
use std::ops::Range;

use guest::LinkAddr;

use crate::record::{
    FileRecord, FunctionRecord, LineRecord, NameRecord, ScopeRecord, SymbolRecord, UnwindRecord,
};
use crate::table::{self, Columns};
use crate::variables::{Extent, Variables};
use crate::{
    KnowledgeParts, Parameter, Prototype, SourceFrame, SymbolKind, TypeShape, UnwindRow, Variable,
};

/// Names of the sections.
pub(crate) mod section {
    pub(crate) const NAMES: &str = ".defib.names";
    pub(crate) const SYMBOLS: &str = ".defib.symbols";
    pub(crate) const UNWIND: &str = ".defib.unwind";
    pub(crate) const ROWS: &str = ".defib.rows";
    pub(crate) const LINES: &str = ".defib.lines";
    pub(crate) const SCOPES: &str = ".defib.scopes";
    pub(crate) const FUNCTIONS: &str = ".defib.functions";
    pub(crate) const FILES: &str = ".defib.files";
    pub(crate) const PROTOTYPES: &str = ".defib.protos";
    pub(crate) const VARIABLES: &str = ".defib.variables";
}

/// Distinct strings, numbered as they come.
#[derive(Debug, Default)]
pub(crate) struct Strings<'a> {
    numbers: HashMap<&'a str, u32>,
    texts: Vec<&'a str>,
}

impl<'a> Strings<'a> {
    pub(crate) fn number(&mut self, text: &'a str) -> u32 {
        *self.numbers.entry(text).or_insert_with(|| {
            self.texts.push(text);
            self.texts.len() as u32 - 1
        })
    }

    /// The texts in order of their numbers.
    pub(crate) fn texts(&self) -> &[&'a str] {
        &self.texts
    }
}

/// A symbol before it is encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DraftSymbol<'a> {
    pub(crate) name: &'a str,
    pub(crate) at: LinkAddr,
    /// Bytes; 0 = up to the next symbol.
    pub(crate) size: u64,
    pub(crate) kind: SymbolKind,
    /// Of several functions at one address, the one with the highest rank names it.
    pub(crate) rank: u8,
}

/// Knowledge before it is encoded.
#[derive(Debug, Default)]
pub(crate) struct Draft<'a> {
    pub(crate) symbols: Vec<DraftSymbol<'a>>,
    pub(crate) unwind: Vec<(LinkAddr, Option<UnwindRow>)>,
    /// Sorted by address.
    pub(crate) lines: Vec<LineRecord>,
    pub(crate) scopes: Vec<ScopeRecord>,
    /// Names by function number.
    pub(crate) functions: Vec<&'a str>,
    /// Paths by file number.
    pub(crate) files: Vec<&'a str>,
    pub(crate) prototypes: Vec<(&'a str, &'a Prototype)>,
    pub(crate) variables: Variables,
}

impl<'a> Draft<'a> {
    /// The draft of loose parts.
    pub(crate) fn of_parts(parts: &'a KnowledgeParts) -> Self {
        let symbols = parts.symbols.iter().map(|(name, at, size, kind)| DraftSymbol {
            name,
            at: *at,
            size: *size,
            kind: *kind,
            rank: 0,
        });
        let mut draft = Self {
            symbols: symbols.collect(),
            unwind: parts.unwind.clone(),
            prototypes: parts.prototypes.iter().map(|(name, own)| (name.as_str(), own)).collect(),
            ..Self::default()
        };
        draft.add_chains(&parts.source);
        draft.add_variables(&parts.variables);
        draft
    }

    fn add_variables(&mut self, variables: &[(Range<LinkAddr>, Variable)]) {
        let extents = (1..).zip(variables).map(|(depth, (code, variable))| Extent {
            code: code.start.0..code.end.0,
            depth,
            variable: variable.clone(),
        });
        self.variables.extents = extents.collect();
    }

    fn add_chains(&mut self, chains: &'a [(LinkAddr, Vec<SourceFrame>)]) {
        let (mut files, mut functions) = (Strings::default(), Strings::default());
        let mut scopes: HashMap<ScopeRecord, u32> = HashMap::new();
        for (at, chain) in chains {
            let mut scope = 0;
            let mut outer: Option<&SourceFrame> = None;
            // From the outermost frame inwards: a scope is called from where its outer frame stands.
            for frame in chain.iter().rev() {
                let function =
                    frame.function.as_deref().map_or(0, |name| functions.number(name) + 1);
                let call = outer.map_or((0, 0, 0), |outer| {
                    (files.number(&outer.file) + 1, outer.line, outer.column)
                });
                let record = ScopeRecord {
                    function,
                    parent: scope,
                    call_file: call.0,
                    call_line: call.1,
                    call_column: call.2,
                };
                let next = self.scopes.len() as u32 + 1;
                scope = *scopes.entry(record).or_insert(next);
                if scope == next {
                    self.scopes.push(record);
                }
                outer = Some(frame);
            }
            let innermost = chain.first();
            self.lines.push(LineRecord {
                at: at.0,
                scope,
                file: innermost.map_or(0, |frame| files.number(&frame.file) + 1),
                line: innermost.map_or(0, |frame| frame.line),
                column: innermost.map_or(0, |frame| frame.column),
            });
        }
        self.lines.sort_by_key(|record| record.at);
        self.files = files.texts().to_vec();
        self.functions = functions.texts().to_vec();
    }

    /// The sections of a knowledge file.
    pub(crate) fn encode(mut self) -> Vec<(&'static str, Vec<u8>)> {
        self.renumber();
        self.sort_symbols();
        let mut strings = Strings::default();
        let symbol_names: Vec<u32> =
            self.symbols.iter().map(|symbol| strings.number(symbol.name)).collect();
        let functions: Vec<u32> = self.functions.iter().map(|name| strings.number(name)).collect();
        for (name, prototype) in &self.prototypes {
            intern_prototype(&mut strings, name, prototype);
        }
        let (mut names, ranks) = sorted_names(&strings);
        let rank = |number: u32| ranks.get(number as usize).copied().unwrap_or(0);
        let mut symbols = Vec::with_capacity(self.symbols.len());
        for (index, (symbol, &name)) in self.symbols.iter().zip(&symbol_names).enumerate() {
            let name = rank(name);
            if let Some(record) = names.get_mut(name as usize) {
                record.symbols.push(index as u32);
            }
            symbols.push(SymbolRecord {
                at: symbol.at.0,
                size: symbol.size,
                kind: symbol.kind,
                name,
            });
        }
        let functions: Vec<_> =
            functions.into_iter().map(|name| FunctionRecord(rank(name))).collect();
        let files: Vec<_> = self.files.iter().map(|&path| FileRecord(path.into())).collect();
        let (unwind, rows) = self.unwind_records();
        let prototypes = encode_prototypes(&self.prototypes, &strings, &ranks);
        vec![
            (section::NAMES, table::encode(&names)),
            (section::SYMBOLS, table::encode(&symbols)),
            (section::UNWIND, table::encode(&unwind)),
            (section::ROWS, table::encode(&rows)),
            (section::LINES, table::encode(&self.lines)),
            (section::SCOPES, table::encode(&self.scopes)),
            (section::FUNCTIONS, table::encode(&functions)),
            (section::FILES, table::encode(&files)),
            (section::PROTOTYPES, prototypes),
            (section::VARIABLES, self.variables.encode()),
        ]
    }

    /// Renumbers functions and files by how often they occur: small numbers are short.
    fn renumber(&mut self) {
        let mut uses = vec![0u32; self.functions.len()];
        let mut file_uses = vec![0u32; self.files.len()];
        let count = |uses: &mut Vec<u32>, number: u32| {
            let index = (number as usize).wrapping_sub(1);
            if let Some(uses) = uses.get_mut(index) {
                *uses += 1;
            }
        };
        for scope in &self.scopes {
            count(&mut uses, scope.function);
            count(&mut file_uses, scope.call_file);
        }
        self.lines.iter().for_each(|line| count(&mut file_uses, line.file));
        let (functions, files) = (by_use(&uses), by_use(&file_uses));
        let new = |map: &[u32], number: u32| {
            let index = (number as usize).wrapping_sub(1);
            map.get(index).map_or(0, |new| new + 1)
        };
        for scope in &mut self.scopes {
            scope.function = new(&functions, scope.function);
            scope.call_file = new(&files, scope.call_file);
        }
        for line in &mut self.lines {
            line.file = new(&files, line.file);
        }
        permute(&mut self.functions, &functions);
        permute(&mut self.files, &files);
    }

    /// Sorts symbols by address and gives a size to those without.
    fn sort_symbols(&mut self) {
        self.symbols.sort_by_key(|symbol| (symbol.at, symbol.rank));
        let mut next: Option<LinkAddr> = None;
        let mut here: Option<LinkAddr> = None;
        for symbol in self.symbols.iter_mut().rev() {
            if here != Some(symbol.at) {
                next = here;
                here = Some(symbol.at);
            }
            if symbol.size == 0 {
                symbol.size = next.map_or(0, |next| next - symbol.at);
            }
        }
    }

    fn unwind_records(&mut self) -> (Vec<UnwindRecord>, Vec<UnwindRow>) {
        self.unwind.sort_by_key(|row| row.0);
        let mut uses: HashMap<UnwindRow, u32> = HashMap::new();
        for row in self.unwind.iter().filter_map(|(_, row)| *row) {
            *uses.entry(row).or_default() += 1;
        }
        let mut rows: Vec<(UnwindRow, u32)> = uses.into_iter().collect();
        rows.sort_by_key(|&(_, uses)| std::cmp::Reverse(uses));
        let numbers: HashMap<UnwindRow, u32> =
            (1..).zip(&rows).map(|(n, row)| (row.0, n)).collect();
        let mut records: Vec<UnwindRecord> = Vec::with_capacity(self.unwind.len());
        for (at, row) in &self.unwind {
            let row = row.and_then(|row| numbers.get(&row).copied()).unwrap_or(0);
            match records.last_mut() {
                Some(last) if last.at == at.0 => last.row = row,
                Some(last) if last.row == row => {}
                _ => records.push(UnwindRecord { at: at.0, row }),
            }
        }
        (records, rows.into_iter().map(|(row, _)| row).collect())
    }
}

/// New number of each item: the most used gets 0.
fn by_use(uses: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..uses.len() as u32).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(uses.get(index as usize).copied()));
    let mut new = vec![0; uses.len()];
    for (number, &index) in (0..).zip(&order) {
        if let Some(new) = new.get_mut(index as usize) {
            *new = number;
        }
    }
    new
}

fn permute(items: &mut Vec<&str>, new: &[u32]) {
    let mut pairs: Vec<(u32, &str)> = new.iter().copied().zip(items.drain(..)).collect();
    pairs.sort_by_key(|pair| pair.0);
    items.extend(pairs.into_iter().map(|(_, item)| item));
}

/// The strings in order, and the rank of each by its number.
fn sorted_names(strings: &Strings<'_>) -> (Vec<NameRecord>, Vec<u32>) {
    let mut order: Vec<u32> = (0..strings.texts.len() as u32).collect();
    order.sort_unstable_by_key(|&number| strings.texts[number as usize]);
    let mut ranks = vec![0; order.len()];
    let mut names = Vec::with_capacity(order.len());
    for (rank, &number) in (0..).zip(&order) {
        ranks[number as usize] = rank;
        names.push(NameRecord { text: strings.texts[number as usize].into(), symbols: Vec::new() });
    }
    (names, ranks)
}

fn shape_names(shape: &TypeShape) -> [Option<&str>; 2] {
    match shape {
        TypeShape::Int { name, .. } | TypeShape::Aggregate { name, .. } => [Some(name), None],
        TypeShape::Enum { name, tag, .. } => [Some(name), Some(tag)],
        TypeShape::Pointer { to } => [to.as_deref(), None],
        TypeShape::Void | TypeShape::Bool | TypeShape::Other => [None, None],
    }
}

fn intern_prototype<'a>(strings: &mut Strings<'a>, name: &'a str, prototype: &'a Prototype) {
    strings.number(name);
    for Parameter { name, shape } in &prototype.parameters {
        strings.number(name);
        shape_names(shape).into_iter().flatten().for_each(|name| {
            strings.number(name);
        });
    }
    shape_names(&prototype.returns).into_iter().flatten().for_each(|name| {
        strings.number(name);
    });
}

/// One column: number of prototypes, then each as name, return type, number of parameters, parameters.
fn encode_prototypes(
    prototypes: &[(&str, &Prototype)],
    strings: &Strings<'_>,
    ranks: &[u32],
) -> Vec<u8> {
    let rank = |text: &str| {
        let number = strings.numbers.get(text).copied().unwrap_or(0);
        u64::from(ranks.get(number as usize).copied().unwrap_or(0))
    };
    let mut sorted: Vec<_> = prototypes.to_vec();
    sorted.sort_by_key(|(name, _)| *name);
    let mut out = Columns::new(1);
    out.push(0, sorted.len() as u64);
    let shape_out = |out: &mut Columns, shape: &TypeShape| {
        let numbers = match shape {
            TypeShape::Void => vec![0],
            TypeShape::Int { name, size, signed } => {
                vec![1 + u64::from(*signed), rank(name), u64::from(*size)]
            }
            TypeShape::Bool => vec![3],
            TypeShape::Enum { name, tag, size } => vec![4, rank(name), rank(tag), u64::from(*size)],
            TypeShape::Pointer { to: None } => vec![5],
            TypeShape::Pointer { to: Some(to) } => vec![6, rank(to)],
            TypeShape::Aggregate { name, size } => vec![7, rank(name), *size],
            TypeShape::Other => vec![8],
        };
        numbers.into_iter().for_each(|number| out.push(0, number));
    };
    for (name, prototype) in sorted {
        out.push(0, rank(name));
        shape_out(&mut out, &prototype.returns);
        out.push(0, prototype.parameters.len() as u64);
        for parameter in &prototype.parameters {
            out.push(0, rank(&parameter.name));
            shape_out(&mut out, &parameter.shape);
        }
    }
    table::compress(&out.finish())
}
