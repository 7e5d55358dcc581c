//! Symbolic execution of one function from its entry to everywhere, once; then asked for any address.
//! Bounded: a function that is too much is marked incomplete instead of taking long.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use guest::{CodeAddress, GuestVirt, Reg, VirtMemory};
use repair_image::RepairImage;

use super::execute::{Executor, MAX_ITEMS};
use super::function::{Edge, Function, Text, parts};
use super::locks::{Class, Does, LockTable};
use super::op::Action;
use super::state::State;
use super::value::{Base, Nodes, Value};

/// Most block executions of one analysis.
const MAX_STEPS: usize = 3_000;
/// Most states (block and held resources).
const MAX_STATES: usize = 1_000;

/// The state at the start of a block, for one list of held resources.
#[derive(Debug)]
struct Entry {
    block: u32,
    state: State,
    /// Nodes that joining here has made.
    own: Vec<u32>,
    queued: bool,
}

/// A function, executed.
#[derive(Debug)]
pub(crate) struct Analysis {
    function: Function,
    entries: Vec<Entry>,
    nodes: Nodes,
    /// Whether every path was followed.
    complete: bool,
}

/// Where a caller's callee-saved register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SavedPlace {
    /// Still in the register.
    Same,
    /// In memory at this address.
    At(Value),
}

/// What the analysis says of one address.
#[derive(Debug)]
pub(crate) struct Answer {
    /// One state per list of held resources, before the instruction (before the call for a return
    /// address: what the call takes is not held while it has not returned).
    pub(crate) states: Vec<State>,
    /// Whether every path was followed.
    pub(crate) complete: bool,
}

struct Walk<'a> {
    table: &'a LockTable,
    function: &'a Function,
    entries: Vec<Entry>,
    by_key: HashMap<(u32, Vec<(u64, u8)>), u32>,
    nodes: Nodes,
    queue: VecDeque<u32>,
    /// Blocks that are reached without passing a `ud2`.
    plain: HashSet<u32>,
    complete: bool,
}

impl Walk<'_> {
    fn reach(&mut self, block: u32, state: &State) {
        let Some(target) = self.function.blocks.get(block as usize) else { return };
        // A way that the unwind table says can't be: the fall-through of a call that never returns.
        let rsp = state.reg(Reg::Rsp);
        if target.depth.is_some_and(|depth| rsp.base == Base::Cfa && rsp.offset != -depth) {
            return;
        }
        if state.items.len() > MAX_ITEMS {
            self.complete = false;
            return;
        }
        let key = (block, state.key());
        let index = match self.by_key.get(&key) {
            Some(&index) => {
                let Some(entry) = self.entries.get_mut(index as usize) else { return };
                if !entry.state.join(state, &mut self.nodes, &mut entry.own) {
                    return;
                }
                index
            }
            None if self.entries.len() >= MAX_STATES => {
                self.complete = false;
                return;
            }
            None => {
                let index = self.entries.len() as u32;
                let (state, own) = (state.clone(), Vec::new());
                self.entries.push(Entry { block, state, own, queued: false });
                self.by_key.insert(key, index);
                index
            }
        };
        if let Some(entry) = self.entries.get_mut(index as usize).filter(|entry| !entry.queued) {
            entry.queued = true;
            self.queue.push_back(index);
        }
    }

    fn execute(&mut self, index: u32, after_traps: bool) {
        let Some(entry) = self.entries.get_mut(index as usize) else { return };
        entry.queued = false;
        let mut state = entry.state.clone();
        let Some(block) = self.function.blocks.get(entry.block as usize) else { return };
        let mut executor =
            Executor { nodes: &mut self.nodes, table: self.table, state_index: index };
        for (at, op) in &block.ops {
            executor.step(&mut state, *at, op);
        }
        let edges: Vec<Edge> = block.edges.clone();
        for edge in edges {
            if edge.after_trap && (!after_traps || self.plain.contains(&edge.to)) {
                continue;
            }
            let mut branch = state.clone();
            let mut executor =
                Executor { nodes: &mut self.nodes, table: self.table, state_index: index };
            if executor.learn(&mut branch, edge.relation) {
                self.reach(edge.to, &branch);
            }
        }
    }

    fn run(&mut self, budget: &mut usize, after_traps: bool) {
        while let Some(index) = self.queue.pop_front() {
            if *budget == 0 {
                self.complete = false;
                return;
            }
            *budget -= 1;
            self.execute(index, after_traps);
        }
    }
}

