//! What executes operations: the contract that every backend keeps, and that the conformance suite checks.

use std::time::Instant;

use belay_reactor::{Cqe, Ring};

use crate::op::{Op, OpId, Status};
use crate::open::OpenError;

/// What a backend is, and what it can do. Constant while it is open, but for `size_bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// Capacity in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// The smallest unit of offsets and lengths that it takes, in bytes (512, or more for a disk of larger sectors that is
    /// opened past the page cache). The guest's logical blocks must not be smaller: [`BackendInfo::check_blocks`].
    pub block_bytes: u32,
    /// The alignment of memory and offsets below which the backend has to bounce, in bytes; 1 if it never has to.
    pub memory_align: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Discard gives space back.
    pub discard: bool,
    /// Write-zeroes is executed.
    pub write_zeroes: bool,
}

impl BackendInfo {
    /// Whether it can be the disk of a guest that was told this logical block size, in bytes.
    ///
    /// # Errors
    /// The guest's blocks are smaller than it takes.
    pub fn check_blocks(&self, block_bytes: u32) -> Result<(), OpenError> {
        let needs = self.block_bytes;
        if block_bytes < needs { Err(OpenError::Blocks { block_bytes, needs }) } else { Ok(()) }
    }
}

/// The end of an operation.
#[derive(Debug)]
pub struct Done {
    /// The operation, given back with its buffer.
    pub op: Op,
    /// How it ended.
    pub status: Status,
}

/// Executes block operations on the [`Ring`] of the thread that owns it.
///
/// Who calls what: the data-plane thread calls [`submit`](Backend::submit) for each operation,
/// [`on_completion`](Backend::on_completion) for every [`Cqe`] whose owner is one of the backend's, and
/// [`tick`](Backend::tick) when [`next_deadline`](Backend::next_deadline) has passed; after each of these it takes
/// what is finished through [`finished`](Backend::finished) until `None`.
///
/// The contract, which the conformance suite checks for every backend:
/// - Every submitted operation comes out of `finished` exactly once, in any order, also failed and cancelled ones.
/// - `submit` never fails and never blocks: errors come out of `finished`.
/// - Operations that are in flight together may take effect in any order, but each block of 512 bytes is written
///   by one of them entirely.
/// - A [`Flush`](crate::OpKind::Flush) makes durable what came out of `finished` before the flush was submitted.
/// - Ranges outside the device fail with `EINVAL`, writes to a read-only device with `EROFS`.
/// - A short transfer is continued, not reported.
/// - Dropping a backend with operations in flight in the kernel leaks their memory instead of freeing it.
pub trait Backend: Send {
    /// What it is and can do.
    fn info(&self) -> BackendInfo;

    /// Takes an operation. It may be executed at once or later.
    fn submit(&mut self, op: Op, ring: &mut Ring, now: Instant);

    /// Tells it of a completion. Completions of other owners are ignored (a decorator passes them inwards).
    fn on_completion(&mut self, cqe: Cqe, ring: &mut Ring, now: Instant);

    /// When it next wants [`tick`](Backend::tick), if it does.
    fn next_deadline(&self) -> Option<Instant> {
        None
    }

    /// Does what was due by `now`.
    fn tick(&mut self, ring: &mut Ring, now: Instant) {
        let _ = (ring, now);
    }

    /// One finished operation, if there is one.
    fn finished(&mut self) -> Option<Done>;

    /// Operations taken and not yet given back by `finished`.
    fn in_flight(&self) -> usize;

    /// Whether an operation in flight may need a kernel worker on this thread's own processor to end: a thread that
    /// looks for its end without sleeping then has to yield, or it keeps that worker waiting.
    fn needs_kernel_worker(&self) -> bool {
        false
    }

    /// Gives up an operation if it has not been started (it then comes out of `finished` with `ECANCELED`);
    /// one that has started goes on to its end. Unknown ids are ignored.
    fn cancel(&mut self, id: OpId) {
        let _ = id;
    }

    /// Where there is data in `offset..offset+len`, for a copier: ranges that are not reported read as zeroes.
    /// Synchronous and cheap (SEEK_DATA). The default reports everything.
    fn data_extents(&self, offset: u64, len: u64) -> std::io::Result<Vec<std::ops::Range<u64>>> {
        Ok(std::iter::once(offset..offset + len).collect())
    }

    /// Changes the size, in bytes, growing only. The device's owner then tells the guest.
    ///
    /// # Errors
    /// The backend cannot grow (`EOPNOTSUPP`), or its file system refuses.
    fn resize(&mut self, size_bytes: u64) -> std::io::Result<()> {
        let _ = size_bytes;
        Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}
