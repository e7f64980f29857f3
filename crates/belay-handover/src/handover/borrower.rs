//! The side of a host that has a device's guest while another has its backing, when the guest goes home.
//!
//! ```text
//!           Offer            RingsStopped
//!  Serving ──────▶ Offered ───────────────▶ Parked ──── Taken ────▶ Gone
//!     ▲   ◀──────    ▲                        │                      ▲
//!     │   Withdraw   │ Revoked                ▼ ring started,        │
//!     └──────────────┴────────────────── Revoking  or Withdraw ──────┘ Taken
//! ```
//!
//! The commit point is in the other host's ledger. Once the list has been sent, that host may take the device at any
//! time: until it has acknowledged the revocation, no ring runs here.

use belay_wire::{Epoch, InflightList};

/// What happens to the borrower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BorrowerEvent {
    /// The guest may go home.
    Offer {
        /// To the host that has the backing.
        to: String,
    },
    /// It may not any more.
    Withdraw,
    /// The connection to the backing's host is open (again); what was outstanding has been sent again.
    Connected,
    /// All rings have stopped, with these requests in flight.
    RingsStopped(InflightList),
    /// All rings have stopped before this process began, with these requests in flight. It is decided that the guest goes
    /// home: until a withdrawal no ring runs here, whatever the VMM that it has left starts.
    Remembered(InflightList),
    /// A ring runs (again) at this host.
    RingsStarted,
    /// The VMM has started a ring that may not run yet.
    RingWaits,
    /// The backing's host has forgotten this list.
    Revoked {
        /// Which.
        generation: u64,
    },
    /// The device is in a later epoch: it has left this host.
    Taken(Epoch),
}

/// What the borrower must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BorrowerAction {
    /// The offer stands. Once the connection is open, the migration may begin.
    Ready,
    /// Send the list to the backing's host, if it is connected.
    SendList {
        /// What is in flight.
        list: InflightList,
        /// Which list this is.
        generation: u64,
    },
    /// Ask the backing's host to forget the list, if it is connected.
    SendRevoke {
        /// Which.
        generation: u64,
    },
    /// Rings that the VMM has started may run.
    Unfence,
    /// The device has left: nothing is served, nothing more is asked of its backing.
    Release(Epoch),
    /// The withdrawal is done.
    Withdrawn,
    /// The withdrawal came too late.
    WithdrawTooLate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Serving,
    Offered { to: String },
    Parked { to: String },
    Revoking { to: String },
    Gone,
}

/// The borrower's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Borrower {
    epoch: Epoch,
    state: State,
    running: bool,
    parked: InflightList,
    generation: u64,
    withdrawing: bool,
    /// The guest is not here any more, whatever its rings do.
    decided: bool,
}

impl Borrower {
    /// A device whose guest is here, at this epoch.
    #[must_use]
    pub fn serving(epoch: Epoch, running: bool) -> Self {
        Self {
            epoch,
            state: State::Serving,
            running,
            parked: InflightList::default(),
            generation: 1,
            withdrawing: false,
            decided: false,
        }
    }

    /// Whether rings of this host's VMM may run.
    #[must_use]
    pub fn may_serve(&self) -> bool {
        matches!(self.state, State::Serving | State::Offered { .. })
    }

    /// Whether the guest may go home: nothing that would move the backing may begin.
    #[must_use]
    pub fn is_offered(&self) -> bool {
        self.state != State::Serving
    }

