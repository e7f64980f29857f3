//! The destination's side: the guest is coming; the device is claimed when its rings start.
//!
//! ```text
//!              List                   rings started, list fits           Grant
//!  Prepared ──────────▶ Listed ─────────────────────────────▶ Claiming ─────────▶ Attached
//!     ▲   ◀──────────     │                                      │
//!     │    ListRevoked    ▼                                      ▼
//!     └──────────────  Failed: nothing was claimed            (Refused: Failed)
//! ```
//!
//! Rings start one by one. A ring whose base differs from its used index has requests in flight, and waits for the
//! list; the first ring that can run makes the claim. After the claim the rest of the rings run as they come.

use belay_wire::{Epoch, InflightList, ListedRequest, QueueIndex, Refusal};

/// How the VMM started a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingStart {
    /// Which.
    pub queue: QueueIndex,
    /// Its entries.
    pub size: u16,
    /// What SET_VRING_BASE said: the next available index.
    pub base: u16,
    /// The used index found in guest memory.
    pub used: u16,
}

/// What happens to the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationEvent {
    /// The source's rings have stopped.
    List(InflightList),
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
    /// Ask for the device, under this epoch. New requests may be sent right behind.
    SendClaim(Epoch),
    /// The device is here: write it down.
    Attached(Epoch),
    /// Nothing was claimed, and nothing will be.
    Fail(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Prepared,
    Listed(InflightList),
    Claiming { list: InflightList, epoch: Epoch },
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
}

impl Destination {
    /// A device that may come, whose source is at this epoch.
    #[must_use]
    pub fn prepared(epoch: Epoch) -> Self {
        Self { epoch, state: State::Prepared, waiting: Vec::new() }
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
            State::Prepared | State::Listed(_) => "prepared",
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
            DestinationEvent::List(list) => {
                if matches!(self.state, State::Prepared | State::Listed(_)) {
                    self.state = State::Listed(list);
                    return self.try_start();
                }
                (self, Vec::new())
            }
            DestinationEvent::ListRevoked => match self.state {
                State::Listed(_) => {
                    self.state = State::Prepared;
                    (self, Vec::new())
                }
                State::Claiming { .. } => self.fail("the source runs again".to_owned()),
                _ => (self, Vec::new()),
            },
            DestinationEvent::RingStarted(ring) => {
                self.waiting.retain(|waiting| waiting.queue != ring.queue);
                self.waiting.push(ring);
                self.try_start()
            }
            DestinationEvent::RingStopped(queue) => {
                self.waiting.retain(|waiting| waiting.queue != queue);
                (self, Vec::new())
            }
            DestinationEvent::Grant(epoch) => match self.state {
                State::Claiming { epoch: claimed, .. } if claimed == epoch => {
                    self.state = State::Attached;
                    (self, vec![A::Attached(epoch)])
                }
                // A repeated grant, or one for another epoch, changes nothing.
                _ => (self, Vec::new()),
            },
            DestinationEvent::Refused(refusal) => match self.state {
                State::Attached | State::Failed => (self, Vec::new()),
                _ => self.fail(format!("the source refused: {refusal}")),
            },
            DestinationEvent::ConnectionUp => match self.state {
                State::Claiming { epoch, .. } => (self, vec![A::SendClaim(epoch)]),
                _ => (self, Vec::new()),
            },
        }
    }

    fn fail(mut self, reason: String) -> (Self, Vec<DestinationAction>) {
        self.state = State::Failed;
        self.waiting.clear();
        (self, vec![DestinationAction::Fail(reason)])
    }

    /// Lets the rings that wait run, if all that they need is there. Claims with the first.
    fn try_start(mut self) -> (Self, Vec<DestinationAction>) {
        let (list, claimed) = match &self.state {
            State::Listed(list) => (list.clone(), false),
            State::Claiming { list, .. } => (list.clone(), true),
            _ => return (self, Vec::new()),
        };
        let mut actions = Vec::new();
        for ring in std::mem::take(&mut self.waiting) {
            match adopted_by(&list, ring) {
                Ok(adopted) => actions.push(DestinationAction::RunRing { ring, adopted }),
                Err(reason) => return self.fail(reason),
            }
        }
        if !claimed && !actions.is_empty() {
            let epoch = self.epoch.next();
            self.state = State::Claiming { list, epoch };
            actions.insert(0, DestinationAction::SendClaim(epoch));
        }
        (self, actions)
    }
}

