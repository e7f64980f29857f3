//! Carries out what the exchange's machine decides: buffers, the two sides, the map's file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use belay_block::{Backend, Buf, Op, OpId as BlockOpId, OpKind, Status};
use belay_handover::exchange::{
    Action, BlockMap, BootId, GuestKind, OpId, Outcome, Pull, PullConfig, StepId,
};
use belay_handover::handover::Source;
use belay_wire::DeviceId;

use crate::client::{RemoteDone, RemoteKind, RemoteOwner, RemoteRequest};
use crate::device::{Device, STEP_OP};
use crate::handle::{ExchangeOptions, Notice};
use crate::handover::{Handover, numbered_source};
use crate::stats::{ExchangeProgress, since};

/// How often the machine is told the time while it copies.
const TICK: Duration = Duration::from_millis(20);

/// A running exchange.
pub(crate) struct Exchange {
    pull: Pull,
    local: Box<dyn Backend>,
    map_path: PathBuf,
    device: DeviceId,
    /// Of this host; without it no map is saved.
    boot: Option<BootId>,
    started: Instant,
    last_tick: Instant,
    /// Buffers of fetches, by job.
    fetched: HashMap<u64, Buf>,
    /// Stable copies of the data of guest changes, by request key.
    changes: HashMap<u64, Buf>,
    saving: Option<Receiver<std::io::Result<()>>>,
    ending: Option<Ending>,
}

/// Why an exchange ends before its cut-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Cancelled,
    /// The device has left this host.
    Gone,
    Failed(i32),
}

impl Exchange {
    pub(crate) fn local_mut(&mut self) -> &mut dyn Backend {
        &mut *self.local
    }

    pub(crate) fn name(&self) -> &'static str {
        if self.pull.is_cutting() { "cutting" } else { "copying" }
    }

    pub(crate) fn progress(&self) -> ExchangeProgress {
        let progress = self.pull.progress();
        ExchangeProgress {
            total_bytes: progress.total,
            local_bytes: progress.local,
            copied_bytes: progress.copied,
            echoed_bytes: progress.echoed,
            skipped_bytes: progress.skipped,
        }
    }

    pub(crate) fn next_deadline(&self, _now: Instant) -> Option<Instant> {
        let tick = self.last_tick + TICK;
        Some(self.local.next_deadline().map_or(tick, |deadline| deadline.min(tick)))
    }
}

/// This boot of the host.
fn this_boot() -> Option<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    let boot = text.as_deref().and_then(BootId::parse);
    if boot.is_none() {
        tracing::warn!("the kernel does not say its boot id: exchanges begin from nothing after a restart");
    }
    boot
}

/// Reads the map of an exchange that was under way; one that is damaged, foreign or of an earlier boot counts as none.
fn restore(path: &Path, device: DeviceId, size_bytes: u64, boot: Option<BootId>) -> BlockMap {
    let Some(boot) = boot else { return BlockMap::empty(size_bytes) };
    match std::fs::read(path) {
        Ok(bytes) => match BlockMap::decode(&bytes, device, size_bytes, boot) {
            Ok(map) => return map,
            Err(error) => {
                tracing::warn!(%device, path = %path.display(), %error, "the exchange begins from nothing");
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(%device, path = %path.display(), %error, "the exchange begins from nothing")
        }
    }
    BlockMap::empty(size_bytes)
}

/// Writes a file such that after a crash either the old or the new content is there.
fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder)?.sync_all()
}

/// Removes a map that is worth nothing any more. One that is still being written would come back after that.
fn forget_map(path: PathBuf, saving: Option<Receiver<std::io::Result<()>>>) {
    let Some(saving) = saving else {
        let _ = std::fs::remove_file(path);
        return;
    };
    let spawned = std::thread::Builder::new().name("belay-map".to_owned()).spawn(move || {
        let _ = saving.recv();
        let _ = std::fs::remove_file(path);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "an exchange map could not be removed");
    }
}

fn outcome_of(status: Status) -> Outcome {
    match status {
        Status::Ok => Outcome::Ok,
        Status::Failed { errno } => Outcome::Errno(errno),
        Status::Unsupported => Outcome::Errno(libc::EOPNOTSUPP),
    }
}

