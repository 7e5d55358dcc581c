//! A read of guest-physical memory, cut where pages end: files hold pages one by one.

use guest::{GuestPhys, MemoryError};

/// Calls `read` for each part of `into` that lies in one page of `page` bytes, with its address and the length of the
/// whole.
///
/// # Errors
/// The first one of `read`, and [`MemoryError::Wraps`] beyond the last address.
pub(super) fn by_page(
    page: u64,
    at: GuestPhys,
    into: &mut [u8],
    mut read: impl FnMut(GuestPhys, &mut [u8], usize) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let len = into.len();
    let mut rest = into;
    let mut here = at;
    while !rest.is_empty() {
        let left = usize::try_from(page - here.0 % page).unwrap_or(usize::MAX);
        let (part, later) = rest.split_at_mut(rest.len().min(left));
        read(here, part, len)?;
        let next = here.checked_add(part.len() as u64);
        rest = later;
        here = match next {
            Some(next) => next,
            None if rest.is_empty() => break,
            None => return Err(MemoryError::Wraps { at: at.0, len }),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(at: u64, len: usize) -> (Vec<(u64, usize)>, Result<(), MemoryError>) {
        let mut parts = Vec::new();
        let done = by_page(0x1000, GuestPhys(at), &mut vec![0; len], |at, part, _| {
            parts.push((at.0, part.len()));
            Ok(())
        });
        (parts, done)
    }

    #[test]
    fn parts_end_where_pages_do() {
        assert_eq!(parts(0x1ff0, 0x1020).0, [(0x1ff0, 0x10), (0x2000, 0x1000), (0x3000, 0x10)]);
        assert_eq!(parts(0x1000, 0).0, []);
    }

    #[test]
    fn the_last_page_may_be_read_to_its_end_and_no_further() {
        let last = 0_u64.wrapping_sub(0x10);
        assert_eq!(parts(last, 0x10), (vec![(last, 0x10)], Ok(())));
        assert!(matches!(parts(last, 0x11).1, Err(MemoryError::Wraps { len: 0x11, .. })));
    }
}
