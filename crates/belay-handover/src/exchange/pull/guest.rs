//! What the guest asks for: what is here is read here, changes go to both sides.

use super::{Action, BLOCK_BYTES, GuestKind, GuestOp, Job, OpId, Outcome, Phase, Pull, Step, StepId};

/// The longest fetch: what the old backing's host executes as one request.
const MAX_FETCH_BYTES: u64 = 4 << 20;

impl Pull {
    /// Guest reads that are being executed here; after [`Pull::cut_committed`] their ends are the driver's.
    pub fn local_reads(&self) -> impl Iterator<Item = (StepId, OpId)> + '_ {
        self.steps.iter().filter_map(|(step, what)| match what {
            Step::ReadLocal(op) => Some((*step, *op)),
            _ => None,
        })
    }

    /// Guest operations that wait and have not begun; after [`Pull::cut_committed`] or when abandoned they are the
    /// driver's to execute.
    pub fn take_waiting(&mut self) -> Vec<OpId> {
        let waiting: Vec<OpId> = self.waiting.drain(..).collect();
        for op in &waiting {
            self.ops.remove(op);
        }
        waiting
    }

    /// A guest operation that was given to the old backing before the copy began, and has not ended. It stays there.
    /// Nothing of a change's blocks is fetched before it has ended (the copy would be that of before, for ever), and
    /// the old backing is not let go. Tell of all of them before anything else, except those that a guest brings whose
    /// ring starts later: the old backing's host lets no fetch overtake them. [`Pull::elder_done`] when one has ended.
    pub fn elder(&mut self, op: OpId, kind: GuestKind, offset: u64, len: u64) {
        let holder = self.id();
        if kind == GuestKind::Change {
            let (from, to) = blocks_of(offset, len);
            self.locks.hold(from, to, holder);
            self.touched.set(from, to);
        }
        self.elders.insert(op, holder);
    }

    /// An elder has ended at the old backing, well or not. Any other operation is none of this.
    pub fn elder_done(&mut self, op: OpId, out: &mut Vec<Action>) {
        if let Some(holder) = self.elders.remove(&op) {
            self.locks.release(holder);
            self.go_on(out);
        }
    }

    /// A guest operation. Ranges have been checked against the device's size.
    pub fn guest(&mut self, op: OpId, kind: GuestKind, offset: u64, len: u64, out: &mut Vec<Action>) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.config.size_bytes), "a checked range");
        let entry = GuestOp {
            kind,
            offset,
            len,
            pending: 0,
            outcome: Outcome::Ok,
            marks: (0, 0),
            local_failed: None,
            holder: 0,
        };
        self.ops.insert(op, entry);
        if self.phase == Phase::Abandoned || !self.begin(op, out) {
            self.waiting.push_back(op);
        }
    }

    pub(super) fn begin(&mut self, op: OpId, out: &mut Vec<Action>) -> bool {
        let Some(entry) = self.ops.get(&op).copied() else { return true };
        match entry.kind {
            // While the cut-over is under way the old backing may go at any time: a flush waits for the new one.
            GuestKind::Flush if self.phase != Phase::Copying => false,
            GuestKind::Flush => {
                self.ops.entry(op).and_modify(|entry| entry.pending = 2);
                let step = self.step(Step::FlushOp { op, local: false });
                out.push(Action::FlushRemote(step));
                let step = self.step(Step::FlushOp { op, local: true });
                out.push(Action::FlushLocal(step));
                true
            }
            GuestKind::Read => self.begin_read(op, entry, out),
            GuestKind::Change => self.begin_change(op, entry, out),
        }
    }

    fn begin_read(&mut self, op: OpId, entry: GuestOp, out: &mut Vec<Action>) -> bool {
        let (from, to) = blocks_of(entry.offset, entry.len);
        if self.map.has_all(from, to) {
            if self.failed_in_cut.is_some() {
                return false;
            }
            self.ops.entry(op).and_modify(|entry| entry.pending = 1);
            let step = self.step(Step::ReadLocal(op));
            out.push(Action::ReadLocal { step, op });
            return true;
        }
        let job = self.id();
        if !self.locks.take(from, to, job, true) {
            return false;
        }
        self.ops.entry(op).and_modify(|entry| entry.pending = 1);
        let job_of = |from: u64, to: u64, at: u64, len: u64| Job {
            from,
            to,
            at,
            len,
            op: Some(op),
            pending: 1,
            copier_bytes: 0,
        };
        let whole = (to * BLOCK_BYTES).min(self.config.size_bytes) - from * BLOCK_BYTES;
        let entry = if whole <= MAX_FETCH_BYTES {
            job_of(from, to, from * BLOCK_BYTES, whole)
        } else {
            let (inner_from, inner_to) =
                (entry.offset.div_ceil(BLOCK_BYTES), self.whole_end(entry.offset + entry.len));
            job_of(inner_from, inner_to, entry.offset, entry.len)
        };
        self.start_fetch(job, entry, out);
        true
    }

    fn begin_change(&mut self, op: OpId, entry: GuestOp, out: &mut Vec<Action>) -> bool {
        if self.phase != Phase::Copying {
            return false;
        }
        let (from, to) = blocks_of(entry.offset, entry.len);
        let holder = self.id();
        if !self.locks.take(from, to, holder, false) {
            return false;
        }
        let (local_from, local_to) = self.local_part(entry.offset, entry.len);
        self.touched.set(from, to);
        let local = local_from < local_to;
        let marks = if local { (local_from.div_ceil(BLOCK_BYTES), self.whole_end(local_to)) } else { (0, 0) };
        self.ops.entry(op).and_modify(|entry| {
            entry.pending = 1 + u8::from(local);
            entry.marks = marks;
            entry.holder = holder;
        });
        let step = self.step(Step::ChangeRemote(op));
        out.push(Action::ChangeRemote { step, op });
        if local {
            let step = self.step(Step::ChangeLocal(op));
            out.push(Action::ChangeLocal { step, op, offset: local_from, len: local_to - local_from });
        }
        true
    }

    /// The part of a change that is made here as well: blocks that are here, and blocks that it covers entirely.
    fn local_part(&self, offset: u64, len: u64) -> (u64, u64) {
        let end = offset + len;
        let start = if offset.is_multiple_of(BLOCK_BYTES) || self.map.has(offset / BLOCK_BYTES) {
            offset
        } else {
            offset.next_multiple_of(BLOCK_BYTES)
        };
        let at_end = end == self.config.size_bytes || end.is_multiple_of(BLOCK_BYTES);
        let stop =
            if at_end || self.map.has(end / BLOCK_BYTES) { end } else { end / BLOCK_BYTES * BLOCK_BYTES };
        (start, stop)
    }

    /// The block after the last one that ends at or before byte `end`; the device's last block may be short.
    fn whole_end(&self, end: u64) -> u64 {
        if end == self.config.size_bytes { self.map.blocks() } else { end / BLOCK_BYTES }
    }

    pub(super) fn op_part_done(&mut self, op: OpId, outcome: Outcome, out: &mut Vec<Action>) {
        let Some(entry) = self.ops.get_mut(&op) else { return };
        if entry.outcome == Outcome::Ok {
            entry.outcome = outcome;
        }
        entry.pending -= 1;
        if entry.pending == 0 {
            let outcome = entry.outcome;
            self.ops.remove(&op);
            out.push(Action::Complete { op, outcome });
        }
    }

    /// One side of a change has ended.
    pub(super) fn part_of_change(
        &mut self,
        op: OpId,
        remote: Option<Outcome>,
        local: Option<i32>,
        out: &mut Vec<Action>,
    ) {
        let Some(entry) = self.ops.get_mut(&op) else { return };
        if let Some(outcome) = remote {
            entry.outcome = outcome;
        }
        entry.local_failed = entry.local_failed.or(local);
        entry.pending -= 1;
        if entry.pending > 0 {
            return;
        }
        let entry = *entry;
        self.ops.remove(&op);
        self.locks.release(entry.holder);
        if let Some(errno) = entry.local_failed {
            self.abandon(errno, out);
        } else if entry.outcome == Outcome::Ok {
            self.map.set(entry.marks.0, entry.marks.1);
            self.progress.echoed += entry.len;
        }
        out.push(Action::Complete { op, outcome: entry.outcome });
    }
}

/// The blocks that a range of bytes touches.
fn blocks_of(offset: u64, len: u64) -> (u64, u64) {
    (offset / BLOCK_BYTES, (offset + len).div_ceil(BLOCK_BYTES))
}
