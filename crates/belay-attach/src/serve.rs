//! The backing's side of remote access: executing what a peer's guest asks for.
//!
//! Exactly once: a request is known by its transaction id. One that comes again on a new connection is not executed
//! again while it runs or when it is a change that was done; its outcome is sent again. Requests of an epoch that
//! is over are refused where they would be executed.

use std::collections::{BTreeMap, HashMap};

use belay_block::{Buf, Op, OpId, OpKind, Status};
use belay_wire::control::{Channel, Open, Opened};
use belay_wire::frame::flags;
use belay_wire::{Epoch, FrameKind, Header, InflightList, Refusal, TxId};
use slab::Slab;

use crate::conn::{ConnError, DataConn, PeerSocket, Received};
use crate::device::{Device, SERVER_OP};
use crate::handle::Notice;

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

impl Device {
    /// A peer's connection, its OPEN read: check it, and answer.
    pub(crate) fn accept_peer(&mut self, socket: PeerSocket, open: &Open, epoch: Epoch) {
        let peer = socket.peer.clone();
        let mut conn = match DataConn::new(socket, self.now) {
            Ok(conn) => conn,
            Err(error) => {
                tracing::warn!(device = %self.identity.name, %peer, %error, "could not take over a peer's connection");
                return;
            }
        };
        let standing = match self.standing_of(&peer, open, epoch) {
            Ok(standing) => standing,
            Err(refusal) => {
                self.refuse(&mut conn, refusal);
                return;
            }
        };
        self.replace_session(open.channel);
        let opened = Opened {
            epoch: self.epoch,
            attached: standing == Standing::Attached,
            size_bytes: self.local.as_ref().map_or(0, |local| local.info().size_bytes),
        };
        let mut header = Header::new(FrameKind::Opened);
        header.epoch = self.epoch;
        header.txid = self.server.above;
        let body = serde_json::to_vec(&opened).unwrap_or_default();
        let id = self.watch_conn(&conn);
        if let Err(error) = conn.send(header, &body) {
            tracing::warn!(device = %self.identity.name, %peer, %error, "peer's connection failed at once");
            return;
        }
        tracing::info!(device = %self.identity.name, %peer, ?standing, channel = ?open.channel, "peer connected");
        let session =
            Session { id, conn, channel: open.channel, standing, behind_claim: Vec::new(), incoming: None };
        let key = self.server.sessions.insert(session);
        if standing == Standing::Successor {
            self.notice(Notice::SuccessorReady { peer });
            self.successor_opened();
        } else if open.channel == Channel::Guest {
            self.borrower_opened();
        }
        // Frames may already wait in the TLS state: nobody will announce them again.
        self.serve_session(key);
    }

    /// What a peer that opens a channel is to this device.
    fn standing_of(&self, peer: &str, open: &Open, epoch: Epoch) -> Result<Standing, Refusal> {
        if self.retired {
            return Err(Refusal::StaleEpoch);
        }
        if self.local.is_none() {
            return Err(Refusal::NotReady);
        }
        if self.lent_to.as_deref() == Some(peer) {
            return match epoch == self.epoch {
                // While the ledger decides whether the guest has left it, nothing is executed for it.
                true if !self.serves_borrower() => Err(Refusal::NotReady),
                true => Ok(Standing::Attached),
                false => self.old_epoch(epoch),
            };
        }
        if open.channel == Channel::Guest && self.offered_to() == Some(peer) {
            return if epoch == self.epoch { Ok(Standing::Successor) } else { Err(Refusal::StaleEpoch) };
        }
        Err(if epoch < self.epoch { Refusal::StaleEpoch } else { Refusal::NotOffered })
    }

    /// The attachment comes back with the epoch before its grant: the grant got lost on the way.
    fn old_epoch(&self, epoch: Epoch) -> Result<Standing, Refusal> {
        if epoch.next() == self.epoch { Ok(Standing::Successor) } else { Err(Refusal::StaleEpoch) }
    }

    /// A newer connection of a channel replaces the older one.
    fn replace_session(&mut self, channel: Channel) {
        let old: Vec<usize> =
            self.server.sessions.iter().filter(|(_, s)| s.channel == channel).map(|(key, _)| key).collect();
        for key in old {
            self.server.sessions.remove(key);
        }
        if channel == Channel::Guest {
            self.remember_elders();
        }
    }

