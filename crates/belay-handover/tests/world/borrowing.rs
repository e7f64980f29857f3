//! Host B: what it does with the destination's machine, and the borrower's.

use belay_handover::handover::{
    Borrower, BorrowerAction, BorrowerEvent, Destination, DestinationAction, DestinationEvent,
};
use belay_wire::{Epoch, InflightList, QueueIndex, Refusal};

use super::lending::pairs;
use super::{At, Borrowed, Machine, QUEUES, ToA, ToB, World};

impl World {
    fn destination_event(&mut self, event: DestinationEvent) {
        let Some(Machine::Coming(destination)) = &self.machine else { return };
        let (next, actions) = destination.clone().handle(event);
        self.machine = Some(Machine::Coming(next));
        for action in actions {
            self.note(|| format!("  B: {action:?}"));
            match action {
                DestinationAction::SendClaim { epoch, generation } => {
                    self.claimed = true;
                    self.send_a(ToA::Claim(epoch, generation));
                }
                DestinationAction::RunRing { ring, adopted } => {
                    let queue = usize::from(ring.queue.0);
                    let waiting = self.ports[1].waiting[queue].take();
                    let marked = waiting.map_or_else(Vec::new, |(_, marked)| marked);
                    // Before the grant a wrong start harms nobody: nothing that it takes is executed.
                    let (port, vm) = (&mut self.ports[1], &mut self.vms[1]);
                    let started = if !adopted.is_empty() {
                        port.try_run(vm, queue, ring.base, &pairs(&adopted))
                    } else {
                        port.try_start(vm, queue, ring, &marked)
                    };
                    self.wrong = self.wrong.take().or(started.err());
                }
                DestinationAction::RefuseRing { queue, reason } => {
                    let heads = &self.vms[1].rings[usize::from(queue.0)].heads;
                    if !heads.is_empty() {
                        self.wrong = Some(reason);
                    }
                }
                DestinationAction::Attached(epoch) => {
                    self.vms[1].behind_claim = Default::default();
                    let runs = self.ports[1].runs.iter().any(|runs| *runs);
                    self.machine = Some(Machine::Here(Borrower::serving(epoch, runs)));
                    self.recording = Some(Borrowed::Remote(epoch));
                }
                DestinationAction::Fail(_) => {}
            }
        }
        let attached = matches!(self.machine, Some(Machine::Here(_)));
        assert!(!attached || self.wrong.is_none(), "granted: {}", self.wrong.as_deref().unwrap_or_default());
    }

    fn borrower_event(&mut self, event: BorrowerEvent) {
        let Some(Machine::Here(borrower)) = &self.machine else { return };
        let (next, actions) = borrower.clone().handle(event);
        self.machine = Some(Machine::Here(next));
        for action in actions {
            self.note(|| format!("  B: {action:?}"));
            match action {
                BorrowerAction::Ready => self.ready_home |= self.link.is_some(),
                BorrowerAction::WithdrawTooLate => {}
                BorrowerAction::SendList { list, generation } => self.send_a(ToA::List(list, generation)),
                BorrowerAction::SendRevoke { generation } => self.send_a(ToA::Revoke(generation)),
                BorrowerAction::Unfence => (0..QUEUES).for_each(|queue| self.start_at_b(queue)),
                BorrowerAction::Release(_) => self.forget_b(),
                BorrowerAction::Withdrawn => {
                    self.going_home = false;
                    self.ready_home = false;
                }
            }
        }
    }

    fn send_a(&mut self, message: ToA) {
        if let Some(link) = &mut self.link {
            link.to_a.push_back(message);
        }
    }

    /// Nothing of the device is at B any more.
    pub(super) fn forget_b(&mut self) {
        if self.machine.is_some() {
            self.machine = Some(Machine::Gone);
        }
        self.borrowed = Borrowed::Nothing;
        self.recording = None;
        self.wrong = None;
        self.ports[1] = super::Port::default();
        self.vms[1].started = Default::default();
        self.going_home = false;
        self.ready_home = false;
        self.link = None;
    }

    pub(super) fn prepare_b(&mut self, epoch: Epoch) {
        self.borrowed = Borrowed::Prepared(epoch);
        self.machine = Some(Machine::Coming(Destination::prepared(epoch)));
        self.ports[1] = super::Port::default();
        self.wrong = None;
        self.link = None;
        self.numbers_known = true;
    }

