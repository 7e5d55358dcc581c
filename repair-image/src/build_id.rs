//! GNU build ids: the identity of one linked object. Not what is cached or looked up under it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest build id accepted, bytes (`ld --build-id=0x…` allows any; SHA-1 is 20, SHA-256 32).
const MAX_LEN: usize = 32;
/// ELF note type of a build id, with owner "GNU" (gABI extension of GNU binutils).
const NT_GNU_BUILD_ID: u32 = 3;

/// A GNU build id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildId {
    bytes: [u8; MAX_LEN],
    len: u8,
}

impl BuildId {
    /// A build id of these bytes; `None` when there are none or more than 32.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut id = Self { bytes: [0; MAX_LEN], len: u8::try_from(bytes.len()).ok()? };
        if bytes.is_empty() {
            return None;
        }
        id.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(id)
    }

    /// The id in a block of ELF notes (a `.notes` or `.note.gnu.build-id` section, or the guest's
    /// memory from `__start_notes`); `None` when there is none or the notes are damaged.
    #[must_use]
    pub fn from_notes(mut notes: &[u8]) -> Option<Self> {
        loop {
            let word = |at: usize| {
                let bytes = notes.get(at..at + 4)?;
                Some(u32::from_le_bytes(bytes.try_into().ok()?))
            };
            let (name_len, len, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
            let start = 12usize.checked_add(name_len.checked_next_multiple_of(4)?)?;
            if kind == NT_GNU_BUILD_ID && notes.get(12..)?.starts_with(b"GNU\0") && name_len == 4 {
                return Self::new(notes.get(start..start.checked_add(len)?)?);
            }
            notes = notes.get(start.checked_add(len.checked_next_multiple_of(4)?)?..)?;
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or(&[])
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BuildId({self})")
    }
}

impl Serialize for BuildId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BuildId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Text is not a build id: an odd number of hex digits, none, too many, or something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a build id: {0:?}")]
pub struct ParseBuildIdError(String);

impl FromStr for BuildId {
    type Err = ParseBuildIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        let bytes = text.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => Some((digit(*high)? << 4 | digit(*low)?) as u8),
            _ => None,
        });
        let bytes: Option<Vec<u8>> = bytes.collect();
        bytes.and_then(|bytes| Self::new(&bytes)).ok_or_else(|| ParseBuildIdError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(owner: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for word in [owner.len() as u32, desc.len() as u32, kind] {
            out.extend(word.to_le_bytes());
        }
        for part in [owner, desc] {
            out.extend(part);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    #[test]
    fn id_is_found_behind_other_notes() {
        let mut notes = note(b"Xen\0", 3, b"linux\0");
        notes.extend(note(b"GNU\0", 3, &[0xab, 0xcd, 1]));
        let id = BuildId::from_notes(&notes).unwrap();
        assert_eq!(id.to_string(), "abcd01");
        assert_eq!("abcd01".parse(), Ok(id));
    }

    #[test]
    fn lying_lengths_give_none() {
        let mut notes = note(b"GNU\0", 3, &[1; 20]);
        notes[4] = 0xff;
        assert_eq!(BuildId::from_notes(&notes), None);
        notes[0..8].fill(0xff);
        assert_eq!(BuildId::from_notes(&notes), None);
        assert!("abc".parse::<BuildId>().is_err());
        assert!("".parse::<BuildId>().is_err());
    }
}