    /// Changes that run now come from an earlier connection; what comes later must not overtake them.
    pub(crate) fn remember_elders(&mut self) {
        self.server.elders.clear();
        for (txid, entry) in &self.server.table {
            let range = match entry {
                Entry::Adopted { key } => self
                    .requests
                    .get(*key)
                    .filter(|request| request.done.is_none() && request.kind.changes_content())
                    .map(|request| (request.offset, request.len)),
                Entry::Departed { key } => {
                    self.requests.get(*key).map(|request| (request.offset, request.len))
                }
                Entry::Running { op } => self
                    .server
                    .ops
                    .get(*op)
                    .filter(|op| op.kind.changes_content())
                    .map(|op| (op.offset, op.len)),
                Entry::Done { .. } => None,
            };
            if let Some(range) = range {
                self.server.elders.insert(*txid, range);
            }
        }
    }

    /// Tells a peer why not, as far as it can be told.
    pub(crate) fn refuse(&mut self, conn: &mut DataConn, refusal: Refusal) {
        tracing::warn!(device = %self.identity.name, peer = %conn.peer, %refusal, "refused a peer");
        if refusal == Refusal::StaleEpoch {
            self.counters.fenced += 1;
        }
        let mut header = Header::new(FrameKind::Refused);
        header.status = refusal as i32;
        header.epoch = self.epoch;
        let _ = conn.send(header, refusal.to_string().as_bytes());
        let _ = conn.flush(self.now);
    }

    /// Handles what a session's socket holds.
    pub(crate) fn serve_session(&mut self, key: usize) {
        for _ in 0..FRAMES_PER_TURN {
            let Some(session) = self.server.sessions.get_mut(key) else { return };
            if session.conn.congested() {
                break;
            }
            let outcome = match session.conn.next(self.now) {
                Ok(Received::WouldBlock) => return,
                Ok(Received::Header(header)) => {
                    if header.kind == FrameKind::Write {
                        let buf = self.buffers.take(header.payload_len as usize);
                        session.conn.deliver_to(buf.clone());
                        session.incoming = Some(buf);
                    }
                    continue;
                }
                Ok(Received::Frame(header, payload)) => {
                    let data = session.incoming.take();
                    self.on_peer_frame(key, header, data, &payload)
                }
                Err(error) => {
                    self.drop_session(key, &error);
                    return;
                }
            };
            if let Err(refusal) = outcome {
                if let Some(mut session) = self.server.sessions.try_remove(key) {
                    self.refuse(&mut session.conn, refusal);
                }
                return;
            }
        }
        // The last frame may have been its farewell.
        if let Some(session) = self.server.sessions.get(key) {
            self.more_to_read.push(session.id);
        }
    }

    pub(crate) fn drop_session(&mut self, key: usize, error: &ConnError) {
        let Some(session) = self.server.sessions.try_remove(key) else { return };
        let peer = session.conn.peer.clone();
        tracing::info!(device = %self.identity.name, %peer, %error, channel = ?session.channel, "peer's connection ended");
        if session.channel == Channel::Guest {
            self.notice(Notice::Link { peer, up: false, reason: Some(error.to_string()) });
        }
    }

    fn on_peer_frame(
        &mut self,
        key: usize,
        header: Header,
        data: Option<Buf>,
        payload: &[u8],
    ) -> Result<(), Refusal> {
        match header.kind {
            FrameKind::Read
            | FrameKind::Write
            | FrameKind::Flush
            | FrameKind::Discard
            | FrameKind::WriteZeroes
            | FrameKind::Extents => self.on_peer_request(key, header, data),
            FrameKind::Ack => {
                self.forget_below(header.txid);
                Ok(())
            }
            FrameKind::Ping => {
                let mut pong = Header::new(FrameKind::Pong);
                pong.txid = header.txid;
                self.send_on(key, pong, &[]);
                Ok(())
            }
            FrameKind::Pong => Ok(()),
            FrameKind::Claim => self.on_claim(key, header.epoch, header.txid.0),
            FrameKind::List | FrameKind::ListRevoked => self.on_borrower_word(key, header, payload),
            FrameKind::Bye => {
                self.drop_session(key, &ConnError::Closed);
                Ok(())
            }
            _ => Err(Refusal::WrongState),
        }
    }

