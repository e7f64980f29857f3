//! An exchange whose host dies at any moment: the process alone, or the machine with what its disk had not made
//! durable. The disk is a model with a volatile cache; a flush makes durable what was written before it began.

use std::collections::BTreeMap;
use std::time::Duration;

use belay_handover::exchange::{
    Action, BLOCK_BYTES, BlockMap, GuestKind, OpId, Outcome, Pull, PullConfig, StepId,
};
use proptest::prelude::*;

const BLOCKS: usize = 24;
/// Sectors of 512 bytes in a block.
const IN_BLOCK: usize = (BLOCK_BYTES / 512) as usize;
const SECTORS: usize = BLOCKS * IN_BLOCK;
/// What was on the new disk before.
const GARBAGE: u32 = u32::MAX;

/// A version for every sector.
type Content = Vec<u32>;

/// A sector as it was written: when, and what.
type Written = (u64, u32);

/// The new disk.
struct Disk {
    now: Vec<Written>,
    durable: Vec<Written>,
    /// What a flush that has begun will make durable, by step.
    flushing: BTreeMap<StepId, Vec<Written>>,
    writes: u64,
}

impl Disk {
    fn write(&mut self, range: std::ops::Range<usize>, content: impl Fn(usize) -> u32) {
        self.writes += 1;
        for (index, sector) in range.enumerate() {
            self.now[sector] = (self.writes, content(index));
        }
    }
}

/// What was written to a sector, oldest first, and when it was acknowledged. The first entry is at least as old as the
/// last flush.
type History = Vec<(u32, Option<u64>)>;

#[derive(Clone)]
struct Op {
    kind: GuestKind,
    at: usize,
    len: usize,
    version: u32,
    /// What a read found.
    found: Content,
    begun: u64,
}

struct World {
    pull: Pull,
    local: Disk,
    remote: Content,
    history: Vec<History>,
    saved: BlockMap,
    saving: Option<BlockMap>,
    todo: Vec<Action>,
    buffers: BTreeMap<u64, Content>,
    ops: BTreeMap<OpId, Op>,
    now: Duration,
    clock: u64,
    ready: bool,
    dice: u64,
}

fn config() -> PullConfig {
    let mut config = PullConfig::new((SECTORS * 512) as u64);
    config.chunk_bytes = BLOCK_BYTES;
    config.window_bytes = 12 * BLOCK_BYTES;
    config.save_every = Duration::from_millis(3);
    config
}

fn sectors(offset: u64, len: u64) -> std::ops::Range<usize> {
    (offset / 512) as usize..((offset + len) / 512) as usize
}

impl World {
    fn new(fill: &[u32], dice: u64) -> Self {
        let remote: Content = fill.iter().flat_map(|version| [*version; IN_BLOCK]).collect();
        let map = BlockMap::empty((SECTORS * 512) as u64);
        Self {
            pull: Pull::new(config(), map.clone()),
            local: Disk {
                now: vec![(0, GARBAGE); SECTORS],
                durable: vec![(0, GARBAGE); SECTORS],
                flushing: BTreeMap::new(),
                writes: 0,
            },
            history: remote.iter().map(|version| vec![(*version, Some(0))]).collect(),
            remote,
            saved: map,
            saving: None,
            todo: Vec::new(),
            buffers: BTreeMap::new(),
            ops: BTreeMap::new(),
            now: Duration::ZERO,
            clock: 1,
            ready: false,
            dice,
        }
    }

    fn dice(&mut self, sides: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % sides
    }

    /// What a guest reads of a sector.
    fn acknowledged(&self, sector: usize) -> u32 {
        let acknowledged = self.history[sector].iter().rev().find(|(_, at)| at.is_some());
        acknowledged.expect("something was always there").0
    }

    fn guest(&mut self, kind: GuestKind, at: usize, len: usize) {
        let at = at % SECTORS;
        let len = len.min(SECTORS - at);
        let (at, len) = if kind == GuestKind::Flush { (0, 0) } else { (at, len) };
        // What overlapping operations in flight give is not defined.
        if self.ops.values().any(|other| other.at < at + len && at < other.at + other.len) {
            return;
        }
        self.clock += 1;
        let version = self.clock as u32 + 1000;
        let op = OpId(self.clock);
        self.ops.insert(op, Op { kind, at, len, version, found: Vec::new(), begun: self.clock });
        if kind == GuestKind::Change {
            self.history[at..at + len].iter_mut().for_each(|history| history.push((version, None)));
        }
        self.pull.guest(op, kind, at as u64 * 512, len as u64 * 512, &mut self.todo);
        self.settle();
    }

