//! Requests of a peer: each is executed once, whatever is lost and sent again.

use belay_block::{Buf, Op, OpId, OpKind, Status};
use belay_wire::control::Channel;
use belay_wire::frame::flags;
use belay_wire::{FrameKind, Header, Refusal, TxId};

use super::{Entry, MAX_OUTSTANDING, MAX_REQUEST_BYTES, ServerOp, Standing, status_of, wire_status};
use crate::device::{Device, SERVER_OP};

impl Device {
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

    pub(super) fn on_peer_request(
        &mut self,
        key: usize,
        header: Header,
        data: Option<Buf>,
    ) -> Result<(), Refusal> {
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
    pub(super) fn reply(
        &mut self,
        session: Option<u64>,
        txid: TxId,
        status: Status,
        data: Option<&Buf>,
        flags: u16,
    ) {
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
    pub(super) fn forget_below(&mut self, txid: TxId) {
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
