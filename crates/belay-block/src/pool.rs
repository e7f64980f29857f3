//! Memory for data on its way between a peer and a backend, used again and again.
//!
//! Fresh memory costs more than what is done with it: the kernel clears every page at its first touch, and unmaps
//! it when it is freed. (Measured: half of the time of a thread that served 128 KiB reads to a peer.)

use std::collections::VecDeque;
use std::sync::Arc;

use crate::op::{Aligned, Buf};

/// The alignment of pooled buffers, in bytes: what O_DIRECT wants of any disk.
const ALIGN: usize = 4096;
/// Sizes of pooled buffers are powers of two from this on, in bytes.
const SMALLEST: usize = 4096;
/// … up to this; larger ones are not kept.
const LARGEST: usize = 4 << 20;
/// Kinds of sizes.
const CLASSES: usize = (LARGEST / SMALLEST).ilog2() as usize + 1;
/// Memory that a pool keeps, in bytes: what 64 requests of 128 KiB need.
const KEPT_BYTES: usize = 8 << 20;

/// A pool of buffers. A buffer comes back by itself when the last [`Buf`] that shares its memory is dropped.
#[derive(Default)]
pub struct BufferPool {
    /// All pooled buffers of each size, those that were given out last behind.
    classes: [VecDeque<Arc<Aligned>>; CLASSES],
    bytes: usize,
}

impl BufferPool {
    /// A buffer of `len` bytes, aligned for O_DIRECT. **Its content is whatever was there before**: it must be
    /// filled before anyone else sees it.
    #[must_use]
    pub fn take(&mut self, len: usize) -> Buf {
        let size = len.max(SMALLEST).next_power_of_two();
        if size > LARGEST {
            return Buf::aligned(len, ALIGN);
        }
        let class = &mut self.classes[(size / SMALLEST).ilog2() as usize];
        // The one that was given out first is the likeliest to be free. Two looks: one slow request does not make
        // all others allocate.
        for _ in 0..class.len().min(2) {
            let Some(memory) = class.pop_front() else { break };
            let free = Arc::strong_count(&memory) == 1;
            class.push_back(Arc::clone(&memory));
            if free {
                return Buf::of(memory, len);
            }
        }
        let memory = Arc::new(Aligned::new(size, ALIGN));
        if self.bytes + size <= KEPT_BYTES {
            self.bytes += size;
            class.push_back(Arc::clone(&memory));
        }
        Buf::of(memory, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(buf: &Buf) -> usize {
        buf.pieces[0].base as usize
    }

    #[test]
    fn dropped_buffer_is_used_again_and_a_held_one_is_not() {
        let mut pool = BufferPool::default();
        let first = pool.take(5000);
        assert_eq!(first.len(), 5000);
        let part = first.part(512, 512);
        let at = base(&first);
        drop(first);
        // A part still shares the memory.
        assert_ne!(base(&pool.take(8192)), at);
        drop(part);
        let again = [pool.take(8192), pool.take(4097)].map(|buf| base(&buf));
        assert!(again.contains(&at));
    }

    #[test]
    fn buffers_in_use_are_distinct_and_aligned() {
        let mut pool = BufferPool::default();
        let all: Vec<Buf> = (0..300).map(|index| pool.take(1 + index * 997)).collect();
        let mut ranges: Vec<(usize, usize)> = all.iter().map(|buf| (base(buf), buf.len())).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        assert!(ranges.iter().all(|(base, _)| base.is_multiple_of(ALIGN)));
    }

    #[test]
    fn pool_keeps_no_more_than_its_limit() {
        let mut pool = BufferPool::default();
        drop((0..100).map(|_| pool.take(1 << 20)).collect::<Vec<_>>());
        drop(pool.take(LARGEST + 1));
        let kept: usize = pool.classes.iter().flatten().map(|memory| memory.len()).sum();
        assert!(kept <= KEPT_BYTES);
        assert_eq!(kept, pool.bytes);
    }
}
