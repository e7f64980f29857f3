//! A regular file or a block device, through io_uring.
//!
//! Guest memory is the buffer: the addresses of an operation go to the kernel as they are. Only a buffer that
//! O_DIRECT would refuse (not aligned) is bounced. The OFD lock is taken on the very descriptor that io_uring uses:
//! queued writes of a killed process keep that descriptor, and with it the lock, until the last of them has landed
//! (measured; architecture, rule 3).
#![allow(unsafe_code, reason = "submits addresses to io_uring, and asks the kernel through fcntl and ioctl")]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use belay_reactor::{Cqe, OwnerId, Ring, Token, opcode, types};

use crate::backend::{Backend, BackendInfo, Done};
use crate::op::{Buf, Op, OpId, OpKind, Status};

/// How a file is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// O_DIRECT: past the page cache.
    pub direct: bool,
    /// Refuse changes.
    pub read_only: bool,
    /// Create the file with this size in bytes; it must not exist.
    pub create_size: Option<u64>,
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {path}: {source}", path = .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("{path} is neither a regular file nor a block device", path = .path.display())]
    NotADisk {
        /// Which.
        path: PathBuf,
    },
    /// Its size cannot be a disk's.
    #[error("{path} has {size_bytes} bytes: a disk has a multiple of 512, and at least 512", path = .path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// Another process has it.
    #[error("{path} is in use: another process holds a lock on it", path = .path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// The description of the backend makes no sense.
    #[error("{0}")]
    Spec(String),
}

/// Operations in flight at most before others wait; the ring's size bounds them anyway.
const SECTOR: u64 = 512;
/// Alignment that satisfies any disk of today, in bytes.
const SAFE_ALIGN: usize = 4096;
/// Bytes of zeroes written at a time where the kernel cannot zero a range.
const ZERO_CHUNK: u64 = 1 << 20;

struct Entry {
    op: Op,
    /// What the kernel reads or writes: the guest's memory, or a bounce buffer.
    buf: Buf,
    iovecs: Vec<libc::iovec>,
    done: u64,
    bounced: bool,
    /// Write-zeroes by writing: the file system cannot zero ranges.
    by_writing: bool,
}

// SAFETY: the addresses in `iovecs` point into `buf`, which may cross threads.
unsafe impl Send for Entry {}

/// A file or block device as a disk.
pub struct FileBackend {
    file: File,
    owner: OwnerId,
    info: BackendInfo,
    is_block_device: bool,
    entries: Vec<Option<Box<Entry>>>,
    free: Vec<usize>,
    #[allow(clippy::vec_box, reason = "boxes are reused: an entry must not move while the kernel has it")]
    spare: Vec<Box<Entry>>,
    in_kernel: usize,
    finished: VecDeque<Done>,
    cannot_zero: bool,
}

