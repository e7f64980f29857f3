//! The device's port: the VMM's socket, and its rings as this device serves them.
//!
//! A stop of a ring may be a pause, a migration or a reset: nobody can know yet. Its requests are parked, and the
//! next start decides (vmm-facts, "At GET_VRING_BASE, pause, migration and reset look the same").

use std::collections::HashSet;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::Instant;

use belay_block::virtio::{self, Request, RequestKind};
use belay_block::{IoVec, OpKind, Status};
use belay_vhost_user::{Chain, Connection, Event, Marked, Offer, Ring, RingError};
use belay_wire::{ListedRequest, TxId};

use crate::device::{Device, KICK, LISTENER, Serving, VMM};
use crate::handle::Notice;
use crate::parts::parts_of;
use crate::requests::GuestRequest;
use crate::serve::MAX_REQUEST_BYTES;
use crate::stats::{monotonic_ns, since};

/// Bytes of data of a guest's requests in flight above which no more are taken, until some have ended: each may need
/// as much memory of ours.
const MAX_BYTES_IN_FLIGHT: u64 = 256 << 20;

/// A ring as this device sees it; the ring itself lives in the connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queue {
    /// It is served: started by the VMM, and let go by the handover.
    pub(crate) running: bool,
    /// The VMM has started it, but it may not run yet.
    pub(crate) waiting: Option<Waiting>,
    /// What GET_VRING_BASE answered at its last stop on this connection.
    stopped_at: Option<u16>,
    /// Its kick descriptor is polled, under this generation.
    kick_generation: u32,
    kick_fd: Option<i32>,
    /// The guest does not kick: it is looked at again and again.
    polled: bool,
    /// The guest may have added requests.
    pub(crate) kicked: bool,
    /// Completions wait to be published.
    pub(crate) dirty: bool,
    /// The guest broke it: not served until it starts again.
    broken: bool,
    /// It has run since its in-flight region was given to the VMM: what is marked there is this process's own.
    ran: bool,
    /// It was stopped before it ran, and an earlier process had these heads of it in flight: no request here stands for
    /// them.
    unknown: Vec<u16>,
    /// Heads that the guest waits for in vain: what it put there cannot be answered, or is not what it asked for.
    lost: Vec<(u16, TxId)>,
}

impl Queue {
    /// What GET_VRING_BASE answered at its last stop on this connection.
    pub(crate) fn stopped_at(&self) -> Option<u16> {
        self.stopped_at
    }
}

/// How the VMM started a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// What SET_VRING_BASE said.
    pub(crate) base: u16,
    /// The used index found in guest memory.
    pub(crate) used: u16,
}

/// A ring that the VMM has started and that may not run yet.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) start: Start,
    /// Where it was stopped before, on this connection.
    resumed: Option<u16>,
    /// What the in-flight region says is in flight.
    marked: Vec<Marked>,
}

/// The port's state.
#[derive(Default)]
pub(crate) struct Port {
    pub(crate) listener: Option<UnixListener>,
    pub(crate) connection: Option<Connection>,
    /// A VMM that connected while requests of its predecessor still ran.
    next_connection: Option<std::os::unix::net::UnixStream>,
    pub(crate) queues: Vec<Queue>,
    /// The VMM waits until requests in flight have ended.
    quiescing: bool,
    /// The VMM waits for the answer to a stop since then.
    pub(crate) stop_held: Option<Instant>,
    /// Rings of this connection have been started at least once.
    generation: u32,
}

impl Port {
    pub(crate) fn ring(&mut self, queue: u16) -> Option<&mut Ring> {
        self.connection.as_mut()?.ring(queue)
    }

    pub(crate) fn running(&self) -> u32 {
        self.queues.iter().filter(|queue| queue.running).count() as u32
    }

    /// Whether there is a ring whose guest does not kick.
    pub(crate) fn is_polled(&self) -> bool {
        self.queues.iter().any(|queue| queue.polled && queue.running && !queue.broken)
    }

