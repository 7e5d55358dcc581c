//! crash_callback: callbacks under locks that belong to the core.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Resource::Mutex;
use crate::scenario::Sight;

const CALLBACK: &str = "crash_callback";

pub(super) const CASES: &[Case] = &[
    // Callbacks under locks that belong to the core.
    Case::new("sysfs", CALLBACK, NullDereference, &[Mutex]).by("sysfs", "sysfs"),
    Case::new("netdev", CALLBACK, NullDereference, &[])
        .by("netdev", "netdev")
        .sees(Sight::Returned),
];
