//! What a case of the corpus is: which driver does what, what a diagnosis must say about it, which rung
//! should save the guest, and what must hold afterwards. The cases are in `cases/`; how one is run is not here.

mod cases;

pub use cases::{case, cases};

use crate::Error;
use crate::Result;
use crate::lab;

/// What kind of fault it is, as a diagnosis names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Class {
    /// Access through a NULL pointer or near it.
    NullDereference,
    /// Access to a canonical address that is not mapped.
    WildDereference,
    /// Access to a non-canonical address: general protection.
    GeneralProtection,
    /// A call to address 0.
    NullCall,
    /// `BUG()`, `BUG_ON()`.
    Bug,
    /// The check of `list_del()`.
    ListCorruption,
    /// The check of `copy_to_user()`.
    Usercopy,
    /// Division by zero.
    Divide,
    /// A stack's guard page.
    StackOverflow,
    /// A call of `panic()`.
    Panic,
    /// A processor that does not leave a loop.
    EndlessLoop,
    /// The same with interrupts off.
    EndlessLoopIrqsOff,
    /// A spinlock that its holder waits for.
    SpinlockSelfDeadlock,
    /// Spinlocks whose holders wait for each other.
    SpinlockCycle,
    /// A mutex or rw_semaphore that its holder sleeps for.
    LockSelfDeadlock,
    /// Such locks whose holders sleep for each other.
    LockCycle,
    /// A page fault that is taken again and again.
    FaultLoop,
    /// The allocator's check for an object freed twice.
    DoubleFree,
    /// The check of the fortified string functions.
    Fortify,
    /// The canary on the stack.
    StackProtector,
    /// Kernel code that runs or touches user memory.
    UserAccess,
    /// An instruction that the processor does not know.
    InvalidOpcode,
    /// A `WARN()` where `kernel.panic_on_warn` is set.
    Warning,
    /// Text that is not what it was.
    TextCorruption,
    /// Read-only data that is not what it was.
    RodataCorruption,
    /// A gate of the IDT that is not what it was.
    IdtCorruption,
}

/// In which context the fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Context {
    /// A process's system call.
    Task,
    /// A kernel thread of the driver's own.
    KernelThread,
    /// A workqueue's thread.
    Work,
    /// Softirq: timers, tasklets.
    Softirq,
    /// Hard interrupt: device, high resolution timer.
    Hardirq,
}

/// What the faulting frames hold, outermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resource {
    /// A mutex.
    Mutex,
    /// A read-write semaphore, for reading.
    RwsemRead,
    /// A read-write semaphore, for writing.
    RwsemWrite,
    /// A spinlock.
    Spinlock,
    /// A spinlock with interrupts off and their flag saved.
    SpinlockIrqsave,
    /// A spinlock with interrupts off.
    SpinlockIrq,
    /// A spinlock with softirqs off.
    SpinlockBh,
    /// A read-write spinlock, for reading.
    ReadLock,
    /// A read-write spinlock, for writing.
    WriteLock,
    /// An RCU read section.
    Rcu,
    /// Interrupts off.
    IrqsOff,
    /// Softirqs off.
    BhOff,
    /// Preemption off.
    PreemptionOff,
}

/// The lowest rung of the recovery ladder that should save the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Rung {
    /// 1: an error is returned out of the driver.
    ReturnError,
    /// 3: the process is ended, after the locks it holds are released.
    EndProcess,
    /// 4: what was damaged of the kernel is put back.
    RepairKernel,
}

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The driver, at the line that carries the marker of the case's test.
    Driver,
    /// The process; the fault is in this function of the core kernel or below it.
    Process {
        /// The function.
        core_function: &'static str,
    },
}

/// What a process must see of a crash that was repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sight {
    /// The call failed with this errno.
    Errno(&'static str),
    /// The call gave this value.
    Value(i64),
    /// The call came back, whatever it said.
    Returned,
    /// The process was killed.
    Killed,
}

impl Sight {
    /// Whether an answer of the agent's `crash` command shows this; `prefix` is `waiter_` for the second
    /// process of a pair.
    pub fn is_shown_by(self, answer: &lab::Answer, prefix: &str) -> bool {
        let field = |name: &str| answer.field(&format!("{prefix}{name}")).unwrap_or_default();
        let outcome = field("outcome");
        match self {
            Self::Errno(name) => outcome == "returned" && field("errno") == name,
            Self::Value(value) => outcome == "returned" && field("value") == value.to_string(),
            Self::Returned => outcome == "returned",
            Self::Killed => outcome == "signal",
        }
    }
}

