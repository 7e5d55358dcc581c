//! Why a rung of the ladder is not taken: typed, and in words that a person understands.

use guest::GuestVirt;
use serde::Serialize;
use thiserror::Error;

use crate::Rung;

/// A rung and why it is not taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// The rung.
    pub rung: Rung,
    /// Why.
    pub reason: Reason,
    /// The same in words.
    pub text: String,
}

impl Refusal {
    pub(crate) fn new(rung: Rung, reason: Reason) -> Self {
        Self { rung, text: reason.to_string(), reason }
    }
}

/// Why a rung is not taken. Each is a precondition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Error)]
#[serde(rename_all = "snake_case", tag = "code")]
#[non_exhaustive]
pub enum Reason {
    /// The policy does not allow the rung.
    #[error("the policy does not allow it")]
    NotAllowed,
    /// The policy names this driver as one never to quarantine.
    #[error("the policy says never to quarantine the driver {module}")]
    ProtectedDriver {
        /// Module name.
        module: String,
    },
    /// The policy names this process as one never to kill, or it is process 1.
    #[error("the process {comm} (pid {pid}) is protected")]
    ProtectedProcess {
        /// Thread id.
        pid: i32,
        /// Name.
        comm: String,
    },
    /// The driver has strikes left.
    #[error("not needed yet: {module} has {strikes} of {limit} strikes")]
    StrikesLeft {
        /// Module name.
        module: String,
        /// Crashes counted, this one included.
        strikes: u32,
        /// Crashes that lead to quarantine.
        limit: u32,
    },
    /// Text, read-only data and IDT are as they were.
    #[error("nothing is damaged that the kernel never writes")]
    NoDamage,
    /// More is damaged than a flipped bit or a stray write explains.
    #[error("{pieces} pieces with {bytes} bytes differ from the healthy guest: that is no damage")]
    TooMuchDamage {
        /// Pieces.
        pieces: usize,
        /// Bytes.
        bytes: usize,
    },
    /// The fault can't be retried after the damage is put back.
    #[error("the fault cannot be retried: {why}")]
    NotRetryable {
        /// Why.
        why: String,
    },
    /// The damage stays, and would be met again.
    #[error("not enough: what is damaged would be met again")]
    DamageStays,
    /// A lower rung repairs it.
    #[error("not needed: a lower rung repairs it")]
    NotNeeded,
    /// The driver has used up its strikes.
    #[error("not enough: {module} has crashed {strikes} times")]
    StrikesUsedUp {
        /// Module name.
        module: String,
        /// Crashes counted, this one included.
        strikes: u32,
    },
    /// The driver has used up its strikes, and what it does breaks memory.
    #[error("{module} has broken memory and crashed {strikes} times: only a quarantine would do")]
    BrokenMemory {
        /// Module name.
        module: String,
        /// Crashes counted, this one included.
        strikes: u32,
    },
    /// The last repair of the same crash did not last.
    #[error("not enough: the same crash came back while its repair was on probation")]
    CameBack,
    /// Nobody is known to be at fault.
    #[error("it is not determined who is at fault")]
    NoOffender,
    /// The offender is not what the rung quarantines.
    #[error("no {wanted} is at fault")]
    OtherOffender {
        /// What the rung needs: `driver` or `process`.
        wanted: &'static str,
    },
    /// There is no core-kernel caller to return to.
    #[error("no caller in the core kernel was found that could be handed an error")]
    NoBoundary,
    /// No call between the fault of the core kernel and user mode is known to be one that may fail.
    #[error("no call on the way out of {function} is known to be one that may fail")]
    NoSafeReturn {
        /// The core-kernel function at fault.
        function: String,
    },
    /// A part of the diagnosis contradicts another.
    #[error("the diagnosis contradicts itself: {what}")]
    Inconsistent {
        /// What does not fit.
        what: String,
    },
    /// A register that the caller needs back is not known.
    #[error("the value of {register} in {function} is not known")]
    UnknownRegister {
        /// Register name.
        register: &'static str,
        /// The caller.
        function: String,
    },
    /// The return address is no longer on the stack.
    #[error("the stack at {at} holds {found:#x} instead of the return address {expected}")]
    ReturnAddressGone {
        /// Where the return address should be, guest-virtual.
        at: GuestVirt,
        /// What is there.
        found: u64,
        /// The return address.
        expected: GuestVirt,
    },
    /// Guest memory that the plan depends on can't be read.
    #[error("{what} at {at} cannot be read")]
    Unreadable {
        /// What.
        what: String,
        /// Where, guest-virtual.
        at: GuestVirt,
    },
    /// The type of what the caller expects is not known.
    #[error("it is not known what type of value {function} expects from {entry}")]
    UnknownReturnType {
        /// The caller.
        function: String,
        /// The function it called.
        entry: String,
    },
    /// No value of the type is known to mean an error here.
    #[error("no value of type {shape} is known to mean an error to {function}")]
    NoErrorValue {
        /// The type.
        shape: String,
        /// The caller.
        function: String,
    },
    /// The caller would do harm whatever it is handed.
    #[error("{function} can be handed nothing: {why}")]
    NotReturnable {
        /// The caller.
        function: String,
        /// Why.
        why: String,
    },
    /// Code analysis could not tell what a frame holds.
    #[error("it is not determined what {} held when the kernel crashed", .functions.join(", "))]
    Undetermined {
        /// The functions.
        functions: Vec<String>,
    },
    /// Nothing was determined of what the frames hold.
    #[error("it was not determined what the task holds")]
    NoEffects,
    /// Memory says that a lock is not held that code analysis says is held.
    #[error("{lock} should be held according to the code, but memory holds {word:#x}")]
    LockNotHeld {
        /// The lock.
        lock: String,
        /// Its lock word.
        word: u64,
    },
    /// A held lock's address is not known.
    #[error("a {lock} is held whose address is not known")]
    UnknownLock {
        /// The lock.
        lock: String,
    },
    /// The kernel has no function that is needed.
    #[error("this kernel has no function {name}")]
    MissingFunction {
        /// The function.
        name: String,
    },
    /// The kernel has no structure member that is needed.
    #[error("this kernel has no member {structure}.{path}")]
    MissingMember {
        /// Structure.
        structure: String,
        /// Member.
        path: String,
    },
    /// The preempt count is not known.
    #[error("the preempt count is not known")]
    UnknownPreemptCount,
    /// The preempt count does not fit what was found to be held.
    #[error(
        "the preempt count is {found:#x}, but what is known to be held explains {explained:#x}: \
         something is held that was not found"
    )]
    PreemptMismatch {
        /// Count in memory, without the inverted NEED_RESCHED bit.
        found: u32,
        /// Count that context and held locks explain.
        explained: u32,
    },
    /// The RCU nesting does not fit what was found to be held.
    #[error("the RCU nesting is {found}, but the known sections explain {explained}")]
    RcuMismatch {
        /// Nesting in memory.
        found: i64,
        /// Nesting that is explained.
        explained: i64,
    },
    /// It is not known whether the caller expects interrupts on or off.
    #[error("it is not known whether {function} expects interrupts enabled")]
    UnknownInterrupts {
        /// The caller.
        function: String,
    },
    /// In this context nothing can be repaired this way.
    #[error("the crash is in {context} context")]
    Context {
        /// Words for the context.
        context: &'static str,
    },
    /// The processor could not deliver an interrupt or exception, for want of a stack.
    #[error("an interrupt may have been lost in delivery: it is in service for ever")]
    LostInterrupt,
    /// The registers that the exception saved are not found.
    #[error("the registers saved at the crash were not found on the stack")]
    NoSavedRegisters,
    /// The driver's module is not in the image.
    #[error("the module {module} is not known to the repair image")]
    UnknownModule {
        /// Module name.
        module: String,
    },
    /// Entry points exist whose type is not known.
    #[error("the type of {} is not known, so it cannot be made to fail cleanly", .functions.join(", "))]
    UntypedEntries {
        /// The functions.
        functions: Vec<String>,
    },
    /// No entry point was found.
    #[error("no entry points of {module} were found")]
    NoEntries {
        /// Module name.
        module: String,
    },
    /// An entry point cannot be patched.
    #[error("{function} cannot be patched: {why}")]
    Unpatchable {
        /// The function.
        function: String,
        /// Why.
        why: String,
    },
    /// A task or vCPU stands where a patch would go.
    #[error("{who} stands inside the first instructions of {function}")]
    Occupied {
        /// Task or vCPU.
        who: String,
        /// The function.
        function: String,
    },
    /// The crash has broken what the guest can't go on without.
    #[error("{what} is broken: {at:#x} holds {found:#x} instead of {expected:#x}")]
    Broken {
        /// What is broken.
        what: &'static str,
        /// Where, guest-virtual.
        at: GuestVirt,
        /// What is there.
        found: u64,
        /// What should be there.
        expected: u64,
    },
    /// The crash has broken a list of free memory.
    #[error("a list of free {cache} objects is broken: at {at:#x} it leads to {found:#x}")]
    BrokenFreeList {
        /// The slab cache.
        cache: String,
        /// Where, guest-virtual.
        at: GuestVirt,
        /// Where it leads.
        found: u64,
    },
    /// The crash has broken what is known of a piece of memory.
    #[error("the slab at {at:#x} is broken: {cache:#x} is no slab cache")]
    BrokenSlab {
        /// Its `struct slab`, guest-virtual.
        at: GuestVirt,
        /// What it names as its cache.
        cache: GuestVirt,
    },
    /// What would be abandoned may have taken a lock that names no owner.
    #[error(
        "the {what} at {at:#x} is locked, and nothing says that somebody else has to unlock it"
    )]
    BitLocked {
        /// What is locked.
        what: &'static str,
        /// Its `struct page` or `struct buffer_head`, guest-virtual.
        at: GuestVirt,
    },
    /// There is no task that can be ended.
    #[error("there is no user process that could be ended")]
    NoProcess,
    /// The task is in a state in which it can't be ended.
    #[error("the task cannot be ended: {why}")]
    TaskState {
        /// Why.
        why: String,
    },
}
