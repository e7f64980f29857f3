//! The VM's memory: a memfd, mapped.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU16;

/// A shared mapping of a memfd.
pub(crate) struct Memory {
    file: OwnedFd,
    base: *mut u8,
    len: usize,
}

impl Memory {
    /// So many bytes, all zero.
    pub(crate) fn new(len: usize) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len as u64).unwrap();
        // SAFETY: a fresh shared mapping of a memfd that is as long.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &file,
                0,
            )
        }
        .unwrap()
        .cast();
        Self { file, base, len }
    }

    /// Another memory with the same content.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::new(self.len);
        // SAFETY: two mappings of this length, which do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.base, copy.base, self.len) };
        copy
    }

    /// Leaves nothing of the file: whoever touches the mapping ends with SIGBUS.
    pub(crate) fn cut(&self) {
        rustix::fs::ftruncate(&self.file, 0).unwrap();
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it is mapped.
    pub(crate) fn address(&self) -> u64 {
        self.base as u64
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(crate) fn put(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    pub(crate) fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= self.len);
        let mut out = [0; N];
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), out.as_mut_ptr(), N) };
        out
    }

    pub(crate) fn index(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= self.len && at.is_multiple_of(2));
        // SAFETY: inside the mapping, aligned, and only ever accessed as an atomic here.
        unsafe { &*self.base.add(at).cast::<AtomicU16>() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, nothing refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}
