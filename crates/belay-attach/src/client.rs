//! The attachment's side of remote access: requests that another host's backing executes.
//!
//! Outstanding requests outlive their connection. When a new one is open they are sent again, in order, under the
//! same transaction ids; the backing knows which of them it has done. Nothing fails because a link is down: it waits.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use belay_block::{Buf, OpKind, Status};
use belay_handover::exchange::StepId;
use belay_wire::control::{Channel, Open, Opened};
use belay_wire::frame::flags;
use belay_wire::{Epoch, FrameKind, Header, InflightList, Refusal, TxId};

use crate::conn::{ConnError, DataConn, PeerSocket, Received};
use crate::device::Device;
use crate::handle::Notice;
use crate::serve::status_of;

/// Completions after which the backing is told what it may forget.
const ACK_EVERY: u32 = 64;
/// How soon a host that was not ready is asked again.
const NOT_READY_RETRY: Duration = Duration::from_millis(50);
/// How soon a host that refused the attachment is asked again: it may be starting, or being repaired.
const REFUSED_RETRY: Duration = Duration::from_secs(1);
/// Frames handled for one connection before others get their turn.
const FRAMES_PER_TURN: usize = 64;

/// Whose a remote request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RemoteOwner {
    /// The guest's, by its key in the request table.
    Guest(usize),
    /// A step of the exchange.
    Step(StepId),
}

/// A request that has been given to the backing's host, or will be.
pub(crate) struct RemoteRequest {
    pub(crate) kind: RemoteKind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Data to write, or where read data goes.
    pub(crate) buf: Buf,
    pub(crate) owner: RemoteOwner,
    /// Sent on some connection: from then on it may have been executed.
    sent: bool,
}

/// What a remote request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RemoteKind {
    /// A block operation.
    Op(OpKind),
    /// Where there is data (copier's channel only).
    Extents,
}

/// A channel to the backing: a connection while there is one, and what is outstanding.
pub(crate) struct ClientChannel {
    pub(crate) channel: Channel,
    pub(crate) id: u64,
    pub(crate) conn: Option<DataConn>,
    /// The peer has accepted our OPEN on this connection.
    open: bool,
    /// A connection has been asked for and has not come.
    asked: bool,
    outstanding: BTreeMap<TxId, RemoteRequest>,
    finished_since_ack: u32,
    /// The peer was not ready, or refused: ask for a connection again at this time.
    retry_at: Option<Instant>,
}

/// How a remote request ended.
pub(crate) struct RemoteDone {
    pub(crate) owner: RemoteOwner,
    pub(crate) status: Status,
    /// All bytes read are zero; they were not put into the buffer.
    pub(crate) zero: bool,
    /// It was an extents request, and this is the answer.
    pub(crate) was_extents: bool,
    /// Ranges of bytes that hold data.
    pub(crate) extents: Vec<std::ops::Range<u64>>,
}

impl ClientChannel {
    fn new(channel: Channel) -> Self {
        Self {
            channel,
            id: 0,
            conn: None,
            open: false,
            asked: false,
            outstanding: BTreeMap::new(),
            finished_since_ack: 0,
            retry_at: None,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.open
    }

    /// Whether the peer owes an answer.
    pub(crate) fn has_outstanding(&self) -> bool {
        !self.outstanding.is_empty()
    }

    /// The lowest number that may still be asked about.
    fn low_water(&self, next: TxId) -> TxId {
        self.outstanding.keys().next().copied().unwrap_or(next)
    }
}

/// What a device keeps while its backing is at another host.
pub(crate) struct Client {
    /// The host.
    pub(crate) peer: String,
    pub(crate) guest: ClientChannel,
    pub(crate) copier: ClientChannel,
    /// Numbers of the copier's requests; they mean nothing on the guest's channel.
    copier_tx: TxId,
}

impl Client {
    pub(crate) fn new(peer: String) -> Self {
        Self {
            peer,
            guest: ClientChannel::new(Channel::Guest),
            copier: ClientChannel::new(Channel::Copier),
            copier_tx: TxId(1),
        }
    }

    pub(crate) fn channel(&mut self, channel: Channel) -> &mut ClientChannel {
        match channel {
            Channel::Guest => &mut self.guest,
            Channel::Copier => &mut self.copier,
        }
    }

    pub(crate) fn channels(&mut self) -> [&mut ClientChannel; 2] {
        [&mut self.guest, &mut self.copier]
    }
}

impl Device {
    /// Asks the control plane for the connection of a channel, once.
    pub(crate) fn need_connection(&mut self, channel: Channel) {
        let Some(client) = &mut self.client else { return };
        let state = client.channel(channel);
        if state.conn.is_none() && !state.asked && state.retry_at.is_none() {
            state.asked = true;
            let peer = client.peer.clone();
            self.notice(Notice::NeedConnection { peer, channel });
        }
    }

