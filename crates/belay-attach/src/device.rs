//! A device on its thread: what it owns, and the loop that serves it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use belay_block::virtio::{BlockConfig, Limits};
use belay_block::{Backend, Buf, BufferPool, Op, OpId, OpKind, Status};
use belay_reactor::{Cqe, OwnerId, Ring, Token, Waker};
use belay_wire::control::Channel;
use belay_wire::{DeviceIdentity, Epoch, FrameKind, Header, TxId};

use crate::client::{Client, RemoteDone, RemoteKind, RemoteOwner, RemoteRequest};
use crate::conn::DataConn;
use crate::exchange::Exchange;
use crate::handle::{Command, LinkTimes, Notice};
use crate::handover::{Handover, OpenClaim};
use crate::port::Port;
use crate::requests::Requests;
use crate::serve::Server;
use crate::spin::Spin;
use crate::stats::{Counters, Snapshot, since};

/// Owner of completions of the wake-up.
const WAKER: OwnerId = OwnerId(1);
/// … of the VMM listener.
pub(crate) const LISTENER: OwnerId = OwnerId(2);
/// … of the VMM's socket.
pub(crate) const VMM: OwnerId = OwnerId(3);
/// … of the rings' kicks.
pub(crate) const KICK: OwnerId = OwnerId(4);
/// … of data connections: slot is the connection's id × 2, + 1 for writability.
const CONN: OwnerId = OwnerId(5);
/// … of the backend of this host.
pub const BACKEND_OWNER: OwnerId = OwnerId(16);

/// An [`OpId`] says whose the operation is in its highest bits, and which in the others.
const GUEST_OP: u64 = 1 << 60;
/// An operation on a peer's behalf.
pub(crate) const SERVER_OP: u64 = 2 << 60;
/// A step of an exchange.
pub(crate) const STEP_OP: u64 = 3 << 60;
const OP_CLASS: u64 = 0xf << 60;

/// Entries of the thread's submission queue.
const RING_ENTRIES: u32 = 256;
/// How long a thread that ends waits for the kernel to finish its operations, and how long at a time.
const LET_GO_LIMIT: Duration = Duration::from_secs(3);
const LET_GO_STEP: Duration = Duration::from_millis(20);
/// How often the snapshot is renewed while the thread is busy.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(50);
/// How long the thread sleeps at first when it has run out of work. Then it looks at the rings again: a guest under
/// TCG may have missed an interrupt, or we its request (see `belay_vhost_user::Ring::remind`).
const SECOND_LOOK: Duration = Duration::from_millis(1);
/// How long the thread sleeps while the guest of one of its rings does not kick.
const POLL_EVERY: Duration = Duration::from_micros(100);
/// Rounds of the loop between two looks at the clock-driven work.
const HOUSEKEEPING_EVERY: u32 = 64;

/// Whom this host serves the device for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Serving {
    /// The guest behind this host's port.
    Guest,
    /// A guest that may come: nothing is served before the claim.
    Successor,
    /// Not a guest of this host: it has moved on, or is moving.
    Nobody,
}

