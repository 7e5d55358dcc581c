//! What a diagnosis says. Data only: `None` means "not determined", an empty list "determined: none".
//! Serialises to the documented JSON of an incident; addresses are hex strings.

use guest::{CodeAddress, GuestVirt, Hook, Registers, Vcpu};
use repair_image::{Damage, Prototype, SourceFrame};
use serde::Serialize;

use crate::asleep::Queued;

/// What kind of crash it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
#[non_exhaustive]
pub enum CrashClass {
    /// Access to an address in the first page.
    NullDereference,
    /// Access to an unmapped address.
    WildPointer,
    /// Write to a read-only mapping.
    WriteProtection,
    /// Instruction fetch from an address that is not code: call through a NULL or wild pointer.
    BadCall,
    /// Kernel executed or touched user memory (SMEP, SMAP).
    UserAccess,
    /// General protection fault; most often a non-canonical address.
    GeneralProtection,
    /// `BUG()` or `BUG_ON()`.
    Bug,
    /// Divide error.
    Divide,
    /// Undefined instruction that is no `BUG()`.
    InvalidOpcode,
    /// A list check failed.
    ListCorruption,
    /// Hardened usercopy refused.
    Usercopy,
    /// Fortified string function refused.
    Fortify,
    /// The allocator found an object that is freed twice.
    DoubleFree,
    /// The allocator's free list leads to no object: whoever allocates runs into it.
    SlabCorruption,
    /// A function found the canary on its stack overwritten.
    StackProtector,
    /// `WARN()` in a guest that panics on warnings.
    Warning,
    /// Kernel stack overflow.
    StackOverflow,
    /// A fault while an exception was delivered, not a stack overflow.
    DoubleFault,
    /// `panic()` called by code.
    Panic,
    /// The soft-lockup detector called `panic()`.
    SoftLockup,
    /// The hard-lockup detector called `panic()`.
    HardLockup,
    /// The hung-task detector called `panic()`.
    HungTask,
    /// The RCU stall detector called `panic()`.
    RcuStall,
    /// A CPU does not leave a piece of code, interrupts on.
    EndlessLoop,
    /// The same with interrupts off.
    EndlessLoopIrqsOff,
    /// A CPU spins for a lock that its own frames hold.
    SpinlockSelfDeadlock,
    /// CPUs spin for locks that each other's frames hold.
    SpinlockCycle,
    /// A task sleeps for a lock that it holds itself.
    LockSelfDeadlock,
    /// Tasks sleep for locks that each other hold.
    LockCycle,
    /// A task sleeps in a driver that will never wake it.
    EndlessSleep,
    /// A process takes one page fault again and again: a driver serves it without mapping anything.
    FaultLoop,
    /// Text of a function that the fault met is not what it was.
    TextCorruption,
    /// A word of read-only data that the fault met is not what it was.
    ReadOnlyDataCorruption,
    /// A gate of the IDT is not what it was.
    IdtCorruption,
    /// Another exception.
    Other {
        /// Function that reported it.
        reporter: String,
    },
}

/// How a frame was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Registers of the vCPU itself.
    Context,
    /// `struct pt_regs` that an exception entry saved.
    SavedRegisters,
    /// DWARF call-frame information: CFA and all callee-saved registers.
    Cfi,
    /// ORC for the CFA, code analysis for the callee-saved registers.
    OrcAndCode,
    /// ORC only: callee-saved registers may be missing.
    Orc,
    /// Return address taken from the stack top after a call to a bad address.
    BadCall,
}

/// One frame, innermost first. Registers are those *in* this frame (as they will be when control is in
/// it), so a caller's frame holds what a return to it must restore.
#[derive(Clone, Debug, Serialize)]
pub struct Frame {
    /// Where it executes.
    pub pc: CodeAddress,
    /// Value of rsp before the call that made this frame, guest-virtual: rsp of the caller after return.
    pub cfa: Option<GuestVirt>,
    /// Registers, as far as known.
    pub registers: Registers,
    /// How this frame was found.
    pub trust: Trust,
    /// Module name, `None` for the kernel proper.
    pub module: Option<String>,
    /// Function with compiler suffixes, `None` when the address is in no known function.
    pub function: Option<String>,
    /// Guest-virtual start of that function.
    pub function_start: Option<GuestVirt>,
    /// Inline chain with file and line, innermost first; empty when unknown.
    pub source: Vec<SourceFrame>,
    /// Guest-virtual address of the `pt_regs` that this frame's registers were read from.
    pub saved_at: Option<GuestVirt>,
}