/// A place in a driver's source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The module.
    pub module: &'static str,
    /// The function, as the source has it (it may be inlined).
    pub function: String,
    /// The file's name.
    pub file: String,
    /// The lines that may be at fault, from 1: mostly one; where the compiler decides, more.
    pub lines: Vec<usize>,
}

/// One crash: trigger and expectations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The case's name, unique in the corpus.
    pub name: &'static str,
    /// The module, which is its device's name too.
    pub driver: &'static str,
    /// Parameters at its loading.
    pub parameters: &'static str,
    /// What the process does: the agent's name for it.
    pub operation: &'static str,
    /// What it asks the driver for; with a second process, both are named.
    pub test: &'static str,
    /// The class that the diagnosis must name.
    pub class: Class,
    /// Where the fault happens.
    pub context: Context,
    /// What is held then by the frames that must go.
    pub held: &'static [Resource],
    /// Who is to blame.
    pub blame: Blame,
    /// The function that symbols alone name, where the offender's own is inlined into another.
    pub inlined_into: Option<&'static str>,
    /// Whether any process may be the one that meets it, which then holds more, whatever it was about.
    pub by_chance: bool,
    /// The rung that should save the guest.
    pub rung: Rung,
    /// What the process must see.
    pub sees: Sight,
    /// What the second process must see, if there is one.
    pub waiter_sees: Option<Sight>,
    /// Whether the two processes may change parts: neither is more to blame than the other.
    pub either_way: bool,
    /// Agent commands that must succeed afterwards, besides the driver's self-check.
    pub after: &'static [&'static str],
    /// Whether the diagnosis must name the line.
    pub has_lines: bool,
    /// Words of the reason for which it has to be refused; `None` when the guest is to be saved.
    pub refused: Option<&'static str>,
    /// Whether it comes again until the driver is quarantined, whose device then fails with EIO.
    pub quarantined: bool,
    /// What the kernel's log may tell of afterwards, as often as it likes: the loss of the driver.
    pub logs: &'static [&'static str],
}

impl Case {
    /// The agent's command that loads the driver.
    pub fn load_command(&self) -> String {
        format!("load {} {}", self.driver, self.parameters).trim_end().to_owned()
    }

    /// The agent's command that triggers the crash; it takes at most so many milliseconds.
    pub fn crash_command(&self, milliseconds: u64) -> String {
        format!("crash {} {} {} {milliseconds}", self.driver, self.operation, self.test)
    }

    /// The agent's command for the driver's self-check.
    pub fn check_command(&self) -> String {
        format!("check {}", self.driver)
    }

    /// The line that must be found at fault; `None` when a process is to blame.
    ///
    /// # Errors
    /// [`Error::Marker`] when the driver's source does not mark it, or in more than one function.
    pub fn offender(&self) -> Result<Option<Place>> {
        match self.blame {
            Blame::Process { .. } => Ok(None),
            Blame::Driver => marked_line(self.driver, self.marker()).map(Some),
        }
    }

