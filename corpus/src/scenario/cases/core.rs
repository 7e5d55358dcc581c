//! crash_core: a driver that damages what the core kernel then trips over on behalf of a process.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Resource::{Mutex, Rcu, RwsemRead};

const CORE: &str = "crash_core";

pub(super) const CASES: &[Case] = &[
    // The core kernel faults on behalf of a process.
    Case::new("getcwd", CORE, NullDereference, &[Rcu])
        .by("getcwd", "getcwd")
        .blames_process("__do_sys_getcwd"),
    Case::new("uname", CORE, NullDereference, &[RwsemRead])
        .by("uname", "uname")
        .blames_process("__do_sys_newuname")
        .then(&["exec hostname lab"]),
    Case::new("pipe-read", CORE, NullDereference, &[Mutex])
        .by("pipe-read", "pipe")
        .blames_process("pipe_read"),
    Case::new("pipe-write", CORE, NullDereference, &[Mutex])
        .by("pipe-write", "pipe")
        .blames_process("pipe_write"),
];