    /// Asks again for connections to a host that was not ready.
    pub(crate) fn redial(&mut self) {
        let now = self.now;
        let Some(client) = &mut self.client else { return };
        let due: Vec<Channel> = client
            .channels()
            .into_iter()
            .filter(|state| state.retry_at.is_some_and(|at| at <= now))
            .map(|state| {
                state.retry_at = None;
                state.channel
            })
            .collect();
        for channel in due {
            self.need_connection(channel);
        }
    }

    /// A dialled connection: say which device, and wait for the answer.
    pub(crate) fn connected(&mut self, channel: Channel, socket: PeerSocket) {
        let epoch = self.epoch;
        let device = self.identity.id;
        if self.client.is_none() {
            return;
        }
        let mut conn = match DataConn::new(socket, self.now) {
            Ok(conn) => conn,
            Err(error) => {
                tracing::warn!(device = %self.identity.name, %error, "could not take over a connection");
                return;
            }
        };
        let id = self.watch_conn(&conn);
        let next = self.next_tx;
        let Some(client) = &mut self.client else { return };
        let state = client.channel(channel);
        let mut header = Header::new(FrameKind::Open);
        header.epoch = epoch;
        header.txid = state.low_water(next);
        let body = serde_json::to_vec(&Open { device, channel }).unwrap_or_default();
        let sent = conn.send(header, &body);
        state.id = id;
        state.conn = Some(conn);
        state.open = false;
        state.asked = false;
        if let Err(error) = sent {
            self.lose_connection(channel, &error.to_string());
        }
    }

    /// A connection is of no more use; another one is asked for.
    pub(crate) fn lose_connection(&mut self, channel: Channel, reason: &str) {
        let Some(client) = &mut self.client else { return };
        let peer = client.peer.clone();
        let state = client.channel(channel);
        if state.conn.take().is_none() {
            return;
        }
        state.open = false;
        state.asked = false;
        tracing::info!(device = %self.identity.name, %peer, reason, ?channel, "connection to the backing ended");
        if channel == Channel::Guest {
            self.notice(Notice::Link { peer, up: false, reason: Some(reason.to_owned()) });
            self.successor_connection(false);
        }
        self.need_connection(channel);
    }

    /// Sends a request to the backing, or keeps it until there is a connection.
    pub(crate) fn submit_remote(&mut self, txid: TxId, request: RemoteRequest) {
        self.put_remote(Channel::Guest, txid, request);
    }

    /// As [`Device::submit_remote`], on the copier's connection.
    pub(crate) fn submit_copier(&mut self, request: RemoteRequest) {
        let Some(client) = &mut self.client else { return };
        let txid = client.copier_tx;
        client.copier_tx = txid.next();
        self.put_remote(Channel::Copier, txid, request);
    }

    fn put_remote(&mut self, channel: Channel, txid: TxId, mut request: RemoteRequest) {
        let epoch = self.request_epoch();
        let may_send = channel == Channel::Copier || self.may_send_requests();
        let Some(client) = &mut self.client else { return };
        let state = client.channel(channel);
        let mut failed = None;
        if let Some(conn) = &mut state.conn
            && state.open
            && may_send
        {
            request.sent = true;
            failed = send_request(conn, txid, epoch, &request, 0).err();
        }
        state.outstanding.insert(txid, request);
        if let Some(error) = failed {
            self.lose_connection(channel, &error.to_string());
        } else {
            self.need_connection(channel);
        }
    }

    /// Registers a request that the backing already has: its completion comes by itself.
    pub(crate) fn adopt_remote(&mut self, txid: TxId, request: RemoteRequest) {
        if let Some(client) = &mut self.client {
            client.guest.outstanding.insert(txid, RemoteRequest { sent: true, ..request });
        }
    }

    /// Data that the guest was to get from now on lands in `buf` instead.
    pub(crate) fn divert_remote(&mut self, txid: TxId, buf: &Buf) {
        let Some(client) = &mut self.client else { return };
        if let Some(request) = client.guest.outstanding.get_mut(&txid) {
            request.buf = buf.clone();
            if let Some(conn) = &mut client.guest.conn {
                conn.divert(txid, buf);
            }
        }
    }

