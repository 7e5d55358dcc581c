//! crash_bind: a driver is bound to its device and taken off, by the driver core under the device's lock.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Sight;

const BIND: &str = "crash_bind";

const fn case(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, BIND, NullDereference, &[]).by(operation, name)
}

/// Takes the driver off and binds it again.
const REBIND: &str = "sh:cd+/sys/bus/platform/drivers/crash_bind;echo+crash_bind.0>unbind;\
                      echo+crash_bind.0>bind";

pub(super) const CASES: &[Case] = &[
    // The device is left without a driver, and the shell's echo fails.
    case("probe", REBIND).sees(Sight::Value(1)),
    // It is unbound all the same, and bound again.
    case("remove", REBIND).sees(Sight::Value(0)),
    case("devm-action", REBIND).sees(Sight::Value(0)),
    case("driver-store", "write:/sys/bus/platform/drivers/crash_bind/rate"),
    case("driver-show", "read:/sys/bus/platform/drivers/crash_bind/rate"),
];
