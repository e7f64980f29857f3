//! A file of the VMM's, or of ours, mapped shared: guest memory, dirty log, in-flight region.
#![allow(unsafe_code, reason = "maps and unmaps memory")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{FileType, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::guard::Guard;

/// `f_type` of hugetlbfs, whose mappings begin and end at huge pages.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// The page size if the host does not say.
const PAGE: u64 = 4096;

/// Why a file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MapError {
    #[error("nothing to map: length 0")]
    Empty,
    #[error("offset {offset:#x} and length {len:#x} are larger than any file")]
    Overflow { offset: u64, len: u64 },
    #[error(
        "the descriptor is not a regular or memory file; share guest memory as memory-backend-memfd or -file"
    )]
    NotAFile,
    #[error("the file has {have:#x} bytes, but offset {offset:#x} and length {len:#x} were given")]
    TooShort { have: u64, offset: u64, len: u64 },
    #[error("cannot map the file: {0}")]
    Io(#[from] io::Error),
}

/// `len` bytes of a file from some offset, mapped readable and writable, shared; unmapped when dropped.
///
/// The other side may change the content at any time: only raw copies and atomics may touch it.
pub(crate) struct Mapping {
    /// Ends before the mapping does.
    guard: Option<Guard>,
    /// Where mmap put the first page.
    start: *mut u8,
    /// Bytes mapped, whole pages.
    mapped: usize,
    /// Where the wanted bytes begin.
    base: *mut u8,
    /// How many bytes were wanted.
    len: usize,
}

// SAFETY: a mapping is valid on every thread; who reaches through `base` does so with raw copies and atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`, after checking that the file has them.
    pub(crate) fn new(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MapError> {
        if len == 0 {
            return Err(MapError::Empty);
        }
        let overflow = MapError::Overflow { offset, len };
        let Some(end) = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64) else {
            return Err(overflow);
        };
        let stat = rustix::fs::fstat(fd).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MapError::NotAFile);
        }
        let have = u64::try_from(stat.st_size).unwrap_or(0);
        if end > have {
            return Err(MapError::TooShort { have, offset, len });
        }
        keep_from_shrinking(fd);
        let page = page_size(fd)?;
        let first = offset / page * page;
        let Some(mapped) = (end - first).checked_next_multiple_of(page).and_then(|n| usize::try_from(n).ok())
        else {
            return Err(overflow);
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd.as_fd(),
                first,
            )
        }
        .map_err(io::Error::from)?
        .cast::<u8>();
        // SAFETY: the range is the mapping just made. A failure only means that a core dump would hold guest memory.
        let _ = unsafe { rustix::mm::madvise(start.cast(), mapped, Advice::LinuxDontDump) };
        let skip = (offset - first) as usize;
        // SAFETY: `skip + len <= mapped`, as `first + skip + len == end`.
        let base = unsafe { start.add(skip) };
        let guard = Some(Guard::new(start, mapped, page as usize));
        Ok(Self { guard, start, mapped, base, len: len as usize })
    }

    /// The first byte.
    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Bytes from [`base`](Self::base) on.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: `start` and `mapped` are what mmap was called with, and nobody holds an address into it without
        // holding this value.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.mapped) };
    }
}

/// Memory files can be sealed against being cut short under their mappings. Where that is not possible (a file on disk,
/// sealing not allowed) the guard keeps us alive, but the VM loses its device.
fn keep_from_shrinking(fd: BorrowedFd<'_>) {
    let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    if !sealed && let Err(error) = rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK) {
        tracing::debug!(%error, "a shared file cannot be sealed against shrinking");
    }
}

fn page_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let fs = rustix::fs::fstatfs(fd)?;
    let huge = fs.f_type as u64 == HUGETLBFS_MAGIC;
    let size = u64::try_from(fs.f_bsize).unwrap_or(PAGE);
    if huge && size.is_power_of_two() {
        return Ok(size.max(PAGE));
    }
    // SAFETY: sysconf has no preconditions.
    Ok(u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(PAGE))
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    fn memfd(len: u64) -> std::os::fd::OwnedFd {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn range_inside_file_mapped_at_its_offset() {
        let fd = memfd(0x3000);
        rustix::io::pwrite(&fd, b"here", 0x1800).unwrap();
        let mapping = Mapping::new(fd.as_fd(), 0x1800, 0x1000).unwrap();
        let mut seen = [0u8; 4];
        // SAFETY: four bytes of a mapping of 0x1000.
        unsafe { std::ptr::copy_nonoverlapping(mapping.base(), seen.as_mut_ptr(), 4) };
        assert_eq!(&seen, b"here");
        assert_eq!(mapping.len(), 0x1000);
    }

    #[test]
    fn file_shorter_than_range_refused() {
        let fd = memfd(0x3000);
        assert!(matches!(Mapping::new(fd.as_fd(), 0x1000, 0x2001), Err(MapError::TooShort { .. })));
        assert!(matches!(Mapping::new(fd.as_fd(), u64::MAX, 2), Err(MapError::Overflow { .. })));
        assert!(matches!(Mapping::new(fd.as_fd(), 0, 0), Err(MapError::Empty)));
    }

    #[test]
    fn mapped_memfd_can_no_longer_be_shrunk() {
        let fd = memfd(0x3000);
        let _mapping = Mapping::new(fd.as_fd(), 0, 0x3000).unwrap();
        assert!(rustix::fs::ftruncate(&fd, 0x1000).is_err());
    }

    #[test]
    fn socket_instead_of_file_refused() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(Mapping::new(socket.as_fd(), 0, 1), Err(MapError::NotAFile)));
    }
}
