//! Requests of the guest: taken from the rings, parsed, and answered.

use belay_block::virtio::{Request, RequestKind};
use belay_block::{IoVec, OpKind, Status, virtio};
use belay_vhost_user::{Chain, RingError};
use belay_wire::TxId;

use super::MAX_BYTES_IN_FLIGHT;
use crate::device::{Device, Serving};
use crate::parts::parts_of;
use crate::requests::GuestRequest;
use crate::stats::{monotonic_ns, since};

impl Device {
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

    pub(super) fn bad_chain(&mut self, index: u16, head: u16, error: &RingError) {
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
    pub(super) fn begin(&mut self, index: u16, chain: Chain, txid: Option<TxId>) {
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
    pub(super) fn parse(&mut self, index: u16, chain: &Chain) -> Result<(Request, OpKind), u32> {
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
    pub(super) fn finish_parked(&mut self, key: usize) {
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
