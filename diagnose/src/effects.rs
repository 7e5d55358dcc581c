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
    /// Whether the frames reach out to the entry, so that no frame outside them can hold what one of
    /// them gives back.
    pub whole: bool,
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
    let looker = Looker { image, memory, around };
    let mut candidates = Vec::new();
    for index in range {
        let Some(frame) = frames.get(index) else { continue };
        candidates.push((index, looker.candidates(cache, frame)));
    }
    let mut summary = Summary::default();
    for (index, one) in &candidates {
        match one.as_ref().and_then(|one| one.chosen(&summary.given_back)) {
            Some(list) => summary.add(list, *index),
            None => summary.undetermined.push(*index),
        }
    }
    if around.whole && !summary.is_balanced() {
        summary = balanced(&candidates).unwrap_or(summary);
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

    fn is_given_back(&self) -> bool {
        self.item.standing == Standing::GivenBack
    }

    fn is_contradicted(&self) -> bool {
        matches!(self.confirmed, Confirmation::Contradicted { .. })
    }

    /// Whether both speak of the same thing, wherever it was taken. An address that is not known is
    /// the same as none.
    fn is_of(&self, other: &Self) -> bool {
        let (own, others) = (self.item.effect, other.item.effect);
        let one_lock = match (self.lock, other.lock) {
            (Some(own), Some(others)) => own == others,
            _ => own.lock == Lock::None && others.lock == Lock::None,
        };
        (own.class, own.also, own.amount) == (others.class, others.also, others.amount) && one_lock
    }

    /// Whether `inner`, given back by a frame further in, is this one.
    fn is_ended_by(&self, inner: &Self) -> bool {
        !self.is_given_back() && self.is_of(inner)
    }
}

struct Looker<'a> {
    image: &'a RepairImage,
    memory: &'a dyn VirtMemory,
    around: &'a Around,
}