impl Analysis {
    /// Executes a function.
    pub(crate) fn new(function: Function, table: &LockTable) -> Self {
        let mut walk = Walk {
            table,
            function: &function,
            entries: Vec::new(),
            by_key: HashMap::new(),
            nodes: Nodes::default(),
            queue: VecDeque::new(),
            plain: HashSet::new(),
            complete: true,
        };
        let mut budget = MAX_STEPS;
        walk.reach(0, &State::entry());
        walk.run(&mut budget, false);
        // `ud2` is a BUG(), what follows it belongs to another path; or a WARN(), and then what follows
        // it may be reached by no other way.
        walk.plain = walk.entries.iter().map(|entry| entry.block).collect();
        for index in 0..walk.entries.len() {
            let block = walk.entries.get(index).map_or(0, |entry| entry.block);
            let traps = walk.function.blocks.get(block as usize);
            if traps.is_some_and(|block| block.edges.iter().any(|edge| edge.after_trap)) {
                walk.queue.push_back(index as u32);
            }
        }
        walk.run(&mut budget, true);
        let Walk { entries, nodes, complete, .. } = walk;
        Self { function, entries, nodes, complete }
    }

    /// The values that states speak of.
    pub(crate) fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// The states at an address.
    pub(crate) fn at(&mut self, table: &LockTable, pc: CodeAddress) -> Answer {
        let places: Vec<(usize, usize)> = match pc {
            CodeAddress::Exact(at) => self.function.find(at.0).collect(),
            CodeAddress::Return(end) => self.function.find_call(end.0).collect(),
        };
        let mut states: Vec<State> = Vec::new();
        for (block, place) in places {
            for (index, entry) in self.entries.iter().enumerate() {
                if entry.block as usize != block {
                    continue;
                }
                let mut state = entry.state.clone();
                let state_index = index as u32;
                let mut executor = Executor { nodes: &mut self.nodes, table, state_index };
                let ops = self.function.blocks.get(block).map(|block| block.ops.as_slice());
                for (at, op) in ops.unwrap_or_default().iter().take(place) {
                    executor.step(&mut state, *at, op);
                }
                states.push(state);
            }
        }
        Answer { states, complete: self.complete }
    }

