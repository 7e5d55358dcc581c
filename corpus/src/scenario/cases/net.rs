//! crash_net: a network driver's operations, a protocol's handler, a filter's hook.

use crate::scenario::Case;
use crate::scenario::Class::NullDereference;
use crate::scenario::Context::Softirq;
use crate::scenario::Sight;

const NET: &str = "crash_net";

/// Administration, under the core's RTNL.
const fn administered(name: &'static str, operation: &'static str) -> Case {
    Case::new(name, NET, NullDereference, &[]).by(operation, name)
}

/// A packet under way: nobody is told that it got lost.
const fn sent(name: &'static str) -> Case {
    administered(name, "send:crash0").sees(Sight::Value(64))
}

pub(super) const CASES: &[Case] = &[
    // ip says what failed and exits with 2.
    administered("ndo-open", "sh:ip+link+set+crash0+up").sees(Sight::Value(2)),
    // __dev_close_many() does not look at the result: the card is down.
    administered("ndo-stop", "down:crash0").sees(Sight::Value(0)),
    administered("ndo-mtu", "sh:ip+link+set+crash0+mtu+1400").sees(Sight::Value(2)),
    administered("ndo-address", "sh:ip+link+set+crash0+address+02:00:00:00:00:09")
        .sees(Sight::Value(2)),
    administered("ndo-rx-mode", "sh:ip+link+set+crash0+up").sees(Sight::Value(0)),
    administered("ndo-stats", "sh:cat+/sys/class/net/crash0/statistics/rx_packets>/dev/null")
        .sees(Sight::Value(0)),
    sent("ndo-xmit"),
    // The third crash costs the driver: the card is then one without a link, which goes down but not up again.
    administered("card-dies", "unplugged:crash0")
        .with_parameters("filter=0")
        .sees(Sight::Value(0))
        .quarantines()
        .then(&[
            "exec ip link set crash0 down",
            "exec ip link set crash0 up; test $? = 2",
            "exec rmmod crash_net; test $? = 1",
            "exec ip link show crash0",
        ]),
    sent("napi-poll").within(Softirq),
    sent("packet-type").within(Softirq),
    sent("skb-destructor").within(Softirq),
    // NF_DROP: as if a rule had forbidden the packet.
    administered("netfilter", "datagram:127.0.0.1").sees(Sight::Errno("EPERM")),
];
