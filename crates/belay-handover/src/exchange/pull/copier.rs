//! What brings blocks here: holes are zeroed, data is fetched in chunks, as bandwidth and window allow.

use std::time::Duration;

use super::{Action, BLOCK_BYTES, Job, Outcome, Phase, Pull, Step, StepId};

/// Bytes whose extents are asked for at a time.
const EXTENTS_WINDOW: u64 = 256 << 20;

impl Pull {
    pub(super) fn start_fetch(&mut self, job: u64, entry: Job, out: &mut Vec<Action>) {
        self.in_window += entry.copier_bytes;
        self.jobs.insert(job, entry);
        let step = self.step(Step::Fetch(job));
        let Job { at: offset, len, op, .. } = entry;
        out.push(Action::Fetch { step, job, offset, len, for_guest: op.is_some() });
    }

    pub(super) fn fetched(
        &mut self,
        job: u64,
        outcome: Outcome,
        zero: bool,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(entry) = self.jobs.get_mut(&job) else { return };
        let bytes = std::mem::take(&mut entry.copier_bytes);
        entry.pending -= 1;
        let entry = *entry;
        self.in_window -= bytes;
        let (at, len) = (entry.at, entry.len);
        if let Some(op) = entry.op {
            if outcome == Outcome::Ok {
                out.push(Action::Answer { op, job, at });
            }
            self.op_part_done(op, outcome, out);
        }
        if outcome != Outcome::Ok || self.phase == Phase::Abandoned {
            if entry.op.is_none() {
                // Unreadable there: it stays there. Zeroes are not invented.
                self.pause_until = now + Duration::from_secs(1);
            }
            self.end_job(job, out);
            return;
        }
        if zero {
            self.progress.skipped += len;
        } else {
            self.progress.copied += len;
        }
        for (from, to) in self.map.missing_runs(entry.from, entry.to) {
            let step = self.step(Step::Store { job, from, to });
            let offset = from * BLOCK_BYTES;
            let len = (to * BLOCK_BYTES).min(self.config.size_bytes) - offset;
            // Zeroed rather than skipped: what an earlier, crashed copy left there must not shine through.
            out.push(if zero {
                Action::ZeroLocal { step, offset, len }
            } else {
                Action::Store { step, job, offset, len, at }
            });
            self.jobs.entry(job).and_modify(|job| job.pending += 1);
        }
        if self.jobs.get(&job).is_some_and(|job| job.pending == 0) {
            self.end_job(job, out);
        }
    }

    pub(super) fn stored(&mut self, job: u64, from: u64, to: u64, outcome: Outcome, out: &mut Vec<Action>) {
        match outcome {
            Outcome::Ok => self.map.set(from, to),
            Outcome::Errno(errno) => self.abandon(errno, out),
        }
        let Some(entry) = self.jobs.get_mut(&job) else { return };
        entry.pending -= 1;
        if entry.pending == 0 {
            self.end_job(job, out);
        }
    }

    fn end_job(&mut self, job: u64, out: &mut Vec<Action>) {
        self.jobs.remove(&job);
        self.locks.release(job);
        out.push(Action::EndJob(job));
    }

    /// The answer to [`Action::AskExtents`]: ranges (in bytes) that hold data; the rest of what was asked is holes.
    pub fn extents(&mut self, step: StepId, data: &[std::ops::Range<u64>], out: &mut Vec<Action>) {
        let Some(Step::Extents { from, to }) = self.steps.remove(&step) else { return };
        self.surveying = false;
        self.surveyed = to;
        let mut at = from;
        for extent in data {
            let hole_end = (extent.start / BLOCK_BYTES).min(to);
            self.zero_hole(at, hole_end, out);
            at = at.max(extent.end.div_ceil(BLOCK_BYTES));
        }
        self.zero_hole(at, to, out);
        self.go_on(out);
    }

    /// Blocks that are a hole at the old backing, unless the guest has changed them since: zero them here.
    fn zero_hole(&mut self, from: u64, to: u64, out: &mut Vec<Action>) {
        if from >= to || self.phase != Phase::Copying {
            return;
        }
        for (start, end) in self.map.missing_runs(from, to) {
            for (start, end) in self.touched.missing_runs(start, end) {
                let job = self.id();
                if !self.locks.take(start, end, job, true) {
                    continue;
                }
                let step = self.step(Step::Store { job, from: start, to: end });
                let offset = start * BLOCK_BYTES;
                let len = (end * BLOCK_BYTES).min(self.config.size_bytes) - offset;
                let entry =
                    Job { from: start, to: end, at: offset, len, op: None, pending: 1, copier_bytes: 0 };
                self.jobs.insert(job, entry);
                self.progress.skipped += len;
                out.push(Action::ZeroLocal { step, offset, len });
            }
        }
    }

    pub(super) fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.refilled).as_secs_f64();
        self.refilled = now;
        let burst = self.config.chunk_bytes as f64;
        self.allowance = match self.config.bandwidth {
            Some(limit) => (self.allowance + limit as f64 * elapsed).min(burst.max(limit as f64 * 0.1)),
            None => f64::MAX,
        };
    }

    pub(super) fn copy(&mut self, out: &mut Vec<Action>) {
        if self.map.is_complete() {
            if self.jobs.is_empty() {
                self.begin_cut(out);
            }
            return;
        }
        let blocks = self.config.chunk_bytes / BLOCK_BYTES;
        let mut wrapped = false;
        while self.in_window < self.config.window_bytes && self.allowance > 0.0 {
            let Some(from) = self.map.next_missing(self.cursor) else {
                if wrapped || self.cursor == 0 {
                    return;
                }
                wrapped = true;
                self.cursor = 0;
                continue;
            };
            if from >= self.surveyed {
                self.survey(from, out);
                return;
            }
            // Only what is missing in one run: what lies between is here already.
            let to = self
                .map
                .next_present(from)
                .unwrap_or(self.map.blocks())
                .min(from + blocks)
                .min(self.surveyed);
            self.cursor = to;
            let job = self.id();
            if self.locks.take(from, to, job, true) && !self.being_fetched(from, to) {
                if self.config.bandwidth.is_some() {
                    self.allowance -= ((to - from) * BLOCK_BYTES) as f64;
                }
                let at = from * BLOCK_BYTES;
                let len = (to * BLOCK_BYTES).min(self.config.size_bytes) - at;
                let entry = Job { from, to, at, len, op: None, pending: 1, copier_bytes: len };
                self.start_fetch(job, entry, out);
            } else {
                self.locks.release(job);
                if to == self.map.blocks() {
                    return;
                }
            }
        }
    }

    fn being_fetched(&self, from: u64, to: u64) -> bool {
        self.jobs.values().any(|job| job.from < to && from < job.to)
    }

    fn survey(&mut self, from: u64, out: &mut Vec<Action>) {
        if self.surveying {
            return;
        }
        self.surveying = true;
        let from = from.max(self.surveyed);
        let to = (from + EXTENTS_WINDOW / BLOCK_BYTES).min(self.map.blocks());
        let step = self.step(Step::Extents { from, to });
        let offset = from * BLOCK_BYTES;
        out.push(Action::AskExtents {
            step,
            offset,
            len: (to * BLOCK_BYTES).min(self.config.size_bytes) - offset,
        });
    }
}
