//! What frames hold: code analysis of each, addresses resolved in the frame, lock words looked at in
//! memory. Only sums up; whether and how it is given back is decided elsewhere.

use std::ops::Range;

use guest::{CodeAddress, GuestVirt, RFLAGS_IF, Reg, VirtMemory};
use repair_image::RepairImage;

use crate::code::{
    Also, Class, CodeCache, Fact, Item, Lock, Outcome, Place, SOFTIRQ_DISABLE, Standing, State,
};
use crate::{Confirmation, Frame, FrameEffects, Held, ResourceKind};

/// What is known of the machine around the frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around {
    /// Guest-virtual address of the current task's `task_struct`.
    pub task: Option<GuestVirt>,
    /// Whether interrupts are enabled in the innermost frame of the range.
    pub interrupts_enabled: Option<bool>,
    /// Per-CPU base of the CPU.
    pub per_cpu: Option<u64>,
}

/// What the frames `range` (indices, innermost first) hold.
pub fn of(
    image: &RepairImage,
    memory: &dyn VirtMemory,
    cache: &mut CodeCache,
    frames: &[Frame],
    range: Range<usize>,
    around: &Around,
) -> FrameEffects {
    let mut summary = Summary::default();
    let looker = Looker { image, memory, around };
    for index in range.rev() {
        let Some(frame) = frames.get(index) else { continue };
        match looker.frame(cache, frame) {
            Some(list) => {
                for one in list {
                    summary.add(one, index);
                }
            }
            None => summary.undetermined.push(index),
        }
    }
    let counted = cache.preemption_counted(image, memory);
    summary.finish(counted, around.interrupts_enabled)
}

/// A resource of a frame, with its address.
#[derive(Clone, Debug, PartialEq)]
struct Resolved {
    item: Item,
    lock: Option<GuestVirt>,
    name: Option<String>,
    confirmed: Confirmation,
    saved: Option<bool>,
}

impl Resolved {
    fn is_owned(&self) -> bool {
        matches!(self.item.effect.class, Class::Mutex | Class::RwsemWrite)
    }
}

struct Looker<'a> {
    image: &'a RepairImage,
    memory: &'a dyn VirtMemory,
    around: &'a Around,
}