    /// Sends what has not been sent (`all`: also what was sent on an earlier connection), in order.
    pub(crate) fn send_outstanding(&mut self, channel: Channel, all: bool) {
        let epoch = self.request_epoch();
        let Some(client) = &mut self.client else { return };
        let state = client.channel(channel);
        let Some(conn) = &mut state.conn else { return };
        let mut failed = None;
        for (txid, request) in &mut state.outstanding {
            if request.sent && !all {
                continue;
            }
            let repeated = if request.sent { flags::REPEATED } else { 0 };
            request.sent = true;
            if let Err(error) = send_request(conn, *txid, epoch, request, repeated) {
                failed = Some(error);
                break;
            }
        }
        if let Some(error) = failed {
            self.lose_connection(channel, &error.to_string());
        }
    }

    /// A control frame to the backing on the guest's channel.
    pub(crate) fn send_to_backing(&mut self, header: Header) {
        let Some(client) = &mut self.client else { return };
        let Some(conn) = &mut client.guest.conn else { return };
        if let Err(error) = conn.send(header, &[]) {
            self.lose_connection(Channel::Guest, &error.to_string());
        }
    }

    /// Handles what a channel's socket holds.
    pub(crate) fn read_channel(&mut self, channel: Channel) {
        for _ in 0..FRAMES_PER_TURN {
            let Some(client) = &mut self.client else { return };
            let state = client.channel(channel);
            let Some(conn) = &mut state.conn else { return };
            match conn.next(self.now) {
                Ok(Received::WouldBlock) => return,
                Ok(Received::Header(header)) => {
                    if header.kind == FrameKind::Reply
                        && let Some(request) = state.outstanding.get(&header.txid)
                        && request.kind == RemoteKind::Op(OpKind::Read)
                        && request.buf.len() == header.payload_len as usize
                    {
                        conn.deliver_to(request.buf.clone());
                    }
                }
                Ok(Received::Frame(header, payload)) => {
                    if let Err(error) = self.on_backing_frame(channel, header, &payload) {
                        self.lose_connection(channel, &error.to_string());
                        return;
                    }
                }
                Err(error) => {
                    self.lose_connection(channel, &error.to_string());
                    return;
                }
            }
        }
        if let Some(client) = &mut self.client {
            let id = client.channel(channel).id;
            self.more_to_read.push(id);
        }
    }

    fn on_backing_frame(
        &mut self,
        channel: Channel,
        header: Header,
        payload: &[u8],
    ) -> Result<(), ConnError> {
        match header.kind {
            FrameKind::Reply => self.on_reply(channel, header, payload),
            FrameKind::Opened => {
                let opened: Opened = serde_json::from_slice(payload)
                    .map_err(|_| belay_wire::FrameError::Payload("OPENED is not what it should be"))?;
                self.on_opened(channel, header.txid, &opened);
                Ok(())
            }
            FrameKind::Refused => {
                let refusal = Refusal::from_code(header.status).unwrap_or(Refusal::Malformed);
                self.on_refused(channel, refusal, header.epoch, &String::from_utf8_lossy(payload));
                Ok(())
            }
            FrameKind::List => {
                self.on_list(InflightList::decode(payload)?, header.txid.0);
                Ok(())
            }
            FrameKind::ListRevoked => {
                self.on_list_revoked(header.txid.0);
                Ok(())
            }
            FrameKind::Taken => {
                self.on_taken(header.epoch);
                Ok(())
            }
            FrameKind::Grant => {
                self.on_grant(header.epoch);
                Ok(())
            }
            FrameKind::Ping => {
                let mut pong = Header::new(FrameKind::Pong);
                pong.txid = header.txid;
                if let Some(client) = &mut self.client
                    && let Some(conn) = &mut client.channel(channel).conn
                {
                    conn.send(pong, &[])?;
                }
                Ok(())
            }
            FrameKind::Pong => Ok(()),
            FrameKind::Bye => Err(ConnError::Closed),
            _ => Err(belay_wire::FrameError::Payload("a frame that only clients send").into()),
        }
    }

    fn on_opened(&mut self, channel: Channel, above: TxId, opened: &Opened) {
        let Some(client) = &mut self.client else { return };
        let peer = client.peer.clone();
        client.channel(channel).open = true;
        if channel == Channel::Copier {
            self.send_outstanding(channel, true);
            return;
        }
        self.notice(Notice::Link { peer, up: true, reason: None });
        // An earlier process of this host has drawn numbers that the backing's host still knows.
        self.next_tx = self.next_tx.max(above);
        if !std::mem::replace(&mut self.numbers_known, true) {
            self.start_waiting_rings();
        }
        if self.is_successor() {
            self.notice(Notice::Prepared { size_bytes: opened.size_bytes });
            self.successor_connection(true);
        } else {
            self.send_outstanding(channel, true);
            self.borrower_connected();
        }
    }

