//! The in-flight region: which requests are in flight, kept in memory that outlives us (specification, "Inflight I/O
//! tracking", split virtqueues).
//!
//! ```text
//!   queue 0: features u64 · version u16 · desc_num u16 · last_batch_head u16 · used_idx u16
//!            desc_num × { inflight u8 · pad · next u16 · counter u64 }           (to a multiple of 64)
//!   queue 1: …
//!   ours:    magic u64, pad to 64 · for each queue desc_num × tag u64
//! ```
//!
//! The part called *ours* is in regions that we made; one of another back-end has no tags.
//! The VMM can change the content at any time: it is read once, at the start of a ring, and checked.
#![allow(unsafe_code, reason = "the region is memory shared with the VMM, reached with atomics")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::connection::Marked;
use crate::mapping::{MapError, Mapping};

/// Each queue's part begins at a multiple of this.
const QUEUE_ALIGN: u64 = 64;
/// Bytes before the descriptor states of a queue.
const QUEUE_HEADER: u64 = 16;
/// Bytes of a descriptor state.
const STATE: u64 = 16;
/// Bytes before our tags.
const TAGS_HEADER: u64 = 64;
/// First word of our part: "BELAYTAG".
const TAGS_MAGIC: u64 = u64::from_le_bytes(*b"BELAYTAG");
/// The only version there is.
const VERSION: u16 = 1;
/// The largest ring.
const MAX_ENTRIES: u16 = 32768;

mod at {
    pub(super) const VERSION: usize = 8;
    pub(super) const DESC_NUM: usize = 10;
    pub(super) const LAST_BATCH_HEAD: usize = 12;
    pub(super) const USED_IDX: usize = 14;
    pub(super) const STATE_INFLIGHT: usize = 0;
    pub(super) const STATE_NEXT: usize = 6;
    pub(super) const STATE_COUNTER: usize = 8;
}

/// Why a region was not taken or made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    #[error("{queues} queues of {entries} entries are impossible")]
    Shape { queues: u16, entries: u16 },
    #[error("{have:#x} bytes are too few for {queues} queues of {entries} entries")]
    TooSmall { have: u64, queues: u16, entries: u16 },
    #[error("its offset {0:#x} is not a multiple of 8")]
    Misaligned(u64),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("cannot make a memory file: {0}")]
    Make(#[from] io::Error),
}

/// How a region of so many queues and entries is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    queues: u16,
    entries: u16,
}

impl Layout {
    fn new(queues: u16, entries: u16) -> Result<Self, InflightError> {
        if queues == 0 || entries == 0 || entries > MAX_ENTRIES {
            return Err(InflightError::Shape { queues, entries });
        }
        Ok(Self { queues, entries })
    }

    fn queue_len(self) -> u64 {
        (QUEUE_HEADER + STATE * u64::from(self.entries)).next_multiple_of(QUEUE_ALIGN)
    }

    /// Bytes that every back-end's region has.
    fn common_len(self) -> u64 {
        self.queue_len() * u64::from(self.queues)
    }

    /// Bytes of a region with tags.
    fn full_len(self) -> u64 {
        self.common_len() + TAGS_HEADER + 8 * u64::from(self.queues) * u64::from(self.entries)
    }
}

/// Says why there is no region of so many queues and entries.
pub(crate) fn refuse(queues: u16, entries: u16) -> Result<(OwnedFd, u64), InflightError> {
    Err(InflightError::Shape { queues, entries })
}

