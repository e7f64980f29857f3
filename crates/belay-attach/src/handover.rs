//! Carries out what the handover's machines decide.

use std::time::Instant;

use belay_block::Buf;
use belay_handover::handover::{
    Borrower, BorrowerAction, BorrowerEvent, Destination, DestinationAction, DestinationEvent, RingStart,
    Source, SourceAction, SourceEvent,
};
use belay_wire::control::Channel;
use belay_wire::{Epoch, FrameKind, Header, InflightList, QueueBase, QueueIndex, Refusal};

use crate::client::{Client, RemoteKind, RemoteOwner, RemoteRequest};
use crate::device::{Device, Serving};
use crate::handle::{Notice, Role};
use crate::port::Start;
use crate::stats::since;

/// The machine of whichever side this host is on.
pub(crate) enum Handover {
    /// This host has the backing: the guest is here, or was, and may come home.
    Source(Source),
    /// The guest may come.
    Destination(Destination),
    /// The guest is here, the backing elsewhere.
    Remote(Borrower),
}

impl Handover {
    /// The machine, the client and the borrower of a device that starts in this role.
    pub(crate) fn of_role(role: Role, epoch: Epoch) -> (Self, Option<Client>, Option<String>) {
        match role {
            Role::Local => (Self::Source(numbered_source(Source::serving(epoch))), None, None),
            Role::Lent { to } => {
                (Self::Source(numbered_source(Source::granted(to.clone(), epoch))), None, Some(to))
            }
            Role::Successor { from } => {
                (Self::Destination(Destination::prepared(epoch)), Some(Client::new(from)), None)
            }
            Role::Remote { backing } => {
                (Self::Remote(Borrower::serving(epoch, false)), Some(Client::new(backing)), None)
            }
        }
    }
}

/// Numbers its lists as no other process of this host does: from a random number on, far from the end.
pub(crate) fn numbered_source(source: Source) -> Source {
    source.numbering_from(rand::random::<u64>() >> 1)
}

/// A message about the list of this number.
fn numbered(kind: FrameKind, generation: u64) -> Header {
    let mut header = Header::new(kind);
    header.txid = belay_wire::TxId(generation);
    header
}

/// A claim that has not been answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenClaim {
    pub(crate) since: Instant,
    pub(crate) in_flight: u64,
}

impl Device {
    /// Whom this host serves now.
    pub(crate) fn serving(&self) -> Serving {
        match &self.handover {
            _ if self.retired => Serving::Nobody,
            Handover::Source(source) if source.may_serve() => Serving::Guest,
            Handover::Source(_) => Serving::Nobody,
            Handover::Destination(destination) if destination.has_claimed() => Serving::Guest,
            Handover::Destination(_) => Serving::Successor,
            Handover::Remote(borrower) if borrower.may_serve() => Serving::Guest,
            Handover::Remote(_) => Serving::Nobody,
        }
    }

    /// Whether what this host's VMM says of its guest's requests counts: they are in nobody else's hands.
    pub(crate) fn owns_guest(&self) -> bool {
        match &self.handover {
            Handover::Source(source) => source.may_serve(),
            Handover::Destination(_) => true,
            Handover::Remote(borrower) => !borrower.is_gone(),
        }
    }

    /// Whether requests of the host that the device is lent to are executed.
    pub(crate) fn serves_borrower(&self) -> bool {
        matches!(&self.handover, Handover::Source(source) if source.serves_borrower())
    }

