//! What a case does to a stock guest that nobody guards: it must go down, and its own oops text must
//! name the function that the case expects. The measure for everything a repair is compared with.

use std::time::Duration;
use std::time::Instant;

use crate::Error;
use crate::Result;
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