impl Looker<'_> {
    /// What one frame holds; `None` when that is not determined.
    fn frame(&self, cache: &mut CodeCache, frame: &Frame) -> Option<Vec<Resolved>> {
        let table = cache.table(self.image);
        let analysis = cache.analysis(self.image, self.memory, frame.pc.lookup())?;
        let answer = analysis.at(&table, frame.pc);
        if !answer.complete {
            return None;
        }
        let mut lists: Vec<Vec<Resolved>> = Vec::new();
        for state in &answer.states {
            let place = Place {
                memory: self.memory,
                nodes: analysis.nodes(),
                state,
                registers: &frame.registers,
                cfa: frame.cfa,
                per_cpu: self.around.per_cpu,
            };
            if !possible(&place, frame) {
                continue;
            }
            let list = self.list(&place, state)?;
            if !lists.iter().any(|known| same(known, &list)) {
                lists.push(list);
            }
        }
        let mut chosen = choose(lists)?;
        if let CodeAddress::Return(_) = frame.pc {
            // In the middle of a call that gives it back, the lock may be free already.
            let giving = analysis.gives_at(&table, frame.pc);
            chosen.retain(|one| {
                let gone = matches!(one.confirmed, Confirmation::Contradicted { .. });
                !(gone && giving == Some(one.item.effect.class))
            });
        }
        let contradicted =
            |one: &Resolved| matches!(one.confirmed, Confirmation::Contradicted { .. });
        let foreign = |one: &Resolved| one.item.effect.class == Class::Foreign;
        (!chosen.iter().any(|one| contradicted(one) || foreign(one))).then_some(chosen)
    }

    /// The resources of one state; `None` when it can't be told whether one is held.
    fn list(&self, place: &Place<'_>, state: &State) -> Option<Vec<Resolved>> {
        let mut list = Vec::new();
        for item in &state.items {
            let mut one = self.resolved(place, item);
            if let Standing::Pending(result) = item.standing {
                if !is_held(place, item, result, &one)? {
                    continue;
                }
                one.item.standing = Standing::Held;
            }
            list.push(one);
        }
        Some(list)
    }

    fn resolved(&self, place: &Place<'_>, item: &Item) -> Resolved {
        let (lock, name) = self.lock(place, item);
        let confirmed = match item.effect.lock {
            Lock::None => Confirmation::NotApplicable,
            _ => self.confirm(item.effect.class, lock),
        };
        let flags = item.saved.and_then(|saved| place.resolve(saved));
        let saved = match item.effect.also {
            Also::Irq => Some(true),
            Also::IrqSave => flags.map(|flags| flags & RFLAGS_IF != 0),
            // local_irq_disable() without saving: its counterpart enables unconditionally.
            _ if item.effect.class == Class::Interrupts && item.saved.is_none() => Some(true),
            _ => flags.map(|flags| flags & RFLAGS_IF != 0),
        };
        Resolved { item: *item, lock, name, confirmed, saved }
    }

    fn lock(&self, place: &Place<'_>, item: &Item) -> (Option<GuestVirt>, Option<String>) {
        let value = || item.lock.and_then(|lock| place.resolve(lock)).map(GuestVirt);
        match item.effect.lock {
            Lock::None => (None, None),
            Lock::Argument => (value(), None),
            Lock::Symbol(name) => (self.image.address_of(name), Some(name.to_owned())),
            Lock::Member(of, member) | Lock::ResultMember(_, of, member) => {
                let offset = self.image.types.member(of, member).map(|member| member.offset);
                let at = value().and_then(|at| Some(at + offset?));
                (at, Some(format!("{of}.{member}")))
            }
        }
    }

    fn member(&self, at: GuestVirt, structure: &str, path: &str) -> Option<u64> {
        let member = self.image.types.member(structure, path)?;
        self.memory.read_uint(at + member.offset, member.size).ok()
    }

    /// What the lock word says. A kernel whose structure lacks the member (PREEMPT_RT: rt_mutex based)
    /// gives `Unknown`.
    fn confirm(&self, class: Class, lock: Option<GuestVirt>) -> Confirmation {
        let Some(at) = lock else { return Confirmation::Unknown };
        let verdict = match class {
            Class::Mutex => self.mutex(at),
            Class::RwsemWrite => self.written(at),
            // Readers are counted from bit 8 (RWSEM_READER_SHIFT), since commit 64489e78004c
            // ("locking/rwsem: Implement a new locking scheme", v5.3).
            Class::RwsemRead => {
                self.member(at, "rw_semaphore", "count").map(|count| (count >> 8 != 0, count))
            }
            // 1, or 3 (_Q_SLOW_VAL) where a waiter of a paravirtualised lock sleeps.
            Class::Spin => {
                self.member(at, "raw_spinlock", "raw_lock.locked").map(|byte| (byte != 0, byte))
            }
            // Readers are counted from bit 9 (_QR_SHIFT), a writer sets the low byte (_QW_LOCKED).
            Class::ReadLock => {
                self.member(at, "rwlock_t", "raw_lock.cnts").map(|count| (count >> 9 != 0, count))
            }
            Class::WriteLock => self
                .member(at, "rwlock_t", "raw_lock.cnts")
                .map(|count| (count & 0xff == 0xff, count)),
            Class::Semaphore | Class::Foreign => None,
            Class::Rcu | Class::Preempt | Class::Interrupts => {
                return Confirmation::NotApplicable;
            }
        };
        match verdict {
            Some((true, _)) => Confirmation::Confirmed,
            Some((false, word)) => Confirmation::Contradicted { word },
            None => Confirmation::Unknown,
        }
    }

    /// The low three bits of the owner are flags (MUTEX_FLAGS).
    fn mutex(&self, at: GuestVirt) -> Option<(bool, u64)> {
        let owner = self.member(at, "mutex", "owner")?;
        Some((owner & !7 == self.around.task?.0, owner))
    }

    /// Bit 0 of the count is the writer (RWSEM_WRITER_LOCKED); the low bits of the owner are flags.
    fn written(&self, at: GuestVirt) -> Option<(bool, u64)> {
        let owner = self.member(at, "rw_semaphore", "owner")?;
        let count = self.member(at, "rw_semaphore", "count")?;
        Some((owner & !7 == self.around.task?.0 && count & 1 == 1, owner))
    }
}

/// Whether a path can have been taken: the stack is as deep as it is, and no condition on the way is
/// contradicted by a register or stack slot that still holds what was tested.
fn possible(place: &Place<'_>, frame: &Frame) -> bool {
    let rsp = place.resolve(place.state.reg(Reg::Rsp));
    let depth = match (rsp, frame.registers.get(Reg::Rsp)) {
        (Some(expected), Some(found)) => expected == found,
        _ => true,
    };
    depth && place.state.facts.iter().all(|fact| holds(place, fact).unwrap_or(true))
}

fn holds(place: &Place<'_>, fact: &Fact) -> Option<bool> {
    let value = place.remembered(fact.value)?;
    Some(fact.relation.holds(fact.sign_extend(value), fact.with))
}