    pub(super) fn revive_b(&mut self) {
        if self.machine.is_some() {
            return;
        }
        self.note(|| "B is back".into());
        self.machine = Some(match self.borrowed {
            Borrowed::Nothing => Machine::Gone,
            Borrowed::Prepared(epoch) => Machine::Coming(Destination::prepared(epoch)),
            Borrowed::Remote(epoch) => Machine::Here(Borrower::serving(epoch, false)),
        });
        self.numbers_known = !matches!(self.borrowed, Borrowed::Remote(_));
        if self.going_home {
            self.borrower_event(BorrowerEvent::Offer { to: "a".into() });
        }
    }

    /// B's ledger is written.
    pub(super) fn record(&mut self) {
        if let Some(recorded) = self.recording.take() {
            self.borrowed = recorded;
        }
    }

    pub(super) fn start_at_b(&mut self, queue: usize) {
        let Some((start, marked)) = self.ports[1].waiting[queue].clone() else { return };
        if !self.numbers_known {
            return;
        }
        match &self.machine {
            Some(Machine::Coming(_)) => self.destination_event(DestinationEvent::RingStarted(start)),
            Some(Machine::Here(borrower)) if borrower.may_serve() => {
                self.ports[1].start(&mut self.vms[1], queue, start, &marked, At::B);
                self.borrower_event(BorrowerEvent::RingsStarted);
            }
            Some(Machine::Here(_)) => self.borrower_event(BorrowerEvent::RingWaits),
            Some(Machine::Gone) | None => {}
        }
    }

    pub(super) fn ring_left_b(&mut self, queue: usize) {
        self.destination_event(DestinationEvent::RingStopped(QueueIndex(queue as u16)));
    }

    pub(super) fn rings_stopped_b(&mut self, list: InflightList) {
        self.borrower_event(BorrowerEvent::RingsStopped(list));
    }

    pub(super) fn offer_home(&mut self) {
        if self.at == At::B && self.recording.is_none() {
            self.going_home = true;
            self.borrower_event(BorrowerEvent::Offer { to: "a".into() });
        }
    }

    pub(super) fn withdraw_home(&mut self) {
        self.borrower_event(BorrowerEvent::Withdraw);
    }

    /// B connects to A, if it has reason to.
    pub(super) fn connect(&mut self) {
        if self.link.is_some() {
            return;
        }
        let epoch = match &self.machine {
            Some(Machine::Coming(destination)) => {
                if destination.name() == "failed" {
                    return;
                }
                // The epoch of its ledger: what it has claimed is not its own yet.
                match self.borrowed {
                    Borrowed::Prepared(epoch) => epoch,
                    _ => return,
                }
            }
            Some(Machine::Here(_)) => match self.recording.unwrap_or(self.borrowed) {
                Borrowed::Remote(epoch) => epoch,
                _ => return,
            },
            Some(Machine::Gone) | None => return,
        };
        match self.accept(epoch) {
            None => {}
            Some(Ok(())) => {
                self.numbers_known = true;
                for queue in 0..QUEUES {
                    if matches!(self.machine, Some(Machine::Here(_))) {
                        self.start_at_b(queue);
                    }
                }
                self.destination_event(DestinationEvent::ConnectionUp);
                self.borrower_event(BorrowerEvent::Connected);
            }
            Some(Err((refusal, epoch))) => self.refused(refusal, epoch),
        }
    }

    fn refused(&mut self, refusal: Refusal, epoch: Epoch) {
        self.link = None;
        if refusal == Refusal::NotReady {
            return;
        }
        if refusal == Refusal::StaleEpoch {
            self.borrower_event(BorrowerEvent::Taken(epoch));
        }
        self.destination_event(DestinationEvent::Refused(refusal));
    }

    pub(super) fn deliver_to_b(&mut self) {
        if self.machine.is_none() {
            return;
        }
        let Some(message) = self.link.as_mut().and_then(|link| link.to_b.pop_front()) else { return };
        match message {
            ToB::List(list, generation) => {
                self.destination_event(DestinationEvent::List { list, generation })
            }
            ToB::Revoked(generation) => {
                self.destination_event(DestinationEvent::ListRevoked);
                self.borrower_event(BorrowerEvent::Revoked { generation });
            }
            ToB::Grant(epoch) => self.destination_event(DestinationEvent::Grant(epoch)),
            ToB::Taken(epoch) => self.borrower_event(BorrowerEvent::Taken(epoch)),
            ToB::Refused(refusal, epoch) => self.refused(refusal, epoch),
        }
    }
}
