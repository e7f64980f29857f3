//! The side of the host that has the backing: it gives the device to the host that the guest moves to, and takes it
//! back when the guest comes home.
//!
//! ```text
//!            Offer              RingsStopped             Claim               GrantDurable
//!  Serving ─────────▶ Offered ───────────────▶ Parked ─────────▶ Granting ─────────────────▶ Granted
//!   ▲ ▲   ◀─────────    │  ▲  ◀───────────────    │                  │                        │  ▲
//!   │ │     Withdraw    │  └───  RingsStarted     │                  │ GrantFailed: Parked     │  │
//!   │ └─────────────────┴──────── Withdraw ◀──────┘                  ▼                        │  │
//!   │                                                                                         │  │
//!   │     ReturnDurable                 rings started here, list fits        BorrowerList     │  │
//!   └───────────────────── Returning ◀─────────────────────────────── Coming ◀────────────────┘  │
//!                              │ ReturnFailed: Coming                    └── BorrowerRevoked ────┘
//! ```
//!
//! `GrantDurable` and `ReturnDurable` are the commit points: both are writes in this host's ledger, whichever way the
//! guest goes. Before `GrantDurable` every failure leaves the device with this host; from the claim on, its rings do
//! not run, whatever its VMM does, unless the grant could not be written. Before `ReturnDurable` every failure leaves
//! the device with the borrower; after it, the borrower's epoch is refused.

use belay_wire::{Epoch, InflightList, ListedRequest, QueueIndex, Refusal};

use super::rings::{RingStart, adopted_by, all_here, known};

/// What happens to the host that has the backing.
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
    /// The successor's rings have started: it wants the device.
    Claim {
        /// Who.
        by: String,
        /// The epoch it will have.
        epoch: Epoch,
        /// The list that its rings were checked against.
        generation: u64,
    },
    /// The grant is in the ledger.
    GrantDurable(Epoch),
    /// The grant could not be written.
    GrantFailed(Epoch),
    /// The borrower's connection is open (again). A list that still holds comes again on it.
    BorrowerOpened,
    /// The borrower's rings have stopped, and its guest may come here.
    BorrowerList {
        /// What is in flight, in this host's hands or on its way to them.
        list: InflightList,
        /// Which list this is.
        generation: u64,
    },
    /// The borrower's rings are to run again: it waits for the acknowledgement.
    BorrowerRevoked {
        /// The newest list that it has sent.
        generation: u64,
    },
    /// A ring was started by this host's VMM while the device is lent, or for the first time since it came back.
    RingWaits(RingStart),
    /// It was stopped again, or its VMM is gone.
    RingLeft(QueueIndex),
    /// The return is in the ledger.
    ReturnDurable(Epoch),
    /// The return could not be written.
    ReturnFailed(Epoch),
}

/// What must be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Send the list to the successor, if it is connected.
    SendList {
        /// What is in flight.
        list: InflightList,
        /// Which list this is.
        generation: u64,
    },
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
    /// Tell the borrower that its list is forgotten: its rings may run.
    AckRevoke {
        /// Which list.
        generation: u64,
    },
    /// Note in the VMM's in-flight region what is in flight in a ring that will run here: a restarted agent finds it.
    MarkRing {
        /// Which, and how it was started.
        ring: RingStart,
        /// Requests in flight, in submission order.
        adopted: Vec<ListedRequest>,
    },
    /// Execute nothing more for the borrower, and write the return to the ledger, durably; answer with
    /// `ReturnDurable` or `ReturnFailed`.
    PersistReturn {
        /// From whom.
        from: String,
        /// The new epoch.
        epoch: Epoch,
    },
    /// The return failed: the borrower goes on. What it sent meanwhile was not executed, so its connection ends.
    DropBorrower,
    /// The device is this host's again, under this epoch.
    TakeBack {
        /// From whom.
        from: String,
        /// The new epoch.
        epoch: Epoch,
    },
    /// Let a ring of this host's VMM run: these requests of it were in flight when it stopped.
    RunRing {
        /// Which, and how it was started.
        ring: RingStart,
        /// Requests in flight, in submission order.
        adopted: Vec<ListedRequest>,
    },
    /// Tell the borrower that the device has left it.
    SendTaken(Epoch),
    /// A ring does not fit the borrower's list: it is not served, and nothing is taken for it.
    Misfit {
        /// Which.
        queue: QueueIndex,
        /// Why.
        reason: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Serving,
    Offered { to: String },
    Parked { to: String },
    Granting { to: String, epoch: Epoch },
    Granted { to: String },
    Coming { to: String, list: InflightList },
    Returning { to: String, list: InflightList, epoch: Epoch },
}

