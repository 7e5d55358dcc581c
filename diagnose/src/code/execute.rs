//! One instruction on a state. Walking over the function is in `analysis.rs`.

use guest::{GuestVirt, Reg};

use super::locks::{Also, Class, Does, Effect, Lock, LockTable, Outcome};
use super::op::{Action, Address, Op, Place, Relation};
use super::state::{Fact, Item, Standing, State};
use super::value::{Maker, Node, Nodes, Value};

/// Registers that a called function may change (System V ABI).
const CALLER_SAVED: [Reg; 9] =
    [Reg::Rax, Reg::Rcx, Reg::Rdx, Reg::Rsi, Reg::Rdi, Reg::R8, Reg::R9, Reg::R10, Reg::R11];
/// Interrupt flag within the flags.
const IF: u64 = guest::RFLAGS_IF;
const LOW32: u64 = 0xffff_ffff;
/// Tags of makers beyond the registers.
const TAG_LOAD: u32 = 32;
const TAG_RESULT: u32 = 33;
const TAG_FLAGS: u32 = 34;

/// What execution needs besides the state.
pub(crate) struct Executor<'a> {
    pub(crate) nodes: &'a mut Nodes,
    pub(crate) table: &'a LockTable,
    /// Index of the state at the block's start: part of every maker.
    pub(crate) state_index: u32,
}

