//! crash_chardev: faults of every class, and every entry point of a character device.

use crate::scenario::Case;
use crate::scenario::Class::{
    Bug, Divide, GeneralProtection, ListCorruption, NullCall, NullDereference, Panic,
    StackOverflow, Usercopy, WildDereference,
};
use crate::scenario::Sight;

const CHARDEV: &str = "crash_chardev";

pub(super) const CASES: &[Case] = &[
    // Every class of fault in write(), with nothing held.
    Case::new("null-deref", CHARDEV, NullDereference, &[]).inlined_into("fault_null_deref"),
    Case::new("memcpy-null", CHARDEV, NullDereference, &[]),
    Case::new("null-call", CHARDEV, NullCall, &[]),
    Case::new("wild-pointer", CHARDEV, WildDereference, &[]),
    Case::new("non-canonical", CHARDEV, GeneralProtection, &[]),
    Case::new("bug", CHARDEV, Bug, &[]),
    Case::new("list-corruption", CHARDEV, ListCorruption, &[]),
    Case::new("usercopy", CHARDEV, Usercopy, &[]),
    Case::new("divide", CHARDEV, Divide, &[]),
    Case::new("panic", CHARDEV, Panic, &[]),
    Case::new("stack-overflow", CHARDEV, StackOverflow, &[]),
    // Every other entry point.
    Case::new("ioctl", CHARDEV, NullDereference, &[]).by("ioctl", "ioctl"),
    Case::new("read", CHARDEV, NullDereference, &[]).by("read", "read"),
    Case::new("open", CHARDEV, NullDereference, &[]).by("open", "open"),
    // close() tells nothing of what release() returned.
    Case::new("release", CHARDEV, NullDereference, &[])
        .by("release", "release")
        .sees(Sight::Value(0)),
    // EPOLLERR | EPOLLHUP
    Case::new("poll", CHARDEV, NullDereference, &[]).by("poll", "poll").sees(Sight::Value(0x18)),
    Case::new("mmap", CHARDEV, NullDereference, &[]).by("mmap", "mmap"),
    Case::new("seq-start", CHARDEV, NullDereference, &[]).by("seq", "seq-start"),
    Case::new("seq-show", CHARDEV, NullDereference, &[]).by("seq", "seq-show"),
];