/// The listed requests of a ring, checked against how the ring stands in guest memory.
fn adopted_by(list: &InflightList, ring: RingStart) -> Result<Vec<ListedRequest>, String> {
    let queue = ring.queue;
    let adopted: Vec<ListedRequest> =
        list.requests.iter().filter(|request| request.queue == queue).copied().collect();
    let outstanding = ring.base.wrapping_sub(ring.used);
    if usize::from(outstanding) != adopted.len() || outstanding > ring.size {
        return Err(format!(
            "queue {queue}: the ring has {outstanding} requests in flight (base {}, used {}), the source's list has {}",
            ring.base,
            ring.used,
            adopted.len()
        ));
    }
    match list.queues.iter().find(|listed| listed.queue == queue) {
        Some(listed) if listed.base != ring.base => {
            return Err(format!(
                "queue {queue}: the ring starts at {}, the source stopped at {}",
                ring.base, listed.base
            ));
        }
        None if outstanding != 0 => return Err(format!("queue {queue} did not run at the source")),
        _ => {}
    }
    let mut heads = vec![false; usize::from(ring.size)];
    for request in &adopted {
        match heads.get_mut(usize::from(request.head.0)) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => return Err(format!("queue {queue}: head {} is listed twice", request.head.0)),
            None => return Err(format!("queue {queue}: head {} is outside the ring", request.head.0)),
        }
    }
    Ok(adopted)
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

    fn start(base: u16, used: u16) -> DestinationEvent {
        DestinationEvent::RingStarted(RingStart { queue: QueueIndex(0), size: 8, base, used })
    }

    #[test]
    fn ring_waits_for_the_list_then_claims_before_it_runs() {
        let (machine, actions) = Destination::prepared(Epoch(3)).handle(start(7, 5));
        assert!(actions.is_empty());
        let listed = vec![request(0, 1), request(0, 2)];
        let (machine, actions) = machine.handle(DestinationEvent::List(list(7, listed.clone())));
        assert_eq!(actions[0], DestinationAction::SendClaim(Epoch(4)));
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
            let (machine, _) = Destination::prepared(Epoch(3)).handle(DestinationEvent::List(list));
            let (machine, actions) = machine.handle(start(7, 5));
            assert!(matches!(actions[..], [DestinationAction::Fail(_)]), "{what}: {actions:?}");
            assert!(!machine.has_claimed(), "{what}");
        }
    }

    #[test]
    fn revoked_list_is_not_used() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(DestinationEvent::List(list(5, vec![])));
        let (machine, _) = machine.handle(DestinationEvent::ListRevoked);
        let (machine, actions) = machine.handle(start(5, 5));
        assert!(actions.is_empty());
        assert!(!machine.has_claimed());
    }

    #[test]
    fn claim_is_repeated_on_a_new_connection_until_the_grant_comes() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(DestinationEvent::List(list(5, vec![])));
        let (machine, _) = machine.handle(start(5, 5));
        let (machine, actions) = machine.handle(DestinationEvent::ConnectionUp);
        assert_eq!(actions, [DestinationAction::SendClaim(Epoch(4))]);
        let (machine, _) = machine.handle(DestinationEvent::Grant(Epoch(4)));
        let (_, actions) = machine.handle(DestinationEvent::ConnectionUp);
        assert!(actions.is_empty());
    }

    #[test]
    fn second_ring_runs_without_a_second_claim() {
        let (machine, _) = Destination::prepared(Epoch(3)).handle(DestinationEvent::List(list(5, vec![])));
        let (machine, _) = machine.handle(start(5, 5));
        let second = RingStart { queue: QueueIndex(1), size: 8, base: 0, used: 0 };
        let (_, actions) = machine.handle(DestinationEvent::RingStarted(second));
        assert!(matches!(actions[..], [DestinationAction::RunRing { .. }]));
    }
}