impl FileBackend {
    /// Opens and locks a file or block device. `owner` must be this backend's alone on its ring.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, options: &FileOptions, owner: OwnerId) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open { path: path.to_owned(), source };
        let file = open_file(path, options).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let is_block_device = metadata.file_type().is_block_device();
        if !is_block_device && !metadata.is_file() {
            return Err(OpenError::NotADisk { path: path.to_owned() });
        }
        if !lock(file.as_raw_fd(), options.read_only).map_err(failed)? {
            return Err(OpenError::Locked { path: path.to_owned() });
        }
        if let Some(size) = options.create_size {
            file.set_len(size).map_err(failed)?;
        }
        let size_bytes = size_of(&file, is_block_device).map_err(failed)?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) {
            return Err(OpenError::Size { path: path.to_owned(), size_bytes });
        }
        let align = if is_direct(file.as_raw_fd()) { required_align(&file, is_block_device) } else { 1 };
        let info = BackendInfo {
            size_bytes,
            block_bytes: align.max(512),
            memory_align: align,
            read_only: options.read_only,
            discard: !options.read_only,
            write_zeroes: !options.read_only,
        };
        Ok(Self {
            file,
            owner,
            info,
            is_block_device,
            entries: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            in_kernel: 0,
            finished: VecDeque::new(),
            cannot_zero: false,
        })
    }

    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.info.memory_align > 1
    }

    fn check(&self, op: &Op) -> Result<(), i32> {
        if op.kind == OpKind::Flush {
            return Ok(());
        }
        if op.kind.changes_content() && self.info.read_only {
            return Err(libc::EROFS);
        }
        let fits = op.offset.checked_add(op.len).is_some_and(|end| end <= self.info.size_bytes);
        let whole = op.offset.is_multiple_of(SECTOR) && op.len.is_multiple_of(SECTOR) && op.len > 0;
        let full = !matches!(op.kind, OpKind::Read | OpKind::Write) || op.buf.len() as u64 == op.len;
        if fits && whole && full { Ok(()) } else { Err(libc::EINVAL) }
    }

    fn end(&mut self, op: Op, status: Status) {
        self.finished.push_back(Done { op, status });
    }

    fn store(&mut self, op: Op) -> usize {
        let entry = match self.spare.pop() {
            Some(mut entry) => {
                entry.buf = Buf::default();
                entry.op = op;
                entry.done = 0;
                entry.bounced = false;
                entry.by_writing = false;
                entry
            }
            None => Box::new(Entry {
                op,
                buf: Buf::default(),
                iovecs: Vec::new(),
                done: 0,
                bounced: false,
                by_writing: false,
            }),
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[slot] = Some(entry);
        slot
    }

    /// Chooses the memory that the kernel uses.
    fn choose_buffer(&mut self, slot: usize) {
        let align = self.info.memory_align as usize;
        let Some(entry) = &mut self.entries[slot] else { return };
        let aligned = entry.op.buf.pieces.iter().all(|piece| {
            (piece.base as usize).is_multiple_of(align.min(512)) && piece.len.is_multiple_of(align.min(512))
        });
        if align == 1 || aligned {
            entry.buf = entry.op.buf.clone();
            return;
        }
        entry.bounced = true;
        entry.buf = Buf::aligned(entry.op.len as usize, SAFE_ALIGN);
        if entry.op.kind == OpKind::Write {
            entry.buf.copy_from_buf(0, &entry.op.buf);
        }
    }

    /// Gives what is left of an operation to the kernel.
    fn push(&mut self, slot: usize, ring: &mut Ring) {
        let fd = types::Fd(self.file.as_raw_fd());
        let token = Token::new(self.owner, slot as u64);
        let Some(entry) = &mut self.entries[slot] else { return };
        let Entry { op, buf, iovecs, done, by_writing, .. } = &mut **entry;
        let by_writing = *by_writing;
        let offset = op.offset + *done;
        let write = op.kind == OpKind::Write || by_writing;
        let sqe = if write || op.kind == OpKind::Read {
            let skip = if by_writing { 0 } else { *done as usize };
            let len = if by_writing { (op.len - *done).min(ZERO_CHUNK) as usize } else { buf.len() - skip };
            let rest = buf.part(skip, len);
            if let [piece] = rest.pieces[..] {
                let len = piece.len as u32;
                if write {
                    opcode::Write::new(fd, piece.base, len).offset(offset).build()
                } else {
                    opcode::Read::new(fd, piece.base, len).offset(offset).build()
                }
            } else {
                iovecs.clear();
                iovecs.extend(
                    rest.pieces
                        .iter()
                        .map(|piece| libc::iovec { iov_base: piece.base.cast(), iov_len: piece.len }),
                );
                let count = iovecs.len() as u32;
                if write {
                    opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(offset).build()
                } else {
                    opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(offset).build()
                }
            }
        } else {
            match op.kind {
                OpKind::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
                OpKind::WriteZeroes { unmap: false } => opcode::Fallocate::new(fd, op.len)
                    .offset(op.offset)
                    .mode(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
                    .build(),
                _ => opcode::Fallocate::new(fd, op.len)
                    .offset(op.offset)
                    .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                    .build(),
            }
        };
        // SAFETY: the entry is boxed and stays in `entries`, with its buffer and iovecs, until its completion has
        // been taken; if the backend is dropped before, `drop` leaks it.
        match unsafe { ring.push(sqe, token) } {
            Ok(()) => self.in_kernel += 1,
            Err(error) => self.finish(slot, Status::failed(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    fn finish(&mut self, slot: usize, status: Status) {
        let Some(mut entry) = self.entries[slot].take() else { return };
        self.free.push(slot);
        if entry.bounced && entry.op.kind == OpKind::Read && status == Status::Ok {
            entry.op.buf.copy_from_buf(0, &entry.buf);
        }
        let empty = Op { id: OpId(0), kind: OpKind::Flush, offset: 0, len: 0, buf: Buf::default() };
        let op = std::mem::replace(&mut entry.op, empty);
        entry.buf = Buf::default();
        self.spare.push(entry);
        self.end(op, status);
    }

    fn transferred(&mut self, slot: usize, bytes: u64, ring: &mut Ring) {
        let Some(entry) = &mut self.entries[slot] else { return };
        entry.done += bytes;
        let (done, len) = (entry.done, entry.op.len);
        if done >= len {
            self.finish(slot, Status::Ok);
        } else if bytes == 0 {
            // The file ends before the disk does: somebody has cut it.
            self.finish(slot, Status::Failed { errno: libc::EIO });
        } else {
            self.push(slot, ring);
        }
    }

    /// The kernel cannot do it that way: try another.
    fn unsupported(&mut self, slot: usize, ring: &mut Ring) {
        let Some(entry) = &mut self.entries[slot] else { return };
        match entry.op.kind {
            OpKind::WriteZeroes { .. } if !entry.by_writing => {
                self.cannot_zero = true;
                entry.by_writing = true;
                entry.buf = Buf::aligned(ZERO_CHUNK.min(entry.op.len) as usize, SAFE_ALIGN);
                self.push(slot, ring);
            }
            _ => self.finish(slot, Status::Unsupported),
        }
    }
}

impl Backend for FileBackend {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }

    fn submit(&mut self, op: Op, ring: &mut Ring, _now: Instant) {
        if let Err(errno) = self.check(&op) {
            self.end(op, Status::failed(errno));
            return;
        }
        let kind = op.kind;
        let slot = self.store(op);
        match kind {
            OpKind::Read | OpKind::Write => self.choose_buffer(slot),
            OpKind::WriteZeroes { unmap: false } if self.cannot_zero => {
                self.unsupported(slot, ring);
                return;
            }
            _ => {}
        }
        self.push(slot, ring);
    }

    fn on_completion(&mut self, cqe: Cqe, ring: &mut Ring, _now: Instant) {
        if cqe.token.owner != self.owner {
            return;
        }
        let slot = cqe.token.slot as usize;
        let Some(entry) = self.entries.get(slot).and_then(Option::as_ref) else { return };
        self.in_kernel -= 1;
        let transfers = matches!(entry.op.kind, OpKind::Read | OpKind::Write) || entry.by_writing;
        match cqe.res {
            bytes if bytes >= 0 && transfers => self.transferred(slot, bytes as u64, ring),
            bytes if bytes >= 0 => self.finish(slot, Status::Ok),
            error => match -error {
                libc::EINTR | libc::EAGAIN => self.push(slot, ring),
                libc::EOPNOTSUPP | libc::ENOSYS if !transfers => self.unsupported(slot, ring),
                errno => self.finish(slot, Status::failed(errno)),
            },
        }
    }

    fn finished(&mut self) -> Option<Done> {
        self.finished.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.entries.len() - self.free.len() + self.finished.len()
    }

    fn data_extents(&self, offset: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
        let end = offset.saturating_add(len).min(self.info.size_bytes);
        if self.is_block_device {
            return Ok(std::iter::once(offset..end).filter(|range| !range.is_empty()).collect());
        }
        let mut extents = Vec::new();
        let mut at = offset;
        while at < end {
            let start = match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            if start >= end {
                break;
            }
            let stop = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(start))?.min(end);
            extents.push(start..stop);
            at = stop;
        }
        Ok(extents)
    }

    fn resize(&mut self, size_bytes: u64) -> io::Result<()> {
        if size_bytes < self.info.size_bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a disk can grow, not shrink"));
        }
        if !size_bytes.is_multiple_of(SECTOR) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a disk's size is a multiple of 512 bytes",
            ));
        }
        if self.is_block_device {
            let present = size_of(&self.file, true)?;
            if present < size_bytes {
                let text = format!("the block device has {present} bytes: make it larger first");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        } else {
            self.file.set_len(size_bytes)?;
            self.file.sync_all()?;
        }
        self.info.size_bytes = size_bytes;
        Ok(())
    }
}