impl Looker<'_> {
    /// What one frame may hold; `None` when its code does not say.
    fn candidates(&self, cache: &mut CodeCache, frame: &Frame) -> Option<Candidates> {
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
        let giving = match frame.pc {
            CodeAddress::Return(_) => analysis.gives_at(&table, frame.pc),
            CodeAddress::Exact(_) => None,
        };
        Some(Candidates { lists, giving })
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
            // Who took it since, if anyone, is not of interest.
            _ if item.standing == Standing::GivenBack => Confirmation::NotApplicable,
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

/// Whether two lists say the same. Where a resource was taken does not matter as long as it is known
/// to be the same one: a loop that waits drops its lock and takes it again at another place.
fn same(a: &[Resolved], b: &[Resolved]) -> bool {
    let alike = |(x, y): (&Resolved, &Resolved)| {
        (x.item.site == y.item.site && x.lock == y.lock || x.is_of(y))
            && x.item.standing == y.item.standing
            && x.saved == y.saved
    };
    a.len() == b.len() && a.iter().zip(b).all(alike)
}

/// What one frame may hold: a list for each way that its code may have been gone through.
struct Candidates {
    lists: Vec<Vec<Resolved>>,
    /// What the call gives back that the frame stands in.
    giving: Option<Class>,
}

impl Candidates {
    /// What the frame holds; `None` when that is not determined. What frames further in gave back
    /// without having taken it may be this frame's, and then its lock word says nothing.
    fn chosen(&self, given_back: &[(Resolved, usize)]) -> Option<Vec<Resolved>> {
        let ended = |one: &Resolved| given_back.iter().any(|(inner, _)| one.is_ended_by(inner));
        self.credible(choose(&self.lists, ended)?, ended)
    }

    /// A list, unless memory denies it.
    fn credible(
        &self,
        list: &[Resolved],
        ended: impl Fn(&Resolved) -> bool,
    ) -> Option<Vec<Resolved>> {
        // In the middle of a call that gives it back, the lock may be free already.
        let gone = |one: &Resolved| {
            one.is_contradicted() && !ended(one) && self.giving == Some(one.item.effect.class)
        };
        let list: Vec<Resolved> = list.iter().filter(|one| !gone(one)).cloned().collect();
        let doubtful = |one: &Resolved| {
            one.is_contradicted() && !ended(one) || one.item.effect.class == Class::Foreign
        };
        (!list.iter().any(doubtful)).then_some(list)
    }
}

/// The one list that memory speaks for: each of its locks is confirmed (or was ended by a frame
/// further in), and of the others' locks none that it has not.
fn choose(lists: &[Vec<Resolved>], ended: impl Fn(&Resolved) -> bool) -> Option<&[Resolved]> {
    if let [only] = lists {
        return Some(only);
    }
    let sure = |one: &Resolved| one.confirmed == Confirmation::Confirmed || ended(one);
    let fits = |list: &&Vec<Resolved>| {
        let has = |one: &Resolved| list.iter().any(|own| own.lock == one.lock);
        list.iter().all(sure) && !lists.iter().flatten().any(|one| sure(one) && !has(one))
            // Without a lock word nothing speaks for or against an entry.
            && lists.iter().flatten().all(|one| one.lock.is_some())
    };
    let mut fitting = lists.iter().filter(fits);
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

/// Most combinations of lists that are tried.
const MAX_COMBINATIONS: usize = 64;

/// The one combination of lists in which each release has a frame further out that took what it gave
/// back. To be asked only of frames that reach out to the entry: what really happened is among the
/// combinations then.
fn balanced(candidates: &[(usize, Option<Candidates>)]) -> Option<Summary> {
    let mut ways = vec![Summary::default()];
    for (index, candidates) in candidates {
        let candidates = candidates.as_ref()?;
        let mut next = Vec::new();
        for way in &ways {
            for list in &candidates.lists {
                let ended =
                    |one: &Resolved| way.given_back.iter().any(|(inner, _)| one.is_ended_by(inner));
                let Some(list) = candidates.credible(list, ended) else { continue };
                let mut way = way.clone();
                way.add(list, *index);
                next.push(way);
            }
        }
        if next.len() > MAX_COMBINATIONS {
            return None;
        }
        ways = next;
    }
    ways.retain(Summary::is_balanced);
    let [way] = ways.as_slice() else { return None };
    // A lock that names the current task as its owner can't be left out; any other word may be chance.
    let lists = candidates.iter().filter_map(|(_, one)| one.as_ref()).flat_map(|one| &one.lists);
    let mut owned =
        lists.flatten().filter(|one| one.is_owned() && one.confirmed == Confirmation::Confirmed);
    owned.all(|one| way.held.iter().any(|(held, _)| held.is_of(one))).then(|| way.clone())
}

/// What the frames looked at so far hold, innermost first.
#[derive(Clone, Default)]
struct Summary {
    /// Innermost first.
    held: Vec<(Resolved, usize)>,
    undetermined: Vec<usize>,
    /// Given back for frames further out than those looked at so far.
    given_back: Vec<(Resolved, usize)>,
}

impl Summary {
    /// Adds what frame `index` holds, in the order in which it was taken; frames come innermost first.
    fn add(&mut self, list: Vec<Resolved>, index: usize) {
        for one in list.into_iter().rev() {
            if one.is_given_back() {
                self.given_back.push((one, index));
                continue;
            }
            match self.given_back.iter().position(|(inner, _)| one.is_ended_by(inner)) {
                Some(ended) => drop(self.given_back.remove(ended)),
                None => self.held.push((one, index)),
            }
        }
    }

    /// Whether everything is determined and nothing was given back that none of the frames took.
    fn is_balanced(&self) -> bool {
        let flag = |(one, _): &(Resolved, usize)| one.item.effect.class == Class::Interrupts;
        self.undetermined.is_empty() && self.given_back.iter().all(flag)
    }

    fn finish(mut self, counted: Option<bool>, interrupts: Option<bool>) -> FrameEffects {
        self.held.reverse();
        // What was not taken by any of the frames belongs to one outside the range. The interrupt flag
        // can be followed nevertheless: only what it was before can't.
        let switched_on = |(one, _): &(Resolved, usize)| one.item.effect.class == Class::Interrupts;
        let enabled_interrupts = self.given_back.iter().any(switched_on);
        self.given_back.retain(|one| !switched_on(one));
        self.undetermined.extend(self.given_back.iter().map(|(_, index)| *index));
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
        for (one, _) in &self.given_back {
            effects.preempt_delta -= preempt(one);
            effects.rcu_delta -= rcu(one);
        }
        let switches = |one: &Resolved| {
            one.item.effect.class == Class::Interrupts
                || matches!(one.item.effect.also, Also::Irq | Also::IrqSave)
        };
        let outermost = self.held.iter().find(|(one, _)| switches(one));
        effects.interrupts_before = match outermost {
            _ if enabled_interrupts || !self.undetermined.is_empty() => None,
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
    use crate::code::Effect;
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
        let around = Around {
            task: Some(GuestVirt(TASK)),
            interrupts_enabled: Some(false),
            ..Around::default()
        };
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
    fn a_lock_taken_again_elsewhere_in_a_loop_is_the_same() {
        let held = effects(0x151, 0x10, &[(OBJECT, TASK)], 0);
        assert_eq!((held.held.len(), held.undetermined.len()), (1, 0));
        assert_eq!(held.held[0].lock, Some(GuestVirt(OBJECT)));
        assert_eq!(effects(0x151, 0x10, &[(OBJECT, 0)], 0).undetermined, [0]);
    }

    /// `worked` was called by `worker`, which thinks the lock is at `outer`.
    fn given_back_further_in(range: Range<usize>, outer: Option<u64>, word: u64) -> FrameEffects {
        let (image, mut machine) = fixture::kernel();
        store(&mut machine, OBJECT, word);
        let rsp = DATA + 0x100;
        let inner = registers(0x12c, rsp).with(Reg::Rbx, OBJECT);
        let outer = outer
            .into_iter()
            .fold(registers(0x121, rsp + 0x10), |registers, lock| registers.with(Reg::Rbx, lock));
        let frames = [
            frame(inner, rsp + 0x10, CodeAddress::Exact(GuestVirt(TEXT + 0x12c))),
            frame(outer, rsp + 0x20, CodeAddress::Return(GuestVirt(TEXT + 0x121))),
        ];
        let around = Around {
            task: Some(GuestVirt(TASK)),
            interrupts_enabled: Some(true),
            ..Around::default()
        };
        of(&image, &machine.space(), &mut CodeCache::new(), &frames, range, &around)
    }

    #[test]
    fn a_frame_further_in_ends_what_its_caller_holds() {
        // Whether another CPU has taken it since does not matter.
        for word in [0, 1] {
            let both = given_back_further_in(0..2, Some(OBJECT), word);
            assert!(both.held.is_empty() && both.undetermined.is_empty(), "{both:?}");
            assert_eq!((both.preempt_delta, both.interrupts_before), (0, Some(true)));
        }
    }

    #[test]
    fn what_a_frame_outside_the_range_holds_is_not_concluded_from() {
        let inner = given_back_further_in(0..1, Some(OBJECT), 0);
        assert_eq!((inner.undetermined, inner.preempt_delta), (vec![0], -1));
        let outer = given_back_further_in(1..2, Some(OBJECT), 0);
        assert_eq!(outer.undetermined, [1]);
    }

    #[test]
    fn a_release_further_in_tells_ways_apart() {
        let lock = |at: u64, standing: Standing, confirmed: Confirmation| Resolved {
            item: Item {
                effect: Effect::plain(Class::Spin),
                lock: None,
                saved: None,
                site: at,
                standing,
            },
            lock: Some(GuestVirt(at)),
            name: None,
            confirmed,
            saved: None,
        };
        let released = lock(1, Standing::GivenBack, Confirmation::NotApplicable);
        let taken = lock(1, Standing::Held, Confirmation::Contradicted { word: 0 });
        let other = lock(2, Standing::Held, Confirmation::Confirmed);
        let frame = |lists: &[&[&Resolved]]| {
            let own = |list: &&[&Resolved]| list.iter().map(|&one| one.clone()).collect();
            Some(Candidates { lists: lists.iter().map(own).collect(), giving: None })
        };
        let found = |outer| balanced(&[(0, frame(&[&[&released]])), (1, outer)]);
        let way = found(frame(&[&[&taken], &[&other]])).expect("one way is left");
        assert!(way.held.is_empty() && way.is_balanced());
        // Two ways that would both do, none, and a frame of which nothing is known.
        assert!(found(frame(&[&[&taken], &[&other, &taken]])).is_none());
        assert!(found(frame(&[&[&other]])).is_none());
        assert!(found(None).is_none());
    }

    #[test]
    fn another_lock_or_an_unknown_one_is_not_ended() {
        let other = given_back_further_in(0..2, Some(OBJECT + 8), 0);
        assert_eq!(other.undetermined, [0, 1]);
        let unknown = given_back_further_in(0..2, None, 0);
        assert_eq!(unknown.undetermined, [0]);
    }

    #[test]
    fn code_without_a_path_is_undetermined() {
        // Between two instructions of `nested`.
        assert_eq!(effects(0x2d, 0x28, &[], 0).undetermined, [0]);
    }
}
