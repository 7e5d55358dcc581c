//! LZO1X decompression into a buffer of known size. The bitstream is described in the kernel's
//! Documentation/staging/lzo.rst; this is written from that text. Stops at the first thing that is wrong.

/// Distances of "far" matches start here.
const FAR: usize = 16384;
/// Largest distance of a two-byte match, which three-byte matches after a literal run go beyond.
const NEAR: usize = 2048;

/// Input and output, both bounded.
struct Stream<'i, 'o> {
    input: &'i [u8],
    output: &'o mut [u8],
    filled: usize,
}

impl Stream<'_, '_> {
    fn byte(&mut self) -> Option<usize> {
        let (first, rest) = self.input.split_first()?;
        self.input = rest;
        Some(usize::from(*first))
    }

    /// Distance and trailing literals of long matches: 14 bits and 2 bits, little-endian.
    fn distance(&mut self) -> Option<(usize, usize)> {
        let word = self.byte()? | self.byte()? << 8;
        Some((word >> 2, word & 3))
    }

    /// A length: `bits` unless they are zero, then `base` plus 255 for each zero byte plus the byte that
    /// ends them.
    fn length(&mut self, bits: usize, base: usize) -> Option<usize> {
        if bits != 0 {
            return Some(bits);
        }
        let mut length = base;
        loop {
            let byte = self.byte()?;
            if byte != 0 {
                return length.checked_add(byte);
            }
            length = length.checked_add(255)?;
        }
    }

    fn literals(&mut self, len: usize) -> Option<()> {
        let (now, later) = self.input.split_at_checked(len)?;
        self.output.get_mut(self.filled..)?.get_mut(..len)?.copy_from_slice(now);
        self.input = later;
        self.filled += len;
        Some(())
    }

    /// Copies from what was written; source and target may overlap, and then bytes repeat.
    fn copy(&mut self, distance: usize, len: usize) -> Option<()> {
        let from = self.filled.checked_sub(distance)?;
        let end = self.filled.checked_add(len)?;
        if end > self.output.len() {
            return None;
        }
        if distance >= len {
            self.output.copy_within(from..from + len, self.filled);
        } else {
            for at in 0..len {
                let byte = *self.output.get(from + at)?;
                *self.output.get_mut(self.filled + at)? = byte;
            }
        }
        self.filled = end;
        Some(())
    }
}

/// Decompresses `input` into `output`; the number of bytes written, or `None` when the input is damaged
/// or does not fit.
pub(super) fn decompress(input: &[u8], output: &mut [u8]) -> Option<usize> {
    let mut stream = Stream { input, output, filled: 0 };
    // Literals copied by the last instruction: 0 to 3, or 4 for a run of four and more.
    let mut state = 0;
    let first = usize::from(*input.first()?);
    if first > 17 {
        stream.byte()?;
        stream.literals(first - 17)?;
        state = (first - 17).min(4);
    }
    loop {
        let code = stream.byte()?;
        let (distance, len, trailing) = match code {
            0..16 if state == 0 => {
                let len = stream.length(code, 15)?;
                stream.literals(len.checked_add(3)?)?;
                state = 4;
                continue;
            }
            0..16 => {
                let near = (stream.byte()? << 2) + (code >> 2);
                if state == 4 { (near + NEAR + 1, 3, code & 3) } else { (near + 1, 2, code & 3) }
            }
            16..32 => {
                let len = stream.length(code & 7, 7)?;
                let (low, trailing) = stream.distance()?;
                let distance = FAR + ((code & 8) << 11) + low;
                if distance == FAR {
                    return Some(stream.filled);
                }
                (distance, len.checked_add(2)?, trailing)
            }
            32..64 => {
                let len = stream.length(code & 31, 31)?;
                let (low, trailing) = stream.distance()?;
                (low + 1, len.checked_add(2)?, trailing)
            }
            64..128 => ((stream.byte()? << 3) + (code >> 2 & 7) + 1, 3 + (code >> 5 & 1), code & 3),
            _ => ((stream.byte()? << 3) + (code >> 2 & 7) + 1, 5 + (code >> 5 & 3), code & 3),
        };
        stream.copy(distance, len)?;
        stream.literals(trailing)?;
        state = trailing;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes with repetitions at all distances, as pages have.
    fn page() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            (any::<u8>(), 1usize..600).prop_map(|(byte, len)| vec![byte; len]),
            proptest::collection::vec(any::<u8>(), 1..300),
            (proptest::collection::vec(0u8..3, 1..9), 1usize..80)
                .prop_map(|(unit, n)| unit.repeat(n)),
        ];
        proptest::collection::vec(piece, 1..24).prop_map(|pieces| {
            let mut page = pieces.concat();
            page.extend_from_within(..page.len() / 2);
            page.resize(40_000, 7);
            page
        })
    }

    proptest! {
        #[test]
        fn what_another_compressor_wrote_comes_back(page in page(), len in 1usize..40_000) {
            let page = &page[..len];
            let packed = lzokay_native::compress(page).unwrap();
            let mut out = vec![0; len];
            prop_assert_eq!(decompress(&packed, &mut out), Some(len));
            prop_assert_eq!(&out[..], page);
            prop_assert_eq!(decompress(&packed, &mut out[..len - 1]), None, "it must not fit");
        }

        #[test]
        fn damage_is_survived(page in page(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut packed = lzokay_native::compress(&page[..4096]).unwrap();
            let at = at.index(packed.len());
            packed[at] = byte;
            packed.truncate(cut.index(packed.len()) + 1);
            let mut out = [0; 4096];
            if let Some(len) = decompress(&packed, &mut out) {
                prop_assert!(len <= out.len());
            }
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decompress(&bytes, &mut [0; 4096]);
        }
    }
}