    /// Heads that no request stands for, as the list has them. A ring with unknown ones was wound back to its used index:
    /// it fits no list that has them, and nobody takes the device by it.
    pub(crate) fn lost(&self) -> impl Iterator<Item = ListedRequest> + '_ {
        self.queues.iter().enumerate().flat_map(|(index, queue)| {
            let unknown = queue.unknown.iter().map(|head| (*head, TxId(0)));
            let heads = queue.lost.iter().copied().chain(unknown);
            heads.map(move |(head, txid)| crate::requests::listed_as_lost(index as u16, head, txid))
        })
    }

    /// Whether the guest relies on every change that was completed: it did not take the flush that it was offered.
    fn writes_through(&self) -> bool {
        self.connection.as_ref().is_some_and(|vmm| vmm.features() & virtio::FEATURE_FLUSH == 0)
    }

    fn started(&self) -> bool {
        self.queues.iter().any(|queue| queue.running || queue.waiting.is_some())
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index))
    }
}

impl Device {
    pub(crate) fn listen(&mut self, listener: UnixListener) {
        if let Err(error) = listener.set_nonblocking(true) {
            tracing::error!(device = %self.identity.name, %error, "cannot listen for VMMs");
            return;
        }
        self.poll(listener.as_raw_fd(), LISTENER, 0);
        self.port.listener = Some(listener);
        self.accept_vmm();
    }

