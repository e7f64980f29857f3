//! Drives a backend without a device around it: for the conformance suite, and for tests of other crates.

use std::time::{Duration, Instant};

use belay_reactor::Ring;

use crate::{Backend, Buf, Done, Op, OpId, OpKind, Status};

/// A backend with a ring of its own.
pub struct Harness {
    /// The ring.
    pub ring: Ring,
    /// The backend.
    pub backend: Box<dyn Backend>,
    next: u64,
}

impl Harness {
    /// Drives `backend`.
    ///
    /// # Errors
    /// The kernel has no io_uring for us.
    pub fn new(backend: Box<dyn Backend>) -> std::io::Result<Self> {
        Ok(Self { ring: Ring::new(64)?, backend, next: 1 })
    }

    /// Submits an operation, and returns its number.
    pub fn submit(&mut self, kind: OpKind, offset: u64, len: u64, buf: Buf) -> OpId {
        let id = OpId(self.next);
        self.next += 1;
        self.backend.submit(Op { id, kind, offset, len, buf }, &mut self.ring, Instant::now());
        id
    }

    /// Waits until nothing is in flight, and returns what has finished.
    ///
    /// # Errors
    /// The ring failed.
    pub fn drain(&mut self) -> std::io::Result<Vec<Done>> {
        let mut all = Vec::new();
        let mut cqes = Vec::new();
        loop {
            while let Some(done) = self.backend.finished() {
                all.push(done);
            }
            if self.backend.in_flight() == 0 {
                return Ok(all);
            }
            let limit = self.backend.next_deadline().map_or(Duration::from_millis(100), |deadline| {
                deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(100))
            });
            self.ring.wait(Some(limit))?;
            self.ring.completions(&mut cqes);
            for cqe in cqes.drain(..) {
                self.backend.on_completion(cqe, &mut self.ring, Instant::now());
            }
            self.backend.tick(&mut self.ring, Instant::now());
        }
    }

    /// Executes one operation.
    ///
    /// # Errors
    /// The ring failed, or the backend did not finish it exactly once.
    pub fn one(&mut self, kind: OpKind, offset: u64, len: u64, buf: Buf) -> std::io::Result<Status> {
        self.submit(kind, offset, len, buf);
        match &self.drain()?[..] {
            [done] => Ok(done.status),
            other => Err(std::io::Error::other(format!("{} completions for one operation", other.len()))),
        }
    }
}
