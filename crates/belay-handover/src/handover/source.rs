//! The source's side: it has the guest, and gives the device to the host that the guest moves to.
//!
//! ```text
//!            Offer              RingsStopped             Claim               GrantDurable
//!  Serving ─────────▶ Offered ───────────────▶ Parked ─────────▶ Granting ─────────────────▶ Granted
//!     ▲   ◀─────────    │  ▲  ◀───────────────    │                  │
//!     │     Withdraw    │  └───  RingsStarted     │                  │ GrantFailed: back to Parked
//!     └─────────────────┴──────── Withdraw ◀──────┘                  ▼
//! ```
//!
//! `GrantDurable` is the commit point. Before it every failure leaves the device with the source; from the claim on,
//! the source's rings do not run, whatever its VMM does, unless the grant could not be written.

use belay_wire::{Epoch, InflightList, Refusal};

/// What happens to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// This host may take the device.
    Offer {
        /// Its name.
        to: String,
    },
    /// It may not any more.
    Withdraw,
    /// The successor's connection is open (again).
    SuccessorOpened,
    /// All rings have stopped, with these requests in flight.
    RingsStopped(InflightList),
    /// A ring runs (again) at this host.
    RingsStarted,
    /// The successor's rings have started: it wants the device, under this epoch.
    Claim {
        /// Who.
        by: String,
        /// The epoch it will have.
        epoch: Epoch,
    },
    /// The grant is in the ledger.
    GrantDurable(Epoch),
    /// The grant could not be written.
    GrantFailed(Epoch),
}

/// What the source must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Send the list to the successor, if it is connected.
    SendList(InflightList),
    /// Tell the successor to forget the list.
    RevokeList,
    /// From now on no ring of this host's VMM is served.
    Fence,
    /// Undo [`SourceAction::Fence`]: rings that the VMM has started may run.
    Unfence,
    /// Write the grant to the ledger, durably; answer with `GrantDurable` or `GrantFailed`.
    PersistGrant {
        /// To whom.
        to: String,
        /// The new epoch.
        epoch: Epoch,
    },
    /// What is in flight belongs to the successor: its requests are executed from now on, under this epoch.
    Lend {
        /// To whom.
        to: String,
        /// The new epoch.
        epoch: Epoch,
    },
    /// Tell the successor that the device is its own.
    SendGrant(Epoch),
    /// Refuse the successor and end its connection.
    Refuse(Refusal),
    /// The withdrawal is done.
    Withdrawn,
    /// The withdrawal came too late.
    WithdrawTooLate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Serving,
    Offered { to: String },
    Parked { to: String, list: InflightList },
    Granting { to: String, list: InflightList, epoch: Epoch },
    Granted { to: String, epoch: Epoch },
}

/// The source's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    epoch: Epoch,
    state: State,
    /// The list of rings that have stopped without an offer: an offer may come later (a paused VM that migrates).
    parked: Option<InflightList>,
}

impl Source {
    /// A device whose guest is here, at this epoch.
    #[must_use]
    pub fn serving(epoch: Epoch) -> Self {
        Self { epoch, state: State::Serving, parked: None }
    }

    /// A device whose guest has moved to `to`: the grant of `epoch` is in the ledger.
    #[must_use]
    pub fn granted(to: String, epoch: Epoch) -> Self {
        Self { epoch, state: State::Granted { to, epoch }, parked: None }
    }

    /// Whether rings of this host's VMM may run.
    #[must_use]
    pub fn may_serve(&self) -> bool {
        matches!(self.state, State::Serving | State::Offered { .. } | State::Parked { .. })
    }

    /// The host that may take the device, or has.
    #[must_use]
    pub fn successor(&self) -> Option<&str> {
        match &self.state {
            State::Serving => None,
            State::Offered { to }
            | State::Parked { to, .. }
            | State::Granting { to, .. }
            | State::Granted { to, .. } => Some(to),
        }
    }

