//! What the VMM tells of the machine as a whole.

use std::sync::Arc;

use guest::StopReason;

use super::shared::Shared;

/// The VMM's side of the guard for events that are not one vCPU's. To be cloned to where devices are emulated. No
/// method waits.
#[derive(Clone)]
pub struct Reporter {
    shared: Arc<Shared>,
}

impl Reporter {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The guest wrote "panicked" to its pvpanic device. Called in a vCPU's thread, the stop is that vCPU's.
    pub fn panicked(&self) {
        self.shared.tell(StopReason::Panicked);
    }

    /// The guest is being reset: hooks and fresh memory are void. vCPUs come to stand at their next `KVM_RUN` until the
    /// guard has taken note; so this is to be called before their registers are reset or right after it.
    pub fn reset(&self) {
        self.shared.tell(StopReason::Reset);
    }

    /// The VM has ended: vCPUs that stand for the guard leave with [`super::Next::Yours`], and the guard is told that
    /// the machine is gone.
    pub fn ended(&self) {
        self.shared.end();
    }
}