impl Executor<'_> {
    fn make(&mut self, state: &mut State, at: u64, tag: u32, node: Node) -> Value {
        let value = self.nodes.make(Maker { state: self.state_index, at, tag }, node);
        state.remade(self.nodes, value);
        value
    }

    fn opaque(&mut self, state: &mut State, at: u64, reg: Reg) -> Value {
        self.make(state, at, reg as u32, Node::Opaque)
    }

    fn address(state: &State, address: Address) -> Option<Value> {
        match address {
            Address::Based(reg, disp) => Some(state.reg(reg).plus(disp)),
            Address::Absolute(at) => Some(Value::constant(at)),
            Address::PerCpu(_) | Address::Unknown => None,
        }
    }

    fn load(&mut self, state: &mut State, at: u64, address: Address, size: u8) -> Value {
        if let Address::PerCpu(offset) = address {
            return self.make(state, at, TAG_LOAD, Node::PerCpu(offset, size));
        }
        let Some(from) = Self::address(state, address) else {
            return self.make(state, at, TAG_LOAD, Node::Opaque);
        };
        match (state.slot(from), size) {
            (Some(value), 8) => value,
            (Some(value), 4) => self.nodes.mask(value, LOW32),
            (Some(value), 1) => self.nodes.mask(value, 0xff),
            _ => self.make(state, at, TAG_LOAD, Node::Load(from, size)),
        }
    }

    /// The value of a place, zero-extended.
    fn read(&mut self, state: &mut State, at: u64, place: Place) -> Value {
        match place {
            Place::Reg(reg, 8) => state.reg(reg),
            Place::Reg(reg, size) => {
                let mask = (1_u64 << (8 * u32::from(size.min(7)))) - 1;
                self.nodes.mask(state.reg(reg), mask)
            }
            Place::Mem(address, size) => self.load(state, at, address, size),
            Place::Imm(value) => Value::constant(value.cast_unsigned()),
            Place::High(_) | Place::Other => self.make(state, at, TAG_LOAD, Node::Opaque),
        }
    }

    fn write(&mut self, state: &mut State, at: u64, place: Place, value: Value) {
        match place {
            Place::Reg(reg, 8) => state.set_reg(reg, value),
            Place::Reg(reg, 4) => {
                let value = self.nodes.mask(value, LOW32);
                state.set_reg(reg, value);
            }
            // The other bytes stay, so the whole is something new.
            Place::Reg(reg, _) | Place::High(reg) => {
                let value = self.opaque(state, at, reg);
                state.set_reg(reg, value);
            }
            Place::Mem(address, size) => {
                if let Some(to) = Self::address(state, address) {
                    state.store(to, size, Some(value));
                }
            }
            Place::Imm(_) | Place::Other => {}
        }
    }

    /// Executes one instruction. Jumps change nothing here.
    pub(crate) fn step(&mut self, state: &mut State, at: u64, op: &Op) {
        match op.action {
            Action::Nop | Action::Trap | Action::Stop | Action::Jump(_) | Action::Branch(..) => {}
            Action::Move(to, from) => {
                let value = self.read(state, at, from);
                self.write(state, at, to, value);
            }
            Action::Lea(reg, size, address) => {
                let value = match Self::address(state, address) {
                    Some(value) => value,
                    None => self.opaque(state, at, reg),
                };
                self.write(state, at, Place::Reg(reg, size), value);
            }
            Action::Zero(reg) => {
                state.set_reg(reg, Value::constant(0));
                state.compared = None;
            }
            Action::Add(place, by) => self.add(state, at, place, by),
            Action::And(place, mask) => {
                let mask = mask.cast_unsigned();
                let old = self.read(state, at, place);
                let value = self.nodes.mask(old, mask);
                self.write(state, at, place, value);
                state.compared = Some((value, 0, size_of_place(place)));
            }
            Action::Push(place) => {
                let value = self.read(state, at, place);
                self.push(state, value);
            }
            Action::Pop(place) => {
                let value = self.pop(state, at);
                self.write(state, at, place, value);
            }
            Action::PushFlags => {
                let flags = self.make(state, at, TAG_FLAGS, Node::Flags);
                self.push(state, flags);
                state.pushed_flags = Some(flags);
            }
            Action::PopFlags => {
                let flags = self.pop(state, at);
                state.compared = None;
                restore_flags(state, self.nodes, flags);
            }
            Action::Leave => {
                let rbp = state.reg(Reg::Rbp);
                state.set_reg(Reg::Rsp, rbp);
                let value = self.pop(state, at);
                state.set_reg(Reg::Rbp, value);
            }
            Action::Cli => cli(state, at),
            Action::Sti => sti(state, at),
            Action::Test(place, mask) => self.test(state, at, place, mask),
            Action::Compare(place, with) => {
                let value = self.read(state, at, place);
                state.compared = Some((value, with, size_of_place(place)));
            }
            Action::Call(target) => self.call(state, at, target),
            Action::Clobber { regs, stores, keeps_flags } => {
                for reg in Reg::GENERAL.into_iter().filter(|&reg| regs >> reg as u8 & 1 == 1) {
                    let value = self.opaque(state, at, reg);
                    state.set_reg(reg, value);
                }
                if let Some((address, size)) = stores
                    && let Some(to) = Self::address(state, address)
                {
                    state.store(to, size, None);
                }
                if !keeps_flags {
                    state.compared = None;
                }
            }
        }
    }

    fn push(&mut self, state: &mut State, value: Value) {
        let top = state.reg(Reg::Rsp).plus(-8);
        state.set_reg(Reg::Rsp, top);
        state.store(top, 8, Some(value));
    }

    fn pop(&mut self, state: &mut State, at: u64) -> Value {
        let value = self.load(state, at, Address::Based(Reg::Rsp, 0), 8);
        let top = state.reg(Reg::Rsp).plus(8);
        state.set_reg(Reg::Rsp, top);
        value
    }

    fn add(&mut self, state: &mut State, at: u64, place: Place, by: i64) {
        state.compared = None;
        match place {
            Place::Reg(reg, 8) => {
                let value = state.reg(reg).plus(by);
                state.set_reg(reg, value);
            }
            Place::Reg(reg, _) | Place::High(reg) => {
                let value = self.opaque(state, at, reg);
                state.set_reg(reg, value);
            }
            Place::Mem(Address::PerCpu(offset), 4) if Some(offset) == self.table.preempt_count => {
                let amount = by as i32;
                if amount > 0 {
                    take(state, Effect::preempt(amount), None, None, at, Standing::Held);
                } else {
                    let effect = Effect::preempt(amount.wrapping_neg());
                    give(state, self.nodes, effect, None, at);
                }
            }
            Place::Mem(address, size) => {
                if let Some(to) = Self::address(state, address) {
                    state.store(to, size, None);
                }
            }
            Place::Imm(_) | Place::Other => {}
        }
    }

    fn test(&mut self, state: &mut State, at: u64, place: Place, mask: Option<i64>) {
        let size = size_of_place(place);
        let value = match (place, mask) {
            // test ah, 2: bit 9 of rax
            (Place::High(reg), Some(mask)) => {
                self.nodes.mask(state.reg(reg), (mask.cast_unsigned() & 0xff) << 8)
            }
            (_, mask) => {
                let value = self.read(state, at, place);
                match mask {
                    Some(mask) => {
                        let width = if size >= 8 { u64::MAX } else { (1 << (8 * size)) - 1 };
                        self.nodes.mask(value, mask.cast_unsigned() & width)
                    }
                    None => value,
                }
            }
        };
        let size = if matches!(place, Place::High(_)) { 8 } else { size };
        state.compared = Some((value, 0, size));
    }

    fn call(&mut self, state: &mut State, at: u64, target: Option<u64>) {
        let first = state.reg(Reg::Rdi);
        for reg in CALLER_SAVED {
            let value = self.opaque(state, at, reg);
            state.set_reg(reg, value);
        }
        let result = self.make(state, at, TAG_RESULT, Node::Result(at));
        state.set_reg(Reg::Rax, result);
        state.compared = None;
        match target.and_then(|target| self.table.call(GuestVirt(target))) {
            Some(Does::Take(effect)) => {
                let lock = match effect.lock {
                    Lock::None | Lock::Symbol(_) => None,
                    Lock::Argument | Lock::Member(..) => Some(first),
                    Lock::ResultMember(bits, ..) => Some(self.nodes.mask(result, !bits)),
                };
                let saved = (effect.also == Also::IrqSave).then_some(result);
                let standing = match effect.outcome {
                    Outcome::Always => Standing::Held,
                    _ => Standing::Pending(result),
                };
                take(state, effect, lock, saved, at, standing);
            }
            Some(Does::Give(effect)) => {
                let lock = match effect.lock {
                    Lock::None | Lock::Symbol(_) => None,
                    _ => Some(first),
                };
                give(state, self.nodes, effect, lock, at);
            }
            Some(Does::NoReturn) | None => {}
        }
    }

    /// What a conditional jump shows on one of its edges; `false` when the edge is impossible.
    pub(crate) fn learn(&mut self, state: &mut State, relation: Relation) -> bool {
        let Some((value, with, size)) = state.compared else { return true };
        if !state.learn(Fact { value, relation, with, size }) {
            return false;
        }
        if with == 0 {
            settle(state, self.nodes, value, relation);
        }
        true
    }
}

