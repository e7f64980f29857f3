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

mod copier;
mod cut;
mod guest;
mod types;

pub use types::{Action, GuestKind, OpId, Outcome, Progress, PullConfig, StepId};

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
