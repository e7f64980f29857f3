//! The backing's side of remote access: executing what a peer's guest asks for.
//!
//! Exactly once: a request is known by its transaction id. One that comes again on a new connection is not executed
//! again while it runs or when it is a change that was done; its outcome is sent again. Requests of an epoch that
//! is over are refused where they would be executed.

use std::collections::{BTreeMap, HashMap};

use belay_block::{Buf, Op, OpId, OpKind, Status};
use belay_wire::control::Channel;
use belay_wire::{Header, TxId};
use slab::Slab;

use crate::conn::DataConn;
use crate::device::{Device, SERVER_OP};

mod requests;
mod sessions;

/// The longest single request, in bytes; below a frame's largest payload.
pub(crate) const MAX_REQUEST_BYTES: u64 = 4 << 20;
/// Requests that one peer may have unanswered; a client stays below by its rings' sizes.
const MAX_OUTSTANDING: usize = 64 * 1024;
/// Frames handled for one connection before others get their turn.
const FRAMES_PER_TURN: usize = 64;

/// What a session's client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Waits for the guest to come to it.
    Successor,
    /// Has claimed the device; its requests wait for the grant.
    Claiming,
    /// Has the guest.
    Attached,
}

/// One connection of a peer that uses this host's backing.
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) conn: DataConn,
    pub(crate) channel: Channel,
    pub(crate) standing: Standing,
    /// Requests that came behind the claim.
    behind_claim: Vec<(Header, Option<Buf>)>,
    incoming: Option<Buf>,
}

/// A request of the attachment's guest.
pub(crate) enum Entry {
    /// Was in flight when the guest left this host, or when it came back; its end is that of this request of the
    /// table, whoever executes it.
    Adopted { key: usize },
    /// Was in flight when the guest left this host, and has come back: executed under this key, whose guest is gone.
    Departed { key: usize },
    /// Being executed.
    Running { op: usize },
    /// A change, or a flush, that was done; its outcome, until the client acknowledges.
    Done { status: i32 },
}

/// An operation at the backend on a peer's behalf.
pub(crate) struct ServerOp {
    session: u64,
    /// The request of this host's guest that it executes, whose guest has come home meanwhile.
    pub(crate) request: Option<usize>,
    channel: Channel,
    txid: TxId,
    kind: OpKind,
    offset: u64,
    len: u64,
    /// Changes of earlier connections that overlap and must end first.
    waits_for: Vec<TxId>,
    /// Held back until `waits_for` is empty.
    held: Option<Op>,
}

/// Everything a device keeps as a backing for others.
#[derive(Default)]
pub(crate) struct Server {
    pub(crate) sessions: Slab<Session>,
    pub(crate) table: BTreeMap<TxId, Entry>,
    pub(crate) ops: Slab<ServerOp>,
    /// Changes that were outstanding when the guest's present connection began.
    elders: BTreeMap<TxId, (u64, u64)>,
    /// Above every number that a client has used.
    pub(crate) above: TxId,
    /// Requests of this host's guest that wait for elders.
    held: Vec<HeldOp>,
    /// Which request waits for the end of a departed one, by the departed one's key.
    pub(crate) heirs: HashMap<usize, usize>,
}

/// An operation of this host's guest that must not overtake changes made before the guest came home.
struct HeldOp {
    waits_for: Vec<TxId>,
    op: Op,
}

impl Server {
    /// The connection of the guest's channel.
    pub(crate) fn guest_session(&mut self) -> Option<&mut Session> {
        self.sessions.iter_mut().map(|(_, session)| session).find(|session| session.channel == Channel::Guest)
    }

    /// Elders that an operation must not overtake.
    fn elders_of(&self, txid: TxId, offset: u64, len: u64) -> Vec<TxId> {
        let end = offset.saturating_add(len);
        self.elders
            .iter()
            .filter(|(elder, (from, len))| {
                **elder != txid && *from < end && offset < from.saturating_add(*len)
            })
            .map(|(elder, _)| *elder)
            .collect()
    }

    /// Keeps an operation of this host's guest for later, if elders must end first; else gives it back.
    pub(crate) fn hold_back(&mut self, txid: TxId, op: Op) -> Option<Op> {
        if self.elders.is_empty() {
            return Some(op);
        }
        let waits_for = self.elders_of(txid, op.offset, op.len);
        if waits_for.is_empty() {
            return Some(op);
        }
        self.held.push(HeldOp { waits_for, op });
        None
    }

    /// Forgets an operation that was held back.
    pub(crate) fn cancel_held(&mut self, id: OpId) -> bool {
        let before = self.held.len();
        self.held.retain(|held| held.op.id != id);
        self.held.len() != before
    }

    /// Forgets every operation that has not been given to the backend.
    pub(crate) fn drop_held(&mut self) {
        self.held.clear();
        for (_, op) in &mut self.ops {
            op.held = None;
        }
    }

    /// Operations at the backend on a peer's behalf.
    pub(crate) fn op_ids(&self) -> impl Iterator<Item = OpId> + '_ {
        self.ops.iter().map(|(slot, _)| OpId(SERVER_OP | slot as u64))
    }

    pub(crate) fn by_id(&self, id: u64) -> Option<usize> {
        self.sessions.iter().find(|(_, session)| session.id == id).map(|(key, _)| key)
    }
}

/// A status as a number on the wire.
pub(crate) fn wire_status(status: Status) -> i32 {
    match status {
        Status::Ok => 0,
        Status::Failed { errno } => errno,
        Status::Unsupported => -1,
    }
}

/// The inverse of [`wire_status`].
pub(crate) fn status_of(number: i32) -> Status {
    match number {
        0 => Status::Ok,
        errno if errno > 0 => Status::Failed { errno },
        _ => Status::Unsupported,
    }
}

impl Device {}