fn size_of_place(place: Place) -> u8 {
    match place {
        Place::Reg(_, size) | Place::Mem(_, size) => size,
        Place::High(_) => 1,
        Place::Imm(_) | Place::Other => 8,
    }
}

/// `value (relation) 0` is known: pending locks of that result become held or not, and interrupt flags
/// that were saved switched off need no restoring.
fn settle(state: &mut State, nodes: &Nodes, value: Value, relation: Relation) {
    let mut index = 0;
    while let Some(item) = state.items.get(index).copied() {
        let verdict = match item.standing {
            Standing::Pending(result) => settled(&item, result, nodes, value, relation),
            Standing::Held
                if relation == Relation::Eq && item.effect.class == Class::Interrupts =>
            {
                let off = item.saved.is_some_and(|saved| nodes.unmasked(value, IF) == saved);
                off.then_some(false)
            }
            _ => None,
        };
        match verdict {
            Some(false) => {
                state.items.remove(index);
                continue;
            }
            Some(true) => {
                if let Some(item) = state.items.get_mut(index) {
                    item.standing = Standing::Held;
                }
            }
            None => {}
        }
        index += 1;
    }
}

fn settled(
    item: &Item,
    result: Value,
    nodes: &Nodes,
    value: Value,
    relation: Relation,
) -> Option<bool> {
    let outcome = item.effect.outcome;
    if let Outcome::Bits(bits) = outcome {
        return match relation {
            Relation::Eq if nodes.unmasked(value, bits) == result => Some(false),
            Relation::Ne if value == result || nodes.exact_mask(value) == Some((result, bits)) => {
                (value != result).then_some(true)
            }
            _ => None,
        };
    }
    if nodes.unmasked(value, 0xff) != result {
        return None;
    }
    let zero = match relation {
        Relation::Eq => true,
        Relation::Ne | Relation::Lt | Relation::Gt => false,
        // These functions return 0 or a negative error, or 0 or 1.
        Relation::Ge if outcome == Outcome::Zero => true,
        Relation::Le if outcome == Outcome::NonZero => true,
        _ => return None,
    };
    Some(zero == (outcome == Outcome::Zero))
}