    fn on_refused(&mut self, channel: Channel, refusal: Refusal, epoch: Epoch, reason: &str) {
        tracing::warn!(device = %self.identity.name, ?channel, %refusal, reason, "the backing's host refused");
        let (now, successor) = (self.now, self.is_successor());
        let Some(client) = &mut self.client else { return };
        let peer = client.peer.clone();
        let state = client.channel(channel);
        state.conn = None;
        state.open = false;
        state.asked = false;
        if refusal == Refusal::NotReady {
            state.retry_at = Some(now + NOT_READY_RETRY);
            return;
        }
        // A guest that is here waits for its backing, whatever its host says now; one that may come does not.
        state.retry_at = (!successor).then_some(now + REFUSED_RETRY);
        state.asked = successor;
        self.notice(Notice::PeerRefused { peer, refusal, reason: reason.to_owned() });
        if refusal == Refusal::StaleEpoch && !successor {
            self.on_taken(epoch);
        }
        self.successor_refused(refusal);
    }

    fn on_reply(&mut self, channel: Channel, header: Header, payload: &[u8]) -> Result<(), ConnError> {
        let Some(client) = &mut self.client else { return Ok(()) };
        let state = client.channel(channel);
        // An answer that was on its way when the request was sent again comes twice.
        let Some(request) = state.outstanding.remove(&header.txid) else { return Ok(()) };
        let zero = header.flags & flags::ZERO != 0;
        let mut status = status_of(header.status);
        let mut extents = Vec::new();
        match request.kind {
            RemoteKind::Op(OpKind::Read) if status == Status::Ok => {
                if zero {
                    request.buf.zero(0, request.buf.len());
                } else if header.payload_len as usize != request.buf.len() {
                    status = Status::Failed { errno: libc::EIO };
                }
            }
            RemoteKind::Extents => extents = decode_extents(payload)?,
            RemoteKind::Op(_) => {}
        }
        self.remote_done(RemoteDone {
            owner: request.owner,
            status,
            zero,
            was_extents: request.kind == RemoteKind::Extents,
            extents,
        });
        if channel == Channel::Guest { self.acknowledge() } else { Ok(()) }
    }

    /// Tells the backing's host, now and then, what the guest has been told the end of.
    fn acknowledge(&mut self) -> Result<(), ConnError> {
        let (next, epoch) = (self.next_tx, self.request_epoch());
        let lowest = self.requests.lowest();
        let Some(client) = &mut self.client else { return Ok(()) };
        let state = &mut client.guest;
        state.finished_since_ack += 1;
        if state.finished_since_ack < ACK_EVERY {
            return Ok(());
        }
        state.finished_since_ack = 0;
        let mut ack = Header::new(FrameKind::Ack);
        // What has ended while its ring is stopped may have to be known by whoever takes the guest over.
        ack.txid = lowest.map_or(state.low_water(next), |lowest| lowest.min(state.low_water(next)));
        ack.epoch = epoch;
        if let Some(conn) = &mut state.conn {
            conn.send(ack, &[])?;
        }
        Ok(())
    }
}

impl RemoteRequest {
    pub(crate) fn new(kind: RemoteKind, offset: u64, len: u64, buf: Buf, owner: RemoteOwner) -> Self {
        Self { kind, offset, len, buf, owner, sent: false }
    }
}

fn decode_extents(payload: &[u8]) -> Result<Vec<std::ops::Range<u64>>, ConnError> {
    if !payload.len().is_multiple_of(16) {
        return Err(belay_wire::FrameError::Payload("extents of odd length").into());
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    Ok(payload.chunks_exact(16).map(|pair| number(&pair[..8])..number(&pair[8..])).collect())
}

fn send_request(
    conn: &mut DataConn,
    txid: TxId,
    epoch: Epoch,
    request: &RemoteRequest,
    repeated: u16,
) -> Result<(), ConnError> {
    let kind = match request.kind {
        RemoteKind::Extents => FrameKind::Extents,
        RemoteKind::Op(OpKind::Read) => FrameKind::Read,
        RemoteKind::Op(OpKind::Write) => FrameKind::Write,
        RemoteKind::Op(OpKind::Flush) => FrameKind::Flush,
        RemoteKind::Op(OpKind::Discard) => FrameKind::Discard,
        RemoteKind::Op(OpKind::WriteZeroes { .. }) => FrameKind::WriteZeroes,
    };
    let mut header = Header::new(kind);
    header.txid = txid;
    header.epoch = epoch;
    header.offset = request.offset;
    header.len = request.len;
    header.flags = repeated;
    if let RemoteKind::Op(OpKind::WriteZeroes { unmap: true }) = request.kind {
        header.flags |= flags::UNMAP;
    }
    if kind == FrameKind::Write { conn.send_buf(header, &request.buf) } else { conn.send(header, &[]) }
}
