//! Deterministic mutation of seeds, so that a plain `cargo test` looks around each of them. Coverage-guided
//! mutation is libFuzzer's.

/// Most bytes that a mutation adds.
const GROWTH: u64 = 64;
/// Words that are at an edge of something.
const EDGES: [u64; 10] = [
    0,
    1,
    0x7f,
    0xff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_8000_0000_0000,
    u64::MAX,
];

/// A stream of mutations of one seed; the same for the same seed and number.
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// A stream. Streams of different numbers differ.
    #[must_use]
    pub fn new(number: u64) -> Self {
        // xorshift must not start at zero.
        Self { state: number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// One more mutation of `seed`: one to eight changes.
    pub fn mutate(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut data = seed.to_vec();
        for _ in 0..=self.below(8) {
            self.change(&mut data);
        }
        data
    }

    fn change(&mut self, data: &mut Vec<u8>) {
        let at = self.below(data.len() + 1);
        match self.next() % 8 {
            0 => data.truncate(at),
            1 => {
                let new = (0..self.next() % GROWTH).map(|_| self.next() as u8).collect::<Vec<_>>();
                drop(data.splice(at..at, new));
            }
            2 => {
                let end = (at + self.below(32)).min(data.len());
                drop(data.drain(at..end));
            }
            3 => {
                let from = self.below(data.len() + 1);
                let end = (from + self.below(64)).min(data.len());
                let copy = data.get(from..end).unwrap_or_default().to_vec();
                drop(data.splice(at..at, copy));
            }
            4 | 5 => {
                let width = 1 << (self.next() % 4);
                let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                for (to, from) in data.iter_mut().skip(at).take(width).zip(edge) {
                    *to = from;
                }
            }
            6 => {
                let bit = 1 << (self.next() % 8);
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= bit;
                }
            }
            _ => {
                let byte = self.next() as u8;
                if let Some(slot) = data.get_mut(at) {
                    *slot = byte;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ() {
        let all = |number| {
            let mut mutator = Mutator::new(number);
            (0..200).map(|_| mutator.mutate(b"some seed")).collect::<Vec<_>>()
        };
        assert_eq!(all(1), all(1));
        assert_ne!(all(1), all(2));
        assert!(all(1).iter().any(|data| data.len() > 9) && all(1).iter().any(|d| d.len() < 9));
        assert!(Mutator::new(3).mutate(b"").len() < 1000);
    }
}
