//! Where each page of a stream lies in the file. A stream sends pages in any order, and some of them again and again
//! while the guest runs: the last time counts. Pages that were sent one behind the other are one run, so that the
//! index of a guest that stood still is small. Knows nothing of what is a page of which memory.

use std::collections::BTreeMap;

/// Size of a page in bytes.
pub(super) const PAGE: u64 = 4096;
/// From one page to the next one of a run, in the file: a page and the header of the next one.
const STRIDE: u64 = PAGE + 8;

/// Where a page's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At an offset in the file.
    At(u64),
    /// Nowhere: all bytes are this one.
    Filled(u8),
    /// It was sent in a way that is not read.
    Unread,
}

/// Bits of a packed [`Place`] that no offset has.
const FILLED: u64 = 1 << 63;
const UNREAD: u64 = u64::MAX;

impl Place {
    const fn packed(self) -> u64 {
        match self {
            Self::At(offset) => offset & !FILLED,
            Self::Filled(byte) => FILLED | byte as u64,
            Self::Unread => UNREAD,
        }
    }
}

/// Pages that follow each other, 16 bytes of memory each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u32,
    pages: u32,
    /// [`Place`] of the first one.
    place: u64,
}

impl Run {
    /// Behind its last page.
    fn end(self) -> u32 {
        self.start.saturating_add(self.pages)
    }

    /// [`Place`] of the page that comes so many after the first, packed.
    fn place(self, skip: u32) -> u64 {
        match self.place & FILLED {
            0 => self.place.wrapping_add(u64::from(skip) * STRIDE) & !FILLED,
            _ => self.place,
        }
    }

    /// Its pages from `page` on.
    fn from(self, page: u32) -> Self {
        let skip = page.saturating_sub(self.start);
        Self { start: page, pages: self.pages.saturating_sub(skip), place: self.place(skip) }
    }

    /// Its pages before `page`.
    fn before(self, page: u32) -> Self {
        Self { pages: page.saturating_sub(self.start), ..self }
    }
}

/// Takes pages in the order of the stream.
#[derive(Default)]
pub(super) struct Builder {
    /// By their starts, without overlap.
    runs: BTreeMap<u32, Run>,
    /// What the next page may still go on with.
    open: Option<Run>,
}

impl Builder {
    /// A page; what was known of it before counts no more.
    pub(super) fn add(&mut self, page: u32, place: Place) {
        let place = place.packed();
        if let Some(open) = &mut self.open
            && page == open.end()
            && open.place(open.pages) == place
        {
            open.pages += 1;
            return;
        }
        self.close();
        self.open = Some(Run { start: page, pages: 1, place });
    }

    /// Puts the open run over all that is there.
    fn close(&mut self) {
        let Some(new) = self.open.take() else { return };
        while let Some((_, &old)) = self.runs.range(..new.end()).next_back() {
            if old.end() <= new.start {
                break;
            }
            self.runs.remove(&old.start);
            // Each run covers at most one start of an old one and one end: this grows by two at most.
            for rest in [old.before(new.start), old.from(new.end())] {
                if rest.pages > 0 && rest.start < old.end() {
                    self.runs.insert(rest.start, rest);
                }
            }
        }
        self.runs.insert(new.start, new);
    }

    /// All pages that can be read.
    pub(super) fn finish(mut self) -> Runs {
        self.close();
        Runs(self.runs.into_values().filter(|run| run.place != UNREAD).collect())
    }
}

/// The index: ascending, without overlap.
pub(super) struct Runs(Vec<Run>);

impl Runs {
    /// Where a page is; `None` when it is not in the file.
    pub(super) fn find(&self, page: u32) -> Option<Place> {
        let after = self.0.partition_point(|run| run.start <= page);
        let run = self.0.get(after.checked_sub(1)?).filter(|run| page < run.end())?;
        let place = run.place(page - run.start);
        Some(if place & FILLED == 0 { Place::At(place) } else { Place::Filled(place as u8) })
    }

    /// The pages between two that are in the file: start and end of each run, ascending.
    pub(super) fn within(&self, start: u32, end: u32) -> impl Iterator<Item = (u32, u32)> {
        let first = self.0.partition_point(|run| run.end() <= start);
        let runs = self.0.iter().skip(first).take_while(move |run| run.start < end);
        runs.map(move |run| (run.start.max(start), run.end().min(end)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_that_stood_still_is_a_few_runs() {
        let mut builder = Builder::default();
        for page in 0..1000 {
            builder.add(page, Place::At(100 + u64::from(page) * 4104));
        }
        for page in 1000..5000 {
            builder.add(page, Place::Filled(0));
        }
        let runs = builder.finish();
        assert_eq!((runs.0.len(), size_of::<Run>()), (2, 16));
        assert_eq!(runs.find(999), Some(Place::At(100 + 999 * 4104)));
        assert_eq!((runs.find(4999), runs.find(5000)), (Some(Place::Filled(0)), None));
        assert_eq!(runs.within(990, 1005).collect::<Vec<_>>(), [(990, 1000), (1000, 1005)]);
    }

    #[test]
    fn a_page_that_is_not_read_hides_its_older_copy() {
        let mut builder = Builder::default();
        for (page, place) in [(4, Place::At(9000)), (5, Place::At(9000 + 4104)), (4, Place::Unread)]
        {
            builder.add(page, place);
        }
        let runs = builder.finish();
        assert_eq!((runs.find(4), runs.find(5)), (None, Some(Place::At(9000 + 4104))));
    }

    proptest! {
        #[test]
        fn the_last_copy_counts(
            sent in proptest::collection::vec((0u32..40, 1u32..12, 0u8..6), 0..60),
        ) {
            let (mut builder, mut model) = (Builder::default(), HashMap::new());
            let mut offset = 1000;
            for (start, pages, kind) in sent {
                for page in start..start + pages {
                    let place = match kind {
                        0 => Place::Unread,
                        1 | 2 => Place::Filled(kind),
                        _ => Place::At(offset),
                    };
                    offset += if kind > 2 { 4104 } else { 9 };
                    builder.add(page, place);
                    model.insert(page, place);
                }
            }
            let runs = builder.finish();
            prop_assert!(runs.0.windows(2).all(|pair| pair[0].end() <= pair[1].start));
            for page in 0..60 {
                let expected = model.get(&page).copied().filter(|it| *it != Place::Unread);
                prop_assert_eq!(runs.find(page), expected, "page {}", page);
            }
        }
    }
}
