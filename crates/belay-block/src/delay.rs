//! A slow disk: holds every operation for a while before it begins.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use belay_reactor::{Cqe, Ring};

use crate::backend::{Backend, BackendInfo, Done};
use crate::op::{Op, OpId, Status};

/// Holds operations for `latency` before the inner backend gets them. Held ones can be cancelled.
pub struct Delay {
    inner: Box<dyn Backend>,
    latency: Duration,
    held: VecDeque<(Instant, Op)>,
    cancelled: VecDeque<Done>,
}

impl Delay {
    /// Slows `inner` down.
    #[must_use]
    pub fn new(inner: Box<dyn Backend>, latency: Duration) -> Self {
        Self { inner, latency, held: VecDeque::new(), cancelled: VecDeque::new() }
    }
}

impl Backend for Delay {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, _ring: &mut Ring, now: Instant) {
        self.held.push_back((now + self.latency, op));
    }

    fn on_completion(&mut self, cqe: Cqe, ring: &mut Ring, now: Instant) {
        self.inner.on_completion(cqe, ring, now);
    }

    fn next_deadline(&self) -> Option<Instant> {
        let held = self.held.front().map(|(due, _)| *due);
        match (held, self.inner.next_deadline()) {
            (Some(held), Some(inner)) => Some(held.min(inner)),
            (held, inner) => held.or(inner),
        }
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant) {
        while self.held.front().is_some_and(|(due, _)| *due <= now) {
            if let Some((_, op)) = self.held.pop_front() {
                self.inner.submit(op, ring, now);
            }
        }
        self.inner.tick(ring, now);
    }

    fn finished(&mut self) -> Option<Done> {
        self.cancelled.pop_front().or_else(|| self.inner.finished())
    }

    fn needs_kernel_worker(&self) -> bool {
        self.inner.needs_kernel_worker()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.cancelled.len() + self.inner.in_flight()
    }

    fn cancel(&mut self, id: OpId) {
        match self.held.iter().position(|(_, op)| op.id == id) {
            Some(at) => {
                if let Some((_, op)) = self.held.remove(at) {
                    self.cancelled.push_back(Done { op, status: Status::failed(libc::ECANCELED) });
                }
            }
            None => self.inner.cancel(id),
        }
    }

    fn data_extents(&self, offset: u64, len: u64) -> std::io::Result<Vec<Range<u64>>> {
        self.inner.data_extents(offset, len)
    }

    fn resize(&mut self, size_bytes: u64) -> std::io::Result<()> {
        self.inner.resize(size_bytes)
    }
}
