//! Symbols of the running kernel from its own compressed table (kernel/kallsyms.c), for guests whose
//! vmlinux is not at hand. Decoding only; where the table lies is told by `vmcoreinfo.rs`.

use guest::{GuestVirt, LinkAddr, VirtMemory};

use crate::{Error, SymbolKind, Vmcoreinfo};

/// More bytes than the names of any kernel have.
const MAX_NAMES_BYTES: usize = 64 << 20;
/// More symbols than any kernel has (6.12 with everything built in: some 500 000).
const MAX_SYMBOLS: u32 = 2_000_000;
/// More bytes than any compressed name table has.
const MAX_NAMES: usize = 64 << 20;
/// `KSYM_NAME_LEN`: 512 since v6.1 (commit b8a94bfb3395).
const MAX_NAME: usize = 512;
/// What is being read, for errors.
const SYMBOLS: &str = "symbol table (kallsyms)";

/// Where the parts of the table lie, guest-virtual.
#[derive(Clone, Copy, Debug)]
pub struct KallsymsTables {
    names: GuestVirt,
    count: GuestVirt,
    tokens: GuestVirt,
    token_index: GuestVirt,
    offsets: GuestVirt,
    relative_base: GuestVirt,
    /// Run-time address of `_stext`: tells the encodings of addresses apart.
    stext: GuestVirt,
}

/// One decoded symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelSymbol {
    /// Name.
    pub name: String,
    /// Type letter as in `nm`.
    pub kind: char,
    /// Run-time address, or an absolute value.
    pub value: u64,
    /// Whether the value is absolute (per-CPU offsets): the slide is not part of it.
    pub absolute: bool,
}

impl KernelSymbol {
    /// As a part of [`crate::KnowledgeParts`]: at its link address.
    #[must_use]
    pub fn into_part(self, slide: u64) -> (String, LinkAddr, u64, SymbolKind) {
        let at = if self.absolute { self.value } else { self.value.wrapping_sub(slide) };
        let code = matches!(self.kind.to_ascii_lowercase(), 't' | 'w');
        let kind = if code { SymbolKind::Function } else { SymbolKind::Object };
        (self.name, LinkAddr(at), 0, kind)
    }
}

/// How `kallsyms_offsets` encodes addresses.
#[derive(Clone, Copy, Debug)]
enum Encoding {
    /// `CONFIG_KALLSYMS_ABSOLUTE_PERCPU` (x86-64 SMP until v6.14): not negative = absolute value, else
    /// relative base - 1 - offset.
    AbsolutePerCpu,
    /// Relative base + unsigned offset. The only one since commit 01157ddc58dc ("kallsyms: Remove
    /// KALLSYMS_ABSOLUTE_PERCPU", v6.15).
    Relative,
}

impl Encoding {
    fn decode(self, base: u64, offset: u32) -> (u64, bool) {
        let signed = i64::from(offset.cast_signed());
        match self {
            Self::AbsolutePerCpu if signed >= 0 => (u64::from(offset), true),
            Self::AbsolutePerCpu => (base.wrapping_sub(1).wrapping_add_signed(-signed), false),
            Self::Relative => (base.wrapping_add(u64::from(offset)), false),
        }
    }
}

impl KallsymsTables {
    /// From VMCOREINFO, which has them since commit 5fd8fea935a1 ("vmcoreinfo: include kallsyms
    /// symbols", v6.0).
    ///
    /// # Errors
    /// [`Error::NoVmcoreinfoEntry`] names the one that is missing.
    pub fn from_vmcoreinfo(info: &Vmcoreinfo) -> Result<Self, Error> {
        let symbol =
            |name| info.symbol(name).ok_or(Error::NoVmcoreinfoEntry { entry: name, at: info.at });
        Ok(Self {
            names: symbol("kallsyms_names")?,
            count: symbol("kallsyms_num_syms")?,
            tokens: symbol("kallsyms_token_table")?,
            token_index: symbol("kallsyms_token_index")?,
            offsets: symbol("kallsyms_offsets")?,
            relative_base: symbol("kallsyms_relative_base")?,
            stext: symbol("_stext")?,
        })
    }

