//! crash_fops: the rarer calls of a character device, and the ways by which the common ones are reached.

use crate::scenario::Case;
use crate::scenario::Class::{FaultLoop, NullDereference};
use crate::scenario::Sight;

const FOPS: &str = "crash_fops";

const fn case(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, FOPS, NullDereference, &[]).by(operation, name)
}

const fn fault_loop(name: &'static str, operation: &'static str, test: &'static str) -> Case {
    Case::new(name, FOPS, FaultLoop, &[]).by(operation, test).sees(Sight::Errno("EFAULT"))
}

pub(super) const CASES: &[Case] = &[
    // Page faults of a process in the driver's mapping, under the core's mmap lock. The process gets
    // SIGBUS, which the agent shows as EFAULT.
    case("vm-fault", "fault:/dev/crash_fops").sees(Sight::Errno("EFAULT")),
    case("vm-mkwrite", "mkwrite:/dev/crash_fops").sees(Sight::Errno("EFAULT")),
    // The same faults, taken again and again: nothing is ever mapped. The function that does so is to blame from its
    // head on.
    fault_loop("fault-loop", "fault:/dev/crash_fops", "fault-loop"),
    fault_loop("fault-loop-syscall", "fault-write:/dev/crash_fops", "fault-loop"),
    fault_loop("mkwrite-loop", "mkwrite:/dev/crash_fops", "mkwrite-loop"),
    case("vm-open", "fork:/dev/crash_fops").sees(Sight::Value(0)),
    case("vm-close", "munmap:/dev/crash_fops").sees(Sight::Value(0)),
    case("llseek", "lseek:/dev/crash_fops"),
    case("fsync", "fsync:/dev/crash_fops"),
    case("fasync", "fasync:/dev/crash_fops"),
    // close() gives the result of flush().
    case("flush", "flush:/dev/crash_fops"),
    case("splice-read", "splice:/dev/crash_fops"),
    case("splice-write", "unsplice:/dev/crash_fops"),
    case("compat-ioctl", "compat:/dev/crash_fops"),
    case("file-lock", "lock:/dev/crash_fops"),
    case("fdinfo", "fdinfo:/dev/crash_fops").sees(Sight::Value(0)),
    // The error makes the file ready; epoll_wait() asks the driver again.
    case("epoll", "epoll:/dev/crash_fops").sees(Sight::Value(1)),
    // For select() a failed device is readable.
    case("select", "select:/dev/crash_fops").sees(Sight::Value(1)),
    // One function of the driver, many ways to it.
    case("read-iter", "read:/dev/crash_fops"),
    case("write-iter", "write:/dev/crash_fops"),
    case("preadv", "preadv:/dev/crash_fops"),
    case("uring-read", "uring-read:/dev/crash_fops"),
    case("uring-write", "uring-write:/dev/crash_fops"),
    case("uring-worker", "uring-worker:/dev/crash_fops"),
    case("aio-read", "aio:/dev/crash_fops"),
];
