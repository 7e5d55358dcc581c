//! Limits of waits as moments on the clock.

use std::time::{Duration, Instant};

/// A deadline this far from now; a limit past what the clock can tell is an hour.
pub(crate) fn deadline(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now + Duration::from_secs(3600))
}
