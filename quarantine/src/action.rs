//! One step of a plan: what is written, called or set, what must hold before, and why. Data only;
//! carrying steps out is in `apply.rs`.

use std::fmt;
use std::ops::Range;

use guest::{GuestVirt, Reg, Registers, Vcpu};
use serde::{Serialize, Serializer};

use crate::values::Value;

/// A word of guest memory that must be as it was when the plan was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Expected {
    /// Guest-virtual address.
    pub at: GuestVirt,
    /// Size in bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Bits that count.
    #[serde(serialize_with = "hex")]
    pub mask: u64,
    /// Value of these bits.
    #[serde(serialize_with = "hex")]
    pub value: u64,
}

/// A changed word of saved registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SavedWord {
    /// The register.
    pub register: &'static str,
    /// Guest-virtual address of the word.
    pub at: GuestVirt,
    /// Before.
    #[serde(serialize_with = "hex")]
    pub old: u64,
    /// After.
    #[serde(serialize_with = "hex")]
    pub new: u64,
}

/// One step.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "action")]
#[non_exhaustive]
pub enum Action {
    /// Call a function of the guest's kernel, with interrupts off, on a stack that the guest does
    /// not know.
    CallGuest {
        /// Name of the function.
        function: String,
        /// Its guest-virtual address.
        at: GuestVirt,
        /// At most six arguments.
        #[serde(serialize_with = "hex_list")]
        arguments: Vec<u64>,
        /// What must hold before.
        expected: Vec<Expected>,
        /// Why.
        why: String,
    },
    /// Write one word.
    WriteWord {
        /// Guest-virtual address.
        at: GuestVirt,
        /// Size in bytes: 1, 2, 4 or 8.
        size: u8,
        /// Bits that are changed; the others stay as they are when it is written.
        #[serde(serialize_with = "hex")]
        mask: u64,
        /// Value of these bits before, after the steps that come first.
        #[serde(serialize_with = "hex")]
        old: u64,
        /// Value of these bits after.
        #[serde(serialize_with = "hex")]
        new: u64,
        /// Name of the variable.
        name: String,
        /// Why.
        why: String,
    },
    /// Change registers that an exception or interrupt entry saved on the stack.
    RewriteSavedRegisters {
        /// Guest-virtual address of the `struct pt_regs`.
        at: GuestVirt,
        /// Changed words.
        words: Vec<SavedWord>,
        /// Why.
        why: String,
    },
    /// Make a driver function return at once.
    PatchEntry {
        /// Module name.
        module: String,
        /// Function.
        function: String,
        /// Guest-virtual address of the first changed byte.
        at: GuestVirt,
        /// Bytes before.
        #[serde(serialize_with = "hex_bytes")]
        old: Vec<u8>,
        /// Bytes after.
        #[serde(serialize_with = "hex_bytes")]
        new: Vec<u8>,
        /// What the function returns from then on.
        returns: Value,
        /// Why.
        why: String,
    },
    /// Put bytes back that the kernel never writes.
    Restore {
        /// The place by name.
        name: String,
        /// Guest-virtual address of the first byte.
        at: GuestVirt,
        /// Bytes before.
        #[serde(serialize_with = "hex_bytes")]
        old: Vec<u8>,
        /// Bytes after.
        #[serde(serialize_with = "hex_bytes")]
        new: Vec<u8>,
        /// Whether it is code.
        code: bool,
        /// Why.
        why: String,
    },
    /// Set registers of a vCPU.
    SetRegisters {
        /// The vCPU.
        vcpu: Vcpu,
        /// The registers that are set; others keep their values.
        registers: Registers,
        /// Why.
        why: String,
    },
}

impl Action {
    /// What is done, in a few words.
    pub fn what(&self) -> String {
        match self {
            Self::CallGuest { function, arguments, .. } => {
                let list: Vec<String> = arguments.iter().map(|a| format!("{a:#x}")).collect();
                format!("call {function}({})", list.join(", "))
            }
            Self::WriteWord { at, old, new, name, .. } => {
                format!("write {name} at {at:#x}: {old:#x} -> {new:#x}")
            }
            Self::RewriteSavedRegisters { at, .. } => {
                format!("rewrite the registers saved at {at:#x}")
            }
            Self::PatchEntry { module, function, at, returns, .. } => {
                format!("patch {function} [{module}] at {at:#x} to {returns}")
            }
            Self::Restore { name, at, old, new, .. } => {
                let hex = |bytes: &[u8]| -> String {
                    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
                };
                format!("restore {name} at {at:#x}: {} -> {}", hex(old), hex(new))
            }
            Self::SetRegisters { vcpu, .. } => format!("set registers of vCPU {}", vcpu.0),
        }
    }