/// Makes a fresh region and its memory file, and says its length in bytes.
pub(crate) fn create(queues: u16, entries: u16) -> Result<(OwnedFd, u64), InflightError> {
    let layout = Layout::new(queues, entries)?;
    let len = layout.full_len();
    let fd = rustix::fs::memfd_create("belay-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(io::Error::from)?;
    rustix::fs::ftruncate(&fd, len).map_err(io::Error::from)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(io::Error::from)?;
    let region = Region { mapping: Arc::new(Mapping::new(fd.as_fd(), 0, len)?), layout, tags: true };
    for header in (0..queues).filter_map(|queue| region.queue(queue)) {
        // SAFETY: the header of a queue lies in the mapping, aligned to 64.
        unsafe {
            AtomicU16::from_ptr(header.add(at::VERSION).cast()).store(VERSION, Ordering::Relaxed);
            AtomicU16::from_ptr(header.add(at::DESC_NUM).cast()).store(entries, Ordering::Relaxed);
        }
    }
    // SAFETY: the tags' header lies behind the queues, in the mapping, aligned to 64.
    unsafe {
        let magic = region.mapping.base().add(layout.common_len() as usize);
        AtomicU64::from_ptr(magic.cast()).store(TAGS_MAGIC, Ordering::Release);
    }
    Ok((fd, len))
}

/// A region that the VMM gave with SET_INFLIGHT_FD.
pub(crate) struct Region {
    mapping: Arc<Mapping>,
    layout: Layout,
    tags: bool,
}

impl Region {
    pub(crate) fn open(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        queues: u16,
        entries: u16,
    ) -> Result<Self, InflightError> {
        let layout = Layout::new(queues, entries)?;
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Misaligned(offset));
        }
        if len < layout.common_len() {
            return Err(InflightError::TooSmall { have: len, queues, entries });
        }
        let mapping = Arc::new(Mapping::new(fd, offset, len)?);
        let mut tags = len >= layout.full_len();
        if tags {
            // SAFETY: the tags' header lies in the mapping, whose base is a multiple of 8 as is every part's length.
            let magic =
                unsafe { AtomicU64::from_ptr(mapping.base().add(layout.common_len() as usize).cast()) };
            tags = magic.load(Ordering::Acquire) == TAGS_MAGIC;
        }
        Ok(Self { mapping, layout, tags })
    }

    fn queue(&self, queue: u16) -> Option<*mut u8> {
        let skip = self.layout.queue_len() * u64::from(queue);
        // SAFETY: queues below the number are inside the mapping, whose length was checked.
        (queue < self.layout.queues).then(|| unsafe { self.mapping.base().add(skip as usize) })
    }

    /// The tags of all requests that are marked in flight, whichever their queue; no tag is 0.
    pub(crate) fn tags(&self) -> Vec<u64> {
        let queues = (0..self.layout.queues).filter_map(|queue| self.attach(queue, self.layout.entries));
        queues
            .flat_map(|queue| {
                let marked = (0..queue.size).filter(|head| queue.flag(*head).load(Ordering::Acquire) == 1);
                marked
                    .filter_map(|head| queue.tag(head).map(|tag| tag.load(Ordering::Relaxed)))
                    .collect::<Vec<u64>>()
            })
            .collect()
    }

    /// The part of one queue, for a ring of `size` entries. `None`: the region has none, or too small a one.
    pub(crate) fn attach(&self, queue: u16, size: u16) -> Option<InflightQueue> {
        if size > self.layout.entries {
            return None;
        }
        let header = self.queue(queue)?;
        let tags = self.tags.then(|| {
            let skip = self.layout.common_len()
                + TAGS_HEADER
                + 8 * u64::from(queue) * u64::from(self.layout.entries);
            // SAFETY: the tags of this queue lie in the mapping: `full_len` was checked.
            unsafe { self.mapping.base().add(skip as usize).cast::<u64>() }
        });
        Some(InflightQueue {
            header,
            tags,
            size,
            counter: 0,
            batch: Vec::with_capacity(usize::from(size)),
            last_batch_head: 0,
            _mapping: Arc::clone(&self.mapping),
        })
    }
}

/// One queue's part of a region, used by the ring that runs.
pub(crate) struct InflightQueue {
    header: *mut u8,
    tags: Option<*mut u64>,
    size: u16,
    /// The counter that the next mark gets.
    counter: u64,
    /// Heads completed but not published.
    batch: Vec<u16>,
    last_batch_head: u16,
    /// Keeps the addresses valid.
    _mapping: Arc<Mapping>,
}

