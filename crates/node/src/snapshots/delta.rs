//! What an incremental snapshot shares with an earlier one, its base: pages that are the same lie there alone.
//!
//! For each of its two long files, memory and writable disk, a second file says by one bit for each page of 4 KiB, from the
//! lowest bit of the first byte on, whether that page is the base's; what is not, and is not zero, lies in the file itself, at its
//! place. Digests are those of the whole, so that whatever was changed in a base is seen. All of this blocks on files.

use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use vistara_machine::sparse_pieces;

const PAGE: usize = 4096;

/// Which pages of a file are its base's.
struct Same(Vec<u8>);

impl Same {
    fn none(len: u64) -> io::Result<Same> {
        let pages = usize::try_from(len.div_ceil(PAGE as u64)).map_err(io::Error::other)?;
        Ok(Same(vec![0; pages.div_ceil(8)]))
    }

    fn has(&self, page: u64) -> bool {
        let byte = usize::try_from(page / 8).ok().and_then(|at| self.0.get(at));
        byte.is_some_and(|byte| byte >> (page % 8) & 1 == 1)
    }

    fn set(&mut self, page: u64) {
        let byte = usize::try_from(page / 8).ok();
        if let Some(byte) = byte.and_then(|at| self.0.get_mut(at)) {
            *byte |= 1 << (page % 8);
        }
    }
}

/// Makes a part of a file zero, and gives its room back where the file system can.
fn clear(file: &File, at: u64, len: usize) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, at, len as u64) {
        Ok(()) => Ok(()),
        Err(_) => file.write_all_at(&vec![0; len], at),
    }
}

/// Takes out of `file` what `base` has at the same place. What is to be kept beside it says which pages those are.
pub(super) fn leave_out(file: &File, base: &File) -> io::Result<Vec<u8>> {
    let mut same = Same::none(file.metadata()?.len())?;
    let base_len = base.metadata()?.len();
    let mut theirs = [0; PAGE];
    let mut found: Vec<(u64, usize)> = Vec::new();
    sparse_pieces(file, |place, piece| {
        for (index, ours) in piece.chunks(PAGE).enumerate() {
            let at = place + (index * PAGE) as u64;
            let theirs = &mut theirs[..ours.len()];
            if at + ours.len() as u64 > base_len || ours.iter().all(|byte| *byte == 0) {
                continue;
            }
            base.read_exact_at(theirs, at)?;
            if theirs == ours {
                same.set(at / PAGE as u64);
                // Pages that follow one another go together.
                match found.last_mut() {
                    Some((begin, len)) if *begin + *len as u64 == at => *len += ours.len(),
                    _ => found.push((at, ours.len())),
                }
            }
        }
        Ok(())
    })?;
    for (at, len) in found {
        clear(file, at, len)?;
    }
    Ok(same.0)
}

/// Makes of `whole`, which has the base's content, that of a file of which only this was kept.
pub(super) fn lay_over(whole: &File, own: &File, same: Vec<u8>) -> io::Result<()> {
    let len = own.metadata()?.len();
    let same = Same(same);
    if same.0.len() != Same::none(len)?.0.len() {
        return Err(io::Error::other("it does not say of each page whose it is"));
    }
    whole.set_len(len)?;
    // What is neither the base's nor its own is zero.
    let mut at = 0;
    while at < len {
        let begin = at;
        while at < len && !same.has(at / PAGE as u64) {
            at = (at + PAGE as u64).min(len);
        }
        let gap = usize::try_from(at - begin).map_err(io::Error::other)?;
        if gap > 0 {
            clear(whole, begin, gap)?;
        }
        while at < len && same.has(at / PAGE as u64) {
            at = (at + PAGE as u64).min(len);
        }
    }
    sparse_pieces(own, |place, piece| {
        for (index, ours) in piece.chunks(PAGE).enumerate() {
            let at = place + (index * PAGE) as u64;
            if !same.has(at / PAGE as u64) {
                whole.write_all_at(ours, at)?;
            }
        }
        Ok(())
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn file(content: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Pages of one byte each, and an end that is no whole page.
    fn pages(kinds: &[u8], end: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = kinds.iter().flat_map(|kind| vec![*kind; PAGE]).collect();
        bytes.extend(vec![9; end]);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_left_out_is_laid_over_again(
            ours in prop::collection::vec(0u8..4, 0..60),
            base in prop::collection::vec(0u8..4, 0..60),
            (end, base_end) in (0usize..PAGE, 0usize..PAGE),
        ) {
            let (ours, base) = (pages(&ours, end), pages(&base, base_end));
            let (own, whole) = (file(&ours), file(&base));
            let same = leave_out(&own, &whole).unwrap();
            prop_assert_eq!(content(&whole), base, "the base is not touched");
            lay_over(&whole, &own, same).unwrap();
            prop_assert_eq!(content(&whole), ours);
        }
    }

    #[test]
    fn only_what_differs_takes_room_and_a_short_list_of_pages_is_refused() {
        let base = pages(&[1; 500], 0);
        let mut ours = base.clone();
        ours[PAGE * 7] = 8;
        let (own, base) = (file(&ours), file(&base));
        let same = leave_out(&own, &base).unwrap();
        assert!(own.metadata().unwrap().blocks() * 512 <= 64 << 10);
        assert!(lay_over(&base, &own, same[1..].to_vec()).is_err());
        lay_over(&base, &own, same).unwrap();
        assert_eq!(content(&base), ours);
    }
}