    fn send_on(&mut self, key: usize, header: Header, payload: &[u8]) {
        let Some(session) = self.server.sessions.get_mut(key) else { return };
        if let Err(error) = session.conn.send(header, payload) {
            self.drop_session(key, &error);
        }
    }

    /// The successor's rings have started.
    fn on_claim(&mut self, key: usize, epoch: Epoch, generation: u64) -> Result<(), Refusal> {
        let session = &mut self.server.sessions[key];
        if session.channel != Channel::Guest {
            return Err(Refusal::WrongState);
        }
        let peer = session.conn.peer.clone();
        // One that was granted already claims again, if its claim and the grant crossed on a new connection.
        if session.standing != Standing::Attached {
            session.standing = Standing::Claiming;
        }
        self.claim(peer, epoch, generation)
    }

    /// The attachment's rings have stopped, or are to run again, and its guest may come here.
    fn on_borrower_word(&mut self, key: usize, header: Header, payload: &[u8]) -> Result<(), Refusal> {
        let session = &self.server.sessions[key];
        if session.standing != Standing::Attached || session.channel != Channel::Guest {
            return Err(Refusal::WrongState);
        }
        if header.epoch != self.epoch {
            return Err(Refusal::StaleEpoch);
        }
        if header.kind == FrameKind::ListRevoked {
            self.borrower_revoked(header.txid.0);
            return Ok(());
        }
        let list = InflightList::decode(payload).map_err(|_| Refusal::Malformed)?;
        self.borrower_list(list, header.txid.0);
        Ok(())
    }

    /// The grant is durable: the requests in flight now belong to the successor.
    pub(crate) fn lend(&mut self, to: &str, epoch: Epoch) {
        self.epoch = epoch;
        self.lent_to = Some(to.to_owned());
        // What an earlier borrower was told of is nobody's business any more.
        self.server.table.retain(|_, entry| !matches!(entry, Entry::Done { .. }));
        for key in self.requests.all() {
            if let Some(request) = self.requests.get(key) {
                self.server.table.insert(request.txid, Entry::Adopted { key });
            }
        }
        self.remember_elders();
    }

    /// Sends the grant, then what has ended meanwhile, then handles what came behind the claim.
    pub(crate) fn send_grant(&mut self) {
        let epoch = self.epoch;
        let Some(session) = self.server.guest_session() else { return };
        session.standing = Standing::Attached;
        let id = session.id;
        let mut grant = Header::new(FrameKind::Grant);
        grant.epoch = epoch;
        let behind = std::mem::take(&mut session.behind_claim);
        let Some(key) = self.server.by_id(id) else { return };
        self.send_on(key, grant, &[]);
        let adopted: Vec<(TxId, usize)> = self
            .server
            .table
            .iter()
            .filter_map(|(txid, entry)| match entry {
                Entry::Adopted { key } => Some((*txid, *key)),
                _ => None,
            })
            .collect();
        for (_, request) in adopted {
            self.report_adopted(request);
        }
        for (header, data) in behind {
            if self.on_peer_request(key, header, data).is_err() {
                return;
            }
        }
    }

    /// A request that the guest left in flight here has ended (or has to be reported again): tell the successor.
    pub(crate) fn report_adopted(&mut self, key: usize) {
        let Some(request) = self.requests.get(key) else { return };
        let Some(status) = request.done else { return };
        let txid = request.txid;
        let data = (request.kind == OpKind::Read && status == Status::Ok).then(|| request.target().clone());
        self.elder_ended(txid);
        self.reply(None, txid, status, data.as_ref(), 0);
    }