/// Why unwinding ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UnwindEnd {
    /// At user-mode registers: the whole kernel stack was walked.
    UserMode,
    /// At the outermost kernel frame (kthread, idle).
    Outermost,
    /// No unwind row at this address.
    NoRow(GuestVirt),
    /// The stack could not be read there.
    Unreadable(GuestVirt),
    /// The CFA did not move outward.
    NotAdvancing(GuestVirt),
    /// A register that the row needs is not known.
    UnknownRegister(GuestVirt),
    /// More frames than the bound.
    TooDeep,
}

/// What a vCPU was doing for the kernel when it crashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecutionContext {
    /// On behalf of the current task.
    Task,
    /// Soft interrupt (timer, tasklet, network); the current task was only interrupted.
    Softirq,
    /// Hard interrupt; the current task was only interrupted.
    Hardirq,
    /// Non-maskable interrupt.
    Nmi,
}

/// Context and its evidence.
#[derive(Clone, Debug, Serialize)]
pub struct Context {
    /// Kind, from the preempt count and the frames.
    pub kind: ExecutionContext,
    /// Kernel CPU number.
    pub cpu: Option<usize>,
    /// Per-CPU preempt count at the hook, with the inverted NEED_RESCHED bit (31) as it stands. Of a dump: without what
    /// the kernel has added to it since the crash, where that is known.
    pub preempt_count: Option<u32>,
    /// Guest-virtual address of that count.
    pub preempt_count_at: Option<GuestVirt>,
    /// Whether interrupts were enabled at the fault (`pt_regs`) or, without one, at the hook.
    pub interrupts_enabled: Option<bool>,
    /// RCU read-side nesting of the current task.
    pub rcu_nesting: Option<i32>,
    /// Whether the current task is the idle task of its CPU.
    pub idle: bool,
}

/// A task.
#[derive(Clone, Debug, Serialize)]
pub struct Task {
    /// Guest-virtual address of its `task_struct`.
    pub at: GuestVirt,
    /// Name.
    pub comm: String,
    /// Thread id.
    pub pid: i32,
    /// Process id.
    pub tgid: i32,
    /// Whether it is a kernel thread (no user address space).
    pub kernel_thread: bool,
    /// Path's last component of the executable, when determined.
    pub executable: Option<String>,
    /// Number and name of the system call it is in.
    pub syscall: Option<String>,
}

/// Who is at fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Offender {
    /// A driver.
    Driver {
        /// Module name.
        module: String,
        /// Function without compiler suffixes.
        function: String,
        /// Innermost source place in the module.
        source: Option<SourceFrame>,
    },
    /// The core kernel, on behalf of a process.
    Process {
        /// Thread id.
        pid: i32,
        /// Process id.
        tgid: i32,
        /// Name.
        comm: String,
        /// Innermost core-kernel function that is no helper called with a bad argument.
        function: String,
        /// Its source place.
        source: Option<SourceFrame>,
    },
    /// The core kernel by itself.
    Kernel {
        /// Function.
        function: String,
        /// Its source place.
        source: Option<SourceFrame>,
    },
}

/// What a frame that would be unwound holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ResourceKind {
    /// `struct mutex`
    Mutex,
    /// `struct rw_semaphore`, for writing.
    RwsemWrite,
    /// `struct rw_semaphore`, for reading.
    RwsemRead,
    /// `struct semaphore`
    Semaphore,
    /// `spinlock_t`/`raw_spinlock_t`
    Spinlock,
    /// Spinlock taken by `spin_lock_bh`.
    SpinlockBh,
    /// Spinlock taken by `spin_lock_irq`.
    SpinlockIrq,
    /// Spinlock taken by `spin_lock_irqsave`.
    SpinlockIrqsave,
    /// `rwlock_t` for reading.
    ReadLock,
    /// `rwlock_t` for writing.
    WriteLock,
    /// RCU read-side section.
    Rcu,
    /// Bottom halves disabled.
    BottomHalves,
    /// Preemption disabled.
    Preemption,
    /// Interrupts disabled.
    Interrupts,
}

