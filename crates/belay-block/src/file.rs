//! A regular file or a block device, through io_uring.
//!
//! Guest memory is the buffer: the addresses of an operation go to the kernel as they are. Only a buffer that
//! O_DIRECT would refuse (not aligned) is bounced.
//!
//! No write of an earlier owner lands after a later owner has the lock: the OFD lock is taken on the very descriptor
//! that io_uring uses, and belongs to the open file, which every operation holds, queued or running. So the kernel
//! keeps the lock until the last of them has ended, whether the process was killed (measured: 14 of 16 queued writes
//! landed after it, up to 3.4 s later; the successor got the lock after the last) or dropped the backend. One that is
//! dropped with operations in the kernel never closes its descriptor: its lock is free when the process ends. Whoever
//! wants it sooner waits until nothing is in flight, and drops it then.
#![allow(unsafe_code, reason = "submits addresses to io_uring")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use belay_reactor::{Cqe, OwnerId, Ring, Token, opcode, squeue, types};

use crate::backend::{Backend, BackendInfo, Done};
use crate::op::{Buf, Op, OpId, OpKind, Status};
use crate::open::{
    Alignment, FileOptions, OpenError, SECTOR, is_direct, lock, open_file, required_alignment, size_of,
};

/// Alignment that satisfies any disk of today, in bytes.
const SAFE_ALIGN: usize = 4096;
/// Bytes of zeroes written at a time where the kernel cannot zero a range.
const ZERO_CHUNK: u64 = 1 << 20;
/// Pieces that the kernel takes at a time (`UIO_MAXIOV`); the rest follows as after a short transfer.
const MAX_PIECES: usize = 1024;
/// Bytes given to the kernel at a time: it cuts transfers at 2 GiB less a page.
const MAX_TRANSFER: usize = 1 << 30;

struct Entry {
    op: Op,
    /// What the kernel reads or writes: the guest's memory, or a bounce buffer.
    buf: Buf,
    iovecs: Vec<libc::iovec>,
    done: u64,
    bounced: bool,
    /// How zeroes get there, and how space is given back.
    way: Way,
}

/// How a discard or write-zeroes is executed. A way that the file system or disk has not is followed by the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The range becomes a hole.
    PunchHole,
    /// The kernel zeroes the range, and keeps its space.
    ZeroRange,
    /// Zeroes are written.
    Write,
}

impl Entry {
    /// What is left of the operation, as a submission that points into this entry.
    fn submission(&mut self, fd: types::Fd) -> squeue::Entry {
        let fallocate = |op: &Op, mode| {
            opcode::Fallocate::new(fd, op.len)
                .offset(op.offset)
                .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                .build()
        };
        match self.op.kind {
            OpKind::Read => self.transfer(fd, false),
            OpKind::Write => self.transfer(fd, true),
            OpKind::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            OpKind::WriteZeroes { .. } | OpKind::Discard => match self.way {
                Way::PunchHole => fallocate(&self.op, libc::FALLOC_FL_PUNCH_HOLE),
                Way::ZeroRange => fallocate(&self.op, libc::FALLOC_FL_ZERO_RANGE),
                Way::Write => self.transfer(fd, true),
            },
        }
    }

    fn transfer(&mut self, fd: types::Fd, write: bool) -> squeue::Entry {
        let offset = self.op.offset + self.done;
        let left = (self.op.len - self.done) as usize;
        let zeroes = !matches!(self.op.kind, OpKind::Read | OpKind::Write);
        let (skip, len) = if zeroes { (0, left.min(self.buf.len())) } else { (self.done as usize, left) };
        let rest = self.buf.part(skip, len.min(MAX_TRANSFER));
        if let [piece] = rest.pieces[..] {
            let len = piece.len as u32;
            return if write {
                opcode::Write::new(fd, piece.base, len).offset(offset).build()
            } else {
                opcode::Read::new(fd, piece.base, len).offset(offset).build()
            };
        }
        self.iovecs.clear();
        let pieces = rest.pieces.iter().take(MAX_PIECES);
        self.iovecs
            .extend(pieces.map(|piece| libc::iovec { iov_base: piece.base.cast(), iov_len: piece.len }));
        let count = self.iovecs.len() as u32;
        if write {
            opcode::Writev::new(fd, self.iovecs.as_ptr(), count).offset(offset).build()
        } else {
            opcode::Readv::new(fd, self.iovecs.as_ptr(), count).offset(offset).build()
        }
    }
}