    /// The marker's name: the first of the tests.
    fn marker(&self) -> &'static str {
        self.test.split(',').next().unwrap_or(self.test)
    }

    /// A case that a process runs into in its own call to the driver and is told of by EIO.
    pub(super) const fn new(
        name: &'static str,
        driver: &'static str,
        class: Class,
        held: &'static [Resource],
    ) -> Self {
        Self {
            name,
            driver,
            parameters: "",
            operation: "write",
            test: name,
            class,
            context: Context::Task,
            held,
            blame: Blame::Driver,
            inlined_into: None,
            by_chance: false,
            rung: Rung::ReturnError,
            sees: Sight::Errno("EIO"),
            waiter_sees: None,
            either_way: false,
            after: &[],
            has_lines: true,
            refused: None,
            quarantined: false,
            logs: &[],
        }
    }

    pub(super) const fn by(mut self, operation: &'static str, test: &'static str) -> Self {
        self.operation = operation;
        self.test = test;
        self
    }

    /// Any process may be the one that meets it.
    pub(super) const fn by_chance(mut self) -> Self {
        self.by_chance = true;
        self
    }

    pub(super) const fn sees(mut self, sight: Sight) -> Self {
        self.sees = sight;
        self
    }

    pub(super) const fn within(mut self, context: Context) -> Self {
        self.context = context;
        self
    }

    pub(super) const fn with_parameters(mut self, parameters: &'static str) -> Self {
        self.parameters = parameters;
        self
    }

    pub(super) const fn waited_for(mut self) -> Self {
        self.waiter_sees = Some(Sight::Returned);
        self
    }

    pub(super) const fn waiter_sees(mut self, sight: Sight) -> Self {
        self.waiter_sees = Some(sight);
        self
    }

    pub(super) const fn either_way(mut self) -> Self {
        self.either_way = true;
        self
    }

    pub(super) const fn blames_process(mut self, core_function: &'static str) -> Self {
        self.blame = Blame::Process { core_function };
        self.rung = Rung::EndProcess;
        self.sees = Sight::Killed;
        self
    }

    /// The core kernel faults, and the process sees its call fail.
    pub(super) const fn fails_in(mut self, core_function: &'static str) -> Self {
        self.blame = Blame::Process { core_function };
        self
    }

    /// What was damaged is put back.
    pub(super) const fn repairs_kernel(mut self) -> Self {
        self.rung = Rung::RepairKernel;
        self
    }

    /// The process ran into it in this function of the core kernel.
    pub(super) const fn in_core(mut self, core_function: &'static str) -> Self {
        self.blame = Blame::Process { core_function };
        self
    }

    /// A driver's fault out of which no error can be returned: it costs the process.
    pub(super) const fn ends_process(mut self, sight: Sight) -> Self {
        self.rung = Rung::EndProcess;
        self.sees = sight;
        self
    }

    /// The guard may not have read the driver's file when it faults: symbols alone name the place.
    pub(super) const fn without_lines(mut self) -> Self {
        self.has_lines = false;
        self
    }

    /// Nothing may be repaired, for a reason with these words.
    pub(super) const fn refused_for(mut self, reason: &'static str) -> Self {
        self.refused = Some(reason);
        self
    }

    /// It comes again and again, until the driver is quarantined.
    pub(super) const fn quarantines(mut self) -> Self {
        self.quarantined = true;
        self
    }

    /// The kernel itself tells of what is lost.
    pub(super) const fn logs(mut self, lines: &'static [&'static str]) -> Self {
        self.logs = lines;
        self
    }

    pub(super) const fn inlined_into(mut self, function: &'static str) -> Self {
        self.inlined_into = Some(function);
        self
    }

    pub(super) const fn then(mut self, after: &'static [&'static str]) -> Self {
        self.after = after;
        self
    }
}

/// Finds the lines with a marker, and the function they are in, in a driver's source.
fn marked_line(driver: &'static str, case: &str) -> Result<Place> {
    let file = format!("{driver}.c");
    let text = lab::driver_source(&file).unwrap_or_default();
    let marker = format!("/* CRASH: {case} */");
    let found: Vec<usize> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| line.contains(&marker))
        .map(|(index, _)| index)
        .collect();
    let missing =
        || Error::Marker { driver: driver.to_owned(), case: case.to_owned(), count: found.len() };
    let function = found.first().and_then(|&first| enclosing_function(text, first));
    let function = function.ok_or_else(missing)?;
    if found.iter().any(|&line| enclosing_function(text, line).as_ref() != Some(&function)) {
        return Err(missing());
    }
    let lines = found.iter().map(|index| index + 1).collect();
    Ok(Place { module: driver, function, file, lines })
}

/// The name of the function around a line, in kernel style: its head starts in the first column.
fn enclosing_function(text: &str, index: usize) -> Option<String> {
    let heads: Vec<&str> = text.lines().take(index).collect();
    let head = heads
        .iter()
        .rev()
        .find(|line| line.starts_with(|c: char| c.is_ascii_alphabetic()) && line.contains('('))?;
    let before = head.split('(').next()?;
    let name = before.rsplit([' ', '*']).next()?;
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_case_has_its_line() {
        for case in cases() {
            let place = case.offender().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(
                place.is_none(),
                matches!(case.blame, Blame::Process { .. }),
                "{}",
                case.name
            );
        }
    }

    #[test]
    fn names_are_unique_and_plenty() {
        let names: HashSet<_> = cases().map(|case| case.name).collect();
        assert_eq!(names.len(), cases().count());
        assert!(names.len() >= 32);
    }

    #[test]
    fn offender_is_the_function_around_the_marker() {
        let place = case("null-deref").unwrap().offender().unwrap().unwrap();
        assert_eq!((place.module, place.function.as_str()), ("crash_chardev", "corrected"));
        let line = lab::driver_source("crash_chardev.c").unwrap().lines().nth(place.lines[0] - 1);
        assert!(line.unwrap().contains("calibration->gain"));
        let place = case("irqs-off").unwrap().offender().unwrap().unwrap();
        assert_eq!(place.function, "with_irqs_off");
    }

    #[test]
    fn the_compiler_may_choose_between_lines_of_one_function() {
        let place = case("stack-overflow").unwrap().offender().unwrap().unwrap();
        assert_eq!((place.function.as_str(), place.lines.len()), ("smooth", 3));
    }

    #[test]
    fn missing_marker_is_an_error() {
        let error = marked_line("crash_locks", "no-such-case").unwrap_err();
        assert!(matches!(error, Error::Marker { count: 0, .. }));
    }
}
