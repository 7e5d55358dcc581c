//! crash_load: a driver is quarantined while others are inside it.

use crate::scenario::Class::NullDereference;
use crate::scenario::Resource::Mutex;
use crate::scenario::{Case, Sight};

const LOAD: &str = "crash_load";
const EIO: Sight = Sight::Errno("EIO");
/// `POLLERR | POLLHUP`, which a device shows that is gone.
const GONE: Sight = Sight::Value(24);

pub(super) const CASES: &[Case] = &[
    Case::new("asleep-ioctl", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,sleeper")
        .waiter_sees(EIO)
        .quarantines(),
    Case::new("asleep-poll", LOAD, NullDereference, &[Mutex])
        .by("asleep:wait", "asleep,sleeper")
        .waiter_sees(GONE)
        .quarantines(),
];
