//! A disk with limits: operations and bytes per second, by token buckets. Operations begin in their order.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use belay_reactor::{Cqe, Ring};
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, BackendInfo, Done};
use crate::op::{Op, OpId, OpKind, Status};

/// What a full bucket holds: this much of a second's allowance may be used at once after a pause.
const BURST: Duration = Duration::from_millis(100);

/// How much a device may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThrottleSpec {
    /// Operations per second, of any kind; unlimited if absent. At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Bytes read and written per second; unlimited if absent. At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
}

impl ThrottleSpec {
    /// What is wrong with the limits, if something is.
    pub(crate) fn problem(&self) -> Option<String> {
        let zero = self.iops == Some(0) || self.bytes_per_s == Some(0);
        zero.then(|| "a throttle of 0 would stop the disk: give at least 1, or leave it out".into())
    }
}

/// A token bucket, kept as the time at which it will be full again.
struct Bucket {
    per_second: u64,
    full_at: Option<Instant>,
}

impl Bucket {
    fn new(per_second: u64) -> Self {
        Self { per_second: per_second.max(1), full_at: None }
    }

    /// When the next operation may begin; `None`: at once. A bucket may be overdrawn by one operation, so
    /// that one larger than a bucket does not wait for ever.
    fn ready_at(&self) -> Option<Instant> {
        self.full_at.and_then(|full_at| full_at.checked_sub(BURST))
    }

    fn take(&mut self, tokens: u64, now: Instant) {
        let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(self.per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let from = self.full_at.map_or(now, |full_at| full_at.max(now));
        self.full_at = from.checked_add(cost).or(Some(from));
    }
}

/// Holds operations back so that the inner backend gets no more than the limits allow. Held ones can be
/// cancelled.
pub struct Throttle {
    inner: Box<dyn Backend>,
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
    held: VecDeque<Op>,
    cancelled: VecDeque<Done>,
}

impl Throttle {
    /// Limits `inner`. A limit of 0 counts as 1.
    #[must_use]
    pub fn new(inner: Box<dyn Backend>, limits: ThrottleSpec) -> Self {
        Self {
            inner,
            operations: limits.iops.map(Bucket::new),
            bytes: limits.bytes_per_s.map(Bucket::new),
            held: VecDeque::new(),
            cancelled: VecDeque::new(),
        }
    }

    fn ready_at(&self) -> Option<Instant> {
        let ready = |bucket: &Option<Bucket>| bucket.as_ref().and_then(Bucket::ready_at);
        ready(&self.operations).max(ready(&self.bytes))
    }

    fn begin(&mut self, op: Op, ring: &mut Ring, now: Instant) {
        if let Some(operations) = &mut self.operations {
            operations.take(1, now);
        }
        if let (Some(bytes), OpKind::Read | OpKind::Write) = (&mut self.bytes, op.kind) {
            bytes.take(op.len, now);
        }
        self.inner.submit(op, ring, now);
    }

    fn release(&mut self, ring: &mut Ring, now: Instant) {
        while self.ready_at().is_none_or(|ready| ready <= now) {
            let Some(op) = self.held.pop_front() else { return };
            self.begin(op, ring, now);
        }
    }
}

impl Backend for Throttle {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, ring: &mut Ring, now: Instant) {
        self.held.push_back(op);
        self.release(ring, now);
    }

    fn on_completion(&mut self, cqe: Cqe, ring: &mut Ring, now: Instant) {
        self.inner.on_completion(cqe, ring, now);
    }

    fn next_deadline(&self) -> Option<Instant> {
        let held = if self.held.is_empty() { None } else { self.ready_at() };
        match (held, self.inner.next_deadline()) {
            (Some(held), Some(inner)) => Some(held.min(inner)),
            (held, inner) => held.or(inner),
        }
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant) {
        self.release(ring, now);
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
        let held = self.held.iter().position(|op| op.id == id).and_then(|at| self.held.remove(at));
        match held {
            Some(op) => self.cancelled.push_back(Done { op, status: Status::failed(libc::ECANCELED) }),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryBackend;
    use crate::op::Buf;

    /// How many of `count` operations of `len` bytes have ended at each time, in milliseconds; the clock is ours.
    fn ended(limits: ThrottleSpec, count: u64, len: usize, times: &[u64]) -> Vec<usize> {
        let mut ring = Ring::new(8).unwrap();
        let mut throttle = Throttle::new(Box::new(MemoryBackend::new(1 << 20)), limits);
        let start = Instant::now();
        for id in 0..count {
            let (kind, buf) = (OpKind::Read, Buf::aligned(len, 512));
            throttle.submit(Op { id: OpId(id), kind, offset: 0, len: len as u64, buf }, &mut ring, start);
        }
        let mut total = 0;
        let mut at = |time: &u64| {
            throttle.tick(&mut ring, start + Duration::from_millis(*time));
            while throttle.finished().is_some() {
                total += 1;
            }
            assert_eq!(throttle.next_deadline().is_some(), throttle.in_flight() > 0);
            total
        };
        times.iter().map(&mut at).collect()
    }

    #[test]
    fn operations_beyond_the_burst_begin_at_the_limits_pace() {
        let limits = ThrottleSpec { iops: Some(100), bytes_per_s: None };
        // A tenth of a second's allowance at once, and the one that overdraws; then one every 10 ms;
        // after a long pause, no more than a full bucket again.
        assert_eq!(ended(limits, 100, 512, &[0, 9, 10, 100, 1000]), [11, 11, 12, 21, 32]);
    }

    #[test]
    fn operation_larger_than_the_bucket_passes_and_is_paid_for() {
        let limits = ThrottleSpec { iops: None, bytes_per_s: Some(65536) };
        assert_eq!(ended(limits, 3, 65536, &[0, 899, 900, 1899, 1900]), [1, 1, 2, 2, 3]);
    }

    #[test]
    fn held_operation_is_cancelled_once() {
        let mut ring = Ring::new(8).unwrap();
        let limits = ThrottleSpec { iops: Some(1), bytes_per_s: None };
        let mut throttle = Throttle::new(Box::new(MemoryBackend::new(4096)), limits);
        let now = Instant::now();
        for id in 0..3 {
            let op = Op { id: OpId(id), kind: OpKind::Flush, offset: 0, len: 0, buf: Buf::default() };
            throttle.submit(op, &mut ring, now);
        }
        throttle.cancel(OpId(2));
        throttle.cancel(OpId(2));
        let done: Vec<_> = std::iter::from_fn(|| throttle.finished()).collect();
        let cancelled = done.iter().filter(|done| done.status == Status::failed(libc::ECANCELED));
        assert_eq!(cancelled.map(|done| done.op.id).collect::<Vec<_>>(), [OpId(2)]);
        assert_eq!(done.len() + throttle.in_flight(), 3);
    }
}