/// A device on this host.
pub(crate) struct Device {
    pub(crate) identity: DeviceIdentity,
    pub(crate) block: BlockConfig,
    pub(crate) limits: Limits,
    pub(crate) serial: String,
    pub(crate) ring: Ring,
    pub(crate) now: Instant,
    pub(crate) epoch: Epoch,
    pub(crate) next_tx: TxId,
    /// Numbers may be drawn: the backing's host has told above which, or nobody knows of any.
    pub(crate) numbers_known: bool,
    pub(crate) port: Port,
    pub(crate) requests: Requests,
    /// Memory for data that a peer sends or wants.
    pub(crate) buffers: BufferPool,
    /// Guest requests that wait for the backend to be opened.
    waiting: VecDeque<usize>,
    /// The backing, if it is here.
    pub(crate) local: Option<Box<dyn Backend>>,
    pub(crate) server: Server,
    pub(crate) lent_to: Option<String>,
    pub(crate) client: Option<Client>,
    pub(crate) handover: Handover,
    pub(crate) open_claim: Option<OpenClaim>,
    pub(crate) exchange: Option<Box<Exchange>>,
    pub(crate) last_exchange: Option<crate::ExchangeProgress>,
    /// Reads of the guest that an exchange had begun here when it was cut over, by step.
    pub(crate) late_reads: HashMap<u64, usize>,
    pub(crate) retired: bool,
    /// It has to be told that it is retired, when nothing is in flight any more.
    retiring: bool,
    pub(crate) counters: Counters,
    /// Connections whose turn ended before their data did.
    pub(crate) more_to_read: Vec<u64>,
    /// The VMM's socket has to be looked at without a poll's word.
    pub(crate) vmm_readable_later: bool,
    next_conn_id: u64,
    /// Whether VMMs are offered CONFIGURE_MEM_SLOTS.
    pub(crate) memory_slots: bool,
    link: LinkTimes,
    spin: Spin,
    notices: Sender<Notice>,
    commands: Receiver<Command>,
    waker: Arc<Waker>,
    snapshot: Arc<Mutex<Snapshot>>,
    snapshot_at: Instant,
    /// How often this thread had touched memory of its VMM that was gone.
    faults: u64,
    stop: bool,
}

/// The ends of the channels that a thread gets.
pub(crate) struct Ends {
    pub(crate) notices: Sender<Notice>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) waker: Arc<Waker>,
    pub(crate) snapshot: Arc<Mutex<Snapshot>>,
}

impl Device {
    pub(crate) fn new(config: crate::DeviceConfig, ends: Ends) -> std::io::Result<Self> {
        let belay_wire::device::DeviceClass::Block(geometry) = &config.identity.class;
        let block = BlockConfig::of(geometry);
        let now = Instant::now();
        let numbers_known = !matches!(config.role, crate::Role::Remote { .. });
        let (handover, client, lent_to) = Handover::of_role(config.role, config.epoch);
        let mut device = Self {
            limits: Limits::of(&block),
            serial: geometry.serial.clone(),
            identity: config.identity,
            block,
            ring: Ring::new(RING_ENTRIES)?,
            now,
            epoch: config.epoch,
            next_tx: TxId::first_of(config.epoch),
            numbers_known,
            port: Port::default(),
            requests: Requests::default(),
            buffers: BufferPool::default(),
            waiting: VecDeque::new(),
            local: None,
            server: Server::default(),
            lent_to,
            client,
            handover,
            open_claim: None,
            exchange: None,
            last_exchange: None,
            late_reads: HashMap::new(),
            retired: false,
            retiring: false,
            counters: Counters::new(),
            more_to_read: Vec::new(),
            vmm_readable_later: false,
            next_conn_id: 1,
            link: config.link,
            memory_slots: config.memory_slots,
            spin: Spin::new(config.spin),
            notices: ends.notices,
            commands: ends.commands,
            waker: ends.waker,
            snapshot: ends.snapshot,
            snapshot_at: now,
            faults: 0,
            stop: false,
        };
        device.poll(std::os::fd::AsRawFd::as_raw_fd(&*device.waker.clone()), WAKER, 0);
        device.need_connection(Channel::Guest);
        Ok(device)
    }