    /// Why it is done.
    pub fn why(&self) -> &str {
        match self {
            Self::CallGuest { why, .. }
            | Self::WriteWord { why, .. }
            | Self::RewriteSavedRegisters { why, .. }
            | Self::PatchEntry { why, .. }
            | Self::Restore { why, .. }
            | Self::SetRegisters { why, .. } => why,
        }
    }

    /// Guest memory that it writes by itself, guest-virtual. What a called function writes is not known here.
    #[must_use]
    pub fn writes(&self) -> Vec<Range<GuestVirt>> {
        let range = |at: GuestVirt, len: usize| at..GuestVirt(at.0.saturating_add(len as u64));
        match self {
            Self::WriteWord { at, size, .. } => vec![range(*at, usize::from(*size))],
            Self::RewriteSavedRegisters { words, .. } => {
                words.iter().map(|word| range(word.at, size_of_val(&word.new))).collect()
            }
            Self::PatchEntry { at, new, .. } | Self::Restore { at, new, .. } => {
                vec![range(*at, new.len())]
            }
            Self::CallGuest { .. } | Self::SetRegisters { .. } => Vec::new(),
        }
    }

    /// The changed registers, where there are any, one a line.
    pub fn details(&self) -> Vec<String> {
        match self {
            Self::RewriteSavedRegisters { words, .. } => words
                .iter()
                .map(|word| format!("{} {:#x} -> {:#x}", word.register, word.old, word.new))
                .collect(),
            Self::SetRegisters { registers, .. } => {
                let set = registers.iter().map(|(reg, value)| format!("{}={value:#x}", reg.name()));
                vec![set.collect::<Vec<_>>().join(" ")]
            }
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what(), self.why())?;
        self.details().iter().try_for_each(|detail| write!(f, "\n       {detail}"))
    }
}

/// Name of a register as in `struct pt_regs`.
pub(crate) fn saved_name(reg: Reg) -> Option<&'static str> {
    Some(match reg {
        Reg::Rax => "ax",
        Reg::Rcx => "cx",
        Reg::Rdx => "dx",
        Reg::Rbx => "bx",
        Reg::Rsp => "sp",
        Reg::Rbp => "bp",
        Reg::Rsi => "si",
        Reg::Rdi => "di",
        Reg::R8 => "r8",
        Reg::R9 => "r9",
        Reg::R10 => "r10",
        Reg::R11 => "r11",
        Reg::R12 => "r12",
        Reg::R13 => "r13",
        Reg::R14 => "r14",
        Reg::R15 => "r15",
        Reg::Rip => "ip",
        Reg::Rflags => "flags",
        _ => return None,
    })
}

pub(crate) fn hex<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&format_args!("{value:#x}"))
}

fn hex_list<S: Serializer>(values: &[u64], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(values.iter().map(|value| format!("{value:#x}")))
}

pub(crate) fn hex_bytes<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    s.serialize_str(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(action: &Action) -> Vec<(u64, u64)> {
        action.writes().iter().map(|range| (range.start.0, range.end.0)).collect()
    }

    #[test]
    fn every_saved_register_is_written() {
        let word = |at| SavedWord { register: "ax", at: GuestVirt(at), old: 0, new: 1 };
        let words = vec![word(0x1000), word(0x1040)];
        let why = String::new();
        let action = Action::RewriteSavedRegisters { at: GuestVirt(0x1000), words, why };
        assert_eq!(ranges(&action), [(0x1000, 0x1008), (0x1040, 0x1048)]);
    }

    #[test]
    fn restored_bytes_are_written_and_ends_do_not_wrap() {
        let restore = |at| Action::Restore {
            name: String::new(),
            at: GuestVirt(at),
            old: vec![0; 5],
            new: vec![1; 5],
            code: true,
            why: String::new(),
        };
        assert_eq!(ranges(&restore(0x2000)), [(0x2000, 0x2005)]);
        assert_eq!(ranges(&restore(u64::MAX - 1)), [(u64::MAX - 1, u64::MAX)]);
    }

    #[test]
    fn a_call_and_registers_write_nothing_by_themselves() {
        let registers = Registers::unknown();
        let action = Action::SetRegisters { vcpu: Vcpu(0), registers, why: String::new() };
        assert!(action.writes().is_empty());
    }
}