    /// Whether the device has left.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// The state's name, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.state {
            State::Serving => "remote",
            State::Offered { .. } => "offered",
            State::Parked { .. } => "parked",
            State::Revoking { .. } => "revoking",
            State::Gone => "gone",
        }
    }

    /// Takes an event; gives the next state and what is to be done.
    #[must_use]
    pub fn handle(mut self, event: BorrowerEvent) -> (Self, Vec<BorrowerAction>) {
        use BorrowerAction as A;
        match event {
            BorrowerEvent::Offer { to } => self.offer(to),
            BorrowerEvent::Withdraw => self.withdraw(),
            BorrowerEvent::Connected => {
                let mut actions = Vec::new();
                match self.state {
                    State::Offered { .. } => actions.push(A::Ready),
                    State::Parked { .. } => actions.extend([A::Ready, self.send_list()]),
                    State::Revoking { .. } => actions.push(self.send_revoke()),
                    State::Serving | State::Gone => {}
                }
                (self, actions)
            }
            // None has run.
            BorrowerEvent::RingsStopped(_) if self.decided => (self, Vec::new()),
            BorrowerEvent::RingsStopped(list) => {
                self.running = false;
                self.parked = list;
                self.generation += 1;
                match self.state {
                    State::Offered { to } | State::Parked { to } | State::Revoking { to }
                        if !self.withdrawing =>
                    {
                        self.state = State::Parked { to };
                        let actions = vec![self.send_list()];
                        (self, actions)
                    }
                    // The revocation under way was of an older list: this one has not been sent.
                    State::Revoking { to } => {
                        self.generation -= 1;
                        self.state = State::Revoking { to };
                        (self, Vec::new())
                    }
                    _ => (self, Vec::new()),
                }
            }
            BorrowerEvent::Remembered(list) => {
                if self.state == State::Serving && !self.running {
                    self.parked = list;
                    self.decided = true;
                }
                (self, Vec::new())
            }
            BorrowerEvent::RingsStarted => {
                self.running = true;
                (self, Vec::new())
            }
            BorrowerEvent::RingWaits => match self.state {
                State::Parked { to } if !self.decided => {
                    self.state = State::Revoking { to };
                    let actions = vec![self.send_revoke()];
                    (self, actions)
                }
                _ => (self, Vec::new()),
            },
            BorrowerEvent::Revoked { generation } => self.revoked(generation),
            BorrowerEvent::Taken(epoch) => {
                if epoch <= self.epoch || self.state == State::Gone {
                    return (self, Vec::new());
                }
                self.state = State::Gone;
                let late = self.withdrawing.then_some(A::WithdrawTooLate);
                (self, std::iter::once(A::Release(epoch)).chain(late).collect())
            }
        }
    }

    fn send_list(&self) -> BorrowerAction {
        BorrowerAction::SendList { list: self.parked.clone(), generation: self.generation }
    }

    fn send_revoke(&self) -> BorrowerAction {
        BorrowerAction::SendRevoke { generation: self.generation }
    }

    fn offer(mut self, to: String) -> (Self, Vec<BorrowerAction>) {
        use BorrowerAction as A;
        match self.state {
            State::Serving if self.running => {
                self.state = State::Offered { to };
                (self, vec![A::Ready])
            }
            State::Serving => {
                self.state = State::Parked { to };
                let list = self.send_list();
                (self, vec![A::Ready, list])
            }
            State::Offered { .. } | State::Parked { .. } => (self, vec![A::Ready]),
            State::Revoking { .. } | State::Gone => (self, Vec::new()),
        }
    }

    fn withdraw(mut self) -> (Self, Vec<BorrowerAction>) {
        use BorrowerAction as A;
        self.decided = false;
        match self.state {
            State::Serving => (self, vec![A::Withdrawn]),
            State::Offered { .. } => {
                self.state = State::Serving;
                (self, vec![A::Withdrawn])
            }
            State::Parked { to } => {
                self.withdrawing = true;
                self.state = State::Revoking { to };
                let actions = vec![self.send_revoke()];
                (self, actions)
            }
            State::Revoking { .. } => {
                self.withdrawing = true;
                (self, Vec::new())
            }
            State::Gone => (self, vec![A::WithdrawTooLate]),
        }
    }

    fn revoked(mut self, generation: u64) -> (Self, Vec<BorrowerAction>) {
        use BorrowerAction as A;
        match self.state {
            State::Revoking { to } if generation == self.generation => {
                if std::mem::take(&mut self.withdrawing) {
                    self.state = State::Serving;
                    return (self, vec![A::Unfence, A::Withdrawn]);
                }
                self.state = State::Offered { to };
                (self, vec![A::Unfence])
            }
            _ => (self, Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(borrower: Borrower, events: Vec<BorrowerEvent>) -> (Borrower, Vec<BorrowerAction>) {
        let mut all = Vec::new();
        let borrower = events.into_iter().fold(borrower, |borrower, event| {
            let (borrower, actions) = borrower.handle(event);
            all.extend(actions);
            borrower
        });
        (borrower, all)
    }

    fn offer() -> BorrowerEvent {
        BorrowerEvent::Offer { to: "a".into() }
    }

    fn stopped() -> BorrowerEvent {
        BorrowerEvent::RingsStopped(InflightList::default())
    }

    fn sent(generation: u64) -> BorrowerAction {
        BorrowerAction::SendList { list: InflightList::default(), generation }
    }

    #[test]
    fn list_that_an_earlier_process_sent_is_sent_again_unless_a_ring_runs() {
        let known = InflightList {
            queues: vec![belay_wire::QueueBase { queue: belay_wire::QueueIndex(0), base: 7 }],
            requests: Vec::new(),
        };
        let remembered = || BorrowerEvent::Remembered(known.clone());
        let (_, actions) = run(Borrower::serving(Epoch(2), false), vec![remembered(), offer()]);
        let sent = BorrowerAction::SendList { list: known.clone(), generation: 1 };
        assert_eq!(actions, [BorrowerAction::Ready, sent]);
        // QEMU 10 starts the rings of a VM that it has migrated away when its agent is back.
        let waits = vec![remembered(), offer(), BorrowerEvent::RingWaits, stopped()];
        let (borrower, actions) = run(Borrower::serving(Epoch(2), false), waits);
        assert_eq!(actions.len(), 2, "the list holds: {actions:?}");
        let (_, actions) =
            run(borrower, vec![BorrowerEvent::Withdraw, BorrowerEvent::Revoked { generation: 1 }]);
        assert!(actions.contains(&BorrowerAction::Unfence), "{actions:?}");
        let events = vec![BorrowerEvent::RingsStarted, remembered(), stopped(), offer()];
        let (_, actions) = run(Borrower::serving(Epoch(2), false), events);
        assert!(actions.iter().all(|action| match action {
            BorrowerAction::SendList { list, .. } => *list != known,
            _ => true,
        }));
    }

    #[test]
    fn ring_started_after_the_list_was_sent_waits_for_the_acknowledged_revocation() {
        let (borrower, actions) =
            run(Borrower::serving(Epoch(2), true), vec![offer(), stopped(), BorrowerEvent::RingWaits]);
        let revoke = BorrowerAction::SendRevoke { generation: 2 };
        assert_eq!(actions, [BorrowerAction::Ready, sent(2), revoke.clone()]);
        assert!(!borrower.may_serve());
        // The link was lost on the way.
        let (borrower, actions) = borrower.handle(BorrowerEvent::Connected);
        assert_eq!(actions, [revoke]);
        let (borrower, actions) = borrower.handle(BorrowerEvent::Revoked { generation: 2 });
        assert_eq!(actions, [BorrowerAction::Unfence]);
        assert!(borrower.may_serve());
    }

    #[test]
    fn acknowledgement_of_an_older_list_lets_nothing_run() {
        let events = vec![
            offer(),
            stopped(),
            BorrowerEvent::RingWaits,
            stopped(),
            BorrowerEvent::RingWaits,
            BorrowerEvent::Revoked { generation: 2 },
        ];
        let (borrower, _) = run(Borrower::serving(Epoch(2), true), events);
        assert!(!borrower.may_serve());
        let (borrower, _) = borrower.handle(BorrowerEvent::Revoked { generation: 3 });
        assert!(borrower.may_serve());
    }

    #[test]
    fn withdrawal_is_done_when_it_is_acknowledged_and_too_late_when_the_device_was_taken() {
        let (borrower, actions) =
            run(Borrower::serving(Epoch(2), true), vec![offer(), stopped(), BorrowerEvent::Withdraw]);
        assert!(!actions.contains(&BorrowerAction::Withdrawn));
        let (_, actions) = borrower.clone().handle(BorrowerEvent::Revoked { generation: 2 });
        assert_eq!(actions, [BorrowerAction::Unfence, BorrowerAction::Withdrawn]);
        let (borrower, actions) = borrower.handle(BorrowerEvent::Taken(Epoch(3)));
        assert_eq!(actions, [BorrowerAction::Release(Epoch(3)), BorrowerAction::WithdrawTooLate]);
        assert!(borrower.is_gone());
    }

    #[test]
    fn word_of_the_present_epoch_takes_nothing() {
        let (borrower, actions) =
            run(Borrower::serving(Epoch(2), true), vec![BorrowerEvent::Taken(Epoch(2))]);
        assert!(actions.is_empty() && borrower.may_serve());
    }

    #[test]
    fn paused_guest_that_is_offered_sends_its_list_at_once_and_again_after_a_lost_link() {
        let events = vec![stopped(), offer(), BorrowerEvent::Connected];
        let (_, actions) = run(Borrower::serving(Epoch(2), true), events);
        let ready = BorrowerAction::Ready;
        assert_eq!(actions, [ready.clone(), sent(2), ready, sent(2)]);
    }
}
