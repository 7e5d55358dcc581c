//! What a case does to a stock guest that nobody guards: the measure for everything a repair is compared
//! with. Once as the lab's kernels are set (it must go down, and its own oops text must name the function
//! that the case expects), and once as distributions set theirs, where a guest may go on damaged.

use std::time::Duration;
use std::time::Instant;

use crate::Error;
use crate::Result;
use crate::lab::Answer;
use crate::lab::Snapshot;
use crate::lab::VmConfig;
use crate::scenario::Blame;
use crate::scenario::Case;

/// How long a guest may take to load a driver, crash and end.
const CRASH_LIMIT: Duration = Duration::from_secs(60);

/// How a stock guest went down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Downfall {
    /// The console from the crash on.
    pub console: String,
    /// Whether the text names the expected function.
    pub names_offender: bool,
    /// From the trigger to QEMU's end.
    pub took: Duration,
}

/// A guest's configuration for [`crash`]: an oops is a panic, a panic ends QEMU at once.
pub fn config(mut config: VmConfig) -> VmConfig {
    config.panic_on_oops = true;
    config.panic_timeout = -1;
    config.reboot = false;
    config
}

/// How long a guest that may go on is waited for, and how long the crashing process, in milliseconds.
const COURSE_LIMIT: Duration = Duration::from_secs(12);
const PROCESS_LIMIT: u64 = 4000;
/// How long QEMU may take to end after its connections did.
const END_LIMIT: Duration = Duration::from_millis(300);
/// How long a command afterwards may take before the guest counts as hung.
const AFTER_LIMIT: Duration = Duration::from_secs(15);

/// What became of a guest that nobody guards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Course {
    /// The kernel panicked.
    WentDown,
    /// Nothing answers any more.
    Hung,
    /// It goes on, but what the crash left behind (locks, a count, a process that waits) does harm.
    Damaged(String),
    /// It goes on as before.
    Clean,
}

impl std::fmt::Display for Course {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::WentDown => f.write_str("went down"),
            Self::Hung => f.write_str("hung"),
            Self::Damaged(why) => write!(f, "damaged: {why}"),
            Self::Clean => f.write_str("went on"),
        }
    }
}

/// The same crash on two settings of `kernel.panic_on_oops`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Courses {
    /// With 1.
    pub strict: Course,
    /// With 0.
    pub lenient: Course,
}

/// Runs a case on fresh guests of any snapshot, with the workload running, and says what becomes of them.
///
/// # Errors
/// When the lab fails, not when the guest does.
pub fn courses(case: &Case, snapshot: &Snapshot) -> Result<Courses> {
    Ok(Courses { strict: course(case, snapshot, true)?, lenient: course(case, snapshot, false)? })
}

fn course(case: &Case, snapshot: &Snapshot, panic_on_oops: bool) -> Result<Course> {
    let mut vm = snapshot.restore()?;
    // A panic ends QEMU at once: nothing else tells it from a guest that hangs.
    let set = format!(
        "exec echo {} >/proc/sys/kernel/panic_on_oops; echo -1 >/proc/sys/kernel/panic",
        u8::from(panic_on_oops)
    );
    vm.agent().command(&set)?;
    vm.agent().command("workload start")?;
    vm.agent().command(&case.load_command())?;
    let answer = vm.agent().command_within(&case.crash_command(PROCESS_LIMIT), COURSE_LIMIT);
    let answered = answer.is_ok();
    if vm.wait_exit(if answered { Duration::ZERO } else { END_LIMIT })?.is_some() {
        return Ok(Course::WentDown);
    }
    if !answered && vm.wait_for_agent(Duration::from_secs(3)).is_err() {
        let down = vm.wait_exit(Duration::ZERO)?.is_some();
        return Ok(if down { Course::WentDown } else { Course::Hung });
    }
    let waits = |answer: &Answer| answer.field("outcome") == Some("stuck");
    let waits = answer.is_ok_and(|answer| waits(&answer));
    let mut damage = waits.then(|| "the process does not come back".to_owned());
    for command in [case.check_command(), "workload verify 5000".to_owned()]
        .into_iter()
        .chain(case.after.iter().map(|&command| command.to_owned()))
    {
        match vm.agent().command_within(&command, AFTER_LIMIT) {
            Ok(answer) if sound(&answer) => {}
            Ok(answer) => damage = damage.or(Some(format!("{command}: {}", answer.text()))),
            Err(Error::Agent { reason, .. }) if vm.wait_exit(END_LIMIT)?.is_none() => {
                damage = damage.or(Some(format!("{command}: {reason}")));
            }
            Err(_) if vm.wait_exit(Duration::ZERO)?.is_some() => return Ok(Course::WentDown),
            Err(_) => return Ok(Course::Hung),
        }
    }
    Ok(damage.map_or(Course::Clean, Course::Damaged))
}

/// Whether a self-check, the workload or a command afterwards tells of no harm.
fn sound(answer: &Answer) -> bool {
    let zero = |field| answer.number(field).map_or(true, |n| n == 0);
    !answer.text().starts_with("bad") && zero("errors") && zero("stalled") && zero("status")
}

/// Runs a case on a fresh guest of a snapshot that was made with [`config`].
///
/// # Errors
/// [`Error::Timeout`] when the guest does not go down, [`Error::Agent`] when the driver does not load.
pub fn crash(case: &Case, snapshot: &Snapshot) -> Result<Downfall> {
    let mut vm = snapshot.restore()?;
    vm.agent().command(&case.load_command())?;
    let before = vm.console().len();
    let begin = Instant::now();
    // No answer is the expected answer: the connection ends with QEMU.
    let answer = vm.agent().command_within(&case.crash_command(20_000), CRASH_LIMIT);
    let status = vm.wait_exit(CRASH_LIMIT.saturating_sub(begin.elapsed()))?;
    let console = vm.console().get(before..).unwrap_or_default().to_owned();
    if status.is_none() {
        return Err(Error::Timeout {
            what: format!("the crash of {} ({answer:?})", case.name),
            limit: CRASH_LIMIT,
            console,
        });
    }
    let names_offender = names(&console, &expected_function(case)?);
    Ok(Downfall { console, names_offender, took: begin.elapsed() })
}

/// The function that the oops text must name; the kernel prints symbols, not inlined functions.
fn expected_function(case: &Case) -> Result<String> {
    Ok(match (case.blame, case.inlined_into, case.offender()?) {
        (Blame::Process { core_function }, ..) => core_function.to_owned(),
        (Blame::Driver, Some(function), _) => function.to_owned(),
        (Blame::Driver, None, place) => place.map(|place| place.function).unwrap_or_default(),
    })
}

/// Whether a function stands in the text as the kernel prints it, `name+0x…` (perhaps as a part that
/// the compiler split off), and not as a guess of the stack scan (`? name+0x…`).
fn names(console: &str, function: &str) -> bool {
    console.match_indices(function).any(|(at, _)| {
        let before = console.get(..at).unwrap_or_default();
        let after = console.get(at + function.len()..).unwrap_or_default();
        let whole = !before.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        whole && !before.ends_with("? ") && (after.starts_with("+0x") || after.starts_with('.'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_certain_names_count() {
        assert!(names("RIP: 0010:f+0x8/0x10 [m]", "f"));
        assert!(names("[ 1.0]  f.isra.0+0x8/0x10", "f"));
        assert!(!names("[ 1.0]  ? f+0x8/0x10", "f"));
        assert!(!names("[ 1.0]  of+0x8/0x10", "f"));
        assert!(!names("[ 1.0]  f_g+0x8/0x10", "f"));
    }
}