impl InflightQueue {
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: only called with offsets of the queue's header, which is mapped and aligned to 8; the memory is
        // reached through atomics only and lives as long as `_mapping`.
        unsafe { AtomicU16::from_ptr(self.header.add(offset).cast()) }
    }

    /// Address of the state of `head`, which must be below the size.
    #[inline]
    fn state(&self, head: u16) -> *mut u8 {
        debug_assert!(head < self.size);
        // SAFETY: `head < size <= desc_num` of the layout, all of whose states are mapped.
        unsafe { self.header.add(QUEUE_HEADER as usize + usize::from(head) * STATE as usize) }
    }

    #[inline]
    fn flag(&self, head: u16) -> &AtomicU8 {
        // SAFETY: inside the state; reached through atomics only; lives as long as `_mapping`.
        unsafe { AtomicU8::from_ptr(self.state(head).add(at::STATE_INFLIGHT)) }
    }

    #[inline]
    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: as for `flag`; states are aligned to 8, so this is to 2.
        unsafe { AtomicU16::from_ptr(self.state(head).add(at::STATE_NEXT).cast()) }
    }

    #[inline]
    fn counter(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as for `flag`; states are aligned to 8, and so is this.
        unsafe { AtomicU64::from_ptr(self.state(head).add(at::STATE_COUNTER).cast()) }
    }

    #[inline]
    fn tag(&self, head: u16) -> Option<&AtomicU64> {
        // SAFETY: `head < size <= desc_num`, all of whose tags are mapped and aligned to 8.
        self.tags.map(|tags| unsafe { AtomicU64::from_ptr(tags.add(usize::from(head))) })
    }

    /// Puts the region in order after whatever happened to its last user, and says what is in flight, oldest first.
    ///
    /// `used` is the used index in guest memory. If the region's differs, its last user died between publishing a
    /// batch and clearing its marks: the batch is walked and cleared. A difference larger than the ring comes from a
    /// fresh region for a ring that has run before: there is nothing to clear, only the index is set. Without that,
    /// the first crash would clear the mark of a request that was never answered.
    pub(crate) fn recover(&mut self, used: u16) -> Vec<Marked> {
        let behind = used.wrapping_sub(self.u16_at(at::USED_IDX).load(Ordering::Acquire));
        if behind != 0 && behind <= self.size {
            let mut head = self.u16_at(at::LAST_BATCH_HEAD).load(Ordering::Relaxed);
            for _ in 0..behind {
                if head >= self.size {
                    break;
                }
                self.flag(head).store(0, Ordering::Relaxed);
                head = self.next(head).load(Ordering::Relaxed);
            }
        }
        self.u16_at(at::VERSION).store(VERSION, Ordering::Relaxed);
        self.u16_at(at::USED_IDX).store(used, Ordering::Release);
        let mut marked: Vec<(u64, Marked)> = (0..self.size)
            .filter(|head| self.flag(*head).load(Ordering::Acquire) == 1)
            .map(|head| {
                let tag = self.tag(head).map_or(0, |tag| tag.load(Ordering::Relaxed));
                (self.counter(head).load(Ordering::Relaxed), Marked { head, tag })
            })
            .collect();
        marked.sort_by_key(|(counter, _)| *counter);
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        marked.into_iter().map(|(_, marked)| marked).collect()
    }

    /// `head` is in flight now.
    #[inline]
    pub(crate) fn mark(&mut self, head: u16, tag: u64) {
        if let Some(slot) = self.tag(head) {
            slot.store(tag, Ordering::Relaxed);
        }
        self.counter(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// `head` is not in flight, and will not be in the used ring either.
    pub(crate) fn unmark(&mut self, head: u16) {
        self.flag(head).store(0, Ordering::Release);
    }

    /// `head` joins the batch that is published next. One that was answered at once is marked first: between here and
    /// the used index a successor must find every head that was popped, or it would pop the wrong ones.
    #[inline]
    pub(crate) fn complete(&mut self, head: u16) {
        if self.flag(head).load(Ordering::Relaxed) != 1 {
            self.mark(head, 0);
        }
        self.next(head).store(self.last_batch_head, Ordering::Relaxed);
        self.last_batch_head = head;
        self.u16_at(at::LAST_BATCH_HEAD).store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The used index is published as `used`: the batch is no longer in flight.
    #[inline]
    pub(crate) fn published(&mut self, used: u16) {
        for index in 0..self.batch.len() {
            self.flag(self.batch[index]).store(0, Ordering::Relaxed);
        }
        self.batch.clear();
        self.u16_at(at::USED_IDX).store(used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(fd: &OwnedFd, len: u64, queues: u16, entries: u16) -> Region {
        Region::open(fd.as_fd(), 0, len, queues, entries).unwrap()
    }

    #[test]
    fn marks_come_back_in_order_of_submission_with_tags() {
        let (fd, len) = create(2, 8).unwrap();
        let mut queue = open(&fd, len, 2, 8).attach(1, 8).unwrap();
        assert_eq!(queue.recover(0), []);
        for (head, tag) in [(5, 50), (2, 20), (7, 70)] {
            queue.mark(head, tag);
        }
        queue.complete(2);
        queue.published(1);
        drop(queue);
        let region = open(&fd, len, 2, 8);
        let marked = region.attach(1, 8).unwrap().recover(1);
        assert_eq!(marked, [Marked { head: 5, tag: 50 }, Marked { head: 7, tag: 70 }]);
        assert_eq!(region.attach(0, 8).unwrap().recover(0), []);
    }

    #[test]
    fn tags_of_every_queue_are_told_while_they_are_marked() {
        let (fd, len) = create(3, 8).unwrap();
        let region = open(&fd, len, 3, 8);
        let mut queue = region.attach(2, 8).unwrap();
        queue.mark(7, 70);
        queue.mark(1, 10);
        queue.unmark(1);
        region.attach(0, 4).unwrap().mark(3, 30);
        assert_eq!(region.tags(), [30, 70]);
    }

    #[test]
    fn crash_between_used_index_and_clearing_forgets_only_the_batch() {
        let (fd, len) = create(1, 8).unwrap();
        let mut queue = open(&fd, len, 1, 8).attach(0, 8).unwrap();
        queue.recover(100);
        for head in [0, 1, 2, 3] {
            queue.mark(head, u64::from(head));
        }
        queue.complete(3);
        queue.complete(1);
        drop(queue);
        let marked = open(&fd, len, 1, 8).attach(0, 8).unwrap().recover(102);
        assert_eq!(marked.iter().map(|m| m.head).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn crash_before_used_index_keeps_the_batch_in_flight() {
        let (fd, len) = create(1, 8).unwrap();
        let mut queue = open(&fd, len, 1, 8).attach(0, 8).unwrap();
        queue.recover(100);
        queue.mark(0, 1);
        queue.complete(0);
        drop(queue);
        assert_eq!(open(&fd, len, 1, 8).attach(0, 8).unwrap().recover(100).len(), 1);
    }

    #[test]
    fn head_that_was_answered_without_a_mark_is_in_flight_until_it_is_published() {
        let (fd, len) = create(1, 8).unwrap();
        let mut queue = open(&fd, len, 1, 8).attach(0, 8).unwrap();
        queue.recover(0);
        queue.mark(4, 40);
        queue.complete(2);
        queue.mark(6, 60);
        drop(queue);
        let heads = |used| {
            let marked = open(&fd, len, 1, 8).attach(0, 8).unwrap().recover(used);
            marked.into_iter().map(|m| (m.head, m.tag)).collect::<Vec<_>>()
        };
        assert_eq!(heads(0), [(4, 40), (2, 0), (6, 60)]);
        assert_eq!(heads(1), [(4, 40), (6, 60)], "the batch was head 2");
    }

    #[test]
    fn fresh_region_of_a_ring_that_has_run_keeps_request_zero() {
        for used in [3, 500] {
            let (fd, len) = create(1, 8).unwrap();
            let mut queue = open(&fd, len, 1, 8).attach(0, 8).unwrap();
            assert_eq!(queue.recover(used), []);
            queue.mark(0, 9);
            drop(queue);
            let marked = open(&fd, len, 1, 8).attach(0, 8).unwrap().recover(used);
            assert_eq!(marked, [Marked { head: 0, tag: 9 }]);
        }
    }

    #[test]
    fn foreign_region_without_tags_marks_with_tag_zero() {
        let fd = rustix::fs::memfd_create("foreign", MemfdFlags::CLOEXEC).unwrap();
        let len = Layout::new(1, 8).unwrap().common_len();
        rustix::fs::ftruncate(&fd, len).unwrap();
        let mut queue = open(&fd, len, 1, 8).attach(0, 8).unwrap();
        queue.recover(0);
        queue.mark(4, 77);
        drop(queue);
        let marked = open(&fd, len, 1, 8).attach(0, 8).unwrap().recover(0);
        assert_eq!(marked, [Marked { head: 4, tag: 0 }]);
    }

    #[test]
    fn impossible_regions_refused() {
        let (fd, len) = create(1, 8).unwrap();
        let open = |offset, len, queues, entries| Region::open(fd.as_fd(), offset, len, queues, entries);
        assert!(matches!(open(0, len, 0, 8), Err(InflightError::Shape { .. })));
        assert!(matches!(open(0, len, 1, 0), Err(InflightError::Shape { .. })));
        assert!(matches!(open(0, len, 1, 32769), Err(InflightError::Shape { .. })));
        assert!(matches!(open(0, len, 64, 8), Err(InflightError::TooSmall { .. })));
        assert!(matches!(open(4, len - 8, 1, 8), Err(InflightError::Misaligned(4))));
        assert!(matches!(open(0, len + 1, 1, 8), Err(InflightError::Map(_))));
    }

    #[test]
    fn garbage_in_region_stays_inside_the_ring() {
        let (fd, len) = create(1, 8).unwrap();
        rustix::io::pwrite(&fd, &vec![0xff; len as usize], 0).unwrap();
        let mut queue = open(&fd, len, 1, 8).attach(0, 8).unwrap();
        assert!(queue.recover(3).iter().all(|m| m.head < 8));
        let mut bytes = vec![1; len as usize];
        bytes[12] = 0;
        rustix::io::pwrite(&fd, &bytes, 0).unwrap();
        let marked = open(&fd, len, 1, 8).attach(0, 8).unwrap().recover(0x0101 + 8);
        assert!(marked.len() <= 8);
    }

    #[test]
    fn ring_larger_than_region_or_queue_beyond_it_has_none() {
        let (fd, len) = create(1, 8).unwrap();
        let region = open(&fd, len, 1, 8);
        assert!(region.attach(0, 16).is_none());
        assert!(region.attach(1, 8).is_none());
    }
}
