//! SIGTERM and SIGINT ask for an orderly end; nothing else happens in a handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
