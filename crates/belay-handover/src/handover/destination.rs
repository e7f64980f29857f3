//! The destination's side: the guest is coming; the device is claimed when its rings start.
//!
//! ```text
//!              List                   rings started, list fits           Grant
//!  Prepared ──────────▶ Listed ─────────────────────────────▶ Claiming ─────────▶ Attached
//!     ▲   ◀──────────     │                                      │                   ▲
//!     │    ListRevoked    ▼                                      ▼                   │
//!     └──────────────  Failed: nothing was claimed            (Refused: Failed)      │
//!     └───────────────── Grant: this host had claimed before it was restarted ───────┘
//! ```
//!
//! Rings start one by one. A ring whose base differs from its used index has requests in flight, and waits for the
//! list; the claim is made when all rings with listed requests are here. After it the rest of the rings run as they
//! come, and may be stopped and started again; only the source's refusal takes the claim back.

use belay_wire::{Epoch, InflightList, ListedRequest, QueueIndex, Refusal};

use super::rings::{RingStart, adopted_by, all_here, known};

/// What happens to the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The source's rings have stopped.
    List {
        /// What is in flight.
        list: InflightList,
        /// Which list this is: the claim names it.
        generation: u64,
    },
    /// They run again.
    ListRevoked,
    /// A ring was started by this host's VMM.
    RingStarted(RingStart),
    /// A ring was stopped again.
    RingStopped(QueueIndex),
    /// The source has granted the device.
    Grant(Epoch),
    /// The source refused.
    Refused(Refusal),
    /// The connection to the source is open (again).
    ConnectionUp,
}

/// What the destination must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Let a ring run: these requests of it are at the source already, popping goes on at `base`.
    RunRing {
        /// Which, and how it was started.
        ring: RingStart,
        /// Requests in flight, in submission order.
        adopted: Vec<ListedRequest>,
    },
    /// A ring does not fit the list by which the device was claimed: it is not served.
    RefuseRing {
        /// Which.
        queue: QueueIndex,
        /// Why.
        reason: String,
    },
    /// Ask for the device. New requests may be sent right behind.
    SendClaim {
        /// The epoch it will have.
        epoch: Epoch,
        /// The list that the rings were checked against.
        generation: u64,
    },
    /// The device is here: write it down.
    Attached(Epoch),
    /// Nothing was claimed, and nothing will be.
    Fail(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Prepared,
    Listed { list: InflightList, generation: u64 },
    Claiming { list: InflightList, generation: u64, epoch: Epoch },
    Attached,
    Failed,
}

/// The destination's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    epoch: Epoch,
    state: State,
    /// Rings that were started and wait for the list.
    waiting: Vec<RingStart>,
    /// Rings that have run: what is in flight in them is known here.
    ran: Vec<QueueIndex>,
}

impl Destination {
    /// A device that may come, whose source is at this epoch.
    #[must_use]
    pub fn prepared(epoch: Epoch) -> Self {
        Self { epoch, state: State::Prepared, waiting: Vec::new(), ran: Vec::new() }
    }

