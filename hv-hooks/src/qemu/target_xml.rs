//! The register file as the stub describes it (gdb's target description): which register stands where in the
//! answer to `g`, and its number for `P`. Nothing of the order is typed in.

use guest::{Reg, Registers};

use super::rsp::{PacketError, parse_hex_bytes, push_hex};
use crate::Error;

/// Most registers of a description that are looked at: AVX-512 machines have some 200.
const MAX_REGISTERS: usize = 4096;

/// Where one register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    reg: Reg,
    /// gdb's number, for `p` and `P`.
    number: usize,
    /// Byte offset in the answer to `g`.
    offset: usize,
    /// Bytes.
    size: usize,
}

/// The register file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterFile {
    slots: Vec<Slot>,
}

/// Registers that no stub of QEMU's describes: they stay unknown.
const NEVER_TOLD: [Reg; 7] =
    [Reg::Lstar, Reg::Star, Reg::Cstar, Reg::Fmask, Reg::IdtBase, Reg::GdtBase, Reg::TrBase];

/// gdb's name of a register, where it is not the one used here.
fn gdb_name(reg: Reg) -> &'static str {
    match reg {
        Reg::Rflags => "eflags",
        Reg::KernelGsBase => "k_gs_base",
        other => other.name(),
    }
}

/// The files that a description includes: `<xi:include href="i386-64bit.xml"/>`.
#[must_use]
pub fn parse_includes(xml: &str) -> Vec<String> {
    let xml = without_comments(xml);
    tags(&xml, "xi:include")
        .filter_map(|tag| attribute(tag, "href"))
        .map(str::to_owned)
        .take(16)
        .collect()
}

impl RegisterFile {
    /// Understands the descriptions of the features, in the order in which they are included.
    ///
    /// # Errors
    /// [`Error::NoRegister`] when one that is needed is not described.
    pub fn parse(features: &[String]) -> Result<Self, Error> {
        let (mut slots, mut number, mut offset) = (Vec::new(), 0usize, 0usize);
        let features: Vec<String> = features.iter().map(|xml| without_comments(xml)).collect();
        let described = features.iter().flat_map(|xml| tags(xml, "reg"));
        for tag in described.take(MAX_REGISTERS) {
            let size =
                attribute(tag, "bitsize").and_then(|bits| bits.parse::<usize>().ok()).unwrap_or(0)
                    / 8;
            if let Some(given) = attribute(tag, "regnum").and_then(|text| text.parse().ok()) {
                number = given;
            }
            let name = attribute(tag, "name").unwrap_or_default();
            let wanted = Reg::ALL.iter().find(|&&reg| gdb_name(reg) == name);
            if let Some(&reg) = wanted.filter(|_| size == 4 || size == 8) {
                slots.push(Slot { reg, number, offset, size });
            }
            number = number.saturating_add(1);
            offset = offset.saturating_add(size);
        }
        let told = |reg: Reg| slots.iter().any(|slot| slot.reg == reg) || NEVER_TOLD.contains(&reg);
        match Reg::ALL.iter().find(|&&reg| !told(reg)) {
            Some(&missing) => Err(Error::NoRegister(missing.name())),
            None => Ok(Self { slots }),
        }
    }

    /// The registers in the answer to `g`. One that the stub marks as unavailable (`xxxx`) stays unknown.
    ///
    /// # Errors
    /// The answer is too short for a register.
    pub fn decode(&self, answer: &[u8]) -> Result<Registers, PacketError> {
        let mut regs = Registers::unknown();
        for slot in &self.slots {
            let start = slot.offset.saturating_mul(2);
            let end = slot.offset.saturating_add(slot.size).saturating_mul(2);
            let digits = answer.get(start..end).ok_or(PacketError::Hex)?;
            if digits.first() != Some(&b'x') {
                let mut value = [0; 8];
                for (to, from) in value.iter_mut().zip(parse_hex_bytes(digits)?) {
                    *to = from;
                }
                regs.set(slot.reg, u64::from_le_bytes(value));
            }
        }
        Ok(regs)
    }

    /// The `P` packets that set the registers which `wanted` knows and `current` does not hold already.
    ///
    /// # Errors
    /// [`Error::NoRegister`] for one that the stub does not describe.
    pub fn writes(&self, wanted: &Registers, current: &Registers) -> Result<Vec<String>, Error> {
        let changed = wanted.iter().filter(|(reg, value)| current.get(*reg) != Some(*value));
        changed
            .map(|(reg, value)| {
                let slot = self.slots.iter().find(|slot| slot.reg == reg);
                let slot = slot.ok_or(Error::NoRegister(reg.name()))?;
                let mut packet = format!("P{:x}=", slot.number);
                // Of flags and selectors the stub has 4 bytes, and no more are used.
                push_hex(&mut packet, value.to_le_bytes().get(..slot.size).unwrap_or_default());
                Ok(packet)
            })
            .collect()
    }
}

