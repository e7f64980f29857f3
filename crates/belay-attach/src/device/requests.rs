//! Requests on their way: to the backend, to another host, and back.

use belay_block::{Buf, Op, OpId, OpKind, Status};
use belay_wire::TxId;

use super::{Device, GUEST_OP, OP_CLASS, SERVER_OP, STEP_OP};
use crate::client::{RemoteDone, RemoteKind, RemoteOwner, RemoteRequest};

impl Device {
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
    pub(super) fn finish_backend_ops(&mut self) -> bool {
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
}
