//! crash_init: a module faults while it comes or goes. To hand an error to whoever loads or unloads it would
//! free memory that others point into; so the process ends, the module stays, and its device answers.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Sight;

const INIT: &str = "crash_init";

const fn case(name: &'static str, operation: &'static str) -> Case {
    // The shell sees that its child was killed: 128 + SIGKILL.
    Case::new(name, INIT, NullDereference, &[]).by(operation, name).ends_process(Sight::Value(137))
}

pub(super) const CASES: &[Case] = &[
    case("module-init", "sh:rmmod+crash_init;insmod+/modules/crash_init.ko+when=init")
        .without_lines(),
    case("module-exit", "sh:rmmod+crash_init"),
];
