//! The state of one path: registers, stack slots, held resources and what conditions have shown; and
//! joining two of them. How instructions change it is in `execute.rs`.

use std::collections::HashMap;

use guest::Reg;

use super::locks::Effect;
use super::op::Relation;
use super::value::{Base, Node, Nodes, Value};

/// Most stack slots, held resources and facts of one state.
const MAX_SLOTS: usize = 256;
const MAX_FACTS: usize = 32;

/// `value (relation) with`, compared as signed numbers of `size` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fact {
    pub(crate) value: Value,
    pub(crate) relation: Relation,
    pub(crate) with: i64,
    pub(crate) size: u8,
}

impl Fact {
    /// A number as the comparison sees it.
    pub(crate) fn sign_extend(&self, value: u64) -> i64 {
        sign_extend(value, self.size)
    }
}

/// Whether a resource was really taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Standing {
    /// Taken here and not yet given back.
    Held,
    /// Taken if the call's result (this value) says so, which has not been looked at yet.
    Pending(Value),
    /// Given back here without having been taken here: the caller's.
    GivenBack,
}

/// A resource that the function has taken (or given back for its caller).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    /// What taking it did.
    pub(crate) effect: Effect,
    /// The lock's address.
    pub(crate) lock: Option<Value>,
    /// Saved interrupt flags.
    pub(crate) saved: Option<Value>,
    /// Address of the call or instruction.
    pub(crate) site: u64,
    /// Whether it was really taken.
    pub(crate) standing: Standing,
}

/// State of one path before an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// By encoding.
    pub(crate) regs: [Value; 16],
    /// Address and 8-byte value.
    pub(crate) slots: Vec<(Value, Value)>,
    /// In the order they were taken.
    pub(crate) items: Vec<Item>,
    pub(crate) facts: Vec<Fact>,
    /// What the arithmetic flags compare: value, constant, size.
    pub(crate) compared: Option<(Value, i64, u8)>,
    /// Flags saved by the last `pushf`, for the `cli` that follows.
    pub(crate) pushed_flags: Option<Value>,
}

impl State {
    /// At a function's entry: rsp points at the return address.
    pub(crate) fn entry() -> Self {
        let mut regs = Reg::GENERAL.map(Value::entry);
        regs[Reg::Rsp as usize] = Value::cfa(-8);
        let (slots, items, facts) = (Vec::new(), Vec::new(), Vec::new());
        Self { regs, slots, items, facts, compared: None, pushed_flags: None }
    }

    pub(crate) fn reg(&self, reg: Reg) -> Value {
        self.regs.get(reg as usize).copied().unwrap_or(Value::entry(reg))
    }

    pub(crate) fn set_reg(&mut self, reg: Reg, value: Value) {
        let old_rsp = self.reg(Reg::Rsp);
        if let Some(slot) = self.regs.get_mut(reg as usize) {
            *slot = value;
        }
        if reg == Reg::Rsp && old_rsp.base == value.base && value.offset > old_rsp.offset {
            // What lies below the stack pointer may be overwritten by an interrupt at any time.
            self.slots.retain(|(at, _)| at.base != value.base || at.offset >= value.offset);
        }
    }

    /// Whether an address is in the own stack frame.
    fn on_stack(&self, at: Value) -> bool {
        at.base == Base::Cfa || at.base == self.reg(Reg::Rsp).base
    }

    pub(crate) fn slot(&self, at: Value) -> Option<Value> {
        self.slots.iter().find(|slot| slot.0 == at).map(|slot| slot.1)
    }

    /// Something of `size` bytes is stored at `at`; `value` is known for whole words only.
    pub(crate) fn store(&mut self, at: Value, size: u8, value: Option<Value>) {
        if !self.on_stack(at) {
            return;
        }
        let string = size == u8::MAX;
        let end = if string { i64::MAX } else { at.offset.saturating_add(i64::from(size)) };
        self.slots.retain(|(slot, held)| {
            let overlaps = slot.base == at.base
                && slot.offset < end
                && slot.offset.saturating_add(8) > at.offset;
            // A string store has an unknown length, but does not reach the caller's registers.
            !overlaps || string && matches!(held.base, Base::Entry(_))
        });
        if let Some(value) = value.filter(|_| size == 8 && self.slots.len() < MAX_SLOTS) {
            self.slots.push((at, value));
        }
    }

    /// Forgets facts that speak of a node that is made anew.
    pub(crate) fn remade(&mut self, nodes: &Nodes, value: Value) {
        let Base::Node(index) = value.base else { return };
        self.facts.retain(|fact| !nodes.mentions(fact.value, index));
        if self.compared.is_some_and(|(compared, ..)| nodes.mentions(compared, index)) {
            self.compared = None;
        }
    }

