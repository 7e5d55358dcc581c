//! SIGTERM and SIGINT: a guard is asked for an orderly end, a lab ends at once and takes its guests along. Nothing of
//! that happens in a handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};

/// Set once the user asked for the end.
#[derive(Clone)]
pub struct Ending(Arc<AtomicBool>);

impl Ending {
    /// Installs the handlers.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn on_signals() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            signal_hook::flag::register(signal, Arc::clone(&flag)).context("signal handler")?;
        }
        Ok(Self(flag))
    }

    /// Whether the end was asked for.
    #[must_use]
    pub fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// From now on SIGTERM and SIGINT end this process with all that the lab has running: a guest left behind would keep
/// its memory, and its processor, for ever.
///
/// # Errors
/// When the system refuses.
pub fn end_lab_on_signals() -> Result<()> {
    let signals = [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT];
    let mut signals = signal_hook::iterator::Signals::new(signals).context("signal handler")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            corpus::lab::end_all();
            eprintln!("defib: ended by signal {signal}");
            // As a shell tells of a process that a signal ended.
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
