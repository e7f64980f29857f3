//! Which version of each block a read may return.
//!
//! At most one write of a block is under way at any time, so a block has two numbers: `acked`, the version of the
//! last write that was acknowledged, and `issued`, the version of the last one that was begun. A read may return
//! anything from `acked` at its beginning to `issued` at its end.
//!
//! A write that fails leaves `issued` ahead for ever: old or new, nobody knows. The block is then still read and
//! checked against both, but not written any more.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// The versions of all blocks of a region.
#[derive(Debug)]
pub struct Versions(Vec<Block>);

#[derive(Debug)]
struct Block {
    acked: AtomicU32,
    issued: AtomicU32,
}

impl Versions {
    /// `count` blocks that all hold version `version`.
    #[must_use]
    pub fn new(count: usize, version: u32) -> Self {
        let block = || Block { acked: AtomicU32::new(version), issued: AtomicU32::new(version) };
        Self((0..count).map(|_| block()).collect())
    }

    /// How many blocks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Begins writes of all blocks in `range`; false if one of them is being written already, or retired.
    /// [`next`](Self::next) then tells each block's version.
    #[must_use]
    pub fn begin(&self, range: Range<usize>) -> bool {
        for index in range.clone() {
            let block = &self.0[index];
            let acked = block.acked.load(Ordering::SeqCst);
            let begun = block.issued.compare_exchange(acked, acked + 1, Ordering::SeqCst, Ordering::SeqCst);
            if begun.is_err() {
                for taken in &self.0[range.start..index] {
                    taken.issued.store(taken.acked.load(Ordering::SeqCst), Ordering::SeqCst);
                }
                return false;
            }
        }
        true
    }

    /// The version of the last write of a block that was begun.
    #[must_use]
    pub fn next(&self, index: usize) -> u32 {
        self.0[index].issued.load(Ordering::SeqCst)
    }

    /// The writes begun by [`begin`](Self::begin) were acknowledged.
    pub fn acknowledge(&self, range: Range<usize>) {
        for block in &self.0[range] {
            block.acked.store(block.issued.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }

    /// The oldest version that a read of this block, beginning now, may return.
    #[must_use]
    pub fn oldest(&self, index: usize) -> u32 {
        self.0[index].acked.load(Ordering::SeqCst)
    }

    /// The newest version that a read of this block, ending now, may return.
    #[must_use]
    pub fn newest(&self, index: usize) -> u32 {
        self.0[index].issued.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_in_flight_is_not_written_twice() {
        let versions = Versions::new(8, 1);
        assert!(versions.begin(2..4));
        assert!(!versions.begin(0..3), "block 2 is in flight");
        assert_eq!((versions.oldest(0), versions.newest(0)), (1, 1), "what was taken is given back");
        assert_eq!((versions.oldest(2), versions.newest(2)), (1, 2));
        versions.acknowledge(2..4);
        assert_eq!((versions.oldest(2), versions.newest(2)), (2, 2));
        assert!(versions.begin(0..3));
        assert_eq!(versions.next(2), 3);
    }
}