    /// Decodes the whole table.
    ///
    /// # Errors
    /// Unreadable memory, or a table that contradicts itself.
    pub fn read(&self, memory: &dyn VirtMemory) -> Result<Vec<KernelSymbol>, Error> {
        let count = memory.read_u32(self.count).map_err(Error::guest(SYMBOLS))?;
        if count == 0 || count > MAX_SYMBOLS {
            return Err(self.implausible("number of symbols", u64::from(count)));
        }
        let tokens = self.tokens(memory)?;
        let mut names = Names { memory, at: self.names, page: Vec::new(), next: 0, taken: 0 };
        let mut decoded = Vec::new();
        let mut bytes = 0;
        for _ in 0..count {
            let name = names.next(&tokens)?;
            bytes += name.1.len();
            if bytes > MAX_NAMES_BYTES {
                return Err(self.implausible("length of all symbol names", bytes as u64));
            }
            decoded.push(name);
        }
        let offsets = self.offsets(memory, count)?;
        let base = memory.read_u64(self.relative_base).map_err(Error::guest(SYMBOLS))?;
        let encoding = self.encoding(&decoded, &offsets, base)?;
        let symbols = decoded.into_iter().zip(offsets).map(|((kind, name), offset)| {
            let (value, absolute) = encoding.decode(base, offset);
            KernelSymbol { name, kind, value, absolute: absolute || kind == 'A' }
        });
        Ok(symbols.collect())
    }

    fn implausible(&self, what: &'static str, value: u64) -> Error {
        Error::Implausible { what, at: self.names, value }
    }

    fn tokens(&self, memory: &dyn VirtMemory) -> Result<Vec<Vec<u8>>, Error> {
        let mut starts = [0; 512];
        memory.read(self.token_index, &mut starts).map_err(Error::guest(SYMBOLS))?;
        starts
            .chunks_exact(2)
            .map(|start| {
                let start = u64::from(u16::from_le_bytes([start[0], start[1]]));
                let token = memory.read_cstr(self.tokens + start, MAX_NAME);
                Ok(token.map_err(Error::guest(SYMBOLS))?.into_bytes())
            })
            .collect()
    }

    fn offsets(&self, memory: &dyn VirtMemory, count: u32) -> Result<Vec<u32>, Error> {
        let mut bytes = vec![0; count as usize * 4];
        memory.read(self.offsets, &mut bytes).map_err(Error::guest(SYMBOLS))?;
        let words = bytes.chunks_exact(4);
        Ok(words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }

    /// The encoding under which `_stext` gets the address it has.
    fn encoding(
        &self,
        names: &[(char, String)],
        offsets: &[u32],
        base: u64,
    ) -> Result<Encoding, Error> {
        let index = names.iter().position(|(_, name)| name == "_stext");
        let offset = index.and_then(|index| offsets.get(index)).copied();
        let offset = offset.ok_or_else(|| self.implausible("table without _stext, symbols", 0))?;
        [Encoding::AbsolutePerCpu, Encoding::Relative]
            .into_iter()
            .find(|encoding| encoding.decode(base, offset).0 == self.stext.0)
            .ok_or_else(|| self.implausible("offset of _stext", u64::from(offset)))
    }
}

/// The compressed names, read page by page: where they end is not known beforehand.
struct Names<'m> {
    memory: &'m dyn VirtMemory,
    at: GuestVirt,
    page: Vec<u8>,
    next: usize,
    taken: usize,
}

