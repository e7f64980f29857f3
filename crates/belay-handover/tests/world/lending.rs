//! Host A: what it does with the source's machine.

use belay_handover::handover::{Source, SourceAction, SourceEvent};
use belay_wire::{Epoch, InflightList, ListedRequest, QueueIndex, Refusal};

use super::{At, Ledger, Link, Machine, ToA, ToB, World};

const B: &str = "b";

pub(super) fn pairs(requests: &[ListedRequest]) -> Vec<(u16, u64)> {
    requests.iter().map(|request| (request.head.0, request.txid.0)).collect()
}

impl World {
    fn source_event(&mut self, event: SourceEvent) {
        let Some(source) = self.source.clone() else { return };
        let (next, actions) = source.handle(event);
        self.source = Some(next);
        for action in actions {
            self.source_action(action);
        }
    }

    fn send_b(&mut self, message: ToB) {
        if let Some(link) = &mut self.link {
            link.to_b.push_back(message);
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        self.note(|| format!("  A: {action:?}"));
        match action {
            SourceAction::SendList { list, generation } => self.send_b(ToB::List(list, generation)),
            SourceAction::RevokeList => self.send_b(ToB::Revoked(0)),
            SourceAction::AckRevoke { generation } => self.send_b(ToB::Revoked(generation)),
            SourceAction::Fence | SourceAction::Lend { .. } | SourceAction::TakeBack { .. } => {}
            SourceAction::Unfence => (0..super::QUEUES).for_each(|queue| self.start_at_a(queue)),
            SourceAction::PersistGrant { epoch, .. } => self.writing = Some(Ledger::Lent(epoch)),
            SourceAction::PersistReturn { epoch, .. } => self.writing = Some(Ledger::Local(epoch)),
            SourceAction::SendGrant(epoch) => self.send_b(ToB::Grant(epoch)),
            SourceAction::SendTaken(epoch) => self.send_b(ToB::Taken(epoch)),
            SourceAction::Refuse(refusal) => {
                let epoch = self.epoch();
                self.send_b(ToB::Refused(refusal, epoch));
            }
            SourceAction::DropBorrower => self.link = None,
            SourceAction::Withdrawn => {
                self.offered = false;
                self.forget_b();
            }
            SourceAction::WithdrawTooLate => {}
            SourceAction::MarkRing { ring, adopted } => {
                self.vms[0].marked[usize::from(ring.queue.0)] = pairs(&adopted);
            }
            SourceAction::RunRing { ring, adopted } => {
                let queue = usize::from(ring.queue.0);
                let marked = self.ports[0].waiting[queue].take().map_or_else(Vec::new, |(_, marked)| marked);
                if adopted.is_empty() {
                    self.ports[0].start(&mut self.vms[0], queue, ring, &marked, At::A);
                } else {
                    self.ports[0].run(&mut self.vms[0], queue, ring.base, &pairs(&adopted), At::A);
                }
                self.source_event(SourceEvent::RingsStarted);
            }
            SourceAction::Misfit { .. } => {}
        }
    }

    fn epoch(&self) -> Epoch {
        match self.ledger {
            Ledger::Local(epoch) | Ledger::Lent(epoch) => epoch,
        }
    }

    pub(super) fn start_at_a(&mut self, queue: usize) {
        let Some((start, marked)) = self.ports[0].waiting[queue].clone() else { return };
        let Some(source) = &self.source else { return };
        if source.decides_start_of(QueueIndex(queue as u16)) {
            self.source_event(SourceEvent::RingWaits(start));
            return;
        }
        self.ports[0].start(&mut self.vms[0], queue, start, &marked, At::A);
        self.source_event(SourceEvent::RingsStarted);
    }

    pub(super) fn ring_left(&mut self, at: At, queue: usize) {
        match at {
            At::A => self.source_event(SourceEvent::RingLeft(QueueIndex(queue as u16))),
            At::B => self.ring_left_b(queue),
        }
    }

    pub(super) fn rings_stopped(&mut self, at: At, list: InflightList) {
        match at {
            At::A => self.source_event(SourceEvent::RingsStopped(list)),
            At::B => self.rings_stopped_b(list),
        }
    }

    /// A's ledger has been written, or could not be.
    pub(super) fn ledger_written(&mut self, well: bool) {
        let Some(written) = self.writing.take() else { return };
        if well {
            self.commit(written);
        }
        self.source_event(match (written, well) {
            (Ledger::Lent(epoch), true) => SourceEvent::GrantDurable(epoch),
            (Ledger::Lent(epoch), false) => SourceEvent::GrantFailed(epoch),
            (Ledger::Local(epoch), true) => SourceEvent::ReturnDurable(epoch),
            (Ledger::Local(epoch), false) => SourceEvent::ReturnFailed(epoch),
        });
    }

    pub(super) fn revive_a(&mut self) {
        if self.source.is_some() {
            return;
        }
        self.note(|| "A is back".into());
        self.processes += 1;
        let source = match self.ledger {
            Ledger::Local(epoch) => Source::serving(epoch),
            Ledger::Lent(epoch) => Source::granted(B.into(), epoch),
        };
        self.source = Some(source.numbering_from(self.processes * 1_000_000));
        if self.offered {
            self.source_event(SourceEvent::Offer { to: B.into() });
        }
    }

    /// The VM may go where it is not.
    pub(super) fn offer(&mut self) {
        match (self.ledger, &self.machine) {
            (Ledger::Local(epoch), Some(there))
                if self.source.is_some()
                    && self.writing.is_none()
                    && self.at == At::A
                    && !there.is_ready() =>
            {
                self.offered = true;
                self.source_event(SourceEvent::Offer { to: B.into() });
                self.prepare_b(epoch);
            }
            (Ledger::Lent(_), Some(Machine::Here(_))) => self.offer_home(),
            _ => {}
        }
    }

    pub(super) fn withdraw(&mut self) {
        if self.at == At::A && self.offered {
            self.source_event(SourceEvent::Withdraw);
        } else if self.at == At::B {
            self.withdraw_home();
        }
    }

    /// B asks for a connection, in this epoch. `Err`: refused.
    pub(super) fn accept(&mut self, epoch: Epoch) -> Option<Result<(), (Refusal, Epoch)>> {
        let source = self.source.as_ref()?;
        let mine = self.epoch();
        let successor = match self.ledger {
            Ledger::Lent(_) if epoch == mine => {
                if !source.serves_borrower() {
                    return None;
                }
                false
            }
            Ledger::Lent(_) if epoch.next() == mine => true,
            Ledger::Local(_) if epoch == mine && self.offered => true,
            _ if epoch < mine => return Some(Err((Refusal::StaleEpoch, mine))),
            _ => return Some(Err((Refusal::NotOffered, mine))),
        };
        self.link = Some(Link::default());
        self.note(|| format!("link, epoch {epoch}"));
        self.source_event(if successor { SourceEvent::SuccessorOpened } else { SourceEvent::BorrowerOpened });
        Some(Ok(()))
    }

    pub(super) fn deliver_to_a(&mut self) {
        let Some(message) = self.link.as_mut().and_then(|link| link.to_a.pop_front()) else { return };
        match message {
            ToA::Claim(epoch, generation) => {
                self.source_event(SourceEvent::Claim { by: B.into(), epoch, generation });
            }
            ToA::List(list, generation) => self.source_event(SourceEvent::BorrowerList { list, generation }),
            ToA::Revoke(generation) => self.source_event(SourceEvent::BorrowerRevoked { generation }),
        }
    }
}
