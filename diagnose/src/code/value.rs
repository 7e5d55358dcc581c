//! Abstract values: what a register or stack slot holds, in terms of the function's entry. Values only;
//! what instructions do with them is in `execute.rs`, what they are in a frame in `resolve.rs`.

use std::collections::HashMap;

use guest::Reg;

/// What a value starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Base {
    /// Nothing: the offset is the value.
    Const,
    /// The canonical frame address: rsp before the call.
    Cfa,
    /// What the register held at the function's entry.
    Entry(Reg),
    /// A value that came up in the function: index into [`Nodes`].
    Node(u32),
}

/// `base + offset`, wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Value {
    /// Start.
    pub(crate) base: Base,
    /// Signed bytes.
    pub(crate) offset: i64,
}

impl Value {
    pub(crate) const fn constant(value: u64) -> Self {
        Self { base: Base::Const, offset: value.cast_signed() }
    }

    pub(crate) const fn entry(reg: Reg) -> Self {
        Self { base: Base::Entry(reg), offset: 0 }
    }

    pub(crate) const fn cfa(offset: i64) -> Self {
        Self { base: Base::Cfa, offset }
    }

    pub(crate) const fn plus(self, by: i64) -> Self {
        Self { base: self.base, offset: self.offset.wrapping_add(by) }
    }

    /// The value itself when it is a constant.
    pub(crate) fn as_constant(self) -> Option<u64> {
        (self.base == Base::Const).then_some(self.offset.cast_unsigned())
    }
}

/// A value that came up in the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Node {
    /// Loaded from memory, size in bytes.
    Load(Value, u8),
    /// Loaded from the per-CPU area at this offset, size in bytes.
    PerCpu(u64, u8),
    /// `value & mask`
    Masked(Value, u64),
    /// rax after the call at this address.
    Result(u64),
    /// Flags as `pushf` saved them.
    Flags,
    /// Anything else.
    Opaque,
}

/// Who makes a node: the place in the exploration, the instruction, and which of its results. The same
/// maker makes the same node again, so that exploring twice ends with the same values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Maker {
    /// Index of the state (block and held resources) that is executed.
    pub(crate) state: u32,
    /// Address of the instruction, or of the block for joined values.
    pub(crate) at: u64,
    /// Which result: a register's encoding, or a number of its own.
    pub(crate) tag: u32,
}

/// How deep chains of loads and masks are followed.
const MAX_DEPTH: u32 = 6;

/// All nodes of one function's exploration.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    nodes: Vec<Node>,
    made: HashMap<Maker, u32>,
    masked: HashMap<(Value, u64), u32>,
}

impl Nodes {
    pub(crate) fn get(&self, index: u32) -> Option<Node> {
        self.nodes.get(index as usize).copied()
    }

    /// A new node.
    pub(crate) fn add(&mut self, node: Node) -> u32 {
        self.nodes.push(node);
        u32::try_from(self.nodes.len() - 1).unwrap_or(u32::MAX)
    }

    /// The node that this maker makes, with (new) contents.
    pub(crate) fn make(&mut self, maker: Maker, node: Node) -> Value {
        let index = match self.made.get(&maker) {
            Some(&index) => {
                if let Some(old) = self.nodes.get_mut(index as usize) {
                    *old = node;
                }
                index
            }
            None => {
                let index = self.add(node);
                self.made.insert(maker, index);
                index
            }
        };
        Value { base: Base::Node(index), offset: 0 }
    }

    /// `value & mask`; masks of masks become one.
    pub(crate) fn mask(&mut self, value: Value, mask: u64) -> Value {
        if mask == u64::MAX {
            return value;
        }
        if let Some(constant) = value.as_constant() {
            return Value::constant(constant & mask);
        }
        let (of, mask) = match (value.offset, value.base) {
            (0, Base::Node(index)) => match self.get(index) {
                Some(Node::Masked(of, inner)) => (of, mask & inner),
                Some(Node::Load(_, size) | Node::PerCpu(_, size)) if size < 8 => {
                    let loaded = (1_u64 << (8 * u32::from(size.min(7)))) - 1;
                    if mask & loaded == loaded {
                        return value;
                    }
                    (value, mask)
                }
                _ => (value, mask),
            },
            _ => (value, mask),
        };
        if let Some(&index) = self.masked.get(&(of, mask)) {
            return Value { base: Base::Node(index), offset: 0 };
        }
        let index = self.add(Node::Masked(of, mask));
        self.masked.insert((of, mask), index);
        Value { base: Base::Node(index), offset: 0 }
    }

    /// The value under masks that keep at least `bits`.
    pub(crate) fn unmasked(&self, value: Value, bits: u64) -> Value {
        match (value.offset, value.base) {
            (0, Base::Node(index)) => match self.get(index) {
                Some(Node::Masked(of, mask)) if mask & bits == bits => of,
                _ => value,
            },
            _ => value,
        }
    }

    /// What is masked, and the mask, when the value is a masked one.
    pub(crate) fn exact_mask(&self, value: Value) -> Option<(Value, u64)> {
        match (value.offset, value.base) {
            (0, Base::Node(index)) => match self.get(index) {
                Some(Node::Masked(of, mask)) => Some((of, mask)),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether two values are computed the same way. Loads may have been made at different times.
    pub(crate) fn alike(&self, a: Value, b: Value) -> bool {
        self.alike_to(a, b, MAX_DEPTH)
    }

    fn alike_to(&self, a: Value, b: Value, depth: u32) -> bool {
        if a == b {
            return true;
        }
        let (Base::Node(x), Base::Node(y)) = (a.base, b.base) else { return false };
        if a.offset != b.offset || depth == 0 {
            return false;
        }
        match (self.get(x), self.get(y)) {
            (Some(Node::Load(p, m)), Some(Node::Load(q, n))) => {
                m == n && self.alike_to(p, q, depth - 1)
            }
            (Some(Node::Masked(p, m)), Some(Node::Masked(q, n))) => {
                m == n && self.alike_to(p, q, depth - 1)
            }
            (Some(Node::PerCpu(p, m)), Some(Node::PerCpu(q, n))) => (p, m) == (q, n),
            _ => false,
        }
    }

    /// Whether two values certainly differ: offsets from one base.
    pub(crate) fn differ(&self, a: Value, b: Value) -> bool {
        a.base == b.base && a.offset != b.offset
    }

    /// Whether `value` is computed from the node `index`.
    pub(crate) fn mentions(&self, value: Value, index: u32) -> bool {
        let mut value = value;
        for _ in 0..MAX_DEPTH {
            let Base::Node(own) = value.base else { return false };
            if own == index {
                return true;
            }
            match self.get(own) {
                Some(Node::Load(of, _) | Node::Masked(of, _)) => value = of,
                _ => return false,
            }
        }
        // Too deep to tell: as if it were.
        true
    }
}