    /// Serves the device until told to stop.
    pub(crate) fn run(&mut self) -> std::io::Result<()> {
        let mut cqes = Vec::with_capacity(256);
        let mut last_work = Instant::now();
        let mut spinning = true;
        let mut idle = false;
        let mut round = 0u32;
        while !self.stop {
            self.now = Instant::now();
            self.ring.completions(&mut cqes);
            let mut work = !cqes.is_empty();
            for cqe in cqes.drain(..) {
                self.dispatch(cqe);
            }
            work |= self.serve_rings(spinning) > 0;
            work |= self.finish_backend_ops();
            work |= self.read_leftovers();
            let faults = belay_vhost_user::faults();
            if faults != self.faults {
                self.faults = faults;
                self.lose_memory();
            }
            round = round.wrapping_add(1);
            if !spinning || round.is_multiple_of(HOUSEKEEPING_EVERY) {
                self.housekeeping();
            }
            self.flush_connections();
            self.publish();
            if work {
                if idle {
                    self.spin.learn(since(self.now, last_work));
                }
                last_work = self.now;
            }
            idle = !work;
            if work || self.may_spin() && since(self.now, last_work) < self.spin.limit() {
                if !spinning {
                    spinning = true;
                    self.disable_notifications();
                }
                self.ring.submit()?;
                if !work && self.local.as_ref().is_some_and(|local| local.needs_kernel_worker()) {
                    std::thread::yield_now();
                }
                continue;
            }
            if self.enable_notifications() || !self.more_to_read.is_empty() || self.vmm_readable_later {
                spinning = true;
                continue;
            }
            let first = std::mem::replace(&mut spinning, false);
            self.renew_snapshot(true);
            let limit = if first { SECOND_LOOK.min(self.sleep_limit()) } else { self.sleep_limit() };
            self.ring.wait(Some(limit))?;
        }
        self.let_go()
    }

    /// Ends what has not begun, and waits for what has: the file's lock is free for the next thread then.
    fn let_go(&mut self) -> std::io::Result<()> {
        let guests = self.requests.all().into_iter().map(|key| OpId(GUEST_OP | key as u64));
        let ops: Vec<OpId> = guests.chain(self.server.op_ids()).collect();
        if let Some(local) = &mut self.local {
            ops.into_iter().for_each(|op| local.cancel(op));
        }
        let deadline = Instant::now() + LET_GO_LIMIT;
        let mut cqes = Vec::new();
        loop {
            let mut busy = false;
            if let Some(local) = &mut self.local {
                busy |= settle(&mut **local, &cqes, &mut self.ring, self.now);
            }
            if let Some(exchange) = &mut self.exchange {
                busy |= settle(exchange.local_mut(), &cqes, &mut self.ring, self.now);
            }
            if !busy || Instant::now() > deadline {
                return Ok(());
            }
            cqes.clear();
            self.ring.wait(Some(LET_GO_STEP))?;
            self.ring.completions(&mut cqes);
        }
    }

    /// Whether the next work may come any moment: from the guest, or from the disk here. A peer's answer takes longer
    /// than a wake-up, and the processor may be wanted for it. (Measured with both hosts on two processors: looking
    /// for 50 µs doubled the latency of a remote read.)
    fn may_spin(&self) -> bool {
        let remote = self.client.as_ref().is_some_and(|client| client.guest.has_outstanding());
        self.port.running() > 0 && !remote
    }

    /// How long the thread may sleep.
    fn sleep_limit(&self) -> Duration {
        let mut limit = self.link.heartbeat.min(Duration::from_millis(250));
        if self.port.is_polled() {
            limit = POLL_EVERY;
        }
        let deadlines = [
            self.local.as_ref().and_then(|local| local.next_deadline()),
            self.exchange.as_ref().and_then(|exchange| exchange.next_deadline(self.now)),
        ];
        for deadline in deadlines.into_iter().flatten() {
            limit = limit.min(since(deadline, self.now));
        }
        limit
    }