/// The machine of the host that has the backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    epoch: Epoch,
    state: State,
    /// Rings of this host's VMM run.
    running: bool,
    /// What is in flight while no ring runs: an offer may come later (a paused VM that migrates).
    parked: InflightList,
    /// Number of the list in `parked`.
    generation: u64,
    /// Rings that this host's VMM has started while the device is lent.
    waiting: Vec<RingStart>,
    /// What came back with the guest, for rings that have not started yet.
    returned: InflightList,
}

impl Source {
    /// A device whose guest is here, at this epoch. No ring runs yet.
    #[must_use]
    pub fn serving(epoch: Epoch) -> Self {
        Self {
            epoch,
            state: State::Serving,
            running: false,
            parked: InflightList::default(),
            generation: 1,
            waiting: Vec::new(),
            returned: InflightList::default(),
        }
    }

    /// Lists are numbered from here on. Two processes of a host may not give the same number to different lists: a claim
    /// outlives the process that sent its list.
    #[must_use]
    pub fn numbering_from(self, generation: u64) -> Self {
        Self { generation, ..self }
    }

    /// A device whose guest has moved to `to`: the grant of `epoch` is in the ledger.
    #[must_use]
    pub fn granted(to: String, epoch: Epoch) -> Self {
        Self { state: State::Granted { to }, ..Self::serving(epoch) }
    }

    /// Whether rings of this host's VMM may run.
    #[must_use]
    pub fn may_serve(&self) -> bool {
        matches!(self.state, State::Serving | State::Offered { .. } | State::Parked { .. })
    }

    /// Whether requests of the host that the device is lent to are executed.
    #[must_use]
    pub fn serves_borrower(&self) -> bool {
        matches!(self.state, State::Granted { .. } | State::Coming { .. })
    }

    /// Whether a ring has to be asked for before it is started: requests may have come back for it.
    #[must_use]
    pub fn decides_start_of(&self, queue: QueueIndex) -> bool {
        !self.may_serve() || self.returned.queues.iter().any(|listed| listed.queue == queue)
    }

    /// The host that may take the device, or has.
    #[must_use]
    pub fn successor(&self) -> Option<&str> {
        match &self.state {
            State::Serving => None,
            State::Offered { to }
            | State::Parked { to }
            | State::Granting { to, .. }
            | State::Granted { to }
            | State::Coming { to, .. }
            | State::Returning { to, .. } => Some(to),
        }
    }

    /// The claim that the host which this device is offered to would make, if nothing is in flight and no ring runs: a
    /// guest that has left without using the device never starts its rings there.
    #[must_use]
    pub fn claim_of_unused(&self) -> Option<SourceEvent> {
        match &self.state {
            State::Parked { to } if self.parked.requests.is_empty() => Some(SourceEvent::Claim {
                by: to.clone(),
                epoch: self.epoch.next(),
                generation: self.generation,
            }),
            _ => None,
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
            State::Coming { .. } => "coming",
            State::Returning { .. } => "returning",
        }
    }

