//! A failing disk: chosen operations end with an error and never reach the inner backend.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use belay_reactor::{Cqe, Ring};
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, BackendInfo, Done};
use crate::op::{Op, OpId, OpKind, Status};

/// The kinds of operation that a rule tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Write-zeroes, with and without unmap.
    WriteZeroes,
}

/// Which operations fail, and how. All given conditions must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRule {
    /// Only operations of this kind; every kind if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<FaultKind>,
    /// Only operations that touch the device at or after this byte. Flushes touch everything.
    #[serde(default)]
    pub offset: u64,
    /// Only operations that touch the device within so many bytes from `offset` on; to its end if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub len: Option<u64>,
    /// What they fail with: a positive errno, such as 5 (`EIO`) or 28 (`ENOSPC`).
    pub errno: i32,
    /// Of the operations that match, only each so-manyth; each one if absent. At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Only among the first so many operations that match; without end if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<u64>,
}

impl FaultRule {
    /// A rule that fails every operation with `errno`; restrict it through its fields.
    #[must_use]
    pub fn all(errno: i32) -> Self {
        Self { kind: None, offset: 0, len: None, errno, every: None, first: None }
    }

    /// What is wrong with the rule, if something is.
    pub(crate) fn problem(&self) -> Option<String> {
        if !(1..=4095).contains(&self.errno) {
            return Some(format!(
                "`errno` is {}: give a number from 1 to 4095, such as 5 for EIO",
                self.errno
            ));
        }
        (self.every == Some(0)).then(|| "`every` is 0: give 1 for each operation, 2 for every second".into())
    }

    fn matches(&self, op: &Op) -> bool {
        let kind = match op.kind {
            OpKind::Read => FaultKind::Read,
            OpKind::Write => FaultKind::Write,
            OpKind::Flush => FaultKind::Flush,
            OpKind::Discard => FaultKind::Discard,
            OpKind::WriteZeroes { .. } => FaultKind::WriteZeroes,
        };
        let end = self.len.map_or(u64::MAX, |len| self.offset.saturating_add(len));
        let touches =
            kind == FaultKind::Flush || (op.offset < end && op.offset.saturating_add(op.len) > self.offset);
        self.kind.is_none_or(|wanted| wanted == kind) && touches
    }
}

/// A rule and how many operations have matched it.
struct Counted {
    rule: FaultRule,
    matched: u64,
}

impl Counted {
    /// Counts the operation, if it matches; the errno, if it is to fail.
    fn take(&mut self, op: &Op) -> Option<i32> {
        if !self.rule.matches(op) {
            return None;
        }
        self.matched += 1;
        let due = self.matched.is_multiple_of(self.rule.every.unwrap_or(1));
        let within = self.rule.first.is_none_or(|first| self.matched <= first);
        (due && within).then_some(self.rule.errno)
    }
}

/// Fails the operations that its rules choose; the first rule that chooses an operation decides.
pub struct Fault {
    inner: Box<dyn Backend>,
    rules: Vec<Counted>,
    failed: VecDeque<Done>,
}

impl Fault {
    /// Makes `inner` fail by `rules`.
    #[must_use]
    pub fn new(inner: Box<dyn Backend>, rules: Vec<FaultRule>) -> Self {
        let rules = rules.into_iter().map(|rule| Counted { rule, matched: 0 }).collect();
        Self { inner, rules, failed: VecDeque::new() }
    }
}

impl Backend for Fault {
    fn info(&self) -> BackendInfo {
        self.inner.info()
    }

    fn submit(&mut self, op: Op, ring: &mut Ring, now: Instant) {
        match self.rules.iter_mut().find_map(|rule| rule.take(&op)) {
            Some(errno) => self.failed.push_back(Done { op, status: Status::failed(errno) }),
            None => self.inner.submit(op, ring, now),
        }
    }

    fn on_completion(&mut self, cqe: Cqe, ring: &mut Ring, now: Instant) {
        self.inner.on_completion(cqe, ring, now);
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.inner.next_deadline()
    }

    fn tick(&mut self, ring: &mut Ring, now: Instant) {
        self.inner.tick(ring, now);
    }

    fn finished(&mut self) -> Option<Done> {
        self.failed.pop_front().or_else(|| self.inner.finished())
    }

    fn needs_kernel_worker(&self) -> bool {
        self.inner.needs_kernel_worker()
    }

    fn in_flight(&self) -> usize {
        self.failed.len() + self.inner.in_flight()
    }

    fn cancel(&mut self, id: OpId) {
        self.inner.cancel(id);
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
    use crate::testing::Harness;

    fn harness(rules: &[FaultRule]) -> Harness {
        let memory = Box::new(MemoryBackend::new(1 << 16));
        Harness::new(Box::new(Fault::new(memory, rules.to_vec()))).unwrap()
    }

    fn reads(harness: &mut Harness, offsets: &[u64]) -> Vec<bool> {
        let mut one = |offset| harness.one(OpKind::Read, offset, 1024, Buf::aligned(1024, 512)).unwrap();
        offsets.iter().map(|&offset| one(offset) == Status::Failed { errno: 5 }).collect()
    }

    #[test]
    fn every_third_among_the_first_seven_fails() {
        let mut harness = harness(&[FaultRule { every: Some(3), first: Some(7), ..FaultRule::all(5) }]);
        let failed = reads(&mut harness, &[0; 12]);
        let places: Vec<usize> = (1..=12).filter(|nth| failed[nth - 1]).collect();
        assert_eq!(places, [3, 6]);
    }

    #[test]
    fn only_operations_that_touch_the_range_fail() {
        let mut harness = harness(&[FaultRule { offset: 4096, len: Some(512), ..FaultRule::all(5) }]);
        let failed = reads(&mut harness, &[0, 3072, 3584, 4096, 4608]);
        assert_eq!(failed, [false, false, true, true, false]);
    }

    #[test]
    fn failed_write_changes_nothing_and_other_kinds_pass() {
        let rule = FaultRule { kind: Some(FaultKind::Write), ..FaultRule::all(libc::ENOSPC) };
        let mut harness = harness(&[rule]);
        let ones = Buf::owned(vec![1; 512].into());
        let status = harness.one(OpKind::Write, 0, 512, ones.clone()).unwrap();
        assert_eq!(status, Status::Failed { errno: libc::ENOSPC });
        assert_eq!(harness.one(OpKind::Flush, 0, 0, Buf::default()).unwrap(), Status::Ok);
        assert_eq!(harness.one(OpKind::Read, 0, 512, ones.clone()).unwrap(), Status::Ok);
        assert!(ones.is_zero());
    }
}
