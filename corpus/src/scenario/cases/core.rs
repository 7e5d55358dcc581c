//! crash_core: a driver that damages what the core kernel then trips over on behalf of a process.

use crate::scenario::Case;
use crate::scenario::Class::{NullCall, NullDereference, Panic};
use crate::scenario::Resource::{Mutex, Rcu, RwsemRead};

const CORE: &str = "crash_core";

pub(super) const CASES: &[Case] = &[
    // The system call fails: what it holds is given back.
    Case::new("getcwd", CORE, NullDereference, &[Rcu])
        .by("getcwd", "getcwd")
        .fails_in("__do_sys_getcwd"),
    Case::new("uname", CORE, NullDereference, &[RwsemRead])
        .by("uname", "uname")
        .fails_in("__do_sys_newuname")
        .then(&["exec hostname lab"]),
    // One that changes something of the kernel's costs the process.
    Case::new("sethostname", CORE, NullDereference, &[])
        .by("sethostname", "uname")
        .blames_process("__do_sys_sethostname"),
    // An operation of a file or a socket fails.
    Case::new("pipe-read", CORE, NullDereference, &[Mutex])
        .by("pipe-read", "pipe")
        .fails_in("pipe_read"),
    Case::new("pipe-write", CORE, NullDereference, &[Mutex])
        .by("pipe-write", "pipe")
        .fails_in("pipe_write"),
    Case::new("file-operations", CORE, NullCall, &[])
        .by("damaged-file", "file-operations")
        .fails_in("vfs_read"),
    Case::new("proc-show", CORE, NullDereference, &[Mutex])
        .by("damaged-file", "proc-show")
        .fails_in("proc_single_show"),
    Case::new("socket", CORE, NullCall, &[])
        .by("damaged-socket", "socket")
        .fails_in("inet_recvmsg"),
    // An administrator asks for a crash.
    Case::new("sysrq", CORE, Panic, &[]).by("sysrq", "sysrq").fails_in("sysrq_handle_crash"),
    // An administrator has asked for one where memory runs out: whoever went on would ask for more at once.
    Case::new("out-of-memory", CORE, Panic, &[Mutex])
        .by("out-of-memory", "out-of-memory")
        .in_core("out_of_memory")
        .by_chance()
        .refused_for("memory has run out"),
];