    /// Takes an event; gives the next state and what is to be done.
    #[must_use]
    pub fn handle(mut self, event: SourceEvent) -> (Self, Vec<SourceAction>) {
        use SourceAction as A;
        match event {
            SourceEvent::RingsStopped(list) => self.rings_stopped(list),
            SourceEvent::RingsStarted => self.rings_started(),
            SourceEvent::Claim { by, epoch, generation } => self.claim(&by, epoch, generation),
            SourceEvent::Offer { to } => self.offer(to),
            SourceEvent::Withdraw => self.withdraw(),
            SourceEvent::SuccessorOpened => {
                let actions = match &self.state {
                    State::Parked { .. } => vec![self.send_list()],
                    State::Granted { .. } | State::Coming { .. } => vec![A::SendGrant(self.epoch)],
                    _ => Vec::new(),
                };
                (self, actions)
            }
            SourceEvent::GrantDurable(durable) => match self.state {
                State::Granting { to, epoch } if epoch == durable => {
                    let actions = vec![A::Lend { to: to.clone(), epoch }, A::SendGrant(epoch)];
                    (Self::granted(to, epoch).numbering_from(self.generation), actions)
                }
                _ => (self, Vec::new()),
            },
            SourceEvent::GrantFailed(failed) => match self.state {
                State::Granting { to, epoch } if epoch == failed => {
                    self.state = State::Parked { to };
                    (self, vec![A::Refuse(Refusal::NotReady), A::Unfence])
                }
                _ => (self, Vec::new()),
            },
            SourceEvent::BorrowerOpened => {
                if let State::Coming { to, .. } = self.state {
                    self.state = State::Granted { to };
                }
                (self, Vec::new())
            }
            SourceEvent::BorrowerList { list, .. } => self.borrower_list(list),
            SourceEvent::BorrowerRevoked { generation } => self.borrower_revoked(generation),
            SourceEvent::RingWaits(ring) => self.ring_waits(ring),
            SourceEvent::RingLeft(queue) => {
                self.waiting.retain(|waiting| waiting.queue != queue);
                (self, Vec::new())
            }
            SourceEvent::ReturnDurable(durable) => self.return_durable(durable),
            SourceEvent::ReturnFailed(failed) => match self.state {
                State::Returning { to, list, epoch } if epoch == failed => {
                    self.state = State::Coming { to, list };
                    (self, vec![A::DropBorrower])
                }
                _ => (self, Vec::new()),
            },
        }
    }

    fn send_list(&self) -> SourceAction {
        SourceAction::SendList { list: self.parked.clone(), generation: self.generation }
    }

    fn offer(mut self, to: String) -> (Self, Vec<SourceAction>) {
        let allowed = match &self.state {
            State::Serving => true,
            State::Offered { to: present } | State::Parked { to: present } => *present != to,
            _ => false,
        };
        if allowed {
            self.state = if self.running { State::Offered { to } } else { State::Parked { to } };
        }
        (self, Vec::new())
    }

    fn withdraw(mut self) -> (Self, Vec<SourceAction>) {
        use SourceAction as A;
        match self.state {
            State::Serving => (self, vec![A::Withdrawn]),
            State::Offered { .. } => {
                self.state = State::Serving;
                (self, vec![A::Withdrawn])
            }
            State::Parked { .. } => {
                self.state = State::Serving;
                (self, vec![A::RevokeList, A::Withdrawn])
            }
            _ => (self, vec![A::WithdrawTooLate]),
        }
    }

    fn rings_stopped(mut self, list: InflightList) -> (Self, Vec<SourceAction>) {
        if !self.may_serve() {
            return (self, Vec::new());
        }
        self.running = false;
        self.parked = list;
        self.generation += 1;
        match self.state {
            State::Offered { to } | State::Parked { to } => {
                self.state = State::Parked { to };
                let actions = vec![self.send_list()];
                (self, actions)
            }
            _ => (self, Vec::new()),
        }
    }

    fn rings_started(mut self) -> (Self, Vec<SourceAction>) {
        self.running = true;
        if let State::Parked { to } = self.state {
            self.state = State::Offered { to };
            return (self, vec![SourceAction::RevokeList]);
        }
        (self, Vec::new())
    }

