//! The guest's requests in flight.
//!
//! ```text
//!            ring stops                 grant durable
//!  Running ─────────────▶ (parked) ─────────────────▶ Adopted: its completion goes to the successor
//!     │   ◀───────────── ring starts again
//!     │ backend done
//!     ├── ring runs ──▶ completed to the guest, gone
//!     ├── ring parked ─▶ Done(status): completed when the ring starts again, or reported to the successor
//!     └── orphaned (reset, VMM gone) ──▶ dropped
//! ```

use std::time::Instant;

use belay_block::{Buf, OpKind, Status};
use belay_vhost_user::Chain;
use belay_wire::{HeadIndex, ListedRequest, QueueIndex, RequestKind, RequestState, TxId};
use slab::Slab;

/// A guest request in flight.
pub(crate) struct GuestRequest {
    pub(crate) queue: u16,
    pub(crate) head: u16,
    pub(crate) txid: TxId,
    pub(crate) kind: OpKind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// The guest's memory for the data.
    pub(crate) data: Buf,
    /// Memory of ours in which data to be read lands since its ring was stopped; see `parked.rs`.
    pub(crate) landing: Option<Buf>,
    /// A backend here reads into the guest's memory.
    pub(crate) reading: bool,
    /// Where the status byte goes.
    pub(crate) status_at: belay_block::StatusByte,
    pub(crate) chain: Chain,
    /// Which part of its chain's request it is, from 0; see `parts.rs`.
    pub(crate) part: u16,
    /// Of how many.
    pub(crate) parts: u16,
    pub(crate) born: Instant,
    /// It is done, and now made durable: its guest does not flush (see [`GuestRequest::work`]).
    pub(crate) flushing: bool,
    /// How it ended, while its ring does not run.
    pub(crate) done: Option<Status>,
    /// The guest has forgotten it (reset, VMM gone): its end is nobody's business.
    pub(crate) orphan: bool,
}

/// The table, indexed by keys that name a request until it is removed.
#[derive(Default)]
pub(crate) struct Requests {
    slots: Slab<GuestRequest>,
    orphans: usize,
    /// Data of all of them.
    bytes: u64,
}

impl Requests {
    pub(crate) fn insert(&mut self, request: GuestRequest) -> usize {
        self.bytes += request.data.len() as u64;
        self.slots.insert(request)
    }

    pub(crate) fn get(&self, key: usize) -> Option<&GuestRequest> {
        self.slots.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: usize) -> Option<&mut GuestRequest> {
        self.slots.get_mut(key)
    }

    pub(crate) fn remove(&mut self, key: usize) -> Option<GuestRequest> {
        let request = self.slots.try_remove(key)?;
        self.bytes -= request.data.len() as u64;
        if request.orphan {
            self.orphans -= 1;
        }
        Some(request)
    }

    /// Bytes of their data, whether the guest still knows of them or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Requests that the guest still knows of.
    pub(crate) fn live(&self) -> usize {
        self.slots.len() - self.orphans
    }

    /// Requests that the guest has forgotten and that have not ended.
    pub(crate) fn orphans(&self) -> usize {
        self.orphans
    }

    /// All requests, also those that the guest has forgotten, with their keys.
    pub(crate) fn everything(&self) -> impl Iterator<Item = (usize, &GuestRequest)> {
        self.slots.iter()
    }

    /// Keys of the live requests of a queue, in the order in which they came.
    pub(crate) fn of_queue(&self, queue: u16) -> Vec<usize> {
        self.keys(|request| request.queue == queue)
    }

    /// How many of a queue's heads have live requests.
    pub(crate) fn heads(&self, queue: u16) -> usize {
        let first = |request: &GuestRequest| !request.orphan && request.queue == queue && request.part == 0;
        self.slots.iter().filter(|(_, request)| first(request)).count()
    }

    /// Keys of a head's live requests, in the order of their parts.
    pub(crate) fn of_head(&self, queue: u16, head: u16) -> Vec<usize> {
        self.keys(|request| request.queue == queue && request.head == head)
    }

    /// Keys of all live requests, in the order in which they came.
    pub(crate) fn all(&self) -> Vec<usize> {
        self.keys(|_| true)
    }