    pub(crate) fn accept_vmm(&mut self) {
        loop {
            let Some(listener) = &self.port.listener else { return };
            match listener.accept() {
                Ok((socket, _)) if self.port.connection.is_some() => {
                    // One VMM at a time. A VMM that reconnects closed its old socket first, so look for that.
                    self.on_vmm_readable();
                    if self.port.connection.is_some() {
                        tracing::warn!(device = %self.identity.name, "a second VMM was turned away");
                        drop(socket);
                    } else {
                        self.port.next_connection = Some(socket);
                    }
                }
                Ok((socket, _)) => self.port.next_connection = Some(socket),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!(device = %self.identity.name, %error, "accepting a VMM failed");
                    break;
                }
            }
            self.take_next_vmm();
        }
    }

    /// Connects the VMM that waits, unless requests of its predecessor still run.
    fn take_next_vmm(&mut self) {
        if self.port.connection.is_some() || self.port.next_connection.is_none() {
            return;
        }
        if self.serving() == Serving::Guest {
            // Requests of a VMM that is gone: those that are marked in flight come again with the new one.
            self.drop_guest_requests(None);
        }
        if self.requests.orphans() > 0 {
            return;
        }
        let Some(socket) = self.port.next_connection.take() else { return };
        let offer = Offer {
            device_features: belay_block::virtio::features(&self.block),
            queues: self.block.queues,
            queue_entries: self.block.queue_entries,
            config: belay_block::virtio::config_space(&self.block),
            memory_slots: self.memory_slots,
        };
        match Connection::new(socket, offer) {
            Ok(connection) => {
                self.poll(connection.as_raw_fd(), VMM, u64::from(self.port.generation));
                self.port.connection = Some(connection);
                self.port.queues = vec![Queue::default(); usize::from(self.block.queues)];
                self.notice(Notice::Vmm { connected: true, reason: None });
                self.on_vmm_readable();
            }
            Err(error) => tracing::warn!(device = %self.identity.name, %error, "accepting a VMM failed"),
        }
    }

    /// Handles the messages that the VMM has sent.
    pub(crate) fn on_vmm_readable(&mut self) {
        loop {
            if self.port.quiescing {
                return;
            }
            let hold = self.holds_stops();
            let Some(connection) = &mut self.port.connection else { return };
            connection.hold_stops(hold);
            match connection.next_event() {
                Ok(Some(event)) => self.on_vmm_event(event),
                Ok(None) => return,
                Err(error) => {
                    self.vmm_gone(&error.to_string());
                    return;
                }
            }
        }
    }

    /// Memory of the VMM's was gone when it was touched: nothing that is found there can be relied on.
    pub(crate) fn lose_memory(&mut self) {
        if self.port.connection.is_some() {
            self.vmm_gone("a file of its guest's memory was cut short");
        }
    }

    fn vmm_gone(&mut self, reason: &str) {
        tracing::info!(device = %self.identity.name, reason, "the VMM's connection ended");
        let had_rings = self.port.started();
        if let Some(connection) = self.port.connection.take() {
            self.unpoll(VMM, u64::from(self.port.generation));
            drop(connection);
        }
        for index in 0..self.port.queues.len() as u16 {
            self.forget_kick(index);
            self.ring_left(index);
        }
        self.port.queues.clear();
        self.port.quiescing = false;
        self.port.stop_held = None;
        self.port.generation = self.port.generation.wrapping_add(1);
        if had_rings {
            self.rings_all_stopped();
        }
        // A VMM that stopped its rings first may have handed its guest to another host: what is in flight may still
        // be claimed there.
        if self.serving() != Serving::Nobody && (had_rings || self.offered_to().is_none()) {
            self.drop_guest_requests(None);
        }
        self.notice(Notice::Vmm { connected: false, reason: Some(reason.to_owned()) });
        self.accept_vmm();
    }

    fn on_vmm_event(&mut self, event: Event) {
        match event {
            Event::RingStarted { queue, base, used, marked, .. } => {
                self.on_ring_started(queue, Start { base, used }, &marked)
            }
            Event::RingStopped { queue, base } => self.on_ring_stopped(queue, base),
            Event::RingDisabled { .. } => {}
            Event::RingEnabled { queue } => {
                if let Some(queue) = self.port.queue(queue) {
                    queue.kicked = true;
                }
            }
            Event::KickChanged { queue } => {
                self.forget_kick(queue);
                self.poll_kick(queue);
            }
            Event::Quiesce { reset } => {
                tracing::debug!(device = %self.identity.name, reset, "the VMM wants no request in flight");
                self.port.quiescing = true;
                for queue in &mut self.port.queues {
                    queue.stopped_at = None;
                    queue.ran = false;
                    queue.unknown.clear();
                    queue.lost.clear();
                }
                if self.owns_guest() {
                    self.drop_guest_requests(None);
                    if reset && !self.port.started() {
                        // What was listed at the stop is in flight no more.
                        self.rings_all_stopped();
                    }
                }
                self.quiet();
            }
        }
    }

    /// The guest forgets its requests (of one queue, or all): what has not begun is cancelled, the rest runs to its
    /// end, and is then dropped.
    fn drop_guest_requests(&mut self, queue: Option<u16>) {
        for key in self.requests.orphan(queue) {
            self.cancel_guest(key);
        }
    }

    /// Answers a VMM that waited for requests to end, and connects one that waited for its predecessor's.
    pub(crate) fn quiet(&mut self) {
        if self.requests.orphans() > 0 {
            return;
        }
        if self.port.quiescing {
            self.port.quiescing = false;
            if let Some(connection) = &mut self.port.connection
                && let Err(error) = connection.quiesced()
            {
                self.vmm_gone(&error.to_string());
                return;
            }
            self.vmm_readable_later = true;
        }
        self.take_next_vmm();
    }

    fn on_ring_stopped(&mut self, index: u16, base: u16) {
        let Some(queue) = self.port.queue(index) else { return };
        queue.running = false;
        if let Some(waiting) = queue.waiting.take().filter(|_| !queue.ran) {
            queue.unknown = waiting.marked.iter().map(|mark| mark.head).collect();
        }
        queue.dirty = false;
        queue.stopped_at = Some(base);
        self.forget_kick(index);
        self.counters.rings_stopped_ns = monotonic_ns();
        self.park_reads(index);
        self.ring_left(index);
        if !self.port.started() {
            self.rings_all_stopped();
        }
    }

    /// The number under which an earlier process of this host knew a request. The VMM could have written anything.
    fn number_of(&self, tag: u64) -> Option<TxId> {
        let txid = TxId(tag);
        (tag != 0 && txid.epoch() <= self.epoch.next()).then_some(txid)
    }

    /// Numbers of an earlier process, in all queues: the first ring to start must draw none that a later one brings.
    fn see_marked_numbers(&mut self) {
        let tags = self.port.connection.as_ref().map(Connection::tags).unwrap_or_default();
        for tag in tags {
            if let Some(txid) = self.number_of(tag) {
                self.seen_txid(txid);
            }
        }
    }

    fn on_ring_started(&mut self, index: u16, start: Start, marked: &[Marked]) {
        if !self.port.started() {
            self.see_marked_numbers();
        }
        let Some(queue) = self.port.queue(index) else { return };
        let resumed = queue.stopped_at.take();
        queue.broken = false;
        queue.waiting = Some(Waiting { start, resumed, marked: marked.to_vec() });
        if !self.numbers_known {
            return;
        }
        if !self.handover_decides_start(index, start) {
            self.start_waiting(index);
        }
    }

    /// Starts a ring that waits.
    pub(crate) fn start_waiting(&mut self, index: u16) {
        if let Some(Waiting { start, resumed, marked }) =
            self.port.queue(index).and_then(|queue| queue.waiting.take())
        {
            self.start_ring(index, start, resumed, &marked);
        }
    }

    /// Rings that the VMM started while they might not run.
    pub(crate) fn start_waiting_rings(&mut self) {
        for index in 0..self.port.queues.len() as u16 {
            let start = self.port.queues[usize::from(index)].waiting.as_ref().map(|waiting| waiting.start);
            if let Some(start) = start
                && !self.handover_decides_start(index, start)
            {
                self.start_waiting(index);
            }
        }
    }

    /// No ring is served any more: the device has left.
    pub(crate) fn stop_serving(&mut self) {
        for index in 0..self.port.queues.len() as u16 {
            self.port.queues[usize::from(index)].running = false;
            self.forget_kick(index);
        }
    }

    /// Starts a ring of a guest that is here.
    ///
    /// - It goes on if it ran, and the VMM stopped it on this connection, asked for no reset and no new in-flight region
    ///   since, and starts it where it was stopped, with as many requests outstanding as are parked.
    /// - Else what is parked belongs to an earlier life of the ring, and is dropped. So are marks of this process's own
    ///   in the in-flight region.
    /// - Marks in a region that this process has not used yet are requests of an earlier process, and go on.
    fn start_ring(&mut self, index: u16, start: Start, resumed: Option<u16>, marked: &[Marked]) {
        let parked = self.requests.of_queue(index);
        let outstanding = usize::from(start.base.wrapping_sub(start.used));
        let heads = self.requests.heads(index);
        let Some(queue) = self.port.queue(index) else { return };
        if queue.ran && resumed == Some(start.base) && outstanding == heads + queue.lost.len() {
            self.run_ring(index, start.base);
            for key in parked {
                self.finish_parked(key);
            }
            return;
        }
        let ran = std::mem::replace(&mut queue.ran, false);
        let lost = std::mem::take(&mut queue.lost).len();
        if !parked.is_empty() || lost > 0 {
            tracing::info!(device = %self.identity.name, queue = index, base = start.base, used = start.used, stopped_at = resumed, dropped = parked.len() + lost, "the ring was reset: requests of before are dropped");
            self.drop_guest_requests(Some(index));
        }
        if ran && let Some(ring) = self.port.ring(index) {
            marked.iter().for_each(|mark| ring.unmark(mark.head));
        }
        if ran || marked.is_empty() {
            self.run_ring(index, start.base);
            return;
        }
        tracing::info!(device = %self.identity.name, queue = index, requests = marked.len(), "requests of an earlier process go on");
        self.run_ring(index, start.used.wrapping_add(marked.len() as u16));
        let numbers = self.numbers_of(marked);
        // All of them first: one that has none draws a new one.
        numbers.iter().flatten().for_each(|txid| self.seen_txid(*txid));
        for (mark, txid) in marked.iter().zip(numbers) {
            self.resubmit(index, mark.head, txid);
        }
    }

    /// The numbers of requests that the in-flight region has. Where the VMM has written one twice, or one that
    /// something else has, the request gets a new one.
    fn numbers_of(&self, marked: &[Marked]) -> Vec<Option<TxId>> {
        let mut taken: HashSet<TxId> = self.requests.everything().map(|(_, request)| request.txid).collect();
        let number = |mark: &Marked| self.number_of(mark.tag).filter(|txid| taken.insert(*txid));
        marked.iter().map(number).collect()
    }

    /// Submits the request at a head that an earlier process had popped.
    fn resubmit(&mut self, index: u16, head: u16, txid: Option<TxId>) {
        let Some(ring) = self.port.ring(index) else { return };
        match ring.chain_at(head) {
            Ok(chain) => self.begin(index, chain, txid),
            Err(error) => self.bad_chain(index, head, &error),
        }
    }

    /// A head of a ring that runs will not be answered. It counts as in flight like any other.
    pub(crate) fn lose(&mut self, index: u16, head: u16, txid: TxId) {
        if let Some(ring) = self.port.ring(index) {
            ring.mark(head, txid.0);
        }
        for key in self.requests.of_head(index, head) {
            self.requests.orphan_one(key);
        }
        if let Some(queue) = self.port.queue(index)
            && queue.lost.iter().all(|(lost, _)| *lost != head)
        {
            queue.lost.push((head, txid));
        }
    }

    /// Takes a request over that the source has in flight: its completion will come under its number.
    pub(crate) fn adopt(&mut self, index: u16, listed: &ListedRequest) -> Result<usize, String> {
        let ring = self.port.ring(index).ok_or("the ring is gone")?;
        let chain = ring.chain_at(listed.head.0).map_err(|error| error.to_string())?;
        let (mut whole, kind) =
            self.parse(index, &chain).map_err(|_| "a listed request is not one".to_owned())?;
        let parts = parts_of(kind, whole.len);
        let skip = listed.offset.saturating_sub(whole.offset) / MAX_REQUEST_BYTES;
        let part = u16::try_from(skip).unwrap_or(u16::MAX).min(parts - 1);
        let request =
            GuestRequest::part(&mut whole, kind, (part, parts), listed.txid, (index, chain), self.now);
        if crate::requests::wire_kind(request.kind) != listed.kind
            || request.offset != listed.offset
            || request.len != listed.len
        {
            return Err(format!(
                "request {} of queue {index} is a {:?} of {} bytes at {} here, and a {:?} of {} bytes at {} in the list",
                listed.txid,
                request.kind,
                request.len,
                request.offset,
                listed.kind,
                listed.len,
                listed.offset
            ));
        }
        let (head, tag) = (request.head, request.tag());
        let key = self.requests.insert(request);
        if let Some(ring) = self.port.ring(index) {
            ring.mark(head, tag);
        }
        Ok(key)
    }

    /// Lets a started ring run from this available index on.
    pub(crate) fn run_ring(&mut self, index: u16, next_avail: u16) {
        let Some(ring) = self.port.ring(index) else { return };
        ring.start_at(next_avail);
        ring.disable_notifications();
        ring.signal();
        if let Some(queue) = self.port.queue(index) {
            queue.waiting = None;
            queue.running = true;
            queue.ran = true;
            queue.unknown.clear();
            queue.kicked = true;
        }
        self.counters.first_completion_ns = 0;
        self.poll_kick(index);
        self.rings_started();
    }

    fn poll_kick(&mut self, index: u16) {
        let Some(ring) = self.port.ring(index) else { return };
        let (fd, polled) = (ring.kick_fd(), ring.is_polled());
        let Some(queue) = self.port.queue(index) else { return };
        queue.polled = polled;
        let Some(fd) = fd else { return };
        if queue.kick_fd == Some(fd) {
            return;
        }
        queue.kick_generation = queue.kick_generation.wrapping_add(1) & 0xff_ffff;
        queue.kick_fd = Some(fd);
        let slot = u64::from(queue.kick_generation) << 16 | u64::from(index);
        self.poll(fd, KICK, slot);
    }

    fn forget_kick(&mut self, index: u16) {
        let Some(queue) = self.port.queue(index) else { return };
        if queue.kick_fd.take().is_some() {
            let slot = u64::from(queue.kick_generation) << 16 | u64::from(index);
            self.unpoll(KICK, slot);
        }
    }

    /// The guest's kick, or an earlier poll's end.
    pub(crate) fn on_kick(&mut self, slot: u64, more: bool) {
        let index = (slot & 0xffff) as u16;
        let generation = (slot >> 16) as u32;
        let Some(queue) = self.port.queue(index) else { return };
        if queue.kick_generation != generation || queue.kick_fd.is_none() {
            return;
        }
        queue.kicked = true;
        if !more {
            queue.kick_fd = None;
            self.poll_kick(index);
        }
        if let Some(ring) = self.port.ring(index) {
            ring.clear_kick();
        }
    }

    /// Serves all rings that may hold requests. Returns how many requests were begun.
    pub(crate) fn serve_rings(&mut self, all: bool) -> usize {
        let mut begun = 0;
        for index in 0..self.port.queues.len() as u16 {
            let queue = &mut self.port.queues[usize::from(index)];
            if queue.running && !queue.broken && (queue.kicked || queue.polled || all) {
                queue.kicked = false;
                begun += self.serve_ring(index);
            }
        }
        begun
    }

    fn serve_ring(&mut self, index: u16) -> usize {
        let mut begun = 0;
        loop {
            let full = self.requests.bytes() >= MAX_BYTES_IN_FLIGHT;
            let Some(ring) = self.port.ring(index) else { return begun };
            if !ring.is_enabled() {
                return begun;
            }
            if full {
                if let Some(queue) = self.port.queue(index) {
                    queue.kicked = true;
                }
                return begun;
            }
            match ring.pop() {
                Ok(Some(chain)) => {
                    begun += 1;
                    self.begin(index, chain, None);
                }
                Ok(None) => return begun,
                Err(error @ RingError::BadChain { head, .. }) => {
                    begun += 1;
                    self.bad_chain(index, head, &error);
                }
                Err(RingError::Broken(fault)) => {
                    tracing::warn!(device = %self.identity.name, queue = index, %fault, "the guest broke its ring: it is not served until it starts again");
                    self.counters.bad_requests += 1;
                    if let Some(queue) = self.port.queue(index) {
                        queue.broken = true;
                    }
                    return begun;
                }
            }
        }
    }

    /// Before the thread sleeps: asks for kicks on every ring, and interrupts a guest that waits. `true`: requests
    /// came meanwhile.
    pub(crate) fn enable_notifications(&mut self) -> bool {
        let mut more = false;
        let full = self.requests.bytes() >= MAX_BYTES_IN_FLIGHT;
        for index in 0..self.port.queues.len() as u16 {
            if self.port.queues[usize::from(index)].running
                && !self.port.queues[usize::from(index)].broken
                && let Some(ring) = self.port.ring(index)
                && ring.is_enabled()
            {
                ring.remind();
                if ring.enable_notifications() && !full {
                    self.port.queues[usize::from(index)].kicked = true;
                    more = true;
                }
            }
        }
        more
    }

    pub(crate) fn disable_notifications(&mut self) {
        for index in 0..self.port.queues.len() as u16 {
            if self.port.queues[usize::from(index)].running
                && let Some(ring) = self.port.ring(index)
            {
                ring.disable_notifications();
            }
        }
    }

    fn bad_chain(&mut self, index: u16, head: u16, error: &RingError) {
        tracing::debug!(device = %self.identity.name, queue = index, head, %error, "a bad request of the guest");
        self.counters.bad_requests += 1;
        self.reject(index, head);
    }

    /// Answers a request that cannot be read, wherever its status is. Where there is none the ring is broken.
    fn reject(&mut self, index: u16, head: u16) {
        let Some(ring) = self.port.ring(index) else { return };
        let rejected = ring.reject(head, virtio::STATUS_IO_ERROR);
        let in_flight = ring.is_in_flight(head);
        let txid = if in_flight { self.draw_txid() } else { TxId(0) };
        let Some(queue) = self.port.queue(index) else { return };
        match rejected {
            Ok(()) => queue.dirty = true,
            Err(error) => {
                queue.broken = true;
                tracing::warn!(device = %self.identity.name, queue = index, head, %error, "the guest broke its ring: it is not served until it starts again");
                if in_flight {
                    self.lose(index, head, txid);
                }
            }
        }
    }

    fn give_back(&mut self, index: u16, head: u16, written: u32) {
        if let Some(ring) = self.port.ring(index) {
            ring.complete(head, written);
        }
        if let Some(queue) = self.port.queue(index) {
            queue.dirty = true;
        }
    }

    /// Begins a request that was popped, or found again (`txid`: under the number that was marked for it).
    fn begin(&mut self, index: u16, chain: Chain, txid: Option<TxId>) {
        let head = chain.head;
        let (mut request, kind) = match self.parse(index, &chain) {
            Ok(request) => request,
            Err(0) => return self.reject(index, head),
            Err(written) => return self.give_back(index, head, written),
        };
        let parts = parts_of(kind, request.len);
        let first = self.numbers_of_parts(parts, txid);
        let mut part = |part: u16, chain: Chain, born| {
            let txid = TxId(first.0 + u64::from(part));
            GuestRequest::part(&mut request, kind, (part, parts), txid, (index, chain), born)
        };
        let whole = part(0, chain, self.now);
        if let Some(ring) = self.port.ring(index) {
            ring.mark(head, whole.tag());
        }
        let more: Vec<GuestRequest> = (1..parts).map(|i| part(i, whole.chain.clone(), self.now)).collect();
        // All are in the table before the first can end.
        let key = self.requests.insert(whole);
        let keys: Vec<usize> = more.into_iter().map(|part| self.requests.insert(part)).collect();
        self.submit_guest(key);
        keys.into_iter().for_each(|key| self.submit_guest(key));
    }

    /// Reads a request out of its chain. `Err`: it has been answered already, with so many bytes written; 0: it has no
    /// place for an answer.
    fn parse(&mut self, index: u16, chain: &Chain) -> Result<(Request, OpKind), u32> {
        let readable: smallvec::SmallVec<[IoVec; 4]> =
            chain.readable.iter().map(|p| IoVec { base: p.base, len: p.len }).collect();
        let writable: smallvec::SmallVec<[IoVec; 4]> =
            chain.writable.iter().map(|p| IoVec { base: p.base, len: p.len }).collect();
        let keep: std::sync::Arc<dyn std::any::Any + Send + Sync> = chain.memory.clone();
        let parsed = virtio::parse(&readable, &writable, &keep, &self.limits);
        let request = match parsed {
            Ok(request) => request,
            Err(bad) => {
                self.counters.bad_requests += 1;
                return Err(self.answer(index, chain, bad.written()));
            }
        };
        match request.kind {
            RequestKind::Op(kind) => Ok((request, kind)),
            RequestKind::GetId => {
                let written = request.answer_id(&self.serial);
                Err(self.answer(index, chain, written))
            }
        }
    }

    fn answer(&mut self, index: u16, chain: &Chain, written: u32) -> u32 {
        if let Some(ring) = self.port.ring(index) {
            ring.log_written(chain, written);
        }
        written
    }

    /// A request of the guest has ended: completes it if its ring runs, remembers it if it is parked, tells the
    /// successor if it has moved.
    pub(crate) fn guest_done(&mut self, key: usize, status: Status) {
        let Some(request) = self.requests.get_mut(key) else { return };
        let txid = request.txid;
        if request.orphan {
            self.requests.remove(key);
            self.departed_done(key, txid, status);
            self.elder_ended(txid);
            self.quiet();
            return;
        }
        let index = request.queue;
        let changed = status == Status::Ok && request.kind.changes_content() && !request.flushing;
        if changed && self.serving() == Serving::Guest && self.port.writes_through() {
            self.elder_ended(txid);
            if let Some(request) = self.requests.get_mut(key) {
                request.flushing = true;
            }
            self.submit_guest(key);
            return;
        }
        let Some(request) = self.requests.get_mut(key) else { return };
        request.done = Some(status);
        request.reading = false;
        self.answer_stop();
        if self.serving() == Serving::Nobody {
            self.report_adopted(key);
        } else {
            self.elder_ended(txid);
            if self.port.queue(index).is_some_and(|queue| queue.running) {
                self.finish_parked(key);
            }
        }
    }

    /// Completes a request to the guest, if it has ended.
    fn finish_parked(&mut self, key: usize) {
        let Some((request, status)) = self.take_ended(key) else { return };
        let written = request.status_at.complete(status, request.kind, request.len);
        let ok = status == Status::Ok;
        self.counters.completed(since(self.now, request.born), ok);
        match request.kind {
            OpKind::Read if ok => self.counters.read_bytes += request.len,
            OpKind::Write if ok => self.counters.written_bytes += request.len,
            _ => {}
        }
        if let Some(ring) = self.port.ring(request.queue) {
            ring.log_written(&request.chain, written);
        }
        self.give_back(request.queue, request.head, written);
    }

    /// Publishes completions and interrupts the guest.
    pub(crate) fn publish(&mut self) {
        let mut published = false;
        for index in 0..self.port.queues.len() as u16 {
            if std::mem::take(&mut self.port.queues[usize::from(index)].dirty)
                && let Some(ring) = self.port.ring(index)
            {
                ring.publish();
                published = true;
            }
        }
        if published {
            let now = monotonic_ns();
            self.counters.last_completion_ns = now;
            if self.counters.first_completion_ns == 0 {
                self.counters.first_completion_ns = now;
            }
        }
    }
}