    /// Whether the guest is here, by the source's word.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.state == State::Attached
    }

    /// Whether the device has been asked for: requests may be sent.
    #[must_use]
    pub fn has_claimed(&self) -> bool {
        matches!(self.state, State::Claiming { .. } | State::Attached)
    }

    /// The epoch of requests: the new one from the claim on.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        if self.has_claimed() { self.epoch.next() } else { self.epoch }
    }

    /// The state's name, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.state {
            State::Prepared | State::Listed { .. } => "prepared",
            State::Claiming { .. } => "claiming",
            State::Attached => "remote",
            State::Failed => "failed",
        }
    }

    /// Takes an event; gives the next state and what is to be done.
    #[must_use]
    pub fn handle(mut self, event: DestinationEvent) -> (Self, Vec<DestinationAction>) {
        use DestinationAction as A;
        match event {
            DestinationEvent::List { list, generation } => {
                if matches!(self.state, State::Prepared | State::Listed { .. }) {
                    self.state = State::Listed { list, generation };
                    return self.try_start();
                }
                (self, Vec::new())
            }
            DestinationEvent::ListRevoked => {
                // After the claim the source refuses it, or has granted it: its answer decides.
                if matches!(self.state, State::Listed { .. }) {
                    self.state = State::Prepared;
                }
                (self, Vec::new())
            }
            DestinationEvent::RingStarted(ring) => {
                self.waiting.retain(|waiting| waiting.queue != ring.queue);
                self.waiting.push(ring);
                self.try_start()
            }
            DestinationEvent::RingStopped(queue) => {
                self.waiting.retain(|waiting| waiting.queue != queue);
                (self, Vec::new())
            }
            DestinationEvent::Grant(granted) => self.grant(granted),
            DestinationEvent::Refused(refusal) => match self.state {
                State::Attached | State::Failed => (self, Vec::new()),
                _ => self.fail(format!("the source refused: {refusal}")),
            },
            DestinationEvent::ConnectionUp => match self.state {
                State::Claiming { epoch, generation, .. } => (self, vec![A::SendClaim { epoch, generation }]),
                // A list that still holds comes again; a revocation may have been lost with the old connection.
                State::Listed { .. } => {
                    self.state = State::Prepared;
                    (self, Vec::new())
                }
                _ => (self, Vec::new()),
            },
        }
    }

    fn grant(mut self, granted: Epoch) -> (Self, Vec<DestinationAction>) {
        use DestinationAction as A;
        let mut actions = vec![A::Attached(granted)];
        match self.state {
            State::Claiming { epoch, .. } if epoch == granted => {}
            // An earlier process of this host made the claim: what is in flight is in the VMM's in-flight region.
            State::Prepared | State::Listed { .. } if granted == self.epoch.next() => {
                let waiting = std::mem::take(&mut self.waiting);
                actions.extend(waiting.into_iter().map(|ring| A::RunRing { ring, adopted: Vec::new() }));
            }
            // A repeated grant, or one for another epoch, changes nothing.
            _ => return (self, Vec::new()),
        }
        self.state = State::Attached;
        (self, actions)
    }

    fn fail(mut self, reason: String) -> (Self, Vec<DestinationAction>) {
        self.state = State::Failed;
        self.waiting.clear();
        (self, vec![DestinationAction::Fail(reason)])
    }

    /// Lets the rings that wait run, if all that they need is there. Claims with the first.
    fn try_start(mut self) -> (Self, Vec<DestinationAction>) {
        let (list, generation, claimed) = match &self.state {
            State::Listed { list, generation } => (list.clone(), *generation, false),
            State::Claiming { list, generation, .. } => (list.clone(), *generation, true),
            _ => return (self, Vec::new()),
        };
        if !claimed {
            if !all_here(&list, &self.waiting) {
                return (self, Vec::new());
            }
            if let Err(reason) = self.waiting.iter().try_for_each(|ring| known(&list, ring)) {
                return self.fail(reason);
            }
        }
        let mut actions = Vec::new();
        for ring in std::mem::take(&mut self.waiting) {
            let queue = ring.queue;
            let again = self.ran.contains(&queue);
            match if again { Ok((ring, Vec::new())) } else { adopted_by(&list, ring) } {
                Ok((ring, adopted)) => actions.push(DestinationAction::RunRing { ring, adopted }),
                Err(reason) if claimed => {
                    actions.push(DestinationAction::RefuseRing { queue, reason });
                    continue;
                }
                Err(reason) => return self.fail(reason),
            }
            if !again {
                self.ran.push(queue);
            }
        }
        if !claimed && !actions.is_empty() {
            let epoch = self.epoch.next();
            self.state = State::Claiming { list, generation, epoch };
            actions.insert(0, DestinationAction::SendClaim { epoch, generation });
        }
        (self, actions)
    }
}

#[cfg(test)]
mod tests {
    use belay_wire::{HeadIndex, QueueBase, RequestKind, RequestState, TxId};

    use super::*;

    fn request(queue: u16, head: u16) -> ListedRequest {
        ListedRequest {
            queue: QueueIndex(queue),
            head: HeadIndex(head),
            kind: RequestKind::Write,
            state: RequestState::Sent,
            txid: TxId(u64::from(head) + 1),
            offset: 0,
            len: 512,
        }
    }

