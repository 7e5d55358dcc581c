//! crash_block: disks that take requests, and one that takes bios.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Resource::Spinlock;
use crate::scenario::Sight;

const BLOCK: &str = "crash_block";

const fn case(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, BLOCK, NullDereference, &[]).by(operation, name)
}

/// A block is read past the page cache, which would try again.
const READ: &str = "sh:dd+if=/dev/crash_disk+of=/dev/null+bs=4096+count=1+iflag=direct";
/// A block is written and waited for.
const WRITE: &str = "sh:dd+if=/dev/zero+of=/dev/crash_disk+bs=4096+count=1+conv=fsync";

/// A request ends with an I/O error, and dd says so.
const fn failed(name: &'static str, test: &'static str, operation: &'static str) -> Case {
    Case::new(name, BLOCK, NullDereference, &[]).by(operation, test).sees(Sight::Value(1))
}

pub(super) const CASES: &[Case] = &[
    failed("queue-rq", "queue-rq", READ),
    failed("queue-rq-started", "queue-rq-started", READ),
    Case { held: &[Spinlock], ..failed("queue-rq-spinlock", "queue-rq-spinlock", READ) },
    failed("queue-rq-write", "queue-rq-started", WRITE),
    // What was to be read ahead failed; the page cache reads the block itself then.
    Case::new("queue-rq-ahead", BLOCK, NullDereference, &[])
        .by("read:/dev/crash_disk", "queue-rq-started")
        .sees(Sight::Value(64)),
    // Whether the bio is on its way somewhere is not known: to end it may end it twice.
    case("submit-bio", "read:/dev/crash_bios").refused_for("the I/O would never end"),
    case("disk-open", "open:/dev/crash_disk"),
    case("disk-release", "close:/dev/crash_disk").sees(Sight::Value(0)),
    case("disk-ioctl", "ioctl:/dev/crash_disk"),
];
