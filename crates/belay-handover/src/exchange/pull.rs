//! Copying towards the attachment, with the guest's writes echoed to the old backing until cut-over.
//!
//! ```text
//!   guest read    all blocks here ──▶ local            any missing ──▶ fetch whole blocks, answer, keep them
//!   guest write   remote, and local where a block is here or entirely written; done when both are
//!   copier        extents ──▶ holes are zeroed here, data is fetched in chunks, as bandwidth and window allow
//!   cut-over      all blocks here ─▶ hold changes ─▶ none in flight ─▶ flush both ─▶ ReadyToCut ─▶ committed
//! ```
//!
//! The old backing stays complete until the commit: the loss of the new host loses nothing. A block is marked here
//! only after its local write has ended, and is saved as such only after a flush of the local side. What is saved holds
//! for this boot of the host only: later writes to a marked block are echoed, not flushed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::locks::Locks;
use super::map::{BLOCK_BYTES, BlockMap};

/// The driver's number for a guest operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// A piece of work given to the driver; its end comes back under this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// What a guest operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// Read.
    Read,
    /// Write, discard or write zeroes: the driver knows which.
    Change,
    /// Flush.
    Flush,
}

/// How a step or an operation ended: 0, or an errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Ok,
    /// With this errno.
    Errno(i32),
}

/// What the driver must do. `step`s are reported back by [`Pull::step_done`] (or [`Pull::extents`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Execute a guest read here, straight into the guest's memory.
    ReadLocal {
        /// Report.
        step: StepId,
        /// The read.
        op: OpId,
    },
    /// Read from the old backing into a buffer that belongs to `job`.
    Fetch {
        /// Report; say whether all bytes were zero.
        step: StepId,
        /// Whose buffer.
        job: u64,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// For the guest: on its own channel. Otherwise on the copier's.
        for_guest: bool,
    },
    /// Copy a guest read's bytes out of the job's buffer.
    Answer {
        /// The read.
        op: OpId,
        /// Whose buffer, and where it begins on the device.
        job: u64,
        /// The buffer's first byte on the device.
        at: u64,
    },
    /// Write part of the job's buffer here.
    Store {
        /// Report.
        step: StepId,
        /// Whose buffer.
        job: u64,
        /// First byte on the device.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Where the buffer begins on the device.
        at: u64,
    },
    /// Make a range read as zeroes here, freeing its space.
    ZeroLocal {
        /// Report.
        step: StepId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Free the job's buffer.
    EndJob(u64),
    /// Execute a guest's change at the old backing, from a stable copy of its data.
    ChangeRemote {
        /// Report.
        step: StepId,
        /// The change.
        op: OpId,
    },
    /// Execute part of a guest's change here, from the same copy.
    ChangeLocal {
        /// Report.
        step: StepId,
        /// The change.
        op: OpId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Flush the old backing.
    FlushRemote(StepId),
    /// Flush the local side.
    FlushLocal(StepId),
    /// A guest operation has ended.
    Complete {
        /// Which.
        op: OpId,
        /// How.
        outcome: Outcome,
    },
    /// Ask the old backing where there is data; answer with [`Pull::extents`].
    AskExtents {
        /// Report.
        step: StepId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Write the map given by [`Pull::take_snapshot`] to its file, durably: the local side has just been flushed.
    SaveMap,
    /// Everything is here, flushed on both sides; changes are held. Commit on both hosts.
    ReadyToCut,
    /// The local side failed: the copy is worth nothing. Once nothing is in flight, go back to plain remote.
    Abandon {
        /// Why.
        errno: i32,
    },
}

/// Knobs of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PullConfig {
    /// The device's size in bytes.
    pub size_bytes: u64,
    /// Bytes fetched at a time by the copier.
    pub chunk_bytes: u64,
    /// Bytes that the copier may have asked for and not got.
    pub window_bytes: u64,
    /// The copier's limit in bytes per second.
    pub bandwidth: Option<u64>,
    /// How often the map is saved while it changes.
    pub save_every: Duration,
}

impl PullConfig {
    /// The defaults for a device of this size: 256 KiB chunks, 1 MiB window, saved every 2 s.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            chunk_bytes: 256 << 10,
            window_bytes: 1 << 20,
            bandwidth: None,
            save_every: Duration::from_secs(2),
        }
    }
}