impl Drop for FileBackend {
    fn drop(&mut self) {
        if self.in_kernel > 0 {
            // The kernel still reads or writes this memory.
            for entry in self.entries.drain(..).flatten() {
                std::mem::forget(entry);
            }
        }
    }
}

fn open_file(path: &Path, options: &FileOptions) -> io::Result<File> {
    let mut how = OpenOptions::new();
    how.read(true).write(!options.read_only);
    if options.create_size.is_some() {
        how.create_new(true);
    }
    if options.direct {
        match how.clone().custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(path = %path.display(), "the file system has no O_DIRECT: going through the page cache");
                how.create_new(false);
            }
            other => return other,
        }
    }
    how.custom_flags(libc::O_CLOEXEC).open(path)
}

/// Takes the OFD lock; `false`: another has it.
fn lock(fd: RawFd, read_only: bool) -> io::Result<bool> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let range =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: `range` is a valid flock for the length of the call, and OFD locks want `l_pid` 0.
    if unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &range) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

fn is_direct(fd: RawFd) -> bool {
    // SAFETY: F_GETFL reads flags of a descriptor that is open.
    unsafe { libc::fcntl(fd, libc::F_GETFL) & libc::O_DIRECT != 0 }
}

fn size_of(file: &File, is_block_device: bool) -> io::Result<u64> {
    if is_block_device {
        rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).map_err(Into::into)
    } else {
        Ok(file.metadata()?.len())
    }
}

/// The alignment of memory and offsets that O_DIRECT wants, in bytes.
fn required_align(file: &File, is_block_device: bool) -> u32 {
    if !is_block_device {
        return SECTOR as u32;
    }
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int to the address.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut bytes) };
    if result == 0 { u32::try_from(bytes).unwrap_or(SECTOR as u32) } else { SECTOR as u32 }
}

/// Bytes free for an ordinary user on the file system of `path`.
///
/// # Errors
/// The path cannot be looked at.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail * stat.f_frsize)
}