// SAFETY: the addresses in `iovecs` point into `buf`, which may cross threads.
unsafe impl Send for Entry {}

/// A file or block device as a disk.
pub struct FileBackend {
    file: Arc<File>,
    owner: OwnerId,
    info: BackendInfo,
    /// What O_DIRECT wants; `None` through the page cache.
    direct: Option<Alignment>,
    is_block_device: bool,
    entries: Vec<Option<Box<Entry>>>,
    free: Vec<usize>,
    #[allow(clippy::vec_box, reason = "boxes are reused: an entry must not move while the kernel has it")]
    spare: Vec<Box<Entry>>,
    in_kernel: usize,
    /// Those of `in_kernel` that change the file. Linux ends direct writes on a worker of the processor that the
    /// disk's interrupt went to (`iomap_dio_bio_end_io`), reads in the interrupt.
    changing: usize,
    finished: VecDeque<Done>,
    /// Entries that the ring had no room for, and when to try again.
    refused: VecDeque<usize>,
    retry_at: Option<Instant>,
    /// PUNCH_HOLE failed as unsupported.
    cannot_punch: bool,
    /// ZERO_RANGE failed as unsupported.
    cannot_zero: bool,
    /// A flush failed with this: what it should have made durable may be gone, and the kernel tells of it only once.
    /// No later flush is answered well.
    lost: Option<i32>,
}

