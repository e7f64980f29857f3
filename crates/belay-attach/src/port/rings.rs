//! Rings that the VMM starts and stops, and what is in flight in them then.

use std::collections::HashSet;

use belay_vhost_user::{Connection, Marked};
use belay_wire::{ListedRequest, TxId};

use super::{Start, Waiting};
use crate::device::{Device, KICK};
use crate::parts::parts_of;
use crate::requests::GuestRequest;
use crate::serve::MAX_REQUEST_BYTES;
use crate::stats::monotonic_ns;

impl Device {
    pub(super) fn on_ring_stopped(&mut self, index: u16, base: u16) {
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

    pub(super) fn on_ring_started(&mut self, index: u16, start: Start, marked: &[Marked]) {
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

    pub(super) fn poll_kick(&mut self, index: u16) {
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

    pub(super) fn forget_kick(&mut self, index: u16) {
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
}