    fn claim(mut self, by: &str, epoch: Epoch, generation: u64) -> (Self, Vec<SourceAction>) {
        use SourceAction as A;
        match self.state {
            // Of this very list: one that was revoked meanwhile is not what the claimant's rings fit.
            State::Parked { to }
                if to == by && epoch == self.epoch.next() && generation == self.generation =>
            {
                self.state = State::Granting { to: to.clone(), epoch };
                (self, vec![A::Fence, A::PersistGrant { to, epoch }])
            }
            // It asks again, over a new connection.
            State::Granting { ref to, epoch: granting } if to == by && epoch == granting => {
                (self, Vec::new())
            }
            State::Granted { ref to } | State::Coming { ref to, .. } if to == by && epoch == self.epoch => {
                (self, vec![A::SendGrant(epoch)])
            }
            State::Granted { .. } | State::Coming { .. } | State::Returning { .. } => {
                (self, vec![A::Refuse(Refusal::StaleEpoch)])
            }
            _ => (self, vec![A::Refuse(Refusal::WrongState)]),
        }
    }

    // --- the way home ---

    fn borrower_list(mut self, list: InflightList) -> (Self, Vec<SourceAction>) {
        match self.state {
            State::Granted { to } | State::Coming { to, .. } => {
                self.state = State::Coming { to, list };
                self.try_return()
            }
            _ => (self, Vec::new()),
        }
    }

    fn borrower_revoked(mut self, generation: u64) -> (Self, Vec<SourceAction>) {
        match self.state {
            State::Granted { to } | State::Coming { to, .. } => {
                self.state = State::Granted { to };
                (self, vec![SourceAction::AckRevoke { generation }])
            }
            // The ledger decides; the borrower hears of it.
            _ => (self, Vec::new()),
        }
    }

    fn ring_waits(mut self, ring: RingStart) -> (Self, Vec<SourceAction>) {
        if self.may_serve() {
            let action = self.start_returned(ring);
            return (self, vec![action]);
        }
        self.waiting.retain(|waiting| waiting.queue != ring.queue);
        self.waiting.push(ring);
        self.try_return()
    }

    /// Asks the ledger, if the rings of the guest are here and fit.
    fn try_return(mut self) -> (Self, Vec<SourceAction>) {
        let State::Coming { to, list } = &self.state else { return (self, Vec::new()) };
        let (to, list) = (to.clone(), list.clone());
        if !all_here(&list, &self.waiting) {
            return (self, Vec::new());
        }
        let mut actions = Vec::new();
        let mut fits = !self.waiting.is_empty();
        for ring in &self.waiting {
            match known(&list, ring).and_then(|()| adopted_by(&list, *ring)) {
                Ok((ring, adopted)) if !adopted.is_empty() => {
                    actions.push(SourceAction::MarkRing { ring, adopted });
                }
                Ok(_) => {}
                Err(reason) => {
                    actions.push(SourceAction::Misfit { queue: ring.queue, reason });
                    fits = false;
                }
            }
        }
        // All of them or none: what is in flight in a ring that does not fit would be lost.
        if fits {
            let epoch = self.epoch.next();
            self.state = State::Returning { to: to.clone(), list, epoch };
            actions.push(SourceAction::PersistReturn { from: to, epoch });
        }
        (self, actions)
    }

    fn return_durable(self, durable: Epoch) -> (Self, Vec<SourceAction>) {
        use SourceAction as A;
        let State::Returning { to, list, epoch } = self.state else { return (self, Vec::new()) };
        if epoch != durable {
            return (Self { state: State::Returning { to, list, epoch }, ..self }, Vec::new());
        }
        let mut next = Self { returned: list, generation: self.generation, ..Self::serving(epoch) };
        let mut actions = vec![A::TakeBack { from: to, epoch }];
        for ring in self.waiting {
            actions.push(next.start_returned(ring));
        }
        actions.push(A::SendTaken(epoch));
        (next, actions)
    }

    /// A ring starts here for the first time since the guest came home.
    fn start_returned(&mut self, ring: RingStart) -> SourceAction {
        let queue = ring.queue;
        let action = match adopted_by(&self.returned, ring) {
            Ok((ring, adopted)) => SourceAction::RunRing { ring, adopted },
            Err(reason) => SourceAction::Misfit { queue, reason },
        };
        self.returned.queues.retain(|listed| listed.queue != queue);
        self.returned.requests.retain(|request| request.queue != queue);
        action
    }
}
