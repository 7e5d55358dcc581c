//! crash_load, crash_disk: a driver is quarantined while others are inside it or wait for it.

use crate::scenario::Class::NullDereference;
use crate::scenario::Resource::Mutex;
use crate::scenario::{Case, Sight};

const LOAD: &str = "crash_load";
const EIO: Sight = Sight::Errno("EIO");
/// `POLLERR | POLLHUP`, which a device shows that is gone.
const GONE: Sight = Sight::Value(24);

/// Bit 2 of a PCI function's command register: it may use the bus.
const CARD_IS_SILENT: &str = "exec for d in /sys/bus/pci/devices/*; do grep -q 0x11e8 $d/device || continue; \
    set -- $(od -An -tu1 -j4 -N1 $d/config); test $(($1 & 4)) = 0 || exit 1; done";

pub(super) const CASES: &[Case] = &[
    Case::new("asleep-ioctl", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,sleeper")
        .waiter_sees(EIO)
        .quarantines(),
    Case::new("asleep-poll", LOAD, NullDereference, &[Mutex])
        .by("asleep:wait", "asleep,sleeper")
        .waiter_sees(GONE)
        .quarantines(),
    // No signal wakes these. One holds a mutex of the driver's, another waits for a thread of the driver's that waits.
    Case::new("asleep-event", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,gate")
        .waiter_sees(EIO)
        .quarantines(),
    Case::new("asleep-killable", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,killable")
        .waiter_sees(EIO)
        .quarantines(),
    Case::new("asleep-completion", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,filled")
        .waiter_sees(EIO)
        .quarantines(),
    Case::new("asleep-semaphore", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,left")
        .waiter_sees(EIO)
        .quarantines(),
    Case::new("asleep-kthread", LOAD, NullDereference, &[Mutex])
        .by("asleep:ioctl", "asleep,refill")
        .waiter_sees(EIO)
        .quarantines()
        .then(&["exec ! grep -q crash_refill /proc/[0-9]*/comm"]),
    // Who waits for a block of its disk sleeps in the core kernel, for a request that only the driver would end.
    Case::new("disk-dies", "crash_disk", NullDereference, &[])
        .by("asleep:read:/dev/silent", "disk-dies,wait")
        .waiter_sees(EIO)
        .quarantines()
        .logs(&["I/O error, dev silent"])
        .then(&["exec dd if=/dev/silent of=/dev/null count=1; test $? = 1", CARD_IS_SILENT]),
];