impl Names<'_> {
    fn byte(&mut self) -> Result<u8, Error> {
        if self.next >= self.page.len() {
            self.at = self.at + self.page.len() as u64;
            self.page = vec![0; 4096 - (self.at.0 & 4095) as usize];
            self.memory.read(self.at, &mut self.page).map_err(Error::guest(SYMBOLS))?;
            self.next = 0;
        }
        let byte = self.page.get(self.next).copied().unwrap_or(0);
        self.next += 1;
        self.taken += 1;
        if self.taken > MAX_NAMES {
            return Err(Error::Implausible {
                what: "length of the compressed symbol names",
                at: self.at,
                value: self.taken as u64,
            });
        }
        Ok(byte)
    }

    /// Type letter and name. A length with bit 7 set has a second byte of higher bits, since commit
    /// 73bbb94466fd ("kallsyms: support \"big\" kernel symbols", v6.1).
    fn next(&mut self, tokens: &[Vec<u8>]) -> Result<(char, String), Error> {
        let mut len = usize::from(self.byte()?);
        if len & 0x80 != 0 {
            len = len & 0x7f | usize::from(self.byte()?) << 7;
        }
        let mut text = Vec::new();
        for _ in 0..len {
            let token = usize::from(self.byte()?);
            if let Some(token) = tokens.get(token)
                && text.len() <= MAX_NAME
            {
                text.extend_from_slice(token);
            }
        }
        let kind = char::from(text.first().copied().unwrap_or(b'?'));
        let name = String::from_utf8_lossy(text.get(1..).unwrap_or_default()).into_owned();
        Ok((kind, name))
    }
}

#[cfg(test)]
mod tests {
    use guest::GuestPhys;
    use proptest::prelude::*;

    use super::*;
    use crate::synth::{INFO_PHYS, TEXT_PHYS, kernel, placed};

    fn tables(machine: &guest::fake::FakeMachine) -> KallsymsTables {
        let infos = Vmcoreinfo::find_all(machine.memory());
        KallsymsTables::from_vmcoreinfo(&infos[0]).unwrap()
    }

    #[test]
    fn names_addresses_and_per_cpu_offsets_are_decoded() {
        let (machine, _) = kernel(false);
        let symbols = tables(&machine).read(&machine.space()).unwrap();
        let find = |name: &str| symbols.iter().find(|symbol| symbol.name == name).unwrap();
        assert_eq!(find("linux_banner").value, placed(0x2000).0);
        assert_eq!(find("_stext").kind, 'T');
        let long = find(&"long".repeat(50));
        assert_eq!((long.value, long.kind), (placed(0x800).0, 't'));
        let per_cpu = find("current_task").clone();
        assert!(per_cpu.absolute);
        assert_eq!(per_cpu.into_part(0x1360_0000).1, LinkAddr(0x1234));
        let part = find("startup").clone().into_part(crate::synth::SLIDE);
        assert_eq!(part.1, LinkAddr(crate::synth::TEXT_LINK + 0x10));
        assert_eq!(part.3, SymbolKind::Function);
    }

    #[test]
    fn both_encodings_of_addresses() {
        assert_eq!(Encoding::AbsolutePerCpu.decode(0x1000, 5), (5, true));
        assert_eq!(Encoding::AbsolutePerCpu.decode(0x1000, (-9i32) as u32), (0x1008, false));
        assert_eq!(Encoding::Relative.decode(0x1000, 0x8000_0000), (0x8000_1000, false));
    }

    #[test]
    fn a_table_that_contradicts_vmcoreinfo_is_refused() {
        let (mut machine, _) = kernel(false);
        machine.poke(GuestPhys(TEXT_PHYS + 0x6808), &[7]);
        let read = tables(&machine).read(&machine.space());
        assert!(matches!(read, Err(Error::Implausible { what: "offset of _stext", .. })));
    }

    proptest! {
        #[test]
        fn damaged_tables_never_panic(at in 0x3000u64..0x7000, bytes: [u8; 16]) {
            let (mut machine, _) = kernel(false);
            machine.poke(GuestPhys(TEXT_PHYS + at), &bytes);
            machine.poke(GuestPhys(TEXT_PHYS + 0x6802), &[0, 0]);
            let _ = tables(&machine).read(&machine.space());
            machine.poke(GuestPhys(INFO_PHYS + at % 600), &bytes);
            let _ = crate::locate_without_files(machine.memory(), &[]);
        }
    }
}
