//! What must hold of the two things the planner reads besides a diagnosis: the policy, the payload's results.

use quarantine::Policy;
use repair_image::payload::{CallResult, MAILBOX, PAGE_TABLE, REGION_SIZE, results};

/// A policy file: what is accepted can be acted on.
///
/// # Panics
/// When that does not hold.
pub fn policy(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Policy::parse(text) {
        Ok(policy) => {
            assert!(policy.strikes > 0 && policy.max_downtime().as_millis() > 0);
            assert!(policy.never_kill.iter().all(|name| policy.protects_process(name)));
            assert!(policy.never_quarantine.iter().all(|name| policy.protects_driver(name)));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The payload's mailbox as the guest left it: calls were begun in order, at most one is under way.
///
/// # Panics
/// When that does not hold.
pub fn payload_results(data: &[u8]) {
    let mut region = vec![0; REGION_SIZE as usize];
    let mailbox = region.get_mut(MAILBOX as usize..PAGE_TABLE as usize).expect("constants");
    for (to, from) in mailbox.iter_mut().zip(data) {
        *to = *from;
    }
    let _ = results(data);
    let Some(found) = results(&region) else { return };
    let stage = |result: &CallResult| match result {
        CallResult::Returned(_) => 0,
        CallResult::Begun => 1,
        CallResult::NotBegun => 2,
    };
    assert!(found.is_sorted_by_key(stage), "{found:?}");
    assert!(found.iter().filter(|result| **result == CallResult::Begun).count() <= 1);
}