    fn dispatch(&mut self, cqe: Cqe) {
        match cqe.token.owner {
            WAKER => {
                self.waker.clear();
                if !cqe.more {
                    let fd = std::os::fd::AsRawFd::as_raw_fd(&*self.waker);
                    self.poll(fd, WAKER, 0);
                }
                self.take_commands();
            }
            LISTENER => {
                if !cqe.more
                    && let Some(listener) = &self.port.listener
                {
                    let fd = std::os::fd::AsRawFd::as_raw_fd(listener);
                    self.poll(fd, LISTENER, 0);
                }
                self.accept_vmm();
            }
            VMM => {
                if cqe.res == -libc::ECANCELED {
                    return;
                }
                self.on_vmm_readable();
                if !cqe.more
                    && let Some(connection) = &self.port.connection
                {
                    let fd = connection.as_raw_fd();
                    self.poll(fd, VMM, cqe.token.slot);
                }
            }
            KICK => {
                if cqe.res != -libc::ECANCELED {
                    self.on_kick(cqe.token.slot, cqe.more);
                }
            }
            CONN => self.on_conn_ready(cqe),
            _ => {
                if let Some(local) = &mut self.local {
                    local.on_completion(cqe, &mut self.ring, self.now);
                }
                if let Some(exchange) = &mut self.exchange {
                    exchange.local_mut().on_completion(cqe, &mut self.ring, self.now);
                }
            }
        }
    }

    /// Polls a descriptor for readability, for this owner and slot.
    pub(crate) fn poll(&mut self, fd: RawFd, owner: OwnerId, slot: u64) {
        if let Err(error) = self.ring.poll_readable(fd, Token::new(owner, slot)) {
            tracing::error!(device = %self.identity.name, %error, "cannot poll a descriptor");
        }
    }

    pub(crate) fn unpoll(&mut self, owner: OwnerId, slot: u64) {
        let _ = self.ring.cancel(Token::new(owner, slot));
        // The kernel must have taken the cancellation before the descriptor is closed.
        let _ = self.ring.submit();
    }

    /// Polls a data connection, under a new id.
    pub(crate) fn watch_conn(&mut self, conn: &DataConn) -> u64 {
        let id = self.next_conn_id;
        self.next_conn_id += 1;
        self.poll(conn.as_raw_fd(), CONN, id << 1);
        id
    }

    fn on_conn_ready(&mut self, cqe: Cqe) {
        let id = cqe.token.slot >> 1;
        if cqe.more && self.conn_by_id(id).is_none() {
            // The connection was dropped, which its own shutdown has just told: let go of the socket.
            self.unpoll(CONN, cqe.token.slot);
            return;
        }
        if cqe.token.slot & 1 == 1 {
            if let Some(conn) = self.conn_by_id(id) {
                conn.blocked_on_write = false;
            }
            return;
        }
        self.read_conn(id);
        if !cqe.more
            && let Some(fd) = self.conn_by_id(id).map(|conn| conn.as_raw_fd())
        {
            self.poll(fd, CONN, id << 1);
        }
    }

    fn conn_by_id(&mut self, id: u64) -> Option<&mut DataConn> {
        if let Some(key) = self.server.by_id(id) {
            return self.server.sessions.get_mut(key).map(|session| &mut session.conn);
        }
        self.client.as_mut()?.channels().into_iter().find(|state| state.id == id)?.conn.as_mut()
    }

    fn read_conn(&mut self, id: u64) {
        if let Some(key) = self.server.by_id(id) {
            self.serve_session(key);
            return;
        }
        let channel = self.client.as_mut().and_then(|client| {
            client.channels().into_iter().find(|state| state.id == id).map(|state| state.channel)
        });
        if let Some(channel) = channel {
            self.read_channel(channel);
        }
    }

    fn read_leftovers(&mut self) -> bool {
        if std::mem::take(&mut self.vmm_readable_later) {
            self.on_vmm_readable();
        }
        let ids = std::mem::take(&mut self.more_to_read);
        for id in &ids {
            self.read_conn(*id);
        }
        !ids.is_empty()
    }