/// Most resources of one state; beyond that a loop takes the same ones again and again.
pub(crate) const MAX_ITEMS: usize = 12;

fn take(
    state: &mut State,
    effect: Effect,
    lock: Option<Value>,
    saved: Option<Value>,
    site: u64,
    standing: Standing,
) {
    state.items.push(Item { effect, lock, saved, site, standing });
}

fn cli(state: &mut State, at: u64) {
    let saved = state.pushed_flags.take();
    take(state, Effect::plain(Class::Interrupts), None, saved, at, Standing::Held);
}

/// `sti` ends the innermost `cli`. After a test of saved flags it restores those.
fn sti(state: &mut State, at: u64) {
    let held =
        |item: &Item| item.effect.class == Class::Interrupts && item.standing == Standing::Held;
    if let Some(index) = state.items.iter().rposition(held) {
        state.items.remove(index);
    } else {
        let effect = Effect::plain(Class::Interrupts);
        take(state, effect, None, None, at, Standing::GivenBack);
    }
}

/// `popf` of saved flags ends the `cli` that followed their saving.
fn restore_flags(state: &mut State, nodes: &Nodes, flags: Value) {
    let index = state.items.iter().rposition(|item| {
        item.effect.class == Class::Interrupts
            && item.saved.is_some_and(|saved| nodes.alike(saved, flags))
    });
    if let Some(index) = index {
        state.items.remove(index);
    }
}

/// Gives back the innermost resource of that class whose lock is, or may be, this one.
fn give(state: &mut State, nodes: &Nodes, effect: Effect, lock: Option<Value>, site: u64) {
    let same = |item: &Item| {
        item.effect.class == effect.class
            && item.standing != Standing::GivenBack
            && item.effect.amount == effect.amount
            && member(item.effect.lock) == member(effect.lock)
    };
    let alike = |item: &Item| match (item.lock, lock) {
        (Some(a), Some(b)) => nodes.alike(a, b),
        (None, None) => true,
        _ => false,
    };
    let maybe = |item: &Item| match (item.lock, lock) {
        (Some(a), Some(b)) => !nodes.differ(a, b),
        _ => true,
    };
    let found = state
        .items
        .iter()
        .rposition(|item| same(item) && alike(item))
        .or_else(|| state.items.iter().rposition(|item| same(item) && maybe(item)));
    let Some(index) = found else {
        take(state, effect, lock, None, site, Standing::GivenBack);
        return;
    };
    let item = state.items.remove(index);
    leftovers(state, &item, effect.also, index);
}

/// Which member or variable the lock is: two ways to name one give the same.
fn member(lock: Lock) -> Option<(&'static str, &'static str)> {
    match lock {
        Lock::None | Lock::Argument => None,
        Lock::Symbol(name) => Some((name, "")),
        Lock::Member(of, member) | Lock::ResultMember(_, of, member) => Some((of, member)),
    }
}

/// A lock taken one way and given back another leaves interrupts or bottom halves off, or on.
fn leftovers(state: &mut State, item: &Item, given: Also, index: usize) {
    let irq = |also| matches!(also, Also::Irq | Also::IrqSave);
    let rest = |class: Effect| Item { effect: class, lock: None, ..*item };
    if irq(item.effect.also) && !irq(given) {
        state.items.insert(index, rest(Effect::plain(Class::Interrupts)));
    } else if irq(given) && !irq(item.effect.also) {
        sti(state, item.site);
    }
    let bottom_halves = Effect::preempt(super::locks::SOFTIRQ_DISABLE);
    if item.effect.also == Also::Bh && given != Also::Bh {
        state.items.insert(index, rest(bottom_halves));
    } else if given == Also::Bh && item.effect.also != Also::Bh {
        let held = state.items.iter().rposition(|held| held.effect == bottom_halves);
        if let Some(index) = held {
            state.items.remove(index);
        }
    }
}