    /// The state's name, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.state {
            State::Serving => "local",
            State::Offered { .. } => "offered",
            State::Parked { .. } => "parked",
            State::Granting { .. } => "granting",
            State::Granted { .. } => "lent",
        }
    }

    /// Takes an event; gives the next state and what is to be done.
    #[must_use]
    pub fn handle(mut self, event: SourceEvent) -> (Self, Vec<SourceAction>) {
        use SourceAction as A;
        match event {
            SourceEvent::RingsStopped(list) => self.rings_stopped(list),
            SourceEvent::RingsStarted => self.rings_started(),
            SourceEvent::Claim { by, epoch } => self.claim(&by, epoch),
            SourceEvent::Offer { to } => self.offer(to),
            SourceEvent::Withdraw => match self.state {
                State::Serving => (self, vec![A::Withdrawn]),
                State::Offered { .. } | State::Parked { .. } => {
                    let revoke = matches!(self.state, State::Parked { .. });
                    self.state = State::Serving;
                    let revoke = revoke.then_some(A::RevokeList);
                    (self, revoke.into_iter().chain([A::Withdrawn]).collect())
                }
                State::Granting { .. } | State::Granted { .. } => (self, vec![A::WithdrawTooLate]),
            },
            SourceEvent::SuccessorOpened => {
                let actions = match &self.state {
                    State::Parked { list, .. } => vec![A::SendList(list.clone())],
                    State::Granted { epoch, .. } => vec![A::SendGrant(*epoch)],
                    _ => Vec::new(),
                };
                (self, actions)
            }
            SourceEvent::GrantDurable(durable) => match self.state {
                State::Granting { to, epoch, .. } if epoch == durable => {
                    let actions = vec![A::Lend { to: to.clone(), epoch }, A::SendGrant(epoch)];
                    (Self { epoch, state: State::Granted { to, epoch }, parked: None }, actions)
                }
                _ => (self, Vec::new()),
            },
            SourceEvent::GrantFailed(failed) => match self.state {
                State::Granting { to, list, epoch } if epoch == failed => {
                    self.state = State::Parked { to, list };
                    (self, vec![A::Refuse(Refusal::NotReady), A::Unfence])
                }
                _ => (self, Vec::new()),
            },
        }
    }

    fn offer(mut self, to: String) -> (Self, Vec<SourceAction>) {
        let allowed = match &self.state {
            State::Serving => true,
            State::Offered { to: present } | State::Parked { to: present, .. } => *present != to,
            State::Granting { .. } | State::Granted { .. } => false,
        };
        if !allowed {
            return (self, Vec::new());
        }
        self.state = match self.parked.clone() {
            Some(list) => State::Parked { to, list },
            None => State::Offered { to },
        };
        (self, Vec::new())
    }

    fn rings_stopped(mut self, list: InflightList) -> (Self, Vec<SourceAction>) {
        if !self.may_serve() {
            return (self, Vec::new());
        }
        self.parked = Some(list.clone());
        if let State::Offered { to } = self.state {
            self.state = State::Parked { to, list: list.clone() };
            return (self, vec![SourceAction::SendList(list)]);
        }
        (self, Vec::new())
    }

    fn rings_started(mut self) -> (Self, Vec<SourceAction>) {
        self.parked = None;
        if let State::Parked { to, .. } = self.state {
            self.state = State::Offered { to };
            return (self, vec![SourceAction::RevokeList]);
        }
        (self, Vec::new())
    }

    fn claim(mut self, by: &str, epoch: Epoch) -> (Self, Vec<SourceAction>) {
        use SourceAction as A;
        match self.state {
            State::Parked { to, list } if to == by && epoch == self.epoch.next() => {
                self.state = State::Granting { to: to.clone(), list, epoch };
                (self, vec![A::Fence, A::PersistGrant { to, epoch }])
            }
            // The VM never ran here, or was shut down: there are no rings that could have stopped.
            State::Offered { to } if to == by && epoch == self.epoch.next() && self.parked.is_some() => {
                let list = self.parked.clone().unwrap_or_default();
                self.state = State::Granting { to: to.clone(), list, epoch };
                (self, vec![A::Fence, A::PersistGrant { to, epoch }])
            }
            // It asks again, over a new connection.
            State::Granting { ref to, epoch: granting, .. } if to == by && epoch == granting => {
                (self, Vec::new())
            }
            State::Granted { ref to, epoch: granted } if to == by && epoch == granted => {
                (self, vec![A::SendGrant(granted)])
            }
            State::Granted { .. } => (self, vec![A::Refuse(Refusal::StaleEpoch)]),
            _ => (self, vec![A::Refuse(Refusal::WrongState)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(source: Source, events: Vec<SourceEvent>) -> (Source, Vec<SourceAction>) {
        let mut all = Vec::new();
        let source = events.into_iter().fold(source, |source, event| {
            let (source, actions) = source.handle(event);
            all.extend(actions);
            source
        });
        (source, all)
    }

    fn offer() -> SourceEvent {
        SourceEvent::Offer { to: "b".into() }
    }

    fn stopped() -> SourceEvent {
        SourceEvent::RingsStopped(InflightList::default())
    }

    fn claim(epoch: u64) -> SourceEvent {
        SourceEvent::Claim { by: "b".into(), epoch: Epoch(epoch) }
    }

    #[test]
    fn claim_after_the_stop_is_fenced_persisted_then_granted() {
        let (source, actions) = run(Source::serving(Epoch(4)), vec![offer(), stopped(), claim(5)]);
        let persist = SourceAction::PersistGrant { to: "b".into(), epoch: Epoch(5) };
        assert_eq!(actions, [SourceAction::SendList(InflightList::default()), SourceAction::Fence, persist]);
        assert!(!source.may_serve());
        let (source, actions) = source.handle(SourceEvent::GrantDurable(Epoch(5)));
        let lend = SourceAction::Lend { to: "b".into(), epoch: Epoch(5) };
        assert_eq!(actions, [lend, SourceAction::SendGrant(Epoch(5))]);
        assert_eq!(source.successor(), Some("b"));
    }

    #[test]
    fn rings_that_start_again_revoke_the_list_and_a_later_claim_is_refused() {
        let (source, actions) =
            run(Source::serving(Epoch(1)), vec![offer(), stopped(), SourceEvent::RingsStarted, claim(2)]);
        assert_eq!(actions[1], SourceAction::RevokeList);
        assert_eq!(actions[2], SourceAction::Refuse(Refusal::WrongState));
        assert!(source.may_serve());
    }

    #[test]
    fn claim_of_a_host_without_offer_or_of_a_wrong_epoch_is_refused() {
        for event in [SourceEvent::Claim { by: "c".into(), epoch: Epoch(2) }, claim(3), claim(1)] {
            let (source, actions) = run(Source::serving(Epoch(1)), vec![offer(), stopped(), event]);
            assert_eq!(actions[1], SourceAction::Refuse(Refusal::WrongState));
            assert!(source.may_serve());
        }
    }

    #[test]
    fn withdrawal_after_the_claim_is_too_late() {
        let (source, actions) =
            run(Source::serving(Epoch(1)), vec![offer(), stopped(), claim(2), SourceEvent::Withdraw]);
        assert_eq!(actions.last(), Some(&SourceAction::WithdrawTooLate));
        assert!(!source.may_serve());
    }

    #[test]
    fn rings_of_a_vmm_resumed_by_mistake_do_not_run_after_the_grant() {
        let events = vec![
            offer(),
            stopped(),
            claim(2),
            SourceEvent::GrantDurable(Epoch(2)),
            SourceEvent::RingsStarted,
        ];
        let (source, _) = run(Source::serving(Epoch(1)), events);
        assert!(!source.may_serve());
    }

    #[test]
    fn grant_that_could_not_be_written_gives_the_device_back() {
        let events = vec![offer(), stopped(), claim(2), SourceEvent::GrantFailed(Epoch(2))];
        let (source, actions) = run(Source::serving(Epoch(1)), events);
        assert_eq!(actions.last(), Some(&SourceAction::Unfence));
        assert!(source.may_serve());
    }

    #[test]
    fn grant_lost_on_the_way_is_sent_again_when_the_successor_is_back() {
        let source = Source::granted("b".into(), Epoch(2));
        let (source, actions) = source.handle(SourceEvent::SuccessorOpened);
        assert_eq!(actions, [SourceAction::SendGrant(Epoch(2))]);
        let (_, actions) = source.handle(claim(2));
        assert_eq!(actions, [SourceAction::SendGrant(Epoch(2))]);
    }

    #[test]
    fn device_that_was_paused_before_the_offer_sends_its_list_to_the_successor() {
        let (source, actions) =
            run(Source::serving(Epoch(1)), vec![stopped(), offer(), SourceEvent::SuccessorOpened]);
        assert_eq!(actions, [SourceAction::SendList(InflightList::default())]);
        assert_eq!(source.name(), "parked");
    }
}