fn status_of(outcome: Outcome) -> Status {
    match outcome {
        Outcome::Ok => Status::Ok,
        Outcome::Errno(errno) => Status::failed(errno),
    }
}

/// A discard may leave anything behind; here both sides must read the same.
fn both_alike(kind: OpKind) -> OpKind {
    if kind == OpKind::Discard { OpKind::WriteZeroes { unmap: true } } else { kind }
}

fn guest_kind(kind: OpKind) -> GuestKind {
    match kind {
        OpKind::Read => GuestKind::Read,
        OpKind::Flush => GuestKind::Flush,
        OpKind::Write | OpKind::Discard | OpKind::WriteZeroes { .. } => GuestKind::Change,
    }
}

impl Device {
    pub(crate) fn start_exchange(&mut self, local: Box<dyn Backend>, options: ExchangeOptions) {
        if self.client.is_none() || self.is_successor() || self.exchange.is_some() {
            self.notice(Notice::ExchangePaused {
                reason: "the device is not remote, or is being copied".to_owned(),
                full: false,
            });
            return;
        }
        let size_bytes = self.block.size_bytes;
        if local.info().size_bytes != size_bytes {
            let reason =
                format!("the new backing has {} bytes, the device {size_bytes}", local.info().size_bytes);
            self.notice(Notice::ExchangePaused { reason, full: false });
            return;
        }
        let mut config = PullConfig::new(size_bytes);
        config.bandwidth = options.bandwidth;
        config.window_bytes = options.in_flight_bytes.max(config.chunk_bytes);
        let boot = this_boot();
        let map = restore(&options.map_path, self.identity.id, size_bytes, boot);
        let mut pull = Pull::new(config, map);
        // Orphans too: the guest has forgotten them, but they change the old backing all the same.
        for (key, request) in self.requests.everything().filter(|(_, request)| request.done.is_none()) {
            let (kind, offset, len) = request.work();
            pull.elder(OpId(key as u64), guest_kind(kind), offset, len);
        }
        self.exchange = Some(Box::new(Exchange {
            pull,
            local,
            map_path: options.map_path,
            device: self.identity.id,
            boot,
            started: self.now,
            last_tick: self.now,
            fetched: HashMap::new(),
            changes: HashMap::new(),
            saving: None,
            ending: None,
        }));
        let home = self.is_going_home();
        self.hold_cut(home);
        self.exchange_tick();
    }

    /// Keeps the exchange from its cut-over, or lets it. `false`: it is under way.
    pub(crate) fn hold_cut(&mut self, hold: bool) -> bool {
        self.exchange.as_mut().is_none_or(|exchange| exchange.pull.hold(hold))
    }

    /// The guest has left for the old backing, which is complete: the copy is worth nothing any more.
    pub(crate) fn drop_exchange(&mut self) {
        let Some(exchange) = &mut self.exchange else { return };
        exchange.pull.cancel();
        exchange.ending = Some(Ending::Gone);
        self.end_exchange_if_idle();
    }

    /// Lets the machine work, and does what it says, until it has nothing more to say.
    fn pull(&mut self, work: impl FnOnce(&mut Pull, Duration, &mut Vec<Action>)) {
        let Some(exchange) = &mut self.exchange else { return };
        let mut actions = Vec::new();
        let now = since(self.now, exchange.started);
        work(&mut exchange.pull, now, &mut actions);
        for action in actions {
            self.exchange_action(action);
        }
    }

    pub(crate) fn exchange_tick(&mut self) {
        if !self.numbers_known {
            return;
        }
        let Some(exchange) = &mut self.exchange else { return };
        if exchange.local.next_deadline().is_some_and(|deadline| deadline <= self.now) {
            exchange.local.tick(&mut self.ring, self.now);
        }
        exchange.last_tick = self.now;
        if let Some(saving) = &exchange.saving {
            match saving.try_recv() {
                Ok(Ok(())) => exchange.saving = None,
                Ok(Err(error)) => {
                    tracing::warn!(device = %exchange.device, %error, "the exchange map could not be saved");
                    exchange.saving = None;
                }
                Err(_) => {}
            }
        }
        self.pull(|pull, now, out| pull.tick(now, out));
        self.end_exchange_if_idle();
    }