    /// Writes what is queued on every connection, and polls those that are full.
    fn flush_connections(&mut self) {
        let now = self.now;
        let mut blocked = Vec::new();
        let mut failed = Vec::new();
        let mut flush = |id: u64, conn: &mut DataConn| {
            if conn.blocked_on_write {
                return;
            }
            match conn.flush(now) {
                Ok(()) if conn.blocked_on_write => blocked.push((id, conn.as_raw_fd())),
                Ok(()) => {}
                Err(error) => failed.push((id, error.to_string())),
            }
        };
        for (_, session) in &mut self.server.sessions {
            flush(session.id, &mut session.conn);
        }
        if let Some(client) = &mut self.client {
            for state in client.channels() {
                if let Some(conn) = &mut state.conn {
                    flush(state.id, conn);
                }
            }
        }
        for (id, fd) in blocked {
            let _ = self.ring.poll_once(fd, libc::POLLOUT, Token::new(CONN, id << 1 | 1));
        }
        for (id, reason) in failed {
            self.conn_failed(id, &reason);
        }
    }

    fn conn_failed(&mut self, id: u64, reason: &str) {
        if let Some(key) = self.server.by_id(id) {
            self.drop_session(key, &crate::conn::ConnError::Io(std::io::Error::other(reason.to_owned())));
            return;
        }
        let channel = self.client.as_mut().and_then(|client| {
            client.channels().into_iter().find(|state| state.id == id).map(|state| state.channel)
        });
        if let Some(channel) = channel {
            self.lose_connection(channel, reason);
        }
    }

    /// Work that the clock asks for.
    fn housekeeping(&mut self) {
        if let Some(local) = &mut self.local
            && local.next_deadline().is_some_and(|deadline| deadline <= self.now)
        {
            local.tick(&mut self.ring, self.now);
        }
        self.exchange_tick();
        self.answer_stop_in_time();
        self.redial();
        self.heartbeats();
        self.renew_snapshot(false);
    }

    /// Pings quiet peers, and gives up those that have not been heard of for too long.
    fn heartbeats(&mut self) {
        let (now, link) = (self.now, self.link);
        let mut dead = Vec::new();
        let mut check = |id: u64, conn: &mut DataConn| {
            if since(now, conn.last_heard) > link.dead_after {
                dead.push(id);
            } else if since(now, conn.last_heard) > link.heartbeat
                && since(now, conn.last_sent) > link.heartbeat
            {
                conn.last_sent = now;
                let _ = conn.send(Header::new(FrameKind::Ping), &[]);
            }
        };
        for (_, session) in &mut self.server.sessions {
            check(session.id, &mut session.conn);
        }
        if let Some(client) = &mut self.client {
            for state in client.channels() {
                if let Some(conn) = &mut state.conn {
                    check(state.id, conn);
                }
            }
        }
        for id in dead {
            self.conn_failed(id, "nothing was heard from the peer for too long");
        }
    }

    fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.on_command(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stop = true;
                    return;
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::SetBackend(backend) => self.set_backend(backend),
            Command::Listen(listener) => self.listen(listener),
            Command::Offer { to } => self.offer(to),
            Command::Remember(list) => self.remember(list),
            Command::Withdraw => self.withdraw(),
            Command::GiveAway => self.give_away(),
            Command::Accept { socket, open, epoch } => self.accept_peer(socket, &open, epoch),
            Command::Connected { channel, socket } => self.connected(channel, socket),
            Command::GrantDurable { epoch } => self.grant_durable(epoch),
            Command::GrantFailed { epoch, reason } => self.grant_failed(epoch, &reason),
            Command::ReturnDurable { epoch } => self.return_durable(epoch),
            Command::ReturnFailed { epoch, reason } => self.return_failed(epoch, &reason),
            Command::StartExchange { local, options } => self.start_exchange(local, options),
            Command::SetBandwidth(limit) => self.set_bandwidth(limit),
            Command::CancelExchange => self.cancel_exchange(),
            Command::CutCommitted => self.cut_committed(),
            Command::CutAborted => self.cut_aborted(),
            Command::Retire => self.retire(),
            Command::Resize(size) => self.resize(size),
            Command::Shutdown => self.stop = true,
        }
    }

    fn set_backend(&mut self, backend: Box<dyn Backend>) {
        self.local = Some(backend);
        for key in std::mem::take(&mut self.waiting) {
            self.submit_guest(key);
        }
    }

    /// The backing has left this host: nothing is served any more. When what runs has ended, the file is closed.
    fn retire(&mut self) {
        self.retired = true;
        self.server.sessions.clear();
        self.server.drop_held();
        let ops: Vec<OpId> = self.server.op_ids().collect();
        if let Some(local) = &mut self.local {
            ops.into_iter().for_each(|op| local.cancel(op));
        }
        self.retiring = true;
        self.finish_retiring();
    }

    /// Closes the file of a device that has left, when nothing is in flight there: its lock is free then, and no write
    /// can come any more.
    fn finish_retiring(&mut self) {
        if self.retiring && self.local.as_ref().is_none_or(|local| local.in_flight() == 0) {
            self.retiring = false;
            self.local = None;
            self.notice(Notice::Retired);
        }
    }

    fn resize(&mut self, size: u64) {
        let result = match &mut self.local {
            _ if !size.is_multiple_of(u64::from(self.block.block_bytes)) => Err(format!(
                "the device has blocks of {} bytes: give a multiple of that",
                self.block.block_bytes
            )),
            Some(local) => local.resize(size).map_err(|error| error.to_string()),
            None => Err("the device's backing is not on this host".to_owned()),
        };
        if result.is_ok() {
            self.block.set_size(size);
            self.limits = Limits::of(&self.block);
            let config = belay_block::virtio::config_space(&self.block);
            if let Some(connection) = &mut self.port.connection
                && let Err(error) = connection.set_config(config)
            {
                tracing::warn!(device = %self.identity.name, %error, "the VMM could not be told of the new size");
            }
        }
        self.notice(Notice::Resized(result.map(|()| size)));
    }

    /// Gives a guest request to whatever executes the guest's requests now.
    pub(crate) fn submit_guest(&mut self, key: usize) {
        let Some(request) = self.requests.get(key) else { return };
        let ((kind, offset, len), mut txid) = (request.work(), request.txid);
        let buf = match kind {
            OpKind::Read => request.target().clone(),
            OpKind::Write => request.data.clone(),
            _ => Buf::default(),
        };
        let flushing = request.flushing;
        if self.exchange.is_some() {
            self.exchange_guest(key);
        } else if self.client.is_some() {
            let owner = RemoteOwner::Guest(key);
            if flushing {
                // Its own number is known there as that of a change that is done.
                txid = self.draw_txid();
            }
            self.submit_remote(txid, RemoteRequest::new(RemoteKind::Op(kind), offset, len, buf, owner));
        } else if let Some(local) = &mut self.local {
            if kind == OpKind::Read {
                self.requests.reads_here(key);
            }
            let op = Op { id: OpId(GUEST_OP | key as u64), kind, offset, len, buf };
            if let Some(op) = self.server.hold_back(txid, op) {
                local.submit(op, &mut self.ring, self.now);
            }
        } else {
            self.waiting.push_back(key);
        }
    }

    /// Cancels a request that the guest has forgotten, if it has not begun.
    pub(crate) fn cancel_guest(&mut self, key: usize) {
        if let Some(at) = self.waiting.iter().position(|waiting| *waiting == key) {
            self.waiting.remove(at);
            self.requests.remove(key);
        } else if self.server.cancel_held(OpId(GUEST_OP | key as u64)) {
            self.requests.remove(key);
        } else if let Some(local) = &mut self.local {
            local.cancel(OpId(GUEST_OP | key as u64));
        }
    }

    /// Takes what backends have finished.
    fn finish_backend_ops(&mut self) -> bool {
        let mut any = false;
        while let Some(done) = self.local.as_mut().and_then(|local| local.finished()) {
            any = true;
            self.on_op_done(done.op, done.status);
        }
        while let Some(done) = self.exchange.as_mut().and_then(|exchange| exchange.local_mut().finished()) {
            any = true;
            self.on_op_done(done.op, done.status);
        }
        self.finish_retiring();
        any
    }

    fn on_op_done(&mut self, op: Op, status: Status) {
        let which = op.id.0 & !OP_CLASS;
        match op.id.0 & OP_CLASS {
            GUEST_OP => self.guest_done(which as usize, status),
            SERVER_OP => self.server_op_done(which as usize, &op, status),
            STEP_OP => self.step_done(which, status),
            _ => {
                tracing::error!(device = %self.identity.name, op = op.id.0, "an operation that nobody knows")
            }
        }
    }

    /// A request that was executed at the backing's host has ended.
    pub(crate) fn remote_done(&mut self, done: RemoteDone) {
        match done.owner {
            RemoteOwner::Guest(key) => {
                self.elder_done_remotely(key);
                self.guest_done(key, done.status);
            }
            RemoteOwner::Step(step) => self.remote_step_done(step, done),
        }
    }

    /// A number for a new request.
    pub(crate) fn draw_txid(&mut self) -> TxId {
        let txid = self.next_tx;
        self.next_tx = txid.next();
        txid
    }

    /// A number that was drawn before this process: later ones must be above it.
    pub(crate) fn seen_txid(&mut self, txid: TxId) {
        self.next_tx = self.next_tx.max(txid.next());
    }

    pub(crate) fn notice(&self, notice: Notice) {
        let _ = self.notices.send(notice);
    }

    fn renew_snapshot(&mut self, force: bool) {
        if !force && since(self.now, self.snapshot_at) < SNAPSHOT_EVERY {
            return;
        }
        if force && since(self.now, self.snapshot_at) < SNAPSHOT_EVERY / 10 {
            return;
        }
        self.snapshot_at = self.now;
        let snapshot = self.describe();
        *self.snapshot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = snapshot;
    }

    fn describe(&mut self) -> Snapshot {
        let mut link_in = self.counters.link_in_bytes;
        let mut link_out = self.counters.link_out_bytes;
        for (_, session) in &self.server.sessions {
            link_in += session.conn.bytes_in;
            link_out += session.conn.bytes_out;
        }
        let mut link_up = false;
        if let Some(client) = &mut self.client {
            link_up = client.guest.is_up();
            for state in client.channels() {
                link_in += state.conn.as_ref().map_or(0, |conn| conn.bytes_in);
                link_out += state.conn.as_ref().map_or(0, |conn| conn.bytes_out);
            }
        }
        Snapshot {
            state: self.state_name(),
            epoch: self.epoch.0,
            vmm_connected: self.port.connection.is_some(),
            vmm_silent: self.port.connection.as_ref().is_some_and(|connection| !connection.has_begun()),
            rings_running: self.port.running(),
            in_flight: self.requests.live() as u64,
            requests: self.counters.requests,
            errors: self.counters.errors,
            bad_requests: self.counters.bad_requests,
            read_bytes: self.counters.read_bytes,
            written_bytes: self.counters.written_bytes,
            latency: self.counters.latency(),
            latency_histogram: self.counters.buckets,
            last_completion_ns: self.counters.last_completion_ns,
            first_completion_ns: self.counters.first_completion_ns,
            rings_stopped_ns: self.counters.rings_stopped_ns,
            link_up,
            successor_ready: self.server.guest_session().is_some() && self.lent_to.is_none(),
            link_in_bytes: link_in,
            link_out_bytes: link_out,
            served: self.counters.served,
            fenced: self.counters.fenced,
            exchange: self.exchange.as_ref().map(|exchange| exchange.progress()),
            last_exchange: self.last_exchange,
        }
    }
}

/// Takes a backend's completions for nobody. Whether there are more to come.
fn settle(backend: &mut dyn Backend, cqes: &[Cqe], ring: &mut Ring, now: Instant) -> bool {
    for cqe in cqes {
        backend.on_completion(*cqe, ring, now);
    }
    while backend.finished().is_some() {}
    backend.in_flight() > 0
}
