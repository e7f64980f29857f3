//! A device on its thread: what it owns, and the loop that serves it.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use belay_block::virtio::{BlockConfig, Limits};
use belay_block::{Backend, BufferPool};
use belay_reactor::{Cqe, OwnerId, Ring, Waker};
use belay_wire::control::Channel;
use belay_wire::{DeviceIdentity, Epoch, TxId};

use crate::client::Client;
use crate::exchange::Exchange;
use crate::handle::{Command, LinkTimes, Notice};
use crate::handover::{Handover, OpenClaim};
use crate::port::Port;
use crate::requests::Requests;
use crate::serve::Server;
use crate::spin::Spin;
use crate::stats::{Counters, Snapshot, since};

mod backing;
mod connections;
mod requests;
mod view;

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
            Command::SetSize(size) => self.set_size(size),
            Command::Shutdown => self.stop = true,
        }
    }
}
