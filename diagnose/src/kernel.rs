//! Reading structures of the guest's kernel by member name. Knows no particular structure; offsets
//! come from the kernel's own types. Every read is bounded.

use guest::{AddressSpace, GuestVirt, Registers, VirtMemory};
use repair_image::{Member, RepairImage};

use crate::Error;

/// Longest character array that is read as text, bytes.
const TEXT_MAX: u64 = 256;

/// The kernel of one guest: its repair image and its memory.
#[derive(Clone, Copy)]
pub(crate) struct Kernel<'a> {
    pub(crate) image: &'a RepairImage,
    pub(crate) memory: &'a dyn VirtMemory,
    /// Page tables for kernel addresses.
    space: Option<AddressSpace<'a>>,
    /// Page tables of the crashed vCPU, where its CR3 is known: user addresses mean nothing without it.
    vcpu_space: Option<AddressSpace<'a>>,
}

impl<'a> Kernel<'a> {
    /// The kernel as the vCPU with these registers sees it.
    pub(crate) fn new(
        image: &'a RepairImage,
        space: &'a AddressSpace<'a>,
        registers: &Registers,
    ) -> Self {
        let vcpu_space = AddressSpace::of_vcpu(space.physical(), registers);
        Self { image, memory: space, space: Some(*space), vcpu_space }
    }

    /// The kernel as memory alone: what an address maps to can't be asked.
    pub(crate) fn of_memory(image: &'a RepairImage, memory: &'a dyn VirtMemory) -> Self {
        Self { image, memory, space: None, vcpu_space: None }
    }

    /// The page tables that decide over `at`.
    pub(crate) fn space_of(&self, at: GuestVirt) -> Option<AddressSpace<'a>> {
        if at.is_kernel_half() { self.space } else { self.vcpu_space }
    }

    pub(crate) fn member(
        &self,
        structure: &'static str,
        path: &'static str,
    ) -> Result<Member, Error> {
        let member = self.image.types.member(structure, path);
        member.ok_or(Error::MissingMember { structure, path })
    }

    pub(crate) fn offset(&self, structure: &'static str, path: &'static str) -> Result<u64, Error> {
        self.member(structure, path).map(|member| member.offset)
    }

    /// Value of a number or pointer member of the structure at `at`, zero-extended.
    pub(crate) fn number(
        &self,
        at: GuestVirt,
        structure: &'static str,
        path: &'static str,
    ) -> Result<u64, Error> {
        let member = self.member(structure, path)?;
        if member.bits.is_some() || ![1, 2, 4, 8].contains(&member.size) {
            return Err(Error::MissingMember { structure, path });
        }
        let at = at + member.offset;
        let value = self.memory.read_uint(at, member.size);
        value.map_err(|source| Error::Guest { what: structure, at, source })
    }

    /// A signed 32-bit member.
    pub(crate) fn int(
        &self,
        at: GuestVirt,
        structure: &'static str,
        path: &'static str,
    ) -> Result<i32, Error> {
        // The low half is what a C `int` holds.
        self.number(at, structure, path).map(|value| value as u32 as i32)
    }

    /// A pointer member.
    pub(crate) fn pointer(
        &self,
        at: GuestVirt,
        structure: &'static str,
        path: &'static str,
    ) -> Result<GuestVirt, Error> {
        self.number(at, structure, path).map(GuestVirt)
    }

    /// A character-array member as text, up to its first NUL.
    pub(crate) fn text(
        &self,
        at: GuestVirt,
        structure: &'static str,
        path: &'static str,
    ) -> Result<String, Error> {
        let member = self.member(structure, path)?;
        let at = at + member.offset;
        let mut bytes = vec![0; member.size.min(TEXT_MAX) as usize];
        self.memory.read(at, &mut bytes).map_err(|source| Error::Guest {
            what: structure,
            at,
            source,
        })?;
        Ok(printable(bytes.split(|&byte| byte == 0).next().unwrap_or_default()))
    }

    /// A string that a kernel pointer points to, at most `max` bytes.
    pub(crate) fn string(&self, at: GuestVirt, max: usize) -> Result<String, Error> {
        let text = self.memory.read_cstr(at, max);
        text.map(|text| printable(text.as_bytes())).map_err(|source| Error::Guest {
            what: "string",
            at,
            source,
        })
    }

    pub(crate) fn pointer_at(&self, at: GuestVirt, what: &'static str) -> Result<GuestVirt, Error> {
        let value = self.memory.read_u64(at);
        value.map(GuestVirt).map_err(|source| Error::Guest { what, at, source })
    }
}

/// Guest text for people: control characters (a terminal would obey them) become dots.
pub(crate) fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { '.' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn guest_text_cannot_steer_a_terminal() {
        assert_eq!(printable(b"a\x1b[2Jb\xff"), "a.[2Jb\u{fffd}");
    }
}