    /// What the call that a return address belongs to gives back.
    pub(crate) fn gives_at(&self, table: &LockTable, pc: CodeAddress) -> Option<Class> {
        let (block, place) = self.function.find_call(pc.ip().0).next()?;
        let (_, op) = self.function.blocks.get(block)?.ops.get(place)?;
        match op.action {
            Action::Call(Some(target)) => match table.call(GuestVirt(target))? {
                Does::Give(effect) => Some(effect.class),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the function adds to the preempt count itself; `None` when its code is not there.
    pub(crate) fn counts_preemption(&self, table: &LockTable) -> Option<bool> {
        use super::op::{Address, Place};
        let mut ops = self.function.blocks.iter().flat_map(|block| &block.ops).peekable();
        ops.peek()?;
        Some(ops.any(|(_, op)| match op.action {
            Action::Add(Place::Mem(Address::PerCpu(offset), _), _) => {
                Some(offset) == table.preempt_count
            }
            _ => false,
        }))
    }
}

/// Where a callee-saved register of the caller is in a state; `None` when it is in no known place. The
/// stack comes first: it is right even when the register's value is not known in this frame.
pub(crate) fn saved_place(state: &State, reg: Reg) -> Option<SavedPlace> {
    let wanted = Value::entry(reg);
    let rsp = state.reg(Reg::Rsp);
    let live = |at: &Value| at.base != rsp.base || at.offset >= rsp.offset;
    let slots = state.slots.iter().filter(|(at, value)| *value == wanted && live(at));
    // The outermost copy is the prologue's.
    let outermost = slots.max_by_key(|(at, _)| at.offset).map(|(at, _)| SavedPlace::At(*at));
    outermost.or_else(|| (state.reg(reg) == wanted).then_some(SavedPlace::Same))
}

/// A function that was asked for.
#[derive(Debug)]
struct Kept {
    /// `None` when it can't be read.
    analysis: Option<Analysis>,
    /// Of its bytes when it was analysed.
    digest: u64,
    /// In which of the cache's rounds its bytes were last seen to be those.
    seen: u64,
}

/// Analyses of one guest's functions. Belongs to one repair image. Code that was patched meanwhile
/// (static key switched, entry point replaced) is analysed anew, see [`CodeCache::look_again`].
#[derive(Debug, Default)]
pub struct CodeCache {
    table: Option<Arc<LockTable>>,
    functions: HashMap<u64, Kept>,
    preemption_counted: Option<bool>,
    round: u64,
    wanted: Option<Vec<GuestVirt>>,
}

impl CodeCache {
    /// An empty cache.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// From now on a function's bytes are compared with what was analysed before the analysis is used
    /// again: to be called when the guest has run since.
    pub fn look_again(&mut self) {
        self.round = self.round.wrapping_add(1);
    }

    /// What is still to be analysed ahead, `None` when that has not been listed.
    pub(crate) fn take_wanted(&mut self) -> Option<Vec<GuestVirt>> {
        self.wanted.take()
    }

    /// The counterpart of [`Self::take_wanted`].
    pub(crate) fn put_wanted(&mut self, wanted: Vec<GuestVirt>) {
        self.wanted = Some(wanted);
    }

    /// Number of functions kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.functions.len()
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    pub(crate) fn table(&mut self, image: &RepairImage) -> Arc<LockTable> {
        self.table.get_or_insert_with(|| Arc::new(LockTable::new(image))).clone()
    }

    /// Analyses the function at a code address ahead of need, so that a later question is answered at
    /// once; says whether there is one.
    pub fn warm(&mut self, image: &RepairImage, memory: &dyn VirtMemory, at: GuestVirt) -> bool {
        self.analysis(image, memory, at).is_some()
    }

    /// The analysis of the function at a code address.
    pub(crate) fn analysis(
        &mut self,
        image: &RepairImage,
        memory: &dyn VirtMemory,
        at: GuestVirt,
    ) -> Option<&mut Analysis> {
        let table = self.table(image);
        let (start, ranges) = parts(image, at)?;
        let round = self.round;
        if self.functions.get(&start.0).is_none_or(|kept| kept.seen != round) {
            let text = Text::read(memory, &ranges);
            let digest = text.digest();
            match self.functions.get_mut(&start.0).filter(|kept| kept.digest == digest) {
                Some(kept) => kept.seen = round,
                None => {
                    let function = Function::decode(image, &table, text);
                    let analysis = function.map(|function| Analysis::new(function, &table));
                    self.functions.insert(start.0, Kept { analysis, digest, seen: round });
                }
            }
        }
        self.functions.get_mut(&start.0)?.analysis.as_mut()
    }

    /// Whether taking a spinlock counts in the preempt count (`CONFIG_PREEMPT_COUNT`), from the code of
    /// the function that takes one; `None` when a dump is without that code.
    pub(crate) fn preemption_counted(
        &mut self,
        image: &RepairImage,
        memory: &dyn VirtMemory,
    ) -> Option<bool> {
        if self.preemption_counted.is_none() {
            let at = image.address_of("_raw_spin_lock")?;
            let table = self.table(image);
            let counted = self.analysis(image, memory, at)?.counts_preemption(&table)?;
            self.preemption_counted = Some(counted);
        }
        self.preemption_counted
    }
}

#[cfg(test)]
mod tests {
    use guest::GuestPhys;
    use proptest::prelude::*;

    use super::super::fixture::{self, TEXT};
    use super::super::locks::Class;
    use super::super::state::Standing;
    use super::*;

    fn held_at(offset: u64) -> (Vec<Vec<(Class, Standing)>>, bool) {
        let (image, machine) = fixture::kernel();
        let mut cache = CodeCache::new();
        let table = cache.table(&image);
        let at = GuestVirt(TEXT + offset);
        let space = machine.space();
        let analysis = cache.analysis(&image, &space, at).unwrap();
        let answer = analysis.at(&table, CodeAddress::Exact(at));
        let list = |state: &State| {
            state.items.iter().map(|item| (item.effect.class, item.standing)).collect()
        };
        (answer.states.iter().map(list).collect(), answer.complete)
    }

    #[test]
    fn a_path_holds_what_it_took() {
        use Class::{Mutex, Spin};
        let held = vec![(Mutex, Standing::Held), (Spin, Standing::Held), (Spin, Standing::Held)];
        assert_eq!(held_at(0x2c), (vec![held], true));
    }

    #[test]
    fn a_trylock_is_held_on_one_side_of_its_test() {
        assert_eq!(held_at(0x4d), (vec![vec![(Class::Mutex, Standing::Held)]], true));
        assert_eq!(held_at(0x51), (vec![vec![]], true));
    }

    #[test]
    fn cold_parts_belong_to_their_function() {
        assert_eq!(held_at(0x79), (vec![vec![(Class::Spin, Standing::Held)]], true));
        // A return address is one in a call: nothing is held while it has not returned.
        let (image, machine) = fixture::kernel();
        let mut cache = CodeCache::new();
        let table = cache.table(&image);
        let end = GuestVirt(TEXT + 0x79);
        let space = machine.space();
        let analysis = cache.analysis(&image, &space, end).unwrap();
        let answer = analysis.at(&table, CodeAddress::Return(end));
        assert!(answer.states.iter().all(|state| state.items.is_empty()));
        let state = &answer.states[0];
        assert_eq!(saved_place(state, Reg::Rbx), Some(SavedPlace::At(Value::cfa(-16))));
        assert_eq!(saved_place(state, Reg::R12), Some(SavedPlace::Same));
    }

    #[test]
    fn loops_come_to_an_end() {
        assert_eq!(held_at(0x8c), (vec![vec![(Class::Spin, Standing::Held)]], true));
        assert_eq!(held_at(0x9e), (vec![vec![]], true));
    }

    #[test]
    fn paths_that_hold_different_things_stay_apart() {
        let (lists, _) = held_at(0xbe);
        assert_eq!(lists.len(), 2);
        assert!(lists.contains(&vec![]) && lists.contains(&vec![(Class::Mutex, Standing::Held)]));
    }

    #[test]
    fn inlined_interrupt_and_preempt_changes_are_seen() {
        let held = vec![(Class::Interrupts, Standing::Held), (Class::Preempt, Standing::Held)];
        assert_eq!(held_at(0xfb), (vec![held], true));
        // Restored or never enabled: nothing left on either way.
        assert_eq!(held_at(0x10b), (vec![vec![]], true));
    }

    #[test]
    fn without_its_code_it_is_not_known_whether_a_lock_counts() {
        let (image, machine) = fixture::kernel();
        let nothing = guest::fake::FakeMachine::new(1 << 20, false);
        let mut cache = CodeCache::new();
        assert_eq!(cache.preemption_counted(&image, &nothing.space()), None);
        cache.look_again();
        assert_eq!(cache.preemption_counted(&image, &machine.space()), Some(true));
    }

    #[test]
    fn patched_code_is_analysed_anew() {
        let (image, mut machine) = fixture::kernel();
        let mut cache = CodeCache::new();
        let at = GuestVirt(TEXT + 0x10b);
        let held = |cache: &mut CodeCache, machine: &guest::fake::FakeMachine| {
            let table = cache.table(&image);
            let space = machine.space();
            let answer = cache.analysis(&image, &space, at).unwrap();
            let answer = answer.at(&table, CodeAddress::Exact(at));
            answer.states.iter().map(|state| state.items.len()).sum::<usize>()
        };
        assert_eq!(held(&mut cache, &machine), 0);
        // The decrement of the preempt count becomes a no-op.
        machine.poke(GuestPhys(0x20_00fd), &[0x90; 8]);
        assert_eq!(held(&mut cache, &machine), 0);
        cache.look_again();
        assert_eq!(held(&mut cache, &machine), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_as_code(bytes in proptest::collection::vec(any::<u8>(), 1..512), at in 0..512_u64) {
            let (image, mut machine) = fixture::kernel();
            machine.poke(GuestPhys(0x20_0800), &bytes);
            let mut cache = CodeCache::new();
            let table = cache.table(&image);
            let at = GuestVirt(TEXT + 0x800 + at);
            let space = machine.space();
            if let Some(analysis) = cache.analysis(&image, &space, at) {
                let _ = analysis.at(&table, CodeAddress::Exact(at));
                let _ = analysis.at(&table, CodeAddress::Return(at));
            }
        }
    }
}