    pub(crate) fn state_name(&self) -> &'static str {
        if self.retired {
            return "retired";
        }
        if let Some(exchange) = &self.exchange {
            return exchange.name();
        }
        match &self.handover {
            Handover::Source(source) => source.name(),
            Handover::Destination(destination) => destination.name(),
            Handover::Remote(borrower) => borrower.name(),
        }
    }

    /// The host that this device is offered to.
    pub(crate) fn offered_to(&self) -> Option<&str> {
        match &self.handover {
            Handover::Source(source) => source.successor(),
            _ => None,
        }
    }

    pub(crate) fn is_successor(&self) -> bool {
        matches!(&self.handover, Handover::Destination(destination) if !destination.is_attached())
    }

    /// The epoch of requests to the backing.
    pub(crate) fn request_epoch(&self) -> Epoch {
        match &self.handover {
            Handover::Destination(destination) => destination.epoch(),
            _ => self.epoch,
        }
    }

    /// Whether requests may go to the backing: from the claim on.
    pub(crate) fn may_send_requests(&self) -> bool {
        match &self.handover {
            Handover::Destination(destination) => destination.has_claimed(),
            _ => true,
        }
    }

    // --- source ---

    fn source_event(&mut self, event: SourceEvent) -> Result<(), Refusal> {
        let Handover::Source(source) = &self.handover else { return Err(Refusal::WrongState) };
        let (next, actions) = source.clone().handle(event);
        tracing::debug!(device = %self.identity.name, state = next.name(), ?actions, "handover");
        self.handover = Handover::Source(next);
        let mut outcome = Ok(());
        for action in actions {
            outcome = outcome.and(self.source_action(action));
        }
        outcome
    }

    fn source_action(&mut self, action: SourceAction) -> Result<(), Refusal> {
        match action {
            SourceAction::SendList { list, generation } => {
                self.tell_successor(numbered(FrameKind::List, generation), &list.encode());
            }
            SourceAction::RevokeList => self.tell_successor(Header::new(FrameKind::ListRevoked), &[]),
            SourceAction::Fence => {}
            SourceAction::Unfence => self.start_waiting_rings(),
            SourceAction::PersistGrant { to, epoch } => {
                let in_flight = self.requests.live() as u64;
                self.notice(Notice::Claimed { by: to, epoch, in_flight });
            }
            SourceAction::Lend { to, epoch } => self.lend(&to, epoch),
            SourceAction::SendGrant(epoch) => {
                self.send_grant();
                self.notice(Notice::Granted { epoch });
            }
            SourceAction::Refuse(refusal) => return Err(refusal),
            SourceAction::Withdrawn => {
                self.server.sessions.clear();
                self.notice(Notice::Withdrawn);
            }
            SourceAction::WithdrawTooLate => self.notice(Notice::WithdrawTooLate),
            SourceAction::AckRevoke { generation } => {
                self.tell_successor(numbered(FrameKind::ListRevoked, generation), &[]);
            }
            SourceAction::MarkRing { ring, adopted } => {
                if let Some(ring) = self.port.ring(ring.queue.0) {
                    adopted.iter().for_each(|listed| ring.mark(listed.head.0, listed.txid.0));
                }
            }
            SourceAction::PersistReturn { from, epoch } => {
                self.open_claim = Some(OpenClaim { since: self.now, in_flight: 0 });
                self.notice(Notice::Returning { from, epoch });
            }
            SourceAction::DropBorrower => self.server.sessions.clear(),
            SourceAction::TakeBack { epoch, .. } => self.take_back(epoch),
            SourceAction::RunRing { ring, adopted } => self.run_returned(ring, &adopted),
            SourceAction::SendTaken(epoch) => {
                self.send_taken(epoch);
                let claim = self.open_claim.take();
                self.notice(Notice::Returned {
                    epoch,
                    in_flight: claim.map_or(0, |claim| claim.in_flight),
                    grant_ms: claim.map_or(0.0, |claim| since(self.now, claim.since).as_secs_f64() * 1e3),
                });
            }
            SourceAction::Misfit { queue, reason } => {
                tracing::error!(device = %self.identity.name, %queue, reason, "a ring cannot be served");
                self.notice(Notice::HandoverFailed { reason });
            }
        }
        Ok(())
    }

    fn tell_successor(&mut self, mut header: Header, payload: &[u8]) {
        header.epoch = self.epoch;
        let now = self.now;
        if let Some(session) = self.server.guest_session() {
            // At once: the destination waits for nothing else.
            let sent = session.conn.send(header, payload).and_then(|()| session.conn.flush(now));
            if let Err(error) = sent {
                tracing::warn!(device = %self.identity.name, %error, "the successor could not be told");
            }
        }
    }

    pub(crate) fn offer(&mut self, to: String) {
        if matches!(self.handover, Handover::Remote(_)) {
            self.offer_home(to);
        } else {
            let _ = self.source_event(SourceEvent::Offer { to });
        }
    }

    pub(crate) fn withdraw(&mut self) {
        let _ = self.source_event(SourceEvent::Withdraw);
        self.borrower_event(BorrowerEvent::Withdraw);
    }

    /// Claims the device for the host that it is offered to.
    pub(crate) fn give_away(&mut self) {
        let claim = match &self.handover {
            Handover::Source(source) => source.claim_of_unused(),
            _ => None,
        };
        if let Some(claim) = claim {
            let _ = self.source_event(claim);
        }
    }

    pub(crate) fn successor_opened(&mut self) {
        let _ = self.source_event(SourceEvent::SuccessorOpened);
    }

    pub(crate) fn claim(&mut self, by: String, epoch: Epoch, generation: u64) -> Result<(), Refusal> {
        self.source_event(SourceEvent::Claim { by, epoch, generation })
    }

    pub(crate) fn borrower_opened(&mut self) {
        let _ = self.source_event(SourceEvent::BorrowerOpened);
    }

    pub(crate) fn borrower_list(&mut self, list: InflightList, generation: u64) {
        let _ = self.source_event(SourceEvent::BorrowerList { list, generation });
    }

    pub(crate) fn borrower_revoked(&mut self, generation: u64) {
        let _ = self.source_event(SourceEvent::BorrowerRevoked { generation });
    }

    pub(crate) fn return_durable(&mut self, epoch: Epoch) {
        let _ = self.source_event(SourceEvent::ReturnDurable(epoch));
    }

    pub(crate) fn return_failed(&mut self, epoch: Epoch, reason: &str) {
        tracing::error!(device = %self.identity.name, %epoch, reason, "the return could not be written");
        let _ = self.source_event(SourceEvent::ReturnFailed(epoch));
    }

    pub(crate) fn grant_durable(&mut self, epoch: Epoch) {
        let _ = self.source_event(SourceEvent::GrantDurable(epoch));
    }

    pub(crate) fn grant_failed(&mut self, epoch: Epoch, reason: &str) {
        tracing::error!(device = %self.identity.name, %epoch, reason, "the grant could not be written");
        if let Err(refusal) = self.source_event(SourceEvent::GrantFailed(epoch)) {
            let key =
                self.server.guest_session().map(|session| session.id).and_then(|id| self.server.by_id(id));
            if let Some(mut session) = key.and_then(|key| self.server.sessions.try_remove(key)) {
                self.refuse(&mut session.conn, refusal);
            }
        }
    }

    /// The last running ring has stopped.
    pub(crate) fn rings_all_stopped(&mut self) {
        let list = self.inflight_list();
        self.notice(Notice::RingsStopped { in_flight: list.requests.len() as u64 });
        let _ = self.source_event(SourceEvent::RingsStopped(list.clone()));
        self.borrower_event(BorrowerEvent::RingsStopped(list));
    }

    /// A ring runs.
    pub(crate) fn rings_started(&mut self) {
        self.notice(Notice::RingsStarted);
        let _ = self.source_event(SourceEvent::RingsStarted);
        self.borrower_event(BorrowerEvent::RingsStarted);
    }

    fn inflight_list(&self) -> InflightList {
        let queues = self
            .port
            .queues
            .iter()
            .enumerate()
            .filter_map(|(index, queue)| {
                queue.stopped_at().map(|base| QueueBase { queue: QueueIndex(index as u16), base })
            })
            .collect();
        let mut requests = self.requests.list();
        requests.extend(self.port.lost());
        requests.sort_by_key(|request| request.txid);
        InflightList { queues, requests }
    }

    /// Whether the start of a ring is the machine's to decide; then it has been told.
    pub(crate) fn handover_decides_start(&mut self, index: u16, start: Start) -> bool {
        let size = self.port.ring(index).map_or(0, |ring| ring.size());
        let queue = QueueIndex(index);
        let ring = RingStart { queue, size, base: start.base, used: start.used };
        match &self.handover {
            _ if self.retired => {}
            Handover::Source(source) if source.decides_start_of(queue) => {
                tracing::debug!(device = %self.identity.name, queue = index, state = source.name(), "a ring was started while the device is elsewhere");
                let _ = self.source_event(SourceEvent::RingWaits(ring));
            }
            Handover::Destination(_) => self.destination_event(DestinationEvent::RingStarted(ring)),
            Handover::Remote(borrower) if !borrower.may_serve() => {
                self.borrower_event(BorrowerEvent::RingWaits);
            }
            Handover::Source(_) | Handover::Remote(_) => return false,
        }
        true
    }

    /// A ring is started no more: stopped, or its VMM is gone.
    pub(crate) fn ring_left(&mut self, index: u16) {
        let queue = QueueIndex(index);
        self.destination_event(DestinationEvent::RingStopped(queue));
        let _ = self.source_event(SourceEvent::RingLeft(queue));
    }

    // --- borrower ---

    fn borrower_event(&mut self, event: BorrowerEvent) {
        let Handover::Remote(borrower) = &self.handover else { return };
        let (next, actions) = borrower.clone().handle(event);
        if !actions.is_empty() {
            tracing::debug!(device = %self.identity.name, state = next.name(), ?actions, "handover");
        }
        self.handover = Handover::Remote(next);
        for action in actions {
            self.borrower_action(action);
        }
    }

    fn borrower_action(&mut self, action: BorrowerAction) {
        match action {
            BorrowerAction::Ready => {
                if let Some(client) = self.client.as_ref().filter(|client| client.guest.is_up()) {
                    let peer = client.peer.clone();
                    self.notice(Notice::SuccessorReady { peer });
                }
            }
            BorrowerAction::SendList { list, generation } => {
                self.tell_backing(numbered(FrameKind::List, generation), &list.encode());
                self.notice(Notice::Listed { list });
            }
            BorrowerAction::SendRevoke { generation } => {
                self.tell_backing(numbered(FrameKind::ListRevoked, generation), &[]);
            }
            BorrowerAction::Unfence => self.start_waiting_rings(),
            BorrowerAction::Release(epoch) => {
                self.stop_serving();
                self.client = None;
                self.drop_exchange();
                self.notice(Notice::Taken { epoch });
            }
            BorrowerAction::Withdrawn => {
                self.hold_cut(false);
                self.notice(Notice::Withdrawn);
            }
            BorrowerAction::WithdrawTooLate => self.notice(Notice::WithdrawTooLate),
        }
    }

    /// The guest may go home, to where its backing is.
    fn offer_home(&mut self, to: String) {
        let backed_there = self.client.as_ref().is_some_and(|client| client.peer == to);
        if !backed_there || !self.hold_cut(true) {
            let reason =
                "it can go only to the host that has its backing, and not while its copy is cut over";
            self.notice(Notice::HandoverFailed { reason: reason.to_owned() });
            return;
        }
        self.borrower_event(BorrowerEvent::Offer { to });
    }

    /// What an earlier process of this host knew to be in flight.
    pub(crate) fn remember(&mut self, list: InflightList) {
        self.borrower_event(BorrowerEvent::Remembered(list));
    }

    pub(crate) fn borrower_connected(&mut self) {
        self.borrower_event(BorrowerEvent::Connected);
    }

    pub(crate) fn on_taken(&mut self, epoch: Epoch) {
        self.borrower_event(BorrowerEvent::Taken(epoch));
    }

    /// Whether the guest may go home: its backing stays where it is.
    pub(crate) fn is_going_home(&self) -> bool {
        matches!(&self.handover, Handover::Remote(borrower) if borrower.is_offered())
    }

    /// A message of the handover to the backing's host, at once; without a connection it comes with the next one.
    fn tell_backing(&mut self, mut header: Header, payload: &[u8]) {
        header.epoch = self.epoch;
        let now = self.now;
        let Some(client) = self.client.as_mut().filter(|client| client.guest.is_up()) else { return };
        let Some(conn) = &mut client.guest.conn else { return };
        if let Err(error) = conn.send(header, payload).and_then(|()| conn.flush(now)) {
            self.lose_connection(Channel::Guest, &error.to_string());
        }
    }

    // --- destination ---

    fn destination_event(&mut self, event: DestinationEvent) {
        let Handover::Destination(destination) = &self.handover else { return };
        let (next, actions) = destination.clone().handle(event);
        tracing::debug!(device = %self.identity.name, state = next.name(), ?actions, "handover");
        self.handover = Handover::Destination(next);
        for action in actions {
            self.destination_action(action);
        }
    }

    fn destination_action(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::SendClaim { epoch, generation } => {
                let mut claim = numbered(FrameKind::Claim, generation);
                claim.epoch = epoch;
                self.next_tx = self.next_tx.max(belay_wire::TxId::first_of(epoch));
                self.open_claim.get_or_insert(OpenClaim { since: self.now, in_flight: 0 });
                self.send_to_backing(claim);
                // On a new connection also what was sent behind the claim on the one before.
                self.send_outstanding(Channel::Guest, true);
            }
            DestinationAction::RefuseRing { queue, reason } => {
                tracing::error!(device = %self.identity.name, %queue, reason, "a ring cannot be served");
            }
            DestinationAction::RunRing { ring, adopted } => self.run_adopted(ring, &adopted),
            DestinationAction::Attached(epoch) => {
                self.epoch = epoch;
                let running = self.port.running() > 0;
                self.handover = Handover::Remote(Borrower::serving(epoch, running));
                self.next_tx = self.next_tx.max(belay_wire::TxId::first_of(epoch));
                let claim = self.open_claim.take();
                self.notice(Notice::Attached {
                    epoch,
                    in_flight: claim.map_or(0, |claim| claim.in_flight),
                    grant_ms: claim.map_or(0.0, |claim| since(self.now, claim.since).as_secs_f64() * 1e3),
                });
            }
            DestinationAction::Fail(reason) => {
                tracing::error!(device = %self.identity.name, reason, "the handover failed");
                self.notice(Notice::HandoverFailed { reason });
            }
        }
    }

    /// Lets a ring run whose requests in flight are at the source.
    fn run_adopted(&mut self, ring: RingStart, adopted: &[belay_wire::ListedRequest]) {
        let index = ring.queue.0;
        if adopted.is_empty() {
            self.start_waiting(index);
            return;
        }
        for listed in adopted {
            match self.adopt(index, listed) {
                Ok(key) => {
                    self.seen_txid(listed.txid);
                    let Some(request) = self.requests.get(key) else { continue };
                    let buf = if request.kind == belay_block::OpKind::Read
                        || request.kind == belay_block::OpKind::Write
                    {
                        request.data.clone()
                    } else {
                        Buf::default()
                    };
                    let remote = RemoteRequest::new(
                        RemoteKind::Op(request.kind),
                        request.offset,
                        request.len,
                        buf,
                        RemoteOwner::Guest(key),
                    );
                    self.adopt_remote(listed.txid, remote);
                    self.late_elder(key);
                }
                Err(reason) => {
                    // The list has been checked against the ring; only a guest that rewrites its descriptors
                    // under way comes here. It loses this request's completion, as it would on real hardware.
                    tracing::error!(device = %self.identity.name, reason, "a listed request cannot be taken over");
                    self.lose(index, listed.head.0, listed.txid);
                }
            }
        }
        if let Some(claim) = &mut self.open_claim {
            claim.in_flight += adopted.len() as u64;
        }
        self.run_ring(index, ring.base);
    }

    pub(crate) fn successor_connection(&mut self, up: bool) {
        if up {
            self.destination_event(DestinationEvent::ConnectionUp);
        }
    }

    pub(crate) fn successor_refused(&mut self, refusal: Refusal) {
        self.destination_event(DestinationEvent::Refused(refusal));
    }

    pub(crate) fn on_list(&mut self, list: InflightList, generation: u64) {
        self.destination_event(DestinationEvent::List { list, generation });
    }

    pub(crate) fn on_list_revoked(&mut self, generation: u64) {
        self.destination_event(DestinationEvent::ListRevoked);
        self.borrower_event(BorrowerEvent::Revoked { generation });
    }

    pub(crate) fn on_grant(&mut self, epoch: Epoch) {
        self.destination_event(DestinationEvent::Grant(epoch));
        // After a connection that was lost behind the claim: what was sent on it is sent again.
        self.send_outstanding(Channel::Guest, false);
    }
}