    fn keys(&self, wanted: impl Fn(&GuestRequest) -> bool) -> Vec<usize> {
        let mut keys: Vec<(TxId, usize)> = self
            .slots
            .iter()
            .filter(|(_, request)| !request.orphan && wanted(request))
            .map(|(key, request)| (request.txid, key))
            .collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, key)| key).collect()
    }

    /// Makes the guest forget a queue's requests (all queues: `None`). Those that have ended are dropped; the keys
    /// of the others are returned, for cancelling.
    pub(crate) fn orphan(&mut self, queue: Option<u16>) -> Vec<usize> {
        let keys = self.keys(|request| queue.is_none_or(|queue| queue == request.queue));
        let mut running = Vec::new();
        for key in keys {
            if self.slots[key].done.is_some() {
                self.remove(key);
            } else {
                self.slots[key].orphan = true;
                self.orphans += 1;
                running.push(key);
            }
        }
        running
    }

    /// A backend here begins to read for this request; into the guest's memory, unless it is parked.
    pub(crate) fn reads_here(&mut self, key: usize) {
        if let Some(request) = self.slots.get_mut(key) {
            request.reading = request.landing.is_none();
        }
    }

    /// Whether a backend here reads into the guest's memory.
    pub(crate) fn any_reading(&self) -> bool {
        self.slots.iter().any(|(_, request)| request.reading)
    }

    /// Makes the guest forget one request that has not ended.
    pub(crate) fn orphan_one(&mut self, key: usize) {
        if let Some(request) = self.slots.get_mut(key).filter(|request| !request.orphan) {
            request.orphan = true;
            self.orphans += 1;
        }
    }

    /// The lowest number of a request that the guest waits for.
    pub(crate) fn lowest(&self) -> Option<TxId> {
        self.slots.iter().filter(|(_, request)| !request.orphan).map(|(_, request)| request.txid).min()
    }

    /// The list that goes to a successor, in submission order.
    pub(crate) fn list(&self) -> Vec<ListedRequest> {
        self.all().into_iter().map(|key| listed(&self.slots[key])).collect()
    }
}

impl GuestRequest {
    /// What is to be executed now: kind, offset, length.
    ///
    /// A guest that was offered VIRTIO_BLK_F_FLUSH and did not take it relies on every change that was completed
    /// (virtio 1.2, 5.2.6.2): each is followed by a flush, and completed after that. To everybody else it stays the
    /// request that it is. Whoever takes it over, or finds it in the in-flight region, hears that the change is done,
    /// and flushes itself.
    pub(crate) fn work(&self) -> (OpKind, u64, u64) {
        if self.flushing { (OpKind::Flush, 0, 0) } else { (self.kind, self.offset, self.len) }
    }

    /// Where data that is read goes now.
    pub(crate) fn target(&self) -> &Buf {
        self.landing.as_ref().unwrap_or(&self.data)
    }
}

/// How a request is written into the list.
pub(crate) fn listed(request: &GuestRequest) -> ListedRequest {
    ListedRequest {
        queue: QueueIndex(request.queue),
        head: HeadIndex(request.head),
        kind: wire_kind(request.kind),
        state: RequestState::Sent,
        txid: request.txid,
        offset: request.offset,
        len: request.len,
    }
}

/// How a head is written into the list that its guest waits for in vain: as a request that it is not, so that it is
/// not taken over as one either.
pub(crate) fn listed_as_lost(queue: u16, head: u16, txid: TxId) -> ListedRequest {
    ListedRequest {
        queue: QueueIndex(queue),
        head: HeadIndex(head),
        kind: RequestKind::Flush,
        state: RequestState::Sent,
        txid,
        offset: 0,
        len: 0,
    }
}

/// A block operation's kind on the wire.
pub(crate) fn wire_kind(kind: OpKind) -> RequestKind {
    match kind {
        OpKind::Read => RequestKind::Read,
        OpKind::Write => RequestKind::Write,
        OpKind::Flush => RequestKind::Flush,
        OpKind::Discard => RequestKind::Discard,
        OpKind::WriteZeroes { .. } => RequestKind::WriteZeroes,
    }
}
