//! x86-64 registers: values with a known-set, since an unwinder or a dump rarely knows them all.

use std::fmt;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::GuestVirt;

macro_rules! registers {
    ($($variant:ident $name:literal),* $(,)?) => {
        /// A register of a vCPU. The first sixteen are in the order of their encoding in instructions.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Reg {
            $(#[doc = $name] $variant,)*
        }

        impl Reg {
            /// Every register, in order.
            pub const ALL: &'static [Reg] = &[$(Reg::$variant),*];

            /// The lower-case name that assemblers use.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Reg::$variant => $name),* }
            }

            /// The register of that name (64-bit name, lower case).
            #[must_use]
            pub fn from_name(name: &str) -> Option<Reg> {
                match name { $($name => Some(Reg::$variant),)* _ => None }
            }
        }
    };
}

registers! {
    Rax "rax", Rcx "rcx", Rdx "rdx", Rbx "rbx", Rsp "rsp", Rbp "rbp", Rsi "rsi", Rdi "rdi",
    R8 "r8", R9 "r9", R10 "r10", R11 "r11", R12 "r12", R13 "r13", R14 "r14", R15 "r15",
    Rip "rip", Rflags "rflags", Cs "cs", Ss "ss", FsBase "fs_base", GsBase "gs_base",
    KernelGsBase "kernel_gs_base", Cr0 "cr0", Cr2 "cr2", Cr3 "cr3", Cr4 "cr4", Efer "efer",
    Lstar "lstar", Star "star", Cstar "cstar", Fmask "fmask", IdtBase "idt_base", GdtBase "gdt_base",
    TrBase "tr_base",
}

impl Reg {
    /// The sixteen general-purpose registers.
    pub const GENERAL: [Reg; 16] = [
        Reg::Rax,
        Reg::Rcx,
        Reg::Rdx,
        Reg::Rbx,
        Reg::Rsp,
        Reg::Rbp,
        Reg::Rsi,
        Reg::Rdi,
        Reg::R8,
        Reg::R9,
        Reg::R10,
        Reg::R11,
        Reg::R12,
        Reg::R13,
        Reg::R14,
        Reg::R15,
    ];
    /// Registers that a function must preserve (System V ABI, AMD64 supplement 3.2.1), without rsp.
    pub const CALLEE_SAVED: [Reg; 6] = [Reg::Rbx, Reg::Rbp, Reg::R12, Reg::R13, Reg::R14, Reg::R15];
    /// Registers that carry the first six integer arguments.
    pub const ARGUMENTS: [Reg; 6] = [Reg::Rdi, Reg::Rsi, Reg::Rdx, Reg::Rcx, Reg::R8, Reg::R9];
}

/// Interrupt enable flag in rflags.
pub const RFLAGS_IF: u64 = 1 << 9;
/// Direction flag in rflags.
pub const RFLAGS_DF: u64 = 1 << 10;
/// Trap flag in rflags.
pub const RFLAGS_TF: u64 = 1 << 8;
/// Alignment check flag in rflags; with SMAP, "user access allowed" (Intel SDM 3A 4.6).
pub const RFLAGS_AC: u64 = 1 << 18;

/// Register values of one vCPU or one frame, with the set of those that are known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    values: [u64; Reg::ALL.len()],
    known: u64,
}

impl Default for Registers {
    fn default() -> Self {
        Self::unknown()
    }
}

impl Registers {
    /// No register known.
    #[must_use]
    pub fn unknown() -> Self {
        Self { values: [0; Reg::ALL.len()], known: 0 }
    }

    /// The value, `None` when it is not known.
    #[must_use]
    pub fn get(&self, reg: Reg) -> Option<u64> {
        (self.known >> reg as u8 & 1 == 1).then(|| self.values[reg as usize])
    }

    /// Sets a value and marks it known.
    pub fn set(&mut self, reg: Reg, value: u64) {
        self.values[reg as usize] = value;
        self.known |= 1 << reg as u8;
    }

    /// Builder form of [`Registers::set`].
    #[must_use]
    pub fn with(mut self, reg: Reg, value: u64) -> Self {
        self.set(reg, value);
        self
    }

    /// Marks a register as not known.
    pub fn forget(&mut self, reg: Reg) {
        self.known &= !(1 << reg as u8);
        self.values[reg as usize] = 0;
    }

    /// Takes over every register that `other` knows.
    pub fn overlay(&mut self, other: &Registers) {
        for (reg, value) in other.iter() {
            self.set(reg, value);
        }
    }

    /// The instruction pointer, if known.
    #[must_use]
    pub fn rip(&self) -> Option<GuestVirt> {
        self.get(Reg::Rip).map(GuestVirt)
    }

    /// The stack pointer, if known.
    #[must_use]
    pub fn rsp(&self) -> Option<GuestVirt> {
        self.get(Reg::Rsp).map(GuestVirt)
    }

    /// The known registers, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Reg, u64)> + '_ {
        Reg::ALL.iter().filter_map(|&reg| self.get(reg).map(|value| (reg, value)))
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for (reg, value) in self.iter() {
            map.entry(&format_args!("{}", reg.name()), &format_args!("{value:#x}"));
        }
        map.finish()
    }
}

impl Serialize for Registers {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        for (reg, value) in self.iter() {
            map.serialize_entry(reg.name(), &format!("{value:#x}"))?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_set_is_kept() {
        let mut regs = Registers::unknown().with(Reg::Rax, 0).with(Reg::Efer, 7);
        assert_eq!(regs.get(Reg::Rax), Some(0));
        assert_eq!(regs.get(Reg::Rbx), None);
        regs.forget(Reg::Rax);
        assert_eq!(regs.iter().collect::<Vec<_>>(), vec![(Reg::Efer, 7)]);
    }

    #[test]
    fn names_round_trip() {
        for &reg in Reg::ALL {
            assert_eq!(Reg::from_name(reg.name()), Some(reg));
        }
    }
}