/// Bytes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Of the device.
    pub total: u64,
    /// Here.
    pub local: u64,
    /// Fetched.
    pub copied: u64,
    /// Written by the guest to both sides.
    pub echoed: u64,
    /// Not sent, being holes or zeroes.
    pub skipped: u64,
}

/// The longest fetch: what the old backing's host executes as one request.
const MAX_FETCH_BYTES: u64 = 4 << 20;
/// Bytes whose extents are asked for at a time.
const EXTENTS_WINDOW: u64 = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Copying,
    /// Changes are held; waiting for those in flight.
    Draining,
    /// Flushing both sides.
    Flushing {
        pending: u8,
        failed: bool,
    },
    /// The driver was told `ReadyToCut`.
    Ready,
    Cut,
    Abandoned,
}

#[derive(Clone, Copy, Debug)]
struct GuestOp {
    kind: GuestKind,
    offset: u64,
    len: u64,
    pending: u8,
    outcome: Outcome,
    /// Blocks to be marked when a change has ended on both sides.
    marks: (u64, u64),
    local_failed: Option<i32>,
    /// Under which number it holds its blocks.
    holder: u64,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    /// Blocks that it brings here.
    from: u64,
    to: u64,
    /// Bytes that it fetches: those blocks, or a guest's read that is too long for whole blocks.
    at: u64,
    len: u64,
    /// A guest read that waits for it.
    op: Option<OpId>,
    pending: u32,
    copier_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    ReadLocal(OpId),
    ChangeRemote(OpId),
    ChangeLocal(OpId),
    FlushOp {
        op: OpId,
        local: bool,
    },
    Fetch(u64),
    /// A local write of these blocks.
    Store {
        job: u64,
        from: u64,
        to: u64,
    },
    Extents {
        from: u64,
        to: u64,
    },
    CutFlush,
    SaveFlush,
}

/// The machine of one exchange.
#[derive(Debug)]
pub struct Pull {
    config: PullConfig,
    map: BlockMap,
    /// Blocks that the guest changed since the copy began: what is known of the old backing's holes is old for them.
    touched: BlockMap,
    phase: Phase,
    locks: Locks,
    ops: BTreeMap<OpId, GuestOp>,
    /// Guest operations that were under way at the old backing when the copy began, and what they hold.
    elders: BTreeMap<OpId, u64>,
    jobs: BTreeMap<u64, Job>,
    steps: BTreeMap<StepId, Step>,
    /// The copy may not be cut over for now.
    held: bool,
    /// The local side failed while the old backing's word was waited for: it decides what that means.
    failed_in_cut: Option<i32>,
    /// Guest operations that wait for blocks, or for the end of the cut-over.
    waiting: VecDeque<OpId>,
    next_id: u64,
    cursor: u64,
    /// Blocks below this have had their extents asked for and answered.
    surveyed: u64,
    surveying: bool,
    in_window: u64,
    allowance: f64,
    refilled: Duration,
    saving: bool,
    /// The map as it was when the flush under way began.
    snapshot: Option<BlockMap>,
    /// A map whose blocks have been flushed.
    flushed: Option<BlockMap>,
    saved_count: u64,
    saved_at: Duration,
    progress: Progress,
    /// The copier met an error at the old backing: it waits so long.
    pause_until: Duration,
}

impl Pull {
    /// A copy that begins with what `map` says is here.
    #[must_use]
    pub fn new(config: PullConfig, map: BlockMap) -> Self {
        assert_eq!(map.blocks(), config.size_bytes.div_ceil(BLOCK_BYTES), "the map is of this device");
        let saved_count = map.count();
        Self {
            touched: BlockMap::empty(config.size_bytes),
            config,
            map,
            phase: Phase::Copying,
            locks: Locks::default(),
            ops: BTreeMap::new(),
            elders: BTreeMap::new(),
            jobs: BTreeMap::new(),
            steps: BTreeMap::new(),
            held: false,
            failed_in_cut: None,
            waiting: VecDeque::new(),
            next_id: 1,
            cursor: 0,
            surveyed: 0,
            surveying: false,
            in_window: 0,
            allowance: 0.0,
            refilled: Duration::ZERO,
            saving: false,
            snapshot: None,
            flushed: None,
            saved_count,
            saved_at: Duration::ZERO,
            progress: Progress::default(),
            pause_until: Duration::ZERO,
        }
    }