    /// A request of the guest, while there is an exchange.
    pub(crate) fn exchange_guest(&mut self, key: usize) {
        let Some(request) = self.requests.get(key) else { return };
        let (kind, offset, len) = request.work();
        let kind = guest_kind(kind);
        self.pull(|pull, _, out| pull.guest(OpId(key as u64), kind, offset, len, out));
    }

    fn exchange_action(&mut self, action: Action) {
        match action {
            Action::ReadLocal { step, op } => {
                let Some(request) = self.requests.get(op.0 as usize) else { return };
                let (offset, len, buf) = (request.offset, request.len, request.target().clone());
                self.requests.reads_here(op.0 as usize);
                self.local_step(step, OpKind::Read, offset, len, buf);
            }
            Action::Fetch { step, job, offset, len, for_guest } => {
                self.fetch(step, job, offset, len, for_guest)
            }
            Action::Answer { op, job, at } => self.answer_from(op, job, at),
            Action::Store { step, job, offset, len, at } => {
                let buf = self.exchange.as_ref().and_then(|exchange| exchange.fetched.get(&job));
                let Some(buf) = buf.map(|buf| buf.part((offset - at) as usize, len as usize)) else { return };
                self.local_step(step, OpKind::Write, offset, len, buf);
            }
            Action::ZeroLocal { step, offset, len } => {
                self.local_step(step, OpKind::WriteZeroes { unmap: true }, offset, len, Buf::default());
            }
            Action::EndJob(job) => {
                if let Some(exchange) = &mut self.exchange {
                    exchange.fetched.remove(&job);
                }
            }
            Action::ChangeRemote { step, op } => self.change_remote(step, op),
            Action::ChangeLocal { step, op, offset, len } => self.change_local(step, op, offset, len),
            Action::FlushRemote(step) => {
                let txid = self.draw_txid();
                let owner = RemoteOwner::Step(step);
                let request = RemoteRequest::new(RemoteKind::Op(OpKind::Flush), 0, 0, Buf::default(), owner);
                self.submit_remote(txid, request);
            }
            Action::FlushLocal(step) => self.local_step(step, OpKind::Flush, 0, 0, Buf::default()),
            Action::Complete { op, outcome } => {
                if let Some(exchange) = &mut self.exchange {
                    exchange.changes.remove(&op.0);
                }
                self.guest_done(op.0 as usize, status_of(outcome));
            }
            Action::AskExtents { step, offset, len } => {
                let owner = RemoteOwner::Step(step);
                self.submit_copier(RemoteRequest::new(
                    RemoteKind::Extents,
                    offset,
                    len,
                    Buf::default(),
                    owner,
                ));
            }
            Action::SaveMap => self.save_map(),
            Action::ReadyToCut => self.notice(Notice::ReadyToCut),
            Action::Abandon { errno } => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(device = %self.identity.name, %error, "the local side of the exchange failed");
                if let Some(exchange) = &mut self.exchange {
                    exchange.ending = Some(Ending::Failed(errno));
                }
            }
        }
    }

    fn local_step(&mut self, step: StepId, kind: OpKind, offset: u64, len: u64, buf: Buf) {
        let Some(exchange) = &mut self.exchange else { return };
        let op = Op { id: BlockOpId(STEP_OP | step.0), kind, offset, len, buf };
        exchange.local.submit(op, &mut self.ring, self.now);
    }

    fn fetch(&mut self, step: StepId, job: u64, offset: u64, len: u64, for_guest: bool) {
        let buf = self.buffers.take(len as usize);
        if let Some(exchange) = &mut self.exchange {
            exchange.fetched.insert(job, buf.clone());
        }
        let request =
            RemoteRequest::new(RemoteKind::Op(OpKind::Read), offset, len, buf, RemoteOwner::Step(step));
        if for_guest {
            let txid = self.draw_txid();
            self.submit_remote(txid, request);
        } else {
            self.submit_copier(request);
        }
    }

    fn answer_from(&mut self, op: OpId, job: u64, at: u64) {
        let Some(request) = self.requests.get(op.0 as usize) else { return };
        let Some(buf) = self.exchange.as_ref().and_then(|exchange| exchange.fetched.get(&job)) else {
            return;
        };
        let part = buf.part((request.offset - at) as usize, request.len as usize);
        // A guest that has forgotten the read may use its memory for something else by now.
        if !request.orphan {
            request.target().copy_from_buf(0, &part);
        }
    }

    /// Both sides write the same bytes, even if the guest changes its buffer meanwhile.
    fn change_remote(&mut self, step: StepId, op: OpId) {
        let Some(request) = self.requests.get(op.0 as usize) else { return };
        // Under the request's own number: whoever takes the guest over knows it by that one.
        let (kind, offset, len, txid) = (both_alike(request.kind), request.offset, request.len, request.txid);
        let mut copy = Buf::default();
        if kind == OpKind::Write {
            copy = self.buffers.take(len as usize);
            copy.copy_from_buf(0, &request.data);
            if let Some(exchange) = &mut self.exchange {
                exchange.changes.insert(op.0, copy.clone());
            }
        }
        let request = RemoteRequest::new(RemoteKind::Op(kind), offset, len, copy, RemoteOwner::Step(step));
        self.submit_remote(txid, request);
    }

    fn change_local(&mut self, step: StepId, op: OpId, offset: u64, len: u64) {
        let Some(request) = self.requests.get(op.0 as usize) else { return };
        let (kind, at) = (request.kind, request.offset);
        let copy = self.exchange.as_ref().and_then(|exchange| exchange.changes.get(&op.0));
        let buf = copy.map_or_else(Buf::default, |copy| copy.part((offset - at) as usize, len as usize));
        let kind = both_alike(kind);
        self.local_step(step, kind, offset, len, buf);
    }

    /// A step at the local side has ended.
    pub(crate) fn step_done(&mut self, step: u64, status: Status) {
        if let Some(key) = self.late_reads.remove(&step) {
            self.guest_done(key, status);
            return;
        }
        self.pull(|pull, now, out| pull.step_done(StepId(step), outcome_of(status), false, now, out));
        self.pull(|pull, now, out| pull.tick(now, out));
        self.end_exchange_if_idle();
    }

    /// A step at the old backing has ended.
    pub(crate) fn remote_step_done(&mut self, step: StepId, done: RemoteDone) {
        if done.status == Status::Ok && done.was_extents {
            self.pull(|pull, _, out| pull.extents(step, &done.extents, out));
        } else {
            let outcome = outcome_of(done.status);
            self.pull(|pull, now, out| pull.step_done(step, outcome, done.zero, now, out));
        }
        self.pull(|pull, now, out| pull.tick(now, out));
        self.end_exchange_if_idle();
    }

    /// A request has come with the guest that the old backing's host has already.
    pub(crate) fn late_elder(&mut self, key: usize) {
        if let (Some(exchange), Some(request)) = (&mut self.exchange, self.requests.get(key)) {
            exchange.pull.elder(OpId(key as u64), guest_kind(request.kind), request.offset, request.len);
        }
    }

    /// A request has ended that went to the old backing as a whole: perhaps before the exchange began.
    pub(crate) fn elder_done_remotely(&mut self, key: usize) {
        self.pull(|pull, _, out| pull.elder_done(OpId(key as u64), out));
    }

    /// The local side has been flushed: what was here before that flush may be remembered.
    fn save_map(&mut self) {
        let Some(exchange) = &mut self.exchange else { return };
        let Some(snapshot) = exchange.pull.take_snapshot() else { return };
        let Some(boot) = exchange.boot else { return };
        if exchange.saving.is_some() {
            return;
        }
        let bytes = snapshot.encode(exchange.device, boot);
        let path = exchange.map_path.clone();
        let (done, receiver) = channel();
        exchange.saving = Some(receiver);
        let spawned = std::thread::Builder::new().name("belay-map".to_owned()).spawn(move || {
            let _ = done.send(write_durably(&path, &bytes));
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "the exchange map could not be saved");
            exchange.saving = None;
        }
    }

    pub(crate) fn set_bandwidth(&mut self, limit: Option<u64>) {
        if let Some(exchange) = &mut self.exchange {
            exchange.pull.set_bandwidth(limit);
        }
    }

    pub(crate) fn cancel_exchange(&mut self) {
        let Some(exchange) = &mut self.exchange else { return };
        if exchange.pull.cancel() {
            exchange.ending = Some(Ending::Cancelled);
            self.end_exchange_if_idle();
        }
    }

    /// Drops a copy that was given up, once nothing of it is under way.
    fn end_exchange_if_idle(&mut self) {
        let Some(exchange) = &mut self.exchange else { return };
        let Some(ending) = exchange.ending else { return };
        // A map that is still being written would come back after it was removed.
        let idle = exchange.pull.is_idle() || ending == Ending::Gone;
        if !idle || exchange.local.in_flight() > 0 || exchange.saving.is_some() {
            return;
        }
        let waiting = exchange.pull.take_waiting();
        let map_path = exchange.map_path.clone();
        self.exchange = None;
        // What was here is worth nothing without the guest's writes to come.
        let _ = std::fs::remove_file(map_path);
        for op in waiting.into_iter().filter(|_| ending != Ending::Gone) {
            self.submit_guest(op.0 as usize);
        }
        self.notice(match ending {
            Ending::Gone => return,
            Ending::Cancelled => Notice::ExchangeCancelled,
            Ending::Failed(errno) => Notice::ExchangePaused {
                reason: std::io::Error::from_raw_os_error(errno).to_string(),
                full: matches!(errno, libc::ENOSPC | libc::EDQUOT),
            },
        });
    }

    /// The old backing has committed: the local side is the device now.
    pub(crate) fn cut_committed(&mut self) {
        let Some(mut exchange) = self.exchange.take() else { return };
        self.last_exchange = Some(exchange.progress());
        exchange.pull.cut_committed();
        let waiting = exchange.pull.take_waiting();
        self.late_reads = exchange.pull.local_reads().map(|(step, op)| (step.0, op.0 as usize)).collect();
        let Exchange { local, map_path, saving, .. } = *exchange;
        self.local = Some(local);
        self.client = None;
        self.handover = Handover::Source(numbered_source(Source::serving(self.epoch)));
        self.rings_running_again();
        forget_map(map_path, saving);
        for op in waiting {
            self.submit_guest(op.0 as usize);
        }
        self.notice(Notice::ExchangeDone);
    }

    /// The source's machine must know whether rings run.
    fn rings_running_again(&mut self) {
        if self.port.running() > 0 {
            self.rings_started();
        } else if self.port.connection.is_some() {
            self.rings_all_stopped();
        }
    }

    pub(crate) fn cut_aborted(&mut self) {
        self.pull(|pull, now, out| pull.cut_aborted(now, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: BootId = BootId([1; 16]);

    #[test]
    fn map_is_believed_in_the_boot_that_it_was_written_in() {
        let folder = tempfile::tempdir().unwrap();
        let (path, device, size) = (folder.path().join("disk0.map"), DeviceId::random(), 64 << 12);
        let mut map = BlockMap::empty(size);
        map.set(3, 60);
        write_durably(&path, &map.encode(device, BOOT)).unwrap();
        assert_eq!(restore(&path, device, size, Some(BOOT)), map);
        for other in [Some(BootId([2; 16])), None] {
            assert_eq!(restore(&path, device, size, other).count(), 0, "{other:?}");
        }
    }

    #[test]
    fn map_that_is_still_being_written_does_not_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk0.map");
        let (done, saving) = channel();
        forget_map(path.clone(), Some(saving));
        std::fs::write(&path, b"late").unwrap();
        done.send(Ok(())).unwrap();
        while path.exists() {
            std::thread::yield_now();
        }
    }
}
