//! crash_cpu: a processor comes or goes, and probes of returns.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::KernelThread;
use crate::scenario::Sight;

const CPU: &str = "crash_cpu";

const fn case(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, CPU, NullDereference, &[]).by(operation, name)
}

/// The last processor goes, and comes again; what the shell's last command says.
const DOWN_UP: &str = "sh:cd+/sys/devices/system/cpu/cpu1;echo+0+>online;echo+1+>online";

pub(super) const CASES: &[Case] = &[
    // It stays, and that it should come is no error then.
    case("cpu-offline", DOWN_UP).within(KernelThread).sees(Sight::Value(0)),
    // It does not come.
    case("cpu-online", DOWN_UP).within(KernelThread).sees(Sight::Value(1)),
    case("cpu-prepare", DOWN_UP).sees(Sight::Value(1)),
    // The probed call must not notice.
    case("kretprobe", "fsync:/data").sees(Sight::Value(0)),
    case("kretprobe-entry", "fsync:/data").sees(Sight::Value(0)),
];
