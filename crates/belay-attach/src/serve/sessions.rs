//! Peers that connect, and what they may: claims, grants, the way home.

use belay_block::{Buf, OpKind, Status};
use belay_wire::control::{Channel, Open, Opened};
use belay_wire::{Epoch, FrameKind, Header, InflightList, Refusal, TxId};

use super::{Entry, FRAMES_PER_TURN, Session, Standing};
use crate::conn::{ConnError, DataConn, PeerSocket, Received};
use crate::device::Device;
use crate::handle::Notice;

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

    pub(super) fn send_on(&mut self, key: usize, header: Header, payload: &[u8]) {
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
}