    /// Adds a fact; `false` when it contradicts an earlier one, so that the path is impossible.
    pub(crate) fn learn(&mut self, fact: Fact) -> bool {
        if fact.relation == Relation::Any {
            return true;
        }
        if let Some(constant) = fact.value.as_constant() {
            return fact.relation.holds(fact.sign_extend(constant), fact.with);
        }
        if self.facts.iter().any(|old| contradict(old, &fact)) {
            return false;
        }
        if !self.facts.contains(&fact) && self.facts.len() < MAX_FACTS {
            self.facts.push(fact);
        }
        true
    }

    /// What tells states at one address apart: where each resource was taken.
    pub(crate) fn key(&self) -> Vec<(u64, u8)> {
        let standing = |item: &Item| match item.standing {
            Standing::Held => 0,
            Standing::Pending(_) => 1,
            Standing::GivenBack => 2,
        };
        self.items.iter().map(|item| (item.site, standing(item))).collect()
    }

    /// Joins another path of the same key into this one; says whether anything changed. Values that
    /// differ become one node per pair, so that what is equal on both paths stays equal. `own` are the
    /// nodes that joining at this place has made so far.
    pub(crate) fn join(&mut self, other: &State, nodes: &mut Nodes, own: &mut Vec<u32>) -> bool {
        let before = self.clone();
        let mut pairs = Pairs { nodes, own, seen: HashMap::new(), taken: Vec::new() };
        // A node of this place keeps its meaning first of all where both sides agree on it.
        for (mine, theirs) in self.regs.iter().zip(other.regs).filter(|(a, b)| *a == b) {
            pairs.join(*mine, theirs);
        }
        for (mine, theirs) in self.regs.iter_mut().zip(other.regs) {
            *mine = pairs.join(*mine, theirs);
        }
        self.slots.retain(|(at, _)| other.slot(*at).is_some());
        for (at, mine) in &mut self.slots {
            if let Some(theirs) = other.slot(*at) {
                *mine = pairs.join(*mine, theirs);
            }
        }
        for (mine, theirs) in self.items.iter_mut().zip(&other.items) {
            mine.lock = pairs.join_some(mine.lock, theirs.lock);
            mine.saved = pairs.join_some(mine.saved, theirs.saved);
            if let (Standing::Pending(a), Standing::Pending(b)) = (mine.standing, theirs.standing) {
                mine.standing = Standing::Pending(pairs.join(a, b));
            }
        }
        let stale = |value| own.iter().any(|&node| nodes.mentions(value, node));
        self.facts.retain(|fact| other.facts.contains(fact) && !stale(fact.value));
        let same = self.compared == other.compared;
        self.compared = self.compared.filter(|(value, ..)| same && !stale(*value));
        let same = self.pushed_flags == other.pushed_flags;
        self.pushed_flags = self.pushed_flags.filter(|value| same && !stale(*value));
        *self != before
    }
}

/// Values that are joined at one place: each pair of bases (and distance between them) is one node.
struct Pairs<'n> {
    nodes: &'n mut Nodes,
    own: &'n mut Vec<u32>,
    seen: HashMap<(Base, Base, i64), Base>,
    /// Own nodes that stand for a pair already.
    taken: Vec<u32>,
}

impl Pairs<'_> {
    fn join(&mut self, mine: Value, theirs: Value) -> Value {
        let own = match mine.base {
            Base::Node(index) if self.own.contains(&index) => Some(index),
            _ => None,
        };
        if mine == theirs && own.is_none() {
            return mine;
        }
        let key = (mine.base, theirs.base, theirs.offset.wrapping_sub(mine.offset));
        let base = match (self.seen.get(&key), own) {
            (Some(&base), _) => base,
            (None, Some(index)) if !self.taken.contains(&index) => {
                self.taken.push(index);
                mine.base
            }
            (None, _) => {
                let index = self.nodes.add(Node::Opaque);
                self.own.push(index);
                self.taken.push(index);
                Base::Node(index)
            }
        };
        self.seen.insert(key, base);
        Value { base, offset: mine.offset }
    }

    fn join_some(&mut self, mine: Option<Value>, theirs: Option<Value>) -> Option<Value> {
        Some(self.join(mine?, theirs?))
    }
}

/// The low `size` bytes of `value` as a signed number.
fn sign_extend(value: u64, size: u8) -> i64 {
    match size {
        1 => i64::from(value as i8),
        2 => i64::from(value as i16),
        4 => i64::from(value as i32),
        _ => value.cast_signed(),
    }
}

/// Whether two facts can't hold at once. Only facts of the same value are compared.
fn contradict(old: &Fact, new: &Fact) -> bool {
    if old.value != new.value || old.size != new.size {
        return false;
    }
    match (old.relation, new.relation) {
        (Relation::Eq, _) => !new.relation.holds(old.with, new.with),
        (_, Relation::Eq) => !old.relation.holds(new.with, old.with),
        _ => old.with == new.with && old.relation == new.relation.negated(),
    }
}
