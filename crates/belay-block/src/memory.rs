//! Backends without a disk, for tests and measurements.

use std::collections::VecDeque;
use std::time::Instant;

use belay_reactor::{Cqe, Ring};

use crate::backend::{Backend, BackendInfo, Done};
use crate::op::{Op, OpKind, Status};

/// A disk in this process's memory; with `store == false` it forgets what is written and reads as zeroes (`null`).
pub struct MemoryBackend {
    bytes: Option<Vec<u8>>,
    size_bytes: u64,
    finished: VecDeque<Done>,
}

impl MemoryBackend {
    /// A disk of zeroes.
    ///
    /// # Panics
    /// There is not so much memory: [`MemoryBackend::try_new`] for sizes that somebody asks for.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self::try_new(size_bytes).expect("memory for the disk")
    }

    /// A disk of zeroes; `None` if there is not so much memory. `size_bytes` is a multiple of 512.
    #[must_use]
    pub fn try_new(size_bytes: u64) -> Option<Self> {
        let size = usize::try_from(size_bytes).ok()?;
        // Asked for and given back: `vec!` would end the process, but takes zero pages without touching them.
        Vec::<u8>::new().try_reserve_exact(size).ok()?;
        Some(Self { bytes: Some(vec![0; size]), size_bytes, finished: VecDeque::new() })
    }

    /// A disk that keeps nothing.
    #[must_use]
    pub fn null(size_bytes: u64) -> Self {
        Self { bytes: None, size_bytes, finished: VecDeque::new() }
    }

    fn execute(&mut self, op: &Op) -> Status {
        if op.kind == OpKind::Flush {
            return Status::Ok;
        }
        let fits = op.offset.checked_add(op.len).is_some_and(|end| end <= self.size_bytes);
        let whole = op.offset.is_multiple_of(512) && op.len.is_multiple_of(512) && op.len > 0;
        let full = !matches!(op.kind, OpKind::Read | OpKind::Write) || op.buf.len() as u64 == op.len;
        if !fits || !whole || !full {
            return Status::failed(libc::EINVAL);
        }
        let range = op.offset as usize..(op.offset + op.len) as usize;
        match (&mut self.bytes, op.kind) {
            (Some(bytes), OpKind::Read) => op.buf.copy_from(0, &bytes[range]),
            (Some(bytes), OpKind::Write) => op.buf.copy_to(0, &mut bytes[range]),
            (Some(bytes), OpKind::Discard | OpKind::WriteZeroes { .. }) => bytes[range].fill(0),
            (None, OpKind::Read) => op.buf.zero(0, op.buf.len()),
            _ => {}
        }
        Status::Ok
    }
}

impl Backend for MemoryBackend {
    fn info(&self) -> BackendInfo {
        BackendInfo {
            size_bytes: self.size_bytes,
            block_bytes: 512,
            memory_align: 1,
            read_only: false,
            discard: true,
            write_zeroes: true,
        }
    }

    fn submit(&mut self, op: Op, _ring: &mut Ring, _now: Instant) {
        let status = self.execute(&op);
        self.finished.push_back(Done { op, status });
    }

    fn on_completion(&mut self, _cqe: Cqe, _ring: &mut Ring, _now: Instant) {}

    fn finished(&mut self) -> Option<Done> {
        self.finished.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn resize(&mut self, size_bytes: u64) -> std::io::Result<()> {
        if size_bytes < self.size_bytes || !size_bytes.is_multiple_of(512) {
            return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
        }
        if let Some(bytes) = &mut self.bytes {
            let no_memory = || std::io::Error::from_raw_os_error(libc::ENOMEM);
            let size = usize::try_from(size_bytes).map_err(|_| no_memory())?;
            bytes.try_reserve_exact(size - bytes.len()).map_err(|_| no_memory())?;
            bytes.resize(size, 0);
        }
        self.size_bytes = size_bytes;
        Ok(())
    }

    fn data_extents(&self, offset: u64, len: u64) -> std::io::Result<Vec<std::ops::Range<u64>>> {
        let end = offset.saturating_add(len).min(self.size_bytes);
        // A disk that keeps nothing is one hole.
        let all = self.bytes.is_some().then_some(offset..end);
        Ok(all.into_iter().filter(|range| !range.is_empty()).collect())
    }
}