    fn on_peer_request(&mut self, key: usize, header: Header, data: Option<Buf>) -> Result<(), Refusal> {
        let serves = self.serves_borrower();
        let session = &mut self.server.sessions[key];
        match (session.channel, session.standing) {
            (_, Standing::Attached) => {}
            (Channel::Guest, Standing::Claiming) => {
                if session.behind_claim.len() >= MAX_OUTSTANDING {
                    return Err(Refusal::Malformed);
                }
                session.behind_claim.push((header, data));
                return Ok(());
            }
            _ => return Err(Refusal::WrongState),
        }
        if header.epoch != self.epoch || self.retired {
            return Err(Refusal::StaleEpoch);
        }
        if !serves {
            return Err(Refusal::NotReady);
        }
        if header.kind == FrameKind::Extents {
            self.answer_extents(key, header);
            return Ok(());
        }
        let kind = request_kind(&header)?;
        let len = if kind == OpKind::Write { u64::from(header.payload_len) } else { header.len };
        if matches!(kind, OpKind::Read | OpKind::Write) && (len == 0 || len > MAX_REQUEST_BYTES) {
            return Err(Refusal::Malformed);
        }
        let channel = session.channel;
        let id = session.id;
        if channel == Channel::Copier && kind != OpKind::Read {
            return Err(Refusal::WrongState);
        }
        if channel == Channel::Guest {
            self.server.above = self.server.above.max(header.txid.next());
            if self.known(header.txid) {
                return Ok(());
            }
        }
        if self.server.ops.len() >= MAX_OUTSTANDING {
            return Err(Refusal::Malformed);
        }
        let buf = match kind {
            OpKind::Read => self.buffers.take(len as usize),
            OpKind::Write => data.ok_or(Refusal::Malformed)?,
            _ => Buf::default(),
        };
        self.execute(id, channel, header, kind, len, buf);
        Ok(())
    }

    /// Whether a request has come before; then nothing is executed, and what is known of its end is sent again.
    fn known(&mut self, txid: TxId) -> bool {
        match self.server.table.get(&txid) {
            None => false,
            Some(Entry::Running { op }) => {
                let op = *op;
                let session = self.server.guest_session().map(|session| session.id);
                if let (Some(op), Some(session)) = (self.server.ops.get_mut(op), session) {
                    op.session = session;
                }
                true
            }
            Some(Entry::Adopted { key }) => {
                let key = *key;
                self.report_adopted(key);
                true
            }
            Some(Entry::Departed { .. }) => true,
            Some(Entry::Done { status }) => {
                let status = status_of(*status);
                self.reply(None, txid, status, None, 0);
                true
            }
        }
    }

    fn execute(&mut self, session: u64, channel: Channel, header: Header, kind: OpKind, len: u64, buf: Buf) {
        let txid = header.txid;
        // The copier's numbers are its own. It waits as well: what it keeps must have all of an elder, or none.
        let itself = if channel == Channel::Guest { txid } else { TxId(0) };
        let waits_for = self.server.elders_of(itself, header.offset, len);
        let entry = self.server.ops.vacant_entry();
        let slot = entry.key();
        let op = Op { id: OpId(SERVER_OP | slot as u64), kind, offset: header.offset, len, buf };
        let waiting = !waits_for.is_empty();
        let (held, ready) = if waiting { (Some(op), None) } else { (None, Some(op)) };
        entry.insert(ServerOp {
            session,
            request: None,
            channel,
            txid,
            kind,
            offset: header.offset,
            len,
            waits_for,
            held,
        });
        if channel == Channel::Guest {
            self.server.table.insert(txid, Entry::Running { op: slot });
        }
        if let (Some(op), Some(local)) = (ready, self.local.as_mut()) {
            local.submit(op, &mut self.ring, self.now);
        }
    }

    /// An operation for a peer has ended at the backend.
    pub(crate) fn server_op_done(&mut self, slot: usize, op: &Op, status: Status) {
        let Some(done) = self.server.ops.try_remove(slot) else { return };
        self.counters.served += 1;
        let data = (done.kind == OpKind::Read && status == Status::Ok).then_some(&op.buf);
        if done.channel == Channel::Copier {
            let zero = data.is_some_and(Buf::is_zero);
            self.reply(
                Some(done.session),
                done.txid,
                status,
                data.filter(|_| !zero),
                if zero { flags::ZERO } else { 0 },
            );
            return;
        }
        if let Some(key) = done.request {
            // Its guest has come home meanwhile.
            if let (Some(data), Some(request)) = (data, self.requests.get(key).filter(|r| !r.orphan)) {
                request.target().copy_from_buf(0, data);
            }
            self.homed(done.txid);
            self.elder_ended(done.txid);
            self.guest_done(key, status);
            return;
        }
        if done.kind == OpKind::Read {
            // Reading again is harmless, keeping what was read is not cheap: a repeated read is executed again.
            self.server.table.remove(&done.txid);
        } else {
            self.server.table.insert(done.txid, Entry::Done { status: wire_status(status) });
        }
        self.elder_ended(done.txid);
        self.reply(None, done.txid, status, data, 0);
    }

