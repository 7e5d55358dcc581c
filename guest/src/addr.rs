//! Address types: which space a number belongs to. No arithmetic between spaces happens by accident.

use std::fmt;
use std::ops::{Add, Sub};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// This address plus `bytes`, wrapping at 2^64.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// This address plus a signed number of bytes, wrapping at 2^64.
            #[must_use]
            pub const fn offset(self, bytes: i64) -> Self {
                Self(self.0.wrapping_add_signed(bytes))
            }

            /// This address plus `bytes`, or `None` past 2^64.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Rounded down to a multiple of `align`, a power of two.
            #[must_use]
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            fn add(self, bytes: u64) -> Self {
                self.wrapping_add(bytes)
            }
        }

        /// Distance in bytes, wrapping.
        impl Sub for $name {
            type Output = u64;
            fn sub(self, other: Self) -> u64 {
                self.0.wrapping_sub(other.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#018x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        /// Addresses are hex strings in JSON: a double can't hold 64 bits.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(&format_args!("{:#x}", self.0))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                let digits = text.strip_prefix("0x").unwrap_or(&text);
                u64::from_str_radix(digits, 16).map(Self).map_err(serde::de::Error::custom)
            }
        }
    };
}

address!(
    /// A guest-physical address: an index into the machine's memory map.
    GuestPhys
);
address!(
    /// A guest-virtual address: needs a page-table root to mean anything.
    GuestVirt
);
address!(
    /// A virtual address in the hypervisor's process on the host.
    HostVirt
);
address!(
    /// An address as the linker assigned it in vmlinux: the KASLR slide is not applied.
    LinkAddr
);

impl GuestVirt {
    /// Whether the address lies in the upper, kernel half of the address space.
    #[must_use]
    pub const fn is_kernel_half(self) -> bool {
        self.0 >> 63 == 1
    }

    /// Whether bits 63..48 are copies of bit 47 (57 and 56 with 5-level paging), Intel SDM 1 3.3.7.1.
    #[must_use]
    pub const fn is_canonical(self, five_level: bool) -> bool {
        let shift = if five_level { 64 - 57 } else { 64 - 48 };
        ((self.0 << shift) as i64 >> shift) as u64 == self.0
    }
}

/// Where a frame executes: an exact instruction, or the one after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeAddress {
    /// The address of the instruction itself (a fault, an interrupt, a breakpoint).
    Exact(GuestVirt),
    /// A return address: the instruction that made the call ends here.
    Return(GuestVirt),
}

impl CodeAddress {
    /// The raw value of the instruction pointer.
    #[must_use]
    pub const fn ip(self) -> GuestVirt {
        match self {
            Self::Exact(ip) | Self::Return(ip) => ip,
        }
    }

    /// The address to look up in tables: a return address may already belong to the next function,
    /// so one byte is taken off.
    #[must_use]
    pub const fn lookup(self) -> GuestVirt {
        match self {
            Self::Exact(ip) => ip,
            Self::Return(ip) => GuestVirt(ip.0.wrapping_sub(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses() {
        assert!(GuestVirt(0x0000_7fff_ffff_ffff).is_canonical(false));
        assert!(!GuestVirt(0x0000_8000_0000_0000).is_canonical(false));
        assert!(GuestVirt(0x0000_8000_0000_0000).is_canonical(true));
        assert!(GuestVirt(0xffff_8000_0000_0000).is_canonical(false));
        assert!(!GuestVirt(0xdead_0000_0000_0100).is_canonical(true));
    }

    #[test]
    fn return_addresses_are_looked_up_one_byte_back() {
        assert_eq!(CodeAddress::Return(GuestVirt(16)).lookup(), GuestVirt(15));
        assert_eq!(CodeAddress::Exact(GuestVirt(16)).lookup(), GuestVirt(16));
    }

    #[test]
    fn json_is_hex_text() {
        let text = serde_json::to_string(&GuestVirt(0xffff_ffff_8100_0000)).unwrap();
        assert_eq!(text, "\"0xffffffff81000000\"");
        assert_eq!(serde_json::from_str::<GuestVirt>(&text).unwrap().0, 0xffff_ffff_8100_0000);
    }
}