    fn list(base: u16, requests: Vec<ListedRequest>) -> InflightList {
        InflightList { queues: vec![QueueBase { queue: QueueIndex(0), base }], requests }
    }

    const CLAIM: DestinationAction = DestinationAction::SendClaim { epoch: Epoch(4), generation: 1 };

    fn listed_as(list: InflightList) -> DestinationEvent {
        DestinationEvent::List { list, generation: 1 }
    }

    fn start(base: u16, used: u16) -> DestinationEvent {
        DestinationEvent::RingStarted(RingStart { queue: QueueIndex(0), size: 8, base, used })
    }

    #[test]
    fn ring_waits_for_the_list_then_claims_before_it_runs() {
        let (machine, actions) = Destination::prepared(Epoch(3)).handle(start(7, 5));
        assert!(actions.is_empty());
        let listed = vec![request(0, 1), request(0, 2)];
        let (machine, actions) = machine.handle(listed_as(list(7, listed.clone())));
        assert_eq!(actions[0], CLAIM);
        assert!(matches!(&actions[1], DestinationAction::RunRing { adopted, .. } if *adopted == listed));
        assert_eq!(machine.epoch(), Epoch(4));
        let (machine, actions) = machine.handle(DestinationEvent::Grant(Epoch(4)));
        assert_eq!(actions, [DestinationAction::Attached(Epoch(4))]);
        assert!(machine.is_attached());
    }