    /// What waited for this change may go on.
    pub(crate) fn elder_ended(&mut self, txid: TxId) {
        if self.server.elders.remove(&txid).is_none() {
            return;
        }
        let mut ready = Vec::new();
        for (_, op) in &mut self.server.ops {
            op.waits_for.retain(|waited| *waited != txid);
            if op.waits_for.is_empty()
                && let Some(op) = op.held.take()
            {
                ready.push(op);
            }
        }
        for mut held in std::mem::take(&mut self.server.held) {
            held.waits_for.retain(|waited| *waited != txid);
            if held.waits_for.is_empty() {
                ready.push(held.op);
            } else {
                self.server.held.push(held);
            }
        }
        for op in ready {
            if let Some(local) = self.local.as_mut() {
                local.submit(op, &mut self.ring, self.now);
            }
        }
    }

    /// Sends an outcome to a session, or to whichever has the guest's channel. Without one it is kept in the table.
    fn reply(&mut self, session: Option<u64>, txid: TxId, status: Status, data: Option<&Buf>, flags: u16) {
        let session = match session {
            Some(id) => self.server.by_id(id).and_then(|key| self.server.sessions.get_mut(key)),
            None => self.server.guest_session(),
        };
        let Some(session) = session.filter(|session| session.standing == Standing::Attached) else { return };
        let mut header = Header::new(FrameKind::Reply);
        header.txid = txid;
        header.epoch = self.epoch;
        header.status = wire_status(status);
        header.flags = flags;
        let sent = match data {
            Some(data) => {
                header.len = data.len() as u64;
                session.conn.send_buf(header, data)
            }
            None => session.conn.send(header, &[]),
        };
        if let Err(error) = sent {
            let id = session.id;
            if let Some(key) = self.server.by_id(id) {
                self.drop_session(key, &error);
            }
        }
    }

    fn answer_extents(&mut self, key: usize, header: Header) {
        let mut reply = Header::new(FrameKind::Reply);
        reply.txid = header.txid;
        reply.epoch = self.epoch;
        let extents = match &self.local {
            Some(local) => local.data_extents(header.offset, header.len),
            None => Ok(Vec::new()),
        };
        let mut payload = Vec::new();
        match extents {
            Ok(mut extents) => {
                // What an elder has not written yet is no hole.
                let end = header.offset.saturating_add(header.len);
                let elders = self
                    .server
                    .elders
                    .values()
                    .map(|(at, len)| (*at).max(header.offset)..at.saturating_add(*len).min(end));
                extents.extend(elders.filter(|range| range.start < range.end));
                extents.sort_unstable_by_key(|range| range.start);
                for extent in extents {
                    payload.extend(extent.start.to_le_bytes());
                    payload.extend(extent.end.to_le_bytes());
                }
            }
            Err(error) => reply.status = error.raw_os_error().unwrap_or(libc::EIO),
        }
        self.send_on(key, reply, &payload);
    }

    /// The client has told its guest of everything below `txid`.
    fn forget_below(&mut self, txid: TxId) {
        let kept = self.server.table.split_off(&txid);
        let forgotten = std::mem::replace(&mut self.server.table, kept);
        for (txid, entry) in forgotten {
            match entry {
                Entry::Adopted { key }
                    if self.requests.get(key).is_some_and(|request| request.done.is_some()) =>
                {
                    self.requests.remove(key);
                }
                Entry::Done { .. } => {}
                // The peer acknowledges what has not ended: it is wrong, and its guest pays for it, but what runs
                // must still be known here.
                running => {
                    self.server.table.insert(txid, running);
                }
            }
        }
    }
}

fn request_kind(header: &Header) -> Result<OpKind, Refusal> {
    Ok(match header.kind {
        FrameKind::Read => OpKind::Read,
        FrameKind::Write => OpKind::Write,
        FrameKind::Flush => OpKind::Flush,
        FrameKind::Discard => OpKind::Discard,
        FrameKind::WriteZeroes => OpKind::WriteZeroes { unmap: header.flags & flags::UNMAP != 0 },
        _ => return Err(Refusal::Malformed),
    })
}