/// Whether a lock whose taking may have failed is held: from the result should it still be somewhere,
/// else from a lock word that names its owner.
fn is_held(
    place: &Place<'_>,
    item: &Item,
    result: crate::code::Value,
    one: &Resolved,
) -> Option<bool> {
    if let Some(result) = place.remembered(result) {
        return Some(match item.effect.outcome {
            Outcome::Always => true,
            Outcome::Zero => result as u32 == 0,
            // Some of these functions return bool: only the low byte is theirs.
            Outcome::NonZero => result as u8 != 0,
            Outcome::Bits(bits) => result & bits == bits,
        });
    }
    match one.confirmed {
        Confirmation::Confirmed if one.is_owned() => Some(true),
        Confirmation::Contradicted { .. } => Some(false),
        _ => None,
    }
}

fn same(a: &[Resolved], b: &[Resolved]) -> bool {
    let alike = |(x, y): (&Resolved, &Resolved)| {
        x.item.site == y.item.site
            && x.item.standing == y.item.standing
            && x.lock == y.lock
            && x.saved == y.saved
    };
    a.len() == b.len() && a.iter().zip(b).all(alike)
}

/// The one list that memory speaks for: each of its locks is confirmed, and of the others' locks none
/// that it has not.
fn choose(mut lists: Vec<Vec<Resolved>>) -> Option<Vec<Resolved>> {
    if lists.len() <= 1 {
        return lists.pop();
    }
    let sure = |one: &Resolved| one.confirmed == Confirmation::Confirmed;
    let fits = |list: &Vec<Resolved>| {
        let has = |one: &Resolved| list.iter().any(|own| own.lock == one.lock);
        list.iter().all(sure) && !lists.iter().flatten().any(|one| sure(one) && !has(one))
            // Without a lock word nothing speaks for or against an entry.
            && lists.iter().flatten().all(|one| one.lock.is_some())
    };
    let mut fitting = lists.iter().filter(|list| fits(list));
    let first = fitting.next()?;
    fitting.next().is_none().then(|| first.clone())
}

#[derive(Default)]
struct Summary {
    held: Vec<(Resolved, usize)>,
    undetermined: Vec<usize>,
    /// Added to the preempt count by what was given back for frames further out.
    given_back: Vec<Resolved>,
    enabled_interrupts: bool,
}

impl Summary {
    /// Adds a resource of frame `index`; frames come outermost first.
    fn add(&mut self, one: Resolved, index: usize) {
        if one.item.standing != Standing::GivenBack {
            self.held.push((one, index));
            return;
        }
        let class = one.item.effect.class;
        let taken = self.held.iter().rposition(|(held, _)| {
            held.item.effect.class == class
                && held.item.effect.amount == one.item.effect.amount
                && held.lock == one.lock
        });
        match taken {
            Some(taken) => {
                self.held.remove(taken);
            }
            None if class == Class::Interrupts => self.enabled_interrupts = true,
            None => {
                // It belongs to a frame outside the range.
                self.undetermined.push(index);
                self.given_back.push(one);
            }
        }
    }

    fn finish(mut self, counted: Option<bool>, interrupts: Option<bool>) -> FrameEffects {
        let per_lock = i64::from(counted.unwrap_or(true));
        let preempt = |one: &Resolved| {
            let effect = one.item.effect;
            let bottom_halves =
                if effect.also == Also::Bh { i64::from(SOFTIRQ_DISABLE) } else { 0 };
            match effect.class {
                Class::Spin | Class::ReadLock | Class::WriteLock => per_lock + bottom_halves,
                Class::Preempt => i64::from(effect.amount),
                _ => 0,
            }
        };
        let rcu = |one: &Resolved| i64::from(one.item.effect.class == Class::Rcu);
        let mut effects = FrameEffects::default();
        for (one, _) in &self.held {
            effects.preempt_delta += preempt(one);
            effects.rcu_delta += rcu(one);
        }
        for one in &self.given_back {
            effects.preempt_delta -= preempt(one);
            effects.rcu_delta -= rcu(one);
        }
        let switches = |one: &Resolved| {
            one.item.effect.class == Class::Interrupts
                || matches!(one.item.effect.also, Also::Irq | Also::IrqSave)
        };
        let outermost = self.held.iter().find(|(one, _)| switches(one));
        effects.interrupts_before = match outermost {
            _ if self.enabled_interrupts || !self.undetermined.is_empty() => None,
            Some((one, _)) => one.saved,
            None => interrupts,
        };
        effects.held = self.held.into_iter().flat_map(|(one, frame)| shown(&one, frame)).collect();
        self.undetermined.sort_unstable();
        self.undetermined.dedup();
        effects.undetermined = self.undetermined;
        effects
    }
}

