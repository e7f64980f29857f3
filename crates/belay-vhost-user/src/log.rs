//! The dirty log: one bit for every 4 KiB page of guest memory that was written (specification, "Migration").
#![allow(unsafe_code, reason = "the log is memory shared with the VMM, set bit by bit with atomics")]

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::mapping::{MapError, Mapping};

/// Bytes per bit: VHOST_LOG_PAGE.
const PAGE: u64 = 4096;
/// Bytes of guest memory per byte of the log.
const PER_BYTE: u64 = PAGE * 8;

/// A log that the VMM gave with SET_LOG_BASE.
pub(crate) struct DirtyLog {
    mapping: Mapping,
    /// A page beyond the log's end was written, and that was reported.
    overrun: AtomicBool,
}

impl DirtyLog {
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MapError> {
        Ok(Self { mapping: Mapping::new(fd, offset, len)?, overrun: AtomicBool::new(false) })
    }

    /// Sets the bits of the pages that hold guest addresses `addr` to `addr + len - 1`. To be called after they were
    /// written: the VMM clears a bit before it copies the page, so a bit set late costs nothing and a bit set early
    /// loses data.
    pub(crate) fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = addr / PAGE;
        let last = addr.saturating_add(len - 1) / PAGE;
        let mut page = first;
        while page <= last {
            let byte = page / 8;
            let until = last.min(byte * 8 + 7);
            let low = 0xffu8 << (page % 8);
            let high = 0xffu8 >> (7 - until % 8);
            if byte >= self.mapping.len() as u64 {
                self.report_overrun(page * PAGE);
                return;
            }
            // SAFETY: `byte` is inside the mapping, and the log is only reached with atomics here.
            let bits = unsafe { AtomicU8::from_ptr(self.mapping.base().add(byte as usize)) };
            bits.fetch_or(low & high, Ordering::Release);
            page = until + 1;
        }
    }

    #[cold]
    fn report_overrun(&self, addr: u64) {
        if !self.overrun.swap(true, Ordering::Relaxed) {
            tracing::error!(
                addr = format_args!("{addr:#x}"),
                covers = format_args!("{:#x}", self.mapping.len() as u64 * PER_BYTE),
                "the VMM's dirty log does not cover a page that was written; the migration may lose it"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::fs::MemfdFlags;

    use super::*;

    fn log(len: u64) -> (OwnedFd, DirtyLog) {
        let fd = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        let log = DirtyLog::new(fd.as_fd(), 0, len).unwrap();
        (fd, log)
    }

    fn pages(fd: &OwnedFd, len: usize) -> Vec<u64> {
        let mut bytes = vec![0; len];
        rustix::io::pread(fd, &mut bytes, 0).unwrap();
        (0..len as u64 * 8).filter(|p| bytes[(p / 8) as usize] & (1 << (p % 8)) != 0).collect()
    }

    #[test]
    fn range_sets_exactly_its_pages() {
        for (addr, len) in [(0, 1), (0xfff, 1), (0xfff, 2), (0x7000, 0x2000), (0x6001, 0x1_3000), (5, 0)] {
            let (fd, log) = log(64);
            log.mark(addr, len);
            let want: Vec<u64> =
                if len == 0 { vec![] } else { (addr / 4096..=(addr + len - 1) / 4096).collect() };
            assert_eq!(pages(&fd, 64), want, "{addr:#x}+{len:#x}");
        }
    }

    #[test]
    fn page_beyond_log_ignored() {
        let (fd, log) = log(1);
        log.mark(0x7000, 0x3000);
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX - 5, 100);
        assert_eq!(pages(&fd, 1), [7]);
    }
}
