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
    mounted("fs-fallocate", "in-fallocate:/run/note"),
    mounted("fs-copy", "in-copy:/run/note"),
    mounted("fs-setattr", "in-chmod:/run/note"),
    mounted("fs-getattr", "in-stat:/run/note"),
    mounted("fs-permission", "in-open:/run/note"),
    mounted("fs-listxattr", "in-listxattr:/run/note"),
    mounted("fs-get-link", "in-readlink:/run/link"),
    mounted("fs-create", "in-create:/run/none"),
    mounted("fs-tmpfile", "in-tmpfile:/run"),
    mounted("fs-mkdir", "in-mkdir:/run/none"),
    mounted("fs-rmdir", "in-rmdir:/run/folder"),
    mounted("fs-rename", "in-move:/run/note"),
    mounted("fs-symlink", "in-symlink:/run/none"),
    mounted("fs-link", "in-link:/run/note"),
    mounted("fs-revalidate", "in-stat-again:/run/note"),
    mounted("fs-remount", "in-remount:/run"),
    mounted("fs-sync", "in-syncfs:/run"),
    // What comes before it in the list is read.
    mounted("fs-show-options", "in-mounts:/run").sees(Sight::Returned),
    mounted("fs-statfs", "in-statfs:/run"),
    mounted("fs-unlink", "in-unlink:/run/note"),
    mounted("fs-evict", "in-unlink:/run/note").sees(Sight::Value(0)),
    case("fs-put-super", "in-umount:/run").sees(Sight::Value(0)),
];