/// Result of looking into memory whether a lock is really held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Confirmation {
    /// The lock word says that the current task (or, for a spinlock, somebody) holds it.
    Confirmed,
    /// The lock word contradicts.
    Contradicted {
        /// The lock word.
        word: u64,
    },
    /// There is no lock word (RCU, preemption, interrupts).
    NotApplicable,
    /// The lock's address could not be determined or read.
    Unknown,
}

/// One held resource.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// What.
    pub kind: ResourceKind,
    /// Guest-virtual address of the lock, where it has one.
    pub lock: Option<GuestVirt>,
    /// Symbol or expression for the lock, where known.
    pub name: Option<String>,
    /// Index into the frames of the frame that took it.
    pub frame: usize,
    /// Guest-virtual address of the call or instruction that took it.
    pub taken_at: GuestVirt,
    /// Whether memory agrees.
    pub confirmed: Confirmation,
    /// Interrupt flag that its release restores, where it saved one and it could be found.
    pub saved_interrupts: Option<bool>,
}

/// What code analysis says of the frames `range`, summed up.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FrameEffects {
    /// Resources held by these frames, outermost first (release in reverse).
    pub held: Vec<Held>,
    /// What they added to the preempt count.
    pub preempt_delta: i64,
    /// What they added to the RCU nesting.
    pub rcu_delta: i64,
    /// Interrupt flag before the outermost of them ran, `None` when not determined.
    pub interrupts_before: Option<bool>,
    /// Frames (indices) whose analysis found no path or contradictory paths: nothing may be concluded.
    pub undetermined: Vec<usize>,
}

/// Where an error can be returned to.
#[derive(Clone, Debug, Serialize)]
pub struct Boundary {
    /// Index of the core-kernel frame that is returned to.
    pub frame: usize,
    /// Index of the outermost frame that is unwound (the entry point of the driver).
    pub entry: usize,
    /// Function that is returned to, without compiler suffixes.
    pub function: String,
    /// Prototype of the entry point, where known.
    pub prototype: Option<Prototype>,
    /// What the frames to be unwound hold.
    pub effects: FrameEffects,
    /// What the frames further out hold: the state that must be left.
    pub outer: FrameEffects,
}

/// The faulting instruction, explained.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// Disassembly, Intel syntax.
    pub instruction: String,
    /// Registers that it uses, by name, with their values.
    pub operands: Vec<(String, String)>,
    /// Address that was accessed (CR2 or computed), guest-virtual.
    pub accessed: Option<GuestVirt>,
    /// The operand as a source expression, `s->p`, where debug information gives it.
    pub expression: Option<String>,
    /// One sentence for people.
    pub sentence: String,
}

/// The diagnosis of one crash.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// Hook that fired, `None` for a dump.
    pub hook: Option<Hook>,
    /// vCPU that crashed.
    pub vcpu: Vcpu,
    /// Class, `None` when not determined.
    pub class: Option<CrashClass>,
    /// Title in the style of kernel developers.
    pub title: String,
    /// Stable id for bucketing: class and normalised functions, no addresses.
    pub signature: String,
    /// Context.
    pub context: Context,
    /// Current task of the vCPU.
    pub task: Option<Task>,
    /// Frames from the hook outward.
    pub frames: Vec<Frame>,
    /// Index of the frame that faulted (first one that is not the kernel's own crash reporting).
    pub fault_frame: usize,
    /// Guest-virtual address of the `pt_regs` of the fault, if an exception saved one.
    pub fault_regs_at: Option<GuestVirt>,
    /// Why unwinding ended.
    pub unwind_end: UnwindEnd,
    /// Who is at fault, `None` when not determined.
    pub offender: Option<Offender>,
    /// Why: one fact a line.
    pub evidence: Vec<String>,
    /// The faulting instruction.
    pub explanation: Option<Explanation>,
    /// Where an error could be returned to, if the offender is a driver.
    pub boundary: Option<Boundary>,
    /// Calls on the way out that could be made to fail, innermost first, if the core kernel is at fault.
    pub core_exits: Vec<Boundary>,
    /// What all frames from the fault to the outermost hold (for ending the task), in task context.
    pub all_effects: Option<FrameEffects>,
    /// Text, read-only data and gates of the IDT that are not what they were, by address.
    pub damage: Vec<Damage>,
    /// What the kernel's message says (`panic()` text, BUG file and line), if any.
    pub message: Option<String>,
    /// The queue in which the task stands, if that is what is to be ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued: Option<Queued>,
}