/// As the diagnosis shows it. Only spinlocks have kinds of their own for what they switch off besides.
fn shown(one: &Resolved, frame: usize) -> Vec<Held> {
    let effect = one.item.effect;
    let held = Held {
        kind: effect.kind(),
        lock: one.lock,
        name: one.name.clone(),
        frame,
        taken_at: GuestVirt(one.item.site),
        confirmed: one.confirmed.clone(),
        saved_interrupts: one.saved,
    };
    let besides = match (effect.class, effect.also) {
        (Class::ReadLock | Class::WriteLock, Also::Bh) => Some(ResourceKind::BottomHalves),
        (Class::ReadLock | Class::WriteLock, Also::Irq | Also::IrqSave) => {
            Some(ResourceKind::Interrupts)
        }
        _ => None,
    };
    let besides = besides.map(|kind| Held {
        kind,
        lock: None,
        name: None,
        confirmed: Confirmation::NotApplicable,
        ..held.clone()
    });
    // Released in reverse: the lock before what it switched off.
    besides.into_iter().chain([held]).collect()
}

#[cfg(test)]
mod tests {
    use guest::Registers;

    use super::*;
    use crate::Trust;
    use crate::code::fixture::{self, DATA, TASK, TEXT, registers, store};

    /// Address of the object that the functions work on.
    const OBJECT: u64 = DATA + 0x1000;

    fn frame(registers: Registers, cfa: u64, pc: CodeAddress) -> Frame {
        Frame {
            pc,
            cfa: Some(GuestVirt(cfa)),
            registers,
            trust: Trust::Context,
            module: None,
            function: None,
            function_start: None,
            source: Vec::new(),
            saved_at: None,
        }
    }

    fn effects(offset: u64, depth: u64, words: &[(u64, u64)], rbp: u64) -> FrameEffects {
        let (image, mut machine) = fixture::kernel();
        for (at, word) in words {
            store(&mut machine, *at, *word);
        }
        let rsp = DATA + 0x100;
        let registers = registers(offset, rsp).with(Reg::Rbx, OBJECT).with(Reg::Rbp, rbp);
        let pc = CodeAddress::Exact(GuestVirt(TEXT + offset));
        let frames = [frame(registers, rsp + depth, pc)];
        let around =
            Around { task: Some(GuestVirt(TASK)), interrupts_enabled: Some(false), per_cpu: None };
        of(&image, &machine.space(), &mut CodeCache::new(), &frames, 0..1, &around)
    }

    #[test]
    fn nested_locks_with_their_saved_flags() {
        let words = [
            (OBJECT + 0x20, TASK | 1),
            (OBJECT + 0x60, 1),
            (OBJECT + 0x70, 3),
            (DATA + 0x108, 0x246),
        ];
        let found = effects(0x2c, 0x28, &words, 0x46);
        let locks: Vec<_> = found
            .held
            .iter()
            .map(|held| (held.kind, held.lock.map(|at| at.0 - OBJECT), held.saved_interrupts))
            .collect();
        use ResourceKind::{Mutex, SpinlockIrqsave};
        assert_eq!(
            locks,
            [
                (Mutex, Some(0x20), None),
                (SpinlockIrqsave, Some(0x60), Some(true)),
                (SpinlockIrqsave, Some(0x70), Some(false)),
            ]
        );
        assert!(found.held.iter().all(|held| held.confirmed == Confirmation::Confirmed));
        assert_eq!((found.preempt_delta, found.rcu_delta), (2, 0));
        assert_eq!(found.interrupts_before, Some(true));
        assert!(found.undetermined.is_empty());
    }

    #[test]
    fn a_lock_that_memory_denies_is_not_concluded_from() {
        let words = [(OBJECT + 0x20, 0x1000), (OBJECT + 0x60, 1), (OBJECT + 0x70, 1)];
        let found = effects(0x2c, 0x28, &words, 0x46);
        assert_eq!(found.undetermined, [0]);
        assert!(found.held.is_empty());
    }

    #[test]
    fn memory_decides_between_paths() {
        let held = effects(0xbe, 0x10, &[(OBJECT, TASK)], 0);
        assert_eq!((held.held.len(), held.undetermined.len()), (1, 0));
        let free = effects(0xbe, 0x10, &[(OBJECT, 0)], 0);
        assert_eq!((free.held.len(), free.undetermined.len()), (0, 0));
    }

    #[test]
    fn code_without_a_path_is_undetermined() {
        // Between two instructions of `nested`.
        assert_eq!(effects(0x2d, 0x28, &[], 0).undetermined, [0]);
    }
}
