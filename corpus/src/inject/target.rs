//! The drivers whose code is changed: the distribution's own, with what a guest needs to use each. The
//! workloads themselves are in `guest/inject.c`.

/// A driver and how it is put to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name here and in `guest/inject.c`.
    pub name: &'static str,
    /// The module whose code is changed.
    pub module: &'static str,
    /// The modules to load, in order; those that a kernel has built in are passed over.
    pub load: &'static [&'static str],
    /// Shell commands before its workload starts.
    pub setup: &'static [&'static str],
    /// More arguments for QEMU.
    pub qemu: &'static [&'static str],
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "loop",
        module: "loop",
        load: &["loop"],
        setup: &["dd if=/dev/zero of=/run/image bs=1M count=4", "losetup /dev/loop0 /run/image"],
        qemu: &[],
    },
    Target {
        name: "fat",
        module: "fat",
        // vfat_fill_super() wants the tables of the character sets that Debian configures.
        load: &["loop", "nls_cp437", "nls_ascii", "nls_utf8", "fat", "vfat"],
        setup: &[
            "dd if=/dev/zero of=/run/image bs=1M count=8",
            "losetup /dev/loop0 /run/image",
            "mkdosfs /dev/loop0",
            "mkdir /run/fat",
            "mount -t vfat /dev/loop0 /run/fat",
        ],
        qemu: &[],
    },
    Target {
        name: "veth",
        module: "veth",
        load: &["veth"],
        // Without a name for the other end, it is the kernel's: veth0.
        setup: &["ip link add v0 type veth", "ip link set v0 up", "ip link set veth0 up"],
        qemu: &[],
    },
    Target { name: "tun", module: "tun", load: &["tun"], setup: &["mkdir -p /dev/net"], qemu: &[] },
    Target {
        name: "virtio_net",
        module: "virtio_net",
        load: &["failover", "net_failover", "virtio_net"],
        setup: &["ip link set eth0 up", "ip link set eth1 up"],
        // Two cards on one hub: what one sends the other gets.
        qemu: &[
            "-netdev",
            "hubport,id=near,hubid=0",
            "-netdev",
            "hubport,id=far,hubid=0",
            "-device",
            "virtio-net-pci,netdev=near,romfile=",
            "-device",
            "virtio-net-pci,netdev=far,romfile=",
        ],
    },
];

/// The target of a name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
