//! The exchange against a model: two disks in memory, a guest, steps that end in any order.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::{Action, BLOCK_BYTES, BlockMap, GuestKind, OpId, Outcome, Pull, PullConfig, StepId};

/// A device of nine blocks and a half: the last one is short.
const SIZE: usize = 9 * BLOCK_BYTES as usize + 512;

struct World {
    pull: Pull,
    local: Vec<u8>,
    remote: Vec<u8>,
    /// What the guest must read.
    model: Vec<u8>,
    todo: Vec<Action>,
    buffers: BTreeMap<u64, Vec<u8>>,
    ops: BTreeMap<OpId, (GuestKind, usize, Vec<u8>)>,
    completed: usize,
    next: u64,
    now: Duration,
    ready: bool,
}

impl World {
    fn new(fill: &[u8]) -> Self {
        let mut config = PullConfig::new(SIZE as u64);
        config.chunk_bytes = 2 * BLOCK_BYTES;
        config.window_bytes = 4 * BLOCK_BYTES;
        let mut remote = vec![0; SIZE];
        for (block, value) in fill.iter().enumerate().take(10) {
            let from = block * BLOCK_BYTES as usize;
            let to = (from + BLOCK_BYTES as usize).min(SIZE);
            remote[from..to].fill(*value);
        }
        Self {
            pull: Pull::new(config, BlockMap::empty(SIZE as u64)),
            // What an earlier copy left: it must never be seen.
            local: vec![0xdd; SIZE],
            model: remote.clone(),
            remote,
            todo: Vec::new(),
            buffers: BTreeMap::new(),
            ops: BTreeMap::new(),
            completed: 0,
            next: 1,
            now: Duration::ZERO,
            ready: false,
        }
    }

    fn guest(&mut self, kind: GuestKind, sector: usize, sectors: usize, value: u8) {
        let offset = sector.min(SIZE / 512 - 1) * 512;
        let len = (sectors * 512).clamp(512, SIZE - offset);
        // The guest does not have overlapping operations in flight: what they would give is not defined.
        let clash = self.ops.values().any(|(other, at, data)| {
            *other != GuestKind::Flush && *at < offset + len && offset < *at + data.len()
        });
        if clash && kind != GuestKind::Flush {
            return;
        }
        let (offset, len) = if kind == GuestKind::Flush { (0, 0) } else { (offset, len) };
        let op = OpId(self.next);
        self.next += 1;
        self.ops.insert(op, (kind, offset, vec![value; len]));
        self.pull.guest(op, kind, offset as u64, len as u64, &mut self.todo);
        self.settle();
    }

    /// Does what needs no time: completions and the like.
    fn settle(&mut self) {
        let mut kept = Vec::new();
        for action in std::mem::take(&mut self.todo) {
            match action {
                Action::Complete { op, outcome } => {
                    assert_eq!(outcome, Outcome::Ok);
                    let (kind, offset, data) = self.ops.remove(&op).expect("completes once");
                    match kind {
                        GuestKind::Change => self.model[offset..offset + data.len()].copy_from_slice(&data),
                        GuestKind::Read => {
                            assert_eq!(data, self.model[offset..offset + data.len()], "a read")
                        }
                        GuestKind::Flush => {}
                    }
                    self.completed += 1;
                }
                Action::Answer { op, job, at } => {
                    let (_, offset, data) = self.ops.get_mut(&op).expect("a read in flight");
                    let skip = *offset - at as usize;
                    let len = data.len();
                    data.copy_from_slice(&self.buffers[&job][skip..skip + len]);
                }
                Action::EndJob(job) => {
                    self.buffers.remove(&job);
                }
                Action::SaveMap => assert!(self.pull.take_snapshot().is_some()),
                Action::ReadyToCut => self.ready = true,
                Action::Abandon { errno } => panic!("abandoned: {errno}"),
                step => kept.push(step),
            }
        }
        self.todo = kept;
    }

    fn tick(&mut self) {
        self.now += Duration::from_millis(700);
        self.pull.tick(self.now, &mut self.todo);
        self.settle();
    }