    /// What is here.
    #[must_use]
    pub fn map(&self) -> &BlockMap {
        &self.map
    }

    /// Bytes so far.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let local = (self.map.count() * BLOCK_BYTES).min(self.config.size_bytes);
        Progress { total: self.config.size_bytes, local, ..self.progress }
    }

    /// Whether the cut-over is under way.
    #[must_use]
    pub fn is_cutting(&self) -> bool {
        matches!(self.phase, Phase::Draining | Phase::Flushing { .. } | Phase::Ready)
    }

    /// Whether nothing is in flight: an abandoned or cancelled copy may be dropped.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.steps.is_empty()
    }

    /// Changes the copier's limit, in bytes per second.
    pub fn set_bandwidth(&mut self, limit: Option<u64>) {
        self.config.bandwidth = limit;
        self.allowance = 0.0;
    }

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

    /// Keeps the copy from being cut over, or lets it. `false`: the cut-over is under way, and goes on.
    pub fn hold(&mut self, hold: bool) -> bool {
        let possible = !hold || !self.is_cutting();
        self.held = hold && possible;
        possible
    }

    fn begin(&mut self, op: OpId, out: &mut Vec<Action>) -> bool {
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

    fn start_fetch(&mut self, job: u64, entry: Job, out: &mut Vec<Action>) {
        self.in_window += entry.copier_bytes;
        self.jobs.insert(job, entry);
        let step = self.step(Step::Fetch(job));
        let Job { at: offset, len, op, .. } = entry;
        out.push(Action::Fetch { step, job, offset, len, for_guest: op.is_some() });
    }

    /// A step has ended. `zero`: a fetch found nothing but zeroes.
    pub fn step_done(
        &mut self,
        step: StepId,
        outcome: Outcome,
        zero: bool,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(what) = self.steps.remove(&step) else { return };
        match what {
            Step::ReadLocal(op) => match outcome {
                Outcome::Ok => self.op_part_done(op, outcome, out),
                // The old backing has everything: the driver reads there once the copy is dropped.
                Outcome::Errno(errno) => {
                    if self.phase == Phase::Ready {
                        self.failed_in_cut = Some(errno);
                    } else {
                        self.abandon(errno, out);
                    }
                    self.waiting.push_back(op);
                }
            },
            Step::FlushOp { op, local } => {
                if let (true, Outcome::Errno(errno)) = (local, outcome) {
                    // What was written here may be gone, and no later flush would say so. The old backing has it all.
                    self.abandon(errno, out);
                    self.op_part_done(op, Outcome::Ok, out);
                } else {
                    self.op_part_done(op, outcome, out);
                }
            }
            Step::ChangeRemote(op) => self.part_of_change(op, Some(outcome), None, out),
            Step::ChangeLocal(op) => {
                let failed = match outcome {
                    Outcome::Ok => None,
                    Outcome::Errno(errno) => Some(errno),
                };
                self.part_of_change(op, None, failed, out);
            }
            Step::Fetch(job) => self.fetched(job, outcome, zero, now, out),
            Step::Store { job, from, to } => self.stored(job, from, to, outcome, out),
            Step::Extents { .. } => {
                self.surveying = false;
                self.pause_until = now + Duration::from_secs(1);
            }
            Step::CutFlush => self.cut_flushed(outcome, out),
            Step::SaveFlush => self.save_flushed(outcome, out),
        }
        self.go_on(out);
    }

    fn op_part_done(&mut self, op: OpId, outcome: Outcome, out: &mut Vec<Action>) {
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
    fn part_of_change(
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

    fn fetched(&mut self, job: u64, outcome: Outcome, zero: bool, now: Duration, out: &mut Vec<Action>) {
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

    fn stored(&mut self, job: u64, from: u64, to: u64, outcome: Outcome, out: &mut Vec<Action>) {
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

    /// The clock: bandwidth, saving, the copier. Call it some times a second, and after anything that may let the
    /// copier go on.
    pub fn tick(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.refill(now);
        if self.phase == Phase::Copying {
            if now >= self.pause_until {
                self.copy(out);
            }
            let changed = self.map.count() != self.saved_count;
            if changed && !self.saving && now.saturating_sub(self.saved_at) >= self.config.save_every {
                self.saving = true;
                self.saved_at = now;
                self.snapshot = Some(self.map.clone());
                let step = self.step(Step::SaveFlush);
                out.push(Action::FlushLocal(step));
            }
        }
    }

    fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.refilled).as_secs_f64();
        self.refilled = now;
        let burst = self.config.chunk_bytes as f64;
        self.allowance = match self.config.bandwidth {
            Some(limit) => (self.allowance + limit as f64 * elapsed).min(burst.max(limit as f64 * 0.1)),
            None => f64::MAX,
        };
    }

    fn copy(&mut self, out: &mut Vec<Action>) {
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

    fn save_flushed(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        self.saving = false;
        match outcome {
            Outcome::Ok => {
                self.flushed = self.snapshot.take();
                out.push(Action::SaveMap);
            }
            // A flush that failed is never tried again: what it should have made durable may be gone.
            Outcome::Errno(errno) => self.abandon(errno, out),
        }
    }

    /// The map as it was before the flush that [`Action::SaveMap`] follows.
    pub fn take_snapshot(&mut self) -> Option<BlockMap> {
        let snapshot = self.flushed.take()?;
        self.saved_count = snapshot.count();
        Some(snapshot)
    }

    fn begin_cut(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::Copying && !self.held {
            self.phase = Phase::Draining;
            self.go_on(out);
        }
    }

    fn changes_in_flight(&self) -> bool {
        !self.elders.is_empty()
            || self.ops.iter().any(|(op, entry)| entry.kind != GuestKind::Read && !self.waiting.contains(op))
    }

    fn cut_flushed(&mut self, outcome: Outcome, out: &mut Vec<Action>) {
        let Phase::Flushing { pending, failed } = self.phase else { return };
        let failed = failed || outcome != Outcome::Ok;
        self.phase = Phase::Flushing { pending: pending - 1, failed };
        if pending > 1 {
            return;
        }
        if failed {
            self.abandon(5, out);
        } else {
            self.phase = Phase::Ready;
            out.push(Action::ReadyToCut);
        }
    }

    /// The old backing has committed: everything is local. Guest operations that wait are the driver's
    /// ([`Pull::take_waiting`]).
    pub fn cut_committed(&mut self) {
        assert_eq!(self.phase, Phase::Ready, "a cut that was not offered");
        self.phase = Phase::Cut;
    }

    /// The old backing could not be asked: go on as before, and try again in a while.
    pub fn cut_aborted(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.is_cutting() {
            self.phase = Phase::Copying;
            self.pause_until = now + Duration::from_secs(1);
            if let Some(errno) = self.failed_in_cut.take() {
                self.abandon(errno, out);
            }
            self.go_on(out);
        }
    }

    /// Gives the copy up: the operator wants it, or the local side failed. Operations that come or wait from now on
    /// are the driver's to execute remotely ([`Pull::take_waiting`]), once nothing is in flight ([`Pull::is_idle`]).
    pub fn cancel(&mut self) -> bool {
        if matches!(self.phase, Phase::Ready | Phase::Cut) {
            return false;
        }
        self.phase = Phase::Abandoned;
        true
    }

    fn abandon(&mut self, errno: i32, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Abandoned | Phase::Cut) {
            self.phase = Phase::Abandoned;
            out.push(Action::Abandon { errno });
        }
    }

    /// Begins what waited, as far as it may, in order; moves the cut-over on.
    fn go_on(&mut self, out: &mut Vec<Action>) {
        if self.phase == Phase::Draining && !self.changes_in_flight() && self.jobs.is_empty() && !self.saving
        {
            self.phase = Phase::Flushing { pending: 2, failed: false };
            let step = self.step(Step::CutFlush);
            out.push(Action::FlushLocal(step));
            let step = self.step(Step::CutFlush);
            out.push(Action::FlushRemote(step));
        }
        if matches!(self.phase, Phase::Abandoned | Phase::Cut) || self.waiting.is_empty() {
            return;
        }
        for _ in 0..self.waiting.len() {
            let Some(op) = self.waiting.pop_front() else { return };
            if !self.begin(op, out) {
                self.waiting.push_back(op);
            }
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn step(&mut self, step: Step) -> StepId {
        let id = StepId(self.id());
        self.steps.insert(id, step);
        id
    }
}

/// The blocks that a range of bytes touches.
fn blocks_of(offset: u64, len: u64) -> (u64, u64) {
    (offset / BLOCK_BYTES, (offset + len).div_ceil(BLOCK_BYTES))
}