impl FileBackend {
    /// Opens and locks a file or block device. `owner` must be this backend's alone on its ring.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, options: &FileOptions, owner: OwnerId) -> Result<Self, OpenError> {
        let failed = |source| OpenError::of(path, source);
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
        let direct = is_direct(file.as_raw_fd()).then(|| required_alignment(&file, is_block_device));
        let info = BackendInfo {
            size_bytes,
            block_bytes: direct.map_or(512, |align| align.block),
            memory_align: direct.map_or(1, |align| align.memory),
            read_only: options.read_only,
            discard: !options.read_only,
            write_zeroes: !options.read_only,
        };
        Ok(Self {
            file: Arc::new(file),
            owner,
            info,
            direct,
            is_block_device,
            entries: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            in_kernel: 0,
            changing: 0,
            finished: VecDeque::new(),
            refused: VecDeque::new(),
            retry_at: None,
            cannot_punch: false,
            cannot_zero: false,
            lost: None,
        })
    }

    /// Whether the page cache is bypassed.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
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

    fn end(&mut self, op: Op, mut status: Status) {
        if op.kind == OpKind::Flush {
            if let Status::Failed { errno } = status {
                self.lost.get_or_insert(errno);
            }
            if let Some(errno) = self.lost {
                status = Status::Failed { errno };
            }
        }
        self.finished.push_back(Done { op, status });
    }

    fn store(&mut self, op: Op) -> usize {
        let entry = match self.spare.pop() {
            Some(mut entry) => {
                entry.buf = Buf::default();
                entry.op = op;
                entry.done = 0;
                entry.bounced = false;
                entry
            }
            None => Box::new(Entry {
                op,
                buf: Buf::default(),
                iovecs: Vec::new(),
                done: 0,
                bounced: false,
                way: Way::PunchHole,
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
        let direct = self.direct;
        let Some(entry) = &mut self.entries[slot] else { return };
        let fits = |align: Alignment| {
            entry.op.buf.pieces.iter().all(|piece| {
                (piece.base as usize).is_multiple_of(align.memory as usize)
                    && piece.len.is_multiple_of(align.block as usize)
            })
        };
        if direct.is_none_or(fits) {
            entry.buf = entry.op.buf.clone();
            return;
        }
        entry.bounced = true;
        entry.buf = Buf::aligned(entry.op.len as usize, SAFE_ALIGN);
        if entry.op.kind == OpKind::Write {
            entry.buf.copy_from_buf(0, &entry.op.buf);
        }
    }

    /// Gives what is left of an operation to the kernel; if the ring has no room, at the next opportunity.
    fn push(&mut self, slot: usize, ring: &mut Ring, now: Instant) {
        let fd = types::Fd(self.file.as_raw_fd());
        let Some(entry) = &mut self.entries[slot] else { return };
        let changes = entry.op.kind != OpKind::Read;
        let sqe = entry.submission(fd);
        // SAFETY: the entry is boxed and stays in `entries`, with its buffer and iovecs, until its completion has
        // been taken; if the backend is dropped before, `drop` leaks it and the descriptor.
        match unsafe { ring.push(sqe, Token::new(self.owner, slot as u64)) } {
            Ok(()) => {
                self.in_kernel += 1;
                self.changing += usize::from(changes);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.refused.push_back(slot);
                self.retry_at = Some(now);
            }
            Err(error) => self.finish(slot, Status::failed(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    /// Pushes what the ring had no room for, in order. Stops at the first that it has no room for yet.
    fn retry(&mut self, ring: &mut Ring, now: Instant) {
        self.retry_at = None;
        while self.retry_at.is_none() {
            let Some(slot) = self.refused.pop_front() else { return };
            self.push(slot, ring, now);
        }
        // `push` put the refused one last: it was first.
        if let Some(slot) = self.refused.pop_back() {
            self.refused.push_front(slot);
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

    fn transferred(&mut self, slot: usize, bytes: u64, ring: &mut Ring, now: Instant) {
        let Some(entry) = &mut self.entries[slot] else { return };
        entry.done += bytes;
        let (done, len) = (entry.done, entry.op.len);
        if done >= len {
            self.finish(slot, Status::Ok);
        } else if bytes == 0 {
            // The file ends before the disk does: somebody has cut it.
            self.finish(slot, Status::Failed { errno: libc::EIO });
        } else {
            self.push(slot, ring, now);
        }
    }

    /// Executes a discard or write-zeroes, from this way on: the first that is not known to be unsupported.
    fn zero(&mut self, slot: usize, mut way: Way, ring: &mut Ring, now: Instant) {
        let Some(entry) = &mut self.entries[slot] else { return };
        if way == Way::PunchHole && self.cannot_punch {
            way = Way::ZeroRange;
        }
        if entry.op.kind == OpKind::Discard && way != Way::PunchHole {
            // It only allows us to give space back.
            self.finish(slot, Status::Ok);
            return;
        }
        if way == Way::ZeroRange && self.cannot_zero {
            way = Way::Write;
        }
        entry.way = way;
        if way == Way::Write {
            entry.buf = Buf::aligned(ZERO_CHUNK.min(entry.op.len) as usize, SAFE_ALIGN);
        }
        self.push(slot, ring, now);
    }

    /// The kernel cannot do it that way: try another.
    fn unsupported(&mut self, slot: usize, ring: &mut Ring, now: Instant) {
        let Some(entry) = &self.entries[slot] else { return };
        match (entry.op.kind, entry.way) {
            (OpKind::Discard | OpKind::WriteZeroes { .. }, Way::PunchHole) => {
                self.cannot_punch = true;
                self.zero(slot, Way::ZeroRange, ring, now);
            }
            (OpKind::WriteZeroes { .. }, Way::ZeroRange) => {
                self.cannot_zero = true;
                self.zero(slot, Way::Write, ring, now);
            }
            _ => self.finish(slot, Status::Unsupported),
        }
    }
}

impl Backend for FileBackend {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }

    fn submit(&mut self, op: Op, ring: &mut Ring, now: Instant) {
        if let Err(errno) = self.check(&op) {
            self.end(op, Status::failed(errno));
            return;
        }
        let kind = op.kind;
        let slot = self.store(op);
        match kind {
            OpKind::Read | OpKind::Write => {
                self.choose_buffer(slot);
                self.push(slot, ring, now);
            }
            OpKind::Flush => self.push(slot, ring, now),
            OpKind::Discard | OpKind::WriteZeroes { unmap: true } => {
                self.zero(slot, Way::PunchHole, ring, now);
            }
            OpKind::WriteZeroes { unmap: false } => self.zero(slot, Way::ZeroRange, ring, now),
        }
    }

    fn on_completion(&mut self, cqe: Cqe, ring: &mut Ring, now: Instant) {
        if cqe.token.owner != self.owner {
            return;
        }
        let slot = cqe.token.slot as usize;
        let Some(entry) = self.entries.get(slot).and_then(Option::as_ref) else { return };
        self.in_kernel -= 1;
        self.changing -= usize::from(entry.op.kind != OpKind::Read);
        if !self.refused.is_empty() {
            self.retry(ring, now);
        }
        let Some(entry) = self.entries.get(slot).and_then(Option::as_ref) else { return };
        let transfers = match entry.op.kind {
            OpKind::Read | OpKind::Write => true,
            OpKind::Flush => false,
            OpKind::Discard | OpKind::WriteZeroes { .. } => entry.way == Way::Write,
        };
        match cqe.res {
            bytes if bytes >= 0 && transfers => self.transferred(slot, bytes as u64, ring, now),
            bytes if bytes >= 0 => self.finish(slot, Status::Ok),
            error => match -error {
                libc::EINTR | libc::EAGAIN => self.push(slot, ring, now),
                libc::EOPNOTSUPP | libc::ENOSYS if !transfers => self.unsupported(slot, ring, now),
                errno => self.finish(slot, Status::failed(errno)),
            },
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant) {
        if self.retry_at.is_some() {
            self.retry(ring, now);
        }
    }

    fn finished(&mut self) -> Option<Done> {
        self.finished.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.entries.len() - self.free.len() + self.finished.len()
    }

    fn needs_kernel_worker(&self) -> bool {
        self.changing > 0
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
            // The kernel still reads or writes this memory. And what is queued but not yet submitted names the
            // descriptor by its number, which the next file to be opened would get: it stays open.
            std::mem::forget(Arc::clone(&self.file));
            for entry in self.entries.drain(..).flatten() {
                std::mem::forget(entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, owner: OwnerId) -> FileBackend {
        File::create(path).unwrap().set_len(1 << 20).unwrap();
        let options = FileOptions { read_only: false, direct: true, create_size: None };
        FileBackend::open(path, &options, owner).unwrap()
    }

    #[test]
    fn zeroes_are_written_where_nothing_else_works_and_discards_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let owner = OwnerId(16);
        let mut backend = open(&path, owner);
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let mut ring = Ring::new(8).unwrap();
        let now = Instant::now();
        let op = |id, kind| Op { id: OpId(id), kind, offset: 4096, len: 8192, buf: Buf::default() };
        // As a kernel would answer that cannot; the real one's answers are left where they are.
        let refuse = |backend: &mut FileBackend, ring: &mut Ring| {
            let res = -libc::EOPNOTSUPP;
            backend.on_completion(Cqe { token: Token::new(owner, 0), res, more: false }, ring, now);
        };
        backend.cannot_zero = true;
        backend.submit(op(1, OpKind::Discard), &mut ring, now);
        refuse(&mut backend, &mut ring);
        assert_eq!(backend.finished().unwrap().status, Status::Ok);
        assert!(backend.cannot_punch, "holes are one thing, zeroes another");
        for kind in [OpKind::WriteZeroes { unmap: true }, OpKind::WriteZeroes { unmap: false }] {
            backend.submit(op(2, kind), &mut ring, now);
            assert_eq!(backend.entries[0].as_ref().unwrap().way, Way::Write, "{kind:?}");
            let written = Cqe { token: Token::new(owner, 0), res: 8192, more: false };
            backend.on_completion(written, &mut ring, now);
            assert_eq!(backend.finished().unwrap().status, Status::Ok);
        }
        backend.submit(op(3, OpKind::Discard), &mut ring, now);
        assert_eq!(backend.finished().unwrap().status, Status::Ok, "without asking the kernel again");
        backend.cannot_zero = false;
        backend.submit(op(4, OpKind::WriteZeroes { unmap: true }), &mut ring, now);
        assert_eq!(backend.entries[0].as_ref().unwrap().way, Way::ZeroRange);
        refuse(&mut backend, &mut ring);
        assert_eq!(backend.entries[0].as_ref().unwrap().way, Way::Write);
    }

    /// The kernel reports a lost write to one fsync only.
    #[test]
    fn flush_after_one_that_failed_fails_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let owner = OwnerId(16);
        let mut backend = open(&path, owner);
        let mut ring = Ring::new(8).unwrap();
        let now = Instant::now();
        let flush = |id| Op { id: OpId(id), kind: OpKind::Flush, offset: 0, len: 0, buf: Buf::default() };
        for (id, res) in [(1, -libc::EIO), (2, 0)] {
            backend.submit(flush(id), &mut ring, now);
            // As the kernel would report it; the real one comes later, and finds nobody.
            let cqe = Cqe { token: Token::new(owner, 0), res, more: false };
            backend.on_completion(cqe, &mut ring, now);
            let done = backend.finished().unwrap();
            assert_eq!(done.status, Status::Failed { errno: libc::EIO }, "flush {id}");
        }
    }
}