/// Comments removed. QEMU 7.2 to 10.0 describe `ss_base`, `ds_base` and `es_base` in one, which `g` lacks.
fn without_comments(xml: &str) -> String {
    let mut parts = xml.split("<!--");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str(part.split_once("-->").map_or("", |(_, after)| after));
    }
    kept
}

/// The insides of the elements of this name: `name="rax" bitsize="64"`.
fn tags<'x>(xml: &'x str, element: &'static str) -> impl Iterator<Item = &'x str> {
    xml.split('<').filter_map(move |text| {
        let inside = text.strip_prefix(element)?.split_once('>')?.0;
        inside.starts_with(char::is_whitespace).then_some(inside)
    })
}

/// The value of an attribute.
fn attribute<'x>(tag: &'x str, name: &str) -> Option<&'x str> {
    let mut rest = tag;
    loop {
        let (key, after) = rest.split_once("=\"")?;
        let (value, next) = after.split_once('"')?;
        if key.trim() == name {
            return Some(value);
        }
        rest = next;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A register file in an order of its own, with a foreign register in front.
    pub(crate) fn description() -> String {
        let mut xml =
            String::from("<feature name=\"x\"><reg name=\"pad\" bitsize=\"80\" regnum=\"5\"/>\n");
        for &reg in Reg::ALL {
            let bits = if matches!(reg, Reg::Rflags | Reg::Cs | Reg::Ss) { 32 } else { 64 };
            if reg == Reg::FsBase {
                xml += "<!--reg name=\"cs_base\" bitsize=\"64\"/>\n<reg name=\"ss_base\" bitsize=\"64\"/-->";
            }
            xml += &format!("<reg type=\"int\" name=\"{}\" bitsize=\"{bits}\"/>", gdb_name(reg));
        }
        xml + "</feature>"
    }

    #[test]
    fn order_comes_from_the_description() {
        let file = RegisterFile::parse(&[description()]).unwrap();
        let mut answer = vec![b'0'; 20];
        for (index, &reg) in Reg::ALL.iter().enumerate() {
            let digits = if matches!(reg, Reg::Rflags | Reg::Cs | Reg::Ss) { 8 } else { 16 };
            let mut text = format!("{:02x}", index + 1);
            text += &"0".repeat(digits - 2);
            answer.extend_from_slice(text.as_bytes());
        }
        let regs = file.decode(&answer).unwrap();
        for (index, &reg) in Reg::ALL.iter().enumerate() {
            assert_eq!(regs.get(reg), Some(index as u64 + 1), "{}", reg.name());
        }
        assert_eq!(file.decode(&answer[..answer.len() - 1]), Err(PacketError::Hex));
        let wanted =
            Registers::unknown().with(Reg::Rax, 0x1234).with(Reg::Rcx, 2).with(Reg::Cs, 0x10);
        let packets = file.writes(&wanted, &regs).unwrap();
        assert_eq!(packets, ["P6=3412000000000000", "P18=10000000"]);
    }

    #[test]
    fn includes_and_missing_registers() {
        let xml = "<target><xi:include href=\"i386-64bit.xml\"/></target>";
        assert_eq!(parse_includes(xml), ["i386-64bit.xml"]);
        let few = "<feature><reg name=\"rax\" bitsize=\"64\"/></feature>".to_owned();
        assert!(matches!(RegisterFile::parse(&[few]), Err(Error::NoRegister("rcx"))));
        // As QEMU describes it: no MSRs of system calls, no descriptor tables.
        let lines = description();
        let untold = |line: &&str| !NEVER_TOLD.iter().any(|reg| line.contains(reg.name()));
        let usual: String = lines.split_inclusive("/>").filter(untold).collect();
        let file = RegisterFile::parse(&[usual]).unwrap();
        let wanted = Registers::unknown().with(Reg::Lstar, 1);
        let refused = file.writes(&wanted, &Registers::unknown());
        assert!(matches!(refused, Err(Error::NoRegister("lstar"))));
    }

    proptest! {
        #[test]
        fn any_text_is_understood_or_not(text in "[<>=/\" a-z0-9]{0,300}", answer: Vec<u8>) {
            let _ = parse_includes(&text);
            if let Ok(file) = RegisterFile::parse(&[text, description()]) {
                let _ = file.decode(&answer);
            }
        }
    }
}