    /// Ends one of the steps that are under way.
    fn end_one(&mut self, which: usize) {
        if self.todo.is_empty() {
            return;
        }
        let action = self.todo.remove(which % self.todo.len());
        let (step, zero) = self.execute(action);
        if let Some(step) = step {
            let mut out = Vec::new();
            self.pull.step_done(step, Outcome::Ok, zero, self.now, &mut out);
            self.todo.extend(out);
        }
        self.settle();
    }

    fn execute(&mut self, action: Action) -> (Option<StepId>, bool) {
        let range = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
        match action {
            Action::ReadLocal { step, op } => {
                let (_, offset, data) = self.ops.get_mut(&op).expect("in flight");
                let len = data.len();
                data.copy_from_slice(&self.local[*offset..*offset + len]);
                (Some(step), false)
            }
            Action::Fetch { step, job, offset, len, .. } => {
                let bytes = self.remote[range(offset, len)].to_vec();
                let zero = bytes.iter().all(|byte| *byte == 0);
                self.buffers.insert(job, bytes);
                (Some(step), zero)
            }
            Action::Store { step, job, offset, len, at } => {
                let bytes = &self.buffers[&job][range(offset - at, len)];
                self.local[range(offset, len)].copy_from_slice(bytes);
                (Some(step), false)
            }
            Action::ZeroLocal { step, offset, len } => {
                self.local[range(offset, len)].fill(0);
                (Some(step), false)
            }
            Action::ChangeRemote { step, op } => {
                let (_, offset, data) = &self.ops[&op];
                self.remote[*offset..*offset + data.len()].copy_from_slice(data);
                (Some(step), false)
            }
            Action::ChangeLocal { step, op, offset, len } => {
                let (_, at, data) = &self.ops[&op];
                let skip = offset as usize - at;
                self.local[range(offset, len)].copy_from_slice(&data[skip..skip + len as usize]);
                (Some(step), false)
            }
            Action::FlushLocal(step) | Action::FlushRemote(step) => (Some(step), false),
            Action::AskExtents { step, offset, len } => {
                let mut data = Vec::new();
                for block in offset / BLOCK_BYTES..(offset + len).div_ceil(BLOCK_BYTES) {
                    let from = (block * BLOCK_BYTES) as usize;
                    let to = (from + BLOCK_BYTES as usize).min(SIZE);
                    if self.remote[from..to].iter().any(|byte| *byte != 0) {
                        data.push(from as u64..to as u64);
                    }
                }
                let mut out = Vec::new();
                self.pull.extents(step, &data, &mut out);
                self.todo.extend(out);
                (None, false)
            }
            other => unreachable!("{other:?} has been settled"),
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
        assert!(self.local == self.remote, "both sides are equal at the cut");
        assert!(self.remote == self.model, "and hold what the guest wrote");
        self.pull.cut_committed();
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Guest { kind: u8, sector: usize, sectors: usize, value: u8 },
    End(usize),
    Tick,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        3 => (0u8..5, 0usize..74, 1usize..24, any::<u8>())
            .prop_map(|(kind, sector, sectors, value)| Deed::Guest { kind, sector, sectors, value }),
        4 => any::<usize>().prop_map(Deed::End),
        1 => Just(Deed::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn guest_reads_its_writes_and_both_sides_end_equal(
        fill in proptest::collection::vec(0u8..3, 10),
        deeds in proptest::collection::vec(deed(), 1..120),
    ) {
        let mut world = World::new(&fill);
        for deed in deeds {
            match deed {
                Deed::Guest { kind, sector, sectors, value } => {
                    let kind = match kind {
                        0 | 1 => GuestKind::Read,
                        4 => GuestKind::Flush,
                        _ => GuestKind::Change,
                    };
                    world.guest(kind, sector, sectors, value);
                }
                Deed::End(which) => world.end_one(which),
                Deed::Tick => world.tick(),
            }
        }
        world.finish();
    }
}

#[test]
fn holes_are_not_fetched() {
    let mut world = World::new(&[0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    world.finish();
    assert_eq!(world.pull.progress().copied, BLOCK_BYTES);
    assert_eq!(world.pull.progress().local, SIZE as u64);
}

#[test]
fn changes_wait_while_the_cut_is_committed_and_are_given_back() {
    let mut world = World::new(&[1; 10]);
    for _ in 0..1000 {
        if world.ready {
            break;
        }
        world.tick();
        world.end_one(0);
    }
    let before = world.completed;
    world.guest(GuestKind::Change, 0, 8, 9);
    assert!(world.todo.is_empty());
    world.pull.cut_committed();
    assert_eq!(world.pull.take_waiting().len(), 1);
    assert_eq!(world.completed, before);
}

#[test]
fn aborted_cut_lets_changes_go_on_to_both_sides() {
    let mut world = World::new(&[1; 10]);
    for _ in 0..1000 {
        if world.ready {
            break;
        }
        world.tick();
        world.end_one(0);
    }
    world.guest(GuestKind::Change, 3, 9, 9);
    world.ready = false;
    let mut out = Vec::new();
    world.pull.cut_aborted(world.now, &mut out);
    world.todo.extend(out);
    world.finish();
}

#[test]
fn local_write_error_abandons_the_copy_and_the_guest_sees_none() {
    let mut world = World::new(&[1; 10]);
    let mut out = Vec::new();
    world.pull.guest(OpId(1), GuestKind::Change, 0, 4096, &mut out);
    let steps: Vec<StepId> = out
        .iter()
        .filter_map(|action| match action {
            Action::ChangeRemote { step, .. } | Action::ChangeLocal { step, .. } => Some(*step),
            _ => None,
        })
        .collect();
    out.clear();
    world.pull.step_done(steps[1], Outcome::Errno(28), false, world.now, &mut out);
    world.pull.step_done(steps[0], Outcome::Ok, false, world.now, &mut out);
    assert_eq!(out, [Action::Abandon { errno: 28 }, Action::Complete { op: OpId(1), outcome: Outcome::Ok }]);
    assert!(world.pull.is_idle());
}

#[test]
fn bandwidth_limit_bounds_what_is_asked_for() {
    let mut config = PullConfig::new(64 << 20);
    config.bandwidth = Some(1 << 20);
    let mut pull = Pull::new(config, BlockMap::empty(64 << 20));
    let mut out = Vec::new();
    pull.tick(Duration::from_secs(1), &mut out);
    let Some(Action::AskExtents { step, .. }) = out.pop() else { panic!("asks first: {out:?}") };
    pull.extents(step, std::slice::from_ref(&(0..64 << 20)), &mut out);
    let mut asked = 0u64;
    for tenth in 11..=20 {
        out.clear();
        pull.tick(Duration::from_millis(tenth * 100), &mut out);
        for action in std::mem::take(&mut out) {
            if let Action::Fetch { step, len, .. } = action {
                asked += len;
                pull.step_done(step, Outcome::Errno(5), false, Duration::ZERO, &mut out);
            }
        }
    }
    assert!((512 << 10..=2 << 20).contains(&asked), "{asked} bytes in a second at 1 MiB/s");
}

/// Found with a real guest: the copier read a block before a write that had been sent before the copy began, and kept
/// what it had read.
#[test]
fn block_of_a_change_from_before_the_copy_is_fetched_only_when_that_has_ended() {
    let mut world = World::new(&[1; 10]);
    let elder = OpId(1000);
    world.pull.elder(elder, GuestKind::Change, 2 * BLOCK_BYTES, BLOCK_BYTES);
    for _ in 0..1000 {
        world.tick();
        world.end_one(0);
    }
    assert!(!world.pull.map().has(2), "what the old backing had before the change is kept");
    assert!(!world.ready);
    // The change lands, and only then is told to have ended.
    let (from, to) = (2 * BLOCK_BYTES as usize, 3 * BLOCK_BYTES as usize);
    world.remote[from..to].fill(7);
    world.model[from..to].fill(7);
    let mut out = Vec::new();
    world.pull.elder_done(elder, &mut out);
    world.todo.extend(out);
    world.finish();
}

#[test]
fn old_backing_is_not_let_go_while_it_has_requests_from_before_the_copy() {
    let mut world = World::new(&[1; 10]);
    world.pull.elder(OpId(1000), GuestKind::Read, 0, BLOCK_BYTES);
    for _ in 0..1000 {
        world.tick();
        world.end_one(0);
    }
    assert_eq!(world.pull.progress().local, SIZE as u64);
    assert!(!world.ready);
    let mut out = Vec::new();
    world.pull.elder_done(OpId(1000), &mut out);
    world.todo.extend(out);
    world.finish();
}

#[test]
fn hole_that_a_change_from_before_the_copy_filled_is_not_zeroed() {
    let mut world = World::new(&[0; 10]);
    let elder = OpId(1000);
    world.pull.elder(elder, GuestKind::Change, 0, BLOCK_BYTES);
    let mut out = Vec::new();
    world.pull.tick(Duration::from_millis(1), &mut out);
    let Some(Action::AskExtents { step, .. }) = out.pop() else { panic!("asks first: {out:?}") };
    // Asked before the change landed, answered after it has ended.
    world.remote[..BLOCK_BYTES as usize].fill(7);
    world.model[..BLOCK_BYTES as usize].fill(7);
    world.pull.elder_done(elder, &mut out);
    world.pull.extents(step, &[], &mut out);
    world.todo.extend(out);
    world.finish();
}

#[test]
fn local_read_error_while_the_cut_is_committed_waits_for_its_outcome() {
    for committed in [true, false] {
        let mut world = World::new(&[1; 10]);
        for _ in 0..1000 {
            if world.ready {
                break;
            }
            world.tick();
            world.end_one(0);
        }
        let mut out = Vec::new();
        world.pull.guest(OpId(1), GuestKind::Read, 0, 512, &mut out);
        let Some(Action::ReadLocal { step, .. }) = out.pop() else { panic!("all is here: {out:?}") };
        world.pull.step_done(step, Outcome::Errno(5), false, world.now, &mut out);
        assert!(out.is_empty(), "nothing is tried or given up before the outcome is known: {out:?}");
        if committed {
            world.pull.cut_committed();
        } else {
            world.pull.cut_aborted(world.now, &mut out);
            assert_eq!(out, [Action::Abandon { errno: 5 }]);
        }
        assert_eq!(world.pull.take_waiting(), [OpId(1)]);
    }
}

#[test]
fn longest_read_at_an_odd_offset_is_fetched_in_one_request() {
    let mut pull = Pull::new(PullConfig::new(16 << 20), BlockMap::empty(16 << 20));
    let mut out = Vec::new();
    pull.guest(OpId(1), GuestKind::Read, 512, 4 << 20, &mut out);
    let Some(Action::Fetch { step, offset, len, .. }) = out.pop() else { panic!("{out:?}") };
    assert_eq!((offset, len), (512, 4 << 20));
    pull.step_done(step, Outcome::Ok, false, Duration::ZERO, &mut out);
    let stored: Vec<(u64, u64, u64)> = out
        .iter()
        .filter_map(|action| match action {
            Action::Store { offset, len, at, .. } => Some((*offset, *len, *at)),
            _ => None,
        })
        .collect();
    // The blocks at both ends are not here entirely.
    assert_eq!(stored, [(4096, (4 << 20) - 4096, 512)]);
}

#[test]
fn copy_that_is_held_is_not_cut_over_until_it_is_let() {
    let mut world = World::new(&[1; 10]);
    assert!(world.pull.hold(true));
    for _ in 0..1000 {
        world.tick();
        world.end_one(0);
    }
    assert!(!world.ready && world.pull.progress().local == SIZE as u64);
    world.pull.hold(false);
    world.finish();
    let mut cutting = World::new(&[1; 10]);
    for _ in 0..1000 {
        cutting.tick();
        cutting.end_one(0);
    }
    assert!(!cutting.pull.hold(true), "too late");
}

#[test]
fn local_flush_that_fails_ends_the_copy_and_not_the_guests_flush() {
    let mut pull = Pull::new(PullConfig::new(1 << 20), BlockMap::empty(1 << 20));
    let mut out = Vec::new();
    pull.guest(OpId(1), GuestKind::Flush, 0, 0, &mut out);
    let [Action::FlushRemote(remote), Action::FlushLocal(local)] = out[..] else { panic!("{out:?}") };
    out.clear();
    pull.step_done(local, Outcome::Errno(5), false, Duration::ZERO, &mut out);
    // What was written here may be gone, though the next flush says that all is well.
    assert_eq!(out, [Action::Abandon { errno: 5 }]);
    out.clear();
    pull.step_done(remote, Outcome::Ok, false, Duration::ZERO, &mut out);
    assert_eq!(out, [Action::Complete { op: OpId(1), outcome: Outcome::Ok }]);
}