    /// Does what needs no time.
    fn settle(&mut self) {
        for action in std::mem::take(&mut self.todo) {
            match action {
                Action::Complete { op, outcome } => self.complete(op, outcome),
                Action::Answer { op, job, at } => {
                    let op = self.ops.get_mut(&op).expect("a read in flight");
                    let skip = op.at - (at / 512) as usize;
                    op.found = self.buffers[&job][skip..skip + op.len].to_vec();
                }
                Action::EndJob(job) => {
                    self.buffers.remove(&job);
                }
                Action::SaveMap => {
                    let snapshot = self.pull.take_snapshot().expect("it was announced");
                    self.saving.get_or_insert(snapshot);
                }
                Action::ReadyToCut => self.ready = true,
                Action::Abandon { errno } => panic!("abandoned: {errno}"),
                Action::FlushLocal(step) => {
                    let present = &self.local.now;
                    self.local.flushing.entry(step).or_insert_with(|| present.clone());
                    self.todo.push(action);
                }
                step => self.todo.push(step),
            }
        }
    }

    fn complete(&mut self, id: OpId, outcome: Outcome) {
        assert_eq!(outcome, Outcome::Ok);
        self.clock += 1;
        let op = self.ops.remove(&id).expect("completes once");
        match op.kind {
            GuestKind::Read => {
                let want: Content = (op.at..op.at + op.len).map(|sector| self.acknowledged(sector)).collect();
                assert_eq!(op.found, want, "a read of {} sectors at {}", op.len, op.at);
            }
            GuestKind::Change => {
                for history in &mut self.history[op.at..op.at + op.len] {
                    let entry = history.iter_mut().find(|(version, _)| *version == op.version);
                    entry.expect("was begun").1 = Some(self.clock);
                }
            }
            // What was replaced before the flush began can never be seen again.
            GuestKind::Flush => {
                for history in &mut self.history {
                    let flushed = history.iter().rposition(|(_, at)| at.is_some_and(|at| at < op.begun));
                    history.drain(..flushed.unwrap_or(0));
                }
            }
        }
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(700);
        self.pull.tick(self.now, &mut self.todo);
        self.settle();
    }

    fn end_one(&mut self, which: usize) {
        if self.todo.is_empty() {
            return;
        }
        let mut which = which % self.todo.len();
        if matches!(self.todo[which], Action::FlushLocal(_)) && self.dice(4) > 0 {
            // A flush takes longer than a write.
            which = (which + 1) % self.todo.len();
        }
        let action = self.todo.remove(which);
        let ended = self.execute(action);
        let mut out = Vec::new();
        match ended {
            (step, Some(data)) => self.pull.extents(step, &data, &mut out),
            (step, None) => {
                let zero =
                    matches!(action, Action::Fetch { job, .. } if self.buffers[&job].iter().all(|v| *v == 0));
                self.pull.step_done(step, Outcome::Ok, zero, self.now, &mut out);
            }
        }
        // As the driver does.
        self.now += Duration::from_millis(1);
        self.pull.tick(self.now, &mut out);
        self.todo.extend(out);
        self.settle();
    }

    fn execute(&mut self, action: Action) -> (StepId, Option<Vec<std::ops::Range<u64>>>) {
        match action {
            Action::ReadLocal { step, op } => {
                let op = self.ops.get_mut(&op).expect("in flight");
                op.found =
                    self.local.now[op.at..op.at + op.len].iter().map(|(_, version)| *version).collect();
                (step, None)
            }
            Action::Fetch { step, job, offset, len, .. } => {
                self.buffers.insert(job, self.remote[sectors(offset, len)].to_vec());
                (step, None)
            }
            Action::Store { step, job, offset, len, at } => {
                let from = &self.buffers[&job][sectors(offset - at, len)];
                self.local.write(sectors(offset, len), |index| from[index]);
                (step, None)
            }
            Action::ZeroLocal { step, offset, len } => {
                self.local.write(sectors(offset, len), |_| 0);
                (step, None)
            }
            Action::ChangeRemote { step, op } => {
                let op = &self.ops[&op];
                self.remote[op.at..op.at + op.len].fill(op.version);
                (step, None)
            }
            Action::ChangeLocal { step, op, offset, len } => {
                let version = self.ops[&op].version;
                self.local.write(sectors(offset, len), |_| version);
                (step, None)
            }
            Action::FlushLocal(step) => {
                let before = self.local.flushing.remove(&step).expect("has begun");
                for (sector, before) in before.into_iter().enumerate() {
                    // What was written since may have become durable too; another flush may have been quicker.
                    let flushed = if self.dice(2) == 0 { self.local.now[sector] } else { before };
                    self.local.durable[sector] = self.local.durable[sector].max(flushed);
                }
                (step, None)
            }
            Action::FlushRemote(step) => (step, None),
            Action::AskExtents { step, offset, len } => {
                let data = (offset / BLOCK_BYTES..(offset + len) / BLOCK_BYTES)
                    .filter(|block| {
                        self.remote[sectors(block * BLOCK_BYTES, BLOCK_BYTES)].iter().any(|v| *v != 0)
                    })
                    .map(|block| block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES);
                (step, Some(data.collect()))
            }
            other => unreachable!("{other:?} has been settled"),
        }
    }