    #[test]
    fn list_that_does_not_fit_the_ring_claims_nothing() {
        let cases = [
            (list(7, vec![request(0, 1)]), "fewer requests than the ring has"),
            (list(8, vec![request(0, 1), request(0, 2)]), "another base"),
            (list(7, vec![request(0, 1), request(0, 1)]), "a head twice"),
            (list(7, vec![request(0, 1), request(0, 8)]), "a head outside the ring"),
            (
                InflightList { queues: vec![], requests: vec![request(0, 1), request(0, 2)] },
                "a queue that did not run",
            ),
        ];
        for (list, what) in cases {
            let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list));
            let (machine, actions) = machine.handle(start(7, 5));
            assert!(matches!(actions[..], [DestinationAction::Fail(_)]), "{what}: {actions:?}");
            assert!(!machine.has_claimed(), "{what}");
        }
    }

    /// Its VM had stopped, and its agent was killed: it has forgotten the requests in flight of the other ring.
    #[test]
    fn list_of_a_source_that_does_not_know_the_ring_claims_nothing() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(InflightList::default()));
        let (machine, actions) = machine.handle(start(5, 5));
        assert!(matches!(actions[..], [DestinationAction::Fail(_)]), "{actions:?}");
        assert!(!machine.has_claimed());
        // The disk was not used yet.
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(InflightList::default()));
        let (_, actions) = machine.handle(start(0, 0));
        assert_eq!(actions[0], CLAIM);
    }

    #[test]
    fn claim_waits_for_every_ring_with_requests_in_flight() {
        let mut listed = list(7, vec![request(0, 1), request(0, 2), request(1, 3)]);
        listed.queues.push(QueueBase { queue: QueueIndex(1), base: 1 });
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(listed));
        let (machine, actions) = machine.handle(start(7, 5));
        assert!(actions.is_empty(), "{actions:?}");
        let second = RingStart { queue: QueueIndex(1), size: 8, base: 1, used: 0 };
        let (_, actions) = machine.handle(DestinationEvent::RingStarted(second));
        assert_eq!(actions.len(), 3, "{actions:?}");
        assert_eq!(actions[0], CLAIM);
    }

    #[test]
    fn revoked_list_is_not_used() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(5, vec![])));
        let (machine, _) = machine.handle(DestinationEvent::ListRevoked);
        let (machine, actions) = machine.handle(start(5, 5));
        assert!(actions.is_empty());
        assert!(!machine.has_claimed());
    }

    #[test]
    fn claim_is_repeated_on_a_new_connection_until_the_grant_comes() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(5, vec![])));
        let (machine, _) = machine.handle(start(5, 5));
        let (machine, actions) = machine.handle(DestinationEvent::ConnectionUp);
        assert_eq!(actions, [CLAIM]);
        let (machine, _) = machine.handle(DestinationEvent::Grant(Epoch(4)));
        let (_, actions) = machine.handle(DestinationEvent::ConnectionUp);
        assert!(actions.is_empty());
    }

    #[test]
    fn second_ring_runs_without_a_second_claim() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(5, vec![])));
        let (machine, _) = machine.handle(start(5, 5));
        let second = RingStart { queue: QueueIndex(1), size: 8, base: 0, used: 0 };
        let (_, actions) = machine.handle(DestinationEvent::RingStarted(second));
        assert!(matches!(actions[..], [DestinationAction::RunRing { .. }]));
    }

    #[test]
    fn ring_of_a_guest_that_was_reset_starts_afresh() {
        // Its firmware had used the ring, its driver begins it anew: nothing of the list is meant for it.
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(57, vec![])));
        let (machine, actions) = machine.handle(start(0, 0));
        let [CLAIM, DestinationAction::RunRing { adopted, .. }] = &actions[..] else { panic!("{actions:?}") };
        assert!(adopted.is_empty());
        assert!(machine.has_claimed());
    }

    #[test]
    fn ring_that_its_vmm_has_wound_back_runs_from_where_the_list_says() {
        let listed = vec![request(0, 1), request(0, 2)];
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(7, listed.clone())));
        let (_, actions) = machine.handle(start(5, 5));
        let [CLAIM, DestinationAction::RunRing { ring, adopted }] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!((ring.base, adopted), (7, &listed));
    }

    #[test]
    fn ring_that_is_paused_while_the_grant_travels_adopts_nothing_twice() {
        let (machine, _) =
            Destination::prepared(Epoch(3)).handle(listed_as(list(7, vec![request(0, 1), request(0, 2)])));
        let (machine, _) = machine.handle(start(7, 5));
        let (machine, _) = machine.handle(DestinationEvent::RingStopped(QueueIndex(0)));
        // Four more were popped here, and none has ended.
        let (machine, actions) = machine.handle(start(11, 5));
        assert!(
            matches!(&actions[..], [DestinationAction::RunRing { adopted, .. }] if adopted.is_empty()),
            "{actions:?}"
        );
        assert!(machine.has_claimed());
    }

    #[test]
    fn ring_that_does_not_fit_after_the_claim_does_not_take_the_claim_back() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(5, vec![])));
        let (machine, _) = machine.handle(start(5, 5));
        let second = RingStart { queue: QueueIndex(1), size: 8, base: 3, used: 0 };
        let (machine, actions) = machine.handle(DestinationEvent::RingStarted(second));
        assert!(matches!(actions[..], [DestinationAction::RefuseRing { .. }]), "{actions:?}");
        let (machine, _) = machine.handle(DestinationEvent::Grant(Epoch(4)));
        assert!(machine.is_attached());
    }

    #[test]
    fn grant_after_a_restart_attaches_what_the_earlier_process_had_claimed() {
        let (machine, actions) = Destination::prepared(Epoch(3)).handle(start(5, 5));
        assert!(actions.is_empty());
        let (machine, actions) = machine.handle(DestinationEvent::Grant(Epoch(4)));
        assert!(
            matches!(actions[..], [DestinationAction::Attached(Epoch(4)), DestinationAction::RunRing { .. }]),
            "{actions:?}"
        );
        assert!(machine.is_attached());
        let (other, actions) = Destination::prepared(Epoch(3)).handle(DestinationEvent::Grant(Epoch(5)));
        assert!(actions.is_empty() && !other.is_attached());
    }

    #[test]
    fn list_whose_revocation_was_lost_with_its_connection_is_not_used() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(listed_as(list(5, vec![])));
        let (machine, _) = machine.handle(DestinationEvent::ConnectionUp);
        let (machine, actions) = machine.handle(start(5, 5));
        assert!(actions.is_empty());
        assert!(!machine.has_claimed());
    }
}
