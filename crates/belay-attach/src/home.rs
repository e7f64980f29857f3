//! The guest comes home: its requests were in flight at another host, and are executed here.
//!
//! ```text
//!   listed request   this host's table says      what becomes of it
//!                    running for the borrower    its end completes the guest's request here
//!                    done                        completed at once, with the outcome that is known
//!                    left in flight long ago     (there and back while it ran) as running
//!                    nothing                     a read that was answered, or it was still on its way: executed now
//! ```

use belay_block::OpKind;
use belay_handover::handover::RingStart;
use belay_wire::{Epoch, FrameKind, Header, ListedRequest, TxId};

use crate::device::Device;
use crate::serve::{Entry, status_of, wire_status};

impl Device {
    /// The return is durable: the borrower's epoch is over.
    pub(crate) fn take_back(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.lent_to = None;
        self.next_tx = self.next_tx.max(TxId::first_of(epoch)).max(self.server.above);
        let table = std::mem::take(&mut self.server.table);
        for (txid, entry) in table {
            let kept = match entry {
                Entry::Adopted { key } => self.depart(key),
                other => Some(other),
            };
            if let Some(entry) = kept {
                self.server.table.insert(txid, entry);
            }
        }
        self.remember_elders();
    }

    /// A request of this host's earlier guest that was never acknowledged: its memory is not the guest's any more.
    fn depart(&mut self, key: usize) -> Option<Entry> {
        let request = self.requests.get(key)?;
        let read = request.kind == OpKind::Read;
        if let Some(status) = request.done {
            self.requests.remove(key);
            return (!read).then_some(Entry::Done { status: wire_status(status) });
        }
        self.requests.orphan_one(key);
        (!read).then_some(Entry::Departed { key })
    }

    /// Lets a ring run whose requests in flight came back with the guest.
    pub(crate) fn run_returned(&mut self, ring: RingStart, adopted: &[ListedRequest]) {
        let index = ring.queue.0;
        if adopted.is_empty() {
            self.start_waiting(index);
            return;
        }
        let mut taken = Vec::with_capacity(adopted.len());
        for listed in adopted {
            self.seen_txid(listed.txid);
            match self.adopt(index, listed) {
                Ok(key) => taken.push((listed.txid, key)),
                Err(reason) => {
                    tracing::error!(device = %self.identity.name, reason, "a listed request cannot be taken over");
                    self.lose(index, listed.head.0, listed.txid);
                }
            }
        }
        if let Some(claim) = &mut self.open_claim {
            claim.in_flight += taken.len() as u64;
        }
        self.run_ring(index, ring.base);
        for (txid, key) in taken {
            self.resolve(txid, key);
        }
    }

    /// Joins a request that came back with what is known of it.
    fn resolve(&mut self, txid: TxId, key: usize) {
        match self.server.table.get(&txid) {
            Some(Entry::Done { status }) => {
                let status = status_of(*status);
                self.server.table.remove(&txid);
                self.guest_done(key, status);
            }
            Some(Entry::Running { op }) => {
                if let Some(op) = self.server.ops.get_mut(*op) {
                    op.request = Some(key);
                }
                self.server.table.insert(txid, Entry::Adopted { key });
            }
            Some(Entry::Departed { key: departed } | Entry::Adopted { key: departed }) => {
                self.server.heirs.insert(*departed, key);
                self.server.table.insert(txid, Entry::Adopted { key });
            }
            None => self.submit_guest(key),
        }
    }

    /// A request of this host's earlier guest has ended.
    pub(crate) fn departed_done(&mut self, key: usize, txid: TxId, status: belay_block::Status) {
        if let Some(heir) = self.server.heirs.remove(&key) {
            self.homed(txid);
            self.guest_done(heir, status);
        } else if matches!(self.server.table.get(&txid), Some(Entry::Departed { .. })) {
            self.server.table.insert(txid, Entry::Done { status: wire_status(status) });
        }
    }

    /// A request has ended whose guest may be here: then nobody will acknowledge it.
    pub(crate) fn homed(&mut self, txid: TxId) {
        if self.lent_to.is_none() {
            self.server.table.remove(&txid);
        }
    }

    /// Tells the borrower that the device has left it, and ends its connections.
    pub(crate) fn send_taken(&mut self, epoch: Epoch) {
        let now = self.now;
        let mut taken = Header::new(FrameKind::Taken);
        taken.epoch = epoch;
        if let Some(session) = self.server.guest_session() {
            // If it does not arrive, its next connection is refused with the same word.
            let _ = session.conn.send(taken, &[]).and_then(|()| session.conn.flush(now));
        }
        self.server.sessions.clear();
    }
}
