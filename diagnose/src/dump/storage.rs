//! One file's bytes at the offsets its writer meant: as they lie there, or put together from
//! flattened records. Knows nothing of what the bytes mean.

use std::borrow::Cow;

use repair_image::MappedFile;

use super::Error;
use super::flat;

/// A file's bytes, in memory or mapped.
pub trait Bytes: AsRef<[u8]> {
    /// `len` bytes from `offset` on are not read again soon: what they take of this process's memory may be given back.
    fn forget(&self, _offset: usize, _len: usize) {}
}

impl Bytes for MappedFile {
    fn forget(&self, offset: usize, len: usize) {
        Self::forget(self, offset, len);
    }
}

impl Bytes for Vec<u8> {}

impl Bytes for [u8] {}

impl<T: Bytes + ?Sized> Bytes for &T {
    fn forget(&self, offset: usize, len: usize) {
        (**self).forget(offset, len);
    }
}

/// A piece of the unflattened file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Offset in the unflattened file.
    pub at: u64,
    /// Where its bytes lie in the file as it is.
    pub from: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A file's bytes.
pub(super) struct Storage<B> {
    bytes: B,
    /// Ascending, without overlap; `None` when the file is not flattened.
    extents: Option<Vec<Extent>>,
    /// Whether the flattened stream has its end mark.
    ended: bool,
}

impl<B: AsRef<[u8]>> Storage<B> {
    /// Takes the bytes of a file, flattened or not.
    pub(super) fn new(bytes: B) -> Result<Self, Error> {
        let file = bytes.as_ref();
        if !flat::is_flattened(file) {
            return Ok(Self { bytes, extents: None, ended: true });
        }
        let (extents, ended) = flat::extents(file)?;
        Ok(Self { bytes, extents: Some(extents), ended })
    }

    /// Whether the file is in the flattened format.
    pub(super) fn is_flattened(&self) -> bool {
        self.extents.is_some()
    }

    /// Whether a flattened stream was cut short.
    pub(super) fn is_cut(&self) -> bool {
        !self.ended
    }

    /// Size of the file as it is: no honest table in it is longer.
    pub(super) fn stored(&self) -> u64 {
        self.bytes.as_ref().len() as u64
    }

    /// End of the last byte.
    pub(super) fn len(&self) -> u64 {
        match &self.extents {
            None => self.stored(),
            Some(extents) => extents.last().map_or(0, |last| last.at.saturating_add(last.len)),
        }
    }

    /// Bytes that lie in one piece.
    pub(super) fn slice(&self, at: u64, len: usize) -> Option<&[u8]> {
        let from = match &self.extents {
            None => at,
            Some(extents) => {
                let extent = covering(extents, at)?;
                let within = at - extent.at;
                if len as u64 > extent.len - within {
                    return None;
                }
                extent.from.checked_add(within)?
            }
        };
        let from = usize::try_from(from).ok()?;
        self.bytes.as_ref().get(from..from.checked_add(len)?)
    }

    /// Fills `into`; `None` when a byte is not in the file.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Option<()> {
        let Some(extents) = &self.extents else {
            into.copy_from_slice(self.slice(at, into.len())?);
            return Some(());
        };
        let mut done = 0;
        while done < into.len() {
            let here = at.checked_add(done as u64)?;
            let extent = covering(extents, here)?;
            let left = extent.len - (here - extent.at);
            let len = (into.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            into.get_mut(done..done + len)?.copy_from_slice(self.slice(here, len)?);
            done += len;
        }
        Some(())
    }

    /// Fills `into`; what no record wrote, and what lies behind the end, is zero, as in the sparse file
    /// that a flattened stream stands for.
    pub(super) fn read_sparse(&self, at: u64, into: &mut [u8]) {
        into.fill(0);
        if let Some(source) = self.slice(at, into.len()) {
            into.copy_from_slice(source);
            return;
        }
        let end = at.saturating_add(into.len() as u64);
        let whole = [Extent { at: 0, from: 0, len: self.stored() }];
        let extents = self.extents.as_deref().unwrap_or(&whole);
        let first = extents.partition_point(|extent| extent.at.saturating_add(extent.len) <= at);
        for extent in extents.iter().skip(first).take_while(|extent| extent.at < end) {
            let start = extent.at.max(at);
            let stop = extent.at.saturating_add(extent.len).min(end);
            let len = usize::try_from(stop.saturating_sub(start)).unwrap_or(0);
            let to = usize::try_from(start - at).unwrap_or(usize::MAX);
            let target = to.checked_add(len).and_then(|stop| into.get_mut(to..stop));
            if let (Some(target), Some(source)) = (target, self.slice(start, len)) {
                target.copy_from_slice(source);
            }
        }
    }

    /// `len` bytes, borrowed where they lie in one piece. `None` when one is missing; nothing is
    /// allocated for a length that is not in the file.
    pub(super) fn bytes(&self, at: u64, len: u64) -> Option<Cow<'_, [u8]>> {
        if len > self.stored() {
            return None;
        }
        let len = usize::try_from(len).ok()?;
        if let Some(slice) = self.slice(at, len) {
            return Some(Cow::Borrowed(slice));
        }
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes)?;
        Some(Cow::Owned(bytes))
    }

    /// A little-endian number of `N` bytes.
    pub(super) fn array<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(at, &mut bytes)?;
        Some(bytes)
    }
}

impl<B: Bytes> Storage<B> {
    /// The bytes before `end`, from `from` on, are not read again soon.
    pub(super) fn forget(&self, from: u64, end: u64) {
        let range = (usize::try_from(from), usize::try_from(end.saturating_sub(from)));
        if let (None, (Ok(offset), Ok(len))) = (&self.extents, range) {
            self.bytes.forget(offset, len);
        }
    }
}

/// The extent that `at` lies in.
fn covering(extents: &[Extent], at: u64) -> Option<&Extent> {
    let after = extents.partition_point(|extent| extent.at <= at);
    let extent = extents.get(after.checked_sub(1)?)?;
    (at - extent.at < extent.len).then_some(extent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_missing_or_zero_as_asked() {
        let mut file = flat::testing::start();
        flat::testing::record(&mut file, 10, b"world");
        flat::testing::record(&mut file, 2, b"hello");
        flat::testing::end(&mut file);
        let storage = Storage::new(file).unwrap();
        assert!(storage.is_flattened() && !storage.is_cut());
        assert_eq!(storage.len(), 15);
        assert_eq!(storage.slice(2, 5), Some(&b"hello"[..]));
        assert_eq!(storage.slice(2, 6), None);
        let mut bytes = [1; 18];
        storage.read_sparse(0, &mut bytes);
        assert_eq!(&bytes, b"\0\0hello\0\0\0world\0\0\0");
        assert_eq!(storage.read(5, &mut [0; 3]), None);
        assert_eq!(storage.array::<2>(13), Some(*b"ld"));
    }

    #[test]
    fn a_plain_file_ends_where_it_ends() {
        let storage = Storage::new(b"abcdef".to_vec()).unwrap();
        let mut bytes = [1; 4];
        storage.read_sparse(4, &mut bytes);
        assert_eq!(&bytes, b"ef\0\0");
        assert!(storage.read(4, &mut bytes).is_none());
        assert!(storage.bytes(0, 1 << 60).is_none());
        assert!(storage.slice(u64::MAX, 1).is_none());
    }
}