    fn save_ends(&mut self) {
        if let Some(saving) = self.saving.take() {
            self.saved = saving;
        }
    }

    /// Of what was under way, anything may have happened.
    fn die(&mut self) {
        for action in std::mem::take(&mut self.todo) {
            let executes = matches!(
                action,
                Action::ChangeLocal { .. }
                    | Action::ChangeRemote { .. }
                    | Action::Store { .. }
                    | Action::ZeroLocal { .. }
            );
            if executes && self.dice(2) == 0 {
                self.execute(action);
            }
        }
        if self.dice(2) == 0 {
            self.save_ends();
        }
        self.saving = None;
        self.buffers.clear();
        self.local.flushing.clear();
        self.ready = false;
    }

    /// The process dies. Its successor goes on with the map that was saved; the VMM gives it what was in flight.
    fn process_dies(&mut self) {
        self.die();
        self.pull = Pull::new(config(), self.saved.clone());
        let ops: Vec<(OpId, Op)> = self.ops.iter().map(|(id, op)| (*id, op.clone())).collect();
        for (id, op) in ops {
            self.pull.guest(id, op.kind, op.at as u64 * 512, op.len as u64 * 512, &mut self.todo);
            self.settle();
        }
    }

    /// The machine dies. What the saved map calls here must be durable: nothing older than the last flush.
    fn machine_dies(&mut self) {
        self.die();
        for sector in 0..SECTORS {
            if self.dice(2) == 0 {
                self.local.now[sector] = self.local.durable[sector];
            }
            if self.saved.has((sector / IN_BLOCK) as u64) {
                let (_, found) = self.local.now[sector];
                let may_be = &self.history[sector];
                assert!(
                    may_be.iter().any(|(version, _)| *version == found),
                    "sector {sector} is called here, and holds {found}; it may hold one of {may_be:?}"
                );
            }
        }
    }

    fn finish(&mut self) {
        for _ in 0..10_000 {
            if self.ready {
                break;
            }
            self.tick();
            self.end_one(0);
        }
        assert!(self.ready, "the copy comes to its end");
        let waits = |sector: usize| self.ops.values().any(|op| (op.at..op.at + op.len).contains(&sector));
        for sector in 0..SECTORS {
            let ((_, here), there) = (self.local.now[sector], self.remote[sector]);
            assert_eq!(self.local.durable[sector].1, here, "sector {sector} is durable");
            // A change that waits for the end of the cut may have happened in an earlier life; it comes once more.
            if !waits(sector) {
                assert_eq!(
                    (here, there),
                    (self.acknowledged(sector), self.acknowledged(sector)),
                    "sector {sector}"
                );
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Deed {
    Guest { kind: u8, at: usize, len: usize },
    End(usize),
    Tick,
    SaveEnds,
    ProcessDies,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        30 => (0u8..6, 0usize..SECTORS, 1usize..2 * IN_BLOCK).prop_map(|(kind, at, len)| Deed::Guest { kind, at, len }),
        50 => any::<usize>().prop_map(Deed::End),
        12 => Just(Deed::Tick),
        12 => Just(Deed::SaveEnds),
        2 => Just(Deed::ProcessDies),
    ]
}

fn play(world: &mut World, deeds: &[Deed]) {
    for deed in deeds {
        match *deed {
            Deed::Guest { kind, at, len } => {
                let kind = match kind {
                    0 | 1 => GuestKind::Read,
                    5 => GuestKind::Flush,
                    _ => GuestKind::Change,
                };
                world.guest(kind, at, len);
            }
            Deed::End(which) => world.end_one(which),
            Deed::Tick => world.tick(),
            Deed::SaveEnds => world.save_ends(),
            Deed::ProcessDies => world.process_dies(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn copy_whose_process_dies_at_any_moment_ends_with_both_sides_equal(
        fill in proptest::collection::vec(0u32..3, BLOCKS),
        deeds in proptest::collection::vec(deed(), 1..200),
        dice in any::<u64>(),
    ) {
        let mut world = World::new(&fill, dice);
        play(&mut world, &deeds);
        world.finish();
    }

    #[test]
    fn what_the_saved_map_calls_here_is_durable_whenever_the_machine_dies(
        fill in proptest::collection::vec(0u32..3, BLOCKS),
        deeds in proptest::collection::vec(deed(), 1..100),
        dice in any::<u64>(),
    ) {
        let mut world = World::new(&fill, dice);
        play(&mut world, &deeds);
        world.machine_dies();
    }
}
