//! Reading members of the guest's structures by name. Offsets come from the kernel's own types;
//! knows no particular structure.

use std::collections::HashSet;

use guest::{GuestVirt, VirtMemory};
use repair_image::{Member, RepairImage};

use crate::Reason;

/// A kernel's structures in its memory.
#[derive(Clone, Copy)]
pub(crate) struct Structures<'a> {
    pub(crate) image: &'a RepairImage,
    pub(crate) memory: &'a dyn VirtMemory,
}

impl Structures<'_> {
    /// Address of a member, if this kernel has it.
    pub(crate) fn member_at(
        &self,
        at: GuestVirt,
        structure: &str,
        path: &str,
    ) -> Option<GuestVirt> {
        Some(at + self.image.types.member(structure, path)?.offset)
    }

    /// A number, bit-field or pointer; `Ok(None)` if this kernel has no such member.
    pub(crate) fn number(
        &self,
        at: GuestVirt,
        structure: &str,
        path: &str,
    ) -> Result<Option<u64>, Reason> {
        let Some(member) = self.image.types.member(structure, path) else { return Ok(None) };
        self.value(at, &member).map(Some).ok_or_else(|| Reason::Unreadable {
            what: format!("{structure}.{path}"),
            at: at + member.offset,
        })
    }

    /// The same of a member that was looked up before; `None` if it can't be read.
    pub(crate) fn value(&self, at: GuestVirt, member: &Member) -> Option<u64> {
        if !matches!(member.size, 1 | 2 | 4 | 8) {
            return None;
        }
        let word = self.memory.read_uint(at + member.offset, member.size).ok()?;
        Some(match member.bits {
            Some((first, count)) if first < 64 && count < 64 => {
                word >> first & ((1_u64 << count) - 1)
            }
            _ => word,
        })
    }

    /// A number that must be there.
    pub(crate) fn need(&self, at: GuestVirt, structure: &str, path: &str) -> Result<u64, Reason> {
        self.number(at, structure, path)?.ok_or_else(|| Reason::MissingMember {
            structure: structure.to_owned(),
            path: path.to_owned(),
        })
    }

    /// Address of a member that must be there.
    pub(crate) fn need_at(
        &self,
        at: GuestVirt,
        structure: &str,
        path: &str,
    ) -> Result<GuestVirt, Reason> {
        self.member_at(at, structure, path).ok_or_else(|| Reason::MissingMember {
            structure: structure.to_owned(),
            path: path.to_owned(),
        })
    }

    /// The structures on a ring of `list_head`s, linked by a member, up to its head.
    pub(crate) fn list(
        &self,
        head: GuestVirt,
        (structure, link): (&str, &str),
        most: usize,
    ) -> Result<Vec<GuestVirt>, Reason> {
        let offset = self.need_at(GuestVirt(0), structure, link)?.0;
        let (mut found, mut met) = (Vec::new(), HashSet::new());
        let mut at = GuestVirt(self.need(head, "list_head", "next")?);
        while at != head {
            if found.len() >= most || !at.is_kernel_half() || !met.insert(at) {
                return Err(Reason::Inconsistent {
                    what: format!("the list of {structure}s at {head:#x} does not end"),
                });
            }
            found.push(GuestVirt(at.0.wrapping_sub(offset)));
            at = GuestVirt(self.need(at, "list_head", "next")?);
        }
        Ok(found)
    }

    /// Address of a per-CPU value that is a variable of its own or a member of `pcpu_hot`: commit
    /// e57ef2ed97c1 ("x86: Put hot per CPU variables into a struct", v6.2) moved it there, v6.15
    /// back.
    pub(crate) fn hot(&self, cpu: usize, member: &str, variable: &str) -> Option<GuestVirt> {
        match self.image.per_cpu("pcpu_hot", cpu) {
            Some(hot) => self.member_at(hot, "pcpu_hot", member),
            None => self.image.per_cpu(variable, cpu),
        }
    }
}
