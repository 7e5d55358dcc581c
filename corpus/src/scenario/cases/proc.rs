//! crash_proc: files of proc, debugfs and sysfs, whose callers are helpers of these file systems.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Sight;

const PROC: &str = "crash_proc";

const fn case(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, PROC, NullDereference, &[]).by(operation, name)
}

pub(super) const CASES: &[Case] = &[
    case("proc-read", "read:/proc/crash_proc"),
    case("proc-write", "write:/proc/crash_proc"),
    case("proc-open", "open:/proc/crash_proc"),
    // close() tells nothing of what release() returned.
    case("proc-release", "close:/proc/crash_proc").sees(Sight::Value(0)),
    case("proc-ioctl", "ioctl:/proc/crash_proc"),
    // EPOLLERR | EPOLLHUP
    case("proc-poll", "poll:/proc/crash_proc").sees(Sight::Value(0x18)),
    case("proc-mmap", "mmap:/proc/crash_proc"),
    case("proc-lseek", "lseek:/proc/crash_proc"),
    // What was shown before the error is given, and stop() is for tidying up only.
    case("seq-next", "read:/proc/crash_proc_rows").sees(Sight::Value(4)),
    case("seq-stop", "read:/proc/crash_proc_rows").sees(Sight::Value(12)),
    case("proc-single", "read:/proc/crash_proc_single"),
    case("debugfs-read", "read:/sys/kernel/debug/crash_proc/raw"),
    case("debugfs-write", "write:/sys/kernel/debug/crash_proc/raw"),
    case("debugfs-open", "open:/sys/kernel/debug/crash_proc/raw"),
    case("debugfs-release", "close:/sys/kernel/debug/crash_proc/raw").sees(Sight::Value(0)),
    // The attribute's mutex is the core's.
    case("debugfs-get", "read:/sys/kernel/debug/crash_proc/number"),
    case("debugfs-set", "write:/sys/kernel/debug/crash_proc/number"),
    case("sysfs-show", "read:/sys/class/misc/crash_proc/limit"),
    case("sysfs-bin-read", "read:/sys/class/misc/crash_proc/blob"),
    case("sysfs-bin-write", "write:/sys/class/misc/crash_proc/blob"),
    // Under the lock of all module parameters, which is the core's.
    case("param-set", "write:/sys/module/crash_proc/parameters/level"),
    case("param-get", "read:/sys/module/crash_proc/parameters/level"),
];
