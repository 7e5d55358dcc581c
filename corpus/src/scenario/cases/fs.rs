//! crash_fs: a file system's operations, under locks of the core's.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Resource::RwsemWrite;
use crate::scenario::Sight;

const FS: &str = "crash_fs";

const fn case(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, FS, NullDereference, &[]).by(operation, name)
}

/// While it is mounted at /run.
const fn mounted(name: &'static str, operation: &'static str) -> Case {
    case(name, operation).then(&["exec umount /run"])
}

pub(super) const CASES: &[Case] = &[
    case("fs-mount", "mount:/run"),
    case("fs-fill-super", "mount:/run"),
    mounted("fs-lookup", "in-stat:/run/note"),
    mounted("fs-readdir", "in-readdir:/run"),
    mounted("fs-read", "in-read:/run/note"),
    // The file's lock was taken by the file system itself.
    Case { held: &[RwsemWrite], ..mounted("fs-write", "in-write:/run/note") },
    mounted("fs-fsync", "in-fsync:/run/note"),
    mounted("fs-statfs", "in-statfs:/run"),
    mounted("fs-unlink", "in-unlink:/run/note"),
    mounted("fs-evict", "in-unlink:/run/note").sees(Sight::Value(0)),
    case("fs-put-super", "in-umount:/run").sees(Sight::Value(0)),
];
